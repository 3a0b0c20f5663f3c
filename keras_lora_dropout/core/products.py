"""Products with an adapted kernel: the kernel, and the factors beside it."""

import keras
from keras import ops

from keras_lora_dropout.core.grouped_product import add_grouped_product
from keras_lora_dropout.core.grouped_product import grouped_product
from keras_lora_dropout.core.grouped_product import is_cheaper
from keras_lora_dropout.core.light_ops import matmul
from keras_lora_dropout.core.light_ops import matrix_transpose
from keras_lora_dropout.core.light_ops import reshape


def kernel_product(inputs, kernel, axes, gain=None, bias=None):
    """Compute `inputs @ kernel * gain + bias`.

    Args:
        inputs: Input of the layer.
        kernel: Kernel of the layer, in its own shape.
        axes: `FactorAxes` of the kernel.
        gain: Tensor of shape `(output_dim,)` that multiplies the product, or
            `None`.
        bias: `None`, or a tensor of the shape `axes.kept`.

    Returns:
        Tensor of the layer's output shape.
    """
    x, free_shape = _rows(inputs, axes)
    if bias is not None:
        bias = reshape(bias, (axes.output_dim,))
    product = _base_product(x, axes.matrix(kernel), gain, bias)
    return _output(product, free_shape, axes)


def adapted_product(
    inputs,
    kernel,
    factor_a,
    factor_b,
    axes,
    shared=False,
    in_groups=False,
    gain=None,
    bias=None,
):
    """Compute `inputs @ kernel * gain + inputs @ factor_a @ factor_b + bias`.

    No tensor of the size of `factor_a @ factor_b` is formed.

    Args:
        inputs: Input of the layer. With `groups > 1`, its leading axis holds
            `groups` equal blocks of rows.
        kernel: Kernel of the layer, in its own shape.
        factor_a, factor_b: What `masked_pair` returned.
        axes: `FactorAxes` of the kernel, on which the batch axis leads.
        shared: Boolean. Whether the leading axis of the input is 1 instead,
            and all groups share it; that of the result is `groups` then.
        in_groups: Boolean. Whether the kernel's product is computed block by
            block, too: with a copy of the kernel for each group.
        gain, bias: As for `kernel_product`.

    Returns:
        Tensor of the layer's output shape.
    """
    x, free_shape = _rows(inputs, axes)
    kernel = axes.matrix(kernel)
    if bias is not None:
        bias = reshape(bias, (axes.output_dim,))
    if len(factor_a.shape) == 2:
        total = _base_product(x, kernel, gain, bias)
        total = add_low_rank(total, x, factor_a, factor_b)
        return _output(total, free_shape, axes)
    groups = factor_a.shape[0]
    if groups is None:
        groups = ops.shape(factor_a)[0]
    if shared:
        low = _shared_low(x, factor_a)
        base = _base_product(x, kernel, gain, bias)
        total = ops.add(base, ops.matmul(low, factor_b))
        free_shape = (groups, *free_shape[1:])
    elif gain is None and is_cheaper(x, factor_a, kernel, bias):
        total = grouped_product(x, kernel, factor_a, factor_b, bias)
    else:
        blocks = reshape(x, (groups, -1, axes.input_dim))
        if in_groups:
            kernels = ops.broadcast_to(kernel, (groups, *kernel.shape))
            total = _base_product(blocks, kernels, gain, bias)
        else:
            shape = groups, -1, axes.output_dim
            total = _base_product(x, kernel, gain, bias)
            total = reshape(total, shape)
        total = add_low_rank(total, blocks, factor_a, factor_b)
    return _output(total, free_shape, axes)


def add_low_rank(total, rows, factor_a, factor_b):
    """Compute `total + rows @ factor_a @ factor_b`, maybe in place.

    Args:
        total: Tensor of shape `(..., rows, output_dim)`, which nobody else
            reads.
        rows: Tensor of shape `(..., rows, input_dim)`.
        factor_a: Tensor of shape `(..., input_dim, rank)`.
        factor_b: Tensor of shape `(..., rank, output_dim)`.

    Returns:
        Tensor of the shape of `total`. On PyTorch, all have two axes, or all
        have three.
    """
    if len(total.shape) == 3 and is_cheaper(rows, factor_a, factor_b, total):
        return add_grouped_product(total, rows, factor_a, factor_b)
    low = matmul(rows, factor_a)
    if keras.config.backend() != "torch":
        return ops.add(total, matmul(low, factor_b))
    # In one operation: else, the product is written and read once more. Stacks
    # are views, whose gradient would be copied if they were written to.
    add = total.addmm_ if len(total.shape) == 2 else total.baddbmm
    return add(low, factor_b.to(total.dtype))


def delta_product(inputs, factor_a, factor_b, axes, shared=False):
    """Compute `inputs @ factor_a @ factor_b`: what `adapted_product` adds.

    Args:
        inputs, factor_a, factor_b, axes, shared: As for `adapted_product`.

    Returns:
        Tensor of the layer's output shape.
    """
    x, free_shape = _rows(inputs, axes)
    if len(factor_a.shape) == 2:
        low = matmul(x, factor_a)
        return _output(matmul(low, factor_b), free_shape, axes)
    groups = factor_a.shape[0]
    if shared:
        low = _shared_low(x, factor_a)
        free_shape = (groups, *free_shape[1:])
    else:
        low = ops.matmul(reshape(x, (groups, -1, axes.input_dim)), factor_a)
    return _output(ops.matmul(low, factor_b), free_shape, axes)


def shared_parts(inputs, factor_a, factor_b, axes):
    """Compute the factors of `delta_product`, for a shared input.

    Args:
        inputs: Input of the layer, with a leading axis of 1.
        factor_a: Tensor of shape `(groups, input_dim, rank)`.
        factor_b: Tensor of shape `(groups, rank, output_dim)`.
        axes: `FactorAxes` of the kernel, on which the batch axis leads.

    Returns:
        Tuple of the two factors of what each group adds to its rows:
        `(groups, rows, rank)` and `(groups, rank, *kept)`.
    """
    x, _ = _rows(inputs, axes)
    low = _shared_low(x, factor_a)
    high = reshape(factor_b, (*factor_b.shape[:2], *axes.kept))
    return low, high


def _shared_low(rows, factor_a):
    """Multiply rows that all groups share: `(groups, rows, rank)`."""
    if keras.config.backend() != "torch":
        return ops.einsum("sc,gcr->gsr", rows, factor_a)
    groups, input_dim, rank = factor_a.shape
    # As one product; few long rows are faster on CPUs than many short ones.
    columns = matrix_transpose(factor_a).reshape(-1, input_dim)
    low = matmul(columns, matrix_transpose(rows))
    return matrix_transpose(low.reshape(groups, rank, -1))


def _base_product(rows, kernel, gain, bias=None):
    if bias is None:
        product = matmul(rows, kernel)
        return product if gain is None else product * gain
    if (
        keras.config.backend() == "torch"
        and gain is None
        and len(rows.shape) == 2
        and bias.dtype == kernel.dtype == rows.dtype
    ):
        return bias.addmm(rows, kernel)
    return ops.add(_base_product(rows, kernel, gain), bias)


def _rows(inputs, axes):
    """Return the rows `(rows, input_dim)` of an input, and their own axes."""
    x = ops.sum(inputs, axis=axes.summed) if axes.summed else inputs
    if axes.permutation != tuple(range(len(axes.permutation))):
        x = ops.transpose(x, axes.permutation)
    free_shape = tuple(ops.shape(x))[: len(x.shape) - len(axes.contracted)]
    # On CPUs, XLA multiplies matrices far faster than tensors.
    return reshape(x, (-1, axes.input_dim)), free_shape


def _output(rows, free_shape, axes):
    """Give rows `(..., output_dim)` the axes of the layer's output."""
    output = reshape(rows, (*free_shape, *axes.kept))
    if axes.output_permutation != tuple(range(len(axes.output_permutation))):
        output = ops.transpose(output, axes.output_permutation)
    return output
