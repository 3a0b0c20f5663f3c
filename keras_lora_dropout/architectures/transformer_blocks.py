"""The blocks of a transformer, their attention and feed-forward sublayers."""

from keras_lora_dropout.architectures.attention_softmax import softmax_of
from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers

# The last layer of a feed-forward sublayer, as KerasHub's text models name it.
FEEDFORWARD_OUTPUTS = "feedforward_output_dense", "ffw_linear"


def transformer_blocks(model):
    """Return the layers of a model that contain attention, in order.

    Of a KerasHub task or backbone these are the blocks of the backbone, of
    any other model its layers.
    """
    backbone = backbone_of(model)
    layers = sublayers(model if backbone is None else backbone)
    return [layer for layer in layers if attention_layers(layer)]


def attention_layers(block):
    """Return the attention layers of a block, in order: those with a softmax.

    A block may be one itself.
    """
    return [
        layer
        for layer in (block, *descendants(block))
        if _is_attention(layer) and softmax_of(layer) is not None
    ]


def feedforward_outputs(block):
    """Return the last layers of the feed-forward sublayers of a block."""
    return [
        layer
        for layer in descendants(block)
        if layer.name in FEEDFORWARD_OUTPUTS
    ]


def is_decoder_only(blocks):
    """Whether blocks are those of a model that has no encoder."""
    return all("Decoder" in type(block).__name__ for block in blocks)


def _is_attention(layer):
    return any("Attention" in cls.__name__ for cls in type(layer).__mro__)
