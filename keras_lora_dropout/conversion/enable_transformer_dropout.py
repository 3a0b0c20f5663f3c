"""`enable_transformer_dropout` and `hidden_key`: select, check, report."""

import logging

from keras_lora_dropout.architectures import attention_softmax
from keras_lora_dropout.architectures import transformer_blocks
from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.conversion.transformer_dropout import TransformerDropout
from keras_lora_dropout.layers.transformer_dropout import AttentionDropout
from keras_lora_dropout.layers.transformer_dropout import DropAttention
from keras_lora_dropout.layers.transformer_dropout import DropKey
from keras_lora_dropout.layers.transformer_dropout import HiddenCut
from keras_lora_dropout.training.consistency import Consistency

logger = logging.getLogger("keras_lora_dropout")


def enable_transformer_dropout(
    model, *, attention=None, hidden=None, consistency=None, blocks="auto"
):
    """Let the transformer blocks of an adapted model drop in `fit`, in place.

    A framework of three settings that are independent of each other: where
    attention drops, where feed-forward sublayers drop, and what makes up for
    the gap to prediction, where nothing drops. `hidden_key` gives the settings
    of HiddenKey, the paper's choice among them. They go together with LoRA
    (`dropout_rate=0, num_samples=1`), LoRA Dropout and AdaLoRA alike: each
    mask instance, and each example in it, drops for itself.

    `predict` and `evaluate` drop nothing; `ensemble_predict` does with
    `include_transformer_dropout=True`. Files keep the settings, and
    `merge_adapters` removes them with the adapters.
    `model.disable_transformer_dropout()` is a context to train without, and
    `model.remove_transformer_dropout()` undoes this function.

    The blocks are those of KerasHub's BERT, RoBERTa, DeBERTaV3, GPT-2, Llama,
    Mistral, Gemma and others that are made of the same attention layers, and
    all that use `keras.layers.MultiHeadAttention`. Attention that drops is not
    computed in one fused operation, which would not show its weights.

    Reference: [Wang et al., 2024](https://arxiv.org/abs/2403.00812), section 3.

    Args:
        model: A model that `enable_lora_dropout` adapted, or a
            `LoRADropoutModel`.
        attention: `DropKey`, `DropAttention` or `None`.
        hidden: `HiddenCut` or `None`.
        consistency: `Consistency` or `None`.
        blocks: Which blocks drop. `"auto"`: the latter half of a decoder-only
            model, as in the paper, and all of any other. `"all"`; `"first n"`
            or `"last n"`, as in `"last 4"`; or a list or range of indices,
            from 0, or from -1 downwards.

    Returns:
        The same `model` object.

    Raises:
        TypeError: If `model` or a setting is of another type.
        ValueError: If all three settings are `None`, if the model has
            transformer dropout already, or if it has no blocks, or none whose
            attention or feed-forward sublayers are known. The model is
            unchanged then.

    Example:

    >>> x = inputs = keras.Input((6, 8))
    >>> x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    >>> x = keras.layers.GlobalAveragePooling1D()(x)
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    >>> model = enable_lora_dropout(model, dropout_rate=0, num_samples=1)
    >>> model = enable_transformer_dropout(model, attention=DropKey(0.1))
    >>> model.transformer_dropout.attention_layers
    ('attention',)
    """
    _check_model(model)
    _check_type(
        "attention", attention, AttentionDropout, (DropKey, DropAttention)
    )
    _check_type("hidden", hidden, HiddenCut, (HiddenCut,))
    _check_type("consistency", consistency, Consistency, (Consistency,))
    if attention is None and hidden is None and consistency is None:
        raise ValueError(
            "`enable_transformer_dropout` needs a setting. Received: "
            "attention=None, hidden=None, consistency=None. Pass e.g. "
            "`attention=DropKey(0.1)`, or `**hidden_key(0.1, 0.1)`."
        )
    attentions, hiddens = [], []
    if attention is not None or hidden is not None:
        chosen = _chosen_blocks(model, blocks)
        if attention is not None:
            attentions = _attention_layers(model, chosen)
        if hidden is not None:
            hiddens = _hidden_layers(model, chosen)
    path = {id(layer): path for path, layer in layer_paths(model).items()}
    settings = TransformerDropout(
        attention,
        hidden,
        consistency,
        tuple(path[id(layer)] for layer in attentions),
        tuple(path[id(layer)] for layer in hiddens),
    )
    model._put_transformer_dropout(settings)
    logger.info(
        "Transformer dropout on model %r: %s in %d attention layers, %s in %d "
        "feed-forward sublayers, %s.",
        model.name,
        attention,
        len(attentions),
        hidden,
        len(hiddens),
        consistency,
    )
    return model


def hidden_key(attention_rate=0.1, hidden_rate=0.1, kl_weight=None):
    """Return the settings of HiddenKey, for `enable_transformer_dropout`.

    DropKey on columns and HiddenCut on elements, with bidirectional KL; without
    `kl_weight`, this is HiddenKey-.

    Reference: [Wang et al., 2024](https://arxiv.org/abs/2403.00812), section 3.
    The paper tries rates of 0.01 to 0.2 and weights of 0.01 to 10.

    Args:
        attention_rate: Number in `[0, 1)`. Rate of DropKey.
        hidden_rate: Number in `[0, 1)`. Rate of HiddenCut.
        kl_weight: Positive number, or `None` for no consistency loss.

    Returns:
        Dictionary of `attention`, `hidden` and `consistency`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> hidden_key(0.1, 0.05, kl_weight=1.0)["hidden"]
    HiddenCut(rate=0.05, pattern='element', rescale=True)
    """
    return {
        "attention": DropKey(attention_rate, "column"),
        "hidden": HiddenCut(hidden_rate, "element"),
        "consistency": None if kl_weight is None else Consistency(kl_weight),
    }


def _check_model(model):
    if not isinstance(model, AdaptedModel):
        raise TypeError(
            "`enable_transformer_dropout` takes a model with adapters. "
            f"Received: model={model!r} (of type {type(model).__name__}). Call "
            "`enable_lora_dropout` on it first; for plain LoRA, with "
            "`dropout_rate=0, num_samples=1`."
        )
    model._require_built()
    if model.transformer_dropout is not None:
        raise ValueError(
            "Transformer dropout is already enabled on model "
            f'"{model.name}": {model.transformer_dropout}. Call '
            "`model.remove_transformer_dropout()` first."
        )


def _check_type(name, value, cls, allowed):
    if value is None or isinstance(value, cls):
        return
    names = " or ".join(f"`{one.__name__}`" for one in allowed)
    raise TypeError(
        f"`{name}` must be None or a {names}. Received: {name}={value!r} (of "
        f"type {type(value).__name__}). Pass e.g. `{name}={allowed[0]()}`."
    )


def _chosen_blocks(model, blocks):
    if isinstance(blocks, str) and blocks == "auto":
        found = transformer_blocks.choose_blocks(model, "all")
        is_decoder = transformer_blocks.is_decoder_only(found)
        return found[len(found) // 2 :] if is_decoder else found
    return transformer_blocks.choose_blocks(model, blocks)


def _attention_layers(model, blocks):
    found = [
        layer
        for block in blocks
        for layer in transformer_blocks.attention_layers(block)
    ]
    unknown = {
        type(layer).__name__
        for layer in found
        if not attention_softmax.is_known(layer)
    }
    if unknown:
        raise ValueError(
            f'How the attention of model "{model.name}" computes its weights '
            f"is not known: {', '.join(sorted(unknown))}. Known are "
            f"{', '.join(attention_softmax.KNOWN)} and their subclasses. Pass "
            "`attention=None`, and `hidden` instead."
        )
    return found


def _hidden_layers(model, blocks):
    found = []
    for block in blocks:
        layers = transformer_blocks.feedforward_outputs(block)
        if not layers:
            names = ", ".join(transformer_blocks.FEEDFORWARD_OUTPUTS)
            raise ValueError(
                f'Block "{block.path or block.name}" of model "{model.name}" '
                "has no feed-forward sublayer with the names that KerasHub's "
                f"text models use ({names}). "
                "Pass `hidden=None`, and `attention` instead."
            )
        found += layers
    return found
