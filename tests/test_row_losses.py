"""One computation of a loss for all instances, where it is a mean over rows."""

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import assert_close
from helpers import classification_data
from keras import ops

from keras_lora_dropout.training import row_losses
from keras_lora_dropout.training.row_losses import is_mean_over_rows

ROWS, CLASSES = 10, 3


def spread(y_true, y_pred):
    """Compares each row with the mean of all."""
    distance = y_pred - ops.mean(y_pred, axis=0, keepdims=True)
    return ops.mean(ops.square(distance - y_true), axis=-1)


def target(loss):
    """Labels, or values in [0, 1] for each output."""
    if "Sparse" in type(loss).__name__ or "sparse" in str(loss):
        return classification_data()[1]
    values = np.random.default_rng(1).random((ROWS, CLASSES))
    return values.astype("float32")


def loss_of(loss, sampling, weighted):
    x, y = classification_data()[0], target(loss)
    metrics = ["mae"] if weighted and y.ndim > 1 else []
    model = adapted_mlp(
        {"loss": loss, "metrics": metrics}, num_samples=3, sampling=sampling
    )
    weight = np.linspace(0, 2, ROWS).astype("float32") if weighted else None
    logs = [
        model.train_on_batch(x, y, sample_weight=weight, return_dict=True)
        for _ in range(2)
    ]
    return model, [value for log in logs for value in log.values()]


def check(loss, rowwise, weighted=True):
    model, parallel = loss_of(loss, "parallel", weighted)
    assert is_mean_over_rows(model) == rowwise
    # One pass after another computes each instance's loss by itself.
    assert_close(parallel, loss_of(loss, "sequential", weighted)[1], 1e-5)


@pytest.mark.parametrize(
    "cls", row_losses._ROW_LOSSES, ids=lambda c: c.__name__
)
def test_losses_of_single_rows(cls):
    check(cls(), rowwise=True)


@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight"])
def test_other_means(reduction):
    check(keras.losses.MeanSquaredError(reduction=reduction), rowwise=True)


@pytest.mark.parametrize("name", ["mse", "sparse_categorical_crossentropy"])
def test_losses_by_name(name):
    check(name, rowwise=True, weighted=False)


OTHERS = {
    "sum": keras.losses.MeanSquaredError(reduction="sum"),
    "whole batch": keras.losses.Dice(),
    "function": spread,
    "axis": keras.losses.CategoricalCrossentropy(axis=0),
}


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_any_other_loss_is_computed_for_each_instance(loss):
    check(loss, rowwise=False, weighted=False)


class Doubled(keras.losses.MeanSquaredError):
    """A subclass may compute something else."""


def test_subclasses_are_other_losses():
    check(Doubled(), rowwise=False)


@pytest.mark.skipif(BACKEND != "torch", reason="counts torch's operations")
def test_the_number_of_operations_does_not_grow_with_n():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.total += 1
            return function(*args, **(kwargs or {}))

    def operations(num_samples):
        model = adapted_mlp({"metrics": ["accuracy"]}, num_samples=num_samples)
        data = classification_data()
        for _ in range(2):  # The first step builds the optimizer.
            model.train_on_batch(*data)
        with Count() as count:
            model.train_on_batch(*data)
        return count.total

    assert operations(16) == operations(2)
