"""Long runs: memory, tensors and compiled functions stay as they are."""

import json
import os
import pathlib
import subprocess
import sys

import long_runs
import pytest
from helpers import BACKEND

PROGRAM = pathlib.Path(long_runs.__file__)
ALL = os.environ.get("ALL_MODELS")
STEPS = 3000 if ALL else 500
KINDS = ["array", "dataset", "generator"] if ALL else ["dataset"]
WARM_UP = 300  # Steps until allocators and caches are filled.
pytestmark = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="counts what JAX and PyTorch hold"
)


def measured(*arguments):
    process = subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_training_needs_no_more_with_time(tmp_path, record_testsuite_property):
    records = measured("training", STEPS, tmp_path)
    assert records[-1]["step"] == STEPS
    warm, last = records[WARM_UP // long_runs.EPOCH - 1], records[-1]
    record_testsuite_property("training", json.dumps([warm, last]))
    assert last["tensors"] == warm["tensors"]
    assert last["compiled"] == warm["compiled"]
    assert (warm["compiled"] > 0) == (BACKEND == "jax")
    # Measured: 0.08 MiB at most over 300 steps.
    assert last["mib"] - warm["mib"] < 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_streams(kind, record_testsuite_property):
    few, many = measured("ensemble", kind, 20_000, 100_000)
    record_testsuite_property(f"ensemble of {kind}", json.dumps([few, many]))
    # Keras holds all batches of the result until it joins them.
    allowed = 2 * (many["result_mib"] - few["result_mib"]) + 4
    assert many["above_mib"] - few["above_mib"] < allowed
