"""Attention layers whose softmax runs as a layer of its own.

Keras and KerasHub compute attention in one fused operation where they can, and
then nothing sees the weights. The mixins of this file take the other way that
each class has, while some layer drops.
"""

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import sublayers
from keras_lora_dropout.core.masks import current_dropout
from keras_lora_dropout.core.mixed_classes import LayerMixin
from keras_lora_dropout.core.mixed_classes import mix_in


class UnfusedMultiHeadAttention(LayerMixin):
    """Mixin of `keras.layers.MultiHeadAttention`."""

    uses = ("_compute_attention",)

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        **kwargs,
    ):
        return super()._compute_attention(
            query,
            key,
            value,
            attention_mask=attention_mask,
            training=training,
            # There are weights to return on the way through the softmax alone.
            return_attention_scores=return_attention_scores or _drops(),
            **kwargs,
        )


class UnfusedRotaryAttention(LayerMixin):
    """Mixin of the attention of Llama, Mistral and those made like them."""

    uses = (
        "_combine_equation",
        "_compute_attention",
        "_dot_product_equation",
        "_inv_norm_factor",
        "_masked_softmax",
    )

    def _compute_attention(self, query, key, value, attention_mask=None):
        if not _drops():
            return super()._compute_attention(query, key, value, attention_mask)
        scores = ops.einsum(self._dot_product_equation, query, key)
        scale = ops.cast(self._inv_norm_factor, self.compute_dtype)
        weights = self._masked_softmax(scores * scale, attention_mask)
        weights = ops.cast(weights, self.compute_dtype)
        return ops.einsum(self._combine_equation, weights, value)


class UnfusedGemmaAttention(LayerMixin):
    """Mixin of Gemma's attention."""

    uses = ("_use_fused_attention_op",)

    def _use_fused_attention_op(self):
        return not _drops() and super()._use_fused_attention_op()


def _drops():
    return current_dropout() is not None


# Classes by name, since KerasHub exports few of them.
_MIXINS: dict[str, type[LayerMixin] | None] = {
    "MultiHeadAttention": UnfusedMultiHeadAttention,
    "LlamaAttention": UnfusedRotaryAttention,
    "CachedMistralAttention": UnfusedRotaryAttention,
    "CachedGemmaAttention": UnfusedGemmaAttention,
    # Never fused.
    "DisentangledSelfAttention": None,
}


KNOWN = tuple(_MIXINS)


def softmax_of(attention):
    """Return the softmax layer of an attention layer, or `None`."""
    for layer in sublayers(attention):
        if isinstance(layer, keras.layers.Softmax):
            return layer
    return None


def is_known(attention):
    """Whether the softmax of an attention layer can be made to run.

    Not of an installed version that lacks what the mixins of this file use.
    """
    name = _known_name(type(attention))
    if name is None or softmax_of(attention) is None:
        return False
    mixin = _MIXINS[name]
    return mixin is None or all(hasattr(attention, used) for used in mixin.uses)


def unfuse(attention):
    """Let the softmax of a built attention layer run, in place.

    Args:
        attention: A layer of which `is_known` is true.
    """
    mixin = _MIXINS[_known_name(type(attention))]
    if mixin is not None and not isinstance(attention, mixin):
        mix_in(attention, mixin)


def _known_name(cls):
    for base in cls.__mro__:
        if base.__name__ in _MIXINS:
            return base.__name__
    return None
