"""AdaLoRA agrees with PEFT's: budget, scores, kept ranks, penalty, layer.

`peft_oracle.py` runs PEFT's `AdaLoraModel` and its `RankAllocator`;
`peft_scenarios.py` says what both sides are fed.
"""

import keras
import numpy as np
import peft_scenarios
import pytest
from adapted_twin import Adapted
from adapted_twin import assert_same_ranks
from adapted_twin import rank_budget
from adapted_twin import rows_of
from helpers import array
from helpers import assert_close
from peft_scenarios import CLOSED_RUN
from peft_scenarios import LAYERS
from peft_scenarios import SCORE_RUNS
from peft_scenarios import flat
from peft_scenarios import step_values

import keras_lora_dropout as kld
from keras_lora_dropout.core import importance


def by_name(runs):
    return pytest.mark.parametrize("run", runs, ids=lambda run: run.name)


def assert_agree(actual, expected, what):
    """Agreement to 1e-6 of the values, and of their mean size."""
    np.testing.assert_allclose(
        actual,
        expected,
        rtol=1e-6,
        atol=1e-6 * np.abs(expected).mean(),
        err_msg=what,
    )


def assert_no_tie(scores, kept):
    """No rounding error can change what is kept."""
    if np.isnan(scores).any() or kept.all() or not kept.any():
        return
    lowest, highest = scores[kept].min(), scores[~kept].max()
    assert highest < lowest * (1 - 1e-4), "Choose other values: nearly a tie."


# Budget.


@by_name(peft_scenarios.budget_runs())
def test_budget_of_every_step(peft, run):
    expected = peft[f"budget.{run.name}.budget"]
    schedule = rank_budget(run).schedule(
        run.total_steps, [run.initial_rank] * run.num_layers
    )
    budgets = [schedule.budget(step) for step in run.steps]
    assert np.array_equal(budgets, expected)

    # Equal shapes for all runs, so that JAX compiles once.
    removal_steps = np.zeros(128, "int32")
    removal_steps[: run.triplets] = schedule.removal_steps()
    removal_steps = keras.ops.convert_to_tensor(removal_steps)
    budgets = keras.ops.vectorized_map(
        lambda step: importance.current_budget(step, removal_steps),
        keras.ops.arange(1, 7001, dtype="int32"),
    )
    assert np.array_equal(array(budgets)[: run.total_steps], expected)


# Scores and kept ranks.


@by_name(SCORE_RUNS)
def test_pure_functions_follow_peft(peft, run):
    expected = {
        name: peft[f"scores.{run.name}.{name}"]
        for name in ("smoothed", "uncertainty", "importance", "kept")
    }
    state = [
        [keras.ops.zeros(rows_of(layer).shape)] * 2
        for layer in step_values(run, 0)[0]
    ]
    chosen = 0
    for step in run.steps:
        if step < run.freeze_step:
            values = [
                [importance.triplets(*layer) for layer in part]
                for part in step_values(run, step)
            ]
            state = [
                importance.updated_scores(
                    *old, parameters, gradients, run.beta_1, run.beta_2
                )
                for old, parameters, gradients in zip(
                    state, *values, strict=True
                )
            ]
            smoothed, uncertainty = zip(*state, strict=True)
            assert_agree(
                flat(map(array, smoothed)),
                expected["smoothed"][step - 1],
                f"smoothed sensitivity at step {step}",
            )
            assert_agree(
                flat(map(array, uncertainty)),
                expected["uncertainty"][step - 1],
                f"uncertainty at step {step}",
            )
        peft_scores = expected["importance"][step - 1]
        if np.isnan(peft_scores).any():
            continue
        chosen += 1
        scores = flat(
            array(importance.importance(*pair, input_dim))
            for pair, (input_dim, _) in zip(state, LAYERS.values(), strict=True)
        )
        assert_agree(scores, peft_scores, f"importance at step {step}")
        kept = expected["kept"][step - 1]
        assert_no_tie(peft_scores, kept)
        mask = importance.rank_mask(
            keras.ops.convert_to_tensor(scores, "float32"), int(kept.sum())
        )
        assert_same_ranks(array(mask) > 0, kept, step)
    assert chosen > 3, "PEFT hardly ranked the triplets."


@by_name(SCORE_RUNS)
def test_allocator_follows_peft(peft, run):
    expected = {
        name: peft[f"scores.{run.name}.{name}"]
        for name in ("smoothed", "uncertainty", "importance", "kept", "lambda")
    }
    ours = Adapted(run)
    patterns = set()
    for step in run.steps:
        ours.step_to(*step_values(run, step))
        # PEFT forgets its scores at the freeze step; ours keep the last.
        scored = min(step, run.freeze_step - 1) - 1
        smoothed, uncertainty = ours.scores()
        assert_agree(smoothed, expected["smoothed"][scored], f"step {step}")
        assert_agree(
            uncertainty, expected["uncertainty"][scored], f"step {step}"
        )
        kept = expected["kept"][step - 1]
        assert_no_tie(expected["importance"][step - 1], kept)
        assert_same_ranks(ours.kept(), kept, step)
        fresh_lambdas = flat(lam for _, lam, _ in step_values(run, step)[0])
        assert np.array_equal(ours.lambdas(), fresh_lambdas * kept)
        masked = not np.isnan(expected["importance"][step - 1]).any()
        if masked or step > run.freeze_step:
            assert np.array_equal(ours.lambdas(), expected["lambda"][step - 1])
        patterns.add(tuple(kept))
    assert len(patterns) >= 3, "The kept ranks hardly changed."
    assert kept.sum() == run.target_rank * len(LAYERS)


def test_sgd_run_follows_peft(peft):
    run = CLOSED_RUN
    ours = Adapted(run)
    ours.assign(step_values(run, 0)[0])
    kept, lambdas = ours.train(run.steps)
    for step in run.steps:
        expected = peft["closed.kept"][step - 1]
        assert_no_tie(peft["closed.importance"][step - 1], expected)
        assert_same_ranks(kept[step - 1], expected, step)
        assert_agree(
            lambdas[step - 1], peft["closed.lambda"][step - 1], f"step {step}"
        )
    assert_agree(ours.rows(), peft["closed.rows"], "all parameters at the end")
    # A triplet that was pruned has come back, on both sides.
    assert np.any(~kept[:-1] & kept[1:])


# Orthogonality and the layer.


def test_mean_norm_is_pefts_penalty(peft):
    weight = 0.3
    ours = Adapted(
        CLOSED_RUN, orthogonal_form="mean_norm", orthogonal_penalty=weight
    )
    values = peft_scenarios.random_factors(CLOSED_RUN.initial_rank, 11)
    ours.assign(values)
    expected = peft["orthogonality.weighted"]
    penalty = weight * array(ours.allocator.penalty())
    assert_close(penalty / expected, 1.0, 1e-6)
    pairs = [
        (keras.ops.convert_to_tensor(a), keras.ops.convert_to_tensor(b))
        for a, _, b in values
    ]
    penalty = weight * array(importance.orthogonal_penalty(pairs, "mean_norm"))
    assert_close(penalty / expected, 1.0, 1e-6)


def test_squared_norms_are_the_papers_penalty(peft):
    """PEFT takes the mean of the norms, the paper the sum of their squares."""
    ours = Adapted(CLOSED_RUN, orthogonal_form="squared_norms")
    values = peft_scenarios.random_factors(CLOSED_RUN.initial_rank, 11)
    ours.assign(values)
    norms = [
        np.linalg.norm(factor.astype("float64") @ factor.T - np.eye(4))
        for a, _, b in values
        for factor in (a.T, b)
    ]
    penalty = array(ours.allocator.penalty())
    assert_close(penalty / np.sum(np.square(norms)), 1.0, 1e-6)
    assert_close(0.3 * np.mean(norms), peft["orthogonality.weighted"], 1e-5)


def adapted_output(given):
    """The output of our layer with the oracle's weights."""
    layer = kld.AdaLoRADropoutDense(
        8, rank=2, alpha=peft_scenarios.FORWARD_ALPHA, dropout_rate=0.0
    )
    layer.build((None, 6))
    for name in ("kernel", "bias", *layer.factor_names):
        getattr(layer, name).assign(given[name])
    return array(layer(given["x"], training=True))


def test_layer_output(peft):
    base, output = peft["forward.signed.base"], peft["forward.signed.output"]
    actual = adapted_output(peft_scenarios.forward_inputs(signed=True))
    divisors = (2 + 1e-5) / 2  # PEFT's over ours.
    assert np.abs(output - base).max() > 1
    assert_agree(actual, base + divisors * (output - base), "output")


def test_delta_is_divided_by_the_rank_alone(peft):
    """PEFT divides by the rank + 1e-5, even if no rank is zero."""
    given = peft_scenarios.forward_inputs(signed=False)
    assert not given["kernel"].any() and not given["bias"].any()
    ratio = adapted_output(given) / peft["forward.positive.output"]
    np.testing.assert_allclose(ratio, 1 + 5e-6, rtol=1e-6)
