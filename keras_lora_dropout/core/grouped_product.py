"""The product of several mask groups on PyTorch, with a gradient of its own.

PyTorch would hold further tensors of the size of the output and of the input,
and compute the gradient of A from many short rows, which takes six times as
long as from few long ones; see `factors.masked_pair`.
"""

import math

import keras
from keras import ops

from keras_lora_dropout.core.light_ops import reshape

# Entries of an input from which on that saves more than calls of Python cost.
LARGE_INPUT = 2**17


def is_cheaper(rows, factor_a, *others):
    """Whether a gradient of its own is right, and faster than PyTorch's.

    Args:
        rows: Tensor, the input of the layer.
        factor_a: Tensor, the factors of the groups.
        *others: Whatever else takes part; `None` for nothing.
    """
    if keras.config.backend() != "torch":
        return False
    tensors = rows, factor_a, *(t for t in others if t is not None)
    return (
        factor_a.requires_grad
        and len({tensor.dtype for tensor in tensors}) == 1
        and math.prod(rows.shape) >= LARGE_INPUT
    )


def grouped_product(rows, kernel, factor_a, factor_b, bias=None):
    """Compute `rows @ kernel + rows @ factor_a @ factor_b + bias`.

    Args:
        rows: Tensor of shape `(rows, input_dim)`: of as many equal blocks as
            there are groups.
        kernel: Tensor of shape `(input_dim, output_dim)`.
        factor_a: Tensor of shape `(groups, input_dim, rank)`.
        factor_b: Tensor of shape `(groups, rank, output_dim)`.
        bias: `None`, or a tensor of shape `(output_dim,)`.

    Returns:
        Tensor of shape `(rows, output_dim)`.
    """
    groups, input_dim, _ = factor_a.shape
    output_dim = kernel.shape[1]
    rows_train = rows.requires_grad
    kernel_trains = kernel.requires_grad
    bias_trains = bias is not None and bias.requires_grad

    @ops.custom_gradient
    def product(rows, kernel, factor_a, factor_b, bias):
        def gradient(rows, kernel, factor_a, factor_b, bias, upstream):
            # Under autocast, the gradient has the dtype of the output.
            rows, kernel, factor_a, factor_b, low_rows = (
                tensor.to(upstream.dtype)
                for tensor in (rows, kernel, factor_a, factor_b, low)
            )
            blocks = reshape(rows, (groups, -1, input_dim))
            d_blocks = reshape(upstream, (groups, -1, output_dim))
            d_low = _narrow(d_blocks, factor_b.mT)
            d_rows = None
            if rows_train:
                d_rows = upstream.mm(kernel.T)
                reshape(d_rows, blocks.shape).baddbmm_(d_low, factor_a.mT)
            d_kernel = rows.T.mm(upstream) if kernel_trains else None
            d_bias = upstream.sum(0) if bias_trains else None
            d_a = d_low.mT.bmm(blocks).mT
            d_b = low_rows.mT.bmm(d_blocks)
            return d_rows, d_kernel, d_a, d_b, d_bias

        total = rows.mm(kernel) if bias is None else bias.addmm(rows, kernel)
        low = _narrow(reshape(rows, (groups, -1, input_dim)), factor_a)
        blocks = reshape(total, (groups, -1, output_dim))
        blocks.baddbmm_(low, factor_b.to(total.dtype))
        return total, gradient

    return product(rows, kernel, factor_a, factor_b, bias)


def add_grouped_product(total, rows, factor_a, factor_b):
    """Compute `total + rows @ factor_a @ factor_b`.

    Args:
        total: Tensor of shape `(groups, rows, output_dim)`.
        rows: Tensor of shape `(groups, rows, input_dim)`.
        factor_a: Tensor of shape `(groups, input_dim, rank)`.
        factor_b: Tensor of shape `(groups, rank, output_dim)`.

    Returns:
        Tensor of the shape of `total`.
    """
    rows_train = rows.requires_grad

    @ops.custom_gradient
    def product(total, rows, factor_a, factor_b):
        def gradient(total, rows, factor_a, factor_b, upstream):
            rows, factor_a, factor_b, low_rows = (
                tensor.to(upstream.dtype)  # As in `grouped_product`.
                for tensor in (rows, factor_a, factor_b, low)
            )
            d_low = _narrow(upstream, factor_b.mT)
            d_rows = d_low.bmm(factor_a.mT) if rows_train else None
            d_a = d_low.mT.bmm(rows).mT
            d_b = low_rows.mT.bmm(upstream)
            return upstream, d_rows, d_a, d_b

        low = _narrow(rows, factor_a)
        return total.baddbmm(low, factor_b), gradient

    return product(total, rows, factor_a, factor_b)


def _narrow(rows, matrices):
    """Compute `rows @ matrices`, which has few columns.

    In memory it has few long rows, which is faster on CPUs than many short.
    """
    return matrices.mT.bmm(rows.mT).mT
