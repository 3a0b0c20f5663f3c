"""Freezing: adapters and the chosen layers train, nothing else does."""

from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter


def freeze(model, trainable_layers):
    """Freeze a model but for its adapters and `trainable_layers`.

    A layer with nothing below it that trains is set `trainable = False` as a
    whole, so that a frozen `BatchNormalization` keeps its statistics too.

    Args:
        model: The model, its layers already adapted.
        trainable_layers: Layers that keep the state that they have.
    """
    kept = set()
    for layer in trainable_layers:
        kept.update([id(layer), *map(id, descendants(layer))])
    for layer in [model, *descendants(model)]:
        if isinstance(layer, LoRADropoutAdapter):
            _freeze_all_but_factors(layer)
        elif id(layer) in kept:
            continue
        elif _trains(layer, kept):
            if not layer.trainable:
                layer.trainable = True
            _freeze_own_variables(layer)
        else:
            layer.trainable = False


def _trains(layer, kept):
    if isinstance(layer, LoRADropoutAdapter) or id(layer) in kept:
        return True
    return any(_trains(part, kept) for part in sublayers(layer))


def _freeze_all_but_factors(layer):
    if not layer.trainable:
        layer.trainable = True
    for variable in layer.weights:
        variable.trainable = any(variable is f for f in layer.factors)


def _freeze_own_variables(layer):
    inside = {id(v) for part in sublayers(layer) for v in part.weights}
    for variable in layer.weights:
        if id(variable) not in inside:
            variable.trainable = False
