"""The table and the plot of `mask_variance.py`, made of its file."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np

SAMPLINGS = ("bernoulli", "balanced")
TITLES = {
    "gradient": "Gradient of the adapters",
    "ensemble": "Logits of the ensemble",
}
COLOURS = {"batch": "C0", "example": "C1"}


def table(content):
    """Return the cells as a Markdown table."""
    lines = [
        "| what varies | masks of the | N | `bernoulli` | `balanced` | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (quantity, sharing, count), row in _rows(content).items():
        texts = [_text(*row["bernoulli"]), "the same", ""]
        if "balanced" in row:
            ratio = _ratio(row["balanced"], row["bernoulli"])
            texts[1:] = _text(*row["balanced"]), _text(*ratio)
        cells = [quantity, sharing, str(count), *texts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(content):
    """Draw the variances by the number of instances, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = _rows(content)
    counts = sorted({count for _, _, count in rows})
    for ax, (quantity, title) in zip(axes, TITLES.items(), strict=True):
        for sharing, sampling in itertools.product(COLOURS, SAMPLINGS):
            points = {
                count: row.get(sampling, row["bernoulli"])
                for (*kind, count), row in rows.items()
                if kind == [quantity, sharing]
            }
            if points:
                values, errors = np.transpose(list(points.values()))
                ax.errorbar(
                    list(points),
                    values,
                    errors,
                    color=COLOURS[sharing],
                    linestyle="-" if sampling == "balanced" else "--",
                    marker="o",
                    label=f"{sampling}, masks of the {sharing}",
                )
        ax.set(xscale="log", yscale="log", title=title)
        ax.set(xlabel="instances N", ylabel="variance / squared mean")
        ax.set_xticks(counts, map(str, counts))
        ax.minorticks_off()
        ax.legend()
    return figure


def _rows(content):
    """Relative variances and their standard errors.

    Returns:
        Dict of `(quantity, mask_sharing, N)`, in order, -> dict of
        mask_sampling -> pair of numbers.
    """
    rows = {}
    for name, cell in content["cells"].items():
        quantity, sampling, sharing, count = name.split("/")
        scale = _squared_mean(content, quantity)
        found = cell["variance"] / scale, cell["standard_error"] / scale
        rows.setdefault((quantity, sharing, int(count)), {})[sampling] = found
    order = list(TITLES)
    return {
        key: rows[key]
        for key in sorted(rows, key=lambda k: (order.index(k[0]), *k[1:]))
    }


def _squared_mean(content, quantity):
    """The masks do not change the mean: take it where it is known best."""
    cells = [
        cell
        for name, cell in content["cells"].items()
        if name.startswith(quantity)
    ]
    return min(cells, key=lambda c: c["variance"])["squared_mean"]


def _ratio(above, below):
    """The ratio of two pairs of a value and its error, as such a pair."""
    ratio = above[0] / below[0]
    errors = [error / value for value, error in (above, below)]
    return ratio, ratio * math.hypot(*errors)


def _text(value, error):
    """A number with its error, to two digits of the error."""
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
