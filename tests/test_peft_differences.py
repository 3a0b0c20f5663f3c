"""Where our AdaLoRA differs from PEFT's on purpose, side by side."""

import json

import keras
import numpy as np
import peft_scenarios
from adapted_twin import Adapted
from adapted_twin import assert_same_ranks
from adapted_twin import rank_budget
from peft_scenarios import CLOSED_RUN
from peft_scenarios import EQUAL_RUN
from peft_scenarios import LAYERS
from peft_scenarios import REGROWTH_RUN
from peft_scenarios import RESUMED_STEP
from peft_scenarios import TIES_RUN
from peft_scenarios import flat
from peft_scenarios import step_values


def test_equal_initial_and_target_rank(peft):
    """PEFT fails as soon as it should prune nothing; ours keeps all ranks."""
    failures = [json.loads(text) for text in peft["equal_ranks.failures"]]
    assert failures[: EQUAL_RUN.warmup_steps] == [None] * EQUAL_RUN.warmup_steps
    for error, message in failures[
        EQUAL_RUN.warmup_steps : EQUAL_RUN.freeze_step
    ]:
        assert error == "RuntimeError" and "kthvalue" in message

    ours = Adapted(EQUAL_RUN)
    for step in EQUAL_RUN.steps:
        values, gradients = step_values(EQUAL_RUN, step)
        ours.step_to(values, gradients)
        assert ours.kept().all()
        assert np.array_equal(ours.lambdas(), flat(v[1] for v in values))


def test_tied_importances(peft):
    """PEFT prunes all of the tied; ours keeps the first, up to the budget."""
    pruning = slice(TIES_RUN.warmup_steps, None)
    assert not peft["ties.kept"][pruning].any()

    values = peft_scenarios.tied_values(TIES_RUN.initial_rank)
    schedule = rank_budget(TIES_RUN).schedule(
        TIES_RUN.total_steps, [TIES_RUN.initial_rank] * len(LAYERS)
    )
    ours = Adapted(TIES_RUN)
    budgets = []
    for step in TIES_RUN.steps:
        ours.step_to(values, values)
        budgets.append(schedule.budget(step))
        first = np.arange(TIES_RUN.triplets) < budgets[-1]
        assert_same_ranks(ours.kept(), first, step)
    assert budgets[-1] > 0 and len(set(budgets)) > 3


def test_pruned_values_stay_zero(peft):
    """Between two choices, pruned singular values grow again in PEFT."""
    run = REGROWTH_RUN
    regrown = np.sum((peft["regrowth.lambda"] != 0) & ~peft["regrowth.kept"], 1)
    between = [
        step
        for step in run.steps
        if run.mask_interval < step < run.freeze_step
        and step % run.mask_interval
    ]
    assert all(regrown[step - 1] > 0 for step in between)

    ours = Adapted(run)
    ours.assign(step_values(run, 0)[0])
    kept, lambdas = ours.train(run.steps)
    assert np.array_equal(kept.sum(axis=1), peft["regrowth.kept"].sum(axis=1))
    assert np.all(lambdas[~kept] == 0)
    assert np.all(lambdas[kept] != 0)


def resumed(model, run):
    """A fresh model that holds what the weights of another one say."""
    fresh = Adapted(run)
    fresh.model.set_weights(model.get_weights())
    return fresh


def test_resuming_past_the_freeze_step(peft):
    """PEFT fails, from either kind of checkpoint; ours keeps the pattern."""
    error, message = json.loads(str(peft["resumption.from_parameters"]))
    assert error == "AttributeError" and "NoneType" in message
    error, message = json.loads(str(peft["resumption.from_saved"]))
    assert error == "RuntimeError" and ("shape" in message or "size" in message)

    run = CLOSED_RUN
    first_part = Adapted(run)
    first_part.assign(step_values(run, 0)[0])
    kept, _ = first_part.train(range(1, run.freeze_step + 1))
    fresh = resumed(first_part.model, run)
    kept_on, lambdas = fresh.train(range(run.freeze_step + 1, run.total_steps))
    assert kept[-1].sum() == run.target_rank * len(LAYERS)
    assert np.all(kept_on == kept[-1])
    assert np.all((lambdas != 0) == kept[-1])


def test_resuming_before_the_freeze_step(peft):
    """PEFT starts from zero scores and ends with other ranks; ours do not."""
    run = CLOSED_RUN
    unbroken = peft["closed.kept"][run.freeze_step - 1]
    assert np.any(peft["resumption.kept"] != unbroken)

    first_part = Adapted(run)
    first_part.assign(step_values(run, 0)[0])
    first_part.train(range(1, RESUMED_STEP))
    fresh = resumed(first_part.model, run)
    kept, _ = fresh.train(range(RESUMED_STEP, run.freeze_step + 1))
    assert_same_ranks(kept[-1], unbroken, run.freeze_step)


def test_nothing_to_call(peft):
    """PEFT's ranks stay if `update_and_allocate` is not called by hand."""
    run = CLOSED_RUN
    assert np.all(peft["forgotten.lambda"] != 0)

    ours = Adapted(run, total_steps=None)
    ours.assign(step_values(run, 0)[0])
    ours.model.compile(keras.optimizers.SGD(0.01), "mse")
    generator = np.random.default_rng(0)
    x, y = (
        generator.normal(size=(run.total_steps, size)).astype("float32")
        for size in (8, 2)
    )
    ours.model.fit(x, y, batch_size=1, verbose=0)
    kept = run.target_rank * len(LAYERS)
    assert sum(ours.model.rank_pattern().values()) == kept
    assert np.count_nonzero(ours.lambdas()) == kept
