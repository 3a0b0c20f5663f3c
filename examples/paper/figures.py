"""The figures of the paper, from summaries of runs."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import ScalarFormatter
from scores import PERCENT
from scores import TITLES
from summaries import NETWORKS
from summaries import curve
from summaries import is_published
from tasks import TASKS

from keras_lora_dropout.storage.atomic import replacing


def draw(name, summaries, path):
    """Draw a study into a PNG file.

    Args:
        name: Key of `STUDIES`.
        summaries: List of `Summary`.
        path: Path of the file.
    """
    # MNLI has two evaluation splits; the paper shows the first.
    shown = [s for s in summaries if s.split == TASKS[s.task].splits[0]]
    save(DRAWN[name](shown), path)


def save(figure, path):
    """Write a figure as a PNG file, all at once, and close it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _scores(summaries):
    """Score and calibration error of each method: a row for each task."""
    tasks = list(dict.fromkeys(s.task for s in summaries))
    height = max(len([s for s in summaries if s.task == t]) for t in tasks)
    figure, axes = _panels(len(tasks), 2, (6.5, 1.2 + 0.32 * height))
    for row, task in zip(axes, tasks, strict=True):
        of_task = [s for s in summaries if s.task == task]
        shown = TASKS[task].metric, TASKS[task].second
        for ax, score in zip(row, shown, strict=True):
            _dots(ax, of_task, score)
            ax.set_title(TASKS[task].title)
    return figure


def _dots(ax, summaries, score):
    for place, s in enumerate(summaries):
        values = _values(s, score)
        color = "tab:orange" if s.network == "ensemble" else "tab:blue"
        _points(ax, values, [place] * len(values), color)
        ax.plot(np.mean(values), place, "|", color=color, ms=16, mew=2)
    ax.set_yticks(range(len(summaries)), [_name(s) for s in summaries])
    ax.invert_yaxis()
    ax.grid(axis="y", alpha=0.3)
    ax.set_xlabel(_axis_label(score))


def _losses(summaries):
    """Figure 1: loss on training and evaluation data, epoch by epoch."""
    tasks, figure, axes = _of_tasks(summaries, 2)
    for row, task in zip(axes, tasks, strict=True):
        score = "nll" if TASKS[task].classes > 1 else "mse"
        for s in [s for s in summaries if s.task == task]:
            if s.network == "mean":
                line(row[0], curve(s.runs, "loss"), s.variant.label)
            if is_published(s):
                values = curve(s.runs, "scores", s.network, score)
                line(row[1], values, _name(s))
        row[0].set_title(f"{TASKS[task].title}, training objective")
        row[1].set_title(f"{TASKS[task].title}, evaluation loss")
    return _with_legends(figure, axes, "epoch")


def _calibration(summaries):
    """Figure 3: expected calibration error, epoch by epoch."""
    tasks, figure, axes = _of_tasks(summaries, 1)
    for (ax,), task in zip(axes, tasks, strict=True):
        for s in [s for s in summaries if s.task == task]:
            if s.network != "test_dropout":
                values = 100 * curve(s.runs, "scores", s.network, "ece")
                line(ax, values, _name(s))
        ax.set_title(TASKS[task].title)
        ax.set_ylabel(_axis_label("ece"))
    return _with_legends(figure, axes, "epoch")


# The paper's names of the four ways to use masks.
ABLATION = {
    ("lora-dropout", "ensemble"): "Drop",
    ("lora-dropout", "mean"): "Drop_train",
    ("lora", "test_dropout"): "Drop_test",
    ("lora", "mean"): "NoDrop",
}


def _ablation(summaries):
    """Figure 4: masks in training, in prediction, in both, in neither."""
    tasks, figure, axes = _of_tasks(summaries, 1)
    for (ax,), task in zip(axes, tasks, strict=True):
        found = {
            (s.variant.method, s.network): s
            for s in summaries
            if s.task == task
        }
        metric = TASKS[task].metric
        for place, key in enumerate(ABLATION):
            if key in found:
                values = _values(found[key], metric)
                _points(ax, [place] * len(values), values, "tab:blue")
                ax.plot(
                    place, np.mean(values), "_", color="tab:blue", ms=40, mew=2
                )
        ax.set_xticks(range(len(ABLATION)), list(ABLATION.values()))
        ax.set_xlim(-0.5, len(ABLATION) - 0.5)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(TASKS[task].title)
        ax.set_ylabel(_axis_label(metric))
    return figure


def _sensitivity(summaries):
    """Figure 5: the score against the dropout rate, and the sample number."""
    tasks, figure, axes = _of_tasks(summaries, 2)
    for row, task in zip(axes, tasks, strict=True):
        of_task = [s for s in summaries if s.task == task]
        for ax, field in zip(row, ("dropout_rate", "num_samples"), strict=True):
            for network in ("mean", "ensemble"):
                _sweep(ax, of_task, field, network)
            ax.set_title(TASKS[task].title)
            ax.set_ylabel(_axis_label(TASKS[task].metric))
        row[1].set_xscale("log", base=2)
        row[1].xaxis.set_major_formatter(ScalarFormatter())
        row[0].set_xlabel("dropout rate p")
        row[1].set_xlabel("sample number N, in training and in prediction")
    return _with_legends(figure, axes)


def _sweep(ax, summaries, field, network):
    points = {}
    for s in summaries:
        if field in s.variant.settings and s.network == network:
            points[s.variant.settings[field]] = _values(s, TASKS[s.task].metric)
        elif field == "dropout_rate" and (s.variant.method, s.network) == (
            "lora",
            "mean",
        ):
            points[0.0] = _values(s, TASKS[s.task].metric)
    if points:
        places = sorted(points)
        values = np.array([points[place] for place in places]).T
        line(ax, values, NETWORKS[network], places)


def _points(ax, x, y, color):
    ax.plot(x, y, "o", color=color, alpha=0.4)


def line(ax, values, label, places=None):
    """Draw the mean over runs, and the range of them as a band."""
    if places is None:
        places = np.arange(1, values.shape[1] + 1)
    (line,) = ax.plot(places, values.mean(0), "o-", ms=3, label=label)
    low, high = values.min(0), values.max(0)
    ax.fill_between(places, low, high, color=line.get_color(), alpha=0.15)


def _values(summary, score):
    factor = 100 if score in PERCENT else 1
    return factor * summary.scores[score]


def _axis_label(score):
    name = TITLES[score]
    return f"{name}, %" if score in PERCENT else name


def _name(summary):
    if summary.network == "mean" and is_published(summary):
        return summary.variant.label
    return f"{summary.variant.label}, {NETWORKS[summary.network]}"


def _of_tasks(summaries, columns):
    tasks = list(dict.fromkeys(s.task for s in summaries))
    figure, axes = _panels(len(tasks), columns, (6, 4.5))
    return tasks, figure, axes


def _panels(rows, columns, size):
    width, height = size
    return plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
    )


def _with_legends(figure, axes, label=None):
    for ax in axes.flat:
        if label:
            ax.set_xlabel(label)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    return figure


DRAWN = {
    "table-1": _scores,
    "table-2": _scores,
    "table-4": _scores,
    "figure-1": _losses,
    "figure-3": _calibration,
    "figure-4": _ablation,
    "figure-5": _sensitivity,
    "transformer-dropout": _scores,
}
