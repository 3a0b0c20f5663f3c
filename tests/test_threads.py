"""Threads that share a model: each gets what it would get alone."""

import concurrent.futures
import copy
import gc
import logging
import pickle
import sys
import threading

import keras
import language_models
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data

from keras_lora_dropout.core import turns

X, Y = classification_data(32)
ROUNDS = 6


@pytest.fixture(autouse=True)
def threads_change_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def side_by_side(*functions):
    """Call each function ROUNDS times in a thread of its own, all at once.

    Returns:
        For each function, the list of its results.
    """
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return [function() for _ in range(ROUNDS)]

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions, timeout=240))


def predictions_of(model):
    """Functions that predict in all ways, each with a fixed answer."""
    options = {"batch_size": 4, "verbose": 0}

    def bare():
        with model.disable_adapters():
            return model.predict(X, **options)

    return [
        lambda: model.predict(X, **options),
        lambda: model.ensemble_predict(X, seed=1, **options),
        lambda: model.ensemble_predict(X, seed=2, num_samples=3, **options),
        lambda: model.ensemble_evaluate(X, Y, seed=1, **options),
        lambda: model.evaluate(X, Y, **options),
        lambda: model.predict_on_batch(X[:4]),
        bare,
    ]


def test_predictions_and_ensembles_at_once():
    model = adapted_mlp(num_samples=2)
    functions = predictions_of(model)
    expected = [function() for function in functions]
    results = side_by_side(*functions)
    for found, alone in zip(results, expected, strict=True):
        for result in found:
            np.testing.assert_array_equal(result, alone)


def test_predictions_while_it_trains_are_those_of_a_whole_run():
    model = adapted_mlp(num_samples=2)
    predict, ensemble, *_ = predictions_of(model)
    known = [(predict(), ensemble())]
    twin = adapted_mlp(num_samples=2)

    def fit(model):
        model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)

    for _ in range(ROUNDS):
        fit(twin)
        known.append([f() for f in predictions_of(twin)[:2]])
    _, *found = side_by_side(lambda: fit(model), predict, ensemble)
    for kind in range(2):
        choices = [answers[kind].tobytes() for answers in known]
        positions = [choices.index(a.tobytes()) for a in found[kind]]
        assert positions == sorted(positions)


def test_texts_and_predictions_at_once():
    model = language_models.adapted("llama", num_samples=2)
    model.compile(sampler="greedy")
    prompts = ["the quick", "a brown fox"]
    functions = [
        lambda: model.generate(prompts, 12),
        lambda: model.ensemble_generate(prompts, 12, seed=3),
    ]
    expected = [function() for function in functions]
    for found, alone in zip(side_by_side(*functions), expected, strict=True):
        assert found == [alone] * ROUNDS


class CallingElsewhere(keras.callbacks.Callback):
    """Calls the model in another thread while an ensemble is computed."""

    def on_predict_begin(self, logs=None):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: self.model(X))
            self.outputs = keras.ops.convert_to_numpy(call.result(60))


def test_a_call_in_another_thread_is_no_ensemble():
    model = adapted_mlp(num_samples=2)
    expected = keras.ops.convert_to_numpy(model(X))
    other = CallingElsewhere()
    model.ensemble_predict(X, seed=1, callbacks=[other], verbose=0)
    np.testing.assert_array_equal(other.outputs, expected)


class Predicting(keras.callbacks.Callback):
    """A callback that predicts with the model that trains."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.predict(X, verbose=0)
        self.model.ensemble_predict(X, verbose=0)


def test_a_callback_predicts_in_the_turn_of_fit():
    model = adapted_mlp(num_samples=2)
    model.fit(X, Y, epochs=2, callbacks=[Predicting()], verbose=0)


def test_models_that_were_used_are_copied_and_saved(tmp_path):
    model = adapted_mlp(num_samples=2)
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        keras.saving.load_model(tmp_path / "model.keras"),
    ]
    with turns.turn_of(model):  # Copies do not wait for the original.
        for found in side_by_side(
            *(lambda m=m: m.predict(X, verbose=0) for m in copies)
        ):
            np.testing.assert_array_equal(found[0], expected)


def test_the_turn_goes_with_the_model():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    before = len(turns._locks)
    with turns.turn_of(model):
        assert len(turns._locks) == before + 1
    del model
    gc.collect()
    assert len(turns._locks) <= before


def test_a_thread_that_waits_long_says_so(monkeypatch, caplog):
    monkeypatch.setattr(turns, "_PATIENCE", 0.05)
    model = adapted_mlp(num_samples=2)
    waiting = threading.Thread(
        target=lambda: model.predict(X, verbose=0), name="second"
    )
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        with turns.turn_of(model):
            waiting.start()
            waiting.join(1)
            assert waiting.is_alive()
        waiting.join(60)
    assert not waiting.is_alive()
    assert 'Thread "second" waits' in caplog.text
