"""Calibration metrics against definitions written out in NumPy."""

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import assert_close
from helpers import classification_data
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lora_dropout import BrierScore
from keras_lora_dropout import ExpectedCalibrationError

METRICS = [ExpectedCalibrationError, BrierScore]


def reference(confidence, correct, weight=None, num_bins=15):
    """Guo et al. 2017, Eq. 3, one bin after another."""
    confidence = np.asarray(confidence, "float64")
    weight = np.ones_like(confidence) if weight is None else weight
    total = 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = (confidence > low) & (confidence <= high)
        if b == 0:
            inside |= confidence <= 0
        if weight[inside].sum() > 0:
            accuracy = np.average(correct[inside], weights=weight[inside])
            mean = np.average(confidence[inside], weights=weight[inside])
            share = weight[inside].sum() / weight.sum()
            total += share * abs(accuracy - mean)
    return total


def random_predictions(examples=200, classes=4, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (examples, classes)).astype("float32")
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return generator.integers(0, classes, examples), probabilities, logits


def measured(
    y_true, y_pred, sample_weight=None, cls=ExpectedCalibrationError, **options
):
    metric = cls(**options)
    metric.update_state(y_true, y_pred, sample_weight)
    return keras.ops.convert_to_numpy(metric.result())


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_multi_class(num_bins):
    labels, probabilities, logits = random_predictions()
    expected = reference(
        probabilities.max(axis=1),
        probabilities.argmax(axis=1) == labels,
        num_bins=num_bins,
    )
    assert expected > 0.01
    for y_true in (labels, labels[:, None], np.eye(4)[labels]):
        assert_close(
            measured(y_true, probabilities, num_bins=num_bins), expected
        )
    assert_close(
        measured(labels, logits, num_bins=num_bins, from_logits=True), expected
    )


def test_binary():
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, 300).astype("float32")
    p = 1 / (1 + np.exp(-logits))
    labels = (generator.uniform(size=300) < p**2).astype("int32")
    expected = reference(np.maximum(p, 1 - p), (p > 0.5) == labels)
    for y_true, y_pred in (
        (labels, p),
        (labels, p[:, None]),
        (labels[:, None], p[:, None]),
        (labels.astype("float32"), p),
    ):
        assert_close(measured(y_true, y_pred), expected)
    assert_close(measured(labels, logits, from_logits=True), expected)
    # Two classes written out are the same thing.
    assert_close(measured(labels, np.stack([1 - p, p], axis=1)), expected)


def test_by_hand():
    # Confidences 0.75, 0.75: one right, one wrong; |0.5 - 0.75| = 0.25.
    assert_close(measured([0, 0], [[0.75, 0.25], [0.25, 0.75]]), 0.25)
    # Always sure, always right; always sure, always wrong.
    assert_close(measured([0, 1], np.eye(2)), 0.0)
    assert_close(measured([1, 0], np.eye(2)), 1.0)


def brier(y_true, y_pred, sample_weight=None, **options):
    return measured(y_true, y_pred, sample_weight, BrierScore, **options)


def test_brier_score_of_several_classes():
    labels, probabilities, logits = random_predictions()
    expected = np.mean(((probabilities - np.eye(4)[labels]) ** 2).sum(1))
    for y_true in (labels, labels[:, None], np.eye(4)[labels]):
        assert_close(brier(y_true, probabilities), expected)
    assert_close(brier(labels, logits, from_logits=True), expected)


def test_brier_score_of_two_classes():
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, 300).astype("float32")
    p = 1 / (1 + np.exp(-logits))
    labels = generator.integers(0, 2, 300)
    expected = 2 * np.mean((p - labels) ** 2)
    for y_true, y_pred in ((labels, p), (labels[:, None], p[:, None])):
        assert_close(brier(y_true, y_pred), expected)
    assert_close(brier(labels, logits[:, None], from_logits=True), expected)
    assert_close(brier(labels, np.stack([1 - p, p], axis=1)), expected)


def test_brier_score_is_proper():
    """In expectation, none but the true probabilities score best."""
    truth = np.array([0.2, 0.5, 0.3], "float32")
    labels = np.repeat(np.arange(3), [200, 500, 300])
    best = brier(labels, np.tile(truth, (1000, 1)))
    generator = np.random.default_rng(0)
    for other in generator.dirichlet([1, 1, 1], 20).astype("float32"):
        assert brier(labels, np.tile(other, (1000, 1))) > best


@pytest.mark.parametrize("cls", METRICS)
def test_streaming_equals_one_batch_and_reset_forgets(cls):
    labels, probabilities, _ = random_predictions()
    metric = cls()
    for start in range(0, 200, 33):
        rows = slice(start, start + 33)
        metric.update_state(labels[rows], probabilities[rows])
    expected = measured(labels, probabilities, cls=cls)
    assert_close(metric.result(), expected)
    metric.reset_state()
    assert_close(metric.result(), 0.0)


@pytest.mark.parametrize("cls", METRICS)
def test_sample_weights(cls):
    labels, probabilities, _ = random_predictions()
    weight = np.random.default_rng(2).integers(0, 3, 200).astype("float32")
    repeated = np.repeat(np.arange(200), weight.astype(int))
    expected = measured(labels[repeated], probabilities[repeated], cls=cls)
    for weights in (weight, weight[:, None]):
        assert_close(measured(labels, probabilities, weights, cls), expected)


@pytest.mark.parametrize("cls", METRICS)
def test_several_positions_per_example(cls):
    labels, probabilities, _ = random_predictions(examples=60)
    weight = np.linspace(0, 1, 60).astype("float32")
    expected = measured(labels, probabilities, weight, cls)
    shaped = measured(
        labels.reshape(6, 10),
        probabilities.reshape(6, 10, 4),
        weight.reshape(6, 10),
        cls,
    )
    assert_close(shaped, expected)


@settings(max_examples=25, deadline=None)
@given(
    probabilities=st.lists(
        st.floats(0.0, 1.0, width=32), min_size=1, max_size=30
    ),
    seed=st.integers(0, 100),
)
def test_stays_between_zero_and_one_in_any_order(probabilities, seed):
    p = np.array(probabilities, "float32")
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, len(p))
    value = measured(labels, p)
    assert 0.0 <= value <= 1.0 + 1e-6
    order = generator.permutation(len(p))
    assert_close(measured(labels[order], p[order]), value)


def test_in_compile_and_in_ensembles():
    model = adapted_mlp(
        {"metrics": [ExpectedCalibrationError(from_logits=True, name="ece")]}
    )
    x, y = classification_data(examples=40)
    history = model.fit(x, y, validation_data=(x, y), verbose=0).history
    assert {"ece", "val_ece"} <= set(history)
    logits = model.predict(x, verbose=0)
    assert_close(
        model.evaluate(x, y, verbose=0)[1],
        measured(y, logits, from_logits=True),
    )
    logits = model.ensemble_predict(x, seed=1, verbose=0)
    assert_close(
        model.ensemble_evaluate(x, y, seed=1, verbose=0)[1],
        measured(y, logits, from_logits=True),
    )


@pytest.mark.parametrize(
    "metric",
    [
        ExpectedCalibrationError(num_bins=9, from_logits=True, name="c"),
        BrierScore(from_logits=True, name="b"),
    ],
)
def test_config_round_trip(metric):
    config = keras.saving.serialize_keras_object(metric)
    copied = keras.saving.deserialize_keras_object(config)
    assert type(copied) is type(metric)
    assert copied.get_config() == metric.get_config()


@pytest.mark.parametrize("num_bins", [0, -1, 2.5, "15", True])
def test_bad_number_of_bins(num_bins):
    with pytest.raises(ValueError, match="`num_bins` must be a positive"):
        ExpectedCalibrationError(num_bins=num_bins)


@pytest.mark.parametrize("cls", METRICS)
def test_bad_from_logits(cls):
    with pytest.raises(TypeError, match="from_logits"):
        cls(from_logits="yes")


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [((5, 3), (5, 4)), ((5, 2, 2), (5, 4)), ((), (5, 4))],
)
@pytest.mark.parametrize("cls", METRICS)
def test_labels_that_do_not_fit(labels, predictions, cls):
    y_true, y_pred = np.zeros(labels, "int32"), np.full(predictions, 0.25)
    with pytest.raises(ValueError, match=f"{cls.__name__}.*class indices or"):
        measured(y_true, y_pred, cls=cls)
