"""`unmerge_adapters`: back from the plain model to the adapted one."""

import keras

from keras_lora_dropout.conversion.converted_model import attach
from keras_lora_dropout.conversion.merging import merged_models
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.layers import quantized


def unmerge_adapters(model):
    """Undo `merge_adapters`: give a merged model its adapters back, in place.

    The kernels are restored bit for bit, from copies that `merge_adapters` kept
    in the host's memory. Adapters, settings, random state and what trains are
    as they were, too. The head, and whatever else was not merged, keeps the
    values that it has now. The optimizer starts anew.

    Args:
        model: A model that `merge_adapters` returned.

    Returns:
        The same model object, adapted again.

    Raises:
        ValueError: If the model was not merged in this process, or if it was
            with `keep_kernels=False`.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((6,)),
    ...     keras.layers.Dense(8, name="hidden"),
    ...     keras.layers.Dense(3, name="head"),
    ... ])
    >>> model = enable_lora_dropout(model, rank=2)
    >>> merged = model.merge_adapters()
    >>> [path for path, _ in unmerge_adapters(merged).adapted_layers]
    ['hidden']
    """
    is_model = isinstance(model, keras.Model)
    undo = merged_models.pop(model, None) if is_model else None
    if undo is None:
        raise ValueError(
            "`unmerge_adapters` needs a model that `merge_adapters` returned "
            "in this process, with `keep_kernels=True`. Received: model="
            f"{model!r}. To go back later, keep the adapted model with `save`."
        )
    model.__class__ = undo.model_class
    attach(model, undo.recipe)
    layers = layer_paths(model)
    for path, values in undo.kernels.items():
        weights = quantized.kernel_weights(layers[path])
        for weight, value in zip(weights, values, strict=True):
            weight.assign(value)
    undo.restore_state(model)
    return model
