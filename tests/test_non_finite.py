"""`TerminateOnNonFinite`: the step is named, and taken back."""

import logging

import keras
import numpy as np
import pytest
import saved_models
from helpers import BACKEND
from interrupted_training import adaptive_model
from interrupted_training import assert_steps_done
from interrupted_training import batches
from interrupted_training import fit

from keras_lora_dropout import TerminateOnNonFinite
from keras_lora_dropout import callbacks


@pytest.fixture(scope="module")
def model():
    return adaptive_model()


@pytest.fixture
def start(model, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "start.weights.h5"
    if not path.exists():
        model.save_weights(path)
    model.load_weights(path)
    return path


def poisoned(step, value=np.nan):
    for index, (x, y) in enumerate(batches()):
        yield (np.full_like(x, value) if index == step else x), y


def train(model, stop, data, steps=8, **options):
    """Train for so many steps in two epochs."""
    return fit(model, data, steps // 2, epochs=2, callbacks=[stop], **options)


@pytest.mark.parametrize("step", [0, 2, 5])
def test_the_step_is_named_and_taken_back(model, start, step, caplog):
    stop = TerminateOnNonFinite()
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        history = train(model, stop, poisoned(step))
    assert (stop.stopped_step, stop.good_step) == (step + 1, step)
    place = f"batch {step % 4 + 1} of epoch {step // 4 + 1}"
    assert f"ends at {place}, after {step + 1} optimizer steps" in caplog.text
    assert f"what it was after {step} steps" in caplog.text
    assert np.isnan(history.history["loss"][-1])
    assert_steps_done(model, start, step)


class Breaks(keras.callbacks.Callback):
    """What a gradient that overflows does: the loss before it is finite."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            if BACKEND == "jax":
                self.model.jax_state_sync()
            self.model.trainable_variables[0].assign_add(np.inf)


def test_a_loss_that_hides_broken_weights(model, start, caplog):
    stop = TerminateOnNonFinite()
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        history = fit(model, batches(), 4, callbacks=[Breaks(), stop])
    assert np.isfinite(history.history["loss"]).all()
    assert "what trains is not finite" in caplog.text
    assert_steps_done(model, start, 2)


def test_it_looks_every_so_many_batches_and_at_the_last(model, start):
    stop = TerminateOnNonFinite(every=3)
    train(model, stop, poisoned(5))
    # It looked after the batches 3 and 4 of the first epoch.
    assert (stop.stopped_step, stop.good_step) == (7, 4)
    assert_steps_done(model, start, 4)


def test_what_comes_later_sees_what_was_put_back(model, start, tmp_path):
    stop = TerminateOnNonFinite(every=3)  # And at the last batch.
    path = tmp_path / "last.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    x, y = saved_models.data()
    history = fit(
        model,
        poisoned(3),
        4,
        callbacks=[stop, checkpoint],
        validation_data=(x, y),
    )
    assert np.isfinite(history.history["val_loss"]).all()
    model.load_weights(path)
    assert_steps_done(model, start, 3)


def test_without_restore_the_weights_stay(model, start, caplog):
    stop = TerminateOnNonFinite(restore=False)
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        train(model, stop, poisoned(2))
    assert (stop.stopped_step, stop.good_step) == (3, 2)
    assert "All was finite after 2 steps" in caplog.text
    x, _ = saved_models.data()
    assert np.isnan(model.predict(x, verbose=0)).any()


def test_a_model_that_starts_broken(model, start, caplog):
    variable = model.trainable_variables[0]
    variable.assign(np.full(variable.shape, np.nan))
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        train(model, TerminateOnNonFinite(), batches())
    assert "not finite before the first step, either" in caplog.text


def test_a_run_without_trouble_is_the_same(model, start):
    stop = TerminateOnNonFinite()
    fit(model, batches(), 6, callbacks=[stop])
    assert (stop.stopped_step, stop.good_step) == (None, 6)
    assert_steps_done(model, start, 6)


def test_frozen_weights_are_not_copied(model):
    copied = {id(v) for v in callbacks._changed_by_training(model)}
    wanted = model.trainable_variables + model.optimizer.variables
    wanted += list(model.rank_allocator.variables.values())
    wanted += [model.mask_seed_generator.state]
    assert copied.issuperset(map(id, wanted))
    for _, layer in model.adapted_layers:
        assert id(layer.kernel) not in copied


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`every`"):
        TerminateOnNonFinite(every=0)
    with pytest.raises(TypeError, match="`restore`"):
        TerminateOnNonFinite(restore="yes")
