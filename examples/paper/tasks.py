"""The tasks of the paper: their data, texts, labels and metrics."""

import dataclasses

PAIR = ("sentence1", "sentence2")
VALIDATION = ("validation",)


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: String. Its name in the paper.
        dataset: String. Its data set in TFDS.
        texts: Names of the fields with the text; two make a pair.
        classes: Integer. Number of labels; 1 is regression, 0 are spans.
        metric: String. The figure that the paper's tables have of it.
        second: String. A second figure to draw beside it.
        splits: TFDS splits to evaluate; the first is that of the tables.
    """

    title: str
    dataset: str
    texts: tuple[str, ...]
    classes: int = 2
    metric: str = "accuracy"
    second: str = "ece"
    splits: tuple[str, ...] = VALIDATION


def _squad(title, dataset):
    return Task(title, dataset, ("question", "context"), 0, "f1", "exact_match")


TASKS = {
    "mnli": Task(
        "MNLI",
        "glue/mnli",
        ("premise", "hypothesis"),
        classes=3,
        splits=("validation_matched", "validation_mismatched"),
    ),
    "sst2": Task("SST-2", "glue/sst2", ("sentence",)),
    "cola": Task("CoLA", "glue/cola", ("sentence",), metric="matthews"),
    "qqp": Task("QQP", "glue/qqp", ("question1", "question2")),
    "qnli": Task("QNLI", "glue/qnli", ("question", "sentence")),
    "rte": Task("RTE", "glue/rte", PAIR),
    "mrpc": Task("MRPC", "glue/mrpc", PAIR),
    "stsb": Task("STS-B", "glue/stsb", PAIR, 1, "correlation", "mse"),
    "squad1": _squad("SQuAD v1.1", "squad/v1.1"),
    "squad2": _squad("SQuAD v2.0", "squad/v2.0"),
}
GLUE = tuple(name for name, task in TASKS.items() if task.classes)
SQUAD = tuple(name for name, task in TASKS.items() if not task.classes)
