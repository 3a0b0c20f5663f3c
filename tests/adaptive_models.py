"""Tiny models whose ranks adapt, and what they keep."""

import keras
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import set_random
from helpers import tiny_mlp

import keras_lora_dropout as kld

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Two warm-up steps, three final ones, a choice every second step of 16.
PHASES = (2, 3, 2, 16)
TOTAL = PHASES[-1]


def adaptive(budget=None, optimizer=None, model=None, **options):
    """An adapted MLP, ranks 4 to 2, compiled."""
    model = kld.enable_lora_dropout(
        model or tiny_mlp(),
        **{
            "rank": 4,
            "rank_budget": budget or kld.RankBudget(2),
            "num_samples": 2,
            "seed": 0,
            **options,
        },
    )
    model.compile(optimizer or keras.optimizers.Adam(0.05), LOSS)
    return model


def fit(model, epochs=5, **options):
    """Four steps an epoch, unless the optimizer accumulates."""
    x, y = classification_data(16)
    options = {"batch_size": 4, "epochs": epochs, "verbose": 0, **options}
    return model.fit(x, y, **options).history


def budget_of(phases=PHASES, target_rank=2, **options):
    warmup, final, interval, total = phases
    return kld.RankBudget(
        target_rank,
        warmup_steps=warmup,
        final_steps=final,
        mask_interval=interval,
        total_steps=total,
        **options,
    )


def adaptive_mlp(budget=None, optimizer=None, rank=4, **options):
    """An adapted MLP whose first and second layer have 4 triplets each.

    Its weights are the same on every backend.
    """
    model = tiny_mlp()
    set_random(model.weights, 7)
    model = kld.enable_lora_dropout(
        model,
        **{
            "rank": rank,
            "rank_budget": budget or budget_of(),
            "num_samples": 2,
            "seed": 3,
            **options,
        },
    )
    for seed, (_, layer) in enumerate(model.adapted_layers):
        set_random(layer.factors, seed)
    model.compile(optimizer or keras.optimizers.SGD(0.1), LOSS)
    return model


def singular_values(model):
    return [array(layer.lora_lambda) for _, layer in model.adapted_layers]


def kept_triplets(model):
    """A boolean array over all triplets: which are kept."""
    return array(model.rank_allocator.rank_mask) > 0


def assert_compact_copy_agrees(model):
    """Drop the pruned ranks; predictions and ensembles stay the same."""
    x, _ = classification_data()
    before = (
        model.predict(x, verbose=0),
        model.ensemble_predict(x, seed=5, verbose=0),
        model.ensemble_predict(x, seed=5, return_samples=True, verbose=0),
    )
    model.compact_ranks()
    after = (
        model.predict(x, verbose=0),
        model.ensemble_predict(x, seed=5, verbose=0),
        model.ensemble_predict(x, seed=5, return_samples=True, verbose=0),
    )
    for ours, theirs in zip(after, before, strict=True):
        assert_close(ours, theirs, 1e-6)
