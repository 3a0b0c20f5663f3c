"""Reshaping in the passes of layers; elsewhere, Keras's own does as well."""

import keras
from keras import ops


def reshape(tensor, shape):
    """Do what `keras.ops.reshape` does.

    That one looks for symbolic tensors among the entries of the shape, which on
    PyTorch, where every call is eager, takes longer than the reshaping.

    Args:
        tensor: Tensor of the backend.
        shape: Tuple.
    """
    if keras.config.backend() == "torch":
        return tensor.reshape(shape)
    return ops.reshape(tensor, shape)
