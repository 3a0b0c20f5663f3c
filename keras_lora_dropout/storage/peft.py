"""What a PEFT adapter is, apart from any model and any file."""

import dataclasses

import numpy as np

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # Of every tensor's name.


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one module.

    It adds `scaling * b @ diag(e) @ a` to a weight `(out, in)`.

    Attributes:
        a: Array of shape `(rank, in)`.
        b: Array of shape `(out, rank)`.
        scaling: Number.
        e: Array of shape `(rank,)` for AdaLoRA, `None` for LoRA.
        initial_rank: AdaLoRA: the rank before anything was pruned.
        magnitude: DoRA: array of shape `(out,)`, the norm of each row of the
            weight in force.
        is_embedding: Whether the module is an embedding; `in` is the size of
            its vocabulary then.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float
    e: np.ndarray | None = None
    initial_rank: int | None = None
    magnitude: np.ndarray | None = None
    is_embedding: bool = False

    @property
    def rank(self):
        return self.a.shape[0]

    def without_singular_values(self):
        """Return the same as plain LoRA."""
        b = self.b if self.e is None else self.b * self.e
        return dataclasses.replace(self, b=b, e=None, initial_rank=None)


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """What an adapter folder holds.

    Attributes:
        modules: Dictionary of module name -> `LowRank`.
        saved: Dictionary of weight name -> array: whole weights, such as those
            of a head (`modules_to_save`).
        settings: Dictionary of further entries of the configuration.
    """

    modules: dict
    saved: dict
    settings: dict = dataclasses.field(default_factory=dict)

    @property
    def is_adaptive(self):
        """Whether it is AdaLoRA."""
        return all(m.e is not None for m in self.modules.values())
