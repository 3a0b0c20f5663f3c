"""The low-rank factors of a kernel, and the axes on which they act."""

import dataclasses
import math
import operator

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core.light_ops import matrix_transpose
from keras_lora_dropout.core.light_ops import reshape
from keras_lora_dropout.core.light_ops import value_of


@dataclasses.dataclass(frozen=True)
class FactorAxes:
    """How an einsum kernel maps input axes to output axes.

    A kernel of any shape is a matrix `(input_dim, output_dim)` once its
    contracted axes are flattened into one and its kept axes into the other;
    this is where the LoRA factors live.

    Attributes:
        summed: Input axes that vanish before the kernel is applied.
        permutation: Order of the remaining input axes that puts the
            contracted ones last, as the kernel orders them.
        contracted: Sizes of the contracted axes; `input_dim` is their product.
        kept: Sizes of the kernel's output axes; `output_dim` is their product.
        output_permutation: Order of `(free axes..., kept axes...)` that gives
            the layer's output.
        kernel_permutation: Order of `(contracted..., kept...)` that gives the
            kernel's own axes.
        batch_leads: Whether the leading input axis is the leading output axis.
    """

    summed: tuple
    permutation: tuple
    contracted: tuple
    kept: tuple
    output_permutation: tuple
    kernel_permutation: tuple
    batch_leads: bool

    @property
    def input_dim(self):
        return math.prod(self.contracted)

    @property
    def output_dim(self):
        return math.prod(self.kept)

    @property
    def mask_sizes(self):
        """Lengths of the masks: one entry for each row of A, column of B."""
        return self.input_dim, self.output_dim

    @property
    def smallest_matrix(self):
        """Sizes of the matrix that holds the least rank: there is but one."""
        return self.input_dim, self.output_dim

    def split_axes(self, kernel_axes):
        """Say along which axes of a device mesh rows and columns are split.

        Args:
            kernel_axes: Tuple with one entry for each axis of the kernel: the
                mesh axis along which it is split, or `None`.

        Returns:
            Tuple of two of these, for the rows of A and the columns of B. An
            axis made of several is split as the first of them is: what each
            device has of it is contiguous then.
        """
        if len(kernel_axes) != len(self.kernel_permutation):
            return None, None
        by_role = dict(zip(self.kernel_permutation, kernel_axes, strict=True))
        return by_role.get(0), by_role.get(len(self.contracted))

    def belongs_to_rows(self, bias_shape):
        """Whether a bias has one entry for each column of the matrix, alike."""
        in_order = tuple(range(len(self.output_permutation)))
        return (
            self.output_permutation == in_order
            and tuple(bias_shape) == self.kept
        )

    def deltas(self, factor_a, factor_b, keep=None):
        """Multiply the factors out.

        Args:
            factor_a: Tensor of shape `(input_dim, rank)`.
            factor_b: Tensor of shape `(rank, output_dim)`.
            keep: `None`, or the two masks of one instance.

        Returns:
            List of tensors of the shapes of the layer's kernels: of one.
        """
        if keep is not None:
            factor_a = factor_a * ops.expand_dims(keep[0], 1)
            factor_b = factor_b * keep[1]
        delta = reshape(
            ops.matmul(factor_a, factor_b), (*self.contracted, *self.kept)
        )
        return [ops.transpose(delta, self.kernel_permutation)]

    def matrix(self, kernel):
        """Return a kernel, a variable or tensor, as the matrix."""
        kernel = value_of(kernel)
        in_order = tuple(range(len(self.kernel_permutation)))
        if self.kernel_permutation != in_order:
            order = np.argsort(self.kernel_permutation).tolist()
            kernel = ops.transpose(kernel, order)
        return reshape(kernel, (self.input_dim, self.output_dim))

    def columns(self, values):
        """Give values, one for each output feature, the axes of the kernel."""
        shape = *[1] * len(self.contracted), *self.kept
        values = reshape(values, shape)
        return ops.transpose(values, self.kernel_permutation)


def dense_axes(kernel_shape):
    """Axes of a `Dense` kernel `(input_dim, output_dim)`."""
    # Two input axes stand for any number: all leading axes are free.
    return einsum_axes("ab,bc->ac", kernel_shape, input_ndim=2)


def einsum_axes(equation, kernel_shape, input_ndim):
    """Find the factor axes of an `EinsumDense` equation.

    Args:
        equation: An equation that `keras.layers.EinsumDense` accepts:
            `[X],[Y]->[Z]`, `...[X],[Y]->...[Z]` or `[X]...,[Y]->[Z]...`.
        kernel_shape: Tuple. Shape of the kernel, one entry per letter of `[Y]`.
        input_ndim: Number of axes of the layer's input.

    Returns:
        A `FactorAxes`.

    Raises:
        ValueError: If a letter stands in input, kernel and output alike: such
            a kernel is a stack of matrices, not one.
    """
    inputs, kernel, outputs = _letters(equation, input_ndim)
    shared = [c for c in kernel if c in inputs and c in outputs]
    if shared or len(set(inputs)) != len(inputs):
        raise ValueError(
            "LoRA Dropout needs a kernel that is one matrix from input to "
            f"output features. Received: equation={equation!r}, in which "
            f"{shared or inputs} stands in more than one role. Leave this "
            "layer out with `exclude_layers`."
        )
    size = dict(zip(kernel, kernel_shape, strict=True))
    contracted = [c for c in kernel if c in inputs]
    kept = [c for c in kernel if c in outputs]
    summed = [c for c in inputs if c not in kernel and c not in outputs]
    present = [c for c in inputs if c not in summed]
    free = [c for c in present if c not in contracted]
    return FactorAxes(
        summed=tuple(inputs.index(c) for c in summed),
        permutation=tuple(present.index(c) for c in free + contracted),
        contracted=tuple(size[c] for c in contracted),
        kept=tuple(size[c] for c in kept),
        output_permutation=tuple((free + kept).index(c) for c in outputs),
        kernel_permutation=tuple((contracted + kept).index(c) for c in kernel),
        batch_leads=inputs[0] == outputs[0] and bool(free),
    )


def column_norms(kernel, axes, factor_a=None, factor_b=None):
    """Return the norm of each column of `kernel + factor_a @ factor_b`.

    The sum is not formed: of the factors, products with the kernel and with
    one another are enough.

    Args:
        kernel: Kernel of a layer, in its own shape.
        axes: `FactorAxes` of the kernel.
        factor_a: Float32 tensor of shape `(input_dim, rank)`, or `None`.
        factor_b: Float32 tensor of shape `(rank, output_dim)`, or `None`.

    Returns:
        Float32 tensor of shape `(output_dim,)`.
    """
    matrix = ops.cast(axes.matrix(kernel), "float32")
    squares = ops.sum(ops.square(matrix), axis=0)
    if factor_a is not None:
        across = ops.matmul(ops.transpose(factor_a), matrix)
        within = ops.matmul(
            ops.matmul(ops.transpose(factor_a), factor_a), factor_b
        )
        squares += ops.sum(factor_b * (2 * across + within), axis=0)
    return ops.sqrt(ops.maximum(squares, 0.0))


def masked_pair(factor_a, factor_b, keep):
    """Form `diag(mask_a) A` and `B diag(mask_b)` for each mask group.

    Args:
        factor_a: Tensor of shape `(input_dim, rank)`.
        factor_b: Tensor of shape `(rank, output_dim)`.
        keep: The masks `(groups, input_dim)` and `(groups, output_dim)`, or
            `None` for none.

    Returns:
        Tensors of shape `(groups, input_dim, rank)` and `(groups, rank,
        output_dim)`; of one group, and without masks, `(input_dim, rank)` and
        `(rank, output_dim)`.
    """
    # With the few ranks as its rows, A's gradient is a product of few long
    # rows, several times as fast on CPUs as one of many short ones.
    columns = matrix_transpose(factor_a)
    if keras.config.backend() == "torch":
        columns = columns.contiguous()
    if keep is not None:
        is_one = keep[0].shape[0] == 1
        mask_a, mask_b = keep if is_one else (mask[:, None] for mask in keep)
        columns, factor_b = columns * mask_a, factor_b * mask_b
    return matrix_transpose(columns), factor_b


def stacks(shapes):
    """Sort positions by what stands there.

    Args:
        shapes: Iterable of hashable values, such as the shapes of the factors
            of each layer.

    Returns:
        List of lists of positions; the layers of one list have factors of the
        same shapes, so that these can be stacked.
    """
    found = {}
    for position, shape in enumerate(shapes):
        found.setdefault(shape, []).append(position)
    return list(found.values())


def stacked_factors(layers, tensor_of=operator.attrgetter("value")):
    """Stack the factors of layers of equal shapes.

    Args:
        layers: Adapted layers whose factors have the same shapes.
        tensor_of: Function of one factor that gives the tensor to stack.

    Returns:
        List of tensors with a leading axis of layers, one for each factor.
    """
    return [
        ops.stack([tensor_of(factor) for factor in same_factor])
        for same_factor in zip(*(lyr.factors for lyr in layers), strict=True)
    ]


def _letters(equation, input_ndim):
    """Spell an equation out as axis letters, ellipses replaced."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    if "..." in inputs:
        elided = input_ndim - len(inputs.replace("...", ""))
        names = "".join(chr(ord("0") + i) for i in range(elided))
        inputs = inputs.replace("...", names)
        outputs = outputs.replace("...", names)
    return inputs, kernel, outputs
