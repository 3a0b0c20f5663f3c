"""A model that finds answers in a context."""

import keras
import keras_hub
from keras import ops

# A logit of padding: no chance after softmax, and finite in float16.
_IMPOSSIBLE = -1e4


@keras.saving.register_keras_serializable("keras_lora_dropout")
class ExtractiveQA(keras.Model):
    """Extractive question answering on a KerasHub encoder.

    Scores each token as the first and as the last one of the answer: a linear
    layer with two outputs on each token's representation.

    With `SparseCategoricalCrossentropy(from_logits=True)` and targets of shape
    `(batch, 2)`, the loss is the mean of the cross-entropies of start and end,
    as in the paper. `enable_lora_dropout` adapts the encoder's blocks and keeps
    the linear layer trainable.

    Reference: [Devlin et al., 2019](https://arxiv.org/abs/1810.04805), section
    4.2.

    Args:
        backbone: A KerasHub backbone that encodes tokens, such as
            `BertBackbone`, `RobertaBackbone` or `DebertaV3Backbone`: it takes
            `token_ids` and puts out a representation of each token.
        **kwargs: `name` and `trainable`, as of `keras.Model`.

    Call arguments:
        inputs: Dictionary of the backbone's inputs, of shape `(batch, length)`,
            such as `AnswerWindows.inputs`.

    Output shape:
        `(batch, 2, length)`: logits of starts and of ends. Those of padding are
        -10,000, if the backbone takes a padding mask.

    Raises:
        ValueError: If the backbone does not encode tokens.

    Example:

    >>> import keras_hub
    >>> backbone = keras_hub.models.BertBackbone(
    ...     vocabulary_size=10,
    ...     num_layers=1,
    ...     num_heads=2,
    ...     hidden_dim=8,
    ...     intermediate_dim=16,
    ... )
    >>> model = enable_lora_dropout(ExtractiveQA(backbone), rank=2)
    >>> len(model.adapted_layers)
    6
    >>> names = "token_ids", "segment_ids", "padding_mask"
    >>> inputs = {name: np.ones((3, 5), "int32") for name in names}
    >>> model.ensemble_predict(inputs, verbose=0).shape
    (3, 2, 5)
    """

    def __init__(self, backbone, **kwargs):
        inputs, tokens = _inputs_and_tokens(backbone)
        span_logits = keras.layers.Dense(
            2,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            dtype=backbone.dtype_policy,
            name="span_logits",
        )
        outputs = ops.swapaxes(span_logits(tokens), 1, 2)
        if "padding_mask" in inputs:
            is_token = ops.cast(inputs["padding_mask"], "bool")
            is_token = ops.expand_dims(is_token, 1)
            outputs = ops.where(is_token, outputs, _IMPOSSIBLE)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.backbone = backbone

    def get_config(self):
        """Return the recipe of the backbone, and the model's name."""
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Build the model of a recipe."""
        backbone = keras.saving.deserialize_keras_object(
            config["backbone"], custom_objects
        )
        return cls(**{**config, "backbone": backbone})


def _inputs_and_tokens(backbone):
    """Return a backbone's inputs by name, and what it makes of each token."""
    is_backbone = isinstance(backbone, keras_hub.models.Backbone)
    inputs = backbone.input if is_backbone else None
    if isinstance(inputs, dict) and "token_ids" in inputs:
        outputs = backbone(inputs)
        if isinstance(outputs, dict):
            outputs = outputs.get("sequence_output")
        if outputs is not None and len(outputs.shape) == 3:
            return inputs, outputs
    raise ValueError(
        "`ExtractiveQA` needs a KerasHub backbone that takes `token_ids` and "
        "puts out a representation of each token, such as `BertBackbone`, "
        f"`RobertaBackbone` or `DebertaV3Backbone`. Received: {backbone!r} (of "
        f"type {type(backbone).__name__}). Of a task, pass `task.backbone`."
    )
