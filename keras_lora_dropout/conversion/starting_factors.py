"""Where the factors of a model's adapters start: `init_lora_weights`."""

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core import initialization
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapt import adapter_class
from keras_lora_dropout.layers.initial_factors import INITIAL_NAMES

_MATRICES = keras.layers.Dense, keras.layers.EinsumDense
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)
# In the settings of a layer that has initial factors; no other has the entry.
INITIAL = "initial_factors"


def initial_entry(wanted):
    """What the settings of a layer say of its initial factors."""
    return {INITIAL: True} if wanted else {}


def initial_names(settings):
    """Names of the initial factors of a layer of these settings."""
    return INITIAL_NAMES if settings.get(INITIAL) else ()


def check_initialization(init_lora_weights, rank_budget):
    """Return the word; raise `ValueError` unless it is known and fits."""
    if initialization.pissa_iterations(init_lora_weights) is None:
        allowed = *initialization.INITIALIZATIONS, "pissa_niter_16"
        validation.word("init_lora_weights", init_lora_weights, allowed)
    if rank_budget is not None and init_lora_weights != initialization.DEFAULT:
        raise ValueError(
            "`init_lora_weights` goes with a fixed rank; AdaLoRA, which a "
            "`rank_budget` selects, starts at singular values of zero. "
            f"Received: init_lora_weights={init_lora_weights!r}, "
            f"rank_budget={rank_budget!r}. Leave one of them out."
        )
    return init_lora_weights


def starting_factors(targets, settings, init_lora_weights):
    """Return the factors that the adapters of plain layers start at.

    Args:
        targets: List of `(path, layer)`, without adapters.
        settings: Dictionary of path -> rank, alpha, dropout rate, rescaling
            and seed of the layer.
        init_lora_weights: What `check_initialization` lets pass.

    Returns:
        Dictionary of path -> A and B, and what the layer is to subtract of
        them: nothing, or both. It is empty for the default,
        which adapters start at by themselves.

    Raises:
        ValueError: If a kernel or a rank does not allow it.
    """
    if init_lora_weights == initialization.DEFAULT:
        return {}
    starts = {}
    for path, layer in targets:
        try:
            values = _values(layer, init_lora_weights, **settings[path])
        except ValueError as error:
            raise ValueError(f'Cannot adapt layer "{path}": {error}') from error
        is_zero = not initialization.is_from_kernel(init_lora_weights)
        starts[path] = values, () if is_zero else values
    return starts


def _values(layer, init_lora_weights, rank, alpha, dropout_rate, rescale, seed):
    """The two factors of one layer, float32."""
    from_kernel = initialization.is_from_kernel(init_lora_weights)
    allowed = _MATRICES if from_kernel else (*_MATRICES, *_CONVOLUTIONS)
    if not isinstance(layer, allowed):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} is not made for "
            f"{type(layer).__name__}. Leave the layer out with "
            "`exclude_layers`, or pass 'he_uniform', which all layers take."
        )
    keras_class = type(layer)
    axes = adapter_class(keras_class)._factor_axes(
        layer, quantized.kernel_shape(layer)
    )
    sizes = axes.input_dim, axes.output_dim, rank
    generator = np.random.default_rng(seed)
    if init_lora_weights == "gaussian":
        start = initialization.gaussian(*sizes, generator)
    elif init_lora_weights == "orthogonal":
        start = initialization.orthogonal(*sizes, generator)
    elif init_lora_weights == "olora":
        kernel = _kernel_matrix(layer, axes, keras_class)
        start = initialization.olora(kernel, rank)
    else:
        scale = masks.delta_scale(
            alpha / rank, dropout_rate, rescale, masked=False
        )
        kernel = _kernel_matrix(layer, axes, keras_class)
        iterations = initialization.pissa_iterations(init_lora_weights)
        start = initialization.pissa(kernel, rank, scale, iterations, generator)
    return tuple(factor.astype("float32") for factor in start)


def _kernel_matrix(layer, axes, keras_class):
    """The kernel as a float32 array `(input_dim, output_dim)`."""
    if quantized.is_quantized(layer):
        kernel = quantized.dequantized_kernel(layer, axes, keras_class)
    else:
        kernel = layer.kernel
    kernel = np.asarray(ops.convert_to_numpy(kernel)).astype("float32")
    order = np.argsort(axes.kernel_permutation)
    return kernel.transpose(order).reshape(axes.input_dim, axes.output_dim)
