"""Ctrl-C, and errors of the data: whole steps are kept, and nothing else."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import interrupted_training
import keras
import numpy as np
import pytest
import saved_models
from helpers import BACKEND
from interrupted_training import adaptive_model
from interrupted_training import assert_steps_done
from interrupted_training import batches
from interrupted_training import fit

from keras_lora_dropout.core import masks
from keras_lora_dropout.core.interrupts import interrupts_held

PROGRAM = pathlib.Path(interrupted_training.__file__)
INTERRUPTS = 60 if os.environ.get("ALL_MODELS") else 6


@pytest.fixture(autouse=True)
def heard_interrupts():
    """Take Ctrl-C, which what a script starts with `&` is told to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Path of the weights that runs start from."""
    path = tmp_path_factory.mktemp("start") / "start.weights.h5"
    adaptive_model().save_weights(path)
    return path


def test_interrupts_from_outside_leave_whole_steps(
    start, record_testsuite_property
):
    choose = random.Random(5)
    with subprocess.Popen(
        [sys.executable, PROGRAM, start, str(INTERRUPTS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(INTERRUPTS):
            line = process.stdout.readline()
            assert line == "fitting\n", process.communicate()
            time.sleep(choose.uniform(0, 0.3))
            process.send_signal(signal.SIGINT)
            line = process.stdout.readline()
            assert line.endswith("same\n"), process.communicate()
        assert process.wait(60) == 0
    record_testsuite_property("interrupts", INTERRUPTS)


class Trouble(Exception):
    """Nothing that the package knows of."""


@pytest.fixture(scope="module")
def model():
    return adaptive_model()


def broken(step, error):
    for index, batch in enumerate(batches()):
        if index == step:
            raise error
        yield batch


class BrokenDataset(keras.utils.PyDataset):
    """Data that Keras asks for by index."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise Trouble
        x, y = saved_models.data()
        return x[:4], y[:4]


def assert_scopes_closed(model):
    assert masks.current_draws() is None
    assert model._request is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_an_error_of_the_data_leaves_whole_steps(model, start, step, error):
    model.load_weights(start)
    with pytest.raises(error):
        fit(model, broken(step, error))
    assert_scopes_closed(model)
    assert_steps_done(model, start, step)


@pytest.mark.skipif(BACKEND != "jax", reason="one step there, or no error")
def test_an_error_between_the_steps_of_one_execution(start):
    model = adaptive_model()
    # The three-step execution that fails has done two of them.
    model.steps_per_execution = 3
    with pytest.raises(Trouble):
        fit(model, broken(5, Trouble), 6)
    assert_scopes_closed(model)
    model.steps_per_execution = 1
    model.make_train_function(force=True)
    assert_steps_done(model, start, 5)


class Fails(keras.callbacks.Callback):
    """Lets the loss fail from the first batch on."""

    now = False

    def on_train_batch_begin(self, batch, logs=None):
        self.now = True

    def loss(self, y, outputs):
        if self.now:
            raise Trouble
        return saved_models.LOSS(y, outputs)


def test_an_error_of_the_first_step_leaves_the_optimizer(start):
    model, fails = adaptive_model(), Fails()
    optimizer = model.optimizer
    model.compile(optimizer, fails.loss)
    with pytest.raises(Trouble):
        fit(model, batches(), 2, callbacks=[fails])
    assert_scopes_closed(model)
    model.compile(optimizer, saved_models.LOSS, metrics=["accuracy"])
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 0
    if keras.config.backend() == "jax":  # Others draw masks as they go.
        assert_steps_done(model, start, 0)
    fit(model, batches(), 2)


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise KeyboardInterrupt

    def on_predict_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


def test_an_interrupt_in_a_callback(model, start):
    model.load_weights(start)
    with pytest.raises(KeyboardInterrupt):
        fit(model, batches(), callbacks=[Interrupt()])
    assert_scopes_closed(model)
    assert_steps_done(model, start, 3)


@pytest.mark.parametrize("method", ["predict", "ensemble_predict"])
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
def test_predictions_that_end_early_leave_the_model(model, method, error):
    x, _ = saved_models.data()
    before = saved_models.outputs(model, x)
    options = {"x": BrokenDataset()}
    if error is KeyboardInterrupt:
        options = {"x": x, "batch_size": 4, "callbacks": [Interrupt()]}
    with pytest.raises(error):
        getattr(model, method)(**options)
    assert_scopes_closed(model)
    after = saved_models.outputs(model, x)
    np.testing.assert_array_equal(after, before)


def test_data_by_index_ends_early(model, start):
    model.load_weights(start)
    with pytest.raises(Trouble):
        model.fit(BrokenDataset(), shuffle=False, verbose=0)
    assert_scopes_closed(model)
    fit(model, batches(), 2)


def test_a_held_interrupt_comes_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_not_held():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGINT)
            done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
