"""Attention layers whose softmax runs as a layer of its own.

Keras and KerasHub compute attention in one fused operation where they can, and
then nothing sees the weights. The mixins of this file take the other way that
each class has, while `structured_dropout.is_active()`.
"""

import functools

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import sublayers
from keras_lora_dropout.core.structured_dropout import is_active


class UnfusedMultiHeadAttention:
    """Mixin of `keras.layers.MultiHeadAttention`."""

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
            return_attention_scores=return_attention_scores or is_active(),
            **kwargs,
        )


class UnfusedRotaryAttention:
    """Mixin of the attention of Llama, Mistral and those made like them."""

    def _compute_attention(self, query, key, value, attention_mask=None):
        if not is_active():
            return super()._compute_attention(query, key, value, attention_mask)
        scores = ops.einsum(self._dot_product_equation, query, key)
        scale = ops.cast(self._inv_norm_factor, self.compute_dtype)
        weights = self._masked_softmax(scores * scale, attention_mask)
        weights = ops.cast(weights, self.compute_dtype)
        return ops.einsum(self._combine_equation, weights, value)


class UnfusedGemmaAttention:
    """Mixin of Gemma's attention."""

    def _use_fused_attention_op(self):
        return not is_active() and super()._use_fused_attention_op()


# Classes by name, since KerasHub exports few of them.
_MIXINS = {
    "MultiHeadAttention": UnfusedMultiHeadAttention,
    "LlamaAttention": UnfusedRotaryAttention,
    "CachedMistralAttention": UnfusedRotaryAttention,
    "CachedGemmaAttention": UnfusedGemmaAttention,
    # Never fused.
    "DisentangledSelfAttention": None,
}


def softmax_of(attention):
    """Return the softmax layer of an attention layer, or `None`."""
    for layer in sublayers(attention):
        if isinstance(layer, keras.layers.Softmax):
            return layer
    return None


def is_known(attention):
    """Whether the softmax of an attention layer can be made to run."""
    return _known_name(type(attention)) is not None


def unfuse(attention):
    """Let the softmax of a built attention layer run, in place.

    Args:
        attention: A layer of which `is_known` is true.
    """
    cls = type(attention)
    mixin = _MIXINS[_known_name(cls)]
    if mixin is not None and not issubclass(cls, mixin):
        attention.__class__ = _unfused_class(cls, mixin)


def _known_name(cls):
    for base in cls.__mro__:
        if base.__name__ in _MIXINS:
            return base.__name__
    return None


@functools.cache
def _unfused_class(cls, mixin):
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
