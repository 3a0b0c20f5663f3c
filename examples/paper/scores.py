"""Scores of predictions: the metrics of GLUE and SQuAD, and calibration."""

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics

import keras_lora_dropout as kld
from keras_lora_dropout.question_answering import scores as answer_scores

# Scores that are shares of 1, which tables show in percent.
PERCENT = {
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "correlation",
    "ece",
    "exact_match",
}

# How tables and figures call them.
TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "exact_match": "EM",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "correlation": "correlation",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "mse": "MSE",
}


def score_classes(outputs, labels, probabilities=False):
    """Score a classification.

    Args:
        outputs: Array of shape `(examples, classes)`: logits.
        labels: Integer array of shape `(examples,)`.
        probabilities: Boolean. Whether outputs are probabilities instead.

    Returns:
        Dictionary of numbers: `accuracy`, `f1` (of class 1 if there are two,
        else the mean of all), `matthews`, `nll` in nats, `ece` (15 bins) and
        `brier`.
    """
    outputs = _finite(outputs)
    if not probabilities:
        outputs = scipy.special.softmax(outputs, axis=-1)
    predicted = outputs.argmax(-1)
    of_label = outputs[np.arange(len(labels)), labels]
    average = "binary" if outputs.shape[-1] == 2 else "macro"
    f1 = sklearn.metrics.f1_score(
        labels, predicted, average=average, zero_division=0
    )
    calibration_error = kld.ExpectedCalibrationError(num_bins=15)
    brier = kld.BrierScore()
    for metric in (calibration_error, brier):
        metric.update_state(labels, outputs)
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "f1": float(f1),
        "matthews": float(sklearn.metrics.matthews_corrcoef(labels, predicted)),
        "nll": float(-np.mean(np.log(np.maximum(of_label, 1e-7)))),
        "ece": float(calibration_error.result()),
        "brier": float(brier.result()),
    }


def score_numbers(predicted, labels):
    """Score a regression.

    Args:
        predicted: Array of shape `(examples,)`.
        labels: Array of the same shape.

    Returns:
        Dictionary of numbers: `pearson`, `spearman`, `correlation` (their
        mean), `mse`.
    """
    predicted = _finite(predicted)
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


def score_answers(answers, accepted):
    """Score answers to questions: `exact_match` and `f1`, shares of 1.

    Args:
        answers: List of strings.
        accepted: List of lists of strings.
    """
    found = answer_scores.score_answers(answers, accepted)
    return {"exact_match": found.exact_match / 100, "f1": found.f1 / 100}


def _finite(outputs):
    """Let a run that diverged have the scores of a guess."""
    outputs = np.asarray(outputs, "float64")
    return np.where(np.isfinite(outputs), outputs, 0.0)
