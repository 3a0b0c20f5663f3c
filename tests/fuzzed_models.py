"""The models that fuzzed calls act on, each in its smallest form."""

import functools
import tempfile

import keras
import keras_hub
import numpy as np
from helpers import adapted_mlp
from helpers import randomize
from helpers import seeded_dense

import keras_lora_dropout as kld

X = np.linspace(-1, 1, 24, dtype="float32").reshape(4, 6)
Y = np.array([0, 1, 2, 0])
TOKENS = {
    "token_ids": np.array([[1, 2, 3, 0]] * 2),
    "padding_mask": np.array([[1, 1, 1, 0]] * 2),
}


# Models.


def eager(**options):
    """An adapted model that nothing needs to be compiled for."""
    compiled = {"run_eagerly": True, "metrics": ["accuracy"]}
    model = adapted_mlp(compiled, **options)
    model.ensemble_evaluate(X, Y, verbose=0)  # Makes what is made once.
    model.predict(X, verbose=0)
    return model


def with_two():
    model = eager()
    model.add_adapter("other", rank=1, seed=1)
    return model


def attention():
    """A plain model of two blocks, and a head."""
    x = inputs = keras.Input((3, 6))
    for name in ("one", "two"):
        layer = keras.layers.MultiHeadAttention(2, 3, name=name)
        x = layer(x, x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))


def adapted_attention():
    model = kld.enable_lora_dropout(attention(), rank=2, seed=0)
    model(np.zeros((1, 3, 6), "float32"), training=True)
    return model


def bert():
    return keras_hub.models.BertBackbone(
        vocabulary_size=10,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=6,
    )


def adapted_bert():
    return randomize(kld.enable_lora_dropout(bert(), rank=2, seed=0))


def llama():
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=10,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )
    return keras_hub.models.LlamaCausalLM(backbone)


def adapted_llama():
    model = kld.enable_lora_dropout(llama(), rank=2, seed=0, num_samples=2)
    model.compile(sampler="greedy", run_eagerly=True)
    model.ensemble_generate(TOKENS, stop_token_ids=None)
    return model


def saved():
    model = eager()
    model.save_adapters("saved")
    return model


@functools.cache
def exported():
    """A folder for the process, with an adapter of the same architecture."""
    folder = tempfile.TemporaryDirectory()
    adapted_bert().export_peft(folder.name)
    return folder


def imported(model, directory, **options):
    if isinstance(directory, str) and directory == "exported":
        directory = exported().name
    return kld.import_peft(model, directory, **options)


def merged():
    return adapted_mlp().merge_adapters()
