"""The paper's tables and figures, each by its command in its smallest form."""

import json
import math
import re
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND
from paper_data import write_data
from paper_data import write_preset

# `paper_data` knows where the commands are.
import reproduce  # isort: skip
from methods import METHODS
from studies import STUDIES
from tasks import SQUAD
from tasks import TASKS

COMBINED = "LoRA+Dropout, HiddenKey, KL"
pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    return write_preset(tmp_path_factory.mktemp("preset"))


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
    # As a process leaves it that is killed between its result and its end.
    leftover = output / "runs" / "unfinished" / paths[0].stem
    leftover.mkdir()
    (leftover / "epochs.json").write_text("[]")
    printed = command("table-1", "--tasks", "mrpc", "--seeds", 3)
    assert "learning rate" not in printed
    assert not leftover.exists()
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


def test_transformer_dropout_is_compared(command, output):
    labels = {v.label for v in STUDIES["transformer-dropout"].variants}
    assert len(labels) == 1 + 9 + 4 + 3
    chosen = "LoRA", "HiddenCut, span", "HiddenKey, KL", COMBINED
    assert labels.issuperset(chosen)
    words = "--tasks", "mrpc", "--seeds", 3, "--learning-rates", 0.001
    wanted = "|".join(f"^{re.escape(label)}$" for label in chosen)
    printed = command("transformer-dropout", *words, "--variants", wanted)
    for label in chosen[1:]:  # The first may have been run before.
        assert f"MRPC, {label}, seed 3, learning rate 0.001" in printed
    page = (output / "transformer-dropout.md").read_text()
    for label in chosen:
        assert f"| {label}" in page
    assert (output / "transformer-dropout.png").exists()
    cells = [r["cell"] for r in results(output)]
    patterns = {(c["attention"], c["hidden_pattern"]) for c in cells}
    assert {("", "span"), ("DropKey", "element")} <= patterns
    (combined,) = [
        c for c in cells if c["consistency"] and c["method"] == "lora-dropout"
    ]
    assert combined["attention"] == "DropKey"


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
    cells = []
    for rate in (1e-9, 1e-2):
        of = searched[rate]["scores"]["validation"]["mean"]
        text = f"{100 * of['accuracy']:.1f}, {of['nll']:.3f}"
        cells.append(f"**{text}**" if rate == best else text)
    assert f"| LoRA, mean network | {' | '.join(cells)} |" in page


def test_report_alone(command, tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        command("table-4", "--report", folder=tmp_path)
    words = "table-1 --tasks mrpc --methods lora"
    command(*words.split(), "--seeds", 0, folder=tmp_path)
    command(*words.split(), "--seeds", 0, 1, "--report", folder=tmp_path)
    page = (tmp_path / "table-1.md").read_text()
    assert "Not finished: 1 runs are missing." in page


def test_a_run_that_diverged_is_marked(command, tmp_path):
    words = "table-1 --tasks mrpc --methods lora --seeds 0 1".split()
    command(*words, folder=tmp_path)
    path = next((tmp_path / "runs").glob("*.json"))
    result = json.loads(path.read_text())
    assert result["diverged"] is False
    path.write_text(json.dumps({**result, "diverged": True}))
    command(*words, "--report", folder=tmp_path)
    page = (tmp_path / "table-1.md").read_text()
    assert "| LoRA (1 of 2 diverged) |" in page
