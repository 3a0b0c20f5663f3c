"""Freezing: adapters and the chosen layers train, nothing else does."""

from keras_lora_dropout.conversion.targets import layer_paths
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
    for variable in own_weights(layer):
        variable.trainable = False


def trainable_flags(model):
    """Return what trains in a model, as plain data.

    Returns:
        Dictionary of layer path -> list of booleans: the layer's own flag, then
        those of the variables that it holds itself. The model is `""`.
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
    layers = {"": model, **layer_paths(model)}
    # A layer hands its flag down to its sublayers, so parents go first.
    for path, layer in layers.items():
        layer.trainable = flags[path][0]
    for path, layer in layers.items():
        for variable, flag in zip(
            own_weights(layer), flags[path][1:], strict=True
        ):
            variable.trainable = flag


def own_weights(layer):
    """Return the weights that a layer holds itself, not through sublayers."""
    inside = {id(v) for part in sublayers(layer) for v in part.weights}
    return [v for v in layer.weights if id(v) not in inside]
