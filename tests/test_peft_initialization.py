"""`init_lora_weights`: adapters start and train as those of PEFT.

`peft_initialization_oracle.py` says what PEFT does from the same weights.
"""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import peft_initialization_oracle as oracle
import peft_models
import peft_twins
import pytest
from helpers import array
from helpers import assert_close
from helpers import move_factors
from helpers import set_random
from helpers import tiny_mlp
from safetensors.numpy import save_file

import keras_lora_dropout as kld
from keras_lora_dropout.architectures.huggingface.twin import (
    huggingface_weights,
)

ORACLE = pathlib.Path(oracle.__file__)


@pytest.fixture(scope="module")
def given():
    plain = tiny_mlp()
    set_random(plain.weights, seed=2)
    generator = np.random.default_rng(1)
    arrays = {
        f"{layer.name}.{variable.name}": array(variable).astype("float32")
        for layer in plain.layers
        for variable in layer.weights
    }
    for name, width in (("x", 6), ("y", 3)):
        value = generator.normal(size=(12, width))
        arrays[name] = value.astype("float32")
    return arrays


@pytest.fixture(scope="module")
def found(tmp_path_factory, given):
    """What PEFT found, and what the exported models predict here."""
    folder = tmp_path_factory.mktemp("initialization")
    np.savez(folder / "given.npz", **given)
    ours = {}
    for twin in peft_twins.TWINS:
        if twin.name in oracle.TWINS:
            (folder / twin.name).mkdir()
            ours[twin.name] = exported(twin, folder)
    process = subprocess.run(
        [sys.executable, str(ORACLE), str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    with np.load(folder / "found.npz", allow_pickle=False) as results:
        return ours, dict(results)


def exported(twin, folder):
    """Export a trained adapter that started from the kernels."""
    model = peft_models.plain(twin, folder)
    weights = huggingface_weights(model)
    save_file(
        {name: value.copy() for name, value in weights.items()},
        folder / twin.name / "from_keras.safetensors",
    )
    model = kld.enable_lora_dropout(
        model,
        rank=3,
        alpha=2,
        dropout_rate=0.3,
        num_samples=2,
        init_lora_weights={"llama": "olora"}.get(twin.name, "pissa"),
        rank_pattern={"query": 2},
        seed=0,
    )
    move_factors(model)
    model.export_peft(
        folder / twin.name / "export", instances=oracle.INSTANCES, seed=1
    )
    ensemble = {"num_samples": oracle.INSTANCES, "seed": 1}
    return [
        peft_models.logits(model, twin, run_eagerly=True),
        peft_models.logits(model, twin, run_eagerly=True, **ensemble),
    ]


def mlp_of(given, case):
    options = oracle.CASES[case]
    model = tiny_mlp()
    for layer in model.layers:
        for variable in layer.weights:
            variable.assign(given[f"{layer.name}.{variable.name}"])
    return kld.enable_lora_dropout(
        model,
        rank=options["r"],
        alpha=options["lora_alpha"],
        use_rslora=options.get("use_rslora", False),
        init_lora_weights=options["init_lora_weights"],
        dropout_rate=0,
        num_samples=1,
        target_layers=list(oracle.LAYERS),
        trainable_layers=None,
    )


@pytest.mark.parametrize("case", oracle.CASES)
def test_starts_where_peft_does(given, found, case):
    model, theirs = mlp_of(given, case), found[1]
    for name, layer in model.adapted_layers:
        ours = list(map(array, layer.factors))
        pair = [theirs[f"{case}.{name}.{c}.start"] for c in "ab"]
        assert_close(ours[0] @ ours[1], pair[0] @ pair[1], 1e-5)
        # The sign of a singular vector is free; spans and lengths are not.
        for own, other in zip(ours, pair, strict=True):
            assert_close(np.abs(own), np.abs(other), 1e-5)


@pytest.mark.parametrize("case", oracle.CASES)
def test_trains_as_peft_does(given, found, case):
    """Without dropout, SGD on all factors takes the same steps."""
    model, theirs = mlp_of(given, case), found[1]
    model.compile(keras.optimizers.SGD(oracle.RATE), "mse")
    expected = theirs[f"{case}.outputs"]
    assert_close(model.predict(given["x"], verbose=0), expected[0], 1e-5)
    for step in range(1, oracle.STEPS + 1):
        model.train_on_batch(given["x"], given["y"])
        assert_close(model.predict(given["x"], verbose=0), expected[step], 1e-5)
    assert np.abs(expected[0] - expected[-1]).max() > 1e-2
    for name, layer in model.adapted_layers:
        a, b = (theirs[f"{case}.{name}.{c}.end"] for c in "ab")
        assert_close(array(layer.factors[0]) @ array(layer.factors[1]), a @ b)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_random_factors_are_spread_as_those_of_peft(found, init):
    plain = keras.Sequential(
        [
            keras.Input((oracle.SPREAD[0],)),
            keras.layers.Dense(oracle.SPREAD[1], name="wide"),
        ]
    )
    model = kld.enable_lora_dropout(
        plain,
        rank=oracle.SPREAD_RANK,
        init_lora_weights=init,
        target_layers=["wide"],
        seed=1,
    )
    ((_, layer),) = model.adapted_layers
    ours = [array(factor).std() for factor in layer.factors]
    # Of 5,000 normal values, the deviation is known to 1%: 4 of these.
    np.testing.assert_allclose(ours, found[1][f"spread.{init}"], rtol=0.04)
    a, b = map(array, layer.factors)
    assert abs(a.mean()) < 4 * a.std() / np.sqrt(a.size)
    if init == "gaussian":
        np.testing.assert_allclose(ours, [0.1, 0], rtol=0.04)
    else:
        assert np.abs(b).max() > 0.1
        assert np.abs(a @ b).max() < 1e-7


@pytest.mark.parametrize("name", oracle.TWINS)
def test_peft_computes_what_exports_do(found, name):
    ours, theirs = found
    mean, ensemble = ours[name]
    assert np.abs(mean - theirs[f"{name}.base"]).max() > 1e-2
    assert_close(mean, theirs[f"{name}.export"], 1e-4)
    members = [
        theirs[f"{name}.export/instance_{n}"] for n in range(oracle.INSTANCES)
    ]
    assert np.abs(members[0] - members[1]).max() > 1e-2
    assert_close(ensemble, np.mean(members, axis=0), 1e-4)
