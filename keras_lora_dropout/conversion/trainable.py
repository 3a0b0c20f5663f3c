"""Freezing: adapters and the chosen layers train, nothing else does."""

import math

from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter


def factors_of(layer):
    """Return what trains of an adapted layer, and nothing of any other."""
    return layer.factors if isinstance(layer, LoRADropoutAdapter) else []


def freeze(model, trainable_layers, trained=factors_of):
    """Freeze a model but for its adapters and `trainable_layers`.

    A layer with nothing below it that trains is set `trainable = False` as a
    whole, so that a frozen `BatchNormalization` keeps its statistics too.

    Args:
        model: The model, its layers already adapted.
        trainable_layers: Layers that keep the state that they have, but for
            adapted ones.
        trained: Function of a layer that returns which weights of its own
            train.
    """
    kept = set()
    for layer in trainable_layers:
        kept.update([id(layer), *map(id, descendants(layer))])
    for layer in [model, *descendants(model)]:
        if id(layer) in kept and not isinstance(layer, LoRADropoutAdapter):
            continue
        if _trains(layer, kept, trained):
            if not layer.trainable:
                layer.trainable = True
            wanted = {id(variable) for variable in trained(layer)}
            for variable in own_weights(layer):
                variable.trainable = id(variable) in wanted
        else:
            layer.trainable = False


def _trains(layer, kept, trained):
    if isinstance(layer, LoRADropoutAdapter) or id(layer) in kept:
        return True
    if trained(layer):
        return True
    return any(_trains(part, kept, trained) for part in sublayers(layer))


def trainable_flags(model):
    """Return what trains in a model, as plain data.

    Returns:
        Dictionary of layer path -> list of booleans: the layer's own flag, then
        those of the variables that it holds itself. The model is `""`. Layers
        are in forward order, which stays; Keras changes the path of a layer
        without weights when it is called for the first time.
    """
    return {
        path: [layer.trainable, *(v.trainable for v in own_weights(layer))]
        for path, layer in {"": model, **layer_paths(model)}.items()
    }


def set_trainable_flags(model, flags):
    """Restore what `trainable_flags` returned.

    Args:
        model: The model, with the layers and weights that it had then.
        flags: What `trainable_flags` returned.
    """
    layers = [model, *layer_paths(model).values()]
    given = list(zip(layers, flags.values(), strict=True))
    # A layer hands its flag down to its sublayers, so parents go first.
    for layer, (trainable, *_) in given:
        layer.trainable = trainable
    for layer, (_, *own) in given:
        for variable, flag in zip(own_weights(layer), own, strict=True):
            variable.trainable = flag


def count_entries(variables):
    """Return how many numbers variables hold in all."""
    return sum(math.prod(variable.shape) for variable in variables)


def own_weights(layer):
    """Return the weights that a layer holds itself, not through sublayers."""
    inside = {id(v) for part in sublayers(layer) for v in part.weights}
    return [v for v in layer.weights if id(v) not in inside]
