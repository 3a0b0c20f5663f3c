"""What all adapted layers share: settings, factors, masks and delta."""

import math
import random

import keras
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.instances import check_rows
from keras_lora_dropout.core.keras_internals import Unquantizable
from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.layers import quantized

_RANDOM_STATE = "seed_generator_state"


class LoRADropoutAdapter(Unquantizable):
    """Mixin that gives a linear Keras layer a LoRA Dropout adapter.

    A concrete layer adds two parts. `layers/linear.py` says on which axes its
    kernel acts (`_factor_axes`). A factorization says how its delta is written:
    which weights it has (`factor_names`, `_factor_shapes`, `_initial_factors`)
    and which two factors they make (`_factor_pair`). The rest, here, is the
    same for all.
    """

    factor_names: tuple[str, ...] = ()
    adapter_enabled = True

    @classmethod
    def from_config(cls, config):
        if config.get("rank") != 0:
            return super().from_config(config)
        # What `replace_factors` may leave, but no setting for users.
        layer = super().from_config({**config, "rank": 1})
        layer.lora_rank = 0
        return layer

    def _set_adapter_settings(self, rank, alpha, dropout_rate, rescale, seed):
        self.lora_rank = validation.positive_integer("rank", rank)
        self.lora_alpha = validation.alpha(alpha, self.lora_rank)
        self.dropout_rate = validation.dropout_rate(dropout_rate)
        self.rescale = validation.boolean("rescale", rescale)
        self.seed = validation.seed(seed)

    @property
    def scaling(self):
        """Multiplier `alpha / rank` of the delta."""
        return self.lora_alpha / max(self.lora_rank, 1)

    def build(self, input_shape):
        # Keras would add its own LoRA for a layer with a `lora_rank`.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)
        self.lora_rank = rank
        axes = self._factor_axes(quantized.kernel_shape(self))
        check_linear(self, rank, axes, f'layer "{self.name}"')
        self._add_factors()

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f'Layer "{self.name}" already has a LoRA Dropout adapter. For '
            "plain LoRA, build it with `dropout_rate=0` instead of calling "
            "`enable_lora`."
        )

    def _add_factors(self):
        """Freeze the kernel and create the factors next to it."""
        axes = self._factor_axes(quantized.kernel_shape(self))
        streams = random.Random(self.seed)  # one seed, independent streams
        self._create_factors(axes, self._initial_factors(streams))
        with unlocked(self):
            self.seed_generator = keras.random.SeedGenerator(next_seed(streams))
        self._axes = axes
        self._kernel.trainable = False

    def _create_factors(self, axes, initializers):
        """Create the weights of the factors, one initializer each."""
        shapes = self._factor_shapes(axes, self.lora_rank)
        with unlocked(self):
            for name, shape, initializer in zip(
                self.factor_names, shapes, initializers, strict=True
            ):
                weight = self.add_weight(
                    name=name,
                    shape=shape,
                    initializer=initializer,
                    dtype="float32",
                    trainable=self.lora_rank > 0,
                )
                setattr(self, name, weight)

    def drop_factors(self):
        """Lose the weights of the factors; others must take their place."""
        forget_attributes(self, self.factor_names)

    def replace_factors(self, values, alpha):
        """Give the adapter other factors, of any rank, in place.

        The weights stay the same objects if the rank does. With rank 0 the
        layer computes its kernel's product alone, and nothing of it trains.

        Args:
            values: Arrays in the order of `factor_names`, such as
                `(input_dim, rank)` and `(rank, output_dim)`.
            alpha: Positive number. Strength, so that `scaling = alpha / rank`.
        """
        self.resize(values[-1].shape[0], alpha)
        for factor, value in zip(self.factors, values, strict=True):
            factor.assign(value)

    def resize(self, rank, alpha):
        """Give the factors another rank, in place; they are zeros then.

        Args:
            rank: Integer, 0 or more. Nothing happens to factors of that rank.
            alpha: Positive number. Strength, as in `replace_factors`.
        """
        self.lora_alpha = float(alpha)
        if rank == self.lora_rank:
            return
        trains = not self.lora_rank or any(f.trainable for f in self.factors)
        self.drop_factors()
        self.lora_rank = rank
        self._create_factors(self._axes, ["zeros"] * len(self.factor_names))
        for factor in self.factors:
            factor.trainable = trains and rank > 0

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
        return [getattr(self, name) for name in self.factor_names]

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

    def _adapted_product(self, inputs, training):
        """The kernel's product and the adapter's part, [L] Eq. 2-3.

        `diag(mask_a) A` and `B diag(mask_b)` are formed once per mask, in the
        size of the factors; activations are never multiplied by a mask.

        Returns:
            The layer's output without its bias; a tuple of its parts where
            the pass asks for them.
        """
        axes = self._axes
        active = masks.current_draws()
        if active is not None and active.covers(self):
            active.plan.called.add(id(self))
        # Factors are float32 under any policy, arithmetic is not.
        factor_a, factor_b = (
            ops.expand_dims(factor, 0)
            for factor in self._factor_pair(
                *(ops.cast(f, self.compute_dtype) for f in self.factors)
            )
        )
        keep = self._masks(training)
        shared = in_parts = False
        if keep is not None:
            shared, in_parts = self._what_is_shared()
            if not shared:
                self._check_groups(inputs, keep[0].shape[0], axes)
            factor_a = factor_a * ops.expand_dims(keep[0], 2)
            factor_b = factor_b * ops.expand_dims(keep[1], 1)
        scale = masks.delta_scale(
            self.scaling, self.dropout_rate, self.rescale, keep is not None
        )
        pair = factor_a, factor_b * scale, axes
        if in_parts:
            base = self._kernel_product(inputs)
            return base, *factors.shared_parts(inputs, *pair)
        if quantized.is_quantized(self):
            delta = factors.delta_product(inputs, *pair, shared=shared)
            return ops.add(self._kernel_product(inputs), delta)
        in_groups = self._multiplies_in_groups(inputs, factor_a.shape[0])
        return factors.adapted_product(
            inputs, self.kernel, *pair, shared=shared, in_groups=in_groups
        )

    def _kernel_product(self, inputs):
        if not quantized.is_quantized(self):
            return factors.kernel_product(inputs, self.kernel, self._axes)
        plain = plain_class(type(self))
        return quantized.quantized_product(self, inputs, plain)

    def _multiplies_in_groups(self, inputs, groups):
        """Whether the kernel's product has the layout of the mask groups.

        XLA computes what two layouts read, such as an activation, once for
        each. That is worse than a copy of the kernel for each group, unless
        groups are small.
        """
        axes, shape = self._axes, inputs.shape
        if keras.config.backend() != "jax" or groups in (None, 1):
            return False
        if not all(isinstance(size, int) for size in shape):
            return False
        rows = math.prod(shape) // axes.input_dim
        sizes = axes.input_dim, axes.output_dim
        return groups * math.prod(sizes) <= rows * sum(sizes)

    def _what_is_shared(self):
        """Whether all mask groups share one input, and want parts alone."""
        draws = masks.current_draws()
        if draws is None or not draws.covers(self):
            return False, False
        return draws.inputs_shared, draws.in_parts

    def _check_groups(self, inputs, groups, axes):
        if groups == 1:
            return
        rows = masks.current_draws().rows
        what = f'The input of layer "{self.path or self.name}"'
        check_rows(what, inputs.shape, rows if axes.batch_leads else -1)

    def call(self, inputs, training=None):
        if self.lora_rank and self.adapter_enabled:
            x = self._adapted_product(inputs, training)
        else:
            x = self._kernel_product(inputs)
        parts = ()
        if isinstance(x, tuple):
            x, *parts = x
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if parts:
            return x, *parts
        if self.activation is not None:
            x = self._activate(x, training)
        return x

    def quantized_call(self, *args, **kwargs):
        """What Keras calls in place of `call` if the kernel is quantized."""
        return self.call(*args, **kwargs)

    def _activate(self, x, training):
        # JAX would keep every intermediate of the activation for the backward
        # pass; recomputed from its input, they cost less than their storage.
        is_plain = self.activation is keras.activations.linear
        not_training = training is None or training is False
        if keras.config.backend() != "jax" or not_training or is_plain:
            return self.activation(x)
        return keras.remat(self.activation)(x)

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
            for name in self.factor_names:
                store[name] = getattr(self, name)
            store[_RANDOM_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        # Keras counts the entries of weights alone.
        keys = set(store.keys()) - {_RANDOM_STATE}
        weights = {key: store[key] for key in keys}
        super().load_own_variables(weights)
        for name in self.factor_names:
            getattr(self, name).assign(store[name])
        self.seed_generator.state.assign(store[_RANDOM_STATE])


def plain_class(cls, mixin=LoRADropoutAdapter):
    """Return the Keras class that an adapted class stands for.

    Args:
        cls: Class of an adapted layer, or of an adapted model.
        mixin: What adapted classes, and none else, inherit from.
    """
    return next(
        base
        for base in cls.__mro__
        if issubclass(base, keras.Layer) and not issubclass(base, mixin)
    )


def check_linear(layer, rank, axes, where):
    """Raise `ValueError` if a built linear layer cannot hold an adapter.

    Args:
        layer: A built `Dense` or `EinsumDense`.
        rank: Rank of the adapter.
        axes: `FactorAxes` of the layer's kernel.
        where: String that names the layer in messages.
    """
    if layer.lora_enabled:
        raise ValueError(
            f"Cannot adapt {where}: Keras's own LoRA is already enabled on it. "
            "Start from a model on which `enable_lora` was not called."
        )
    mode = layer.quantization_mode
    if mode is not None and mode not in quantized.MODES:
        raise ValueError(
            f"Cannot adapt {where}: its kernel is quantized ({mode}), but "
            f"adapters go on {' and '.join(quantized.MODES)} alone. Quantize "
            "the model to one of these, load it in a float dtype, such as "
            "bfloat16, or leave the layer out with `target_layers`."
        )
    if layer.kernel_constraint is not None:
        raise ValueError(
            f"Cannot adapt {where}: its kernel has the constraint "
            f"{layer.kernel_constraint!r}, which a frozen kernel plus a delta "
            "does not keep. Build the layer without `kernel_constraint`, or "
            "leave it out with `target_layers`."
        )
    validation.rank_fits(rank, axes.input_dim, axes.output_dim, where)


def next_seed(streams):
    """Draw the seed of one weight or generator of a layer."""
    return streams.randrange(validation.MAX_SEED)
