"""What XLA counts of compiled training steps: a guard without a clock."""

import pathlib
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND

import keras_lora_dropout as kld
from keras_lora_dropout.inference import ensemble

if BACKEND != "jax":
    pytest.skip("XLA's analysis is read on JAX", allow_module_level=True)

import jax

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The module `compiled_cost` of the examples."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import compiled_cost

        yield compiled_cost
    finally:
        sys.path.remove(str(EXAMPLES))
        keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def blocks(benchmark):
    """Costs of steps on two blocks of DeBERTaV3-base, 32 x 128 tokens."""
    workload = benchmark.make_workload("deberta", "blocks")
    keys = ["kerashub", "n1", "plain", "n1-example", "n4"]
    return {key: benchmark.cost_of(workload, key) for key in keys}


def test_one_instance_of_deberta(blocks):
    ours, theirs = blocks["n1"], blocks["kerashub"]
    assert ours["gflop"] <= 0.465 * theirs["gflop"]
    assert ours["gigabytes"] <= 0.57 * theirs["gigabytes"]
    memory = "temporary_megabytes"
    assert ours[memory] <= 0.54 * theirs[memory]


def test_four_instances_of_deberta(blocks):
    assert blocks["n4"]["gflop"] <= 1.86 * blocks["kerashub"]["gflop"]
    assert blocks["n4"]["gflop"] <= 4.0 * blocks["n1"]["gflop"]


def test_masks_for_each_example(blocks):
    assert blocks["n1-example"]["gflop"] <= 1.05 * blocks["plain"]["gflop"]
    assert blocks["n1"]["gflop"] <= 1.001 * blocks["plain"]["gflop"]


def test_llama(benchmark):
    workload = benchmark.make_workload("llama", "blocks", length=32)
    ours, theirs = (
        benchmark.cost_of(workload, key)["gflop"] for key in ("n1", "kerashub")
    )
    assert ours <= 0.88 * theirs


def test_four_instances_of_the_top_third(benchmark, monkeypatch):
    import workloads

    name = "deberta", "blocks"
    shape = {**workloads.SHAPES[name], "num_layers": 3}
    monkeypatch.setitem(workloads.SHAPES, name, shape)
    workload = benchmark.make_workload(*name, length=64)
    four, one = (
        benchmark.cost_of(workload, key)["gflop"]
        for key in ("n4-top", "n1-top")
    )
    # 2 + 4 * (1 + 1) passes through a block against 4 * (3 + 1): 0.625.
    assert four <= 0.65 * 4 * one


LLAMA = {"num_query_heads": 2, "num_key_value_heads": 2, "hidden_dim": 32}
ROWS, LENGTH, VOCABULARY = 4, 32, 8000


def causal_lm(metrics, **options):
    keras_hub = pytest.importorskip("keras_hub")
    model = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=1,
            intermediate_dim=64,
            **LLAMA,
        )
    )
    kld.enable_lora_dropout(model, rank=2, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=metrics)
    return model


def test_sequential_instances_take_the_memory_of_one(benchmark):
    tokens = np.zeros((ROWS, LENGTH), "int32")
    x = {"token_ids": tokens, "padding_mask": tokens}
    one, four, parallel, measured = (
        benchmark.training_cost(model, x, tokens)["temporary_megabytes"]
        for model in (
            causal_lm([], num_samples=1),
            causal_lm([], num_samples=4, sampling="sequential"),
            causal_lm([], num_samples=4),
            causal_lm(["accuracy"], num_samples=4, sampling="sequential"),
        )
    )
    logits = ROWS * LENGTH * VOCABULARY * 4 / 1e6
    assert four <= 1.1 * one
    assert parallel >= one + 3 * logits
    # Metrics see the mean of the outputs: one more of them.
    assert measured <= four + 2.1 * logits


def mlp(**options):
    inputs = keras.Input((24,))
    x = keras.layers.Dense(40, activation="gelu", name="one")(inputs)
    x = keras.layers.Dense(32, activation="gelu", name="two")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, **options)
    model.compile("sgd", "mse")
    return model


def equations(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(
                value, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)


def training_program(model, rows):
    state = tuple(
        [v.value for v in group]
        for group in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    data = np.zeros((rows, 24), "float32"), np.zeros((rows, 3), "float32")
    return jax.make_jaxpr(lambda *args: model.train_step(*args))(state, data)


def test_one_draw_serves_all_layers_and_no_mask_is_as_large_as_a_batch():
    rows, num_samples = 1000, 4
    model = mlp(num_samples=num_samples)
    model.optimizer.build(model.trainable_variables)
    program = training_program(model, rows)
    draws = [
        equation.outvars[0].aval.size
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("random_bits", "threefry2x32")
    ]
    width = model.mask_plan.width
    assert sum(draws) <= 2 * num_samples * width
    masks = [
        equation.outvars[0].aval.size
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("ge", "select_n", "lt")
        and equation.outvars[0].aval.dtype == bool
    ]
    assert masks and max(masks) <= num_samples * width


def test_an_ensemble_of_the_top_shares_what_lies_before():
    inputs = keras.Input((64,))
    x = inputs
    for n in range(4):
        x = keras.layers.Dense(64, activation="relu", name=f"layer_{n}")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, target_layers=["layer_3"])
    data = jax.ShapeDtypeStruct((512, 64), "float32")

    def flops(function):
        compiled = jax.jit(function).lower(data).compile()
        return compiled.cost_analysis()["flops"]

    request = ensemble.EnsembleRequest(num_samples=4)
    plain = model.plain_class().call
    one = flops(lambda x: model(x, training=False))
    four = flops(
        lambda x: ensemble.ensemble_outputs(model, plain, request, (x,), {})
    )
    # Three of four layers are shared: (3 + 4) / (4 * 4) is 0.44.
    assert four <= 0.55 * 4 * one
