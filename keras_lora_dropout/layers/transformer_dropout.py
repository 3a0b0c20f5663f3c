"""Layers that drop in structured ways: DropKey, DropAttention, HiddenCut.

Reference: [H], Wang et al., "LoRA Meets Dropout under a Unified Framework",
2024, https://arxiv.org/abs/2403.00812, section 3.
"""

import dataclasses
import functools

import keras
from keras import ops

from keras_lora_dropout.core import structured_dropout
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import unlocked


def _check_rate(value):
    validation.number("rate", value, "at least 0 and below 1", high=1)


@dataclasses.dataclass(frozen=True)
class AttentionDropout:
    """What `DropKey` and `DropAttention` have in common.

    Attributes:
        rate: Float in `[0, 1)`. Probability that a key is dropped. At least
            one of the keys that a query may see always stays.
        pattern: `"element"`: keys are dropped for each query alone.
            `"column"`: for all queries of a head alike. `"span"`: likewise,
            one contiguous run of keys.
    """

    rate: float = 0.1
    pattern: str = "column"

    def __post_init__(self):
        _check_rate(self.rate)
        validation.word("pattern", self.pattern, structured_dropout.PATTERNS)

    def weights(self, scores, valid, seed):
        """Return the attention weights.

        Args:
            scores: Tensor `(rows, heads..., T, S)`, before the softmax.
            valid: Boolean tensor that broadcasts to them, or `None`.
            seed: `SeedGenerator`.
        """
        keep = structured_dropout.draw_keys(
            ops.shape(scores), valid, self.rate, self.pattern, seed
        )
        return self._attend(scores, keep, valid)


class DropKey(AttentionDropout):
    """Drops keys before the softmax, which goes on with the others.

    Reference: [H], section 3; Li et al., "DropKey", CVPR 2023.
    """

    def _attend(self, scores, keep, valid):
        return structured_dropout.drop_keys(scores, keep)


class DropAttention(AttentionDropout):
    """Drops attention weights, and divides by a constant, what is left.

    Outputs are those of `DropKey`, gradients are not.

    Reference: [H], section 3; Zehui et al., "DropAttention", 2019.
    """

    def _attend(self, scores, keep, valid):
        return structured_dropout.drop_attention(scores, keep, valid)


@dataclasses.dataclass(frozen=True)
class HiddenCut:
    """Drops entries of the hidden features of feed-forward sublayers.

    Reference: [H], section 3; Chen et al., "HiddenCut", ACL 2021.

    Attributes:
        rate: Float in `[0, 1)`. Probability that an entry is dropped.
        pattern: `"element"`: each entry alone. `"column"`: features, at all
            positions of an example. `"span"`: one contiguous run of an
            example's positions, padding included, with all their features.
        rescale: Boolean. Whether what stays is divided by `1 - rate`.
    """

    rate: float = 0.1
    pattern: str = "element"
    rescale: bool = True

    def __post_init__(self):
        _check_rate(self.rate)
        validation.word("pattern", self.pattern, structured_dropout.PATTERNS)
        validation.boolean("rescale", self.rescale)

    def cut(self, hidden, seed):
        return structured_dropout.cut_hidden(
            hidden, self.rate, self.pattern, self.rescale, seed
        )


class DroppingSoftmax:
    """Mixin of the softmax of an attention layer: it drops while it may."""

    def call(self, inputs, mask=None):
        if not structured_dropout.is_active():
            return super().call(inputs, mask=mask)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            missing = len(inputs.shape) - len(mask.shape)
            mask = ops.reshape(mask, (1,) * missing + tuple(ops.shape(mask)))
        return self.dropout_settings.weights(
            inputs, mask, self.dropout_seed_generator
        )


class DroppingInputs:
    """Mixin of the last layer of a feed-forward sublayer: its inputs drop."""

    def call(self, inputs, *args, **kwargs):
        if structured_dropout.is_active():
            inputs = self.dropout_settings.cut(
                inputs, self.dropout_seed_generator
            )
        return super().call(inputs, *args, **kwargs)


def add_attention_dropout(softmax, settings, seed):
    """Let the built softmax of an attention layer drop, in place.

    Args:
        softmax: A `keras.layers.Softmax` over the last axis.
        settings: A `DropKey` or `DropAttention`.
        seed: Integer.
    """
    _add(softmax, DroppingSoftmax, settings, seed)


def add_hidden_dropout(layer, settings, seed):
    """Let the inputs of a built layer `(rows, positions, features)` drop.

    Args:
        layer: The last layer of a feed-forward sublayer.
        settings: A `HiddenCut`.
        seed: Integer.
    """
    _add(layer, DroppingInputs, settings, seed)


def _add(layer, mixin, settings, seed):
    layer.__class__ = _dropping_class(type(layer), mixin)
    with unlocked(layer):
        layer.dropout_settings = settings
        layer.dropout_seed_generator = keras.random.SeedGenerator(seed)


@functools.cache
def _dropping_class(cls, mixin):
    namespace = {"__module__": cls.__module__}
    return type(f"Dropping{cls.__name__}", (mixin, cls), namespace)
