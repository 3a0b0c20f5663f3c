"""Two processes, or four, train what one process trains."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import assert_close

if BACKEND != "torch":
    pytest.skip("Keras spreads training itself", allow_module_level=True)

import run_in_processes
import training_in_processes as runs

PROGRAM = pathlib.Path(run_in_processes.__file__)
TORCHRUN = sys.executable, "-m", "torch.distributed.run"
GUIDE = PROGRAM.parents[1] / "docs" / "torch_processes.md"
SECONDS = 300
slow = pytest.mark.skipif(
    not os.environ.get("ALL_MODELS"), reason="takes its time; see `test-all`"
)


def torchrun(folder, count, names=(), program=PROGRAM):
    """Start processes; return how they ended and what they said."""
    arguments = "--standalone", "--nproc-per-node", str(count)
    process = subprocess.run(
        [*TORCHRUN, *arguments, str(program), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RUNS": " ".join(names)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return process.returncode, process.stdout + process.stderr


def arrays_of(folder, name, process=0):
    with np.load(folder / f"{name}-{process}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process, this one, does of that."""
    folder = tmp_path_factory.mktemp("single")
    run_in_processes.run(folder, [*runs.SAME, "whole", "first_half"])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, single):
    """What two processes do, until one of them gives up."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(single / "backup", folder / "given")
    status, output = torchrun(folder, 2)
    # The other one was not left waiting.
    assert status != 0 and "process 1 gives up" in output, output
    return folder


def assert_alike(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            arrays[name], value, rtol=1e-5, atol=1e-5, err_msg=name
        )
    np.testing.assert_array_equal(arrays["ranks"], expected["ranks"])


def assert_identical(arrays, others):
    assert arrays.keys() == others.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, others[name], name)


@pytest.mark.parametrize("name", runs.SAME)
def test_two_processes_train_as_one_does(single, two, name):
    arrays = arrays_of(two, name)
    assert_alike(arrays, arrays_of(single, name))
    assert_identical(arrays, arrays_of(two, name, process=1))


def test_the_runs_are_what_they_are_for(single):
    """Weights move, ranks go, scales change, training stops early."""
    first, later = (
        arrays_of(single, name)["logs/loss"]
        for name in ("lora-1-batch-parallel", "lora-1-example-parallel")
    )
    assert len(first) == runs.EPOCHS
    assert np.abs(first - later).max() > 1e-3
    for name in runs.settings():
        arrays = arrays_of(single, name)
        assert arrays["logs/loss"][-1] < 0.95 * arrays["logs/loss"][0]
        if "adalora" in name:
            assert sum(arrays["ranks"]) == 2
            assert np.unique(arrays["logs/budget"]).size > 1
    stopped = arrays_of(single, "stopped_early")
    assert 2 < len(stopped["logs/loss"]) < 40
    assert np.unique(stopped["logs/learning_rate"]).size > 1


def test_a_gradient_that_one_process_lacks_counts_as_zero(two):
    # Process 0 has one row and process 1 has two.
    for process in range(2):
        arrays = arrays_of(two, "missing_gradients", process)
        assert_close(arrays["0"], np.full(2, (1 * 1 + 2 * 2) / 3))
        assert_close(arrays["1"], np.full(3, (1 * 0 + 2 * 1) / 3))
        assert_close(arrays["loss"], (1 * 0 + 2 * 1) / 3)


@pytest.mark.parametrize("name", ["ordinary_dropout", "transformer_dropout"])
def test_dropout_drops_other_places_in_each_process(two, name):
    first, second = (arrays_of(two, name, process) for process in range(2))
    # The generators are in step again once `fit` is over.
    states = first.pop("states", 0), second.pop("states", 0)
    np.testing.assert_array_equal(*states)
    for key, value in first.items():
        assert value.std() > 0
        assert np.abs(value - second[key]).max() > 0.01, key


REASONS = {
    "other_seed": "the masks (`seed`)",
    "other_weights": 'weight "head/kernel"',
    "other_settings": "the settings of the adapters",
    "other_learning_rate": "the settings of the optimizer",
    "other_sizes": "the settings of the adapters",
    "other_number_of_batches": "the number of batches",
    "other_number_of_adaptive_layers": "the number of weights",
    "ends_of_data": "process 1 is at a training step",
    "stops_alone": "process 0 is at the end of `fit`; process 1 is at a train",
    "evaluates_alone": "process 0 is at the end of an epoch or of an evaluat",
    "summed_loss": '"sum_over_batch_size"',
    "batch_normalization": 'Layer "norm" normalizes by the rows',
}


@pytest.mark.parametrize(
    "run", run_in_processes.REFUSED, ids=lambda run: run.__name__
)
def test_what_cannot_be_right_is_refused_everywhere(two, run):
    name = run.__name__
    messages = [str(arrays_of(two, name, p)["message"]) for p in range(2)]
    assert REASONS[name] in messages[0]
    assert messages[0] == messages[1]


def test_processes_can_train_models_of_their_own(two):
    first, second = (arrays_of(two, "trains_alone", p) for p in range(2))
    assert len(first["logs/loss"]) == 1 and len(second["logs/loss"]) == 2
    for process, arrays in enumerate((first, second)):
        keras.utils.set_random_seed(1)
        model = runs.model_of(seed=process)
        x, y = runs.classification_data(runs.EXAMPLES)
        history = model.fit(
            x, y, batch_size=4, epochs=1 + process, shuffle=False, verbose=0
        )
        assert_alike(arrays, runs.state(model, history.history))


def test_evaluation_outside_of_fit_is_each_process_s_own(two):
    model = runs.model_of()
    runs.fit(model, epochs=1)
    x, y = runs.classification_data(runs.EXAMPLES)
    for process in range(2):
        rows = 5 + process
        loss, *_ = model.evaluate(x[:rows], y[:rows], verbose=0)
        assert_close(
            arrays_of(two, "evaluates_own_rows", process)["loss"], loss
        )


def test_a_file_that_all_processes_write_is_whole(two):
    arrays = arrays_of(two, "checkpoints_of_all")
    loaded = runs.state(keras.saving.load_model(two / "model.keras"))
    assert_identical(
        {name: np.asarray(value) for name, value in loaded.items()}, arrays
    )


def test_a_run_goes_on_in_another_number_of_processes(single, two, tmp_path):
    expected = arrays_of(single, "whole")
    # From one process to two.
    arrays = arrays_of(two, "second_half")
    assert_identical(arrays, arrays_of(two, "second_half", process=1))
    check_second_half(arrays, expected)
    # From two processes to one.
    shutil.copytree(two / "backup", tmp_path / "given")
    run_in_processes.run(tmp_path, ["second_half"])
    check_second_half(arrays_of(tmp_path, "second_half"), expected)


def check_second_half(arrays, expected):
    expected = {
        name: value[runs.HALF :] if name.startswith("logs/") else value
        for name, value in expected.items()
    }
    assert_alike(arrays, expected)


HANGING = """
import sys
import time
from datetime import timedelta

sys.path.insert(0, {tests!r})
import training_in_processes as runs
from torch import distributed

distributed.init_process_group("gloo", timeout=timedelta(seconds=10))
first, _ = runs.process()
step = runs.keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: first == 0 or time.sleep(1000)
)
print("begins", flush=True)
runs.fit(runs.model_of(), callbacks=[step])
print("all is done", flush=True)
"""


@slow
def test_a_process_that_hangs_ends_the_run(tmp_path):
    """The other does not wait for longer than the group's timeout."""
    program = tmp_path / "program.py"
    program.write_text(HANGING.format(tests=str(PROGRAM.parent)))
    status, output = torchrun(tmp_path, 2, program=program)
    assert status != 0
    assert output.count("begins") == 2 and "all is done" not in output, output


@slow
def test_the_script_of_the_guide_runs_in_two_processes(tmp_path):
    script = re.search(r"```python torch\n(.*?)```", GUIDE.read_text(), re.S)[1]
    file = tmp_path / "model.keras"
    script = script.replace('"model.keras"', repr(str(file)))
    (tmp_path / "train.py").write_text(script)
    status, output = torchrun(tmp_path, 2, program=tmp_path / "train.py")
    assert status == 0, output
    model = keras.saving.load_model(file)
    assert sum(model.rank_pattern().values()) == 2
    assert int(model.optimizer.iterations) == 6


@slow
def test_four_processes_train_as_one_does(single, tmp_path):
    names = list(runs.SAME)
    shutil.copytree(single / "backup", tmp_path / "given")
    status, output = torchrun(tmp_path, 4, [*names, "second_half"])
    assert status == 0, output
    for name in names:
        arrays = arrays_of(tmp_path, name)
        assert_alike(arrays, arrays_of(single, name))
        for process in range(1, 4):
            assert_identical(arrays, arrays_of(tmp_path, name, process))
    expected = arrays_of(single, "whole")
    check_second_half(arrays_of(tmp_path, "second_half"), expected)
