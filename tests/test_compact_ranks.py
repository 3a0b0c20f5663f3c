"""`compact_ranks`: smaller adapters, the same predictions."""

import numpy as np
import pytest
from adaptive_models import adaptive
from adaptive_models import assert_compact_copy_agrees
from adaptive_models import fit
from helpers import array
from helpers import assert_close
from helpers import classification_data

import keras_lora_dropout as kld


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_compact_ranks(sampling):
    model = adaptive(sampling=sampling, alpha=6)
    fit(model)
    pattern, history = model.rank_pattern(), model.rank_history()
    assert model.count_params() > 800  # Scores included.
    assert_compact_copy_agrees(model)
    assert model.rank_pattern() == pattern
    for path, layer in model.adapted_layers:
        kept = pattern[path]
        assert layer.lora_rank == kept
        assert layer.lora_kernel_a.shape[1] == kept
        assert layer.lora_lambda.shape == (kept,)
        assert layer.lora_kernel_b.shape[0] == kept
        assert layer.scaling == 1.5 or kept == 0
        assert np.all(array(layer.lora_lambda) != 0)
        assert all(f.trainable == (kept > 0) for f in layer.factors)
    # first: (6 + 1 + 8) weights a triplet, second: (8 + 1 + 8).
    adapters = 15 * pattern["first"] + 17 * pattern["second"]
    frozen = 6 * 8 + 8 + 8 * 8 + 8
    assert model.count_params() == adapters + frozen + 8 * 3 + 3
    for path, ranks in history["ranks"].items():
        np.testing.assert_array_equal(
            model.rank_history()["ranks"][path], ranks
        )
    model.compact_ranks()  # Nothing is left to do.
    assert model.rank_pattern() == pattern


def test_training_goes_on_with_compact_ranks():
    model = adaptive()
    fit(model)
    assert_compact_copy_agrees(model)
    values = [array(layer.lora_lambda) for _, layer in model.adapted_layers]
    history = fit(model, epochs=8)
    assert history["loss"][-1] < history["loss"][0]
    assert history["budget"] == [4] * 8
    assert history["orthogonal_penalty"][-1] < history["orthogonal_penalty"][0]
    for old, (_, layer) in zip(values, model.adapted_layers, strict=True):
        assert layer.lora_lambda.shape == old.shape
        assert np.all(array(layer.lora_lambda) != 0)
        assert np.any(array(layer.lora_lambda) != old)


def test_compact_ranks_before_the_last_choice_ends_the_schedule():
    model = adaptive(kld.RankBudget(2, total_steps=40))
    fit(model, epochs=2)
    pattern = model.rank_pattern()
    assert 4 < sum(pattern.values()) < 8
    assert_compact_copy_agrees(model)
    fit(model)
    assert model.rank_pattern() == pattern


def test_compact_ranks_of_a_layer_that_kept_none():
    model = adaptive(kld.RankBudget(1, total_steps=20))
    fit(model)
    model.rank_allocator.rank_mask.assign([0] * 4 + [1, 0, 1, 0])
    model.rank_allocator.prune()
    assert model.rank_pattern() == {"first": 0, "second": 2}
    assert_compact_copy_agrees(model)
    assert model.rank_pattern() == {"first": 0, "second": 2}
    first = model.get_layer("first")
    assert first.lora_kernel_a.shape == (6, 0)
    fit(model, epochs=2)
    # Its configuration gives the same layer again.
    copy = kld.AdaLoRADropoutDense.from_config(first.get_config())
    copy.build((None, 6))
    copy.set_weights(first.get_weights())
    x, _ = classification_data()
    assert_close(copy(x, training=True), first(x, training=True))
    assert copy.get_config() == first.get_config()


def test_compact_ranks_down_to_nothing():
    model = adaptive(kld.RankBudget(0))
    fit(model)
    assert model.rank_pattern() == {"first": 0, "second": 0}
    assert_compact_copy_agrees(model)
    assert fit(model, epochs=1)["orthogonal_penalty"] == [0.0]


def test_configuration_of_a_compact_layer_keeps_its_scaling():
    layer = kld.AdaLoRADropoutDense(5, rank=4, alpha=6)
    layer.build((None, 7))
    layer.keep_triplets([True, False, True, True])
    copy = kld.AdaLoRADropoutDense.from_config(layer.get_config())
    assert copy.lora_rank == 3
    assert copy.scaling == layer.scaling == 1.5
