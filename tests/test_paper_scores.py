"""The scores of the paper's tables, against other libraries and by hand."""

import pathlib
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torchmetrics.functional as torchmetrics
from scipy.special import softmax

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

from scores import score_answers
from scores import score_classes
from scores import score_numbers


def outputs_and_labels(classes, count=200):
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, max(classes, 2), count)
    outputs = generator.normal(size=(count, classes))
    outputs += 1.5 * np.eye(classes)[labels % classes]
    return outputs.astype("float32"), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("as_probabilities", [False, True])
def test_classification(classes, as_probabilities):
    logits, labels = outputs_and_labels(classes)
    probabilities = softmax(logits, -1)
    given = probabilities if as_probabilities else logits
    found = score_classes(given, labels, probabilities=as_probabilities)
    predicted = logits.argmax(-1)
    average = "binary" if classes == 2 else "macro"
    one_hot = np.eye(classes)[labels]
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "f1": sklearn.metrics.f1_score(labels, predicted, average=average),
        "matthews": np.corrcoef(labels, predicted)[0, 1],
        "nll": sklearn.metrics.log_loss(labels, probabilities),
        "brier": np.mean(np.sum((probabilities - one_hot) ** 2, -1)),
        "ece": _calibration_error(probabilities, labels),
    }
    if classes > 2:  # Its formula for two classes is the correlation.
        expected["matthews"] = sklearn.metrics.matthews_corrcoef(
            labels, predicted
        )
    assert found == pytest.approx(expected, rel=1e-4)


def _calibration_error(probabilities, labels):
    import torch

    return float(
        torchmetrics.calibration_error(
            torch.tensor(probabilities),
            torch.tensor(labels),
            task="multiclass",
            num_classes=probabilities.shape[-1],
            n_bins=15,
        )
    )


def test_regression():
    outputs, _ = outputs_and_labels(1)
    labels = outputs[:, 0] + np.random.default_rng(0).normal(size=200)
    found = score_numbers(outputs[:, 0], labels)
    pearson = np.corrcoef(outputs[:, 0], labels)[0, 1]
    ranks = map(scipy.stats.rankdata, (outputs[:, 0], labels))
    spearman = np.corrcoef(*ranks)[0, 1]
    expected = {
        "pearson": pearson,
        "spearman": spearman,
        "correlation": (pearson + spearman) / 2,
        "mse": sklearn.metrics.mean_squared_error(labels, outputs[:, 0]),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_by_hand():
    logits = np.log([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    found = score_classes(logits, np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(0.5)
    assert found["matthews"] == pytest.approx(0.0)
    nll = -np.mean(np.log([0.9, 0.4, 0.8, 0.3]))
    assert found["nll"] == pytest.approx(nll)
    # Each prediction has a bin of its own.
    assert found["ece"] == pytest.approx(np.mean([0.1, 0.6, 0.2, 0.7]))


def test_answers():
    found = score_answers(["the Fox", "a dog"], [["fox"], ["dog barks", "cat"]])
    assert found == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 / 3) / 2})


def test_a_run_that_diverged_has_the_scores_of_a_guess():
    labels = np.array([0, 1, 1, 0])
    found = score_classes(np.full((4, 2), np.nan), labels)
    assert all(np.isfinite(value) for value in found.values())
    assert found["nll"] == pytest.approx(np.log(2))
    found = score_numbers(np.full(4, np.nan), labels)
    assert found["correlation"] == 0.0 and found["mse"] == 0.5
