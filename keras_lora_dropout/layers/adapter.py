"""What all adapted layers share: settings, factors and masks."""

import random

import keras

from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.instances import check_rows
from keras_lora_dropout.core.keras_internals import Unquantizable
from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.core.light_ops import cast
from keras_lora_dropout.core.sharding import follow_kernel
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.initial_factors import InitialFactors

_RANDOM_STATE = "seed_generator_state"
_CONSTRAINTS = (
    "kernel_constraint",
    "embeddings_constraint",
    "depthwise_constraint",
)


class LoRADropoutAdapter(InitialFactors, Unquantizable):
    """Mixin that gives a linear Keras layer a LoRA Dropout adapter.

    A concrete layer adds two parts. A kind of layer says on which axes its
    kernel acts (`_factor_axes`), and how it multiplies by the factors
    (`_current_factors`); so do `linear.py`, `convolution.py` and
    `embedding.py`. A factorization says how its delta is written: which weights
    it has (`factor_names`, `_factor_shapes`, `_initial_factors`) and which two
    factors they make (`_factor_pair`). The rest, here, is the same for all.
    """

    factor_names: tuple[str, ...] = ()
    quantization_modes: tuple[str, ...] = ()
    adapter_enabled = True

    def __init__(
        self,
        *args,
        rank=8,
        alpha=None,
        dropout_rate=0.5,
        rescale=False,
        seed=None,
        **kwargs,
    ):
        _reject_keras_lora(kwargs)
        super().__init__(*args, **kwargs)
        self._set_adapter_settings(rank, alpha, dropout_rate, rescale, seed)

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

    def build(self, input_shape=None):
        # Keras would add its own LoRA for a layer with a `lora_rank`.
        rank, self.lora_rank = self.lora_rank, None
        super().build(input_shape)
        self.lora_rank = rank
        where = f'layer "{self.name}"'
        check_precision(self, self.quantization_modes, where)
        axes = self._factor_axes(quantized.kernel_shape(self))
        check_linear(self, rank, axes, where)
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
        self._axes = axes
        for name, value in self.factors_from_kernel().items():
            getattr(self, name).assign(value)
        with unlocked(self):
            self.seed_generator = keras.random.SeedGenerator(next_seed(streams))
        self._freeze_kernel()

    def _freeze_kernel(self):
        if not quantized.is_quantized(self):
            for kernel in quantized.kernel_weights(self):
                kernel.trainable = False

    def _create_factors(self, axes, initializers):
        """Create the weights of the factors, one initializer each."""
        shapes = self._factor_shapes(axes, self.lora_rank)
        for name, shape, initializer in zip(
            self.factor_names, shapes, initializers, strict=True
        ):
            self._add_adapter_weight(
                name, shape, initializer, axes, trainable=self.lora_rank > 0
            )

    def _add_adapter_weight(self, name, shape, initializer, axes, trainable):
        """Create a weight of the adapter, split over devices as its kernel."""
        with unlocked(self):
            weight = self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                dtype="float32",
                trainable=trainable,
            )
            setattr(self, name, weight)
        follow_kernel(weight, quantized.kernel_weights(self)[0], axes)

    def factors_from_kernel(self):
        """Start of the factors that depend on the kernel, by name."""
        return {}

    def gain(self):
        """What output features are multiplied by, or `None` for nothing."""
        return None

    def drop_factors(self):
        """Lose the weights of the factors; others must take their place."""
        forget_attributes(self, list(self.adapter_weights))

    def replace_factors(self, values, alpha, initial=()):
        """Give the adapter other factors, of any rank, in place.

        The weights stay the same objects if the rank does. With rank 0 the
        layer computes its kernel's product alone, and nothing of it trains.

        Args:
            values: Arrays in the order of `factor_names`, such as
                `(input_dim, rank)` and `(rank, output_dim)`.
            alpha: Positive number. Strength, so that `scaling = alpha / rank`.
            initial: Arrays that take the place of `initial_factors`; empty if
                nothing is to be subtracted.
        """
        self.resize(values[-1].shape[0], alpha)
        self.hold_initial_factors(bool(initial))
        for weight, value in zip(
            self.adapter_weights.values(), (*values, *initial), strict=True
        ):
            weight.assign(value)

    def resize(self, rank, alpha):
        """Give the factors another rank, in place; they are zeros then.

        Initial factors are lost with the factors that started there.

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
            self._freeze_kernel()

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
        return self._axes.mask_sizes

    @property
    def factor_sizes(self):
        """Number of rows of A, and of columns of B."""
        return self._axes.input_dim, self._axes.output_dim

    def _masks(self, training):
        """Return `mask_a (groups, in)`, `mask_b (groups, out)` or `None`."""
        if self.dropout_rate == 0:
            return None
        dtype = self.compute_dtype
        active = masks.current_draws()
        if active is not None and active.covers(self):
            # The pass decides, not `training`, which gradient checkpointing on
            # JAX passes as a traced value.
            return active.keep(self, dtype)
        if not training:
            return None
        draws = masks.draw_uniform((1, self.mask_width), self.seed_generator)
        keep = masks.keep_mask(draws, self.dropout_rate, dtype)
        input_dim = self.mask_sizes[0]
        return keep[:, :input_dim], keep[:, input_dim:]

    def _current_factors(self, training):
        """What this call of the layer multiplies by.

        Returns:
            Tuple of `factor_a (input_dim, rank)`, `factor_b (rank,
            output_dim)` with the multiplier of the delta in it, both in the
            compute dtype, and the two masks, or `None` for none.
        """
        active = masks.current_draws()
        if active is not None and active.covers(self):
            active.plan.called.add(id(self))
        # Factors are float32 under any policy, arithmetic is not.
        dtype = self.compute_dtype
        factor_a, factor_b = self._factor_pair(
            *(cast(f, dtype) for f in self.factors)
        )
        keep = self._masks(training)
        scale = masks.delta_scale(
            self.scaling, self.dropout_rate, self.rescale, keep is not None
        )
        if scale != 1:
            factor_b = factor_b * scale
        return factor_a, factor_b, keep

    @property
    def _adds_delta(self):
        return bool(self.lora_rank and self.adapter_enabled)

    def _what_is_shared(self):
        """Whether all mask groups share one input, and want parts alone."""
        draws = masks.current_draws()
        if draws is None or not draws.covers(self):
            return False, False
        return draws.inputs_shared, draws.in_parts

    def _check_groups(self, inputs, groups, batch_leads=True):
        """Raise `LayoutError` unless the rows are `groups` blocks of rows."""
        if groups == 1:
            return
        rows = masks.current_draws().rows
        what = f'The input of layer "{self.path or self.name}"'
        check_rows(what, inputs.shape, rows if batch_leads else -1)

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
        self._save_adapter(store)

    def _save_adapter(self, store):
        if self.built:
            for name, weight in self.adapter_weights.items():
                store[name] = weight
            store[_RANDOM_STATE] = self.seed_generator.state

    def load_own_variables(self, store):
        # Keras counts the entries of weights alone.
        keys = set(store.keys()) - {_RANDOM_STATE}
        weights = {key: store[key] for key in keys}
        super().load_own_variables(weights)
        self._load_adapter(store)

    def _load_adapter(self, store):
        for name, weight in self.adapter_weights.items():
            weight.assign(store[name])
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


def check_precision(layer, modes, where):
    """Raise `ValueError` if an adapter cannot go on the kernel's precision.

    Args:
        layer: A built layer of a class that `adapts` knows.
        modes: The quantizations of the kernel that an adapter goes on.
        where: String that names the layer in messages.
    """
    mode = layer.quantization_mode
    if mode is not None and mode not in modes:
        allowed = " and ".join(modes) or "kernels of floats"
        raise ValueError(
            f"Cannot adapt {where}: its kernel is quantized ({mode}), but "
            f"this adapter goes on {allowed} alone. Load the model in a float "
            "dtype, such as bfloat16, or quantized as allowed, or leave the "
            "layer out with `exclude_layers`."
        )


def check_linear(layer, rank, axes, where):
    """Raise `ValueError` if a built linear layer cannot hold an adapter.

    Args:
        layer: A built layer of a class that `adapts` knows.
        rank: Rank of the adapter.
        axes: The axes of the layer's kernel, such as `FactorAxes`.
        where: String that names the layer in messages.
    """
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"Cannot adapt {where}: Keras's own LoRA is already enabled on it. "
            "Start from a model on which `enable_lora` was not called."
        )
    for name in _CONSTRAINTS:
        constraint = getattr(layer, name, None)
        if constraint is not None:
            raise ValueError(
                f"Cannot adapt {where}: its kernel has the constraint "
                f"{constraint!r}, which a frozen kernel plus a delta does not "
                f"keep. Build the layer without `{name}`, or leave it out with "
                "`exclude_layers`."
            )
    validation.rank_fits(rank, *axes.smallest_matrix, where)


def next_seed(streams):
    """Draw the seed of one weight or generator of a layer."""
    return streams.randrange(validation.MAX_SEED)


def _reject_keras_lora(kwargs):
    """Refuse the constructor arguments of Keras's own LoRA."""
    for name in ("lora_rank", "lora_alpha"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"`{name}` belongs to Keras's own LoRA and is not allowed "
                f"here. Pass `{name.removeprefix('lora_')}` instead."
            )
