"""Tiny KerasHub tasks with real tokenizers, and data to train them on."""

import functools
import io

import keras_hub
import numpy as np
import sentencepiece
from keras_hub import models

TEXTS = [
    "the quick brown fox",
    "the lazy dog",
    "a fox jumped over the dog",
    "brown dog",
    "the quick fox",
    "over the lazy brown dog",
]
LABELS = np.array([0, 1, 0, 1, 0, 1])
WORDS = sorted({word for text in TEXTS for word in text.split()})
ENCODER = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 8,
}
DECODER = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}


@functools.cache
def sentencepiece_model(**ids):
    """Train a real SentencePiece vocabulary on the texts."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=buffer,
        vocab_size=40,
        model_type="BPE",
        minloglevel=2,
        **ids,
    )
    return buffer.getvalue()


def deberta(max_sequence_length=8):
    tokenizer = models.DebertaV3Tokenizer(
        sentencepiece_model(
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            user_defined_symbols="[MASK]",
        )
    )
    return models.DebertaV3TextClassifier(
        backbone=models.DebertaV3Backbone(
            vocabulary_size=tokenizer.vocabulary_size(),
            bucket_size=4,
            **{**ENCODER, "max_sequence_length": max_sequence_length},
        ),
        preprocessor=models.DebertaV3TextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
        num_classes=2,
    )


def deberta_of_any_backend():
    """The logarithm of the farthest position of all is an integer, which
    backends round up or down; here no text is so long."""
    return deberta(max_sequence_length=16)


def bert():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return models.BertTextClassifier(
        backbone=models.BertBackbone(
            vocabulary_size=len(vocabulary), **ENCODER
        ),
        preprocessor=models.BertTextClassifierPreprocessor(
            models.BertTokenizer(vocabulary, lowercase=True), sequence_length=8
        ),
        num_classes=2,
    )


def letters(tokenizer_class):
    """A byte-pair tokenizer, each of whose pieces is a letter."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = ["<s>", "<pad>", "</s>", "<mask>", "Ġ", *letters]
    pieces += [f"Ġ{letter}" for letter in letters]
    return tokenizer_class(
        vocabulary={piece: i for i, piece in enumerate(pieces)},
        merges=[f"Ġ {letter}" for letter in letters],
    )


def roberta():
    tokenizer = letters(models.RobertaTokenizer)
    return models.RobertaTextClassifier(
        backbone=models.RobertaBackbone(
            vocabulary_size=tokenizer.vocabulary_size(), **ENCODER
        ),
        preprocessor=models.RobertaTextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
        num_classes=2,
    )


def llama():
    tokenizer = models.LlamaTokenizer(
        sentencepiece_model(
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="<pad>"
        )
    )
    return models.LlamaCausalLM(
        backbone=models.LlamaBackbone(
            vocabulary_size=tokenizer.vocabulary_size(), **DECODER
        ),
        preprocessor=models.LlamaCausalLMPreprocessor(
            tokenizer, sequence_length=8
        ),
    )


def gemma():
    tokenizer = models.GemmaTokenizer(
        sentencepiece_model(
            pad_id=0,
            bos_id=2,
            eos_id=1,
            unk_id=3,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eos>",
        )
    )
    return models.GemmaCausalLM(
        backbone=models.GemmaBackbone(
            vocabulary_size=tokenizer.vocabulary_size(), head_dim=8, **DECODER
        ),
        preprocessor=models.GemmaCausalLMPreprocessor(
            tokenizer, sequence_length=8
        ),
    )


def vit():
    return models.ViTImageClassifier(
        backbone=models.ViTBackbone(
            image_shape=(8, 8, 3),
            patch_size=4,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        ),
        preprocessor=models.ViTImageClassifierPreprocessor(
            keras_hub.layers.ViTImageConverter(image_size=(8, 8))
        ),
        num_classes=2,
    )


def data_of(family):
    """Inputs and labels as a user has them; a language model needs none."""
    if family is vit:
        generator = np.random.default_rng(0)
        return generator.uniform(0, 255, (6, 8, 8, 3)).astype("float32"), LABELS
    if family in (llama, gemma):
        return TEXTS, None
    return TEXTS, LABELS


# Family, linear layers in each block, size of each block's adapters at rank 2.
# Square kernels have 2 * (16 + 16) = 64 weights, feed-forward ones 96.
FAMILIES = [
    (deberta, 6, 4 * 64 + 2 * 96),
    (bert, 6, 4 * 64 + 2 * 96),
    (roberta, 6, 4 * 64 + 2 * 96),
    # Keys and values of 2 heads of 4: 2 * (16 + 8) = 48 weights.
    (llama, 7, 2 * 64 + 2 * 48 + 3 * 96),
    # Heads of 8: 4 of queries (32), 2 of keys and values (16); half the
    # feed-forward width to each gate.
    (gemma, 7, 2 * 96 + 2 * 64 + 3 * 64),
    (vit, 6, 4 * 64 + 2 * 96),
]
