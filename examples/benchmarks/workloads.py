"""What is measured: models and batches, by name and scale."""

import dataclasses

SMALL = {"num_layers": 4, "num_heads": 4, "hidden_dim": 256}
TINY = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16}
BASE = {"num_layers": 12, "num_heads": 12, "hidden_dim": 768}
# Of encoders: feed-forward size and vocabulary; Llama's feed-forward has gates.
SHAPES = {
    ("deberta", "smoke"): {**TINY, "intermediate_dim": 32},
    ("deberta", "small"): {**SMALL, "intermediate_dim": 1024},
    ("deberta", "base"): {
        **BASE,
        "intermediate_dim": 3072,
        "vocabulary_size": 128100,
    },
    ("deberta", "large"): {
        "num_layers": 24,
        "num_heads": 16,
        "hidden_dim": 1024,
        "intermediate_dim": 4096,
        "vocabulary_size": 128100,
    },
    ("bert", "smoke"): {**TINY, "intermediate_dim": 32},
    ("bert", "small"): {**SMALL, "intermediate_dim": 1024},
    ("bert", "base"): {
        **BASE,
        "intermediate_dim": 3072,
        "vocabulary_size": 30522,
    },
    ("llama", "smoke"): {**TINY, "intermediate_dim": 32},
    ("llama", "small"): {**SMALL, "intermediate_dim": 688},
    ("llama", "7b"): {
        "num_layers": 32,
        "num_heads": 32,
        "hidden_dim": 4096,
        "intermediate_dim": 11008,
        "vocabulary_size": 32000,
    },
    ("llama", "70b"): {
        "num_layers": 80,
        "num_heads": 64,
        "num_key_value_heads": 8,
        "hidden_dim": 8192,
        "intermediate_dim": 28672,
        "vocabulary_size": 32000,
    },
}
# Two blocks of the real width: what a compiler counts needs no more.
SHAPES["deberta", "blocks"] = {**SHAPES["deberta", "base"], "num_layers": 2}
SHAPES["deberta", "blocks"]["vocabulary_size"] = 1000
SHAPES["llama", "blocks"] = {
    **SHAPES["llama", "7b"],
    "num_layers": 2,
    "vocabulary_size": 1000,
}
# Examples and tokens of a batch.
BATCHES = {
    "blocks": (32, 128),
    "smoke": (2, 8),
    "small": (8, 64),
    "base": (32, 128),
    "7b": (4, 512),
}
MODELS = ["deberta", "bert", "llama"]
SCALES = ["small", "base", "7b"]
MAX_LENGTH = 512
BUCKETS = 256


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model and one batch, the same for all contenders.

    Attributes:
        model: "deberta", "bert" or "llama".
        scale: "smoke", "small", "base" or "7b".
        batch: Number of examples.
        length: Number of tokens of each example.
        rank: Rank of every adapter.
    """

    model: str
    scale: str
    batch: int
    length: int
    rank: int

    @property
    def shape(self):
        """Layers, heads, sizes: what both libraries are told."""
        return {"vocabulary_size": 1000, **SHAPES[self.model, self.scale]}

    @property
    def dtype(self):
        return "bfloat16" if self.scale in ("7b", "70b") else "float32"

    @property
    def is_decoder(self):
        return self.model == "llama"

    @property
    def top_third(self):
        """Indices of the topmost third of the blocks."""
        layers = self.shape["num_layers"]
        return range(layers - max(1, round(layers / 3)), layers)


def make_workload(model, scale, batch=None, length=None, rank=None):
    """Return the `Workload` of a scale; what is given replaces its own.

    Raises:
        ValueError: If the model has no such scale, or a number is out of range.
    """
    if (model, scale) not in SHAPES:
        scales = [s for m, s in SHAPES if m == model and s != "smoke"]
        raise ValueError(
            f"{model} has no scale {scale}; it has {' and '.join(scales)}"
        )
    usual_batch, usual_length = BATCHES[scale]
    usual_rank = {"smoke": 4, "7b": 16}.get(scale, 8)
    workload = Workload(
        model,
        scale,
        batch or usual_batch,
        length or usual_length,
        rank or usual_rank,
    )
    if not workload.is_decoder and workload.length > MAX_LENGTH:
        raise ValueError(f"{model} takes at most {MAX_LENGTH} tokens")
    return workload
