"""Metrics of calibration, and of probabilities."""

import re

import keras
from keras import ops

from keras_lora_dropout.core import validation

_MAX_BINS = 100_000  # Each example takes as many numbers of memory.


@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class ExpectedCalibrationError(keras.metrics.Metric):
    """Expected calibration error, computed in streaming fashion.

    Predictions are sorted by confidence into `num_bins` bins of equal width,
    `(lower, upper]`. The result is the mean over all examples of
    `|accuracy - confidence|` of their bin:

        `ECE = sum_b (weight_b / weight) * |accuracy_b - confidence_b|`

    The confidence is the probability of the predicted class; for a binary
    probability `p` that is `max(p, 1 - p)`.

    Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599), Eq. 3;
    used in [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Table 4.

    Args:
        num_bins: Positive integer, at most 100,000. Defaults to 15.
        from_logits: Boolean. Whether predictions are logits. Defaults to
            `False`: probabilities.
        name: String. Name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        y_true: Class indices of shape `(batch, ...)` or `(batch, ..., 1)`, or
            one-hot rows of shape `(batch, ..., classes)`.
        y_pred: `(batch, ..., classes)` for several classes, or
            `(batch, ..., 1)` or the shape of `y_true` for the probability (or
            logit) of class 1.
        sample_weight: `None`, or weights that broadcast to `(batch, ...)`.

    Raises:
        ValueError: If `num_bins` is out of range, or if labels, predictions
            or weights are no numbers or their shapes do not fit.

    Example:

    >>> metric = ExpectedCalibrationError()
    >>> metric.update_state([0, 1], [[0.75, 0.25], [0.25, 0.75]])
    >>> float(metric.result())
    0.25
    """

    def __init__(
        self,
        num_bins=15,
        from_logits=False,
        name="expected_calibration_error",
        dtype=None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.num_bins = validation.positive_integer(
            "num_bins", num_bins, at_most=_MAX_BINS
        )
        self.from_logits = validation.boolean("from_logits", from_logits)
        self.weight, self.confidence, self.correct = (
            self.add_weight(shape=(self.num_bins,), initializer="zeros", name=n)
            for n in ("weight", "confidence", "correct")
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        metric = "ExpectedCalibrationError"
        labels, probabilities = _classified(
            metric,
            _tensor(metric, "y_true", y_true),
            ops.cast(_tensor(metric, "y_pred", y_pred), self.dtype),
            self.from_logits,
        )
        confidence = ops.max(probabilities, axis=-1)
        predicted = ops.cast(ops.argmax(probabilities, axis=-1), "int32")
        correct = ops.cast(ops.equal(labels, predicted), self.dtype)
        weight = ops.ones_like(confidence)
        if sample_weight is not None:
            weight = weight * _weights(metric, sample_weight, weight)
        confidence, correct, weight = (
            ops.reshape(t, (-1,)) for t in (confidence, correct, weight)
        )
        # Bins are closed above: `(0, 1 / n]` is bin 0, as in the reference.
        bins = ops.cast(ops.ceil(confidence * self.num_bins), "int32") - 1
        bins = ops.clip(bins, 0, self.num_bins - 1)
        member = ops.one_hot(bins, self.num_bins, dtype=self.dtype)
        weight = ops.expand_dims(weight, 0)
        for total, value in (
            (self.weight, weight),
            (self.confidence, weight * confidence),
            (self.correct, weight * correct),
        ):
            total.assign_add(ops.matmul(value, member)[0])

    def result(self):
        gap = ops.sum(ops.abs(self.correct - self.confidence))
        return ops.divide_no_nan(gap, ops.sum(self.weight))

    def get_config(self):
        return {
            **super().get_config(),
            "num_bins": self.num_bins,
            "from_logits": self.from_logits,
        }


@keras.saving.register_keras_serializable(package="keras_lora_dropout")
class BrierScore(keras.metrics.MeanMetricWrapper):
    """Mean squared distance between probabilities and what came true.

    For each example, the sum over the classes of `(probability - label)**2`,
    where the label is 1 for the true class: between 0 and 2, less is better.
    Unlike the calibration error, it is least for the true probabilities alone.
    For two classes it is twice what scikit-learn calls the score of a
    probability of class 1.

    Reference: [Brier, 1950](https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2).

    Args:
        from_logits: Boolean. Whether predictions are logits. Defaults to
            `False`: probabilities.
        name: String. Name of the metric.
        dtype: Dtype of the result.

    Call arguments: as of `ExpectedCalibrationError`.

    Raises:
        ValueError: If labels, predictions or weights are no numbers, or their
            shapes do not fit.

    Example:

    >>> metric = BrierScore()
    >>> metric.update_state([0, 1], [[0.5, 0.5], [0.0, 1.0]])
    >>> float(metric.result())
    0.25
    """

    def __init__(self, from_logits=False, name="brier_score", dtype=None):
        self.from_logits = validation.boolean("from_logits", from_logits)
        super().__init__(
            _brier_scores, name=name, dtype=dtype, from_logits=from_logits
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        metric = "BrierScore"
        y_true = _tensor(metric, "y_true", y_true)
        y_pred = ops.cast(_tensor(metric, "y_pred", y_pred), self.dtype)
        if sample_weight is not None:
            labels, _ = _classified(metric, y_true, y_pred, self.from_logits)
            sample_weight = _weights(metric, sample_weight, labels)
        super().update_state(y_true, y_pred, sample_weight)

    def get_config(self):
        return {
            "name": self.name,
            "dtype": self.dtype,
            "from_logits": self.from_logits,
        }


def _brier_scores(y_true, y_pred, from_logits):
    labels, probabilities = _classified(
        "BrierScore", y_true, y_pred, from_logits
    )
    # A label that is no class is never right, on any backend.
    classes = ops.arange(probabilities.shape[-1], dtype="int32")
    truth = ops.equal(ops.expand_dims(labels, -1), classes)
    truth = ops.cast(truth, probabilities.dtype)
    return ops.sum(ops.square(probabilities - truth), axis=-1)


def _classified(metric, y_true, y_pred, from_logits):
    """Bring labels and predictions into the one form of several classes.

    Returns:
        Class indices of shape `(batch, ...)`, and probabilities of shape
        `(batch, ..., classes)`.
    """
    # An empty shape of TensorFlow is true, one that is not known false.
    has_axes = all(t.shape and len(t.shape) for t in (y_true, y_pred))
    if not has_axes or y_pred.shape[-1] == 0:
        raise _misfit(metric, y_true, y_pred)
    is_binary = y_pred.shape[-1] == 1 or (
        len(y_pred.shape) == 1 and y_pred.shape == y_true.shape
    )
    given = y_true, y_pred
    if is_binary:
        y_pred, y_true = (
            ops.squeeze(t, -1) if t.shape[-1] == 1 and len(t.shape) > 1 else t
            for t in (y_pred, y_true)
        )
        p = ops.sigmoid(y_pred) if from_logits else y_pred
        labels, probabilities = y_true, ops.stack([1.0 - p, p], axis=-1)
    else:
        labels, probabilities = y_true, y_pred
        if len(y_true.shape) == len(y_pred.shape):
            if y_true.shape[-1] == y_pred.shape[-1]:
                labels = ops.argmax(y_true, axis=-1)
            elif y_true.shape[-1] == 1:
                labels = ops.squeeze(y_true, -1)
        if from_logits:
            probabilities = ops.softmax(y_pred)
    if not _fits(labels.shape, probabilities.shape[:-1]):
        raise _misfit(metric, *given)
    return ops.cast(labels, "int32"), probabilities


def _fits(shape, other):
    """Whether two shapes are equal, as far as they are known."""
    return len(shape) == len(other) and all(
        a == b or None in (a, b) for a, b in zip(shape, other, strict=True)
    )


def _misfit(metric, y_true, y_pred):
    return ValueError(
        f"`{metric}` needs class indices or one-hot labels that fit the "
        f"predictions. Received: y_true of shape {tuple(y_true.shape)}, "
        f"y_pred of shape {tuple(y_pred.shape)}."
    )


def _tensor(metric, name, value):
    """Return numbers as a tensor; raise `ValueError` if they are none."""
    try:
        tensor = ops.convert_to_tensor(value)
        kind = keras.backend.standardize_dtype(tensor.dtype)
    except Exception as error:  # Each backend has its own.
        kind, cause = None, error
    else:
        cause = None
    if kind is None or not re.match("u?int|b?float|bool", kind):
        raise ValueError(
            f"`{name}` of `{metric}` must be an array of numbers. Received: "
            f"{name}={validation.shown(value)} (of type "
            f"{type(value).__name__})."
        ) from cause
    return tensor


def _weights(metric, sample_weight, like):
    """Return the weights of examples, checked to broadcast to a tensor."""
    given = _tensor(metric, "sample_weight", sample_weight)
    weights = ops.cast(given, "float32")
    if len(weights.shape) == len(like.shape) + 1 and weights.shape[-1] == 1:
        weights = ops.squeeze(weights, -1)
    while len(weights.shape) < len(like.shape):
        weights = ops.expand_dims(weights, -1)
    expected = [
        1 if own == 1 else size
        for own, size in zip(weights.shape, like.shape, strict=False)
    ]
    if not _fits(weights.shape, expected) or len(expected) != len(like.shape):
        raise ValueError(
            f"`sample_weight` of `{metric}` must broadcast to the examples. "
            f"Received: sample_weight of shape {tuple(given.shape)} for "
            f"examples of shape {tuple(like.shape)}."
        )
    return ops.broadcast_to(weights, ops.shape(like))
