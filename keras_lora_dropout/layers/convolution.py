"""Convolutions with an adapter of any factorization."""

import keras
from keras import ops

from keras_lora_dropout.core import convolution
from keras_lora_dropout.core.light_ops import reshape
from keras_lora_dropout.layers.adalora_dropout import AdaLoRAFactors
from keras_lora_dropout.layers.adapt import adapts
from keras_lora_dropout.layers.adapt import adapts_by
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.lora_dropout import LoRAFactors
from keras_lora_dropout.layers.weights_in_order import WeightsInOrder


class AdaptedConvolution(LoRADropoutAdapter):
    """Mixin of a convolution: A is a convolution itself, B acts on places.

    `A` has the window, strides and padding of the layer and `rank` filters for
    each group of channels, as in PEFT.
    """

    @property
    def _channel_axis(self):
        return -1 if self.data_format == "channels_last" else 1

    def call(self, inputs, training=None):
        inputs = self._padded(inputs)
        x = self._convolve(inputs, self.kernel)
        if self._adds_delta:
            x = ops.add(x, self._delta(inputs, training))
        if self.bias is not None:
            shape = [1] * len(x.shape)
            shape[self._channel_axis] = -1
            x = ops.add(x, ops.reshape(self.bias, shape))
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _delta(self, inputs, training):
        """The adapter's part of the output."""
        factor_a, factor_b, keep = self._current_factors(training)
        mask_a = mask_b = None
        if keep is not None:
            mask_a, mask_b = keep
            groups = mask_a.shape[0]
            self._check_groups(inputs, groups)
            if groups == 1:
                mask_a = mask_a[0]
            else:
                # A kernel for each block of rows would be a convolution each.
                inputs = self._masked(inputs, mask_a)
                mask_a = None
        low = self._convolve(inputs, self._axes.low_kernel(factor_a, mask_a))
        low = ops.moveaxis(low, self._channel_axis, -1)
        high = self._axes.high_product(low, factor_b, mask_b)
        return ops.moveaxis(high, -1, self._channel_axis)

    def _masked(self, inputs, mask):
        """Multiply the channels of each block of rows by its mask."""
        groups, channels = mask.shape
        shape = [groups, 1, *[1] * (len(inputs.shape) - 1)]
        shape[self._channel_axis + (self._channel_axis > 0)] = channels
        blocks = reshape(inputs, (groups, -1, *ops.shape(inputs)[1:]))
        masked = blocks * reshape(mask, shape)
        return reshape(masked, ops.shape(inputs))

    def _padded(self, inputs):
        if self.padding != "causal":
            return inputs
        return ops.pad(inputs, self._compute_causal_padding())

    def _convolve(self, inputs, kernel):
        return ops.conv(inputs, kernel, **self._options)

    @property
    def _options(self):
        return {
            "strides": self.strides,
            "padding": "valid" if self.padding == "causal" else self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": self.data_format,
        }

    def _factor_axes(self, kernel_shape):
        return convolution.convolution_axes(kernel_shape, self.groups)


class AdaptedDepthwise(WeightsInOrder, AdaptedConvolution):
    """Mixin of a depthwise convolution: one group for each channel."""

    def _convolve(self, inputs, kernel):
        shape = *kernel.shape[: self.rank], self._axes.channels, -1
        return ops.depthwise_conv(
            inputs, ops.reshape(kernel, shape), **self._options
        )

    def _factor_axes(self, kernel_shape):
        return convolution.depthwise_axes(kernel_shape)


@adapts(keras.layers.Conv1D, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutConv1D(LoRAFactors, AdaptedConvolution, keras.layers.Conv1D):
    """Layer `Conv1D` with LoRA Dropout.

    As `LoRADropoutConv2D`, for sequences: its arguments are those of
    `keras.layers.Conv1D` and of the adapter.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Input shape, output shape: those of `keras.layers.Conv1D`.

    Raises:
        ValueError: As `LoRADropoutConv2D`.

    Example:

    >>> layer = LoRADropoutConv1D(4, 3, rank=2)
    >>> layer(np.ones((1, 8, 3), "float32"), training=True).shape
    (1, 6, 4)
    """


@adapts(keras.layers.Conv2D, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutConv2D(LoRAFactors, AdaptedConvolution, keras.layers.Conv2D):
    """2D convolution with LoRA Dropout.

    In training it computes

        `conv(x, kernel) + scaling * conv(x * mask_a, A) @ B * mask_b + bias`

    followed by the activation, with `scaling = alpha / rank`. `conv(., A)` has
    the window, strides and padding of the layer, and `rank` filters; `B` maps
    these to `filters` at each place. `mask_a` drops input channels, `mask_b`
    output channels, each as a whole. So `lora_kernel_a` is `(height * width *
    channels, rank)`, the matrix of a kernel `(height, width, channels, rank)`,
    and `lora_kernel_b` is `(rank, filters)`, as in PEFT. Without training it is
    the mean network. With `groups`, all groups share `A`, whose rows are those
    of one group.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3,
    for the channels of a convolution.

    Args:
        *args: Positional arguments of `keras.layers.Conv2D`: `filters`,
            `kernel_size` and so on.
        rank: Positive integer, at most the smaller side of the kernel as a
            matrix. Width of the two factors. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain LoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factor and of the masks.
        **kwargs: Keyword arguments of `keras.layers.Conv2D`, except those of
            Keras's own LoRA.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`, or
            `(batch, channels, height, width)` with
            `data_format="channels_first"`.
        training: Boolean. Masks are drawn only when true.

    Output shape: that of `keras.layers.Conv2D`.

    Raises:
        ValueError: If `rank`, `alpha` or `dropout_rate` is out of range, or if
            the kernel is constrained.

    Example:

    >>> layer = LoRADropoutConv2D(4, 3, rank=2, dropout_rate=0.5, seed=0)
    >>> layer(np.ones((1, 8, 8, 3), "float32"), training=True).shape
    (1, 6, 6, 4)
    >>> layer.lora_kernel_a.shape, layer.lora_kernel_b.shape
    ((27, 2), (2, 4))
    """


@adapts(keras.layers.Conv3D, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutConv3D(LoRAFactors, AdaptedConvolution, keras.layers.Conv3D):
    """Layer `Conv3D` with LoRA Dropout.

    As `LoRADropoutConv2D`, for volumes: its arguments are those of
    `keras.layers.Conv3D` and of the adapter.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Input shape, output shape: those of `keras.layers.Conv3D`.

    Raises:
        ValueError: As `LoRADropoutConv2D`.

    Example:

    >>> layer = LoRADropoutConv3D(4, 2, rank=2)
    >>> layer(np.ones((1, 4, 4, 4, 3), "float32"), training=True).shape
    (1, 3, 3, 3, 4)
    """


@adapts(keras.layers.DepthwiseConv1D, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutDepthwiseConv1D(
    LoRAFactors, AdaptedDepthwise, keras.layers.DepthwiseConv1D
):
    """Layer `DepthwiseConv1D` with LoRA Dropout.

    As `LoRADropoutConv2D`, each channel for itself: its arguments are those
    of `keras.layers.DepthwiseConv1D` and of the adapter.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Input shape, output shape: those of `keras.layers.DepthwiseConv1D`.

    Raises:
        ValueError: As `LoRADropoutConv2D`.

    Example:

    >>> layer = LoRADropoutDepthwiseConv1D(3, rank=2)
    >>> layer(np.ones((1, 8, 4), "float32"), training=True).shape
    (1, 6, 4)
    """


@adapts(keras.layers.DepthwiseConv2D, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutDepthwiseConv2D(
    LoRAFactors, AdaptedDepthwise, keras.layers.DepthwiseConv2D
):
    """Layer `DepthwiseConv2D` with LoRA Dropout.

    As `LoRADropoutConv2D`, each channel for itself: its arguments are those
    of `keras.layers.DepthwiseConv2D` and of the adapter.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Input shape, output shape: those of `keras.layers.DepthwiseConv2D`.

    Raises:
        ValueError: As `LoRADropoutConv2D`.

    Example:

    >>> layer = LoRADropoutDepthwiseConv2D(3, rank=2)
    >>> layer(np.ones((1, 8, 8, 4), "float32"), training=True).shape
    (1, 6, 6, 4)
    """


adapts_by(
    AdaLoRAFactors,
    {
        keras.layers.Conv1D: AdaptedConvolution,
        keras.layers.Conv2D: AdaptedConvolution,
        keras.layers.Conv3D: AdaptedConvolution,
        keras.layers.DepthwiseConv1D: AdaptedDepthwise,
        keras.layers.DepthwiseConv2D: AdaptedDepthwise,
    },
)
