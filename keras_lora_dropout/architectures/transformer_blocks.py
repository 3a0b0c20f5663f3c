"""The blocks of a transformer, their attention and feed-forward sublayers."""

import numbers
import re

from keras_lora_dropout.architectures.attention_softmax import softmax_of
from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers
from keras_lora_dropout.core.validation import shown

# The last layer of a feed-forward sublayer, as KerasHub's text models name it.
FEEDFORWARD_OUTPUTS = "feedforward_output_dense", "ffw_linear"


def transformer_blocks(model):
    """Return the layers of a model that contain attention, in order.

    Of a KerasHub task or backbone these are the blocks of the backbone, of
    any other model its layers. An encoder or decoder that holds several blocks
    counts as these.
    """
    backbone = backbone_of(model)
    return _blocks_inside(model if backbone is None else backbone)


def _blocks_inside(layer):
    return [
        block
        for part in sublayers(layer)
        if attention_layers(part)
        for block in (_blocks_inside(part) if _is_stack(part) else [part])
    ]


def _is_stack(layer):
    """Whether a layer holds several parts with attention of one class."""
    parts = [
        type(part)
        for part in sublayers(layer)
        if attention_layers(part) and not _is_attention(part)
    ]
    return len(set(parts)) < len(parts)


def choose_blocks(model, blocks):
    """Return some transformer blocks of a model, in order.

    Args:
        model: A built model.
        blocks: `"all"`; `"first n"` or `"last n"`, as in `"last 4"`; or a list
            or range of indices, from 0, or from -1 downwards.

    Raises:
        ValueError: If the model has no transformer blocks, or if `blocks` is
            none of these.
    """
    found = transformer_blocks(model)
    if not found:
        raise ValueError(
            f'Model "{model.name}" has no transformer blocks: none of its '
            "layers contains an attention layer with a softmax. Received: "
            f"blocks={shown(blocks)}."
        )
    indices = _indices(blocks, len(found))
    if not indices:
        raise ValueError(
            '`blocks` must be "all", "first n" or "last n" with n from 1 to '
            f"{len(found)}, or name at least one block by a list or range of "
            f'indices of the {len(found)} blocks of model "{model.name}". '
            f"Received: blocks={shown(blocks)}."
        )
    return [found[n] for n in indices]


def _indices(blocks, count):
    """Return sorted indices, or nothing if any of them makes no sense."""
    if isinstance(blocks, str):
        if blocks == "all":
            return range(count)
        match = re.fullmatch(r"(first|last) ([0-9]{1,9})", blocks)
        if match is None or int(match[2]) > count:
            return []
        number = int(match[2])
        is_first = match[1] == "first"
        return range(number) if is_first else range(count - number, count)
    is_list = isinstance(blocks, list | tuple | range)
    if not is_list or not all(_is_index(n, count) for n in blocks):
        return []
    return sorted({n % count for n in blocks})


def _is_index(value, count):
    is_integer = isinstance(value, numbers.Integral)
    return (
        is_integer and not isinstance(value, bool) and -count <= value < count
    )


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
