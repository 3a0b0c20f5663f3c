"""Adapters that start from the kernel, in files, merged and side by side."""

import json
import re

import families
import keras
import numpy as np
import pytest
import saved_models
from helpers import array
from helpers import assert_close
from helpers import set_random
from helpers import tiny_mlp
from saved_models import compiled
from saved_models import outputs
from saved_models import train

import keras_lora_dropout as kld
from keras_lora_dropout.core.initialization import FROM_KERNEL
from keras_lora_dropout.storage.adapter_files import read_adapter_files

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
by_init = pytest.mark.parametrize("init", FROM_KERNEL)


def adapted(init="pissa", plain=tiny_mlp, **options):
    keras.utils.set_random_seed(1)
    options = {
        "rank": 3,
        "num_samples": 2,
        "dropout_rate": 0.3,
        "seed": 0,
        **options,
    }
    model = kld.enable_lora_dropout(plain(), init_lora_weights=init, **options)
    return compiled(model)


def trained(init="pissa", **options):
    model = adapted(init, **options)
    train(model)
    return model


def x():
    return saved_models.data()[0]


def arrays(model):
    return [array(weight) for weight in model.weights]


def base_output(model):
    with model.disable_adapters():
        return model.predict(x(), verbose=0)


def initial(model):
    return [
        array(w) for _, y in model.adapted_layers for w in y.initial_factors
    ]


def assert_equal(*lists):
    for ours, theirs in zip(*lists, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_same(model, other):
    assert_equal(outputs(model, x()), outputs(other, x()))
    assert_equal(initial(model), initial(other))


# Adapter files


@by_init
def test_adapter_files_hold_the_start(init, tmp_path):
    model = trained(init)
    model.save_adapters(tmp_path)
    for other in (adapted(init), adapted("gaussian"), adapted("olora", rank=3)):
        other.load_adapters(tmp_path)
        assert_same(other, model)
        assert len(initial(other)) == 4
        train(other)
        assert_equal(initial(other), initial(model))


def test_files_without_a_start_load_as_before(tmp_path):
    """They say nothing of it, like those of earlier releases."""
    plain = trained("he_uniform")
    plain.save_adapters(tmp_path)
    assert "initial" not in (tmp_path / "adapters.json").read_text()
    _, tensors = read_adapter_files(tmp_path)
    assert not any("initial" in name for name in tensors)
    model = trained("pissa")
    count = len(model.weights)
    model.load_adapters(tmp_path)
    assert not initial(model) and len(model.weights) == count - 4
    assert_same(model, plain)


def test_files_that_lack_tensors_are_refused(tmp_path):
    model = trained()
    state = kld.conversion.adapter_state.take(model)
    name = "adapters/second/initial_kernel_b"
    del state.tensors[name]
    found = kld.conversion.adapter_state.differences(model, state)
    assert found == [f'tensor "{name}" is missing']


def test_hand_built_models_take_it_over(tmp_path):
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8, name="dense"),
        keras.layers.Dense(3, name="head"),
    ]
    source = adapted(plain=lambda: keras.Sequential(layers), rank=2)
    train(source)
    source.save_adapters(tmp_path / "adapters")
    hidden = kld.LoRADropoutDense(8, rank=2, name="dense")
    hidden.build((None, 6))
    hidden.bias.trainable = False  # As in the source.
    head = keras.layers.Dense(3, name="head")
    model = kld.LoRADropoutModel(layers[0], head(hidden(layers[0])), seed=0)
    for name in ("dense", "head"):
        model.get_layer(name).kernel.assign(
            array(source.get_layer(name).kernel)
        )
        model.get_layer(name).bias.assign(array(source.get_layer(name).bias))
    model.load_adapters(tmp_path / "adapters")
    expected = source.predict(x(), verbose=0)
    assert_close(model.predict(x(), verbose=0), expected, 1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.get_layer("dense").initial_factors) == 2
    assert_same(loaded, model)


# Models and weights


@by_init
def test_saved_models_go_on(init, tmp_path):
    model = trained(init)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    assert [w.trainable for w in loaded.weights] == [
        w.trainable for w in model.weights
    ]
    for each in (model, loaded):
        train(each)
    assert_equal(arrays(loaded), arrays(model))


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_weights_alone(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "model.weights.h5")
    other = adapted(seed=5, plain=random_mlp)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(other, model)
    with pytest.raises(ValueError, match=r"expected 4 .* received 6"):
        adapted("gaussian").load_weights(tmp_path / "model.weights.h5")
    trained("gaussian").save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ValueError, match=r"expected 6 .* received 4"):
        model.load_weights(tmp_path / "other.weights.h5")


def random_mlp():
    model = tiny_mlp()
    set_random(model.weights)
    return model


@pytest.mark.parametrize("family", [families.deberta, families.llama])
def test_presets(family, tmp_path):
    model = family()
    set_random(model.weights, seed=1, scale=0.3)
    kld.enable_lora_dropout(
        model, rank=2, dropout_rate=0.2, seed=0, init_lora_weights="pissa"
    )
    set_random([w for w in model.trainable_weights if "lora" in w.name], 2)
    model.save_to_preset(str(tmp_path / "preset"))
    loaded = model.plain_class().from_preset(str(tmp_path / "preset"))
    inputs, _ = families.data_of(family)
    for predict in ("predict", "ensemble_predict"):
        seed = {"seed": 3} if predict == "ensemble_predict" else {}
        ours, theirs = (
            getattr(each, predict)(inputs, verbose=0, **seed)
            for each in (loaded, model)
        )
        np.testing.assert_array_equal(ours, theirs)


# Merging


@by_init
def test_merging_and_back(init):
    model = trained(init)
    before, weights = outputs(model, x()), arrays(model)
    instances = model.merge_instances(num_samples=2, seed=5)
    members = [plain.predict(x(), verbose=0) for plain in instances]
    assert_close(np.mean(members, axis=0), before[1], 1e-5)
    assert np.abs(members[0] - members[1]).max() > 1e-2
    merged = model.merge_adapters()
    names = {weight.name for weight in merged.weights}
    assert names == {"kernel", "bias"}
    assert_close(merged.predict(x(), verbose=0), before[0], 1e-5)
    back = kld.unmerge_adapters(merged)
    assert_equal(arrays(back), weights)
    assert_equal(outputs(back, x()), before)


def test_disabling_gives_the_base_model():
    plain = tiny_mlp()
    expected = plain.predict(x(), verbose=0)
    model = adapted(plain=lambda: plain, trainable_layers=None)
    train(model)
    np.testing.assert_array_equal(base_output(model), expected)
    assert np.abs(model.predict(x(), verbose=0) - expected).max() > 1e-3


# Several adapters, other ranks


def test_switching_is_exact():
    model = trained()
    before, first = outputs(model, x()), initial(model)
    weights = len(model.weights)
    model.add_adapter("other", seed=1)
    model.set_adapter("other")
    assert not initial(model) and len(model.weights) == weights - 4
    assert_close(model.predict(x(), verbose=0), base_output(model), 1e-6)
    train(model)
    other = outputs(model, x())
    model.set_adapter("default")
    assert_equal(initial(model), first)
    assert_equal(outputs(model, x()), before)
    model.set_adapter("other")
    assert_equal(outputs(model, x()), other)


def test_inactive_adapters_are_saved(tmp_path):
    model = trained()
    before = outputs(model, x())
    model.add_adapter("ranks", rank_budget=kld.RankBudget(1, total_steps=9))
    model.set_adapter("ranks")
    untrained = model.predict(x(), verbose=0)
    assert_close(untrained, base_output(model), 1e-6)
    train(model)
    expected = outputs(model, x())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(outputs(loaded, x()), expected)
    loaded.set_adapter("default")
    assert_equal(outputs(loaded, x()), before)


def test_a_start_from_a_file_as_a_second_adapter(tmp_path):
    source = trained()
    source.save_adapters(tmp_path)
    model = trained("he_uniform", rank=2)
    before = outputs(model, x())
    model.add_adapter("pissa", path=tmp_path)
    model.set_adapter("pissa")
    assert_same(model, source)
    model.set_adapter("default")
    assert_equal(outputs(model, x()), before)


@pytest.mark.parametrize("rank", [0, 2, 3, 4])
def test_other_factors_have_another_start(rank):
    model = trained()
    layer = model.get_layer("second")
    a, b = np.ones((8, rank)), np.ones((rank, 8))
    layer.replace_factors((a, b), alpha=max(rank, 1))
    assert not layer.initial_factors
    data = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    layer.activation = keras.activations.linear
    kernel = array(layer.kernel) + 0.7**2 * a @ b
    assert_close(layer(data), data @ kernel + array(layer.bias), 1e-5)


def test_import_from_peft_replaces_the_start(tmp_path):
    def bert():
        model = families.bert().backbone
        set_random(model.weights, seed=1, scale=0.3)
        return model

    options = {"rank": 2, "dropout_rate": 0.2, "seed": 0}
    source = kld.enable_lora_dropout(
        bert(), init_lora_weights="pissa", **options
    )
    set_random([w for w in source.trainable_weights if "lora" in w.name], 2)
    source.export_peft(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert settings["init_lora_weights"] is True
    model = kld.enable_lora_dropout(
        bert(), init_lora_weights="pissa", **options
    )
    tokens = np.ones((2, 8), "int32")
    data = {
        "token_ids": tokens * np.arange(8),
        "segment_ids": 0 * tokens,
        "padding_mask": tokens,
    }
    model.import_peft(tmp_path)
    plain = kld.import_peft(bert(), tmp_path)
    for each in (model, plain):
        assert {layer.lora_rank for _, layer in each.adapted_layers} == {4}
        assert not initial(each)
        for ours, theirs in zip(
            keras.tree.flatten(each.predict(data, verbose=0)),
            keras.tree.flatten(source.predict(data, verbose=0)),
            strict=True,
        ):
            assert_close(ours, theirs, 1e-4)


# Counts


def test_the_summary_counts_them():
    model = adapted(rank=2)
    texts = []
    model.adapter_summary(print_fn=texts.append)
    count = 2 * (6 + 8) + 2 * (8 + 8)
    assert re.search(f"Adapter params: {count} in 2 layers", texts[0])
    assert re.search(f"Initial factors: {count} params, frozen", texts[0])
    total = model.count_params()
    trainable = count + 3 * 9
    assert f"Non-trainable params: {total - trainable}" in texts[0]
    texts.clear()
    adapted("gaussian").adapter_summary(print_fn=texts.append)
    assert "Initial" not in texts[0]
