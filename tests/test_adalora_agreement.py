"""A whole AdaLoRA run agrees with `reference_adalora.py`, step by step."""

import numpy as np
import pytest
import reference
import reference_adalora
from adaptive_models import PHASES
from adaptive_models import TOTAL
from adaptive_models import adaptive_mlp
from adaptive_models import budget_of
from adaptive_models import kept_triplets
from helpers import array
from helpers import assert_close
from helpers import classification_data
from keras import ops

from keras_lora_dropout.core import masks

# The triplets that the reference keeps at the end, on whatever backend.
FINAL = {"batch": [1, 2, 4, 5], "example": [0, 2, 4, 5]}


def constant_draws(monkeypatch):
    """Let every step use the same draws, on every backend the same."""

    def draw(shape, seed):
        values = np.random.default_rng(5).uniform(size=shape)
        return ops.convert_to_tensor(values.astype("float32"))

    monkeypatch.setattr(masks, "draw_uniform", draw)
    return lambda shape: np.random.default_rng(5).uniform(size=shape)


def reference_run(model, penalty, learning_rate=0.1):
    layers = [layer for _, layer in model.adapted_layers]
    head = model.get_layer("head")
    network = reference.Network(
        [
            reference.AdaptedDense(
                array(lyr.kernel), array(lyr.bias), None, None, lyr.scaling
            )
            for lyr in layers
        ],
        array(head.kernel).copy(),
        array(head.bias).copy(),
    )
    return reference_adalora.Run(
        network,
        [[array(factor).copy() for factor in lyr.factors] for lyr in layers],
        PHASES,
        target=4,
        learning_rate=learning_rate,
        penalty=penalty,
    )


def mask_instances(model, draws):
    """Masks of `reference.Network`, from draws `(N, groups, columns)`."""
    instances = []
    for values in reference.bernoulli(draws, 0.5):
        pairs, start = [], 0
        for _, layer in model.adapted_layers:
            middle = start + layer.mask_sizes[0]
            stop = start + layer.mask_width
            pairs.append((values[:, start:middle], values[:, middle:stop]))
            start = stop
        instances.append(pairs)
    return instances


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
def test_a_whole_run_agrees_with_the_reference(
    monkeypatch, sampling, mask_sharing
):
    """Loss, penalty, every weight and the kept ranks, after each step.

    Initial weights, masks and data are the same on every backend, and so are
    the ranks that are kept at the end.
    """
    draw = constant_draws(monkeypatch)
    model = adaptive_mlp(
        budget_of(orthogonal_penalty=0.01),
        sampling=sampling,
        mask_sharing=mask_sharing,
    )
    x, y = classification_data(8)
    groups = len(x) if mask_sharing == "example" else 1
    instances = mask_instances(
        model, draw((2, groups, model.mask_plan.width)).astype("float32")
    )
    run = reference_run(model, penalty=0.01)
    head = model.get_layer("head")
    budgets = []
    for _ in range(TOTAL + 2):
        logs = model.train_on_batch(x, y, return_dict=True)
        loss, penalty = run.train_step(x, y, instances, reference.cross_entropy)
        assert_close(logs["loss"], loss, 1e-4)
        assert_close(logs["orthogonal_penalty"], penalty, 1e-4)
        kept = np.concatenate(run.kept)
        np.testing.assert_array_equal(kept_triplets(model), kept)
        assert logs["budget"] == kept.sum()
        for (_, layer), expected in zip(
            model.adapted_layers, run.layers, strict=True
        ):
            for factor, value in zip(layer.factors, expected, strict=True):
                assert_close(factor, value, 1e-4)
        assert_close(head.kernel, run.network.head_kernel, 1e-4)
        budgets.append(int(kept.sum()))
    assert budgets == [8] * 3 + [6] * 2 + [5] * 2 + [4] * 11
    assert list(np.flatnonzero(kept_triplets(model))) == FINAL[mask_sharing]


def test_importance_uses_the_gradients_of_all_instances(monkeypatch):
    """The state after one step is that of the mean over N, not of the last."""
    constant_draws(monkeypatch)
    x, y = classification_data(8)

    def state(sampling):
        model = adaptive_mlp(num_samples=3, sampling=sampling)
        model.train_on_batch(x, y)
        allocator = model.rank_allocator
        return [*allocator.smoothed_sensitivity, *allocator.uncertainty]

    for ours, theirs in zip(
        state("parallel"), state("sequential"), strict=True
    ):
        assert np.abs(array(ours)).max() > 1e-4
        assert_close(ours, theirs, 1e-6)
