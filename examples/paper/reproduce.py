"""Repeats the tables and figures of the LoRA Dropout paper.

A study trains many models; each result is kept in a file of its own and not
computed again. The same command goes on after an interruption, and several
processes that run it share the work. At its end it writes the table, and the
figure, of all results that there are.

    python examples/paper/reproduce.py table-1 --tasks mrpc --seeds 0 1 2
    python examples/paper/reproduce.py table-1 --preset minilm \\
        --configuration low-resource --data-dir data --tasks mrpc cola
"""

import argparse
import functools
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import report
import training
from cells import Store
from configurations import CONFIGURATIONS
from configurations import configuration
from data import load_rows
from data import sample
from methods import METHODS
from presets import MINILM
from progress import Progress
from studies import STUDIES
from studies import Plan
from tasks import TASKS

WAIT_SECONDS = 10
# What a smoke test needs to reach every line in seconds.
SMOKE = {
    "train_examples": 8,
    "selection_examples": 4,
    "batch_size": 4,
    "epochs": 1,
    "sequence_length": 8,
    "rank": 2,
    "initial_rank": 3,
    "num_samples": 2,
    "budget_warmup": 0,
    "budget_final": 1,
    "mask_interval": 1,
    "doc_stride": 1,
    "max_question_length": 2,
}
SMOKE_ROWS = 8


def main(options):
    # KerasHub reads the examples in the order given; its reader's threads.
    warnings.filterwarnings("ignore", "`shuffle=True` was passed")
    logging.getLogger("absl").setLevel(logging.ERROR)
    plan = plan_of(options)
    folder = pathlib.Path(options.output)
    store = Store(folder / "runs")
    if not options.report:
        print_configuration(options, plan)
        run(plan, store, functools.cache(functools.partial(rows_of, options)))
    for path in report.write(options.study, plan, store, folder):
        print(f"Written: {path}")


def plan_of(options):
    """Return the `Plan` that the arguments ask for."""
    study = STUDIES[options.study]
    overrides = {
        name: value
        for name in OVERRIDES
        if (value := getattr(options, name)) is not None
    }
    if options.smoke:
        overrides = {**overrides, **SMOKE}
    variants = [
        variant
        for variant in study.variants
        if (not options.methods or variant.method in options.methods)
        and re.search(options.variants, variant.label)
    ]
    if not variants:
        labels = ", ".join(f"{v.label} ({v.method})" for v in study.variants)
        raise SystemExit(
            f"Nothing of {options.study} is wanted. Pass --methods or "
            f"--variants so that some of these are left: {labels}."
        )
    plan = Plan(
        study=study,
        tasks=tuple(options.tasks or study.tasks),
        variants=tuple(variants),
        seeds=tuple(options.seeds),
        configuration=options.configuration,
        overrides={"preset": preset_of(options), **overrides},
        learning_rates=options.learning_rates and tuple(options.learning_rates),
    )
    for cell in plan.cells():
        if (
            plan.searched(cell.task, cell.method)
            and not cell.selection_examples
        ):
            raise SystemExit(
                f"The learning rate of {cell.task} cannot be chosen without "
                "examples to choose on. Pass one --learning-rates, or "
                "--selection-examples 256."
            )
    return plan


def preset_of(options):
    if options.preset is None:
        return MINILM if options.smoke else "deberta_v3_base_en"
    return options.preset


def run(plan, store, rows_of):
    """Run what has no result yet, until all of it has one."""
    store.remove_leftovers()
    progress = Progress(
        sum(
            training.work(cell, rows_of(cell))
            for cell in plan.cells()
            if cell not in store
        )
        or 1
    )
    while not all(cell in store for cell in plan.cells(store)):
        ran = [
            run_cell(cell, plan.label(cell), store, rows_of(cell), progress)
            for cell in plan.cells(store)
            if cell not in store
        ]
        if not any(ran):  # Other processes are at work on the rest.
            time.sleep(WAIT_SECONDS)
    progress.end()


def run_cell(cell, label, store, rows, progress):
    """Run a cell unless another process does; say whether it was run."""
    name = (
        f"{TASKS[cell.task].title}, {label}, seed "
        f"{cell.seed}, learning rate {cell.learning_rate:g}"
    )
    with store.claimed(cell) as folder:
        if folder is None:
            return False
        result = training.run(
            cell, rows, folder, lambda work: progress.advance(work, name)
        )
        store.write(cell, {**result, "command": command()})
    scores = result["scores"][TASKS[cell.task].splits[0]]["mean"]
    metric = TASKS[cell.task].metric
    progress.end()
    print(
        f"{name}: {metric} {scores[metric]:.3f} ({result['seconds']:.0f} s)",
        flush=True,
    )
    return True


def rows_of(options, cell):
    """Load the rows of a cell's task, and draw those it trains on."""
    return draw(cell, *load_task(options, cell.task))


@functools.cache
def _loaded(task, data_dir, tfds_dir):
    splits = "train", *TASKS[task].splits
    try:
        return {
            split: load_rows(TASKS[task].dataset, split, data_dir, tfds_dir)
            for split in splits
        }
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"Cannot load the data of {task}: {error}") from error


def load_task(options, task):
    rows = dict(_loaded(task, options.data_dir, options.tfds_dir))
    if options.smoke:
        rows = {
            split: sample(part, min(len(part), 2 * SMOKE_ROWS), seed=0)
            for split, part in rows.items()
        }
    return rows.pop("train"), rows


def draw(cell, train, evaluated):
    """Draw a cell's examples to train on and to choose on, from its seed."""
    wanted = cell.train_examples or len(train) - cell.selection_examples
    try:
        drawn = sample(train, wanted + cell.selection_examples, cell.seed)
        chosen = sample(drawn, wanted, cell.seed)
    except ValueError as error:
        raise SystemExit(
            f"{cell.task} has {len(train)} training examples. {error} Lower "
            "--train-examples or --selection-examples."
        ) from error
    rest = {id(row) for row in chosen}
    selection = [row for row in drawn if id(row) not in rest]
    return {"train": chosen, "selection": selection, **evaluated}


def print_configuration(options, plan):
    settings = {
        "command": command(),
        "options": vars(options),
        "configuration": {
            task: {
                **configuration(plan.configuration, task)[0],
                **plan.overrides,
            }
            for task in plan.tasks
        },
    }
    print(json.dumps(settings, indent=1), flush=True)


def command():
    """The command as it can be run again; folders are the user's own."""
    hidden = {"--data-dir": "DATA", "--tfds-dir": "TFDS", "--output": "OUTPUT"}
    words, given = [], sys.argv[1:]
    for before, word in zip([None, *given], given, strict=False):
        words.append(hidden.get(before, word))
    return f"python examples/paper/reproduce.py {' '.join(words)}"


def number(kind, low, high, allowed):
    """Make a type of arguments: a number from `low` to less than `high`."""

    def parsed(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    parsed.__name__ = kind.__name__
    return parsed


def pattern(text):
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"must be a regular expression, not {text!r}: {error}"
        ) from error
    return text


natural = number(int, 0, math.inf, "an integer, 0 or more")
count = number(int, 1, math.inf, "an integer, 1 or more")
positive = number(float, sys.float_info.min, math.inf, "a number above 0")
# Settings of all runs that a user may change.
OVERRIDES = {
    "batch_size": {"type": count},
    "epochs": {"type": count},
    "sequence_length": {"type": count},
    "doc_stride": {"type": natural},
    "max_question_length": {"type": count},
    "null_threshold": {"type": float},
    "train_examples": {"type": count},
    "selection_examples": {"type": natural},
    "rank": {"type": count},
    "alpha": {"type": positive},
    "dropout_rate": {"type": number(float, 0, 1, "a number in [0, 1)")},
    "num_samples": {"type": count},
    "attention_rate": {"type": number(float, 0, 1, "a number in [0, 1)")},
    "hidden_rate": {"type": number(float, 0, 1, "a number in [0, 1)")},
    "consistency_weight": {"type": positive},
    "dtype_policy": {"choices": ["float32", "bfloat16", "mixed_bfloat16"]},
}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", choices=list(STUDIES), help="the table or figure")
    add("--tasks", nargs="+", choices=list(TASKS), help="default: the paper's")
    add("--methods", nargs="+", choices=list(METHODS), help="default: all")
    add(
        "--variants",
        type=pattern,
        default="",
        help="regular expression on the labels of rows or lines; default: all",
    )
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2, 3, 4])
    add("--configuration", choices=CONFIGURATIONS, default="paper")
    add(
        "--preset",
        help="of a KerasHub text classifier, or its folder, or "
        f"`{MINILM}`, which needs no network; default: deberta_v3_base_en",
    )
    add("--data-dir", help="folder of JSON Lines; without it, TFDS is used")
    add("--tfds-dir", help="folder of TFDS; default: its own")
    add("--output", default="demo-output/paper", help="folder of all results")
    add(
        "--learning-rates",
        nargs="+",
        type=positive,
        help="to choose from, on the first seed; default: the configuration's",
    )
    for name, settings in OVERRIDES.items():
        add(f"--{name.replace('_', '-')}", **settings)
    add("--smoke", action="store_true", help="for tests: tiny")
    add("--report", action="store_true", help="run nothing, write the report")
    options = parser.parse_args(arguments)
    for name in ("tasks", "methods", "seeds", "learning_rates"):
        values = getattr(options, name)
        if values and len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')} has one value twice")
    return options


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
