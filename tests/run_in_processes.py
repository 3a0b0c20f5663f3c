"""What several processes do together, each writing files of its own.

`torchrun --nproc-per-node P run_in_processes.py FOLDER` does the runs that the
variable `RUNS` names, or all. The test imports it as well, and does some of
them in a single process.
"""

import os
import pathlib
import sys

import dropping_models
import keras
import numpy as np
import torch
from helpers import classification_data
from torch import distributed
from training_in_processes import BATCH
from training_in_processes import EXAMPLES
from training_in_processes import LOSS
from training_in_processes import SAME
from training_in_processes import first_half
from training_in_processes import fit
from training_in_processes import model_of
from training_in_processes import own
from training_in_processes import process
from training_in_processes import second_half
from training_in_processes import state
from training_in_processes import whole

import keras_lora_dropout as kld
from keras_lora_dropout.training.backend import torch_processes

# What only several processes do


def missing_gradients():
    """One process has no gradient of the second weight, none of the third."""
    rank, count = process()
    weights = [keras.Variable(np.zeros(n, "float32")) for n in (2, 3, 1)]
    gradients = [torch.full((2,), 1.0 + rank), torch.ones(3), None]
    if rank == 0:
        gradients[1] = None
    share = torch_processes.BatchShare(range(1, count + 1), rank)
    means, losses = torch_processes.averaged(
        weights, gradients, {"loss": torch.tensor(float(rank))}, share
    )
    assert means[2] is None
    return {"0": means[0], "1": means[1], "loss": losses["loss"]}


class Recorded(keras.layers.Layer):
    """Keeps what it was last called on."""

    def call(self, x):
        self.last = x.detach()
        return x


def ordinary_dropout():
    """What Keras's dropout, unseeded and seeded, keeps of equal rows."""
    seen = [Recorded(), Recorded(), Recorded()]
    x = inputs = keras.Input((6,))
    for drop, record in zip(
        (
            keras.layers.Dropout(0.5),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.GaussianNoise(1.0),
        ),
        seen,
        strict=True,
    ):
        x = record(drop(x))
        x = keras.layers.Lambda(keras.ops.ones_like)(x)
    outputs = keras.layers.Dense(3, name="head")(
        keras.layers.Dense(8, name="hidden")(x)
    )
    model = kld.enable_lora_dropout(
        keras.Model(inputs, outputs), rank=2, seed=0
    )
    model.compile("sgd", LOSS)
    ones = np.ones((EXAMPLES, 6), "float32"), np.zeros(EXAMPLES, int)
    fit(model, ones, epochs=2)
    drawn = {str(i): record.last for i, record in enumerate(seen)}
    return {**drawn, "states": model._random_states()}


def transformer_dropout():
    """The rows of the processes are alike, but for what they drop."""
    model = dropping_models.adapted(num_samples=2)
    kld.enable_transformer_dropout(model, hidden=kld.HiddenCut(0.5))
    outputs = []

    def loss(y_true, y_pred):
        outputs.append(y_pred.detach())
        return keras.losses.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=True
        )

    dropping_models.compiled(model, loss)
    x, y = dropping_models.batch(1)
    model.train_on_batch(x, y)
    return {"outputs": outputs[-1]}


def checkpoints_of_all(folder):
    """All processes write the same file, at the same time."""
    model = model_of(adaptive=True)
    save = keras.callbacks.ModelCheckpoint(f"{folder}/model.keras")
    fit(model, callbacks=[save], epochs=5)
    return state(model)


# What is refused, in all processes at once


def endless(batches):
    """Data of which `fit` does not know the length."""
    x, y = classification_data(BATCH)
    for _ in range(batches):
        yield own(x), own(y)


def other_seed():
    fit(model_of(seed=process()[0]))


def other_weights():
    model = model_of()
    if process()[0] == 1:
        head = model.get_layer("head").kernel
        head.assign(head + 1e-7)
    fit(model)


def other_settings():
    fit(model_of(dropout_rate=0.5 + 0.1 * process()[0]))


def other_learning_rate():
    fit(model_of(optimizer=keras.optimizers.SGD(0.1 + process()[0])))


def other_sizes():
    fit(model_of(num_samples=1, rank=1 + process()[0]))


def other_number_of_batches():
    rank, _ = process()
    x, y = classification_data(EXAMPLES)
    fit(model_of(), (x[rank * 12 :], y[rank * 12 :]), batch_size=2)


def other_number_of_adaptive_layers():
    names = ["first", "second"][: 1 + process()[0]]
    fit(model_of(target_layers=names))


def ends_of_data():
    model = model_of()
    model.fit(endless(2 + process()[0]), verbose=0)


def stops_alone():
    model = model_of()
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(
            model, "stop_training", process()[0] == 0
        )
    )
    fit(model, callbacks=[stop])


def evaluates_alone():
    model = model_of()
    x, y = classification_data(EXAMPLES)
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (
            process()[0] or model.evaluate(x, y, verbose=0)
        )
    )
    fit(model, callbacks=[evaluate])


def summed_loss():
    loss = keras.losses.SparseCategoricalCrossentropy(True, reduction="sum")
    fit(model_of(compile_options={"loss": loss}))


def batch_normalization():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="hidden")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    outputs = keras.layers.Dense(3, name="head")(x)
    model = kld.enable_lora_dropout(
        keras.Model(inputs, outputs),
        rank=2,
        seed=0,
        trainable_layers=["norm", "head"],
    )
    model.compile("sgd", LOSS)
    fit(model)


REFUSED = [
    other_seed,
    other_weights,
    other_settings,
    other_learning_rate,
    other_sizes,
    other_number_of_batches,
    other_number_of_adaptive_layers,
    ends_of_data,
    stops_alone,
    evaluates_alone,
    summed_loss,
    batch_normalization,
]


def refused(run):
    try:
        run()
    except ValueError as error:
        return {"message": str(error)}
    return {"message": "none"}


def trains_alone():
    """Each process trains a model of its own, in a group of several."""
    model = model_of(seed=process()[0])
    model.train_across_processes = False
    x, y = classification_data(EXAMPLES)
    history = model.fit(
        x, y, batch_size=4, epochs=1 + process()[0], shuffle=False, verbose=0
    ).history
    results = model.evaluate(x, y, verbose=0, return_dict=True)
    assert results.keys() == history.keys()
    return state(model, history)


def evaluates_own_rows():
    """Outside of `fit`, each process evaluates what it is given."""
    model = model_of()
    fit(model, epochs=1)
    x, y = classification_data(EXAMPLES)
    rank, _ = process()
    loss, *_ = model.evaluate(x[: 5 + rank], y[: 5 + rank], verbose=0)
    return {"loss": loss}


def gives_up():
    """An error ends one process, in the midst of a step of all."""
    step = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            process()[0] == 0 or sys.exit("process 1 gives up")
        )
    )
    fit(model_of(), callbacks=[step])


def write(folder, name, arrays):
    arrays = {
        key: keras.ops.convert_to_numpy(value)
        if torch.is_tensor(value)
        else np.asarray(value)
        for key, value in arrays.items()
    }
    np.savez(folder / f"{name}-{process()[0]}.npz", **arrays)


def run(folder, names):
    """Do the runs of the given names, in the folder of the test."""
    runs = {
        **SAME,
        **{
            call.__name__: (lambda call=call: refused(call)) for call in REFUSED
        },
        **{
            call.__name__: call
            for call in (
                missing_gradients,
                ordinary_dropout,
                transformer_dropout,
                trains_alone,
                evaluates_own_rows,
            )
        },
        "checkpoints_of_all": lambda: checkpoints_of_all(folder),
        "whole": whole,
        "first_half": lambda: first_half(folder / "backup"),
        "second_half": lambda: second_half(folder / "given"),
        "gives_up": gives_up,
    }
    for name in names or runs:
        keras.utils.set_random_seed(1)
        write(folder, name, runs[name]())


def main():
    folder = pathlib.Path(sys.argv[1])
    distributed.init_process_group("gloo")
    try:
        run(folder, os.environ.get("RUNS", "").split())
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
