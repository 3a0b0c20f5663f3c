"""The runs behind the paper's tables: what they train on, cut short or not."""

import json
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from helpers import BACKEND
from paper_data import question
from paper_data import row
from paper_data import write_data
from paper_data import write_preset

# `paper_data` knows where the commands are.
import reproduce  # isort: skip
import training
from cells import Cell
from problems import Examples
from problems import problem_of

pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("preset"))


def smallest_cell(preset, **settings):
    return Cell(
        **{
            "task": "mrpc",
            "method": "lora-dropout",
            "preset": str(preset),
            "backend": BACKEND,
            "seed": 0,
            "learning_rate": 1e-2,
            **{**reproduce.configuration("low-resource", "mrpc")[0]},
            **reproduce.SMOKE,
            **settings,
        }
    )


def rows_for(cell):
    rows = [row("mrpc", number, "train") for number in range(24)]
    return reproduce.draw(cell, rows, {"validation": rows[:6]})


@pytest.mark.parametrize(
    "task, threshold, exact",
    [("squad2", -1e9, 1 / 3), ("squad2", 1e9, 0.0), ("squad1", -1e9, 0.0)],
)
def test_no_answer_is_for_version_2_alone(preset, task, threshold, exact):
    """Scores of the span "fox jumped" are the highest; it never is right."""
    cell = smallest_cell(preset, task=task, null_threshold=threshold)
    problem = problem_of(cell)
    problem.build()
    answers = {"text": ["a fox"], "answer_start": [0]}
    none = {"text": [], "answer_start": []}
    rows = []
    for number in range(12):
        about = question(task, number, "validation")
        answered = not about.get("is_impossible", False)
        given = {
            "context": "a fox jumped",
            "answers": answers if answered else none,
        }
        rows.append({**about, **given})
    examples = problem.encode(rows)
    outputs = np.zeros((len(examples), 2, cell.sequence_length))
    first = int(np.argmax(examples.windows.spans[0, :, 0] == 2))
    outputs[:, 0, first] = outputs[:, 1, first + 1] = 1.0
    scores = problem.score(outputs, examples)
    assert scores["exact_match"] == pytest.approx(exact)


@pytest.mark.parametrize("warmup, rise", [(0.1, 2), (5, 5), (0, 1), (50, 20)])
def test_learning_rate_rises_and_falls_linearly(warmup, rise):
    schedule = training.LinearDecay(0.5, steps=20, warmup=warmup)
    found = [float(schedule(step)) for step in range(20)]
    rising = np.linspace(0, 0.5, rise + 1)[1:]
    falling = np.linspace(0.5, 0, 20 - rise + 1)[:-1]
    expected = np.concatenate([rising, falling])[:20]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    again = training.LinearDecay.from_config(schedule.get_config())
    assert float(again(3)) == found[3]


def test_examples_to_train_and_to_choose_on(preset):
    rows = [row("mrpc", number, "train") for number in range(24)]

    def drawn(seed):
        cell = smallest_cell(preset, seed=seed)
        parts = reproduce.draw(cell, rows, {"validation": rows[:3]})
        assert parts["validation"] == rows[:3]
        return [[r["idx"] for r in parts[p]] for p in ("train", "selection")]

    train, selection = drawn(0)
    assert (len(train), len(selection)) == (8, 4)
    assert len({*train, *selection}) == 12
    assert drawn(0) == [train, selection] != drawn(1)
    whole = smallest_cell(preset, train_examples=None)
    parts = reproduce.draw(whole, rows, {})
    assert (len(parts["train"]), len(parts["selection"])) == (20, 4)


def test_each_epoch_has_an_order_of_its_own(preset):
    class Recorder:
        def fit(self, x, y, **settings):
            np.testing.assert_array_equal(x["a"], 2 * y)
            seen.append(list(y))
            assert not settings["shuffle"]
            keras_history = keras.callbacks.History()
            keras_history.history = {"loss": [1.0]}
            return keras_history

    seen, y = [], np.arange(50)
    examples = Examples({"a": 2 * y}, y, [])
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        cell = smallest_cell(preset, seed=seed)
        training.train_epoch(Recorder(), cell, epoch, examples)
    assert all(sorted(order) == list(y) for order in seen)
    assert seen[0] == seen[3]
    assert len({tuple(order) for order in seen}) == 3


def test_an_interrupted_run_goes_on(preset, tmp_path, monkeypatch):
    """What a run gives does not depend on where it was cut."""
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    cell = smallest_cell(preset, epochs=3, head_dropout=0.0)
    rows = rows_for(cell)
    (tmp_path / "whole").mkdir()
    told = []
    whole = training.run(cell, rows, tmp_path / "whole", told.append)
    assert sum(told) == pytest.approx(training.work(cell, rows))

    class Cut(Exception):
        pass

    folder = tmp_path / "cut"
    folder.mkdir()

    def run_until(moment):
        done = []

        def cut(work):
            done.append(work)
            if len(done) == moment:
                raise Cut

        with pytest.raises(Cut):
            training.run(cell, rows, folder, cut)

    run_until(4)  # In the second epoch, of two batches each.
    assert len(json.loads((folder / "epochs.json").read_text())) == 1
    run_until(len(told) - 2)  # In the last scores, those of the ensemble.
    left = []
    resumed = training.run(cell, rows, folder, left.append)
    ensemble = cell.num_samples * len(rows["validation"])
    assert sum(left) == pytest.approx(ensemble)
    for entry, other in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for network, values in whole["scores"]["validation"].items():
        others = resumed["scores"]["validation"][network]
        for smooth in ("nll", "brier"):
            assert values[smooth] == pytest.approx(others[smooth], rel=1e-4)


def test_masks_in_prediction_alone_leave_the_rest_as_it_was(preset, tmp_path):
    """Without a mask entry that is zero, they change nothing."""
    cell = smallest_cell(preset, method="lora", dropout_rate=0.0)
    scores = training.run(cell, rows_for(cell), tmp_path, lambda work: None)
    scores = scores["scores"]["validation"]
    for smooth in ("nll", "brier"):  # The rest has steps, as bins have.
        expected = pytest.approx(scores["mean"][smooth], rel=1e-4)
        assert scores["test_dropout"][smooth] == expected


def test_a_killed_command_loses_no_result(data_dir, preset, tmp_path):
    """A real process, killed for real, and a second one beside the first."""
    words = [
        sys.executable,
        reproduce.__file__,
        *"table-1 --smoke --tasks mrpc --methods bitfit lora".split(),
        *["--data-dir", str(data_dir), "--preset", str(preset)],
        *["--output", str(tmp_path), "--seeds", "0"],
    ]
    child = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 300
    while not list(runs.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    first = {path: path.read_text() for path in runs.glob("*.json")}
    assert first
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = "".join(
        process.communicate(timeout=300)[0].decode() for process in both
    )
    assert [process.returncode for process in both] == [0, 0]
    assert len(list(runs.glob("*.json"))) == 2
    for path, text in first.items():
        assert path.read_text() == text
    # What was left, one of the two has made, and not the other.
    assert printed.count(": accuracy") == 2 - len(first)
    assert not [p for p in (runs / "unfinished").iterdir() if p.is_dir()]
