"""Memory runs out: the error says what takes less of it."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import out_of_memory
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import classification_data

from keras_lora_dropout.core.out_of_memory import memory_advice

PROGRAM = pathlib.Path(out_of_memory.__file__)
TYPES = {
    "jax": "JaxRuntimeError",
    "torch": "RuntimeError",
    "tensorflow": "ResourceExhaustedError",
}


@pytest.fixture(scope="module")
def errors():
    """What the program wrote, by the method that ran out of memory."""
    process = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("<done>\n"), process.stdout
    parts = re.split(r"^<(\w+) (\w+)>$", process.stdout, flags=re.M)[1:]
    return {
        name: (kind, text)
        for name, kind, text in zip(
            parts[::3], parts[1::3], parts[2::3], strict=True
        )
    }


@pytest.mark.parametrize("method", ["fit", "ensemble_predict"])
def test_the_error_names_sequential_sampling(errors, method):
    kind, text = errors[method]
    assert kind == TYPES[BACKEND]
    assert f"`{method}` ran out of memory with num_samples=16" in text
    assert 'Pass `sampling="sequential"`' in text
    assert "smaller `batch_size`" in text
    lost = "took the weights of model" in text
    assert lost == (BACKEND == "jax")


def test_with_one_instance_it_names_the_batch():
    with pytest.raises(MemoryError, match="smaller `batch_size`") as info:
        with memory_advice("fit", "parallel", 1):
            np.ones(2**50)
    assert "sequential" not in str(info.value)


def test_other_errors_stay_as_they_are():
    model = adapted_mlp(num_samples=2)
    x, y = classification_data(4)
    error = ValueError("no memory of it")

    def compute_loss(*args, **kwargs):
        raise error

    model.compute_loss = compute_loss
    with pytest.raises(ValueError) as info:
        model.train_on_batch(x, y)
    assert "num_samples" not in str(info.value)
