"""A run that is killed again and again ends as one that was not."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import h5py
import keras
import killed_training
import numpy as np
import pytest

PROGRAM = pathlib.Path(killed_training.__file__)
KILLS = 100 if os.environ.get("ALL_MODELS") else 20
EPOCHS = KILLS + KILLS // 2  # More than are done between so many kills.


@pytest.fixture
def processes(tmp_path):
    with (
        open(tmp_path / "errors.txt", "wb") as errors,
        subprocess.Popen(
            [sys.executable, PROGRAM, str(EPOCHS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                # No one else reads what a killed process wrote half of.
                "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            },
            text=True,
        ) as process,
    ):
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def start(processes, folder, results):
    processes.stdin.write(f"{folder} {results}\n")
    processes.stdin.flush()
    return int(processes.stdout.readline())


def kill_after(child, progress, steps):
    """Send SIGKILL once so many more steps are done, and not before."""
    before = progress.stat().st_size if progress.exists() else 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if progress.exists() and progress.stat().st_size >= before + steps:
            break
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)


def contents(path):
    """All data sets of a weights file, the optimizer's included."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]})
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


def test_a_run_killed_at_random_steps_loses_nothing(
    processes, tmp_path, record_testsuite_property
):
    folders = tmp_path / "killed", tmp_path / "whole"
    results = tmp_path / "killed.weights.h5", tmp_path / "whole.weights.h5"
    for folder in folders:
        folder.mkdir()
    start(processes, folders[1], results[1])
    errors = tmp_path / "errors.txt"
    assert processes.stdout.readline() == "0\n", errors.read_text()
    choose = random.Random(7)
    for _ in range(KILLS):
        child = start(processes, folders[0], results[0])
        steps = choose.randint(1, 2 * killed_training.STEPS)
        kill_after(child, folders[0] / "progress", steps)
        assert processes.stdout.readline() == f"{-signal.SIGKILL}\n"
        # The checkpoint is whole at any time.
        if (folders[0] / "model.keras").exists():
            keras.saving.load_model(folders[0] / "model.keras")
    start(processes, folders[0], results[0])
    assert processes.stdout.readline() == "0\n", errors.read_text()
    done = (folders[0] / "progress").stat().st_size
    assert done > EPOCHS * killed_training.STEPS
    killed, whole = contents(results[0]), contents(results[1])
    assert list(killed) == list(whole)
    assert any("momentum" in name or "optimizer" in name for name in whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(killed[name], value, name)
    record_testsuite_property("kills", KILLS)
