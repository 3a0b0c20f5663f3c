"""What XLA counts of compiled programs: guards of speed without a clock."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND

import keras_lora_dropout as kld

if BACKEND != "jax":
    pytest.skip("XLA's counts are read on JAX", allow_module_level=True)

import jax

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def counts():
    """What the script `compiled_costs.py` prints."""
    script = pathlib.Path(__file__).with_name("compiled_costs.py")
    settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**settings, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_instance_of_deberta(counts):
    ours, theirs = counts["deberta"]["n1"], counts["deberta"]["kerashub"]
    assert ours["gflop"] <= 0.47 * theirs["gflop"]
    assert ours["gigabytes"] <= 0.58 * theirs["gigabytes"]
    memory = "temporary_megabytes"
    assert ours[memory] <= 0.55 * theirs[memory]


def test_four_instances_of_deberta(counts):
    gflop = {key: cost["gflop"] for key, cost in counts["deberta"].items()}
    assert gflop["n4"] <= 1.87 * gflop["kerashub"]
    assert gflop["n4"] <= 4 * gflop["n1"]


def test_masks_cost_next_to_nothing(counts):
    gflop = {key: cost["gflop"] for key, cost in counts["deberta"].items()}
    assert gflop["n1"] <= 1.001 * gflop["plain"]
    assert gflop["n1-example"] <= 1.01 * gflop["plain"]


def test_transformer_dropout(counts):
    gflop = {key: cost["gflop"] for key, cost in counts["deberta"].items()}
    assert gflop["hidden-key-minus"] <= 1.02 * gflop["plain"]
    # One further forward pass, where the backward pass skips frozen kernels.
    assert gflop["hidden-key"] <= 1.55 * gflop["plain"]


def test_four_instances_of_the_top_third(counts):
    four, one = (
        counts["top_third"][key]["gflop"] for key in ("n4-top", "n1-top")
    )
    # 2 + 4 * (1 + 1) passes through a block against 4 * (3 + 1): 0.625.
    assert four <= 0.65 * 4 * one


def test_llama(counts):
    ours, theirs = (counts["llama"][key]["gflop"] for key in ("n1", "kerashub"))
    assert ours <= 0.88 * theirs


def test_sequential_instances_take_the_memory_of_one(counts):
    counts = dict(counts["causal_lm"])
    logits = counts.pop("logits_megabytes")
    memory = {k: cost["temporary_megabytes"] for k, cost in counts.items()}
    assert memory["four"] <= 1.1 * memory["one"]
    assert memory["four_parallel"] >= memory["one"] + 3 * logits
    # Metrics see the mean of the outputs, which is one more of them.
    assert memory["four_with_metrics"] <= memory["four"] + 2.1 * logits


def test_an_ensemble_of_the_top_shares_what_lies_before(counts):
    # Three of four layers are shared: (3 + 4) / (4 * 4) is 0.44.
    four, one = counts["ensembles"]["four"], counts["ensembles"]["one"]
    assert four <= 0.55 * 4 * one


def test_an_ensemble_in_turn_takes_the_memory_of_one(counts):
    bytes_of = counts["ensembles_in_turn"]
    assert bytes_of["8"] <= 1.02 * bytes_of["4"]
    assert bytes_of["8"] <= 1.5 * bytes_of["1"]


def test_memory_of_llama(tmp_path):
    """Parts are counted, and lead from one, two and three blocks to all."""
    script = FOLDER / "llama_memory.py"
    small = "--scale smoke --weights bfloat16 --length 8 --rank 2 --output"
    done = subprocess.run(
        [sys.executable, str(script), *small.split(), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "llama_memory.json").read_text())
    one = results["measured"]["bfloat16, N = 1"]
    # Of 16 features: four projections, three of 32, two norms, in 16 bits.
    block = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    # States of random generators come with each block.
    assert 0 <= one["3"]["frozen"] - one["2"]["frozen"] - block <= 64
    for blocks in "123":
        # Factors of 16 x 2 and 2 x 16, in 32 bits; Adam keeps two of each.
        adapters = int(blocks) * 4 * 2 * (16 * 2) * 4
        assert one[blocks]["adapters"] == one[blocks]["gradients"] == adapters
        assert 0 <= one[blocks]["optimizer"] - 2 * adapters <= 16
    # The model of this scale has two blocks, which were measured.
    whole = {
        part: value
        for part, (value, _) in results["extrapolated"][
            "bfloat16, N = 1"
        ].items()
    }
    assert whole["frozen"] == pytest.approx(one["2"]["frozen"])
    assert whole["temporaries"] == pytest.approx(one["2"]["temporaries"], 0.05)
    parallel, sequential = (
        results["measured"][f"bfloat16, N = 4, {sampling}"]["3"]
        for sampling in ("parallel", "sequential")
    )
    assert sequential["temporaries"] < 0.75 * parallel["temporaries"]
    assert parallel["gflop"] == pytest.approx(sequential["gflop"], rel=0.25)
    page = (tmp_path / "llama_memory.md").read_text()
    assert page.count("\n| bfloat16, N = 4, sequential |") == 5
    assert "compiled for cpu" in page


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
