"""Where the blocks and the head of a model are."""

import keras

from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import producer
from keras_lora_dropout.core.keras_internals import sublayers


def backbone_of(model):
    """Return the pretrained part of a task, or `None` for a plain model.

    A KerasHub task holds it as `model.backbone`; a model of the user's own
    that does the same is treated alike. A KerasHub backbone is its own.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, keras.Model):
        return backbone
    is_hub_backbone = any(
        base.__module__.startswith("keras_hub.") and base.__name__ == "Backbone"
        for base in type(model).__mro__
    )
    return model if is_hub_backbone else None


def block_layers(backbone):
    """Yield every layer inside the blocks of a backbone, in forward order.

    Blocks are the composite layers of the backbone; embeddings are none. What
    stands beside the blocks, as BERT's pooler does, belongs to no block.
    """
    for child in sublayers(backbone):
        if "embedding" not in child.name:
            yield from descendants(child)


def output_projections(backbone, *, attention=True):
    """Return the last linear layer of each sublayer of the blocks, in order.

    Args:
        backbone: A KerasHub backbone of transformer blocks.
        attention: Boolean. Whether the attention's are among them, or those of
            the feed-forward sublayers alone.

    Returns:
        List of layers; empty if the blocks have not the names of KerasHub's
        text models.
    """
    names = ["attention_output"] if attention else []
    names.append("feedforward_output_dense")
    found = [layer for layer in block_layers(backbone) if layer.name in names]
    is_complete = all(any(lyr.name == name for lyr in found) for name in names)
    return found if is_complete else []


def head_layers(model):
    """Return the layers that stay trainable as the model's head.

    Of a task these are the layers outside its backbone. Of a plain model they
    are the layers that produce its outputs: found in the graph of a functional
    or sequential model, and taken to be the last one with weights otherwise. A
    composite layer, such as a transformer block, is no head.
    """
    backbone = backbone_of(model)
    if backbone is not None:
        inside = {id(backbone), *map(id, descendants(backbone))}
        return [
            layer
            for layer in sublayers(model)
            if id(layer) not in inside and layer is not model
        ]
    return output_layers(model)


def output_layers(model):
    """Return the layers with weights that produce a model's outputs."""
    outputs = getattr(model, "outputs", None)
    if outputs:
        found = {}
        for output in outputs:
            _last_weighted(output, found)
        producers = list(found.values())
    else:
        weighted = [layer for layer in sublayers(model) if layer.weights]
        producers = weighted[-1:]
    heads = []
    for layer in producers:
        if isinstance(layer, keras.Model):
            heads.extend(output_layers(layer))
        elif not any(part.weights for part in sublayers(layer)):
            heads.append(layer)
    return heads


def _last_weighted(tensor, found):
    """Walk back from an output over operations without weights."""
    operation, sources = producer(tensor)
    if isinstance(operation, keras.Layer) and operation.weights:
        found[id(operation)] = operation
        return
    for source in sources:
        _last_weighted(source, found)
