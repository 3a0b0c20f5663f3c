"""The commands `alpaca.py` and `mmlu.py`, and what they are made of."""

import json
import pathlib
import sys

import keras
import language_models
import numpy as np
import pytest
import real_data
from helpers import assert_close

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

import alpaca
import mmlu
from letters import letter_model
from letters import letter_probabilities
from mmlu_prompts import GROUP_OF
from mmlu_prompts import GROUPS
from mmlu_prompts import PromptTokens
from mmlu_prompts import prompt_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:`shuffle=True` was passed:UserWarning"
)
SUBJECTS = ["anatomy", "sociology"]
QUESTION = {
    "subject": "high_school_biology",
    "question": "Two and two?",
    "choices": ["3", "4", "5", "22"],
    "answer": 1,
}
INSTRUCTIONS = [
    {"instruction": f"Say {n}.", "input": "now" * (n % 2), "output": f"{n}!"}
    for n in range(16)
]


def write_rows(folder, dataset, split, rows):
    path = folder / dataset
    path.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) + "\n"
    (path / f"{split}.jsonl").write_text(text)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for split in ("test", "dev"):
        rows = [
            {**QUESTION, "subject": subject, "answer": n}
            for subject in SUBJECTS
            for n in range(3)
        ]
        write_rows(folder, "mmlu", split, rows)
    write_rows(folder, "alpaca_cleaned", "train", INSTRUCTIONS)
    return folder


def words(data, output, *more):
    stories = str(real_data.REAL.joinpath(*language_models.STORIES))
    given = ["--preset", stories, "--rank", "2", "--data-dir", str(data)]
    return [*given, "--output", str(output), "--smoke", *more]


def run_mmlu(data, output, *more):
    subjects = ["--subjects", *SUBJECTS, "--shots", "0", "1"]
    small = ["--max-length", "320", "--batch-size", "2"]
    arguments = words(data, output, *subjects, *small, *more)
    mmlu.main(mmlu.parse_arguments(arguments))
    return (output / "mmlu" / "mmlu.md").read_text()


def run_alpaca(data, output, *more, name="lora-dropout"):
    small = ["--epochs", "2", "--sequence-length", "192", "--warmup-steps"]
    batches = ["1", "--batch-size", "4", "--micro-batch-size", "2"]
    rate = ["--learning-rate", "0.01"]
    small += [*batches, *rate, "--packed", "--name", name]
    arguments = words(data, output, *small, *more)
    alpaca.main(alpaca.parse_arguments(arguments))
    return json.loads((output / "alpaca" / name / "epochs.json").read_text())


@language_models.needs_stories
def test_from_instructions_to_mmlu(data, tmp_path, monkeypatch):
    """Adapters are trained, kept and scored; both commands go on."""
    first = run_alpaca(data, tmp_path / "out")
    losses = [epoch["mean_perplexity"] for epoch in first]
    assert losses[0] > losses[1] > losses[2]
    assert all(e["ensemble_perplexity"] > 1 for e in first)

    # Killed after an epoch, it ends where it would have.
    class Killed(Exception):
        pass

    class Once(alpaca.Journal):
        def add(self, entry):
            super().add(entry)
            if "loss" in entry:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(alpaca, "Journal", Once)
        with pytest.raises(Killed):
            run_alpaca(data, tmp_path / "again")
    again = run_alpaca(data, tmp_path / "again")
    for one, other in zip(first, again, strict=True):
        assert one["mean_perplexity"] == pytest.approx(
            other["mean_perplexity"], rel=1e-5
        )

    # Another seed joins its row, another method has its own.
    page = tmp_path / "out" / "alpaca" / "alpaca.md"
    assert f" {losses[0]:.2f} | {min(losses[1:]):.2f} |" in page.read_text()
    plain = ["--dropout-rate", "0", "--num-samples", "1"]
    run_alpaca(data, tmp_path / "out", *plain, name="lora")
    other = run_alpaca(data, tmp_path / "out", "--seed", "1", name="other")
    mean = np.mean([losses[2], other[2]["mean_perplexity"]])
    page.unlink()
    report = ["--report", "--output", str(tmp_path / "out")]
    alpaca.main(alpaca.parse_arguments(report))
    _, _, *rows = page.read_text().splitlines()
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| lora", "0", "1", "1"],
        ["| lora-dropout", "0.5", "4", "2"],
    ]
    assert f"{mean:.2f} ± " in rows[1].split(" | ")[6]
    assert page.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="No run in"):
        alpaca.main(alpaca.parse_arguments([*report[:2], str(tmp_path)]))

    adapters = tmp_path / "out/alpaca/lora-dropout/adapters.safetensors"
    given = ["--adapters", str(adapters)]
    table = run_mmlu(data, tmp_path / "out", *given)
    folder = tmp_path / "out" / "mmlu"
    cells = [
        json.loads(mmlu.path_of(folder, shots, mode, "anatomy").read_text())
        for shots in (0, 1)
        for mode in mmlu.MODES
    ]
    hits = [np.equal(c["answers"], c["chosen"]).mean() for c in cells]
    shown = " | ".join(f"{100 * share:.2f}" for share in hits)
    assert f"| anatomy | 2 | {shown} |" in table
    groups, _, subjects = table.partition("## By subject")
    assert groups.count("\n| ") == 1 + 1 + 2 * 3
    assert subjects.count("\n| ") == 2 + 2
    assert "| 0 | without adapters |" in groups
    assert "| 1 | ensemble |" in groups
    plain, mean, ensemble = (
        np.array(
            json.loads(mmlu.path_of(folder, 0, m, "anatomy").read_text())[
                "probabilities"
            ]
        )
        for m in ("plain", "mean", "ensemble")
    )
    for probabilities in (plain, mean, ensemble):
        assert_close(probabilities.sum(1), np.ones(2), 1e-4)
    assert np.abs(plain - mean).max() > 1e-4
    assert np.abs(mean - ensemble).max() > 1e-5

    # What is done is not done again; the rest, and only that, agrees.
    kept = {p: p.read_text() for p in folder.glob("*-shot-*.json")}
    assert len(kept) == 2 * 2 * 3
    gone = mmlu.path_of(folder, 1, "ensemble", "sociology")
    gone.unlink()
    assert run_mmlu(data, tmp_path / "out", *given) == table
    for path, text in kept.items():
        one, other = json.loads(text), json.loads(path.read_text())
        assert one["probabilities"] == other["probabilities"]
        assert (one["seconds"] == other["seconds"]) or path == gone

    with pytest.raises(SystemExit, match="seed was 0, now 5"):
        run_mmlu(data, tmp_path / "out", *given, "--seed", "5")
    with pytest.raises(SystemExit, match=r"seed was 0, now 5.*--name"):
        run_alpaca(data, tmp_path / "out", "--seed", "5")


@language_models.needs_stories
def test_letters_follow_the_whole_model():
    """Those of the last token, whatever stands beside it in the batch."""
    model = language_models.adapted("stories")
    letters = [447, 450, 457, 455]
    scorer = letter_model(model, letters)
    prompts = [[1, 403, 407, 261], [1, 378], [1] + [286] * 70]
    found = letter_probabilities(
        lambda x: scorer.predict(x, verbose=0), prompts, batch_size=2
    )
    assert found.shape == (3, 4)
    for prompt, logits in zip(prompts, found, strict=True):
        x = np.array([prompt])
        whole = model({"token_ids": x, "padding_mask": np.ones_like(x)})
        expected = keras.ops.convert_to_numpy(whole)[0, -1, letters]
        assert_close(logits, expected, 1e-3)


def test_prompts_are_those_of_mmlu():
    assert prompt_of(QUESTION, [QUESTION]) == (
        "The following are multiple choice questions (with answers) about high "
        "school biology.\n\nTwo and two?\nA. 3\nB. 4\nC. 5\nD. 22\nAnswer: B"
        "\n\nTwo and two?\nA. 3\nB. 4\nC. 5\nD. 22\nAnswer:"
    )
    assert len(GROUP_OF) == 57
    assert [len(subjects) for subjects in GROUPS.values()] == [18, 12, 13, 14]


class Letters:
    """One token for each character; starts a text with 1."""

    start_token_id = 1

    def __call__(self, text):
        return [ord(letter) for letter in text]


class Joined(Letters):
    """A space and the letter after it are one token, as in most."""

    def __call__(self, text):
        codes, tokens = super().__call__(text), []
        while codes:
            code = codes.pop(0)
            if code == 32 and codes:
                code = 1000 + codes.pop(0)
            tokens.append(code)
        return tokens


def test_letters_of_a_vocabulary():
    apart, joined = (PromptTokens(t, 1000) for t in (Letters(), Joined()))
    assert apart.letters == [ord(letter) for letter in "ABCD"]
    assert joined.letters == [1000 + ord(letter) for letter in "ABCD"]
    text = prompt_of(QUESTION)
    ids, whole = apart.of(QUESTION)
    assert whole
    assert ids == [1, *Letters()(text), ord(" ")]
    ids, _ = joined.of(QUESTION)
    assert ids == [1, *Joined()(text)]

    class Unknown(Letters):
        def __call__(self, text):
            return [0 if code > 64 else code for code in super().__call__(text)]

    with pytest.raises(ValueError, match="no tokens of their own for ABCD"):
        PromptTokens(Unknown(), 100)


def test_long_prompts_lose_examples_first():
    one = len(Letters()(prompt_of(QUESTION, [QUESTION]))) + 2
    tokens = PromptTokens(Letters(), one)
    ids, whole = tokens.of(QUESTION, [QUESTION] * 3)
    assert not whole
    assert ids == [1, *Letters()(prompt_of(QUESTION, [QUESTION]) + " ")]
    ids, whole = PromptTokens(Letters(), 10).of(QUESTION)
    assert not whole
    assert (
        ids == [1, *Letters()("\nAnswer: ")][:1] + Letters()("\nAnswer: ")[-9:]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b"]}, 'field "choices" is .* list of 4 strings'),
        ({"choices": ["a", "b", 3, "d"]}, "a choice that is 3 .int"),
        ({"answer": 4}, r'field "answer" is 4 .*0 \(A\), 1 \(B\)'),
        ({"answer": "B"}, "field .answer. is 'B'"),
        ({"subject": "astrology"}, "no subject 'astrology'"),
        ({"question": None}, "must be a string"),
    ],
)
def test_wrong_questions(data, tmp_path, change, message):
    rows = [{**QUESTION, "subject": subject} for subject in SUBJECTS]
    write_rows(data, "mmlu", "test", [*rows, {**rows[0], **change}])
    with pytest.raises(SystemExit, match=message):
        run_mmlu(data, tmp_path)


def test_missing_data(data, tmp_path):
    with pytest.raises(SystemExit, match=r"no file test\.jsonl"):
        run_mmlu(tmp_path / "nowhere", tmp_path)
    with pytest.raises(SystemExit, match="no questions about virology"):
        run_mmlu(data, tmp_path, "--subjects", "virology")
    with pytest.raises(SystemExit, match=r"no file train\.jsonl"):
        run_alpaca(tmp_path / "nowhere", tmp_path)
    write_rows(data, "alpaca_cleaned", "train", [{"instruction": "Go."}])
    with pytest.raises(SystemExit, match='no field "input", "output"'):
        run_alpaca(data, tmp_path)


def test_absent_preset(data, tmp_path):
    with pytest.raises(SystemExit, match=r"Cannot load the preset .\./none"):
        run_mmlu(data, tmp_path, "--preset", "./none")
