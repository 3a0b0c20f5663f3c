"""Embeddings with an adapter of any factorization."""

import keras
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.core.keras_internals import set_keras_mask
from keras_lora_dropout.core.light_ops import reshape
from keras_lora_dropout.layers.adalora_dropout import AdaLoRAFactors
from keras_lora_dropout.layers.adapt import adapts
from keras_lora_dropout.layers.adapt import adapts_by
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import next_seed
from keras_lora_dropout.layers.lora_dropout import LoRAFactors


class AdaptedEmbedding(LoRADropoutAdapter):
    """Mixin of an embedding: the product of one-hot rows and its table.

    The input features are the words of the vocabulary, the output features
    those of an embedding. So `mask_a` drops words, `mask_b` features.
    """

    def _factor_axes(self, kernel_shape):
        return factors.dense_axes(kernel_shape)

    def call(self, inputs, training=None):
        if inputs.dtype not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        x = ops.take(self.embeddings, inputs, axis=0)
        x = ops.cast(x, self.compute_dtype)
        if self._adds_delta:
            x = ops.add(x, self._delta(inputs, training))
        return x

    def _delta(self, words, training):
        """The adapter's part of the embeddings of words."""
        factor_a, factor_b, keep = self._current_factors(training)
        low = ops.take(factor_a, words, axis=0)
        if keep is None:
            return ops.matmul(low, factor_b)
        mask_a, mask_b = keep
        groups, shape = mask_a.shape[0], tuple(ops.shape(words))
        self._check_groups(words, groups)
        blocks = reshape(words, (groups, -1))
        kept = ops.take_along_axis(mask_a, blocks, axis=1)
        low = reshape(low, (groups, -1, factor_a.shape[1]))
        low = low * ops.expand_dims(kept, 2)
        high = ops.matmul(low, factor_b * ops.expand_dims(mask_b, 1))
        return reshape(high, (*shape, factor_b.shape[1]))


class AdaptedReversibleEmbedding(AdaptedEmbedding):
    """Mixin of an embedding that also projects back to the vocabulary.

    Both directions use the same delta, if they use the same table
    (`tie_weights`). Else the adapter is that of the embeddings alone.
    """

    def call(self, inputs, reverse=False, training=None):
        if not reverse:
            x = super().call(inputs, training=training)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                set_keras_mask(x, mask)
            return x
        if not (self.tie_weights and self._adds_delta):
            return keras.layers.ReversibleEmbedding.call(
                self, inputs, reverse=True
            )
        kernel = ops.transpose(self.embeddings)
        if self.reverse_dtype is not None:
            inputs = ops.cast(inputs, self.reverse_dtype)
            kernel = ops.cast(kernel, self.reverse_dtype)
        logits = ops.matmul(inputs, kernel)
        logits = ops.add(logits, self._reverse_delta(inputs, training))
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits

    def _reverse_delta(self, inputs, training):
        """The adapter's part of the logits: of the transposed table."""
        factor_a, factor_b, keep = self._current_factors(training)
        high, low = ops.transpose(factor_b), ops.transpose(factor_a)
        high, low = (ops.cast(f, inputs.dtype) for f in (high, low))
        if keep is None:
            return ops.matmul(ops.matmul(inputs, high), low)
        mask_a, mask_b = (ops.cast(mask, inputs.dtype) for mask in keep)
        groups, shape = mask_a.shape[0], tuple(ops.shape(inputs))
        self._check_groups(inputs, groups)
        blocks = reshape(inputs, (groups, -1, shape[-1]))
        rows = ops.matmul(blocks, high * ops.expand_dims(mask_b, 2))
        logits = ops.matmul(rows, low * ops.expand_dims(mask_a, 1))
        return reshape(logits, (*shape[:-1], self.input_dim))


class EmbeddingFactors(LoRAFactors):
    """Mixin: words that never occur in training keep their embeddings.

    A is zero, not B, as in PEFT: a word's row of A has a gradient only where
    the word occurs.
    """

    @staticmethod
    def _initial_factors(streams):
        seed = next_seed(streams)
        return "zeros", keras.initializers.RandomNormal(0.0, 1.0, seed)


@adapts(keras.layers.Embedding, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutEmbedding(
    EmbeddingFactors, AdaptedEmbedding, keras.layers.Embedding
):
    """Embedding with LoRA Dropout.

    In training the embedding of word `w` is

        `embeddings[w] + scaling * (mask_a[w] * A[w]) @ B * mask_b`

    with `scaling = alpha / rank`: `mask_a` drops words of the vocabulary,
    `mask_b` features of the embedding. `lora_kernel_a` is `(input_dim, rank)`
    and starts as zeros, `lora_kernel_b` is `(rank, output_dim)` and starts as
    normal values, as in PEFT: so a word that never occurs keeps its embedding.
    Without training it is the mean network.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3,
    for one-hot inputs.

    Args:
        *args: Positional arguments of `keras.layers.Embedding`: `input_dim`
            and `output_dim`.
        rank: Positive integer, at most the smaller side of the table. Width of
            the two factors. Defaults to 8.
        alpha: Positive number or `None`. Strength of the adapter; `None` means
            `rank`, so that `scaling` is 1.
        dropout_rate: Number in `[0, 1)`. Chance `p` that a mask entry is zero;
            0 is plain LoRA. Defaults to 0.5.
        rescale: Boolean. Whether each mask is divided by `1 - p` in training.
            Defaults to `False`, as in the paper.
        seed: Integer or `None`. Seed of the initial factor and of the masks.
        **kwargs: Keyword arguments of `keras.layers.Embedding`, except
            `weights` and those of Keras's own LoRA.

    Call arguments:
        inputs: Integer tensor of any shape, words of the vocabulary.
        training: Boolean. Masks are drawn only when true.

    Output shape: `(*shape of the input, output_dim)`.

    Raises:
        ValueError: If `rank`, `alpha` or `dropout_rate` is out of range, or if
            the embeddings are constrained or quantized.

    Example:

    >>> layer = LoRADropoutEmbedding(10, 4, rank=2, dropout_rate=0.5, seed=0)
    >>> layer(np.array([[1, 2, 3]]), training=True).shape
    (1, 3, 4)
    """


@adapts(keras.layers.ReversibleEmbedding, kind="LoRA")
@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class LoRADropoutReversibleEmbedding(
    EmbeddingFactors,
    AdaptedReversibleEmbedding,
    keras.layers.ReversibleEmbedding,
):
    """Embedding with LoRA Dropout that projects back to the vocabulary.

    As `LoRADropoutEmbedding`. With `reverse=True` it computes logits

        `x @ embeddings.T + scaling * ((x * mask_b) @ B.T) @ A.T * mask_a`

    by the same factors and, in one forward pass of an adapted model, the same
    masks. With `tie_weights=False` the table of the logits has no adapter.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 2-3,
    for one-hot inputs, and transposed.

    Args:
        *args: Positional arguments of `keras.layers.ReversibleEmbedding`.
        rank, alpha, dropout_rate, rescale, seed: As in
            `LoRADropoutEmbedding`.
        **kwargs: Keyword arguments of `keras.layers.ReversibleEmbedding`,
            except `weights` and those of Keras's own LoRA.

    Call arguments:
        inputs: Integer tensor of words; with `reverse`, a float tensor of
            shape `(..., output_dim)`.
        reverse: Boolean. Whether to project back.
        training: Boolean. Masks are drawn only when true.

    Output shape: `(*shape of the input, output_dim)`; with `reverse`,
        `(..., input_dim)`.

    Raises:
        ValueError: As `LoRADropoutEmbedding`.

    Example:

    >>> layer = LoRADropoutReversibleEmbedding(10, 4, rank=2)
    >>> hidden = layer(np.array([[1, 2, 3]]))
    >>> layer(hidden, reverse=True).shape
    (1, 3, 10)
    """


adapts_by(
    AdaLoRAFactors,
    {
        keras.layers.Embedding: AdaptedEmbedding,
        keras.layers.ReversibleEmbedding: AdaptedReversibleEmbedding,
    },
)
