"""The methods that LoRA Dropout is compared with: BitFit, bottleneck adapters.

LoRA and AdaLoRA are `enable_lora_dropout` with a dropout rate of 0.
"""

import functools
import random

import keras

from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.architectures.blocks import block_layers
from keras_lora_dropout.architectures.blocks import output_projections
from keras_lora_dropout.conversion.targets import select_trainable
from keras_lora_dropout.conversion.trainable import freeze
from keras_lora_dropout.conversion.trainable import own_weights
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import next_seed
from keras_lora_dropout.layers.bottleneck import BottleneckAdapter
from keras_lora_dropout.layers.bottleneck import add_bottleneck

_MAX_BOTTLENECK = 2**16  # Far more than any model has features.
_PLACEMENTS = ("houlsby", "pfeiffer")
# What Keras calls additive terms; `beta` is that of a normalization.
_BIASES = ("bias", "beta")


def enable_bitfit(model, *, trainable_layers="head"):
    """Let the biases of a model train and freeze the rest, in place.

    Biases are those of linear layers and of normalizations, in the backbone
    and in what stands beside it. Compile the model afterwards.

    Reference: [Ben Zaken et al., 2022](https://arxiv.org/abs/2106.10199).

    Args:
        model: A built `keras.Model`: a KerasHub task, or any other.
        trainable_layers: What stays trainable besides, as in
            `enable_lora_dropout`. `"head"`: the layers outside the backbone.

    Returns:
        The same `model` object.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If the model is not built or is adapted already, or has no
            bias. The model is unchanged then.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((16,)),
    ...     keras.layers.Dense(32, name="hidden"),
    ...     keras.layers.Dense(2, name="head"),
    ... ])
    >>> model = enable_bitfit(model)
    >>> [weight.name for weight in model.trainable_weights]
    ['bias', 'kernel', 'bias']
    """
    _check_model(model, "enable_bitfit")
    kept = select_trainable(model, trainable_layers)
    if not any(_biases(layer) for layer in descendants(model)):
        raise ValueError(
            f'`enable_bitfit` trains biases, but model "{model.name}" has '
            "none. Use a method that adds weights, such as "
            "`enable_bottleneck_adapters`."
        )
    freeze(model, kept, _biases)
    return model


def enable_bottleneck_adapters(
    model,
    *,
    bottleneck_size=64,
    placement="houlsby",
    activation="gelu",
    use_bias=True,
    trainable_layers="head",
    seed=None,
):
    """Insert bottleneck adapters into the blocks of a model, in place.

    An adapter follows a sublayer of a block, before the residual connection:
    the output `y` of the sublayer becomes `y + up(activation(down(y)))`. All
    else is frozen but for the head. Compile the model afterwards. Weights are
    kept with `save_weights`, and loaded into a model that was adapted alike.

    With `d` features, a bottleneck of `b` and `L` blocks, adapters have
    `2 L (2 d b + b + d)` weights as Houlsby places them, half as many as
    Pfeiffer does; `b + d` of each are biases.

    References:
    [Houlsby et al., 2019](https://arxiv.org/abs/1902.00751);
    [Pfeiffer et al., 2021](https://arxiv.org/abs/2005.00247).

    Args:
        model: A built `keras.Model` with a backbone of transformer blocks: a
            KerasHub text task or backbone.
        bottleneck_size: Positive integer. Features of the bottleneck, `b`.
            Defaults to 64.
        placement: `"houlsby"`: after the attention and after the feed-forward
            sublayer; the blocks' layer normalizations train, too, as in the
            paper. `"pfeiffer"`: after the feed-forward sublayer alone.
        activation: Name of a Keras activation, or a function.
        use_bias: Boolean. Whether both projections have a bias.
        trainable_layers: What stays trainable besides, as in
            `enable_lora_dropout`. `"head"`: the layers outside the backbone.
        seed: Integer or `None`. Seed of the adapters' weights.

    Returns:
        The same `model` object.

    Raises:
        TypeError: If `model` is no `keras.Model`, or an argument has a type
            that is not listed.
        ValueError: If the model is not built or is adapted already, if its
            blocks are not those of a transformer that KerasHub has, or if an
            argument is out of range. The model is unchanged then.

    Example:

    >>> import keras_hub
    >>> backbone = keras_hub.models.BertBackbone(
    ...     vocabulary_size=10,
    ...     num_layers=2,
    ...     num_heads=2,
    ...     hidden_dim=8,
    ...     intermediate_dim=16,
    ... )
    >>> model = enable_bottleneck_adapters(backbone, bottleneck_size=4)
    >>> len([w for w in model.trainable_weights if "adapter" in w.name])
    16
    """
    _check_model(model, "enable_bottleneck_adapters")
    size = validation.positive_integer(
        "bottleneck_size", bottleneck_size, at_most=_MAX_BOTTLENECK
    )
    validation.word("placement", placement, _PLACEMENTS)
    validation.boolean("use_bias", use_bias)
    activation = keras.activations.get(activation)
    streams = random.Random(validation.seed(seed))
    kept = select_trainable(model, trainable_layers)
    backbone = backbone_of(model)
    houlsby = placement == "houlsby"
    layers = output_projections(backbone, attention=houlsby) if backbone else []
    if not layers:
        raise ValueError(
            "`enable_bottleneck_adapters` found no transformer block in model "
            f'"{model.name}": it looks for layers named "attention_output" and '
            '"feedforward_output_dense" in the blocks of a KerasHub backbone. '
            "Pass a text task or backbone, such as a `BertTextClassifier`."
        )
    for layer in layers:
        add_bottleneck(layer, size, activation, use_bias, next_seed(streams))
    norms = set()
    if houlsby:
        norms = {
            id(layer)
            for layer in block_layers(backbone)
            if isinstance(layer, keras.layers.LayerNormalization)
        }
    freeze(model, kept, functools.partial(_adapter_weights, norms))
    for layer in [model, *descendants(model)]:
        if _contains_adapter(layer):
            layer.get_config = functools.partial(_refuse_recipe, layer)
    # Keras's opens the file first, and so loses what it held.
    model.save = functools.partial(_refuse_recipe, model)
    return model


def _biases(layer):
    return [w for w in own_weights(layer) if w.name in _BIASES]


def _adapter_weights(norms, layer):
    if isinstance(layer, BottleneckAdapter):
        return layer.bottleneck_weights
    return layer.weights if id(layer) in norms else []


def _contains_adapter(layer):
    return any(isinstance(p, BottleneckAdapter) for p in descendants(layer))


def _refuse_recipe(layer, *args, **kwargs):
    raise ValueError(
        f'"{layer.name}" has bottleneck adapters, which its own recipe '
        "(`get_config`, `save`, `clone_model`, `save_to_preset`) would lose. "
        "Keep its weights with `save_weights`; to load them, build the model, "
        "call `enable_bottleneck_adapters` as before, then `load_weights`."
    )


def _check_model(model, function):
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`{function}` adapts a `keras.Model`, such as a KerasHub task. "
            f"Received: model={model!r} (of type {type(model).__name__})."
        )
    if not model.built or not model.weights:
        raise ValueError(
            f'Model "{model.name}" is not built. Give it an `Input`, or call '
            f"it on a batch of data, before `{function}`."
        )
    adapted = LoRADropoutAdapter, BottleneckAdapter
    if any(isinstance(layer, adapted) for layer in descendants(model)):
        raise ValueError(
            f'Model "{model.name}" is adapted already. Start from a fresh '
            f"model before `{function}`."
        )
