"""Linear layers whose kernel is quantized to int8 or int4, and frozen.

Keras computes their products and quantizes kernels; nothing of that is done
again here. What a layer itself cannot be asked for is asked of a copy on the
same weights, or of a new one.
"""

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core.keras_internals import copy_with

MODES = ("int8", "int4")
_LINEAR = {"bias": None, "activation": None}
_KERNELS = "_kernel", "kernel", "_embeddings"
# Of layers whose kernels have other names, by class.
KERNELS_OF: dict[type, tuple[str, ...]] = {}
_WEIGHTS = *_KERNELS, "kernel_scale", "kernel_zero", "g_idx"


def is_quantized(layer):
    """Whether a layer's kernel is quantized."""
    return layer.quantization_mode is not None


def kernel_shape(layer):
    """Shape that a built layer's kernel has, or had before quantization."""
    if is_quantized(layer):
        return tuple(layer.kernel.shape)
    return tuple(kernel_weights(layer)[0].shape)


def kernel_weights(layer):
    """The variables of a layer that make up its kernel, or kernels."""
    bases = type(layer).__mro__
    names = next((KERNELS_OF[c] for c in bases if c in KERNELS_OF), _WEIGHTS)
    return [vars(layer)[name] for name in names if name in vars(layer)]


def quantized_product(layer, inputs, keras_class):
    """Multiply the input of a layer by its quantized kernel, as Keras does.

    Args:
        layer: A built layer with a quantized kernel.
        inputs: Input of the layer.
        keras_class: The layer's class without an adapter.

    Returns:
        Tensor of the layer's output shape, without bias and activation. Where
        the layer says so, Keras quantizes the input, too, row by row.
    """
    return copy_with(layer, keras_class, **_LINEAR).quantized_call(inputs)


def dequantized_kernel(layer, axes, keras_class):
    """Return the kernel that a quantized one stands for.

    Args:
        layer: A built layer with a quantized kernel.
        axes: `FactorAxes` of the kernel.
        keras_class: The layer's class without an adapter.

    Returns:
        Float32 tensor of the kernel's own shape.
    """
    # Exact products of ones and zeros; the input is not to be rounded.
    bare = copy_with(
        layer,
        keras_class,
        **_LINEAR,
        inputs_quantizer=None,
        _dtype_policy=keras.dtype_policies.QuantizedDTypePolicy(
            layer.quantization_mode, "float32"
        ),
    )
    free = len(axes.permutation) - len(axes.contracted)
    rows = ops.reshape(
        ops.eye(axes.input_dim, dtype="float32"),
        (axes.input_dim, *[1] * (free - 1), *axes.contracted),
    )
    rows = ops.transpose(rows, np.argsort(axes.permutation).tolist())
    product = ops.transpose(
        bare.quantized_call(rows),
        np.argsort(axes.output_permutation).tolist(),
    )
    matrix = ops.reshape(product, (*axes.contracted, *axes.kept))
    return ops.transpose(matrix, axes.kernel_permutation)


def quantized_like(layer, kernel):
    """Quantize a kernel as that of a layer was.

    Args:
        layer: A built layer with a quantized kernel.
        kernel: Float tensor of the kernel's own shape.

    Returns:
        List of tensors, one for each of `kernel_weights(layer)`.
    """
    mode, config = layer.quantization_mode, layer.quantization_config
    dtype = layer.variable_dtype
    if isinstance(layer, keras.layers.EinsumDense):
        fresh = keras.layers.EinsumDense(
            layer.equation, layer.partial_output_shape, dtype=dtype
        )
    else:
        fresh = keras.layers.Dense(layer.units, use_bias=False, dtype=dtype)
    fresh.build_from_config(layer.get_build_config())
    fresh.kernel.assign(kernel)
    fresh.quantize(mode, config=config)
    return [weight.value for weight in kernel_weights(fresh)]
