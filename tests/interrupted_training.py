"""Training that an interrupt or an error ends, to compare with one that ends.

Run as a program, it trains until it is interrupted, as many times as its
argument says, and writes one line for each: `fitting` when the training starts,
then how many steps were done, and `same` if the model is what so many steps
make of it when nobody interrupts.
"""

import itertools
import os
import signal
import sys

import keras
import numpy as np
import saved_models

import keras_lora_dropout as kld

BATCH = 4
MANY = 10**6


def batches():
    """Yield batches without end, the same ones each time."""
    x, y = saved_models.data()
    for start in itertools.cycle(range(0, len(x), BATCH)):
        yield x[start : start + BATCH], y[start : start + BATCH]


def adaptive_model(**options):
    """A model with dropout, running statistics and ranks that adapt."""
    keras.utils.set_random_seed(3)
    budget = kld.RankBudget(1, total_steps=40)
    model = saved_models.enabled(
        saved_models.functional, rank_budget=budget, **options
    )
    saved_models.compiled(model)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, data, steps=MANY, **options):
    return model.fit(
        data, steps_per_epoch=steps, shuffle=False, verbose=0, **options
    )


def state(model):
    """All numbers that go on: weights, optimizer, masks, dropout, ranks."""
    started_anew = {id(v) for v in model.metrics_variables}
    return [
        keras.ops.convert_to_numpy(variable)
        for variable in model.variables + model.optimizer.variables
        if id(variable) not in started_anew
    ]


def assert_steps_done(model, start, steps=None):
    """Assert that a model is what whole steps make of it, and can go on.

    Args:
        model: The model, after a run from the weights in a file.
        start: Path of that file.
        steps: The expected number of steps; `None` for any.

    Returns:
        The number of steps.
    """
    done = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    assert steps in (None, done), done
    x, _ = saved_models.data()
    found = [*state(model), *saved_models.outputs(model, x)]
    model.load_weights(start)
    if done:
        fit(model, batches(), done)
    expected = [*state(model), *saved_models.outputs(model, x)]
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    return done


def main(path, rounds):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = adaptive_model()
    fit(model, batches(), 3)  # Compiles.
    model.load_weights(path)
    for _ in range(int(rounds)):
        print("fitting", flush=True)
        try:
            fit(model, batches())
        except KeyboardInterrupt:
            print(assert_steps_done(model, path), "same", flush=True)
            model.load_weights(path)
    # Keras hands callbacks to threads. One whose lock an interrupt has left
    # locked waits for ever, and Python would wait for it.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
