"""Layers that drop in structured ways: DropKey, DropAttention, HiddenCut.

Reference: [H], Wang et al., "LoRA Meets Dropout under a Unified Framework",
2024, https://arxiv.org/abs/2403.00812, section 3.
"""

import dataclasses

from keras import ops

from keras_lora_dropout.core import structured_dropout
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import copy_mask
from keras_lora_dropout.core.masks import current_dropout
from keras_lora_dropout.core.mixed_classes import LayerMixin
from keras_lora_dropout.core.mixed_classes import mix_in


def _keep_rate(settings):
    rate = validation.number(
        "rate",
        settings.rate,
        "at least 0 and below 1, also in float32",
        high=validation.ALMOST_ONE,
    )
    validation.keep(settings, rate=rate)


@dataclasses.dataclass(frozen=True)
class AttentionDropout:
    """What `DropKey` and `DropAttention` have in common."""

    rate: float = 0.1
    pattern: str = "column"

    def __post_init__(self):
        _keep_rate(self)
        validation.word("pattern", self.pattern, structured_dropout.PATTERNS)

    def weights(self, scores, valid, draws):
        """Return the attention weights.

        Args:
            scores: Tensor `(rows, heads..., T, S)`, before the softmax.
            valid: Boolean tensor that broadcasts to them, or `None`.
            draws: The layer's `DropoutDraws`.
        """
        keep = structured_dropout.draw_keys(
            ops.shape(scores), valid, self.rate, self.pattern, draws
        )
        return self._attend(scores, keep, valid)


class DropKey(AttentionDropout):
    """Drops keys before the softmax, which goes on with the others.

    Reference: [H], section 3; Li et al., "DropKey", CVPR 2023.

    Attributes:
        rate: Float in `[0, 1)`. Probability that a key is dropped. At least
            one of the keys that a query may see always stays.
        pattern: `"element"`: keys are dropped for each query alone.
            `"column"`: for all queries of a head alike. `"span"`: likewise,
            one contiguous run of keys.

    Example:

    >>> DropKey(0.2)
    DropKey(rate=0.2, pattern='column')
    """

    def _attend(self, scores, keep, valid):
        return structured_dropout.drop_keys(scores, keep)


class DropAttention(AttentionDropout):
    """Drops attention weights, and divides by a constant, what is left.

    Outputs are those of `DropKey`, gradients are not.

    Reference: [H], section 3; Zehui et al., "DropAttention", 2019.

    Attributes:
        rate, pattern: As in `DropKey`.

    Example:

    >>> DropAttention(0.1, "element")
    DropAttention(rate=0.1, pattern='element')
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

    Example:

    >>> HiddenCut(0.1, "span", rescale=False)
    HiddenCut(rate=0.1, pattern='span', rescale=False)
    """

    rate: float = 0.1
    pattern: str = "element"
    rescale: bool = True

    def __post_init__(self):
        _keep_rate(self)
        validation.word("pattern", self.pattern, structured_dropout.PATTERNS)
        validation.boolean("rescale", self.rescale)

    def cut(self, hidden, draws):
        return structured_dropout.cut_hidden(
            hidden, self.rate, self.pattern, self.rescale, draws
        )


class DroppingSoftmax(LayerMixin):
    """Mixin of the softmax of an attention layer: it drops while it may."""

    def call(self, inputs, mask=None):
        draws = current_dropout()
        if draws is None:
            return super().call(inputs, mask=mask)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            missing = len(inputs.shape) - len(mask.shape)
            mask = ops.reshape(mask, (1,) * missing + tuple(ops.shape(mask)))
        draws = draws.of_layer(self.dropout_stream)
        return self.dropout_settings.weights(inputs, mask, draws)


class DroppingInputs(LayerMixin):
    """Mixin of the last layer of a feed-forward sublayer: its inputs drop."""

    def __call__(self, inputs, *args, **kwargs):
        draws = current_dropout()
        if draws is not None:
            draws = draws.of_layer(self.dropout_stream)
            cut = self.dropout_settings.cut(inputs, draws)
            copy_mask(inputs, cut)
            inputs = cut
        return super().__call__(inputs, *args, **kwargs)


def add_attention_dropout(softmax, settings, stream):
    """Let the built softmax of an attention layer drop, in place.

    Args:
        softmax: A `keras.layers.Softmax` over the last axis.
        settings: A `DropKey` or `DropAttention`.
        stream: Integer, another one for each layer of a model.
    """
    mix_in(softmax, DroppingSoftmax)
    softmax.dropout_settings, softmax.dropout_stream = settings, stream


def add_hidden_dropout(layer, settings, stream):
    """Let the inputs of a built layer `(rows, positions, features)` drop.

    Args:
        layer: The last layer of a feed-forward sublayer.
        settings: A `HiddenCut`.
        stream: Integer, another one for each layer of a model.
    """
    mix_in(layer, DroppingInputs)
    layer.dropout_settings, layer.dropout_stream = settings, stream


def drops(layer):
    """Whether a layer has structured dropout."""
    return isinstance(layer, DroppingSoftmax | DroppingInputs)


def forget_dropout(layer):
    """Delete the settings of a layer that has lost its mixins."""
    for name in "dropout_settings", "dropout_stream":
        if name in vars(layer):
            delattr(layer, name)
