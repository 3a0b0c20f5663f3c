"""The results of a study's runs, averaged over their seeds."""

import dataclasses

import numpy as np
from methods import METHODS
from tasks import TASKS

NETWORKS = {
    "mean": "mean network",
    "ensemble": "ensemble",
    "test_dropout": "masks in prediction alone",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """One network of one variant on one split, over all its seeds.

    Attributes:
        task: Key of `TASKS`.
        split: TFDS split.
        variant: `Variant`.
        network: Key of `NETWORKS`.
        learning_rate: The chosen one.
        scores: Dictionary from a score's name to an array over the seeds.
        weights: Integer. Weights of the backbone that train, on average; of
            full fine-tuning all weights.
        runs: List of the results.
    """

    task: str
    split: str
    variant: object
    network: str
    learning_rate: float
    scores: dict
    weights: int
    runs: list


def summarize(plan, store):
    """Return the `Summary`s of all variants that have results."""
    summaries = []
    for task in plan.tasks:
        for variant in plan.variants:
            rate = plan.chosen_rate(task, variant.method, store)
            if rate is None:
                continue
            cells = plan.final(task, variant, rate)
            runs = [store.read(cell) for cell in cells if cell in store]
            if runs:
                summaries += _of_variant(task, variant, rate, runs)
    return summaries


def _of_variant(task, variant, rate, runs):
    kind = "total" if variant.method == "full" else "backbone"
    weights = round(np.mean([run["weights"][kind] for run in runs]))
    for split in TASKS[task].splits:
        for network in runs[0]["scores"][split]:
            rows = [run["scores"][split][network] for run in runs]
            scores = {
                name: np.array([r[name] for r in rows]) for name in rows[0]
            }
            yield Summary(
                task,
                split,
                variant,
                network,
                rate,
                scores,
                weights,
                runs,
            )


def curve(runs, *keys):
    """Return an array `(runs, epochs)` of what the epochs have under keys."""
    return np.array([[_at(e, keys) for e in run["epochs"]] for run in runs])


def _at(entry, keys):
    for key in keys:
        entry = entry[key]
    return entry


def is_published(summary):
    """Whether a network is the one that the paper shows of its method."""
    drops = METHODS[summary.variant.method].drops
    return summary.network == ("ensemble" if drops else "mean")
