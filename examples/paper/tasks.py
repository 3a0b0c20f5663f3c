"""The GLUE tasks of Table 1: their texts, labels and metrics."""

import dataclasses

PAIR = ("sentence1", "sentence2")
VALIDATION = ("validation",)


@dataclasses.dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        title: String. Its name in the paper.
        texts: Names of the fields with the text; two make a pair.
        classes: Integer. Number of labels; 1 is regression.
        metric: String. The figure that Table 1 has of it, as in `scores`.
        splits: TFDS splits to evaluate; the first is that of Table 1.
    """

    title: str
    texts: tuple[str, ...]
    classes: int = 2
    metric: str = "accuracy"
    splits: tuple[str, ...] = VALIDATION


TASKS = {
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        classes=3,
        splits=("validation_matched", "validation_mismatched"),
    ),
    "sst2": Task("SST-2", ("sentence",)),
    "cola": Task("CoLA", ("sentence",), metric="matthews"),
    "qqp": Task("QQP", ("question1", "question2")),
    "qnli": Task("QNLI", ("question", "sentence")),
    "rte": Task("RTE", PAIR),
    "mrpc": Task("MRPC", PAIR),
    "stsb": Task("STS-B", PAIR, classes=1, metric="correlation"),
}
