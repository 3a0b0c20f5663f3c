"""Memory of long runs, measured in a process of its own; writes JSON.

`python long_runs.py training STEPS FOLDER` trains with validation and
checkpoints and writes a record for each epoch. `python long_runs.py ensemble
KIND ROWS...` writes how far the memory of the process rose above the inputs and
the result of `ensemble_predict`, for each number of rows.
"""

import gc
import json
import math
import pathlib
import resource
import sys

import keras
import numpy as np
import saved_models

import keras_lora_dropout as kld

EPOCH = 50  # Steps of an epoch.
BATCH = 250
MIB = 2**20
BACKEND = keras.config.backend()


def resident():
    """Bytes of memory that the process has now."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def peak():
    """Most bytes that the process had since `forget_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def live_tensors():
    """Number of tensors, or arrays of JAX, that are in memory."""
    gc.collect()
    if BACKEND == "jax":
        import jax

        return len(jax.live_arrays())
    import torch

    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


class Compilations:
    """Counts what JAX compiles; on PyTorch, nothing is compiled here."""

    def __init__(self):
        self.count = 0
        if BACKEND == "jax":
            import jax

            jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event, duration, **labels):
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Record(keras.callbacks.Callback):
    """Records the state of the process after each epoch."""

    def __init__(self):
        super().__init__()
        self.compilations = Compilations()
        self.records = []

    def on_epoch_end(self, epoch, logs=None):
        self.records.append(
            {
                "step": (epoch + 1) * EPOCH,
                "tensors": live_tensors(),
                "compiled": self.compilations.count,
                "mib": resident() / MIB,
            }
        )


def model_of(**options):
    keras.utils.set_random_seed(3)
    return saved_models.compiled(
        saved_models.enabled(saved_models.functional, **options)
    )


def training(steps, folder):
    x, y = saved_models.data(4 * EPOCH)
    record = Record()
    model_of(rank_budget=kld.RankBudget(1)).fit(
        x,
        y,
        batch_size=4,
        epochs=math.ceil(int(steps) / EPOCH),
        validation_data=(x[:16], y[:16]),
        callbacks=[
            keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
            keras.callbacks.BackupAndRestore(f"{folder}/backup"),
            kld.EnsembleEvaluation((x[:16], y[:16])),
            kld.TerminateOnNonFinite(every=10),
            record,
        ],
        verbose=0,
    )
    return record.records


class Rows(keras.utils.PyDataset):
    """Inputs that are made batch by batch."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __len__(self):
        return self.rows // BATCH

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        return generator.normal(size=(BATCH, 6)).astype("float32")


def inputs_of(kind, rows):
    data = Rows(rows)
    if kind == "array":
        return np.concatenate([data[i] for i in range(len(data))])
    if kind == "generator":
        return ((data[i],) for i in range(len(data)))
    return data


def predicted(model, kind, rows):
    inputs = inputs_of(kind, rows)
    batch_size = BATCH if kind == "array" else None
    gc.collect()
    before = resident()
    forget_peak()
    result = model.ensemble_predict(
        inputs, batch_size, num_samples=4, seed=0, verbose=0
    )
    assert result.shape == (rows, 3)
    return {
        "rows": rows,
        "result_mib": result.nbytes / MIB,
        "above_mib": (peak() - before - result.nbytes) / MIB,
    }


def ensemble(kind, *rows):
    model = model_of()
    predicted(model, kind, 20 * BATCH)  # Compiles, and fills the allocator.
    return [predicted(model, kind, int(count)) for count in rows]


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    results = {"training": training, "ensemble": ensemble}[task](*arguments)
    print(json.dumps(results))
