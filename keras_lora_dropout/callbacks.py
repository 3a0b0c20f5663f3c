"""Callbacks for models with LoRA Dropout."""

import logging

import keras
from keras import ops

from keras_lora_dropout.conversion.trainable import own_weights
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter

logger = logging.getLogger("keras_lora_dropout")


class EnsembleEvaluation(keras.callbacks.Callback):
    """Evaluates the ensemble at the end of each epoch.

    Calls `ensemble_evaluate` and adds its results to the epoch's logs, as
    `ensemble_val_loss`, `ensemble_val_accuracy` and so on, where later
    callbacks (`EarlyStopping(monitor="ensemble_val_loss")`), the progress bar
    and the history find them.

    Args:
        validation_data: Tuple `(x, y)` or `(x, y, sample_weight)`, or a data
            set, as in `fit`.
        num_samples: Positive integer or `None` for the model's own N.
        batch_size: Integer or `None`, as in `evaluate`.
        seed: Integer or `None`. Defaults to 0: each epoch is measured with the
            same masks, so that curves show the model and not the draw.
        average: `"output"` or `"probability"`, as in `ensemble_evaluate`.

    Raises:
        ValueError: If the validation data are empty, or an argument is out of
            range.
        TypeError: If the seed is no integer; when training starts, if the model
            has no ensemble.

    Example:

    >>> model = enable_lora_dropout(keras.Sequential([
    ...     keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)
    ... ]), rank=1)
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((4, 3)), np.ones((4, 1))
    >>> history = model.fit(
    ...     x, y, callbacks=[EnsembleEvaluation((x, y))], verbose=0
    ... )
    >>> sorted(history.history)
    ['ensemble_val_loss', 'loss']
    """

    def __init__(
        self,
        validation_data,
        num_samples=None,
        *,
        batch_size=None,
        seed=0,
        average="output",
    ):
        super().__init__()
        validation.not_empty("validation_data", validation_data)
        if num_samples is not None:
            num_samples = validation.num_samples(num_samples)
        self.validation_data = validation_data
        self.options = {
            "num_samples": num_samples,
            "batch_size": validation.batch_size(batch_size),
            "seed": validation.seed(seed),
            "average": validation.word("average", average, validation.AVERAGES),
        }

    def on_train_begin(self, logs=None):
        if not hasattr(self.model, "ensemble_evaluate"):
            raise TypeError(
                "`EnsembleEvaluation` needs a model with LoRA Dropout. Call "
                "`enable_lora_dropout(model)` or build a `LoRADropoutModel`. "
                f"Received: a model of type {type(self.model).__name__}."
            )

    def on_epoch_end(self, epoch, logs=None):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            self.validation_data
        )
        results = self.model.ensemble_evaluate(
            x,
            y,
            sample_weight=sample_weight,
            verbose=0,
            return_dict=True,
            **self.options,
        )
        if logs is not None:
            for name, value in results.items():
                logs[f"ensemble_val_{name}"] = value


class TerminateOnNonFinite(keras.callbacks.Callback):
    """Stops the training at a NaN or infinity, and takes its step back.

    After a batch, it looks at the loss and at all that trains: weights, the
    optimizer's state, and what layers and the rank schedule keep track of. If
    some of it is not finite, it says at which step, puts back what the last
    good step left, and ends the training. `keras.callbacks.TerminateOnNaN`
    looks at the loss alone, which shows a broken weight one step late, and
    keeps the broken weights.

    Callbacks that come later in the list, such as `ModelCheckpoint`, and the
    validation see what was put back; the logs of the epoch hold the loss as it
    was.

    Cost: at each batch looked at, JAX and PyTorch wait for the step to end, and
    what trains is copied on the device; it is held twice. Frozen weights are
    not copied.

    Args:
        every: Positive integer. Look at every so many batches, and at the last
            of an epoch. What is put back can be so many batches old. Defaults
            to 1.
        restore: Boolean. Whether to keep a copy and put it back. Without it,
            the weights stay as the last step left them.

    Attributes:
        stopped_step: Integer, the number of optimizer steps when it stopped the
            training; `None` if it did not.
        good_step: Integer, the number of optimizer steps when all was finite
            for the last time.

    Raises:
        ValueError: If `every` is no positive integer.
        TypeError: If `restore` is no boolean.

    Example:

    >>> model = enable_lora_dropout(keras.Sequential([
    ...     keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)
    ... ]), rank=1)
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((8, 3)), np.ones((8, 1))
    >>> x[5] = np.nan
    >>> stop = TerminateOnNonFinite()
    >>> history = model.fit(
    ...     x, y, batch_size=2, shuffle=False, callbacks=[stop], verbose=0
    ... )
    >>> stop.stopped_step, stop.good_step
    (3, 2)
    >>> bool(np.isfinite(model.predict(x[:5], verbose=0)).all())
    True
    """

    def __init__(self, every=1, restore=True):
        super().__init__()
        self.every = validation.positive_integer("every", every)
        self.restore = validation.boolean("restore", restore)
        self._epoch = 0

    def on_train_begin(self, logs=None):
        self.stopped_step = self.good_step = None
        self._good_values = None
        self._variables = _changed_by_training(self.model)
        self._look({}, "the start")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._unseen = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        self._unseen += 1
        is_last = batch + 1 == self.params.get("steps")
        if self._unseen >= self.every or is_last:
            self._look(logs, f"batch {batch + 1} of epoch {self._epoch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        if self._unseen:
            self._look(logs, f"the end of epoch {epoch + 1}")

    def _look(self, logs, where):
        self._unseen = 0
        if self.stopped_step is not None:
            return
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # In `fit`, variables are empty there.
        values = [ops.stop_gradient(v.value) for v in self._variables]
        step = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        losses = [value for name, value in logs.items() if "loss" in name]
        if _all_finite(losses) and _all_finite(values):
            self.good_step = step
            if self.restore:
                self._good_values = [ops.copy(value) for value in values]
            return
        self.stopped_step = step
        self.model.stop_training = True
        if self._good_values is not None:
            for variable, value in zip(
                self._variables, self._good_values, strict=True
            ):
                variable.assign(value)
        logger.warning(
            "The training of model %r ends at %s, after %d optimizer steps: %s "
            "not finite. %s",
            self.model.name,
            where,
            step,
            "what trains is" if _all_finite(losses) else "the loss is",
            self._outcome(),
        )

    def _outcome(self):
        if self.good_step is None:
            return "It was not finite before the first step, either."
        if self._good_values is None:
            return f"All was finite after {self.good_step} steps."
        return f"The model is what it was after {self.good_step} steps."


def _changed_by_training(model):
    """Variables that a step may change; frozen weights are left out."""
    left_out = {id(variable) for variable in model.metrics_variables}
    for layer in descendants(model):
        if isinstance(layer, LoRADropoutAdapter) or not layer.trainable:
            own = [v for v in own_weights(layer) if not v.trainable]
            left_out.update(map(id, own))
    variables = model.variables + model.optimizer.variables
    return [v for v in variables if id(v) not in left_out]


def _all_finite(values):
    checks = [ops.all(ops.isfinite(value)) for value in values]
    return all(bool(ops.convert_to_numpy(check)) for check in checks)
