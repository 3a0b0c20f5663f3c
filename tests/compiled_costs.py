"""Counts what XLA says of compiled programs; prints them as JSON.

It runs as a process of its own, without the options that let the tests compile
fast, and imports the benchmark that the documentation shows.
"""

import json
import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "benchmarks")
)

import compiled_cost
import jax
import keras
import keras_hub
import numpy as np
import workloads

import keras_lora_dropout as kld
from keras_lora_dropout.inference import ensemble

ROWS, LENGTH, VOCABULARY = 4, 32, 8000


def costs(workload, *keys):
    return {key: compiled_cost.cost_of(workload, key) for key in keys}


def deberta():
    """Two blocks of the base model, 32 x 128 tokens."""
    workload = workloads.make_workload("deberta", "blocks")
    keys = "kerashub", "n1", "plain", "n1-example", "n4"
    return costs(workload, *keys, "hidden-key-minus", "hidden-key")


def top_third():
    """Three blocks, the topmost of which is adapted."""
    name = "deberta", "blocks"
    workloads.SHAPES[name] = {**workloads.SHAPES[name], "num_layers": 3}
    workload = workloads.make_workload(*name, length=64)
    return costs(workload, "n1-top", "n4-top")


def llama():
    workload = workloads.make_workload("llama", "blocks", length=32)
    return costs(workload, "kerashub", "n1")


def causal_lm():
    """A model whose logits are larger than all else."""
    tokens = np.zeros((ROWS, LENGTH), "int32")
    x = {"token_ids": tokens, "padding_mask": tokens}

    def cost(metrics=(), **options):
        backbone = keras_hub.models.LlamaBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=2,
            hidden_dim=32,
            intermediate_dim=64,
        )
        model = keras_hub.models.LlamaCausalLM(backbone)
        kld.enable_lora_dropout(model, rank=2, **options)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, weighted_metrics=list(metrics))
        return compiled_cost.training_cost(model, x, tokens)

    in_turn = {"num_samples": 4, "sampling": "sequential"}
    return {
        "logits_megabytes": ROWS * LENGTH * VOCABULARY * 4 / 1e6,
        "one": cost(num_samples=1),
        "four": cost(**in_turn),
        "four_with_metrics": cost(["accuracy"], **in_turn),
        "four_parallel": cost(num_samples=4),
    }


def ensembles():
    """FLOPs of a forward pass and an ensemble; one layer of four adapted."""
    x = inputs = keras.Input((64,))
    for n in range(4):
        x = keras.layers.Dense(64, activation="relu", name=f"layer_{n}")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, target_layers=["layer_3"])
    data = jax.ShapeDtypeStruct((512, 64), "float32")
    plain = model.plain_class().call
    request = ensemble.EnsembleRequest(num_samples=4)

    def flops(function):
        return jax.jit(function).lower(data).compile().cost_analysis()["flops"]

    return {
        "one": flops(lambda x: model(x, training=False)),
        "four": flops(
            lambda x: ensemble.ensemble_outputs(model, plain, request, (x,), {})
        ),
    }


def ensembles_in_turn():
    """Bytes of temporaries of ensembles of 1, 4 and 8, one after another."""
    inputs = keras.Input((64,))
    x = keras.layers.Dense(1024, activation="gelu", name="wide")(inputs)
    x = keras.layers.Dense(64, activation="tanh", name="narrow")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, sampling="sequential")
    plain = model.plain_class().call
    data = jax.ShapeDtypeStruct((512, 64), "float32")

    def temporaries(num_samples):
        request = ensemble.EnsembleRequest(num_samples)

        def predict(values, x):
            mapping = zip(model.variables, values, strict=True)
            with keras.StatelessScope(mapping):
                return ensemble.ensemble_outputs(
                    model, plain, request, (x,), {}
                )

        values = [variable.value for variable in model.variables]
        compiled = jax.jit(predict).lower(values, data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return {str(count): temporaries(count) for count in (1, 4, 8)}


if __name__ == "__main__":
    parts = deberta, top_third, llama, causal_lm, ensembles, ensembles_in_turn
    print(json.dumps({part.__name__: part() for part in parts}))
