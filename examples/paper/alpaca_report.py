"""The perplexities of held-out responses, as a table and as a figure.

Runs that differ in their seeds and names alone are one row, and one line.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
from figures import line
from figures import save
from report import markdown
from report import spread

from keras_lora_dropout.storage.atomic import write_atomically

HEADS = (
    "run",
    "dropout rate",
    "N",
    "seeds",
    "before",
    "best, mean network",
    "last, mean network",
    "best, ensemble",
    "last, ensemble",
    "training loss",
    "seconds an epoch",
)


def write(folder):
    """Write `alpaca.md` and `alpaca.png` beside the folders of the runs.

    Args:
        folder: Path of the folder of all runs of `alpaca.py`.

    Raises:
        SystemExit: If no run has finished an epoch.
    """
    groups = groups_of(folder)
    if not groups:
        raise SystemExit(
            f"No run in {folder} has finished an epoch. Run it without "
            "--report, or pass the --output of the runs."
        )
    save(draw(groups), folder / "alpaca.png")
    rows = [row_of(name, runs) for name, runs in groups.items()]
    table = markdown(HEADS, rows) + "\n"
    write_atomically(folder / "alpaca.md", table.encode())
    print(f"{table}\nWritten: {folder / 'alpaca.md'}")


def groups_of(folder):
    """Read the runs, those of other seeds together; the first one names all.

    Returns:
        Dictionary of lists of pairs: a run's settings, and its epochs.
    """
    groups = {}
    for path in sorted(folder.glob("*/epochs.json")):
        settings = json.loads(path.with_name("settings.json").read_text())
        epochs = json.loads(path.read_text())
        if len(epochs) < 2:
            continue
        alike = {
            name: value
            for name, value in settings.items()
            if name not in ("seed", "name")
        }
        groups.setdefault(json.dumps(alike), []).append((settings, epochs))
    return {runs[0][0]["name"]: runs for runs in groups.values()}


def row_of(name, runs):
    settings = runs[0][0]
    mean, ensemble = (perplexities(runs, n) for n in ("mean", "ensemble"))
    loss = [epochs[-1]["loss"] for _, epochs in runs]
    seconds = [epoch["seconds"] for _, epochs in runs for epoch in epochs[1:]]
    return [
        name,
        f"{settings['dropout_rate']:g}",
        str(settings["num_samples"]),
        str(len(runs)),
        spread(mean[:, 0], 2),
        spread(mean[:, 1:].min(1), 2),
        spread(mean[:, -1], 2),
        spread(ensemble[:, 1:].min(1), 2),
        spread(ensemble[:, -1], 2),
        spread(loss, 2),
        f"{np.median(seconds):.0f}",
    ]


def perplexities(runs, network):
    """Those before training and after each epoch that all runs have.

    Returns:
        NumPy array of shape `(runs, 1 + epochs)`.
    """
    shortest = min(len(epochs) for _, epochs in runs)
    return np.array(
        [
            [epoch[f"{network}_perplexity"] for epoch in epochs[:shortest]]
            for _, epochs in runs
        ]
    )


def draw(groups):
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in groups.items():
        networks = {"mean": name}
        if runs[0][0]["dropout_rate"]:
            networks["ensemble"] = f"{name}, ensemble"
        for network, label in networks.items():
            values = perplexities(runs, network)
            line(ax, values, label, np.arange(values.shape[1]))
    ax.set_xlabel("epoch")
    ax.set_ylabel("perplexity of held-out responses")
    ax.legend(fontsize="small")
    return figure
