"""`RankBudget`: its checks, its phases, and the budget of every step."""

import dataclasses

import numpy as np
import pytest
import reference_adalora
from helpers import array
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_lora_dropout import RankBudget
from keras_lora_dropout.core import importance

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

STEPS = "`warmup_steps` .*Received: warmup_steps="
BAD = [
    ({"target_rank": -1}, "`target_rank` must be an integer, 0 or more.*-1"),
    ({"target_rank": 2.5}, "`target_rank` .*Received: target_rank=2.5"),
    ({"target_rank": True}, "`target_rank` .*Received: target_rank=True"),
    ({"target_rank": None}, "`target_rank` .*Received: target_rank=None"),
    ({"initial_rank": 0}, "`initial_rank` must be a positive integer.*=0"),
    ({"initial_rank": 1}, "at most the initial rank.*target_rank=2, initial"),
    ({"warmup_steps": -1}, STEPS + "-1"),
    ({"warmup_steps": 1.0}, "fraction of the run, less than 1.*=1.0"),
    ({"warmup_steps": -0.1}, "fraction of the run.*warmup_steps=-0.1"),
    ({"warmup_steps": float("nan")}, "fraction of the run.*nan"),
    ({"warmup_steps": "10%"}, STEPS + "'10%'"),
    ({"warmup_steps": None}, STEPS + "None"),
    ({"final_steps": -3}, "`final_steps` .*Received: final_steps=-3"),
    ({"mask_interval": 0}, "`mask_interval` must be a positive integer.*=0"),
    ({"mask_interval": 0.0}, "`mask_interval` as a float.*mask_interval=0.0"),
    ({"total_steps": 0}, "`total_steps` must be a positive integer.*=0"),
    ({"total_steps": 99.0}, "`total_steps` must be a positive integer.*99.0"),
    ({"beta_1": 0}, r"`beta_1` must be a number, in \(0, 1\).*beta_1=0"),
    ({"beta_1": 1.0}, r"`beta_1` must be a number, in \(0, 1\).*beta_1=1.0"),
    ({"beta_2": "x"}, r"`beta_2` must be a number, in \(0, 1\).*beta_2='x'"),
    ({"orthogonal_penalty": -0.1}, "number, 0 or more.*penalty=-0.1"),
    ({"orthogonal_penalty": float("inf")}, "number, 0 or more.*=inf"),
    ({"orthogonal_form": "l2"}, '"squared_norms" or "mean_norm".*=\'l2\''),
    (
        {"warmup_steps": 30, "final_steps": 20, "total_steps": 50},
        r"run of 50 optimizer steps is too short.*warmup_steps=30 and "
        r"final_steps=20 leave no step.*less than total_steps=50",
    ),
    (
        {"warmup_steps": 0.5, "final_steps": 30, "total_steps": 50},
        r"warmup_steps=0.5 \(25 steps\) and final_steps=30 leave no step",
    ),
]


@pytest.mark.parametrize(
    "options, message", BAD, ids=[str(options) for options, _ in BAD]
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        RankBudget(**{"target_rank": 2, **options})


def test_settings_are_immutable_and_comparable():
    budget = RankBudget(2, initial_rank=3)
    assert budget == RankBudget(target_rank=2, initial_rank=3)
    assert budget.orthogonal_penalty == 0.5
    assert budget.beta_1 == budget.beta_2 == 0.85
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.target_rank = 3


def test_fractions_of_the_run():
    budget = RankBudget(
        2, warmup_steps=0.125, final_steps=0.5, mask_interval=0.01
    )
    assert budget.phases(1000) == (125, 500, 10)
    assert budget.phases(16) == (2, 8, 1)  # At least one step.


def test_numbers_of_steps_are_taken_as_they_are():
    budget = RankBudget(2, 4, np.int64(3), 5, 2)
    assert budget.phases(9) == (3, 5, 2)
    with pytest.raises(ValueError, match="run of 8 optimizer steps"):
        budget.phases(8)


def test_first_and_last_step_of_each_phase():
    """Worked by hand: 24 triplets to 8, four steps in between.

    16 * (1 - s)**3 + 8 for s = 1/4, 2/4, 3/4, 1: 14.75, 10, 8.25, 8.
    """
    budget = RankBudget(4, warmup_steps=3, final_steps=2)
    schedule = budget.schedule(9, [12, 12])
    budgets = [schedule.budget(step) for step in range(1, 10)]
    assert budgets == [24, 24, 24, 14, 10, 8, 8, 8, 8]
    assert schedule.freeze_step == 7


SCHEDULES = st.tuples(
    st.integers(0, 6), st.integers(0, 6), st.integers(1, 5), st.integers(1, 40)
).filter(lambda s: s[0] + s[1] < s[3])
RANKS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(SCHEDULES, RANKS, st.data())
@settings(max_examples=60)
def test_budget_of_every_step(phases, ranks, data):
    target = data.draw(st.integers(0, min(ranks)))
    warmup, final, interval, total = phases
    budget = RankBudget(target, None, warmup, final, interval, total)
    schedule = budget.schedule(total, ranks)
    removal = ops.convert_to_tensor(schedule.removal_steps())
    assert removal.shape == (sum(ranks),)
    previous = sum(ranks)
    for step in range(1, total + 3):
        expected = reference_adalora.budget(
            step, phases, sum(ranks), target * len(ranks)
        )
        assert schedule.budget(step) == expected
        found = importance.current_budget(ops.convert_to_tensor(step), removal)
        assert int(array(found)) == expected
        assert expected <= previous
        previous = expected
    assert previous == target * len(ranks)


SCORES = st.lists(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0, 1e-30]), min_size=1, max_size=12
)


@given(SCORES, st.data())
@settings(max_examples=60)
def test_exactly_the_budget_is_kept_whatever_the_ties(scores, data):
    budget = data.draw(st.integers(0, len(scores)))
    mask = array(
        importance.rank_mask(
            ops.convert_to_tensor(scores, "float32"),
            ops.convert_to_tensor(budget, "int32"),
        )
    )
    assert set(mask) <= {0.0, 1.0}
    assert mask.sum() == budget
    order = np.argsort(-np.array(scores), kind="stable")
    assert set(np.flatnonzero(mask)) == set(order[:budget])


def test_scores_that_are_no_numbers_are_pruned_first():
    scores = ops.convert_to_tensor([float("nan"), 1.0, 2.0], "float32")
    mask = importance.rank_mask(scores, ops.convert_to_tensor(2, "int32"))
    np.testing.assert_array_equal(array(mask), [0, 1, 1])
