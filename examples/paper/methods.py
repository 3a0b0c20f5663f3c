"""The methods of Table 1, and what each does to a model."""

import dataclasses
from collections.abc import Callable

import keras_lora_dropout as kld
from keras_lora_dropout import baselines


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: String. Its name in tables.
        enable: Function of a model, a `Cell` and the number of steps of the
            run. It adapts the model.
        drops: Boolean. Whether it has masks, and so an ensemble.
    """

    label: str
    enable: Callable
    drops: bool = False


def _lora(model, cell, steps, **settings):
    del steps  # Ranks are fixed.
    kld.enable_lora_dropout(
        model,
        **{
            "rank": cell.rank,
            "alpha": cell.alpha,
            "dropout_rate": 0.0,
            "num_samples": 1,
            "seed": cell.seed,
            **settings,
        },
    )


def _adalora(model, cell, steps, **settings):
    budget = kld.RankBudget(
        target_rank=cell.rank,
        initial_rank=cell.initial_rank,
        warmup_steps=cell.budget_warmup,
        final_steps=cell.budget_final,
        mask_interval=cell.mask_interval,
        total_steps=steps,
        orthogonal_penalty=cell.orthogonal_penalty,
        orthogonal_form=cell.orthogonal_form,
    )
    settings = {"alpha": cell.adalora_alpha, **settings}
    _lora(model, cell, steps, rank_budget=budget, **settings)


def _masks(cell):
    """The paper's: one mask per instance for the whole batch."""
    return {
        "dropout_rate": cell.dropout_rate,
        "num_samples": cell.num_samples,
    }


def _masks_per_example(cell):
    """Masks for each example, in one instance: no costlier than plain LoRA."""
    return {
        "dropout_rate": cell.dropout_rate,
        "num_samples": 1,
        "mask_sharing": "example",
    }


def _bottleneck(model, cell, placement, size):
    # Without biases, sizes 32 and 64 give 1.22M and 1.18M, those of Table 1.
    baselines.enable_bottleneck_adapters(
        model,
        bottleneck_size=size,
        placement=placement,
        use_bias=False,
        seed=cell.seed,
    )


METHODS = {
    "full": Method("Full fine-tuning", lambda model, cell, steps: None),
    "bitfit": Method(
        "BitFit", lambda model, cell, steps: baselines.enable_bitfit(model)
    ),
    "houlsby": Method(
        "H-Adapter",
        lambda model, cell, steps: _bottleneck(
            model, cell, "houlsby", cell.houlsby_size
        ),
    ),
    "pfeiffer": Method(
        "P-Adapter",
        lambda model, cell, steps: _bottleneck(
            model, cell, "pfeiffer", cell.pfeiffer_size
        ),
    ),
    "lora": Method("LoRA", _lora),
    "lora-dropout": Method(
        "LoRA+Dropout",
        lambda model, cell, steps: _lora(model, cell, steps, **_masks(cell)),
        drops=True,
    ),
    "lora-dropout-example": Method(
        "LoRA+Dropout, per example",
        lambda model, cell, steps: _lora(
            model, cell, steps, **_masks_per_example(cell)
        ),
        drops=True,
    ),
    "adalora": Method("AdaLoRA", _adalora),
    "adalora-dropout": Method(
        "AdaLoRA+Dropout",
        lambda model, cell, steps: _adalora(model, cell, steps, **_masks(cell)),
        drops=True,
    ),
}
