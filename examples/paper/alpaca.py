"""Teaches a language model to follow instructions, with LoRA Dropout.

Rows of Alpaca-clean, the loss on the responses alone, the hyper-parameters of
the paper's Table B.3; after each epoch, the perplexity of held-out responses,
of the mean network and of the ensemble. It goes on after an interruption.

    python examples/paper/alpaca.py --preset llama2_7b_en --data-dir data \\
        --dtype-policy bfloat16 --packed
"""

import argparse
import json
import logging
import math
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import alpaca_report
import keras
import numpy as np
from causal_models import adapted_model
from causal_models import add_model_arguments
from data import load_rows
from data import sample
from journal import Journal
from journal import check_settings
from progress import Progress
from reproduce import count
from reproduce import natural
from reproduce import positive

from keras_lora_dropout.instruction_tuning.packing import (
    isolate_packed_examples,
)
from keras_lora_dropout.instruction_tuning.prompts import alpaca_prompt
from keras_lora_dropout.instruction_tuning.response_data import (
    make_response_data,
)

SMOKE_ROWS = 8


def main(options):
    logging.getLogger("absl").setLevel(logging.ERROR)
    if options.report:
        alpaca_report.write(pathlib.Path(options.output) / "alpaca")
        return
    train_rows, held_out_rows = rows_of(options)
    model = adapted_model(options)
    tokenizer, model.preprocessor = model.preprocessor.tokenizer, None
    if options.packed:
        isolate_packed_examples(model)
    train = data_of(train_rows, tokenizer, options, packed=options.packed)
    held_out = data_of(held_out_rows, tokenizer, options, packed=False)
    steps_per_epoch = -(-len(train.y) // options.micro_batch_size)
    compile_model(model, steps_per_epoch, options)
    folder = pathlib.Path(options.output) / "alpaca" / options.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options, train, held_out)
    print(json.dumps(settings, indent=1), flush=True)
    check_settings(folder, settings, another="--name")
    journal = Journal(model, folder)
    done = len(journal.entries)
    progress = Progress(steps_per_epoch * (options.epochs + 1 - max(done, 1)))
    for epoch in range(done, options.epochs + 1):
        started = time.monotonic()
        entry = {"epoch": epoch}  # Epoch 0 is the untrained model.
        if epoch:
            entry["loss"] = train_epoch(model, train, epoch, options, progress)
        entry.update(perplexities(model, held_out, options))
        entry["seconds"] = round(time.monotonic() - started, 2)
        journal.add(entry)
        print(json.dumps(entry), flush=True)
    progress.end()
    path = folder / "adapters.safetensors"
    model.save_adapters(path)
    print(f"Written: {path}")
    alpaca_report.write(folder.parent)


def rows_of(options):
    """Load the rows, and hold some out, the same ones for each seed."""
    try:
        rows = load_rows("alpaca_cleaned", "train", options.data_dir)
        rows = [row for row in rows if row["output"].strip()]
        if options.smoke:
            rows = rows[: 2 * SMOKE_ROWS]
            options.held_out = SMOKE_ROWS
        held_out = sample(rows, options.held_out, seed=0)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Cannot load Alpaca's rows: {error}") from error
    held = {id(row) for row in held_out}
    train = [row for row in rows if id(row) not in held]
    if not train:
        raise SystemExit(
            f"All {len(rows)} rows are held out. Lower --held-out."
        )
    if options.train_examples:
        train = train[: options.train_examples]
    return train, held_out


def data_of(rows, tokenizer, options, packed):
    data = make_response_data(
        tokenizer,
        [alpaca_prompt(row["instruction"], row["input"]) for row in rows],
        [row["output"] for row in rows],
        sequence_length=options.sequence_length,
        packed=packed,
    )
    print(
        f"{len(rows)} examples in {len(data.y)} rows, "
        f"{data.num_response_tokens} response tokens; {data.cut} responses "
        f"are cut, {len(data.dropped)} do not fit at all.",
        flush=True,
    )
    return data


def compile_model(model, steps_per_epoch, options):
    accumulated = max(options.batch_size // options.micro_batch_size, 1)
    # Keras's schedules count batches, whether or not a step follows.
    batches = steps_per_epoch * options.epochs
    warmup = min(options.warmup_steps * accumulated, batches - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else options.learning_rate,
        batches - warmup,
        warmup_target=options.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(
            schedule,
            weight_decay=0.0,
            gradient_accumulation_steps=(
                accumulated if accumulated > 1 else None
            ),
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


def train_epoch(model, data, epoch, options, progress):
    """Train for an epoch, in an order that depends on its number alone."""
    order = np.random.default_rng((options.seed, epoch)).permutation(
        len(data.y)
    )
    tick = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: progress.advance(
            1, f"epoch {epoch}, loss {logs['loss']:.3f}"
        )
    )
    history = model.fit(
        {name: array[order] for name, array in data.x.items()},
        data.y[order],
        sample_weight=data.sample_weight[order],
        batch_size=options.micro_batch_size,
        shuffle=False,
        initial_epoch=epoch - 1,
        epochs=epoch,
        callbacks=[tick],
        verbose=0,
    )
    loss = history.history["loss"][0]
    if not math.isfinite(loss):
        raise SystemExit(
            f"The loss is {loss} after epoch {epoch}. Lower "
            "--learning-rate. What was kept is that of the epoch before."
        )
    return float(loss)


def perplexities(model, data, options):
    """Perplexity of held-out response tokens, of each network.

    All rows are weighed by their response tokens.
    """
    totals = {"mean": 0.0, "ensemble": 0.0}
    for start in range(0, len(data.y), options.micro_batch_size):
        part = slice(start, start + options.micro_batch_size)
        batch = {
            "x": {name: array[part] for name, array in data.x.items()},
            "y": data.y[part],
            "sample_weight": data.sample_weight[part],
            "batch_size": options.micro_batch_size,
            "verbose": 0,
        }
        weight = float(batch["sample_weight"].sum())
        totals["mean"] += weight * model.evaluate(**batch)
        totals["ensemble"] += weight * model.ensemble_evaluate(
            seed=options.seed, average="probability", **batch
        )
    return {
        f"{name}_perplexity": math.exp(total / data.num_response_tokens)
        for name, total in totals.items()
    }


def settings_of(options, train, held_out):
    hidden = "data_dir", "output", "report"
    settings = {k: v for k, v in vars(options).items() if k not in hidden}
    return {
        **settings,
        "preset": pathlib.Path(options.preset).name,
        "backend": keras.config.backend(),
        "rows": len(train.y),
        "response_tokens": train.num_response_tokens,
        "held_out_response_tokens": held_out.num_response_tokens,
    }


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--report", action="store_true", help="of the results there are")
    add("--name", default="lora-dropout", help="of the run, a folder")
    add("--epochs", type=count, default=3)
    add("--learning-rate", type=positive, default=5e-5)
    add("--batch-size", type=count, default=128, help="for one step")
    add("--micro-batch-size", type=count, default=4, help="at a time")
    add("--warmup-steps", type=natural, default=500)
    add("--sequence-length", type=count, default=512)
    add("--packed", action="store_true", help="several examples in a row")
    add("--train-examples", type=count, help="default: all")
    add("--held-out", type=count, default=256, help="examples")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
