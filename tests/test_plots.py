"""Figures hold the numbers that NumPy finds; bad inputs are told apart."""

import sys

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data

import keras_lora_dropout as kld
from keras_lora_dropout.plots import plot_history
from keras_lora_dropout.plots import plot_rank_history
from keras_lora_dropout.plots import plot_reliability

pytestmark = pytest.mark.usefixtures("closed_figures")


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def bins_of(confidence, correct, num_bins):
    """Bin by bin, with a loop: mean confidence, accuracy, share."""
    rows = []
    for lower in range(num_bins):
        inside = (confidence > lower / num_bins) & (
            confidence <= (lower + 1) / num_bins
        )
        if inside.any():
            rows.append(
                (
                    confidence[inside].mean(),
                    correct[inside].mean(),
                    inside.mean(),
                )
            )
    return np.array(rows)


def drawn(ax):
    """What the last diagram in the axes shows."""
    line = ax.lines[-1]
    areas = ax.collections[-2].get_sizes()
    return np.stack(
        [line.get_xdata(), line.get_ydata(), areas / areas.sum()], axis=1
    )


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def many_classes(examples=500, classes=5):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(examples, classes)).astype("float32")
    return generator.integers(0, classes, examples), 2 * logits


@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("from_logits", [False, True])
def test_reliability_of_several_classes(num_bins, from_logits):
    labels, logits = many_classes()
    probabilities = softmax(logits)
    confidence = probabilities.max(-1)
    correct = probabilities.argmax(-1) == labels
    expected = bins_of(confidence, correct, num_bins)
    ax = plot_reliability(
        labels,
        logits if from_logits else probabilities,
        num_bins=num_bins,
        from_logits=from_logits,
        label="network",
    )
    np.testing.assert_allclose(drawn(ax), expected, atol=1e-5)
    error = np.sum(expected[:, 2] * np.abs(expected[:, 0] - expected[:, 1]))
    assert legend(ax) == ["perfect calibration", f"network (ECE {error:.3f})"]


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_reliability_of_two_classes(shape):
    generator = np.random.default_rng(1)
    positive = generator.uniform(size=300).astype("float32")
    labels = generator.integers(0, 2, 300)
    confidence = np.maximum(positive, 1 - positive)
    correct = (positive > 0.5) == labels
    ax = plot_reliability(labels, positive.reshape(shape), num_bins=10)
    np.testing.assert_allclose(
        drawn(ax), bins_of(confidence, correct, 10), atol=1e-5
    )


def test_reliability_draws_each_gap_to_the_diagonal():
    ax = plot_reliability(*many_classes(), from_logits=True)
    points = drawn(ax)
    gaps = [segment for segment in ax.collections[-1].get_segments()]
    assert len(gaps) == len(points)
    for gap, (confidence, accuracy, _) in zip(gaps, points, strict=True):
        np.testing.assert_allclose(gap[0], [confidence, confidence])
        np.testing.assert_allclose(gap[1], [confidence, accuracy])


def test_reliability_takes_one_hot_labels_and_tensors():
    labels, logits = many_classes(50)
    plain = plot_reliability(labels, softmax(logits))
    other = plot_reliability(
        keras.ops.one_hot(keras.ops.convert_to_tensor(labels), 5),
        keras.ops.softmax(keras.ops.convert_to_tensor(logits)),
    )
    np.testing.assert_allclose(drawn(plain), drawn(other), atol=1e-6)


def test_models_are_compared_in_one_axes_with_one_diagonal():
    labels, logits = many_classes()
    _, ax = plt.subplots()
    for label, scale in (("sure", 3.0), ("unsure", 0.3)):
        returned = plot_reliability(
            labels, softmax(scale * logits), label=label, ax=ax
        )
        assert returned is ax
    assert [text.split(" (")[0] for text in legend(ax)] == [
        "perfect calibration",
        "sure",
        "unsure",
    ]
    colors = [line.get_color() for line in ax.lines]
    assert len(set(colors)) == 3
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "message"),
    [
        ([0, 1], [[0.5, 0.5]], {}, "one label and one prediction per example"),
        ([], np.zeros((0, 3)), {}, "at least one example"),
        (0, 0.5, {}, "one label and one prediction per example"),
        ([0], [[2.0, -1.0]], {}, "between -1 and 2.*from_logits=True"),
        ([0, 1], [0.5, np.nan], {}, "1 infinite or NaN values of 2"),
        ([0], [[0.5, 0.5]], {"num_bins": 0}, "num_bins=8"),
        ([[0, 1, 2]], [[0.5, 0.5]], {}, "class indices or one-hot"),
    ],
)
def test_reliability_refuses(labels, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        plot_reliability(labels, predictions, **options)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plot_reliability([0], [[0.5, 0.5]], ax=ax),
        lambda ax: plot_history({"val_loss": [1.0]}, ax=ax),
        lambda ax: plot_rank_history({"step": [1], "ranks": {"a": [1]}}, ax=ax),
    ],
)
def test_array_of_axes_is_refused(draw):
    _, several = plt.subplots(1, 2)
    with pytest.raises(TypeError, match=r"ax=axes\[0\]"):
        draw(several)


def test_missing_matplotlib_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras_lora_dropout\[plots\]"):
        plot_history({"val_loss": [1.0]})


def curves(ax):
    """Curves and stars, which follow each other."""
    points = [
        (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines
    ]
    return points[::2], points[1::2]


def test_history_of_a_run():
    x, y = classification_data()
    model = adapted_mlp({"metrics": ["accuracy"]})
    history = model.fit(
        x,
        y,
        epochs=4,
        initial_epoch=1,
        validation_data=(x, y),
        callbacks=[kld.EnsembleEvaluation((x, y))],
        verbose=0,
    )
    for metric in ("val_loss", "ensemble_val_loss", "loss"):
        ax = plot_history(history, metric=metric)
        values = history.history[metric]
        best = int(np.argmin(values))
        assert curves(ax) == (
            [([2, 3, 4], values)],
            [([best + 2], [values[best]])],
        )
        assert legend(ax) == [f"best {values[best]:.3g} in epoch {best + 2}"]
    assert ax.get_xlabel() == "epoch"


def test_histories_are_compared():
    runs = {
        "first": {"val_loss": [3.0, 1.0, 2.0], "loss": [1.0, 1.0, 1.0]},
        "second": {"val_loss": np.array([4.0, 3.0, 2.5])},
    }
    ax = plot_history(runs)
    lines, stars = curves(ax)
    assert lines == [
        ([1, 2, 3], [3.0, 1.0, 2.0]),
        ([1, 2, 3], [4.0, 3.0, 2.5]),
    ]
    assert stars == [([2], [1.0]), ([3], [2.5])]
    assert legend(ax) == [
        "first (best 1 in epoch 2)",
        "second (best 2.5 in epoch 3)",
    ]
    assert ax.get_ylabel() == "validation loss"
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [
        ("val_accuracy", "auto", 2),
        ("auc", "auto", 2),
        ("val_expected_calibration_error", "auto", 1),
        ("reward", "max", 2),
        ("reward", "min", 1),
    ],
)
def test_best_epoch_follows_the_metric(metric, mode, best):
    ax = plot_history({metric: [0.1, 0.9, 0.5]}, metric=metric, mode=mode)
    assert curves(ax)[1][0][0] == [best]


def test_best_epoch_ignores_what_diverged():
    ax = plot_history({"val_loss": [np.nan, 2.0, 3.0, np.inf]})
    assert curves(ax)[1] == [([2], [2.0])]
    ax = plot_history({"val_loss": [np.nan, np.nan]})
    assert legend(ax) == ["val_loss"]


@pytest.mark.parametrize(
    ("histories", "options", "error", "message"),
    [
        ({}, {}, ValueError, 'has no "val_loss"'),
        ({"loss": [1.0]}, {}, ValueError, r"recorded are \['loss'\]"),
        ({"A": {"loss": [1.0]}}, {}, ValueError, "of 'A' has no"),
        ({"val_loss": []}, {}, ValueError, 'has no "val_loss"'),
        ([1.0, 2.0], {}, TypeError, "what `fit` returned"),
        (None, {}, TypeError, "what `fit` returned"),
        ({"a": {"b": {"c": [1.0]}}}, {}, TypeError, "what `fit` returned"),
        (
            {"reward": [1.0]},
            {"metric": "reward"},
            ValueError,
            'Pass `mode="min"`',
        ),
        ({"val_loss": [1.0]}, {"mode": "up"}, ValueError, '"auto" or "min"'),
    ],
)
def test_history_refuses(histories, options, error, message):
    with pytest.raises(error, match=message):
        plot_history(histories, **options)
    assert not plt.get_fignums()
