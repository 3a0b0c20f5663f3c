"""Figures with matplotlib: calibration, training curves, ranks, bounds."""

import collections.abc

import keras
import numpy as np

from keras_lora_dropout import rank_plot
from keras_lora_dropout.core import validation
from keras_lora_dropout.metrics import ExpectedCalibrationError
from keras_lora_dropout.theory import GeneralizationBound

_MODES = ("auto", "min", "max")
_LESS_IS_BETTER = (
    "loss",
    "error",
    "entropy",
    "perplexity",
    "brier",
    "mse",
    "mae",
)
_MORE_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "iou")


def plot_reliability(
    y_true, y_pred, *, num_bins=15, from_logits=False, label=None, ax=None
):
    """Draw a reliability diagram: how often confident predictions are right.

    Each point is one bin of `ExpectedCalibrationError`: its mean confidence
    to the right, its accuracy upwards, and around it a disk whose area is the
    bin's share of the examples. The vertical line to the diagonal is the gap
    that the error averages: a point below the diagonal is overconfident. Draw
    several models into the same `ax` to compare them.

    Reference: [Guo et al., 2017](https://arxiv.org/abs/1706.04599), Figure 1.

    Args:
        y_true: Class indices of shape `(examples,)` or `(examples, 1)`, or
            one-hot rows of shape `(examples, classes)`.
        y_pred: Probabilities, or logits, of shape `(examples, classes)`; or of
            shape `(examples,)` or `(examples, 1)` for class 1 of two classes.
        num_bins: Positive integer. Defaults to 15.
        from_logits: Boolean. Whether `y_pred` are logits. Defaults to `False`.
        label: String or `None`. Name of the model in the legend.
        ax: Matplotlib `Axes`, or `None` for a new figure.

    Returns:
        The matplotlib `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `ax` is no matplotlib `Axes`.
        ValueError: If there are no examples, labels and predictions differ in
            number, or predictions are neither probabilities nor, with
            `from_logits`, finite numbers.

    Example:

    >>> ax = plot_reliability([0, 1], [[0.75, 0.25], [0.25, 0.75]], label="A")
    >>> ax.get_legend().get_texts()[-1].get_text()
    'A (ECE 0.250)'
    """
    metric = ExpectedCalibrationError(num_bins, from_logits)
    _check_text("label", label)
    y_true = _array("y_true", y_true)
    y_pred = _array("y_pred", y_pred)
    _check_predictions(y_true, y_pred, from_logits)
    metric.update_state(y_true, y_pred.astype("float32"))
    weight, confidence, correct = (
        keras.ops.convert_to_numpy(total)
        for total in (metric.weight, metric.confidence, metric.correct)
    )
    used = weight > 0
    confidence, accuracy = (
        total[used] / weight[used] for total in (confidence, correct)
    )
    share = weight[used] / weight.sum()

    ax = _axes(ax, figsize=(5, 5))
    _draw_diagonal(ax)
    error = f"ECE {float(metric.result()):.3f}"
    (line,) = ax.plot(
        confidence,
        accuracy,
        marker="o",
        markersize=3.5,
        linewidth=1,
        label=f"{label} ({error})" if label else error,
        zorder=3,
    )
    color = line.get_color()
    ax.scatter(
        confidence, accuracy, s=1500 * share, color=color, alpha=0.25, lw=0
    )
    ax.vlines(
        confidence, confidence, accuracy, color=color, alpha=0.5, lw=1, ls=":"
    )
    ax.set(
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    return _with_legend(ax)


def plot_history(histories, *, metric="val_loss", mode="auto", ax=None):
    """Draw a training curve per run, with a star at its best epoch.

    Epochs count from 1, as in the progress bar. Values that were not recorded
    in every epoch (`validation_freq`) are counted, not dated.

    Args:
        histories: What `fit` returned, or its `history`: a dict of metric
            name -> list of values. To compare runs, a dict of run name ->
            either of these.
        metric: String. Which metric to draw. Defaults to `"val_loss"`.
        mode: `"min"` if less is better, `"max"` if more is, `"auto"` to tell
            from the name of the metric.
        ax: Matplotlib `Axes`, or `None` for a new figure.

    Returns:
        The matplotlib `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `histories` or `ax` is none of these.
        ValueError: If a run has no value of `metric`, or `mode` is unknown.

    Example:

    >>> ax = plot_history({"A": {"val_loss": [3.0, 1.0, 2.0]}})
    >>> ax.get_legend().get_texts()[0].get_text()
    'A (best 1 in epoch 2)'
    """
    _check_text("metric", metric)
    best_of = _best_of(metric, mode)
    runs = _runs(histories)
    curves = {name: _curve(name, run, metric) for name, run in runs.items()}
    ax = _axes(ax, figsize=(6, 4.5))
    for name, (epochs, values) in curves.items():
        (line,) = ax.plot(epochs, values, linewidth=1.8)
        label = name
        finite = np.where(np.isfinite(values), values, np.nan)
        if np.isfinite(values).any():
            best = best_of(finite)
            note = f"best {values[best]:.3g} in epoch {epochs[best]}"
            label = f"{name} ({note})" if name else note
            ax.plot(
                epochs[best],
                values[best],
                marker="*",
                markersize=13,
                color=line.get_color(),
                markeredgecolor="white",
                linestyle="none",
                zorder=3,
            )
        line.set_label(label or metric)
    ax.xaxis.get_major_locator().set_params(integer=True)
    title = metric.replace("val_", "validation ").replace("_", " ")
    ax.set(xlabel="epoch", ylabel=title)
    return _with_legend(ax)


def plot_rank_history(history, *, ax=None):
    """Draw how many ranks each adapted layer keeps over the training.

    Time runs to the right, layers downwards in forward order. The darker a
    cell, the more ranks; a layer that keeps none is light grey. A column shows
    the ranks after its last step. Numbers at the right are the ranks at the
    end. If there are too many layers to name, blocks of them are named.

    Reference: [Zhang et al., 2023](https://arxiv.org/abs/2303.10512), Figure 3
    shows the ranks at the end.

    Args:
        history: An adapted model with a `RankBudget`, or what its
            `rank_history` returned: a dict of `"step"`, the optimizer steps,
            and `"ranks"`, a dict of layer path -> ranks kept after these
            steps. Lists, as read from JSON, will do for arrays.
        ax: Matplotlib `Axes`, or `None` for a new figure.

    Returns:
        The matplotlib `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `history` or `ax` is none of these.
        ValueError: If the model has no `rank_budget`, if nothing is recorded
            yet, or if the entries of the history do not go together.

    Example:

    >>> ranks = {"first": [2, 2, 1], "second": [2, 1, 0]}
    >>> ax = plot_rank_history({"step": [10, 20, 30], "ranks": ranks})
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['first', 'second']
    """
    steps, paths, kept = rank_plot.recorded_ranks(history)
    ax = _axes(ax, figsize=rank_plot.figure_size(len(paths)))
    rank_plot.draw_ranks(ax, steps, paths, kept)
    return ax


def plot_generalization_gap(bounds, *, ax=None):
    """Draw the bound of the generalization gap against the dropout rate.

    It holds under the paper's assumptions: see `GeneralizationBound`.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Theorem
    4.4.

    Args:
        bounds: A `GeneralizationBound`; to compare several, a dict of label ->
            bound.
        ax: Matplotlib `Axes`, or `None` for a new figure.

    Returns:
        The matplotlib `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `bounds` or `ax` is none of these.

    Example:

    >>> bounds = {
    ...     f"n = {n}": GeneralizationBound(n, smallest_eigenvalue=0.1)
    ...     for n in (512, 3668)
    ... }
    >>> ax = plot_generalization_gap(bounds)
    >>> [line.get_label() for line in ax.lines]
    ['n = 512', 'n = 3668']
    """
    named = {"": bounds} if isinstance(bounds, GeneralizationBound) else bounds
    is_dict = isinstance(named, collections.abc.Mapping) and named
    if not is_dict or not all(
        isinstance(bound, GeneralizationBound) for bound in named.values()
    ):
        raise TypeError(
            "`bounds` must be a `GeneralizationBound`, or a dict of label -> "
            f"`GeneralizationBound`. Received: bounds={bounds!r} (of type "
            f"{type(bounds).__name__})."
        )
    ax = _axes(ax, figsize=(6, 4))
    rates = np.linspace(0, 1, 201)
    for label, bound in named.items():
        ax.plot(rates, bound.gap(rates), label=label or None)
    ax.set(
        xlabel="dropout rate",
        ylabel="bound of expected loss minus training loss",
        xlim=(0, 1),
    )
    ax.set_ylim(bottom=0)
    return _with_legend(ax) if any(named) else ax


def _axes(ax, figsize):
    """Return `ax`, or that of a new figure, with a quiet grid and frame."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots are drawn with matplotlib, which is not installed. Run "
            "`pip install keras_lora_dropout[plots]`, or `pip install "
            "matplotlib`."
        ) from error
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    if not isinstance(ax, plt.Axes):
        raise TypeError(
            "`ax` must be one matplotlib `Axes`, or None for a new figure; of "
            "an array from `plt.subplots(1, 2)`, pass one entry, `ax=axes[0]`. "
            f"Received: ax of type {type(ax).__name__}."
        )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    return ax


def _array(name, values):
    """Return an array of numbers; raise `ValueError` if they are none."""
    if keras.ops.is_tensor(values):
        values = keras.ops.convert_to_numpy(values)
    array = validation.numbers_of(values, booleans=True)
    if array is None:
        raise ValueError(
            f"`{name}` must be an array of numbers. Received: {name}="
            f"{validation.shown(values)} (of type {type(values).__name__})."
        )
    return array


def _check_text(name, value):
    optional = name == "label"
    if not isinstance(value, str) and not (optional and value is None):
        raise TypeError(
            f"`{name}` must be a string{' or None' if optional else ''}. "
            f"Received: {name}={value!r} (of type "
            f"{type(value).__name__})."
        )


def _with_legend(ax):
    ax.legend(fontsize="small", framealpha=0.8, edgecolor="none")
    return ax


def _draw_diagonal(ax, name="perfect calibration"):
    if all(line.get_label() != name for line in ax.lines):
        ax.plot([0, 1], [0, 1], color="0.5", lw=1, ls="--", label=name)


def _check_predictions(y_true, y_pred, from_logits):
    shapes = f"y_true of shape {y_true.shape}, y_pred of shape {y_pred.shape}"
    if y_true.ndim == 0 or y_pred.ndim == 0 or len(y_true) != len(y_pred):
        raise ValueError(
            "`plot_reliability` needs one label and one prediction per "
            f"example. Received: {shapes}."
        )
    if y_true.size == 0 or y_pred.size == 0:
        raise ValueError(
            "`plot_reliability` needs at least one example. Received: "
            f"{shapes}."
        )
    if not (np.abs(y_pred) <= np.finfo("float32").max).all():
        raise ValueError(
            "`y_pred` must be finite. Received: y_pred with "
            f"{np.count_nonzero(~np.isfinite(y_pred))} infinite or NaN values "
            f"of {y_pred.size}. Leave those examples out, or look for what "
            "made the model diverge."
        )
    low, high = y_pred.min(), y_pred.max()
    if not from_logits and not -1e-3 <= low <= high <= 1 + 1e-3:
        raise ValueError(
            "`y_pred` must be probabilities, in [0, 1]. Received: y_pred "
            f"between {low:.3g} and {high:.3g}. If they are logits, pass "
            "`from_logits=True`."
        )


def _quoted(text):
    """Return how a message shows text: in quotes, cut if it is long."""
    return f'"{text}"' if len(text) <= 400 else f'"{text[:397]}..."'


def _best_of(metric, mode):
    """Return the function that finds the best entry of an array."""
    validation.word("mode", mode, _MODES)
    if mode == "auto":
        if any(word in metric for word in _LESS_IS_BETTER):
            mode = "min"
        elif any(word in metric for word in _MORE_IS_BETTER):
            mode = "max"
        else:
            raise ValueError(
                f"The name {_quoted(metric)} does not tell whether "
                f"less or more is better. Received: "
                f'metric={_quoted(metric)}, mode="auto". Pass '
                '`mode="min"` or `mode="max"`.'
            )
    return np.nanargmin if mode == "min" else np.nanargmax


def _runs(histories):
    """Return a dict of run name -> run; a single run has the name ''."""
    if _is_run(histories):
        histories = {"": histories}
    is_dict = isinstance(histories, collections.abc.Mapping) and histories
    if not is_dict or not all(map(_is_run, histories.values())):
        raise TypeError(
            "`histories` must be what `fit` returned, a dict of metric name "
            "-> list of values, or a dict of run name -> either of these. "
            f"Received: histories={histories!r} (of type "
            f"{type(histories).__name__})."
        )
    return histories


def _is_run(value):
    if isinstance(value, keras.callbacks.History):
        return True
    return isinstance(value, collections.abc.Mapping) and all(
        isinstance(values, (list, tuple, np.ndarray))
        for values in value.values()
    )


def _curve(name, run, metric):
    """Return the epochs and the values of a metric in one run."""
    dates = None
    if isinstance(run, keras.callbacks.History):
        dates, run = run.epoch, run.history
    values = np.asarray(run.get(metric, ()), dtype="float64")
    if not len(values):
        raise ValueError(
            f"The history{f' of {name!r}' if name else ''} has no "
            f"{_quoted(metric)}. Received: "
            f"metric={_quoted(metric)}; recorded are {sorted(run)}. Pass one "
            "of these, or give `fit` what records it (validation_data for "
            '"val_...", metrics in `compile`).'
        )
    if dates is None or len(dates) != len(values):
        dates = range(len(values))
    return [epoch + 1 for epoch in dates], values
