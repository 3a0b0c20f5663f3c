"""The tests of LoRA that Keras ships still pass with this package imported.

KerasHub ships none.
"""

import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest
from helpers import BACKEND

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = pathlib.Path(keras.__file__).parent / "src" / "layers"


@pytest.mark.skipif(
    BACKEND != "torch" and not os.environ.get("ALL_MODELS"),
    reason="once is enough: `make test-all` has all",
)
def test_lora_of_keras_is_left_as_it_was(tmp_path):
    # Not our own settings, wherever Keras is installed.
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n", "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "lora"]
    command += ["-c", str(settings)]
    command += ["-p", "keras_lora_dropout"]  # Imported before anything else.
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command += [str(LAYERS / "core"), str(LAYERS / "convolutional")]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 25
