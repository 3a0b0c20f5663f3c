"""A full disk and a folder that may not be written: the old files stay."""

import os
import pathlib
import subprocess
import sys
import tempfile

import faulty_folder
import keras
import numpy as np
import pytest
import saved_models

PROGRAM = pathlib.Path(faulty_folder.__file__)


def contents(folder):
    """Bytes of all files below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder():
    """A folder that any user may enter, with files of an earlier model."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = faulty_folder.model_of(1.0)
        for file, write in faulty_folder.WRITES.items():
            write(model, folder / file)
        folder.chmod(0o755)
        yield folder
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_what_was_written_stays_whole(folder, how):
    before = contents(folder)
    assert min(map(len, before.values())) > 0
    if how == "read-only":
        for path in folder.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        folder.chmod(0o555)
    process = subprocess.run(
        [sys.executable, PROGRAM, how, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    error = "OSError" if how == "full" else "PermissionError"
    assert process.stdout.splitlines() == [
        f"{name} {error}" for name in faulty_folder.WRITES
    ], process.stderr
    assert contents(folder) == before
    x, _ = saved_models.data()
    expected = saved_models.outputs(faulty_folder.model_of(1.0), x)
    loaded = keras.saving.load_model(folder / "model.keras")
    weights = faulty_folder.model_of(3.0)
    weights.load_weights(folder / "model.weights.h5")
    adapters = faulty_folder.model_of(3.0)
    adapters.load_adapters(folder / "adapters")
    for model in (loaded, weights, adapters):
        np.testing.assert_array_equal(saved_models.outputs(model, x), expected)


def test_a_new_file_is_there_whole_or_not_at_all(tmp_path):
    process = subprocess.run(
        [sys.executable, PROGRAM, "full", tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    assert not any(contents(tmp_path))
