"""How `keras.distribution` splits the weights of adapters over devices.

A layout map such as KerasHub's names kernels alone. The factors follow: the
rows of A are split as the input axes of the kernel are, the columns of B as its
output axes, so that no device has more of an adapter than goes with its part of
the kernel. Ranks are never split.
"""

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import has_layout
from keras_lora_dropout.core.keras_internals import set_layout


def follow_kernel(weight, kernel, axes):
    """Split a new weight of an adapter as the kernel is split.

    Nothing changes without a `keras.distribution`, for kernels that it does
    not split, or where its layout map names the weight itself.

    Args:
        weight: The variable; its name tells which axes of the kernel it has.
        kernel: Variable of the layer's kernel.
        axes: `FactorAxes` of the kernel; the weights of other kinds of layers
            are not split.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not hasattr(axes, "split_axes"):
        return
    if any(distribution.get_variable_layout(weight).axes):
        return
    kernel_axes = distribution.get_variable_layout(kernel).axes
    wanted = weight_axes(weight.name, kernel_axes, axes)
    if any(wanted):
        mesh = distribution.device_mesh
        set_layout(weight, keras.distribution.TensorLayout(wanted, mesh))


def weight_axes(name, kernel_axes, axes):
    """Say along which axes of a device mesh a weight of an adapter is split.

    Args:
        name: Name of the weight, such as `"lora_kernel_a"`.
        kernel_axes: Tuple of names of mesh axes, or `None`, one for each axis
            of the kernel.
        axes: `FactorAxes` of the kernel.

    Returns:
        Such a tuple for the weight; an empty one for what is never split.
    """
    rows, columns = axes.split_axes(kernel_axes)
    return {
        "lora_kernel_a": (rows, None),
        "initial_kernel_a": (rows, None),
        "lora_kernel_b": (None, columns),
        "initial_kernel_b": (None, columns),
        "lora_magnitude": (columns,),
    }.get(name, ())


def to_numpy(variable):
    """Return a variable's numbers, gathered where processes have parts of it.

    All processes have to call it then.
    """
    value = ops.convert_to_tensor(variable)
    distribution = keras.distribution.distribution()
    if distribution is not None and distribution.num_processes > 1:
        everywhere = keras.distribution.TensorLayout(
            [None] * len(value.shape), distribution.device_mesh
        )
        value = keras.distribution.distribute_tensor(value, everywhere)
    return ops.convert_to_numpy(value)


def check_built_here(model):
    """Raise `ValueError` unless a model lies where new weights will lie.

    Args:
        model: A built model.
    """
    if keras.config.backend() != "jax":
        return
    distribution = keras.distribution.distribution()
    lies_there = all(map(has_layout, model.weights))
    if distribution is not None and not lies_there:
        raise ValueError(
            f'Model "{model.name}" was built before the distribution was set, '
            "so its weights lie on one device and those of the adapters would "
            f"lie on many. Received: {distribution!r}. Call "
            "`keras.distribution.set_distribution(...)` before you build or "
            "load the model."
        )
    if distribution is None and any(map(has_layout, model.weights)):
        raise ValueError(
            f'Model "{model.name}" was built under a `keras.distribution` that '
            "is no longer in force, so the weights of the adapters would lie "
            "on one device alone. Call this inside the same "
            "`with distribution.scope():`, or set it for the whole program "
            "with `keras.distribution.set_distribution(...)`."
        )
