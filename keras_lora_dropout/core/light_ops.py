"""What the passes of layers use in place of some operations of Keras.

On PyTorch every call is eager, and what `keras.ops` does before it calls
PyTorch takes longer than the work on a small tensor: it looks for symbolic
tensors among all arguments, converts those, and finds the dtype of the result.
Elsewhere, Keras's own operations do as well.
"""

import keras
from keras import ops


def reshape(tensor, shape):
    """Do what `keras.ops.reshape` does.

    Args:
        tensor: Tensor of the backend.
        shape: Tuple.
    """
    if _on_torch():
        return tensor.reshape(shape)
    return ops.reshape(tensor, shape)


def transpose(tensor, axes):
    """Do what `keras.ops.transpose` does, for a tensor of the backend."""
    return tensor.permute(axes) if _on_torch() else ops.transpose(tensor, axes)


def matrix_transpose(tensor):
    """Swap the last two axes of a tensor of the backend."""
    if _on_torch():
        return tensor.transpose(-1, -2)  # ONNX does not know `mT`.
    return ops.swapaxes(tensor, -1, -2)


def matmul(a, b):
    """Do what `keras.ops.matmul` does, for tensors of the backend."""
    if _on_torch() and a.dtype == b.dtype and a.is_floating_point():
        return a @ b
    return ops.matmul(a, b)


def cast(x, dtype):
    """Do what `keras.ops.cast` does, for a variable or a tensor of the backend.

    Args:
        x: Variable or tensor.
        dtype: String.
    """
    x = value_of(x)
    same = keras.backend.standardize_dtype(x.dtype) == dtype
    return x if same else ops.cast(x, dtype)


def value_of(x):
    """Return the tensor that a variable holds; a tensor as it is."""
    if not isinstance(x, keras.Variable):
        return x
    return x.value if _on_torch() else ops.convert_to_tensor(x)


def _on_torch():
    return keras.config.backend() == "torch"
