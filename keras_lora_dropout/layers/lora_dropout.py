"""`LoRADropoutDense` and `LoRADropoutEinsumDense`."""

import keras

from keras_lora_dropout.layers.adapt import adapts
from keras_lora_dropout.layers.adapter import next_seed
from keras_lora_dropout.layers.linear import AdaptedDense
from keras_lora_dropout.layers.linear import AdaptedEinsumDense


class LoRAFactors:
    """Mixin: the delta is `A @ B`, [L] Eq. 1."""

    kind = "LoRA"
    factor_names: tuple[str, ...] = ("lora_kernel_a", "lora_kernel_b")

    @staticmethod
    def _initial_factors(streams):
        return keras.initializers.HeUniform(next_seed(streams)), "zeros"

    @staticmethod
    def _factor_shapes(axes, rank):
        return (axes.input_dim, rank), (rank, axes.output_dim)

    def _factor_pair(self, lora_kernel_a, lora_kernel_b):
        return lora_kernel_a, lora_kernel_b


@adapts(keras.layers.Dense, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutDense(LoRAFactors, AdaptedDense):
    """Dense layer with LoRA Dropout.

    In training it computes

        `x @ kernel + scaling * (((x * mask_a) @ A) @ B) * mask_b + bias`

    followed by the activation, with `scaling = alpha / rank`. The masks hold
    0 and 1, cover the input features and the output features, never the rank,
    and kept entries are not rescaled unless `rescale=True`. Otherwise it
    computes the mean network: no masks, the delta times `(1 - p)**2` (times 1
    with `rescale=True`). `kernel` is frozen; no tensor of the kernel's size is
    formed besides it.

    Alone in a Keras model, the layer draws new masks at each call in training.
    In a model adapted by `enable_lora_dropout`, or in a `LoRADropoutModel`,
    all calls in one forward pass share the masks that the model drew.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Args:
        *args: Positional arguments of `keras.layers.Dense`: `units`, a positive
            integer, the number of output features, and so on.
        rank: Positive integer, at most the smaller side of the kernel. Width
            of the two factors. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain LoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factor and of the masks.
        **kwargs: Keyword arguments of `keras.layers.Dense`, except those of
            Keras's own LoRA.

    Call arguments:
        inputs: Tensor of shape `(batch, ..., input_dim)`.
        training: Boolean. Masks are drawn only when true.

    Output shape: `(batch, ..., units)`.

    Raises:
        ValueError: If `rank`, `alpha` or `dropout_rate` is out of range, or if
            the kernel is constrained, or quantized to anything but int8
            and int4.

    Example:

    >>> layer = LoRADropoutDense(4, rank=2, dropout_rate=0.5, seed=0)
    >>> layer(np.ones((2, 3), "float32"), training=True).shape
    (2, 4)
    """


@adapts(keras.layers.EinsumDense, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutEinsumDense(LoRAFactors, AdaptedEinsumDense):
    """Einsum layer with LoRA Dropout.

    As `LoRADropoutDense`, for a kernel of any shape: all contracted axes of
    the equation form the input features, all kept kernel axes the output
    features. In `"abc,cde->abde"` (a query projection), `lora_kernel_a` is
    `(c, rank)` and `lora_kernel_b` is `(rank, d * e)`. Keras's own
    `EinsumDense.enable_lora` cuts the kernel at its last axis instead.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3.

    Args:
        *args: Positional arguments of `keras.layers.EinsumDense`: `equation`,
            a string, in which no kernel axis may stand in input and output
            alike; `output_shape`, an integer or tuple, the output's shape
            without the batch axis; and so on.
        rank: Positive integer, at most the smaller of the number of input and
            output features. Width of the two factors. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain LoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factor and of the masks.
        **kwargs: Keyword arguments of `keras.layers.EinsumDense`, except those
            of Keras's own LoRA.

    Call arguments:
        inputs: Tensor of the equation's input shape.
        training: Boolean. Masks are drawn only when true.

    Output shape: that of the equation.

    Raises:
        ValueError: If `rank`, `alpha` or `dropout_rate` is out of range, if
            the kernel is constrained, quantized to anything but int8 and int4,
            or a stack of matrices.

    Example:

    >>> layer = LoRADropoutEinsumDense(
    ...     "abc,cde->abde", (None, 2, 5), bias_axes="de", rank=3
    ... )
    >>> layer(np.ones((1, 7, 6), "float32")).shape
    (1, 7, 2, 5)
    >>> layer.lora_kernel_a.shape, layer.lora_kernel_b.shape
    ((6, 3), (3, 10))
    """
