"""What the unified framework of transformer dropout compares.

Wang et al., "LoRA Meets Dropout under a Unified Framework", 2024,
https://arxiv.org/abs/2403.00812, Figure 4: three positions, three patterns,
and what makes up for the gap to prediction.
"""

import keras_lora_dropout as kld
from keras_lora_dropout.core.structured_dropout import PATTERNS

_HIDDEN_KEY = {
    "attention": "DropKey",
    "attention_pattern": "column",
    "hidden_pattern": "element",
}
# Label and fields of `Cell` of each row, all on plain LoRA.
COMPARED = {
    **{
        f"{name}, {pattern}": {"attention": name, "attention_pattern": pattern}
        for name in ("DropKey", "DropAttention")
        for pattern in PATTERNS
    },
    **{
        f"HiddenCut, {pattern}": {"hidden_pattern": pattern}
        for pattern in PATTERNS
    },
    "HiddenKey-, not rescaled": {**_HIDDEN_KEY, "hidden_rescale": False},
    "HiddenKey-": _HIDDEN_KEY,
    "HiddenKey, JS": {**_HIDDEN_KEY, "consistency": "js"},
    "HiddenKey, KL": {**_HIDDEN_KEY, "consistency": "kl"},
}
# Those on LoRA Dropout.
COMBINED = {
    "LoRA+Dropout, HiddenKey-": _HIDDEN_KEY,
    "LoRA+Dropout, HiddenKey, KL": {**_HIDDEN_KEY, "consistency": "kl"},
}


def blocks_drop(cell):
    """Whether a cell has any transformer dropout."""
    return bool(cell.attention or cell.hidden_pattern)


def enable_block_dropout(model, cell):
    """Let the blocks of an adapted model drop as a `Cell` says, if it does."""
    if not blocks_drop(cell):
        return
    attention = hidden = consistency = None
    if cell.attention:
        kind = getattr(kld, cell.attention)
        attention = kind(cell.attention_rate, cell.attention_pattern)
    if cell.hidden_pattern:
        hidden = kld.HiddenCut(
            cell.hidden_rate, cell.hidden_pattern, cell.hidden_rescale
        )
    if cell.consistency:
        consistency = kld.Consistency(cell.consistency_weight, cell.consistency)
    kld.enable_transformer_dropout(
        model, attention=attention, hidden=hidden, consistency=consistency
    )
