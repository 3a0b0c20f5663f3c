"""stories260K of llama2.c as a `LlamaCausalLM`: weights and vocabulary.

A Llama 2 of 260,000 weights that was trained on TinyStories: small enough to
train and to generate with on a processor, and real.
"""

import pathlib
import struct

import keras_hub
import numpy as np
from sentencepiece import sentencepiece_model_pb2

WEIGHTS = "stories260K.bin"
VOCABULARY = "tok512.bin"
_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")


def load_stories(folder, sequence_length=256, dtype=None):
    """Build the task from the two files that llama2.c publishes.

    Args:
        folder: Path of the folder with `stories260K.bin` and `tok512.bin`.
        sequence_length: Integer. Length that the preprocessor pads and cuts
            to; the model was trained on 512 tokens.
        dtype: Dtype policy of the model, or `None` for Keras's own.

    Returns:
        A `keras_hub.models.LlamaCausalLM` with its preprocessor.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is cut short or of another format.
    """
    folder = pathlib.Path(folder)
    backbone = load_backbone(folder / WEIGHTS, dtype)
    tokenizer = load_tokenizer(
        folder / VOCABULARY, backbone.token_embedding.input_dim
    )
    preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor)


def load_backbone(path, dtype=None):
    """Read the weights, as llama2.c's first format has them."""
    data = pathlib.Path(path).read_bytes()
    if len(data) < _HEADER.size:
        raise ValueError(f"{path} is no model of llama2.c: it has no header.")
    dim, hidden, layers, heads, kv_heads, vocabulary, _ = _HEADER.unpack_from(
        data
    )
    size = dim // heads
    arrays = _Arrays(path, data[_HEADER.size :])
    embedding = arrays.take(vocabulary, dim)
    attention_norm = arrays.take(layers, dim)
    query = arrays.take(layers, heads, size, dim)
    key = arrays.take(layers, kv_heads, size, dim)
    value = arrays.take(layers, kv_heads, size, dim)
    output = arrays.take(layers, dim, heads, size)
    feedforward_norm = arrays.take(layers, dim)
    gate = arrays.take(layers, hidden, dim)
    down = arrays.take(layers, dim, hidden)
    up = arrays.take(layers, hidden, dim)
    final_norm = arrays.take(dim)

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=dim,
        intermediate_dim=hidden,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    # llama2.c rotates neighbours (2i, 2i + 1), KerasHub the halves of a head.
    halves = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    block = "transformer_layer_{}"
    weights = {"token_embedding": [embedding]}
    for n in range(layers):
        weights[block.format(n)] = [
            query[n][:, halves].transpose(2, 0, 1),
            key[n][:, halves].transpose(2, 0, 1),
            value[n].transpose(2, 0, 1),
            output[n].transpose(1, 2, 0),
            attention_norm[n],
            up[n].T,
            gate[n].T,
            down[n].T,
            feedforward_norm[n],
        ]
    weights["sequence_output_layernorm"] = [final_norm]
    for name, values in weights.items():
        backbone.get_layer(name).set_weights(values)
    return backbone


def load_tokenizer(path, vocabulary_size):
    """Read the vocabulary as a SentencePiece model, which it once was."""
    data = pathlib.Path(path).read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = vocabulary_size
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    start = struct.calcsize("<i")
    for number in range(vocabulary_size):
        if start + _PIECE.size > len(data):
            raise ValueError(
                f"{path} holds {number} pieces, not {vocabulary_size}: it is "
                "cut short, or the vocabulary of another model."
            )
        score, length = _PIECE.unpack_from(data, start)
        start += _PIECE.size
        text = data[start : start + length].decode("utf-8")
        start += length
        _add_piece(model, number, text, score)
    return keras_hub.models.LlamaTokenizer(model.SerializeToString())


def _add_piece(model, number, text, score):
    special = {0: "<unk>", 1: "<s>", 2: "</s>"}
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    piece = model.pieces.add(
        piece=special.get(number, text.replace(" ", "\u2581")), score=score
    )
    if number == 0:
        piece.type = kind.UNKNOWN
    elif number in special:
        piece.type = kind.CONTROL
    elif number < len(special) + 256:
        piece.type = kind.BYTE


class _Arrays:
    """Float arrays, one after the other."""

    def __init__(self, path, data):
        self._path = path
        self._numbers = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        self._start = 0

    def take(self, *shape):
        stop = self._start + int(np.prod(shape))
        if stop > len(self._numbers):
            raise ValueError(
                f"{self._path} holds {len(self._numbers)} numbers, where its "
                f"header asks for {stop} and more: it is cut short, or no "
                "model of llama2.c."
            )
        array = self._numbers[self._start : stop].reshape(shape)
        self._start = stop
        return array
