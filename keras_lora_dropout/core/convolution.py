"""The low-rank delta of a convolution's kernel."""

import dataclasses
import math

from keras import ops

from keras_lora_dropout.core.light_ops import reshape


@dataclasses.dataclass(frozen=True)
class ConvolutionAxes:
    """How the kernel of a convolution maps channels to channels.

    A kernel `(*window, channels_per_group, filters)` is a matrix once all but
    its last axis are flattened; the factors are those of this matrix, shared
    by all groups of channels. Masks are on channels, never on places of the
    window. A depthwise kernel `(*window, channels, multiplier)` is one of as
    many groups as channels.

    Attributes:
        kernel_shape: Tuple. The kernel's own shape.
        window: Tuple. Size of the window.
        groups: Number of groups of channels.
        channels: Number of input channels.
        filters: Number of output channels.
    """

    kernel_shape: tuple
    window: tuple
    groups: int
    channels: int
    filters: int

    @property
    def input_dim(self):
        return math.prod(self.window) * self.channels // self.groups

    @property
    def output_dim(self):
        return self.filters

    @property
    def mask_sizes(self):
        """Lengths of the masks: input and output channels."""
        return self.channels, self.filters

    @property
    def smallest_matrix(self):
        """Sizes of the matrix that holds the least rank: there is but one."""
        return self.input_dim, self.output_dim

    def deltas(self, factor_a, factor_b, keep=None):
        """Multiply the factors out, as `FactorAxes.deltas`."""
        delta = ops.matmul(factor_a, factor_b)
        if keep is not None:
            of_filters = ops.repeat(
                reshape(keep[0], (self.groups, -1)),
                self.filters // self.groups,
                axis=0,
            )
            shape = math.prod(self.window), -1, self.filters
            delta = reshape(delta, shape)
            delta = delta * ops.transpose(of_filters) * keep[1]
        return [reshape(delta, self.kernel_shape)]

    def low_kernel(self, factor_a, mask_a=None):
        """Return the kernel that maps the input to what B is applied to.

        Args:
            factor_a: Tensor of shape `(input_dim, rank)`.
            mask_a: Tensor of shape `(channels,)`, or `None`.

        Returns:
            Tensor of shape `(*window, channels_per_group, groups * rank)`.
        """
        each = self.channels // self.groups
        rank = factor_a.shape[-1]
        kernel = reshape(factor_a, (-1, each, 1, rank))
        if mask_a is None:
            kernel = ops.repeat(kernel, self.groups, axis=2)
        else:
            mask = ops.transpose(reshape(mask_a, (self.groups, each)))
            kernel = kernel * ops.expand_dims(mask, 2)
        return reshape(kernel, (*self.window, each, self.groups * rank))

    def high_product(self, low, factor_b, mask_b=None):
        """Apply B to each place.

        Args:
            low: Tensor of shape `(rows, *places, groups * rank)`.
            factor_b: Tensor of shape `(rank, filters)`.
            mask_b: Tensor of shape `(instances, filters)`, the masks of as many
                equal blocks of rows, or `None`.

        Returns:
            Tensor of shape `(rows, *places, filters)`.
        """
        rank = factor_b.shape[0]
        shape = tuple(ops.shape(low))[:-1]
        factor_b = ops.expand_dims(factor_b, 0)
        if mask_b is not None:
            factor_b = factor_b * ops.expand_dims(mask_b, 1)
        instances = factor_b.shape[0]
        low = reshape(low, (instances, -1, self.groups, rank))
        high = reshape(factor_b, (instances, rank, self.groups, -1))
        if self.groups == 1:
            product = ops.matmul(low[:, :, 0], high[:, :, 0])
        else:
            product = ops.einsum("nsgr,nrgo->nsgo", low, high)
        return reshape(product, (*shape, self.filters))


def convolution_axes(kernel_shape, groups):
    """Axes of a kernel `(*window, channels_per_group, filters)`."""
    *window, each, filters = kernel_shape
    channels = each * groups
    return ConvolutionAxes(
        tuple(kernel_shape), tuple(window), groups, channels, filters
    )


def depthwise_axes(kernel_shape):
    """Axes of a kernel `(*window, channels, multiplier)`."""
    *window, channels, multiplier = kernel_shape
    return ConvolutionAxes(
        tuple(kernel_shape),
        tuple(window),
        channels,
        channels,
        channels * multiplier,
    )
