"""Seeds and tolerance, for whichever backend `KERAS_BACKEND` names."""

import collections
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tiny models compile for longer than they run. The older way to write loops of
# fused operations, into one LLVM module, takes a third of the newer one's time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
)
# Many compile the same: JAX keeps it in files, new ones for each run of the
# tests, which the processes that it starts read too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import keras
import numpy as np
import pytest

ORACLE = pathlib.Path(__file__).parent / "peft_oracle.py"


def pytest_collection_finish():
    # What is imported stays: collecting garbage need not go through it.
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(1234)


@pytest.fixture(scope="session")
def fuzzed_cases(record_testsuite_property):
    """Counts how the calls that Hypothesis makes came out."""
    outcomes = collections.Counter()
    yield outcomes
    record_testsuite_property("fuzzed cases", outcomes.total())


@pytest.fixture(scope="session")
def peft(tmp_path_factory):
    """What PEFT computed, by the name of the array."""
    path = tmp_path_factory.mktemp("peft") / "results.npz"
    process = subprocess.run(
        [sys.executable, str(ORACLE), str(path)],
        # Nothing is downloaded; a plain torch network needs nothing.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    with np.load(path, allow_pickle=False) as results:
        return dict(results)


@pytest.fixture(scope="module")
def quick_collection():
    """Keras collects all garbage once for each weight that a layer loses.

    In a process that has compiled the models of many tests, each time takes a
    second; what is there by now stays, and need not be gone through.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def closed_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
