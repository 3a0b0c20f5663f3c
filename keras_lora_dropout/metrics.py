"""Metrics of calibration, and of probabilities."""

import keras
from keras import ops

from keras_lora_dropout.core import validation


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
        num_bins: Positive integer. Defaults to 15.
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
        ValueError: If `num_bins` is no positive integer, or the shapes of
            labels and predictions do not fit.

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
        self.num_bins = validation.positive_integer("num_bins", num_bins)
        self.from_logits = validation.boolean("from_logits", from_logits)
        self.weight, self.confidence, self.correct = (
            self.add_weight(shape=(self.num_bins,), initializer="zeros", name=n)
            for n in ("weight", "confidence", "correct")
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        labels, probabilities = _classified(
            "ExpectedCalibrationError",
            ops.convert_to_tensor(y_true),
            ops.cast(y_pred, self.dtype),
            self.from_logits,
        )
        confidence = ops.max(probabilities, axis=-1)
        predicted = ops.cast(ops.argmax(probabilities, axis=-1), "int32")
        correct = ops.cast(ops.equal(labels, predicted), self.dtype)
        weight = ops.ones_like(confidence)
        if sample_weight is not None:
            given = ops.cast(sample_weight, self.dtype)
            if len(given.shape) == len(weight.shape) + 1:
                given = ops.squeeze(given, -1)
            while len(given.shape) < len(weight.shape):
                given = ops.expand_dims(given, -1)
            weight = weight * given
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
        ValueError: If the shapes of labels and predictions do not fit.

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

    def get_config(self):
        return {
            "name": self.name,
            "dtype": self.dtype,
            "from_logits": self.from_logits,
        }


def _brier_scores(y_true, y_pred, from_logits):
    y_true, y_pred = map(ops.convert_to_tensor, (y_true, y_pred))
    labels, probabilities = _classified(
        "BrierScore", y_true, y_pred, from_logits
    )
    classes = probabilities.shape[-1]
    truth = ops.one_hot(labels, classes, dtype=probabilities.dtype)
    return ops.sum(ops.square(probabilities - truth), axis=-1)


def _classified(metric, y_true, y_pred, from_logits):
    """Bring labels and predictions into the one form of several classes.

    Returns:
        Class indices of shape `(batch, ...)`, and probabilities of shape
        `(batch, ..., classes)`.
    """
    is_binary = y_pred.shape[-1] == 1 or (
        len(y_pred.shape) == 1 and y_pred.shape == y_true.shape
    )
    if is_binary:
        y_pred, y_true = (
            ops.squeeze(t, -1) if t.shape[-1] == 1 and len(t.shape) > 1 else t
            for t in (y_pred, y_true)
        )
        p = ops.sigmoid(y_pred) if from_logits else y_pred
        return ops.cast(y_true, "int32"), ops.stack([1.0 - p, p], axis=-1)
    if len(y_true.shape) == len(y_pred.shape):
        if y_true.shape[-1] == y_pred.shape[-1]:
            y_true = ops.argmax(y_true, axis=-1)
        elif y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, -1)
    if len(y_true.shape) != len(y_pred.shape) - 1:
        raise ValueError(
            f"`{metric}` needs class indices or one-hot labels that fit the "
            f"predictions. Received: y_true of shape {tuple(y_true.shape)}, "
            f"y_pred of shape {tuple(y_pred.shape)}."
        )
    if from_logits:
        y_pred = ops.softmax(y_pred)
    return ops.cast(y_true, "int32"), y_pred
