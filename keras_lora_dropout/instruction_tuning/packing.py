"""Several examples in one row, none of which sees another.

KerasHub's decoders take one padding mask for each row. Here its entries count
the examples of the row, and a token sees those of its own number alone. Where
positions are rotations, only distances matter, so that no example notices where
in the row it stands.
"""

import functools

import keras_hub
from keras import ops

from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import descendants

_models = keras_hub.models
# Rotary positions, and one private method that makes the attention mask.
_ROTARY = (
    _models.LlamaBackbone,
    _models.MistralBackbone,
    _models.Phi3Backbone,
    _models.QwenBackbone,
    _models.Qwen3Backbone,
)
_METHOD = "_compute_self_attention_mask"
_CACHES = "self_attention_cache", "attention_cache"


def isolate_packed_examples(model):
    """Let a language model take several examples in one row.

    A token sees tokens whose entry in `padding_mask` is the same, so that the
    examples of a row that `make_response_data(packed=True)` made do not see
    each other. Rows with one example, masks of 0 and 1, and generation are what
    they were. A model that is loaded or copied needs the call again.

    Args:
        model: A KerasHub `CausalLM` or backbone with rotary positions: Llama,
            Mistral, Phi3, Qwen or Qwen3; adapted or not.

    Returns:
        The same `model` object.

    Raises:
        ValueError: If the model is of another kind.

    Example:

    >>> import keras_hub
    >>> backbone = keras_hub.models.LlamaBackbone(
    ...     vocabulary_size=20,
    ...     num_layers=1,
    ...     num_query_heads=2,
    ...     num_key_value_heads=1,
    ...     hidden_dim=8,
    ...     intermediate_dim=16,
    ... )
    >>> backbone = isolate_packed_examples(backbone)
    >>> states = backbone({
    ...     "token_ids": np.array([[1, 5, 7, 1, 6]]),
    ...     "padding_mask": np.array([[1, 1, 1, 2, 2]]),
    ... })
    >>> states.shape
    (1, 5, 8)
    """
    backbone = getattr(model, "backbone", model)
    blocks = []
    if isinstance(backbone, _ROTARY):
        layers = descendants(backbone)
        blocks = [layer for layer in layers if hasattr(layer, _METHOD)]
    if not blocks:
        names = ", ".join(cls.__name__ for cls in _ROTARY)
        raise ValueError(
            f"Model {type(model).__name__} cannot keep packed examples apart: "
            f"this is known of {names}. Received: model="
            f"{validation.shown(model)}. Use `packed=False`."
        )
    for block in blocks:
        block.__class__ = _isolating(type(block))
    for name in ("train_function", "test_function", "predict_function"):
        if hasattr(model, name):
            setattr(model, name, None)
    return model


class _Isolated:
    """Mixin of decoder blocks."""

    def _compute_self_attention_mask(self, **kwargs):
        mask = super()._compute_self_attention_mask(**kwargs)
        padding_mask = kwargs["decoder_padding_mask"]
        caches = [kwargs.get(name) for name in _CACHES]
        if padding_mask is None or any(c is not None for c in caches):
            return mask
        number = ops.cast(padding_mask, "int32")
        queries, keys = ops.expand_dims(number, 2), ops.expand_dims(number, 1)
        # Padding sees what it saw: a row of nothing has no softmax.
        sees = ops.logical_or(ops.equal(queries, keys), ops.equal(queries, 0))
        return ops.where(sees, mask, ops.zeros_like(mask))


@functools.cache
def _isolating(cls):
    if issubclass(cls, _Isolated):
        return cls
    namespace = {"__module__": cls.__module__}
    return type(cls.__name__, (_Isolated, cls), namespace)
