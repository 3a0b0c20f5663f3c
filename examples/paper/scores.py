"""Scores of predictions: GLUE's metrics, and how sure predictions are."""

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics

import keras_lora_dropout as kld

# How scores are written, and whether the higher one is better.
PERCENT = {"accuracy", "f1", "matthews", "correlation", "ece"}
LOWER_IS_BETTER = {"ece", "nll", "brier", "mse"}


def score(task, outputs, labels, probabilities=False):
    """Score the outputs of a model.

    Args:
        task: `Task`.
        outputs: Array of shape `(examples, classes)`: logits, or predicted
            numbers of a regression.
        labels: Array of shape `(examples,)`.
        probabilities: Boolean. Whether outputs are probabilities.

    Returns:
        Dictionary of numbers. Classification: `accuracy`, `f1` (of class 1 if
        there are two, else their mean), `matthews`, `nll` in nats, `ece` (15
        bins), `brier`. Regression: `pearson`, `spearman`, `correlation` (their
        mean), `mse`.
    """
    outputs = np.asarray(outputs, "float64")
    if not np.isfinite(outputs).all():
        # A run that diverged stays in the table, with the scores of a guess.
        outputs = np.where(np.isfinite(outputs), outputs, 0.0)
    if task.classes == 1:
        return _score_regression(outputs[:, 0], np.asarray(labels))
    if not probabilities:
        outputs = scipy.special.softmax(outputs, axis=-1)
    return _score_classes(outputs, np.asarray(labels))


def _score_classes(probabilities, labels):
    predicted = probabilities.argmax(-1)
    of_label = probabilities[np.arange(len(labels)), labels]
    average = "binary" if probabilities.shape[-1] == 2 else "macro"
    calibration_error = kld.ExpectedCalibrationError(num_bins=15)
    brier = kld.BrierScore()
    for metric in (calibration_error, brier):
        metric.update_state(labels, probabilities)
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "f1": float(
            sklearn.metrics.f1_score(
                labels, predicted, average=average, zero_division=0
            )
        ),
        "matthews": float(sklearn.metrics.matthews_corrcoef(labels, predicted)),
        "nll": float(-np.mean(np.log(np.maximum(of_label, 1e-7)))),
        "ece": float(calibration_error.result()),
        "brier": float(brier.result()),
    }


def _score_regression(predicted, labels):
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        pearson = spearman = 0.0  # Of constants, scipy has none.
    else:
        pearson = scipy.stats.pearsonr(predicted, labels).statistic
        spearman = scipy.stats.spearmanr(predicted, labels).statistic
    return {
        "pearson": float(pearson),
        "spearman": float(spearman),
        "correlation": float((pearson + spearman) / 2),
        "mse": float(np.mean((predicted - labels) ** 2)),
    }
