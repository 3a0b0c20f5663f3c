"""Folding adapters into kernels, taking them off, turning them off."""

import contextlib
import dataclasses
import logging
import weakref

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.conversion import adapter_state
from keras_lora_dropout.conversion.adapter_state import AdapterState
from keras_lora_dropout.conversion.plain import plain_recipe
from keras_lora_dropout.conversion.plain import strip
from keras_lora_dropout.conversion.recipe import recipe_of
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.core.turns import turn_of
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapter import plain_class

logger = logging.getLogger("keras_lora_dropout")

# What `unmerge_adapters` needs, by the merged model.
merged_models: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Merging:
    """Mixin of `AdaptedModel`: plain models out of adapted ones."""

    _adapters_disabled = False

    @in_turn
    def merge_adapters(self, *, keep_kernels=True):
        """Fold the mean network into the kernels, in place.

        The model is the plain one again, of its own class: no adapter, no
        attribute and no method of this package is left, and what trained before
        `enable_lora_dropout` trains again. Its outputs are those of `predict`.
        Adapters that are not active are lost to it.

        A quantized kernel is quantized again after the sum, as it was before,
        so that the memory stays what it was; the rounding changes the outputs,
        and a warning says by how much.

        Args:
            keep_kernels: Boolean. Whether the original kernels are kept in the
                host's memory, as long as the model lives, so that
                `unmerge_adapters(model)` can restore them bit for bit.
                Subtracting the delta again would leave rounding errors.

        Returns:
            The same model object, plain.

        Raises:
            ValueError: If the model is not built.
        """
        validation.boolean("keep_kernels", keep_kernels)
        self._require_built()
        undo = Unmerged.of(self) if keep_kernels else None
        losses = {}
        for path, layer in self.adapted_layers:
            losses[path] = fold(layer, layer)
        strip(self)
        _report_rounding(self, losses)
        if undo is not None:
            merged_models[self] = undo
        return self

    def merge_instances(self, num_samples=None, seed=None):
        """Make one plain model of each mask instance.

        The mean of their outputs is what `ensemble_predict` returns for the
        same `num_samples` and `seed`, so that any runtime can serve the
        ensemble. Each model is a copy with weights of its own; they are made
        one at a time.

        Args:
            num_samples: Positive integer or `None` for the model's own N.
            seed: Integer or `None` for new instances.

        Yields:
            `num_samples` plain models of the class that the model had before
            `enable_lora_dropout`.

        Raises:
            ValueError: If an argument is out of range, or if the model cannot
                be rebuilt from its recipe (`get_config`).
        """
        draws = self._instances(num_samples, seed)
        keep = [draws.masks_of(layer) for _, layer in self.adapted_layers]
        return self._merged_copies(len(draws.values), keep)

    def _merged_copies(self, count, keep):
        for n in range(count):
            yield merged_copy(self, [(a[n], b[n]) for a, b in keep])

    @contextlib.contextmanager
    def disable_adapters(self):
        """Context in which the model computes without its adapters.

        `predict`, `evaluate` and calls give the base model's output, with the
        head as it is trained. Training inside is refused. Other threads wait
        until the context is left.
        """
        with turn_of(self):
            if self._adapters_disabled:
                yield
                return
            layers = [layer for _, layer in self.adapted_layers]
            with self._functions_of("disabled adapters"):
                self._adapters_disabled = True
                for layer in layers:
                    layer.adapter_enabled = False
                try:
                    yield
                finally:
                    for layer in layers:
                        layer.adapter_enabled = True
                    self._adapters_disabled = False

    def _check_enabled(self, method):
        if self._adapters_disabled:
            raise ValueError(
                f"`{method}` was called inside `disable_adapters`, where the "
                "adapters take no part. Leave the `with` block to train."
            )


@dataclasses.dataclass(frozen=True)
class Unmerged:
    """What an adapted model was before `merge_adapters`.

    Attributes:
        model_class: Its class.
        kernels: Dictionary of layer path -> NumPy arrays of the weights that
            make up the kernel, one, or more if it is quantized.
        recipe: What `recipe_of` returned.
        state: `AdapterState` of the active adapter.
        inactive: Dictionary of name -> `AdapterState`.
        random_states: States of its random generators.
    """

    model_class: type
    kernels: dict
    recipe: dict
    state: AdapterState
    inactive: dict
    random_states: np.ndarray

    @classmethod
    def of(cls, model):
        return cls(
            type(model),
            {
                path: [
                    adapter_state.array_of(weight)
                    for weight in quantized.kernel_weights(layer)
                ]
                for path, layer in model.adapted_layers
            },
            recipe_of(model),
            adapter_state.take(model),
            dict(model._inactive_adapters),
            model._random_states(),
        )

    def restore_state(self, model):
        """Give the model its factors, ranks and random states; not the head."""
        for name, variable in adapter_state.own_variables(model).items():
            variable.assign(self.state.tensors[name])
        model._inactive_adapters = dict(self.inactive)
        model._set_random_states(self.random_states)


def merged_kernels(layer, keep=None):
    """Return the kernels of a layer with their deltas folded in.

    Args:
        layer: An adapted layer.
        keep: `None` for the mean network, or the masks `(mask_a, mask_b)` of
            one instance.

    Returns:
        List of tensors of the kernels' shapes, most often of one; the sum is
        made in float32, or in float64 for such a kernel. They have the
        kernels' dtype, if that is a float.
    """
    if quantized.is_quantized(layer):
        plain = plain_class(type(layer))
        kernels = [quantized.dequantized_kernel(layer, layer._axes, plain)]
    else:
        weights = quantized.kernel_weights(layer)
        kernels = [ops.convert_to_tensor(weight.value) for weight in weights]
    if not layer.lora_rank:
        return [ops.copy(kernel) for kernel in kernels]
    own_dtype = kernels[0].dtype
    dtype = keras.backend.result_type(own_dtype, "float32")
    a, b = layer._factor_pair(*(ops.cast(f, dtype) for f in layer.factors))
    if keep is not None:
        keep = [ops.cast(mask, dtype) for mask in keep]
    scale = masks.delta_scale(
        layer.scaling, layer.dropout_rate, layer.rescale, keep is not None
    )
    totals = [
        ops.cast(kernel, dtype) + delta
        for kernel, delta in zip(
            kernels, layer._axes.deltas(a, b * scale, keep), strict=True
        )
    ]
    if layer.initial_factors:
        a, b = (ops.cast(factor, dtype) for factor in layer.initial_factors)
        starts = layer._axes.deltas(a, b * layer.mean_scale)
        totals = [t - start for t, start in zip(totals, starts, strict=True)]
    gain = layer.gain()
    if gain is not None:
        columns = layer._axes.columns(ops.cast(gain, dtype))
        totals = [total * columns for total in totals]
    return [ops.cast(total, own_dtype) for total in totals]


def fold(layer, target, keep=None):
    """Give a layer the kernels of an adapted layer with their deltas.

    Args:
        layer: An adapted layer.
        target: The layer itself, or its counterpart in a copy of the model.
        keep: As for `merged_kernels`.

    Returns:
        What rounding to a quantized kernel has lost: the largest error as a
        part of the largest entry of the kernel. 0 for a kernel of floats, and
        for one to which nothing was added.
    """
    weights = quantized.kernel_weights(target)
    if not quantized.is_quantized(layer):
        for weight, kernel in zip(
            weights, merged_kernels(layer, keep), strict=True
        ):
            weight.assign(kernel)
        return 0.0
    if not layer.lora_rank:
        return 0.0
    (exact,) = merged_kernels(layer, keep)
    values = quantized.quantized_like(layer, exact)
    for weight, value in zip(weights, values, strict=True):
        weight.assign(value)
    rounded = quantized.dequantized_kernel(
        target, layer._axes, plain_class(type(layer))
    )
    error = ops.max(ops.abs(rounded - exact)) / ops.max(ops.abs(exact))
    return float(ops.convert_to_numpy(error))


def _report_rounding(model, losses):
    """Warn of what the kernels of a quantized model lost, by layer path."""
    path = max(losses, key=losses.get)
    if losses[path]:
        logger.warning(
            "The merged kernels of model %r were quantized again: entries "
            "changed by up to %.2g of the kernel's largest (layer %r). The "
            "adapted model is exact: keep it with `save`, or go back with "
            "`unmerge_adapters`.",
            model.name,
            losses[path],
            path,
        )


def merged_copy(model, keep=None):
    """Return a plain model with the deltas folded in, a copy.

    A preprocessor is shared, not copied.

    Args:
        model: An adapted model.
        keep: `None` for the mean network, or a list of `(mask_a, mask_b)`, one
            for each adapted layer.

    Raises:
        ValueError: If the model's recipe builds another model.
    """
    recipe = plain_recipe(model)
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is not None:
        recipe["config"]["preprocessor"] = None
    plain = keras.saving.deserialize_keras_object(recipe)
    if preprocessor is not None:
        plain.preprocessor = preprocessor
    ours = set(map(id, adapter_state.own_variables(model).values()))
    values = [v for v in model.weights if id(v) not in ours]
    if [v.shape for v in plain.weights] != [v.shape for v in values]:
        raise ValueError(
            f'Model "{model.name}" cannot be copied: its recipe (`get_config`) '
            "builds a model with other weights. Define `get_config` and "
            "`from_config` so that they build the same one."
        )
    for variable, value in zip(plain.weights, values, strict=True):
        variable.assign(ops.copy(value.value))  # JAX gives buffers away.
    layers = dict(
        zip(layer_paths(model), layer_paths(plain).values(), strict=True)
    )
    adapted = model.adapted_layers
    losses = {
        path: fold(layer, layers[path], masks_of_layer)
        for (path, layer), masks_of_layer in zip(
            adapted, keep or [None] * len(adapted), strict=True
        )
    }
    _report_rounding(model, losses)
    return plain
