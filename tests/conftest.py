"""Seeds and tolerance, for whichever backend `KERAS_BACKEND` names."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tiny models compile for longer than they run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true",
)

import keras
import pytest


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.set_random_seed(1234)
