"""Balanced masks: each instance as before, all together evenly spread."""

import itertools

import keras
import numpy as np
import pytest
import reference
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import draws_after
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core import masks
from keras_lora_dropout.core.stratified import MOST_COMPARED
from keras_lora_dropout.core.stratified import stratify
from keras_lora_dropout.core.validation import MASK_SAMPLINGS

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

# Both ways to rank: few numbers and many.
COUNTS = st.sampled_from([1, 2, 3, MOST_COMPARED + 1])
LAST_BELOW_1 = np.nextafter(np.float32(1), np.float32(0))


def independent(count, entries, seed, levels=None):
    """`count + 1` independent draws of each entry, float32 in `[0, 1)`."""
    generator = np.random.default_rng(seed)
    values = generator.random((count + 1, entries), "float32")
    if levels is not None:  # Ties.
        values[:-1] = np.floor(values[:-1] * levels) / levels
    return values


def every_case(count, places):
    """Draws whose entries go through all orders and `places` last numbers."""
    orders = itertools.permutations(np.arange(count) / count)
    middles = (np.arange(places) + 0.5) / places
    cases = [[*o, p] for o, p in itertools.product(orders, middles)]
    return np.array(cases, "float32").T


@given(COUNTS, st.integers(0, 99), st.sampled_from([None, 1, 3]))
@settings(max_examples=12)
def test_agrees_with_the_reference(count, seed, levels):
    draws = independent(count, 12, seed, levels)
    actual = stratify(ops.convert_to_tensor(draws))
    assert keras.backend.standardize_dtype(actual.dtype) == "float32"
    assert_close(actual, reference.balanced(draws), 1e-6)


@given(COUNTS, st.integers(0, 99), st.sampled_from([None, 1, 3]))
@settings(max_examples=12)
def test_keeps_an_entry_equally_often(count, seed, levels):
    """Whatever the rate: all N thresholds, and those in between."""
    draws = independent(count, 12, seed, levels)
    draws[-1, 0], draws[-1, 1] = 0, LAST_BELOW_1
    values = stratify(ops.convert_to_tensor(draws))
    assert array(values).min() >= 0 and array(values).max() < 1
    for twice in range(2 * count):
        rate = twice / (2 * count)
        kept = array(masks.keep_mask(values, rate, "int32")).sum(axis=0)
        mean = count * (1 - rate)
        assert set(kept) <= {np.floor(mean + 1e-6), np.ceil(mean - 1e-6)}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_instance_alone_is_uniform(count):
    """Over all orders, each instance is at each place equally often."""
    values = array(stratify(ops.convert_to_tensor(every_case(count, 8))))
    for instance in values:
        places, times = np.unique(instance.round(6), return_counts=True)
        assert_close(places, (np.arange(8 * count) + 0.5) / (8 * count), 1e-6)
        assert len(set(times)) == 1


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_instances_are_exchangeable_and_negatively_correlated(count, rate):
    values = array(stratify(ops.convert_to_tensor(every_case(count, 20))))
    kept = reference.bernoulli(values, rate)
    fraction = count * (1 - rate) % 1
    # Of the floor or the ceiling of N * (1 - p); for a rate that is a multiple
    # of 1 / 20 / N, the places meet it exactly.
    variance_of_sum = fraction * (1 - fraction)
    expected = variance_of_sum / count - rate * (1 - rate)
    assert expected < 0
    assert_close(kept.mean(axis=1), np.full(count, 1 - rate), 1e-6)
    for n, m in itertools.combinations(range(count), 2):
        covariance = np.mean(kept[n] * kept[m]) - (1 - rate) ** 2
        assert_close(covariance, expected / (count - 1), 1e-6)


def test_drawn_entries_are_uniform_and_independent_of_each_other():
    generator = keras.random.SeedGenerator(0)
    values = array(masks.draw_instances((4, 2, 5000), generator, "balanced"))
    assert values.shape == (4, 2, 5000)
    counts = np.stack([np.histogram(v, 20, (0, 1))[0] for v in values])
    # 10,000 draws of each instance in 20 bins: 500, standard error 22.
    assert np.abs(counts - 500).max() < 4.5 * 22
    centred = values.reshape(4, -1) - 0.5
    # Neighbouring entries, within an instance and from one to another.
    for shift in (1, 5000):
        products = centred @ np.roll(centred, shift, axis=1).T / 10_000
        assert np.abs(products).max() < 4.5 / 12 / np.sqrt(10_000)


def test_bernoulli_and_single_instances_are_what_they_were():
    for count, sampling in [(3, "bernoulli"), (1, "balanced")]:
        actual = masks.draw_instances((count, 2, 5), 7, sampling)
        np.testing.assert_array_equal(
            array(actual), draws_after([7, 0], (count, 2, 5))
        )


def network_and_batch():
    """A network of one adapted layer, small enough to draw often."""
    generator = np.random.default_rng(3)
    sizes = {"kernel": (3, 2), "bias": 2, "a": (3, 2), "b": (2, 2)}
    arrays = {name: generator.normal(size=s) for name, s in sizes.items()}
    layer = reference.AdaptedDense(**arrays, scaling=1.0)
    network = reference.Network(
        [layer], generator.normal(size=(2, 2)), np.zeros(2)
    )
    return network, generator.normal(size=(4, 3)), np.array([0, 1, 1, 0])


def test_gradient_and_ensemble_vary_less_around_the_same_mean():
    """The expectations of Eq. 7 and 8 need each instance's masks alone."""
    network, x, y = network_and_batch()

    def results(mask_sampling, steps=400):
        draws = masks.draw_instances((3, steps, 5), 0, mask_sampling)
        kept = reference.bernoulli(array(draws), 0.5)
        for step in range(steps):
            instances = [[(m[None, :3], m[None, 3:])] for m in kept[:, step]]
            found = network.gradients(x, y, instances, reference.cross_entropy)
            outputs = network.ensemble_outputs(x, instances)
            parts = found["a0"], found["b0"], outputs
            yield np.concatenate([part.ravel() for part in parts])

    bernoulli, balanced = (np.array(list(results(s))) for s in MASK_SAMPLINGS)
    squared_errors = (bernoulli.var(axis=0) + balanced.var(axis=0)) / 400
    difference = bernoulli.mean(axis=0) - balanced.mean(axis=0)
    assert np.all(np.abs(difference) < 4 * np.sqrt(squared_errors))
    gradient, outputs = slice(0, 10), slice(10, None)
    for part in (gradient, outputs):
        ratio = balanced[:, part].var(0).sum() / bernoulli[:, part].var(0).sum()
        assert ratio < 0.8


def test_whatever_shows_the_ensemble_shows_balanced_instances():
    x, _ = classification_data()
    model = adapted_mlp(mask_sampling="balanced", num_samples=2)
    expected = model.ensemble_predict(x, seed=5, verbose=0)
    assert_close(model.as_ensemble(seed=5)(x), expected)
    merged = [array(instance(x)) for instance in model.merge_instances(seed=5)]
    assert_close(np.mean(merged, axis=0), expected)
    first, second = (
        np.concatenate(model._instances(None, 5).masks_of(layer), axis=1)
        for _, layer in model.adapted_layers
    )
    # At a rate of a half, two instances are each other's opposite.
    for kept in (first, second):
        np.testing.assert_array_equal(kept.sum(axis=0), np.ones(kept.shape[1]))


def test_models_built_by_hand_take_it():
    model = kld.LoRADropoutModel(mask_sampling="balanced")
    assert model.lora_dropout.mask_sampling == "balanced"
    with pytest.raises(ValueError, match=r"`mask_sampling` must be.*even"):
        kld.LoRADropoutModel(mask_sampling="even")


def test_recipes_of_earlier_files_are_of_independent_instances():
    model = adapted_mlp(mask_sampling="balanced")
    config = model.get_config()
    assert config["lora_dropout"]["sampling"].pop("mask_sampling") == "balanced"
    loaded = type(model).from_config(config)
    assert loaded.lora_dropout.mask_sampling == "bernoulli"
    assert loaded.lora_dropout.num_samples == 4
