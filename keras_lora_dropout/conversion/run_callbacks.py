"""What `fit` does of its own when a run starts, and after each epoch."""

import json
import logging
import pathlib

import keras

from keras_lora_dropout.core.keras_internals import start_at_epoch
from keras_lora_dropout.training.backend import begin_run
from keras_lora_dropout.training.backend import finish_run

logger = logging.getLogger("keras_lora_dropout")


def with_run_callbacks(callbacks):
    """Put our callbacks around the user's.

    Args:
        callbacks: What `fit` takes: `None`, a callback, a list of them, or a
            `keras.callbacks.CallbackList`.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        given = keras.tree.flatten(callbacks or [])
        return [_BeforeOthers(given), *given, _AfterOthers()]
    # `fit` takes such a list as it is, and does not set it up again.
    given = callbacks.callbacks
    if not any(isinstance(callback, _AfterOthers) for callback in given):
        ours = _BeforeOthers(list(given)), _AfterOthers()
        for callback in ours:
            callback.set_params(callbacks.params)
            callback.set_model(callbacks.model)
        given.insert(0, ours[0])
        given.append(ours[1])
    return callbacks


class _BeforeOthers(keras.callbacks.Callback):
    """Counts epochs, so that weights saved by others know theirs."""

    def __init__(self, others):
        super().__init__()
        self.others = others

    def on_train_begin(self, logs=None):
        self.model._finished_epochs = 0
        self.model._restored_epochs = None
        start_at_epoch(self.model, None)  # Keras keeps that of an earlier run.
        for callback in self.others:
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                _drop_broken_metadata(callback)

    def on_epoch_end(self, epoch, logs=None):
        self.model._finished_epochs = epoch + 1

    def on_train_end(self, logs=None):
        finish_run(self.model)


class _AfterOthers(keras.callbacks.Callback):
    """Starts the run, once callbacks have restored an interrupted one.

    `keras.callbacks.BackupAndRestore` writes the weights first and the number
    of their epoch after them. A run that is killed in between would go through
    an epoch twice; so the weights say after which epoch they were written.
    """

    def on_train_begin(self, logs=None):
        if self.model._restored_epochs is not None:
            start_at_epoch(self.model, self.model._restored_epochs)
        self.model._go_on_with_random_states()
        self.model._start_schedule(self.params)
        begin_run(self.model, self.params)


def _drop_broken_metadata(callback):
    """Remove a file that a kill left half written; the weights know better."""
    path = pathlib.Path(callback.backup_dir) / "training_metadata.json"
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        logger.warning("Removed %s, which was written in part only.", path)
        path.unlink()
