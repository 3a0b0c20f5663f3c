"""Values of weights: Keras's shapes to those of torch and back.

A Keras kernel of any shape is a matrix `(input_dim, output_dim)` once its axes
are flattened; torch stores the transpose. Heads are numbered alike, and
KerasHub turns rotary positions as Hugging Face does, so that no more than this
is needed.
"""

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core import factors

_WEIGHT_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    # Normalizations.
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
    # Embeddings.
    "embeddings": "weight",
    "position_embeddings": "weight",
    "rel_embedding": "weight",
    "reverse_embeddings": "weight",
}


def weight_name(module, variable):
    """Return the name of a variable in a module, or `None` if it has none."""
    name = _WEIGHT_NAMES.get(variable.name)
    return None if name is None else f"{module}.{name}"


def matrix_axes(layer):
    """Return the `FactorAxes` of a linear layer or embedding, else `None`."""
    if isinstance(layer, keras.layers.EinsumDense):
        return factors.einsum_axes(
            layer.equation, tuple(layer._kernel.shape), layer.input_spec.ndim
        )
    if isinstance(layer, keras.layers.Dense):
        return factors.dense_axes(tuple(layer._kernel.shape))
    if isinstance(layer, keras.layers.Embedding):
        return factors.dense_axes((layer.input_dim, layer.output_dim))
    return None


def to_huggingface(layer, variable):
    """Return the value of a layer's variable in the twin's shape."""
    value = ops.convert_to_numpy(ops.cast(variable.value, "float32"))
    if variable.name == "kernel":
        axes = matrix_axes(layer)
        value = value.transpose(np.argsort(axes.kernel_permutation))
        return value.reshape(axes.input_dim, axes.output_dim).T
    if variable.name == "bias":
        return value.reshape(-1)
    return value.T if variable.name == "reverse_embeddings" else value


def from_huggingface(layer, variable, value):
    """Return a value of the twin in the shape of the layer's variable.

    Raises:
        ValueError: If its shape does not fit.
    """
    expected = to_huggingface(layer, variable).shape
    if value.shape != expected:
        raise ValueError(f"has shape {value.shape}, not {expected}")
    if variable.name == "kernel":
        axes = matrix_axes(layer)
        value = value.T.reshape(*axes.contracted, *axes.kept)
        return value.transpose(axes.kernel_permutation)
    if variable.name == "bias":
        return value.reshape(variable.shape)
    return value.T if variable.name == "reverse_embeddings" else value


def with_unused_rows(value, rows):
    """Put rows of zeros before an embedding's."""
    return np.pad(value, ((rows, 0), (0, 0)))
