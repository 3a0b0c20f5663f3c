"""Data and a preset as small as can be, for the commands of the paper."""

import json
import pathlib
import sys

import families
import keras

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

from tasks import TASKS

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


def write_data(folder):
    """Write all tasks as JSON Lines; return the folder."""
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


def write_preset(folder):
    """Write a tiny BERT classifier of two blocks; return its folder."""
    keras.utils.set_random_seed(0)
    families.bert().save_to_preset(str(folder / "bert"))
    return folder / "bert"
