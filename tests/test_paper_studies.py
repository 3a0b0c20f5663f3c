"""The paper's tables and figures, each by its command in its smallest form."""

import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import families
import keras
import numpy as np
import pytest
from helpers import BACKEND

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

import reproduce
import training
from cells import Cell
from methods import METHODS
from problems import Examples
from problems import problem_of
from studies import STUDIES
from tasks import SQUAD
from tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")

SENTENCES = families.TEXTS


def row(task, number, split):
    """A row as TFDS has it, with text that the tiny vocabulary knows."""
    texts = {
        field: SENTENCES[(number + place) % len(SENTENCES)]
        for place, field in enumerate(TASKS[task].texts)
    }
    classes = TASKS[task].classes
    label = number % 6 * 0.9 if classes == 1 else number % classes
    return {**texts, "label": label, "idx": number, "split": split}


def question(task, number, split):
    """A row of SQuAD; in version 2.0, each third one has no answer."""
    context = SENTENCES[number % len(SENTENCES)]
    word = context.split()[number % 2]
    answers = {"text": [word], "answer_start": [context.index(word)]}
    about = {"id": f"{split}-{number}", "title": "animals"}
    if task == "squad2":
        about["is_impossible"] = number % 3 == 0
        if about["is_impossible"]:
            answers = {"text": [], "answer_start": []}
    return {
        **about,
        "context": context,
        "question": "the fox",
        "answers": answers,
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All tasks, as JSON Lines."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        make = row if TASKS[task].classes else question
        path = folder / TASKS[task].dataset
        path.mkdir(parents=True)
        for split, count in {
            "train": 24,
            **dict.fromkeys(TASKS[task].splits, 12),
        }.items():
            lines = [json.dumps(make(task, n, split)) for n in range(count)]
            (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A tiny BERT classifier of two blocks, as a preset."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("preset") / "bert"
    families.bert().save_to_preset(str(folder))
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One folder for all, so that no run is made twice."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def command(data_dir, preset, output, monkeypatch, capsys):
    """Run the command in this process; return what it prints."""

    def run(*words, folder=output):
        arguments = [
            "reproduce.py",
            *map(str, words),
            "--smoke",
            "--data-dir",
            str(data_dir),
            "--preset",
            str(preset),
            "--output",
            str(folder),
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        reproduce.main(reproduce.parse_arguments())
        return capsys.readouterr().out

    yield run
    keras.config.set_dtype_policy("float32")


def results(folder):
    paths = (folder / "runs").glob("*.json")
    return [json.loads(path.read_text()) for path in paths]


def test_table_1_has_all_methods(command, output):
    printed = command("table-1", "--tasks", "mrpc", "--seeds", 3)
    page = (output / "table-1.md").read_text()
    for method in STUDIES["table-1"].variants:
        assert f"| {method.label}" in page
    assert (output / "table-1.png").read_bytes().startswith(b"\x89PNG")
    assert '"epochs": 1' in printed and "python examples/paper" in page
    methods = {result["cell"]["method"]: result for result in results(output)}
    assert set(methods) == {v.method for v in STUDIES["table-1"].variants}
    dim, hidden, blocks = 16, 32, 2
    lora = 2 * (4 * (dim + dim) + 2 * (dim + hidden)) * blocks
    weights = {name: r["weights"]["backbone"] for name, r in methods.items()}
    assert weights["lora"] == weights["lora-dropout"] == lora
    assert weights["houlsby"] == blocks * (2 * 2 * dim * 32 + 4 * dim)
    assert weights["pfeiffer"] == blocks * 2 * dim * 64
    full = methods["full"]["weights"]
    assert full["trainable"] == full["total"]
    for name, result in methods.items():
        networks = set(result["scores"]["validation"])
        expected = {"mean"}
        if METHODS[name].drops:
            expected.add("ensemble")
        if name == "lora":
            expected.add("test_dropout")
        assert networks == expected
        for network in expected - {"mean"}:  # Its masks make a difference.
            losses = [
                result["scores"]["validation"][which]["nll"]
                for which in ("mean", network)
            ]
            assert losses[0] != losses[1]
        assert result["cell"]["backend"] == BACKEND
        assert result["versions"]["keras"] == keras.__version__
        assert result["command"].startswith("python examples/paper/")
        assert str(output) not in json.dumps(result["command"])


def test_finished_runs_are_not_repeated(command, output):
    command("table-1", "--tasks", "mrpc", "--seeds", 3)
    paths = list((output / "runs").glob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    printed = command("table-1", "--tasks", "mrpc", "--seeds", 3)
    assert "learning rate" not in printed
    assert before == {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("task", ["mnli", "stsb", "cola"])
def test_kinds_of_tasks(command, output, task):
    command(
        "table-1",
        "--tasks",
        task,
        "--seeds",
        3,
        "--methods",
        "adalora-dropout",
    )
    (result,) = [r for r in results(output) if r["cell"]["task"] == task]
    scores = result["scores"]
    assert set(TASKS[task].splits) <= set(scores)
    for split in TASKS[task].splits:
        for network in ("mean", "ensemble"):
            assert math.isfinite(scores[split][network][TASKS[task].metric])


@pytest.mark.parametrize("task", SQUAD)
def test_table_2(command, output, task):
    words = ["table-2", "--tasks", task, "--seeds", 3]
    command(
        *words, "--variants", r"0\.(16|65)", "--methods", "pfeiffer", "lora"
    )
    command(*words, "--methods", "lora-dropout")
    found = [r for r in results(output) if r["cell"]["task"] == task]
    assert len(found) == 2 * 2 + 3
    for result in results(output):
        if result["cell"]["task"] == task:
            for values in result["scores"]["validation"].values():
                assert 0 <= values["exact_match"] <= values["f1"] <= 1
    page = (output / "table-2.md").read_text()
    assert "| LoRA+Dropout, 0.65 %, ensemble |" in page


@pytest.mark.parametrize("study", ["table-4", "figure-1", "figure-3"])
def test_studies_of_lora_and_adalora(command, output, study):
    command(study, "--tasks", "mrpc", "--seeds", 3)
    page = (output / f"{study}.md").read_text()
    assert "AdaLoRA+Dropout, ensemble" in page and "Not finished" not in page
    assert (output / f"{study}.png").read_bytes().startswith(b"\x89PNG")


def test_figure_4_has_the_four_ways(command, output):
    command("figure-4", "--tasks", "mrpc", "--seeds", 3)
    page = (output / "figure-4.md").read_text()
    assert "| LoRA, masks in prediction alone |" in page
    assert page.count("| LoRA") == 4


def test_figure_5_sweeps_rates_and_samples(command, output):
    # Three rates and three numbers, of which one run is both.
    some = r"p = 0(\.5|\.9|$)|N = [148]"
    command("figure-5", "--seeds", 3, "--variants", some)
    page = (output / "figure-5.md").read_text()
    for label in ("p = 0.5", "p = 0.9", "N = 1", "N = 4", "N = 8"):
        assert f"| {label}, ensemble |" in page
    cells = [r["cell"] for r in results(output)]
    lora = [
        c for c in cells if c["method"] == "lora-dropout" and not c["curves"]
    ]
    assert {c["dropout_rate"] for c in lora} == {0.5, 0.9}
    # Table 1 has the 2 of smoke tests.
    assert {c["num_samples"] for c in lora} == {1, 2, 4, 8}


def test_learning_rates_are_chosen_on_the_first_seed(command, tmp_path):
    words = "table-1 --tasks mrpc --methods lora --learning-rates 1e-9 1e-2"
    command(*words.split(), "--seeds", 1, 0, folder=tmp_path)
    runs = {
        (r["cell"]["seed"], r["cell"]["learning_rate"]): r
        for r in results(tmp_path)
    }
    searched = {rate: runs[1, rate] for rate in (1e-9, 1e-2)}

    def merit(rate):
        scores = searched[rate]["scores"]["selection"]["mean"]
        return scores["accuracy"], -scores["nll"]

    best = max(searched, key=merit)
    assert set(runs) == {(1, 1e-9), (1, 1e-2), (0, best)}
    page = (tmp_path / "table-1.md").read_text()
    values = [
        100 * runs[seed, best]["scores"]["validation"]["mean"]["accuracy"]
        for seed in (1, 0)
    ]
    shown = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert (
        f"| LoRA | {searched[best]['weights']['backbone']:,} | {shown} |"
        in page
    )


def test_report_alone(command, tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        command("table-4", "--report", folder=tmp_path)
    words = "table-1 --tasks mrpc --methods lora"
    command(*words.split(), "--seeds", 0, folder=tmp_path)
    command(*words.split(), "--seeds", 0, 1, "--report", folder=tmp_path)
    page = (tmp_path / "table-1.md").read_text()
    assert "Not finished: 1 runs are missing." in page


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


def rows_for(cell):
    rows = [row("mrpc", number, "train") for number in range(24)]
    return reproduce.draw(cell, rows, {"validation": rows[:6]})


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
    done = []

    def cut(work):
        done.append(work)
        if len(done) == 4:  # In the second epoch, of two batches each.
            raise Cut

    with pytest.raises(Cut):
        training.run(cell, rows, folder, cut)
    assert len(json.loads((folder / "epochs.json").read_text())) == 1
    resumed = training.run(cell, rows, folder, lambda work: None)
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
