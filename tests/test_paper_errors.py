"""Wrong arguments, data and files: a clear error, and nothing lost."""

import json
import pathlib
import sys

import pytest

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

import reproduce
from cells import Store

ROWS = [
    {"sentence1": "the fox", "sentence2": "a dog", "label": n % 2, "idx": n}
    for n in range(24)
]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "glue" / "mrpc"
    path.mkdir(parents=True)
    for split in ("train", "validation"):
        write(path / f"{split}.jsonl", ROWS)
    return tmp_path


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def run(folder, *words):
    given = [
        *("table-1 --tasks mrpc --seeds 0 --methods bitfit --smoke").split(),
        *("--data-dir", str(folder), "--output", str(folder / "output")),
        *words,
    ]
    options = reproduce.parse_arguments(given)
    reproduce.main(options)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "-1"], "0 or more, not -1"),
        (["--seeds", "1", "1"], "--seeds has one value twice"),
        (["--epochs", "0"], "1 or more, not 0"),
        (["--epochs", "two"], "invalid int value: 'two'"),
        (["--dropout-rate", "1"], "in [0, 1), not 1"),
        (["--learning-rates", "nan"], "above 0, not nan"),
        (["--tasks", "wnli"], "invalid choice: 'wnli'"),
        (["--variants", "("], "a regular expression, not '('"),
        (["--dtype-policy", "half"], "invalid choice: 'half'"),
    ],
)
def test_arguments(folder, words, message, capsys):
    with pytest.raises(SystemExit):
        run(folder, *words)
    assert message in capsys.readouterr().err
    assert not (folder / "output").exists()


def test_a_method_that_a_study_has_not(folder):
    with pytest.raises(SystemExit, match=r"left: LoRA \(lora\), LoRA\+Drop"):
        options = reproduce.parse_arguments(
            ["figure-1", "--methods", "bitfit", "--output", str(folder)]
        )
        reproduce.main(options)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "not JSON"),
        ([{"sentence1": "a", "label": 1, "idx": 0}], "sentence2"),
        ([*ROWS, {**ROWS[0], "label": 2}], "label"),
        ([*ROWS, {**ROWS[0], "label": "1"}], "label"),
        ([*ROWS, {**ROWS[0], "sentence1": 7}], "sentence1"),
    ],
)
def test_data(folder, rows, words):
    write(folder / "glue" / "mrpc" / "train.jsonl", rows)
    with pytest.raises(SystemExit, match=words) as stopped:
        run(folder)
    assert "Cannot load the data of mrpc" in str(stopped.value)


def test_no_data(folder):
    (folder / "glue" / "mrpc" / "validation.jsonl").unlink()
    with pytest.raises(SystemExit, match="validation"):
        run(folder)


def test_too_few_examples(folder):
    write(folder / "glue" / "mrpc" / "train.jsonl", ROWS[:10])
    with pytest.raises(SystemExit, match="10 training examples"):
        run(folder)


def test_nothing_to_choose_a_learning_rate_on(folder):
    words = "table-1 --tasks mrpc --learning-rates 1e-3 1e-2 --output".split()
    options = reproduce.parse_arguments([*words, str(folder / "output")])
    with pytest.raises(SystemExit, match="mrpc cannot be chosen without"):
        reproduce.main(options)
    assert not (folder / "output").exists()


def test_no_such_preset(folder):
    with pytest.raises(
        SystemExit, match=r"Cannot load the preset '\./nothing'"
    ):
        run(folder, "--preset", "./nothing")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"cell": {}}', '{"cell": 1, "scores": 2}']
)
def test_a_damaged_result_is_named_and_kept(folder, text):
    options = reproduce.parse_arguments(
        [
            *("table-1 --tasks mrpc --seeds 0 --methods bitfit").split(),
            *("--smoke", "--report", "--output", str(folder)),
        ]
    )
    store = Store(folder / "runs")
    plan = reproduce.plan_of(options)
    for cell in plan.cells():
        path = store.folder / f"{cell.name}.json"
        path.write_text(text)
    with pytest.raises(SystemExit, match="holds no result of a run"):
        reproduce.main(options)
    assert path.read_text() == text
