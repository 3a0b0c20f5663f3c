"""Named hyper-parameters: those of the paper, and of one CPU.

`paper` has learning rate, batch size, epochs, dropout rate and sample number
of Table B.1, and what the paper takes from AdaLoRA: lengths, warm-up, weight
decay, the head's dropout and the schedule of ranks are those of its scripts.
`low-resource` fits a few hundred examples on a CPU.
"""

COMMON = {
    "rank": 8,
    "alpha": 16.0,
    "initial_rank": 12,
    # The scripts' scaling alpha / initial_rank is about 10 (CoLA: 32 / 3).
    "adalora_alpha": 128.0,
    "orthogonal_form": "mean_norm",
    "houlsby_size": 32,
    "pfeiffer_size": 64,
    "dropout_rate": 0.5,
    "num_samples": 4,
    "dtype_policy": "float32",
}
# Learning rate, batch size, epochs: Table B.1. Length, warm-up (steps or
# share), weight decay, dropout of the head, steps of the full and of the final
# budget, steps between two choices of ranks, weight of the penalty: AdaLoRA.
_PAPER_COLUMNS = (
    "learning_rate",
    "batch_size",
    "epochs",
    "sequence_length",
    "warmup",
    "weight_decay",
    "head_dropout",
    "budget_warmup",
    "budget_final",
    "mask_interval",
    "orthogonal_penalty",
)
_PAPER = {
    "mnli": (5e-4, 32, 7, 256, 1000, 0.0, 0.15, 8000, 50000, 100, 0.1),
    "rte": (1.2e-3, 32, 50, 320, 200, 0.01, 0.2, 600, 1800, 1, 0.3),
    "qnli": (5e-4, 32, 5, 512, 500, 0.01, 0.1, 2000, 8000, 100, 0.1),
    "mrpc": (1e-3, 32, 30, 320, 0.1, 0.01, 0.0, 600, 1800, 1, 0.1),
    "qqp": (5e-4, 32, 10, 320, 2000, 0.01, 0.15, 8000, 25000, 100, 0.1),
    "sst2": (8e-4, 32, 24, 128, 1000, 0.01, 0.0, 6000, 22000, 100, 0.1),
    "cola": (5e-5, 32, 25, 64, 100, 0.0, 0.1, 800, 3500, 10, 0.1),
    "stsb": (2.2e-3, 32, 25, 128, 100, 0.1, 0.2, 800, 2000, 10, 0.3),
    # Table B.2; what it leaves open is that of AdaLoRA's script for v2.0.
    "squad1": (1e-3, 16, 10, 384, 1000, 0.0, 0.0, 5000, 50000, 100, 0.1),
    "squad2": (1e-3, 16, 12, 384, 1000, 0.0, 0.0, 5000, 50000, 100, 0.1),
}
_LOW_RESOURCE = {
    "batch_size": 16,
    "epochs": 8,
    "sequence_length": 64,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "head_dropout": 0.1,
    "budget_warmup": 0.1,
    "budget_final": 0.4,
    "mask_interval": 1,
    "orthogonal_penalty": 0.1,
    "train_examples": 512,
    "selection_examples": 256,
}
_QUESTIONS = {
    "epochs": 2,
    "sequence_length": 256,
    "doc_stride": 64,
    "train_examples": None,
    "selection_examples": 0,
}
_LOW_RESOURCE_OF = {
    # 97 of 100 sentences have at most so many tokens of MiniLM's.
    "cola": {"sequence_length": 24},
    "sst2": {"sequence_length": 48},
    "squad1": _QUESTIONS,
    "squad2": _QUESTIONS,
}
LOW_RESOURCE_RATES = (1e-4, 1e-3, 5e-3)
CONFIGURATIONS = ("paper", "low-resource")


def configuration(name, task):
    """Return the settings of one task, and the learning rates to try.

    Args:
        name: `"paper"` or `"low-resource"`.
        task: String. Key of `TASKS`.

    Returns:
        Tuple of a dictionary of fields of `Cell`, and a tuple of rates.
    """
    if name == "paper":
        settings = dict(zip(_PAPER_COLUMNS, _PAPER[task], strict=True))
        rate = settings.pop("learning_rate")
        whole = {"train_examples": None, "selection_examples": 0}
        return {**COMMON, **settings, **whole}, (rate,)
    settings = {**COMMON, **_LOW_RESOURCE, **_LOW_RESOURCE_OF.get(task, {})}
    if not settings["selection_examples"]:
        return settings, (1e-3,)
    return settings, LOW_RESOURCE_RATES
