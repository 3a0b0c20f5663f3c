"""Which number is divided by which, and the quotient."""

import dataclasses
import statistics

BACKEND_NAMES = {"jax": "JAX", "torch": "PyTorch", "peft": "PEFT"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One quotient of two measured times.

    Attributes:
        label: What is compared.
        above, below: Backend, contender and action.
    """

    label: str
    above: tuple
    below: tuple


def comparisons(backend):
    """The comparisons of one Keras backend."""

    def ours(key, action="train"):
        return backend, key, action

    def peft(key, action="train"):
        return "peft", key, action

    return [
        Comparison(f"{label}, {BACKEND_NAMES[backend]}", above, below)
        for label, above, below in [
            ("N = 1 / KerasHub `enable_lora`", ours("n1"), ours("kerashub")),
            ("N = 1 / plain LoRA", ours("n1"), ours("plain")),
            (
                "N = 1 per example / plain LoRA",
                ours("n1-example"),
                ours("plain"),
            ),
            (
                "HiddenKey- / plain LoRA",
                ours("hidden-key-minus"),
                ours("plain"),
            ),
            ("HiddenKey / plain LoRA", ours("hidden-key"), ours("plain")),
            ("N = 4 parallel / N = 1", ours("n4"), ours("n1")),
            ("N = 4 sequential / N = 1", ours("n4-sequential"), ours("n1")),
            ("AdaLoRA Dropout, N = 1 / N = 1", ours("adalora"), ours("n1")),
            ("N = 1 / PEFT LoRA", ours("n1"), peft("peft-lora")),
            (
                "N = 1 / PEFT LoRA, compiled",
                ours("n1"),
                peft("peft-lora-compiled"),
            ),
            (
                "AdaLoRA Dropout, N = 1 / PEFT AdaLoRA",
                ours("adalora"),
                peft("peft-adalora"),
            ),
            (
                "AdaLoRA Dropout, N = 1 / PEFT AdaLoRA, compiled",
                ours("adalora"),
                peft("peft-adalora-compiled"),
            ),
            (
                "`predict` / that of KerasHub `enable_lora`",
                ours("n1", "predict"),
                ours("kerashub", "predict"),
            ),
            (
                "`predict` / that of PEFT LoRA",
                ours("n1", "predict"),
                peft("peft-lora", "predict"),
            ),
            *[
                (
                    f"`ensemble_predict` of 4 / four `predict`{where}",
                    ours(key, "ensemble_predict"),
                    ours(key, "four_predicts"),
                )
                for key, where in [
                    ("n4", ""),
                    ("n4-sequential", ", sequential"),
                    ("n4-top", ", top third"),
                ]
            ],
        ]
    ]


def samples(content, place):
    """The milliseconds of a `(backend, contender, action)`, or none."""
    for row in content["results"]:
        if (row["backend"], row["contender"], row["action"]) == place:
            return row["ms"]
    return []


def quartiles(values):
    """Lower quartile, median and upper quartile; of one value, the value."""
    if len(values) < 2:
        return (*values, *values, *values)
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(content, comparison):
    """Quartiles of the quotient over pairs of neighbours in time, or none.

    The samples of one round are neighbours: the machine's drift cancels out.
    """
    above = samples(content, comparison.above)
    below = samples(content, comparison.below)
    pairs = zip(above, below, strict=False)
    return quartiles([a / b for a, b in pairs])
