"""`AdaLoRADropoutDense` and `AdaLoRADropoutEinsumDense`."""

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.layers.adapt import adapts
from keras_lora_dropout.layers.adapter import next_seed
from keras_lora_dropout.layers.linear import AdaptedDense
from keras_lora_dropout.layers.linear import AdaptedEinsumDense

_STDDEV = 0.02  # [A], reference implementation: of P and Q.


class AdaLoRAFactors:
    """Mixin: the delta is `P Lambda Q`, [L] Eq. 4, [A] Eq. 3.

    In Keras orientation `lora_kernel_a` is Q transposed, `lora_kernel_b` is P
    transposed, `lora_lambda` the diagonal of Lambda. Column i of `a`, entry i
    of lambda and row i of `b` are triplet i, which is kept or pruned as one.
    """

    kind = "AdaLoRA"
    factor_names: tuple[str, ...] = (
        "lora_kernel_a",
        "lora_lambda",
        "lora_kernel_b",
    )

    @staticmethod
    def _initial_factors(streams):
        return (
            keras.initializers.RandomNormal(0.0, _STDDEV, next_seed(streams)),
            "zeros",
            keras.initializers.RandomNormal(0.0, _STDDEV, next_seed(streams)),
        )

    @staticmethod
    def _factor_shapes(axes, rank):
        return (axes.input_dim, rank), (rank,), (rank, axes.output_dim)

    def _factor_pair(self, lora_kernel_a, lora_lambda, lora_kernel_b):
        return lora_kernel_a, ops.expand_dims(lora_lambda, 1) * lora_kernel_b

    def keep_triplets(self, kept):
        """Replace the factors by those of some triplets, in place.

        `scaling` stays: `alpha` shrinks along with the rank. With no triplet
        kept the rank is 0, and the layer computes its kernel's product alone.

        Args:
            kept: Boolean array of shape `(rank,)`.
        """
        kept = np.flatnonzero(kept)
        a, lam, b = (ops.convert_to_numpy(factor) for factor in self.factors)
        alpha = self.lora_alpha
        if len(kept):
            alpha = alpha * len(kept) / self.lora_rank
        self.replace_factors((a[:, kept], lam[kept], b[kept]), alpha)


@adapts(keras.layers.Dense, kind="AdaLoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class AdaLoRADropoutDense(AdaLoRAFactors, AdaptedDense):
    """Dense layer with AdaLoRA Dropout.

    In training it computes

        `x @ kernel + scaling * (((x * mask_q) @ Q.T * lambda) @ P.T) * mask_p
        + bias`

    followed by the activation, with `scaling = alpha / rank`. `Q.T` is the
    weight `lora_kernel_a (input_dim, rank)`, `P.T` is `lora_kernel_b (rank,
    units)`, the pseudo-singular values are `lora_lambda (rank,)`. The masks
    are those of `LoRADropoutDense`; they never touch `lora_lambda`. P and Q
    start as normal values of standard deviation 0.02, lambda as zeros.

    The layer alone has a fixed rank. In a model, a `RankBudget` makes it adapt
    while `fit` runs: pass it to `enable_lora_dropout` or `LoRADropoutModel`.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 4-6;
    [Zhang et al., 2023](https://arxiv.org/abs/2303.10512), Eq. 3.

    Args:
        *args: Positional arguments of `keras.layers.Dense`: `units`, a positive
            integer, the number of output features, and so on.
        rank: Positive integer, at most the smaller side of the kernel. Number
            of triplets at the start. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1. Pruning does not change `scaling`.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain AdaLoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factors and of the masks.
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

    >>> layer = AdaLoRADropoutDense(4, rank=2, dropout_rate=0.5, seed=0)
    >>> layer(np.ones((2, 3), "float32"), training=True).shape
    (2, 4)
    >>> layer.lora_lambda.shape
    (2,)
    """


@adapts(keras.layers.EinsumDense, kind="AdaLoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class AdaLoRADropoutEinsumDense(AdaLoRAFactors, AdaptedEinsumDense):
    """Einsum layer with AdaLoRA Dropout.

    As `AdaLoRADropoutDense`, for a kernel of any shape: all contracted axes of
    the equation form the input features, all kept kernel axes the output
    features. In `"abc,cde->abde"` (a query projection), `lora_kernel_a` is
    `(c, rank)` and `lora_kernel_b` is `(rank, d * e)`.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 4-6;
    [Zhang et al., 2023](https://arxiv.org/abs/2303.10512), Eq. 3.

    Args:
        *args: Positional arguments of `keras.layers.EinsumDense`: `equation`,
            a string, in which no kernel axis may stand in input and output
            alike; `output_shape`, an integer or tuple, the output's shape
            without the batch axis; and so on.
        rank: Positive integer, at most the smaller of the number of input and
            output features. Number of triplets at the start. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1. Pruning does not change `scaling`.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain AdaLoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factors and of the masks.
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

    >>> layer = AdaLoRADropoutEinsumDense(
    ...     "abc,cde->abde", (None, 2, 5), bias_axes="de", rank=3
    ... )
    >>> layer(np.ones((1, 7, 6), "float32")).shape
    (1, 7, 2, 5)
    >>> layer.lora_kernel_a.shape, layer.lora_kernel_b.shape
    ((6, 3), (3, 10))
    """
