"""Several adapters on one base: each is as if it were alone."""

import keras
import numpy as np
import pytest
import saved_models
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from saved_models import KINDS
from saved_models import compiled
from saved_models import outputs
from saved_models import train

import keras_lora_dropout as kld


def base_output(model, x):
    with model.disable_adapters():
        return model.predict(x, verbose=0)


def test_each_is_as_if_it_were_alone():
    """Training in turns ends as training each without a break."""
    x, _ = saved_models.data()
    keras.utils.set_random_seed(1)
    model = compiled(KINDS["functional"]())
    # Keras's dropout on torch draws from one generator for all models.
    model.get_layer("first").layers[1].rate = 0.0
    kernel_b = {p: array(lr.lora_kernel_b) for p, lr in model.adapted_layers}
    untrained = outputs(model, x)[0]
    model.add_adapter("b", rank=1, alpha=4, seed=3)
    train(model)
    trained = outputs(model, x)
    model.set_adapter("b")
    assert_close(outputs(model, x)[0], base_output(model, x), 1e-6)
    for path, layer in model.adapted_layers:
        assert layer.lora_rank == 1 and layer.lora_alpha == 4
        assert array(layer.lora_kernel_b).shape[1] == kernel_b[path].shape[1]
    train(model)
    model.set_adapter("default")
    np.testing.assert_array_equal(outputs(model, x), trained)
    assert np.abs(trained[0] - untrained).max() > 1e-3


def test_the_optimizer_goes_on_with_its_adapter():
    """Two models: one that is switched away and back, one that is not."""
    results = []
    for switched in (False, True):
        keras.utils.set_random_seed(1)
        model = adapted_mlp({"optimizer": keras.optimizers.Adam(0.01)})
        model.add_adapter("b", seed=1)
        x, y = classification_data()
        options = {"verbose": 0, "shuffle": False}
        model.fit(x, y, epochs=2, **options)
        if switched:
            masks = array(model.mask_seed_generator.state)
            model.set_adapter("b")
            model.fit(x, y, epochs=3, **options)
            model.set_adapter("default")
            model.mask_seed_generator.state.assign(masks)
        model.fit(x, y, epochs=2, **options)
        results.append([array(w) for w in model.trainable_variables])
        results[-1] += [array(w) for w in model.optimizer.variables]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_kinds_may_differ():
    x, _ = saved_models.data()
    model = compiled(KINDS["functional"]())
    train(model)
    before = outputs(model, x)
    model.add_adapter("ranks", rank=4, rank_budget=kld.RankBudget(1))
    model.set_adapter("ranks")
    train(model, epochs=4)
    kept = model.rank_pattern()
    assert sum(kept.values()) == len(kept)
    ranks = outputs(model, x)
    model.set_adapter("default")
    assert model.rank_budget is None
    np.testing.assert_array_equal(outputs(model, x), before)
    train(model)
    model.set_adapter("ranks")
    assert model.rank_pattern() == kept
    np.testing.assert_array_equal(outputs(model, x), ranks)
    model.compact_ranks()
    model.set_adapter("default")
    model.set_adapter("ranks")
    assert model.rank_pattern() == kept
    np.testing.assert_allclose(outputs(model, x), ranks, atol=1e-6)


def test_a_closed_schedule_stays_closed_and_an_open_one_open(tmp_path):
    """Even if nothing was pruned, so that all settings are the same."""
    budget = kld.RankBudget(2, initial_rank=2, total_steps=4)
    model = adapted_mlp(rank_budget=budget)
    model.add_adapter("open", rank_budget=budget)
    model.set_adapter("open")
    assert model.rank_allocator.is_open
    model.set_adapter("default")
    model.save_adapters(tmp_path)
    model.compact_ranks()
    for name in ("open", "default", "open", "default"):
        model.set_adapter(name)
        assert model.rank_allocator.is_open == (name == "open")
        variables = [v.name for v in model.weights if "rank_" in v.name]
        assert len(variables) == (5 if name == "open" else 0)
    model.load_adapters(tmp_path)
    assert model.rank_allocator.is_open


def test_an_adapter_from_a_file(tmp_path):
    model = adapted_mlp(rank=2)
    x, _ = classification_data()
    expected = model.predict(x, verbose=0)
    model.save_adapters(tmp_path)
    other = adapted_mlp(rank=5, dropout_rate=0.1)
    other.add_adapter("stored", path=tmp_path)
    other.set_adapter("stored")
    assert_close(other.predict(x, verbose=0), expected, 1e-7)
    with pytest.raises(ValueError, match="settings of its own"):
        other.add_adapter("more", path=tmp_path, rank=3)


def test_compiled_functions_stay_if_values_alone_change():
    model = adapted_mlp()
    x, _ = classification_data()
    first = model.predict(x, verbose=0)
    compiled_function = model.predict_function
    model.add_adapter("same")
    model.add_adapter("stronger", alpha=9)
    model.set_adapter("same")
    assert model.predict_function is compiled_function
    assert_close(model.predict(x, verbose=0), base_output(model, x), 1e-6)
    model.set_adapter("default")
    np.testing.assert_array_equal(model.predict(x, verbose=0), first)
    model.set_adapter("stronger")
    assert model.predict_function is None


def test_the_ensemble_uses_the_active_one():
    model = adapted_mlp()
    x, y = classification_data()
    first = model.ensemble_predict(x, seed=1, verbose=0)
    loss = model.ensemble_evaluate(x, y, seed=1, verbose=0)
    model.add_adapter("other", dropout_rate=0.9)
    model.set_adapter("other")
    randomize(model, seed=9)
    second = model.ensemble_predict(x, seed=1, verbose=0)
    assert np.abs(first - second).max() > 1e-3
    instances = [
        instance.predict(x, verbose=0)
        for instance in model.merge_instances(seed=1)
    ]
    assert_close(second, np.mean(instances, axis=0), 1e-6)
    assert model.ensemble_evaluate(x, y, seed=1, verbose=0) != loss
    model.set_adapter("default")
    np.testing.assert_array_equal(
        model.ensemble_predict(x, seed=1, verbose=0), first
    )


def test_names_are_checked():
    model = adapted_mlp()
    model.add_adapter("other")
    for call, part in (
        (lambda: model.add_adapter("other"), "already has"),
        (lambda: model.add_adapter("default"), "already has"),
        (lambda: model.add_adapter(""), "at least one character"),
        (lambda: model.add_adapter(3), "string"),
        (lambda: model.add_adapter("x", rank=0), "positive integer"),
        (lambda: model.add_adapter("x", rank=99), "at most 6"),
        (lambda: model.add_adapter("x", dropout_rate=1.0), r"\[0, 1\)"),
        (lambda: model.set_adapter("third"), r"\['default', 'other'\]"),
        (lambda: model.delete_adapter("third"), "no such adapter"),
        (lambda: model.delete_adapter("default"), "active"),
    ):
        with pytest.raises(ValueError, match=part):
            call()
    assert model.adapter_names == ["default", "other"]
    model.delete_adapter("other")
    assert model.adapter_names == ["default"]
