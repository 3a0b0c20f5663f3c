"""Which adapted class stands for a Keras layer, and the change to it."""

import functools
import random

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.mixed_classes import mixed_like
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import check_linear
from keras_lora_dropout.layers.adapter import check_precision
from keras_lora_dropout.layers.adapter import plain_class

# What an adapter leaves on its layer besides factors, rank and alpha.
_ATTRIBUTES = (
    "dropout_rate",
    "rescale",
    "seed",
    "seed_generator",
    "adapter_enabled",
    "_axes",
)

KINDS = ("LoRA", "AdaLoRA", "DoRA")

_ADAPTER_CLASSES: dict[tuple[type, str], type] = {}


def adapts(keras_class, *, kind):
    """Decorator: register an adapted layer for a Keras layer class.

    Args:
        keras_class: `keras.layers.Dense` or another linear layer.
        kind: One of `KINDS`: how the delta is factorized.
    """

    def register(adapter):
        _ADAPTER_CLASSES[keras_class, kind] = adapter
        return adapter

    return register


def adapts_by(factorization, adapted_layers):
    """Register adapted classes that have no constructor for users.

    Args:
        factorization: Mixin such as `AdaLoRAFactors`, which has a `kind`.
        adapted_layers: Dictionary of Keras layer class -> class that says how
            such a layer multiplies by factors.
    """
    for keras_class, base in adapted_layers.items():
        adapts(keras_class, kind=factorization.kind)(
            type(
                f"{factorization.kind}Dropout{keras_class.__name__}",
                (factorization, base, keras_class),
                {"__module__": base.__module__},
            )
        )


@functools.cache
def adapter_class(layer_class, kind="LoRA"):
    """Return the adapted subclass of a layer class, or `None`.

    A subclass of `Dense` that keeps `Dense.call` gets a class that is still a
    subclass of it; one with a `call` of its own computes something else.
    """
    if issubclass(layer_class, LoRADropoutAdapter):
        return layer_class
    keras_class = _known_class(layer_class)
    if keras_class is None or layer_class.call is not keras_class.call:
        return None
    adapter = _ADAPTER_CLASSES.get((keras_class, kind))
    if layer_class is keras_class or adapter is None:
        return adapter
    name = f"{kind}Dropout{layer_class.__name__}"
    return type(name, (adapter, layer_class), {})


def is_known(layer):
    """Whether the layer is one that adapters are for, or a subclass of one."""
    return _known_class(type(layer)) is not None


def known_names():
    """Return the names of the Keras layers that adapters are for."""
    return list(dict.fromkeys(cls.__name__ for cls, _ in _ADAPTER_CLASSES))


def _known_class(layer_class):
    known = {keras_class for keras_class, _ in _ADAPTER_CLASSES}
    return next((cls for cls in layer_class.__mro__ if cls in known), None)


def can_adapt(layer):
    """Whether the layer is a linear layer whose product is Keras's own."""
    return adapter_class(type(layer)) is not None


def check_adaptable(layer, kind, rank, where):
    """Raise `ValueError` if a linear layer of a model cannot be adapted."""
    if isinstance(layer, LoRADropoutAdapter):
        raise ValueError(
            f"LoRA Dropout is already enabled on {where}. A layer takes "
            "one adapter; start from a fresh model to change its settings."
        )
    if not layer.built:
        raise ValueError(
            f"Cannot adapt {where}: it is not built yet. Call the model on a "
            "batch of data first, or give it an `Input`."
        )
    adapter = adapter_class(type(layer), kind)
    if adapter is None:
        known = [cls.__name__ for cls, k in _ADAPTER_CLASSES if k == kind]
        raise ValueError(
            f"Cannot adapt {where} with {kind}, which is for "
            f"{' and '.join(known)}, not for {type(layer).__name__}. Leave the "
            "layer out with `exclude_layers`."
        )
    check_precision(layer, adapter.quantization_modes, where)
    axes = adapter._factor_axes(layer, quantized.kernel_shape(layer))
    check_linear(layer, rank, axes, where)


def adapt(layer, *, kind, rank, alpha, dropout_rate, rescale, seed):
    """Give a built `Dense` or `EinsumDense` an adapter, in place.

    The object stays the same: graphs, attributes and trackers that refer to it
    stay valid. Only its class changes, to a subclass of its own.
    """
    layer.__class__ = adapter_class(type(layer), kind)
    # Rank 0 is what `replace_factors` may leave, but no setting for users.
    settings = alpha, dropout_rate, rescale, seed
    layer._set_adapter_settings(max(rank, 1), *settings)
    layer.lora_rank = rank
    layer._add_factors()


def fresh_factors(layer, *, kind, rank, seed):
    """Return the factors of a new adapter for an adapted layer.

    Returns:
        Dictionary of name -> float32 array, what `adapt` would create.
    """
    adapter = adapter_class(plain_class(type(layer)), kind)
    shapes = adapter._factor_shapes(layer._axes, rank)
    initializers = adapter._initial_factors(random.Random(seed))
    values = {
        name: keras.initializers.get(initializer)(shape, "float32")
        for name, shape, initializer in zip(
            adapter.factor_names, shapes, initializers, strict=True
        )
    }
    values |= adapter.factors_from_kernel(layer)
    return {name: ops.convert_to_numpy(value) for name, value in values.items()}


def switch_kind(layer, *, kind):
    """Turn an adapter into one of another kind, its factors zeros."""
    wanted = adapter_class(plain_class(type(layer)), kind)
    if isinstance(layer, wanted):
        return
    trains = any(factor.trainable for factor in layer.factors)
    layer.drop_factors()
    layer.__class__ = mixed_like(wanted, type(layer))
    layer._create_factors(layer._axes, ["zeros"] * len(layer.factor_names))
    for factor in layer.factors:
        factor.trainable = trains


def unadapt(layer):
    """Take the adapter off a layer that `adapt` or its class gave one to."""
    layer.drop_factors()
    forget_attributes(layer, [n for n in _ATTRIBUTES if n in vars(layer)])
    layer.lora_rank = layer.lora_alpha = None
    layer.__class__ = plain_class(type(layer))
    if not quantized.is_quantized(layer):
        for kernel in quantized.kernel_weights(layer):
            kernel.trainable = layer.trainable
