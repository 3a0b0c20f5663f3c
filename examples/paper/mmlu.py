"""Scores a language model on MMLU, as in Table 3 of the LoRA Dropout paper.

The model says how likely A, B, C and D are after each question: without its
adapters, as the mean network, and as an ensemble. Each subject is kept once it
is done, and the same command goes on after an interruption.

    python examples/paper/mmlu.py --preset llama2_7b_en --data-dir data \\
        --adapters alpaca.safetensors --shots 0 5
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import keras
import numpy as np
from causal_models import adapted_model
from causal_models import add_model_arguments
from data import load_rows
from journal import check_settings
from letters import letter_model
from letters import letter_probabilities
from mmlu_prompts import GROUP_OF
from mmlu_prompts import GROUPS
from mmlu_prompts import PromptTokens
from progress import Progress
from report import markdown
from reproduce import count
from reproduce import natural

from keras_lora_dropout.storage.atomic import write_atomically

MODES = {
    "plain": "without adapters",
    "mean": "mean network",
    "ensemble": "ensemble",
}
SMOKE_ROWS = 2


def main(options):
    logging.getLogger("absl").setLevel(logging.ERROR)
    test, dev = rows_of(options, "test"), rows_of(options, "dev")
    model = adapted_model(options)
    tokens = PromptTokens(model.preprocessor.tokenizer, options.max_length)
    scorer = letter_model(model, tokens.letters)
    folder = pathlib.Path(options.output) / "mmlu"
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    print(json.dumps(settings, indent=1), flush=True)
    check_settings(folder, settings)
    jobs = [
        (shots, mode, subject)
        for shots in options.shots
        for mode in options.modes
        for subject in test
    ]
    waiting = [job for job in jobs if not path_of(folder, *job).exists()]
    progress = Progress(sum(len(test[job[2]]) for job in waiting) or 1)
    for shots, mode, subject in waiting:
        result = score(
            scorer, tokens, test[subject], dev[subject][:shots], mode, options
        )
        text = json.dumps({**result, "subject": subject}, indent=1) + "\n"
        write_atomically(path_of(folder, shots, mode, subject), text.encode())
        progress.advance(
            len(test[subject]), f"{shots}-shot, {MODES[mode]}, {subject}"
        )
    progress.end()
    page = page_of(folder, jobs, options)
    write_atomically(folder / "mmlu.md", page.encode())
    print(f"{page}\nWritten: {folder / 'mmlu.md'}")


def rows_of(options, split):
    """Load a split by subject; all subjects must be known."""
    try:
        rows = load_rows("mmlu", split, options.data_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Cannot load MMLU: {error}") from error
    subjects = {}
    for row in rows:
        if row["subject"] not in GROUP_OF:
            raise SystemExit(
                f"MMLU has no subject {row['subject']!r}. Its subjects are "
                f"{', '.join(sorted(GROUP_OF))}."
            )
        if not options.subjects or row["subject"] in options.subjects:
            subjects.setdefault(row["subject"], []).append(row)
    wanted = options.subjects or GROUP_OF
    missing = [subject for subject in wanted if subject not in subjects]
    if missing:
        raise SystemExit(
            f"The {split} split of MMLU has no questions about "
            f"{', '.join(missing)}. Pass other --subjects, or its whole file."
        )
    if options.smoke:
        return {name: part[:SMOKE_ROWS] for name, part in subjects.items()}
    return subjects


def settings_of(options):
    """All that a result depends on, but for subject, mode and shots."""
    hidden = "data_dir", "output", "shots", "modes", "subjects"
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in hidden
    }
    if options.adapters:
        settings["adapters"] = pathlib.Path(options.adapters).name
    return {
        **settings,
        "preset": pathlib.Path(options.preset).name,
        "backend": keras.config.backend(),
    }


def path_of(folder, shots, mode, subject):
    return folder / f"{shots}-shot-{mode}-{subject}.json"


def score(scorer, tokens, questions, shots, mode, options):
    """Answer the questions of one subject."""
    started = time.monotonic()
    prompts, whole = zip(
        *(tokens.of(row, shots) for row in questions), strict=True
    )

    def predict(x):
        if mode == "ensemble":
            return scorer.ensemble_predict(
                x,
                batch_size=options.batch_size,
                seed=options.seed,
                average="probability",
                verbose=0,
            )
        return scorer.predict(x, batch_size=options.batch_size, verbose=0)

    if mode == "plain":
        with scorer.disable_adapters():
            outputs = letter_probabilities(predict, prompts, options.batch_size)
    else:
        outputs = letter_probabilities(predict, prompts, options.batch_size)
    if mode != "ensemble":
        outputs = keras.ops.convert_to_numpy(keras.ops.softmax(outputs))
    return {
        "answers": [row["answer"] for row in questions],
        "chosen": np.argmax(outputs, axis=1).tolist(),
        "probabilities": [[round(float(p), 6) for p in r] for r in outputs],
        "cut_prompts": whole.count(False),
        "seconds": round(time.monotonic() - started, 2),
    }


def page_of(folder, jobs, options):
    """Write the accuracies, in percent: as Table 3 does, and by subject."""
    results = {
        job: json.loads(path_of(folder, *job).read_text()) for job in jobs
    }
    hits = {
        job: np.equal(result["answers"], result["chosen"])
        for job, result in results.items()
    }
    columns = [(n, mode) for n in options.shots for mode in options.modes]
    rows = []
    for column in columns:
        mine = {job[2]: hits[job] for job in jobs if job[:2] == column}
        of = [
            [found for subject, found in mine.items() if GROUP_OF[subject] == g]
            for g in GROUPS
        ]
        cut = sum(results[*column, subject]["cut_prompts"] for subject in mine)
        shown = [percent(part) for part in (*of, list(mine.values()))]
        rows.append([column[0], MODES[column[1]], *shown, cut])
    head = ["shots", "model", *GROUPS, "average", "cut prompts"]
    subjects = sorted({job[2] for job in jobs})
    titles = [f"{shots}-shot, {MODES[mode]}" for shots, mode in columns]
    by_subject = [
        [
            subject.replace("_", " "),
            len(hits[*columns[0], subject]),
            *(percent([hits[*column, subject]]) for column in columns),
        ]
        for subject in subjects
    ]
    return "\n\n".join(
        [
            "# MMLU",
            "Accuracy in percent, of all questions of a group together.",
            markdown(head, rows),
            "## By subject",
            markdown(["subject", "questions", *titles], by_subject) + "\n",
        ]
    )


def percent(parts):
    """The share of hits in a list of arrays; empty if there are none."""
    return f"{100 * np.mean(np.concatenate(parts)):.2f}" if parts else ""


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--shots", nargs="+", type=natural, default=[0, 5])
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    add("--subjects", nargs="+", choices=sorted(GROUP_OF), help="default: all")
    add("--max-length", type=count, default=2048, help="tokens of a prompt")
    add("--batch-size", type=count, default=8)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
