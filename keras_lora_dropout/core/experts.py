"""The low-rank deltas of the kernels of a bank of experts."""

import dataclasses
import itertools

from keras import ops

from keras_lora_dropout.core.light_ops import reshape


@dataclasses.dataclass(frozen=True)
class ExpertAxes:
    """How the kernels `(experts, in, out)` of a bank lie in two factors.

    Each expert has, of each kernel, a pair of factors of its own. All of them
    stand in one A, below each other, and in one B, side by side, in the order
    of kernels and, within a kernel, of experts; so do their masks.

    Attributes:
        shapes: Tuple of the kernels' shapes.
    """

    shapes: tuple

    @property
    def input_dim(self):
        return sum(experts * rows for experts, rows, _ in self.shapes)

    @property
    def output_dim(self):
        return sum(experts * columns for experts, _, columns in self.shapes)

    @property
    def mask_sizes(self):
        """Lengths of the masks: one entry for each row of A, column of B."""
        return self.input_dim, self.output_dim

    @property
    def smallest_matrix(self):
        """Sizes of the matrix that holds the least rank."""
        return min((shape[1:] for shape in self.shapes), key=min)

    def pairs(self, factor_a, factor_b):
        """Take the factors apart.

        Args:
            factor_a: Tensor of shape `(input_dim, rank)`.
            factor_b: Tensor of shape `(rank, output_dim)`.

        Returns:
            List of `(experts, in, rank)` and `(experts, rank, out)`, a pair for
            each kernel.
        """
        rank, first_row, first_column, found = factor_a.shape[-1], 0, 0, []
        for experts, rows, columns in self.shapes:
            below = first_row + experts * rows
            beside = first_column + experts * columns
            a = reshape(factor_a[first_row:below], (experts, rows, rank))
            b = reshape(
                factor_b[:, first_column:beside], (rank, experts, columns)
            )
            found.append((a, ops.transpose(b, (1, 0, 2))))
            first_row, first_column = below, beside
        return found

    def deltas(self, factor_a, factor_b, keep=None):
        """Multiply the factors out, as `FactorAxes.deltas`."""
        if keep is not None:
            factor_a = factor_a * ops.expand_dims(keep[0], 1)
            factor_b = factor_b * keep[1]
        pairs = self.pairs(factor_a, factor_b)
        return list(itertools.starmap(ops.matmul, pairs))


def expert_product(inputs, kernel, pair=None):
    """Multiply the tokens by each expert's kernel, and by its factors.

    Args:
        inputs: Tensor of shape `(tokens, in)`, which all experts read, or
            `(experts, tokens, in)`.
        kernel: Tensor of shape `(experts, in, out)`.
        pair: `None`, or two tensors of the shapes `(experts, in, rank)` and
            `(experts, rank, out)`.

    Returns:
        Tensor of shape `(experts, tokens, out)`.
    """
    equation = f"{'e' * (len(inputs.shape) - 2)}ti,eio->eto"
    product = ops.einsum(equation, inputs, kernel)
    if pair is None:
        return product
    low = ops.einsum(equation, inputs, pair[0])
    return ops.add(product, ops.matmul(low, pair[1]))
