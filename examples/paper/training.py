"""Runs a cell: fine-tunes a model, and scores its networks."""

import functools
import importlib
import math
import os
import platform
import time

import keras
import keras_hub
import numpy as np
from block_dropout import blocks_drop
from block_dropout import enable_block_dropout
from journal import Journal
from methods import METHODS
from problems import problem_of
from tasks import TASKS

import keras_lora_dropout as kld

PREDICTION_BATCH_SIZE = 64
SAVE_SECONDS = 60.0


def run(cell, rows, folder, progress):
    """Run a cell to its end, from where it was interrupted.

    Args:
        cell: `Cell`.
        rows: Dictionary from a split's name to its rows: `"train"`,
            `"selection"` and those of the task to evaluate.
        folder: Path of the folder where an unfinished run keeps its state.
        progress: Function of the work that was done, in rows predicted.

    Returns:
        The result, as it is stored.
    """
    keras.config.set_dtype_policy(cell.dtype_policy)
    keras.utils.set_random_seed(cell.seed)  # Of the head.
    problem = problem_of(cell)
    model = problem.build()
    data = {split: problem.encode(part) for split, part in rows.items() if part}
    train = data.pop("train")
    steps = cell.epochs * -(-len(train) // cell.batch_size)
    METHODS[cell.method].enable(model, cell, steps)
    enable_block_dropout(model, cell)
    compile_model(model, cell, steps, problem.loss)
    networks = Networks(model, cell, problem, progress)
    journal = Journal(model, folder, SAVE_SECONDS)
    for epoch in range(len(journal.entries), cell.epochs):
        work = len(train.rows) * training_cost(cell)
        ticks = Ticks(progress, work, len(train), cell.batch_size)
        entry = train_epoch(model, cell, epoch, train, ticks)
        if cell.curves:
            shown = data[TASKS[cell.task].splits[0]]
            entry["scores"] = {
                name: compute()
                for name, compute in networks.scorers(shown).items()
            }
        journal.add(entry)
    journal.close()
    if getattr(model, "rank_budget", None) is not None:
        model.compact_ranks()
    return {
        "examples": {split: len(part) for split, part in rows.items()},
        "weights": count_weights(model),
        **{
            clock: round(sum(epoch[clock] for epoch in journal.entries), 2)
            for clock in ("seconds", "cpu_seconds")
        },
        "diverged": not math.isfinite(journal.entries[-1]["loss"]),
        "scores": {
            split: {
                name: journal.score(f"{split}, {name}", compute)
                for name, compute in networks.scorers(
                    examples, mean_only=split == "selection"
                ).items()
            }
            for split, examples in data.items()
        },
        "epochs": journal.entries,
        "versions": versions(),
        "machine": machine(model),
    }


class Ticks(keras.callbacks.Callback):
    """Reports the work of each batch, so that all of them make up the whole."""

    def __init__(self, progress, work, examples, batch_size):
        super().__init__()
        self._progress = progress
        self._work = work / -(-examples // batch_size)

    def on_train_batch_end(self, batch, logs=None):
        self._progress(self._work)

    def on_predict_batch_end(self, batch, logs=None):
        self._progress(self._work)


def train_epoch(model, cell, epoch, train, *callbacks):
    """Train for one epoch, in an order that depends on its number alone."""
    generator = np.random.default_rng((cell.seed, epoch))
    order = generator.permutation(len(train))
    started, busy = time.perf_counter(), time.process_time()
    history = model.fit(
        {name: array[order] for name, array in train.x.items()},
        train.y[order],
        batch_size=cell.batch_size,
        shuffle=False,
        initial_epoch=epoch,
        epochs=epoch + 1,
        callbacks=list(callbacks),
        verbose=0,
    )
    return {
        "loss": float(history.history["loss"][0]),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - busy, 2),
    }


def compile_model(model, cell, steps, loss):
    optimizer = keras.optimizers.AdamW(
        LinearDecay(cell.learning_rate, steps, cell.warmup),
        weight_decay=cell.weight_decay,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    model.compile(optimizer=optimizer, loss=loss)


@keras.saving.register_keras_serializable("keras_lora_dropout_paper")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly from 0, and falls to 0 likewise.

    Args:
        rate: The highest rate.
        steps: Integer. Steps of the run.
        warmup: Steps of the rise, or their share of the run.
    """

    def __init__(self, rate, steps, warmup):
        self.rate, self.steps, self.warmup = rate, steps, warmup
        rise = warmup if warmup >= 1 else warmup * steps
        self._rise = min(max(rise, 1.0), steps)

    def __call__(self, step):
        # The step that is taken has the number `step + 1`.
        step = keras.ops.cast(step, "float32") + 1.0
        left = max(self.steps - self._rise, 1.0)
        rising = step / self._rise
        falling = (self.steps - step + 1.0) / left
        share = keras.ops.clip(keras.ops.minimum(rising, falling), 0.0, 1.0)
        return self.rate * share

    def get_config(self):
        return {"rate": self.rate, "steps": self.steps, "warmup": self.warmup}


class Networks:
    """The networks that a model stands for, and their scores.

    `mean` is the mean network, or a model without masks. `ensemble` averages
    masked instances, in probabilities (regression: in outputs); of plain LoRA
    it is `test_dropout`, the paper's Drop_test: masks that the training never
    saw.
    """

    def __init__(self, model, cell, problem, progress):
        self._model, self._cell = model, cell
        self._problem, self._progress = problem, progress

    def scorers(self, examples, mean_only=False):
        """Return functions that score networks on `Examples`, by their names.

        Args:
            examples: `Examples`.
            mean_only: Boolean. Whether the mean network is the only one.
        """
        scorers = {"mean": functools.partial(self._score_mean, examples)}
        name, model = (None, None) if mean_only else self._masked()
        if model is not None:
            scorers[name] = functools.partial(
                self._score_ensemble, model, examples
            )
        return scorers

    def _score_mean(self, examples):
        outputs = self._model.predict(examples.x, **self._options(examples))
        return self._problem.score(outputs, examples)

    def _score_ensemble(self, model, examples):
        average, count = self._problem.average, self._cell.num_samples
        outputs = model.ensemble_predict(
            examples.x,
            num_samples=count,
            average=average,
            seed=self._cell.seed,
            **self._options(examples, count),
        )
        return self._problem.score(
            outputs, examples, probabilities=average == "probability"
        )

    def _options(self, examples, instances=1):
        size, count = PREDICTION_BATCH_SIZE, len(examples)
        work = instances * len(examples.rows)
        ticks = Ticks(self._progress, work, count, size)
        return {"batch_size": size, "callbacks": [ticks], "verbose": 0}

    def _masked(self):
        if METHODS[self._cell.method].drops:
            return "ensemble", self._model
        if self._cell.method != "lora" or blocks_drop(self._cell):
            return None, None
        model = self._problem.build()
        METHODS["lora-dropout"].enable(model, self._cell, None)
        model.set_weights(self._model.get_weights())
        return "test_dropout", model


def training_cost(cell):
    """What a training row costs, in rows that are predicted."""
    method = METHODS[cell.method]
    instances = 1
    if method.drops and not cell.method.endswith("example"):
        instances = cell.num_samples
    # Its partner takes a forward pass where there is a single instance.
    return 3 * instances + bool(cell.consistency)


def work(cell, rows):
    """What a cell takes, in rows that are predicted."""
    task, masked = TASKS[cell.task], METHODS[cell.method].drops
    unseen = cell.method == "lora" and not blocks_drop(cell)
    instances = cell.num_samples if masked or unseen else 0
    evaluated = {
        split: len(rows[split]) * (1 + instances) for split in task.splits
    }
    evaluations = cell.epochs * cell.curves
    return (
        len(rows["train"]) * cell.epochs * training_cost(cell)
        + len(rows["selection"])
        + sum(evaluated.values())
        + evaluations * evaluated[task.splits[0]]
    )


def count_weights(model):
    """Count what trains, in all and in the backbone, and the whole model."""

    def count(variables):
        return sum(math.prod(variable.shape) for variable in variables)

    return {
        "trainable": count(model.trainable_weights),
        "backbone": count(model.backbone.trainable_weights),
        "total": count(model.weights),
    }


def versions():
    backend = importlib.import_module(keras.backend.backend())
    modules = (backend, keras, keras_hub, kld, np)
    return {module.__name__: module.__version__ for module in modules}


def machine(model):
    device = getattr(model.weights[0].value, "device", "")
    return f"{platform.machine()}, {os.cpu_count()} cores, device {device}"
