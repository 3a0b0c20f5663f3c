"""What all adapted layers share: settings, factors, masks and delta."""

import functools
import random

import keras
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.instances import check_rows
from keras_lora_dropout.core.keras_internals import unlocked

_RANDOM_STATE = "seed_generator_state"


class LoRADropoutAdapter:
    """Mixin that gives a linear Keras layer a LoRA Dropout adapter.

    A concrete layer names the axes of its kernel (`_factor_axes`) and its own
    product (`_frozen_product`); the rest is the same for all of them.
    """

    def _set_adapter_settings(self, rank, alpha, dropout_rate, rescale, seed):
        self.lora_rank = validation.positive_integer("rank", rank)
        self.lora_alpha = validation.alpha(alpha, self.lora_rank)
        self.dropout_rate = validation.dropout_rate(dropout_rate)
        self.rescale = validation.boolean("rescale", rescale)
        self.seed = validation.seed(seed)

    @property
    def scaling(self):
        """Multiplier `alpha / rank` of the delta."""
        return self.lora_alpha / self.lora_rank

    def build(self, input_shape):
        # Keras would add its own LoRA for a layer with a `lora_rank`.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)
        self.lora_rank = rank
        check_adaptable(self, rank, f'layer "{self.name}"')
        self._add_factors()

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f'Layer "{self.name}" already has a LoRA Dropout adapter. For '
            "plain LoRA, build it with `dropout_rate=0` instead of calling "
            "`enable_lora`."
        )

    def _add_factors(self):
        """Freeze the kernel and create both factors next to it."""
        axes = self._factor_axes(tuple(self._kernel.shape))
        streams = random.Random(self.seed)  # one seed, independent streams
        with unlocked(self):
            self.lora_kernel_a = self.add_weight(
                name="lora_kernel_a",
                shape=(axes.input_dim, self.lora_rank),
                initializer=keras.initializers.HeUniform(_next_seed(streams)),
                dtype="float32",
            )
            self.lora_kernel_b = self.add_weight(
                name="lora_kernel_b",
                shape=(self.lora_rank, axes.output_dim),
                initializer="zeros",
                dtype="float32",
            )
            self.seed_generator = keras.random.SeedGenerator(
                _next_seed(streams)
            )
        self._axes = axes
        self._kernel.trainable = False

    @property
    def trainable(self):
        """Whether the layer trains; its kernel never does."""
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        if self.built:
            self._kernel.trainable = False

    @property
    def factors(self):
        """The trainable weights of the adapter."""
        return [self.lora_kernel_a, self.lora_kernel_b]

    @property
    def mask_width(self):
        """Number of mask entries of one instance: input and output features."""
        return sum(self.mask_sizes)

    @property
    def mask_sizes(self):
        """Lengths of `mask_a` and `mask_b`."""
        return self.lora_kernel_a.shape[0], self.lora_kernel_b.shape[1]

    def _masks(self, training):
        """Return `mask_a (groups, in)`, `mask_b (groups, out)` or `None`."""
        if self.dropout_rate == 0:
            return None
        active = masks.current_draws()
        if active is not None and active.covers(self):
            # The pass decides, not `training`, which gradient checkpointing on
            # JAX passes as a traced value.
            draws = active.of(self)
        elif training:
            draws = masks.draw_uniform(
                (1, self.mask_width), self.seed_generator
            )
        else:
            draws = None
        if draws is None:
            return None
        keep = masks.keep_mask(draws, self.dropout_rate, self.compute_dtype)
        input_dim = self.mask_sizes[0]
        return keep[:, :input_dim], keep[:, input_dim:]

    def _delta(self, inputs, training):
        """The adapter's part of the output, [L] Eq. 2-3.

        `diag(mask_a) A` and `B diag(mask_b)` are formed once per mask, in the
        size of the factors; activations are never multiplied by a mask.
        """
        axes = self._axes
        # Factors are float32 under any policy, arithmetic is not.
        factor_a, factor_b = (
            ops.expand_dims(ops.cast(factor, self.compute_dtype), 0)
            for factor in self.factors
        )
        keep = self._masks(training)
        if keep is not None:
            self._check_groups(inputs, keep[0].shape[0], axes)
            factor_a = factor_a * ops.expand_dims(keep[0], 2)
            factor_b = factor_b * ops.expand_dims(keep[1], 1)
        scale = masks.delta_scale(
            self.scaling, self.dropout_rate, self.rescale, keep is not None
        )
        return factors.low_rank_delta(inputs, factor_a, factor_b * scale, axes)

    def _check_groups(self, inputs, groups, axes):
        if groups == 1:
            return
        rows = masks.current_draws().rows
        what = f'The input of layer "{self.path or self.name}"'
        check_rows(what, inputs.shape, rows if axes.batch_leads else -1)

    def call(self, inputs, training=None):
        x = ops.add(self._frozen_product(inputs), self._delta(inputs, training))
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Let gradient checkpointing see the masks of the first forward pass.

        The layer is computed again during the backward pass, when the masks
        that it read are no longer in force.
        """
        draws = masks.current_draws()
        if draws is None or not draws.covers(self):
            values = None
            if kwargs.get("training"):
                shape = (1, self.mask_width)
                values = masks.draw_uniform(shape, self.seed_generator)
            draws = masks.Draws(masks.MaskPlan([self]), values)
        return super().rematerialized_call(
            masks.with_draws(draws, layer_call), *args, **kwargs
        )

    def get_config(self):
        config = super().get_config()
        config.pop("lora_rank", None)
        config.pop("lora_alpha", None)
        return {
            **config,
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout_rate": self.dropout_rate,
            "rescale": self.rescale,
            "seed": self.seed,
        }

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.built:
            store["lora_kernel_a"] = self.lora_kernel_a
            store["lora_kernel_b"] = self.lora_kernel_b
            store[_RANDOM_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        # Keras counts the entries of weights alone.
        keys = set(store.keys()) - {_RANDOM_STATE}
        weights = {key: store[key] for key in keys}
        super().load_own_variables(weights)
        self.lora_kernel_a.assign(store["lora_kernel_a"])
        self.lora_kernel_b.assign(store["lora_kernel_b"])
        self.seed_generator.state.assign(store[_RANDOM_STATE])


def reject_keras_lora(kwargs):
    """Refuse the constructor arguments of Keras's own LoRA."""
    for name in ("lora_rank", "lora_alpha"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"`{name}` belongs to Keras's own LoRA and is not allowed "
                f"here. Pass `{name.removeprefix('lora_')}` instead."
            )


def check_adaptable(layer, rank, where):
    """Raise `ValueError` if a built linear layer cannot take an adapter."""
    if isinstance(layer, LoRADropoutAdapter) and layer.built:
        if hasattr(layer, "lora_kernel_a"):
            raise ValueError(
                f"LoRA Dropout is already enabled on {where}. A layer takes "
                "one adapter; start from a fresh model to change its settings."
            )
    if not layer.built:
        raise ValueError(
            f"Cannot adapt {where}: it is not built yet. Call the model on a "
            "batch of data first, or give it an `Input`."
        )
    if layer.lora_enabled:
        raise ValueError(
            f"Cannot adapt {where}: Keras's own LoRA is already enabled on it. "
            "Start from a model on which `enable_lora` was not called."
        )
    if layer.quantization_mode is not None:
        raise ValueError(
            f"Cannot adapt {where}: its kernel is quantized "
            f"({layer.quantization_mode}), which is not supported. Load the "
            "model in a float dtype, such as bfloat16, or leave the layer out "
            "with `target_layers`."
        )
    if layer.kernel_constraint is not None:
        raise ValueError(
            f"Cannot adapt {where}: its kernel has the constraint "
            f"{layer.kernel_constraint!r}, which a frozen kernel plus a delta "
            "does not keep. Build the layer without `kernel_constraint`, or "
            "leave it out with `target_layers`."
        )
    axes = adapter_class(type(layer))._factor_axes(
        layer, tuple(layer._kernel.shape)
    )
    validation.rank_fits(rank, axes.input_dim, axes.output_dim, where)


def adapt(layer, *, rank, alpha, dropout_rate, rescale, seed):
    """Give a built `Dense` or `EinsumDense` an adapter, in place.

    The object stays the same: graphs, attributes and trackers that refer to it
    stay valid. Only its class changes, to a subclass of its own.
    """
    layer.__class__ = adapter_class(type(layer))
    layer._set_adapter_settings(rank, alpha, dropout_rate, rescale, seed)
    layer._add_factors()


def can_adapt(layer):
    """Whether the layer is a linear layer whose product is Keras's own."""
    return adapter_class(type(layer)) is not None


_ADAPTER_CLASSES: dict[type, type] = {}


def adapts(keras_class):
    """Decorator: register an adapted layer for a Keras layer class."""

    def register(adapter):
        _ADAPTER_CLASSES[keras_class] = adapter
        return adapter

    return register


@functools.cache
def adapter_class(layer_class):
    """Return the adapted subclass of a layer class, or `None`.

    A subclass of `Dense` that keeps `Dense.call` gets a class that is still a
    subclass of it; one with a `call` of its own computes something else.
    """
    if issubclass(layer_class, LoRADropoutAdapter):
        return layer_class
    for keras_class, adapter in _ADAPTER_CLASSES.items():
        if layer_class is keras_class:
            return adapter
        if issubclass(layer_class, keras_class):
            if layer_class.call is not keras_class.call:
                return None
            name = f"LoRADropout{layer_class.__name__}"
            return type(name, (adapter, layer_class), {})
    return None


def _next_seed(streams):
    return streams.randrange(validation.MAX_SEED)
