"""AdaLoRA in training: scores, pruning and penalty of every step."""

import dataclasses

import keras
import numpy as np
import pytest
import reference_adalora
from adaptive_models import LOSS
from adaptive_models import PHASES
from adaptive_models import TOTAL
from adaptive_models import adaptive_mlp
from adaptive_models import budget_of
from adaptive_models import kept_triplets
from adaptive_models import singular_values
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from helpers import classification_data

import keras_lora_dropout as kld

EDGES = {
    "plain": (PHASES, 4, 2),
    "equal ranks": (PHASES, 3, 3),
    "down to zero": (PHASES, 2, 0),
    "odd ranks": (PHASES, 5, 3),
    "every step": ((2, 3, 1, 12), 4, 1),
    "interval beyond the phase": ((2, 3, 50, 12), 4, 2),
    "no warm-up": ((0, 3, 2, 12), 4, 2),
    "no final phase": ((2, 0, 3, 12), 4, 2),
    "one step to prune": ((5, 6, 1, 12), 4, 1),
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
def test_exactly_the_budget_is_kept_at_every_step(edge):
    phases, rank, target = edge
    budget = budget_of(phases, target)
    model = adaptive_mlp(
        budget, keras.optimizers.Adam(0.05), rank, num_samples=1
    )
    x, y = classification_data(8)
    schedule = budget.schedule(phases[-1], [rank, rank])
    kept = np.ones(2 * rank, bool)
    assert not any(np.any(lam == 0) for lam in singular_values(model))
    for step in range(1, phases[-1] + 3):
        model.train_on_batch(x, y)
        now = kept_triplets(model)
        if reference_adalora.chooses(step, phases):
            assert now.sum() == schedule.budget(step)
        else:  # Nothing changes between choices, nor in the last phase.
            np.testing.assert_array_equal(now, kept)
        # What is pruned is exactly zero, what is kept is not.
        values = np.concatenate(singular_values(model))
        np.testing.assert_array_equal(values != 0, now)
        kept = now
    assert kept.sum() == 2 * target
    counts = [int(part.sum()) for part in np.split(kept, 2)]
    assert list(model.rank_pattern().values()) == counts


def test_pruned_triplets_can_come_back_when_ranks_are_chosen():
    model = adaptive_mlp(budget_of((1, 1, 1, 30), 2))
    x, y = classification_data(8)
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    pruned = np.flatnonzero(~kept_triplets(model))
    # Whatever was important before is forgotten; the pruned ones get scores.
    for state in (
        *model.rank_allocator.smoothed_sensitivity,
        *model.rank_allocator.uncertainty,
    ):
        state.assign(np.zeros(state.shape))
    flat = model.rank_allocator.smoothed_sensitivity
    for position in pruned:
        stack = [p for s in model.rank_allocator.stacks for p in s]
        assert len(stack) == 2
        layer, row = divmod(int(position), 4)
        for index, positions in enumerate(model.rank_allocator.stacks):
            if layer in positions:
                values = array(flat[index]).copy()
                values[positions.index(layer), row] = 1e3
                flat[index].assign(values)
                model.rank_allocator.uncertainty[index].assign(values)
    model.train_on_batch(x, y)
    assert kept_triplets(model)[pruned].any()
    values = np.concatenate(singular_values(model))
    np.testing.assert_array_equal(values != 0, kept_triplets(model))


def test_gradient_accumulation_counts_effective_steps():
    """Two half batches are one step of the schedule, with one mean gradient."""
    x, y = classification_data(8)

    def train(batches, accumulate):
        optimizer = keras.optimizers.SGD(
            0.1, gradient_accumulation_steps=accumulate
        )
        model = adaptive_mlp(optimizer=optimizer, dropout_rate=0.0)
        steps = []
        for _ in range(TOTAL):
            for part in np.split(np.arange(len(x)), batches):
                model.train_on_batch(x[part], y[part])
                steps.append(int(array(model.rank_allocator.step)))
        return model, steps

    (whole, _), (halves, steps) = train(1, None), train(2, 2)
    assert steps == [n // 2 for n in range(1, 2 * TOTAL + 1)]
    np.testing.assert_array_equal(kept_triplets(halves), kept_triplets(whole))
    for ours, theirs in zip(
        halves.rank_allocator.smoothed_sensitivity,
        whole.rank_allocator.smoothed_sensitivity,
        strict=True,
    ):
        assert_close(ours, theirs)
    for ours, theirs in zip(
        singular_values(halves), singular_values(whole), strict=True
    ):
        assert_close(ours, theirs)


def test_loss_scale_changes_neither_scores_nor_ranks():
    x, y = classification_data(8)

    def train(optimizer):
        model = adaptive_mlp(optimizer=optimizer, dropout_rate=0.0)
        for _ in range(TOTAL):
            model.train_on_batch(x, y)
        return model

    plain = train(keras.optimizers.SGD(0.1))
    for optimizer in (
        keras.optimizers.SGD(0.1, loss_scale_factor=64.0),
        # It doubles its scale after every second step.
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), 64.0, dynamic_growth_steps=2
        ),
    ):
        scaled = train(optimizer)
        np.testing.assert_array_equal(
            kept_triplets(scaled), kept_triplets(plain)
        )
        for ours, theirs in zip(
            scaled.rank_allocator.uncertainty,
            plain.rank_allocator.uncertainty,
            strict=True,
        ):
            assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_step_that_the_loss_scale_skips_does_not_count():
    model = adaptive_mlp(
        optimizer=keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), 64.0
        )
    )
    x, y = classification_data(8)
    for _ in range(3):
        model.train_on_batch(x, y)
    before = [array(w) for w in model.get_weights()]
    model.train_on_batch(np.full_like(x, np.inf), y)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(array(model.rank_allocator.step)) == 3
    model.train_on_batch(x, y)
    assert int(array(model.rank_allocator.step)) == 4
    assert np.isfinite(np.concatenate(singular_values(model))).all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", dtype=policy)(inputs)
    x = keras.layers.Dense(8, activation="tanh", dtype=policy)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, dtype=policy)(x))
    kld.enable_lora_dropout(
        model, rank=4, rank_budget=kld.RankBudget(2), num_samples=2, seed=0
    )
    for variable in model.rank_allocator.smoothed_sensitivity:
        assert variable.dtype == "float32"
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.05), initial_scale=2.0**10
    )
    model.compile(optimizer, LOSS)
    x, y = classification_data()
    history = model.fit(x, y, epochs=20, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0] - 0.02
    assert sum(model.rank_pattern().values()) == 4


def test_averaged_weights_do_not_bring_pruned_ranks_back():
    """At its end, `fit` overwrites all weights by their moving average."""
    optimizer = keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9)
    model = adaptive_mlp(optimizer=optimizer)
    x, y = classification_data(8)
    model.fit(x, y, batch_size=8, epochs=TOTAL, verbose=0)
    values = np.concatenate(singular_values(model))
    np.testing.assert_array_equal(values != 0, kept_triplets(model))
    assert kept_triplets(model).sum() == 4


def test_penalty_is_in_the_objective_and_not_in_the_loss():
    x, y = classification_data(8)
    logs, steps = {}, {}
    for weight in (0.0, 0.5):
        model = adaptive_mlp(
            budget_of(orthogonal_penalty=weight), dropout_rate=0.0
        )
        before = [array(lyr.lora_kernel_a) for _, lyr in model.adapted_layers]
        expected = model.evaluate(x, y, verbose=0)
        logs[weight] = model.train_on_batch(x, y, return_dict=True)
        assert_close(logs[weight]["loss"], expected)
        steps[weight] = [
            old - array(layer.lora_kernel_a)
            for old, (_, layer) in zip(
                before, model.adapted_layers, strict=True
            )
        ]
    assert "orthogonal_penalty" not in logs[0.0]
    total = 0.0
    model = adaptive_mlp()
    for index, (_, layer) in enumerate(model.adapted_layers):
        value, by_q, _ = reference_adalora.orthogonality(
            [array(factor) for factor in layer.factors]
        )
        total += value
        added = steps[0.5][index] - steps[0.0][index]
        assert_close(added, 0.1 * 0.5 * by_q, 1e-4)
    assert_close(logs[0.5]["orthogonal_penalty"], total, 1e-4)


def test_mean_norm_form_of_the_penalty():
    x, y = classification_data(8)
    model = adaptive_mlp(budget_of(orthogonal_form="mean_norm"))
    norms = []
    for _, layer in model.adapted_layers:
        q, _, p = (array(factor) for factor in layer.factors)
        norms.append(np.linalg.norm(q.T @ q - np.eye(4)))
        norms.append(np.linalg.norm(p @ p.T - np.eye(4)))
    logs = model.train_on_batch(x, y, return_dict=True)
    assert_close(logs["orthogonal_penalty"], np.mean(norms), 1e-4)


def test_mean_norm_has_a_gradient_where_all_is_orthogonal():
    model = adaptive_mlp(budget_of(orthogonal_form="mean_norm"))
    for _, layer in model.adapted_layers:
        layer.lora_kernel_a.assign(np.eye(*layer.lora_kernel_a.shape))
        layer.lora_kernel_b.assign(np.eye(*layer.lora_kernel_b.shape))
    model.train_on_batch(*classification_data(8))
    for weight in model.trainable_weights:
        assert np.isfinite(array(weight)).all()


def test_a_frozen_layer_is_refused():
    model = adaptive_mlp()
    model.get_layer("second").trainable = False
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match='"second" is frozen'):
        model.train_on_batch(*classification_data(8))


def test_state_is_part_of_the_model_and_needs_no_gradient():
    model = adaptive_mlp()
    names = {weight.name for weight in model.non_trainable_weights}
    assert {"rank_step", "rank_mask", "smoothed_sensitivity_0"} <= names
    trained = {weight.name for weight in model.trainable_weights}
    assert not any("rank_" in name for name in trained)


CUTS = [1, 2, 7, 13, 16]


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_a_run_resumed_at_any_step_is_the_same_bit_for_bit(tmp_path, sampling):
    """Masks, optimizer, scores, ranks and schedule all go on."""
    x, y = classification_data(8)

    def fresh():
        return adaptive_mlp(
            budget_of(), keras.optimizers.Adam(0.05), sampling=sampling
        )

    whole, states = fresh(), {}
    for step in range(1, TOTAL + 3):
        whole.train_on_batch(x, y)
        if step in CUTS:
            path = tmp_path / f"{step}.weights.h5"
            whole.save_weights(path)
            states[step] = path
    resumed = fresh()
    for step, path in states.items():
        resumed.load_weights(path)  # Also before its first step.
        for _ in range(step, TOTAL + 2):
            resumed.train_on_batch(x, y)
        for ours, theirs in zip(
            resumed.variables, whole.variables, strict=True
        ):
            np.testing.assert_array_equal(
                array(ours), array(theirs), err_msg=f"{step} {ours.path}"
            )


def test_steps_per_execution():
    """Two steps in one call prune as two calls do (torch allows one)."""
    x, y = classification_data(8)

    def trained(steps):
        model = adaptive_mlp()
        model.compile(
            keras.optimizers.SGD(0.1), LOSS, steps_per_execution=steps
        )
        model.fit(x, y, batch_size=4, shuffle=False, epochs=6, verbose=0)
        return model

    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            trained(2)
        return
    one, two = trained(1), trained(2)
    np.testing.assert_array_equal(kept_triplets(two), kept_triplets(one))
    for ours, theirs in zip(
        singular_values(two), singular_values(one), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_loss_that_ignores_a_layer():
    """Its triplets have no importance and are pruned first."""
    inputs = keras.Input((6,))
    used = keras.layers.Dense(4, name="used")(inputs)
    unused = keras.layers.Dense(4, name="unused")(inputs)
    model = keras.Model(inputs, [used, unused])
    kld.enable_lora_dropout(
        model,
        rank=3,
        rank_budget=budget_of(target_rank=1, orthogonal_penalty=0.0),
        target_layers=["used", "unused"],
        num_samples=1,
        seed=0,
    )
    model.compile(keras.optimizers.SGD(0.1), loss=["mse", None])
    x, _ = classification_data(8)
    y = np.ones((8, 4), "float32")
    for _ in range(TOTAL):
        model.train_on_batch(x, [y, y])
    assert model.rank_pattern() == {"used": 2, "unused": 0}


def test_settings_reach_the_scores():
    """Each beta smooths its own average."""
    x, y = classification_data(8)
    states = {}
    for betas in ((0.85, 0.85), (0.5, 0.85), (0.85, 0.5)):
        budget = dataclasses.replace(
            budget_of(), beta_1=betas[0], beta_2=betas[1]
        )
        model = adaptive_mlp(budget, dropout_rate=0.0)
        model.train_on_batch(x, y)
        allocator = model.rank_allocator
        states[betas] = (
            array(allocator.smoothed_sensitivity[0]),
            array(allocator.uncertainty[0]),
        )
    # After one step: (1 - b1) I, and (1 - b2) |I - (1 - b1) I|.
    base, first, second = states.values()
    assert_close(first[0], base[0] * 0.5 / 0.15)
    assert_close(first[1], base[1] * 0.5 / 0.85)
    assert_close(second[0], base[0])
    assert_close(second[1], base[1] * 0.5 / 0.15)
