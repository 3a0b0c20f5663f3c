"""Who takes part: a name, what is switched on, and what is measured."""

import dataclasses

BACKENDS = ["jax", "torch", "peft"]
STEP = ("train", "predict")
ENSEMBLE = (*STEP, "four_predicts", "ensemble_predict")
# Actions of a group follow one another in each turn of a contender.
GROUPS = (("train",), ("predict",), ("four_predicts", "ensemble_predict"))
ACTIONS = [action for group in GROUPS for action in group]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to fine-tune.

    Attributes:
        label: Its name in tables.
        options: Of Keras: arguments of `enable_lora_dropout`, or `None` for
            KerasHub's own `enable_lora`; `adaptive` and `top_third` are short
            for a `RankBudget` and for the topmost third of the blocks,
            `hidden_key` has arguments of that function. Of PEFT: `adaptive`
            and `compiled`.
        actions: What is measured.
    """

    label: str
    options: dict | None
    actions: tuple = STEP


KERAS = {
    "kerashub": Entry("KerasHub `enable_lora`", None),
    "plain": Entry("plain LoRA", {"num_samples": 1, "dropout_rate": 0.0}),
    "hidden-key-minus": Entry(
        "plain LoRA, HiddenKey-",
        {"num_samples": 1, "dropout_rate": 0.0, "hidden_key": {}},
    ),
    "hidden-key": Entry(
        "plain LoRA, HiddenKey",
        {
            "num_samples": 1,
            "dropout_rate": 0.0,
            "hidden_key": {"kl_weight": 1.0},
        },
    ),
    "n1": Entry("LoRA Dropout, N = 1", {"num_samples": 1}),
    "n1-stock": Entry(
        "LoRA Dropout, N = 1, KerasHub's attention",
        {"num_samples": 1, "optimize": False},
    ),
    "n1-example": Entry(
        "LoRA Dropout, N = 1, per example",
        {"num_samples": 1, "mask_sharing": "example"},
    ),
    "n4": Entry("LoRA Dropout, N = 4, parallel", {"num_samples": 4}, ENSEMBLE),
    "n4-sequential": Entry(
        "LoRA Dropout, N = 4, sequential",
        {"num_samples": 4, "sampling": "sequential"},
        ENSEMBLE,
    ),
    "n1-top": Entry(
        "LoRA Dropout, N = 1, top third adapted",
        {"num_samples": 1, "top_third": True},
    ),
    "n4-top": Entry(
        "LoRA Dropout, N = 4, parallel, top third adapted",
        {"num_samples": 4, "top_third": True},
        ENSEMBLE,
    ),
    "adalora": Entry(
        "AdaLoRA Dropout, N = 1", {"num_samples": 1, "adaptive": True}
    ),
}
PEFT = {
    "peft-lora": Entry("PEFT LoRA", {}),
    "peft-lora-compiled": Entry(
        "PEFT LoRA, `torch.compile`", {"compiled": True}
    ),
    "peft-adalora": Entry("PEFT AdaLoRA", {"adaptive": True}),
    "peft-adalora-compiled": Entry(
        "PEFT AdaLoRA, `torch.compile`", {"adaptive": True, "compiled": True}
    ),
}
KEYS = [*KERAS, *PEFT]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An `Entry` on a backend; one child process."""

    backend: str
    key: str

    @property
    def entry(self):
        return (PEFT if self.backend == "peft" else KERAS)[self.key]

    @property
    def name(self):
        return f"{self.entry.label} ({self.backend})"

    def measured(self, wanted):
        """Those of its actions that are wanted."""
        return [action for action in self.entry.actions if action in wanted]


def choose(backends, keys):
    """Return the `Contender` objects of these backends and keys, in order."""
    return [
        Contender(backend, key)
        for backend in BACKENDS
        if backend in backends
        for key in (PEFT if backend == "peft" else KERAS)
        if key in keys
    ]
