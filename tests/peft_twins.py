"""Tiny models that KerasHub and Hugging Face both have, and their inputs.

Read by the tests and by `peft_exchange_oracle.py`, so that it imports neither
Keras nor torch.
"""

import dataclasses

import numpy as np

NUM_CLASSES = 3
INSTANCES = 3
SEED = 11
SEQUENCE = 10
# Numbers of real tokens; the rest is padding.
LENGTHS = (10, 6, 3, 8)
ENCODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": NUM_CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_DECODER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Twin:
    """One architecture, tiny.

    Attributes:
        name: Its name in the tests.
        config: Name of the configuration class in transformers, and arguments.
        model: Name of the model class in transformers.
        keras_class: What KerasHub's classes start with.
        lora, adalora: Arguments of PEFT's configurations.
        keras_backbone: Arguments of KerasHub's backbone where KerasHub has no
            converter: weights go from KerasHub to Hugging Face then.
        padding: Token of the padding.
        in_one_pass: Whether PEFT can run several adapters on one batch. It
            cannot with a head of more than one layer (RoBERTa), or where a
            layer is called on something without a batch (DeBERTaV3).
    """

    name: str
    config: tuple
    model: str
    keras_class: str
    lora: dict
    adalora: dict
    keras_backbone: dict | None = None
    padding: int = 0
    in_one_pass: bool = True

    @property
    def is_classifier(self):
        return self.model.endswith("SequenceClassification")


TWINS = [
    Twin(
        "bert",
        # KerasHub computes GELU by its tanh approximation.
        (
            "BertConfig",
            {**ENCODER, "max_position_embeddings": 12}
            | {"hidden_act": "gelu_pytorch_tanh"},
        ),
        "BertForSequenceClassification",
        "Bert",
        {
            # "dense" is in attention, feed-forward and pooler.
            "target_modules": ["query", "value", "dense", "word_embeddings"],
            "rank_pattern": {
                "layer.0.attention.self.query": 2,
                r"layer\.\d+\.intermediate.dense": 6,
            },
            "alpha_pattern": {"value": 3},
        },
        {"target_modules": ["query", "key", "intermediate.dense"]},
    ),
    Twin(
        "roberta",
        (
            "RobertaConfig",
            {
                **ENCODER,
                "max_position_embeddings": 14,
                "type_vocab_size": 1,
                "pad_token_id": 1,
                "layer_norm_eps": 1e-5,
            },
        ),
        "RobertaForSequenceClassification",
        "Roberta",
        {"target_modules": ["query", "key", "value", "output.dense"]},
        {"target_modules": r".*encoder\.layer\.\d\.output\.dense"},
        padding=1,
        in_one_pass=False,
    ),
    Twin(
        "deberta_v3",
        (
            "DebertaV2Config",
            {
                **ENCODER,
                "max_position_embeddings": 12,
                "relative_attention": True,
                "position_buckets": 4,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False,
                "type_vocab_size": 0,
                "pooler_dropout": 0.0,
            },
        ),
        "DebertaV2ForSequenceClassification",
        "DebertaV3",
        {
            "target_modules": [
                "query_proj",
                "key_proj",
                "value_proj",
                "attention.output.dense",
                "intermediate.dense",
            ],
            "modules_to_save": ["pooler"],
            "use_dora": True,
        },
        {
            "target_modules": ["query_proj", "key_proj", "output.dense"],
            "modules_to_save": ["pooler.dense", "classifier"],
        },
        keras_backbone={
            "vocabulary_size": 40,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 32,
            "max_sequence_length": 12,
            "bucket_size": 4,
        },
        in_one_pass=False,
    ),
    Twin(
        "llama",
        ("LlamaConfig", {**DECODER, "rms_norm_eps": 1e-6}),
        "LlamaForCausalLM",
        "Llama",
        {"target_modules": "all-linear"},
        {"target_modules": _DECODER_TARGETS},
        keras_backbone={
            "vocabulary_size": 40,
            "num_layers": 2,
            "num_query_heads": 4,
            "num_key_value_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 32,
            "layer_norm_epsilon": 1e-6,
        },
    ),
    Twin(
        "mistral",
        ("MistralConfig", {**DECODER, "rms_norm_eps": 1e-5}),
        "MistralForCausalLM",
        "Mistral",
        {"target_modules": _DECODER_TARGETS, "use_rslora": True},
        {"target_modules": ["q_proj", "gate_proj", "up_proj"]},
    ),
    Twin(
        "gemma",
        ("GemmaConfig", {**DECODER, "head_dim": 8}),
        "GemmaForCausalLM",
        "Gemma",
        {"target_modules": [*_DECODER_TARGETS, "gate_proj"]},
        {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]},
    ),
    Twin(
        "qwen2",
        ("Qwen2Config", DECODER),
        "Qwen2ForCausalLM",
        "Qwen",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "layers_to_transform": [1],
        },
        {"target_modules": _DECODER_TARGETS},
    ),
]


def inputs(padding):
    """Token ids and padding mask, `(examples, SEQUENCE)` each."""
    ids = np.random.default_rng(0).integers(3, 40, (len(LENGTHS), SEQUENCE))
    mask = np.arange(SEQUENCE) < np.array(LENGTHS)[:, None]
    ids = np.where(mask, ids, padding)
    return ids.astype("int32"), mask.astype("int32")


def of_tokens(logits, mask):
    """Logits of a language model at real tokens, of a classifier all."""
    return logits[mask.astype(bool)] if logits.ndim == 3 else logits
