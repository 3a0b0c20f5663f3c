"""A plot of one file of `speed.py`: bars with quartiles, memory beside."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
from comparisons import BACKEND_NAMES
from comparisons import quartiles
from tables import rows_of
from tables import title

COLORS = {"jax": "#0072b2", "torch": "#d55e00", "peft": "#009e73"}
PANELS = {
    "train": "training step, ms",
    "predict": "predict, ms",
    "ensemble_predict": "ensemble_predict of 4, ms\n(pale: four predict)",
}
PALE = 0.35


def draw(content, path):
    """Draw the contenders of each backend, one under the other."""
    places = _places(content["contenders"])
    figure, axes = plt.subplots(
        *(1, len(PANELS) + 1),
        figsize=(13, 1.6 + 0.28 * len(places)),
        sharey=True,
        layout="constrained",
    )
    for axis, (action, label) in zip(axes, PANELS.items(), strict=False):
        axis.set_title(label, fontsize=9)
        for about, place in places:
            _times(
                axis, place, about["backend"], rows_of(content, about), action
            )
    axes[-1].set_title("peak memory in training, MiB", fontsize=9)
    for about, place in places:
        _memory(axes[-1], place, about["backend"], rows_of(content, about))
    axes[0].set_yticks(
        [place for _, place in places],
        [_label(about) for about, _ in places],
        fontsize=8,
    )
    axes[0].invert_yaxis()
    for axis in axes:
        axis.set_xlim(left=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(content), fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _places(contenders):
    """Each contender and its height; a gap parts the backends."""
    places, height, before = [], 0.0, None
    for about in contenders:
        height += 1.0 if about["backend"] == before else 1.6
        before = about["backend"]
        places.append((about, height))
    return places


def _label(about):
    backend = BACKEND_NAMES[about["backend"]]
    label = about["label"].replace("`", "")
    return label if label.startswith(backend) else f"{label}  ({backend})"


def _times(axis, place, backend, rows, action):
    row = rows.get(action)
    if row is None:
        return
    if action == "ensemble_predict":
        _bar(axis, place, backend, rows["four_predicts"], alpha=PALE)
    if row["ms"]:
        _bar(axis, place, backend, row, height=0.45)
    elif row["failed"]:
        axis.text(0, place, " failed", va="center", fontsize=7)


def _bar(axis, place, backend, row, height=0.8, alpha=1.0):
    if not row["ms"]:
        return
    low, median, high = quartiles(row["ms"])
    axis.barh(
        place,
        median,
        height,
        color=COLORS[backend],
        alpha=alpha,
        xerr=[[median - low], [high - median]],
        error_kw={"elinewidth": 1, "capsize": 2, "alpha": alpha},
    )


def _memory(axis, place, backend, rows):
    row = rows.get("train")
    if row and row["memory"]:
        excess = row["memory"]["excess"] / 2**20
        axis.barh(place, excess, 0.6, color=COLORS[backend])
