"""What each table and figure of the paper is made of: which runs."""

import dataclasses

import keras
from block_dropout import COMBINED
from block_dropout import COMPARED
from cells import Cell
from configurations import configuration
from methods import METHODS
from tasks import GLUE
from tasks import SQUAD
from tasks import TASKS

LORA_LIKE = ("lora", "lora-dropout", "adalora", "adalora-dropout")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a table, or a line of a figure.

    Attributes:
        label: String.
        method: Key of `METHODS`.
        settings: Dictionary of fields of `Cell` that differ from the usual.
    """

    label: str
    method: str
    settings: dict = dataclasses.field(default_factory=dict)


def _methods(names, **settings):
    return tuple(Variant(METHODS[n].label, n, settings) for n in names)


@dataclasses.dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes:
        title: String.
        tasks: The paper's tasks.
        variants: What is compared.
    """

    title: str
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]


def _budget(share, rank):
    """The methods of Table 2 with `share` percent of the weights."""
    settings = {
        "rank": rank,
        "alpha": 2.0 * rank,
        "initial_rank": rank * 3 // 2,
        "adalora_alpha": 16.0 * rank,
        "houlsby_size": 4 * rank,
        "pfeiffer_size": 8 * rank,
    }
    return tuple(
        Variant(f"{METHODS[name].label}, {share} %", name, settings)
        for name in (
            "houlsby",
            "pfeiffer",
            *LORA_LIKE,
            "lora-dropout-example",
        )
    )


_BUDGETS = (*_budget(0.16, 2), *_budget(0.32, 4), *_budget(0.65, 8))
_RATES = tuple(
    Variant(f"p = {rate}", "lora-dropout", {"dropout_rate": rate})
    for rate in (0.1, 0.3, 0.5, 0.7, 0.9)
)
_SAMPLES = tuple(
    Variant(f"N = {count}", "lora-dropout", {"num_samples": count})
    for count in (1, 2, 4, 8)
)
_TRANSFORMER_DROPOUT = (
    *_methods(("lora",)),
    *(Variant(label, "lora", fields) for label, fields in COMPARED.items()),
    *_methods(("lora-dropout",)),
    *(
        Variant(label, "lora-dropout", fields)
        for label, fields in COMBINED.items()
    ),
)
STUDIES = {
    "table-1": Study("GLUE: all methods", GLUE, _methods(METHODS)),
    "table-2": Study("SQuAD: three budgets of weights", SQUAD, _BUDGETS),
    "table-4": Study(
        "Calibration", ("sst2", "rte", "mrpc"), _methods(LORA_LIKE)
    ),
    "figure-1": Study(
        "Loss on training and evaluation data",
        ("sst2",),
        _methods(LORA_LIKE, curves=True),
    ),
    "figure-3": Study(
        "Calibration error while training",
        ("rte",),
        _methods(LORA_LIKE, curves=True),
    ),
    "figure-4": Study(
        "Dropout in training, in prediction, in both, in neither",
        ("mrpc", "cola"),
        _methods(("lora", "lora-dropout")),
    ),
    "figure-5": Study(
        "Dropout rate, sample number",
        ("mrpc",),
        (Variant("p = 0", "lora"), *_RATES, *_SAMPLES),
    ),
    "transformer-dropout": Study(
        "Positions, patterns, compensation",
        ("mrpc",),
        _TRANSFORMER_DROPOUT,
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a study, under the options of a command.

    Attributes:
        study: `Study`.
        tasks: Keys of `TASKS`.
        variants: Those of the study that are wanted.
        seeds: Integers. Learning rates are chosen on the first.
        configuration: Name of the hyper-parameters.
        overrides: Dictionary of fields of `Cell` for all runs.
        learning_rates: Those to choose from; `None`: the configuration's.
    """

    study: Study
    tasks: tuple[str, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    configuration: str
    overrides: dict
    learning_rates: tuple[float, ...] | None = None

    def cells(self, store=None):
        """Yield all runs; each may depend on results of those before it.

        Args:
            store: `Store` to read results from; `None` yields as many runs,
                with guessed learning rates.
        """
        seen = set()
        for task in self.tasks:
            for variant in self.variants:
                for cell in self._cells_of(task, variant, store):
                    if cell not in seen:
                        seen.add(cell)
                        yield cell

    def _cells_of(self, task, variant, store):
        yield from self.searched(task, variant.method)
        rate = self.chosen_rate(task, variant.method, store)
        if rate is not None:
            yield from self.final(task, variant, rate)

    def searched(self, task, method):
        """Return the runs that the learning rate is chosen by, if any."""
        rates = self._rates(task)
        if len(rates) == 1:
            return []
        seed = self.seeds[0]
        return [self._cell(task, method, {}, seed, rate) for rate in rates]

    def final(self, task, variant, rate):
        """Return the runs of a variant whose results are shown."""
        return [
            self._cell(task, variant.method, variant.settings, seed, rate)
            for seed in self.seeds
        ]

    def label(self, cell):
        """Return the label of the first variant that has the run."""
        for variant in self.variants:
            if cell in self.final(cell.task, variant, cell.learning_rate):
                return variant.label
        return METHODS[cell.method].label

    def chosen_rate(self, task, method, store):
        """Return the rate with the best score on the examples for selection.

        `None` if a run of the search is missing.
        """
        rates = self._rates(task)
        if len(rates) == 1 or store is None:
            return rates[0]
        cells = self.searched(task, method)
        if not all(cell in store for cell in cells):
            return None
        metric = TASKS[task].metric

        def merit(cell):
            scores = store.read(cell)["scores"]["selection"]["mean"]
            loss = scores.get("nll", scores.get("mse", 0.0))
            return scores[metric], -loss

        return max(cells, key=merit).learning_rate

    def _rates(self, task):
        rates = configuration(self.configuration, task)[1]
        return self.learning_rates or rates

    def _cell(self, task, method, settings, seed, rate):
        fields = configuration(self.configuration, task)[0]
        fields = {**fields, **self.overrides, **settings}
        return Cell(
            task=task,
            method=method,
            backend=keras.backend.backend(),
            seed=seed,
            learning_rate=rate,
            **fields,
        )
