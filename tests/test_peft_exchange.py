"""PEFT computes on our adapters what we do, and we on PEFT's what it does.

`peft_exchange_oracle.py` runs PEFT on the Hugging Face twins of tiny KerasHub
models; `peft_twins.py` says what both sides are.
"""

import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import peft_models
import peft_twins
import pytest
from helpers import assert_close
from safetensors.numpy import save_file

import keras_lora_dropout as kld
from keras_lora_dropout.architectures.huggingface.twin import (
    huggingface_weights,
)
from keras_lora_dropout.storage.tensor_files import read_tensors

# Each tiny model runs once or twice: not worth compiling.
logits = functools.partial(peft_models.logits, run_eagerly=True)
ORACLE = pathlib.Path(__file__).parent / "peft_exchange_oracle.py"
KINDS = ["lora", "adalora"]
by_twin = pytest.mark.parametrize(
    "twin", peft_twins.TWINS, ids=lambda twin: twin.name
)
by_kind = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = 1e-4


def run_oracle(task, folder):
    process = subprocess.run(
        [sys.executable, str(ORACLE), task, str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr


def results(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Base models and PEFT's adapters, with the logits in `made.npz`."""
    folder = tmp_path_factory.mktemp("exchange")
    for twin in peft_twins.TWINS:
        if twin.keras_backbone is None:
            continue
        (folder / twin.name).mkdir()
        values = huggingface_weights(peft_models.plain(twin, folder))
        save_file(
            {name: value.copy() for name, value in values.items()},
            folder / twin.name / "from_keras.safetensors",
        )
    run_oracle("make", folder)
    return folder


@pytest.fixture(scope="session")
def made(folder):
    return results(folder / "made.npz")


@pytest.fixture(scope="session")
def exported(folder):
    """What our exports compute: here, and where PEFT has read them."""
    ours = {}
    for twin in peft_twins.TWINS:
        for kind in KINDS:
            model = peft_models.adapted(twin, folder, kind)
            model.export_peft(
                folder / twin.name / f"our_{kind}",
                instances=peft_twins.INSTANCES,
                seed=peft_twins.SEED,
            )
            name = f"{twin.name}.{kind}"
            ours[name] = logits(model, twin)
            ours[f"{name}.ensemble"] = logits(
                model,
                twin,
                num_samples=peft_twins.INSTANCES,
                seed=peft_twins.SEED,
            )
    run_oracle("read", folder)
    return ours, results(folder / "read.npz")


@by_twin
def test_the_base_models_agree(folder, made, twin):
    model = peft_models.plain(twin, folder)
    assert_close(logits(model, twin), made[f"{twin.name}.base"], TOLERANCE)
    expected = read_tensors(folder / twin.name / "base" / "model.safetensors")
    weights = huggingface_weights(model)
    assert set(expected) <= set(weights)
    # Mistral's converter goes through float16; the values are exact in it.
    for name, value in expected.items():
        assert np.array_equal(weights[name], value), name


@by_kind
@by_twin
def test_imports_compute_what_peft_does(folder, made, twin, kind):
    model = kld.import_peft(
        peft_models.plain(twin, folder),
        folder / twin.name / kind,
        dropout_rate=0.3,
    )
    expected = made[f"{twin.name}.{kind}"]
    assert np.abs(expected - made[f"{twin.name}.base"]).max() > 1e-2
    assert_close(logits(model, twin), expected, TOLERANCE)


@by_kind
@by_twin
def test_peft_computes_what_exports_do(exported, made, twin, kind):
    ours, theirs = exported
    name = f"{twin.name}.{kind}"
    assert np.abs(theirs[name] - made[f"{twin.name}.base"]).max() > 1e-2
    assert_close(ours[name], theirs[name], TOLERANCE)


@by_kind
@by_twin
def test_peft_averages_exported_instances_to_our_ensemble(exported, twin, kind):
    ours, theirs = exported
    name = f"{twin.name}.{kind}"
    members = [theirs[f"{name}.{n}"] for n in range(peft_twins.INSTANCES)]
    assert np.abs(members[0] - members[1]).max() > 1e-2
    assert_close(ours[f"{name}.ensemble"], np.mean(members, axis=0), TOLERANCE)
    if twin.in_one_pass:
        assert_close(
            ours[f"{name}.ensemble"], theirs[f"{name}.in_one_pass"], TOLERANCE
        )
