"""Models of convolutions: adapted, trained, averaged, merged, saved."""

import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import set_random

import keras_lora_dropout as kld

X = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype("float32")
Y = np.arange(6) % 3


def network(**options):
    """Convolution, depthwise convolution, projection, head; compiled."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(X.shape[1:])
    x = keras.layers.Conv2D(6, 3, activation="relu", name="stem")(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Conv2D(8, 1, strides=2, name="project")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    options = {"rank": 2, "num_samples": 2, "seed": 0, **options}
    kld.enable_lora_dropout(model, target_layers="all-convolutions", **options)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def trained(**options):
    model = network(**options)
    for _, layer in model.adapted_layers:
        set_random(layer.factors, scale=0.3)
    for _ in range(2):
        model.train_on_batch(X, Y)
    return model


def test_every_convolution_but_no_head_is_adapted():
    model = network()
    paths = [path for path, _ in model.adapted_layers]
    assert paths == ["stem", "depthwise", "project"]
    text = []
    model.adapter_summary(print_fn=text.append)
    assert "3 -> 6" in text[0] and "6 -> 6" in text[0]


@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
def test_parallel_instances_are_those_in_sequence(mask_sharing):
    first, second = (
        trained(sampling=sampling, mask_sharing=mask_sharing)
        for sampling in ("parallel", "sequential")
    )
    for a, b in zip(
        first.trainable_weights, second.trainable_weights, strict=True
    ):
        assert_close(a, b, 1e-4)
    options = {"seed": 1, "return_samples": True, "verbose": 0}
    samples = first.ensemble_predict(X, **options)
    assert_close(samples, second.ensemble_predict(X, **options), 1e-4)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3
    mean = first.ensemble_predict(X, seed=1, verbose=0)
    assert_close(mean, samples.mean(0), 1e-4)


def test_training_changes_factors_and_head_alone():
    model = trained()
    fresh = network()
    ours = {id(v) for v in model.trainable_weights}
    for variable, start in zip(model.weights, fresh.weights, strict=True):
        moved = np.abs(array(variable) - array(start)).max()
        if id(variable) in ours:
            assert moved > 1e-5, variable.path
        elif "seed" not in variable.path:
            assert moved == 0, variable.path


def test_merged_networks_predict_the_same():
    model = trained()
    expected = model.predict(X, verbose=0)
    ensemble = model.ensemble_predict(X, num_samples=3, seed=2, verbose=0)
    instances = model.merge_instances(num_samples=3, seed=2)
    outputs = [plain.predict(X, verbose=0) for plain in instances]
    assert_close(np.mean(outputs, axis=0), ensemble, 1e-4)
    kernels = [array(layer.kernel) for _, layer in model.adapted_layers]
    model.merge_adapters()
    assert type(model.get_layer("stem")) is keras.layers.Conv2D
    assert type(model.get_layer("depthwise")) is keras.layers.DepthwiseConv2D
    assert model.get_layer("depthwise").kernel.trainable
    assert_close(model.predict(X, verbose=0), expected, 1e-4)
    kld.unmerge_adapters(model)
    assert_close(model.predict(X, verbose=0), expected, 1e-5)
    for kernel, (_, layer) in zip(kernels, model.adapted_layers, strict=True):
        np.testing.assert_array_equal(array(layer.kernel), kernel)


def test_files_bring_everything_back(tmp_path):
    model = trained()
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), expected, 1e-5)
    loaded.train_on_batch(X, Y)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = network()
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_close(fresh.predict(X, verbose=0), expected, 1e-5)
    model.save_adapters(tmp_path / "adapters")
    fresh = network()
    fresh.load_adapters(tmp_path / "adapters")
    assert_close(fresh.predict(X, verbose=0), expected, 1e-5)
    base = fresh.disable_adapters()
    with base:
        unadapted = fresh.predict(X, verbose=0)
    assert np.abs(unadapted - expected).max() > 1e-3


def test_ranks_adapt():
    budget = kld.RankBudget(
        target_rank=1, warmup_steps=1, final_steps=1, mask_interval=1
    )
    model = network(rank_budget=budget, dropout_rate=0.2)
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0)
    assert sum(model.rank_pattern().values()) == 3
    expected = model.predict(X, verbose=0)
    model.compact_ranks()
    assert_close(model.predict(X, verbose=0), expected, 1e-5)
    model.merge_adapters()
    assert_close(model.predict(X, verbose=0), expected, 1e-4)


def test_gradient_checkpointing_gives_the_same_step():
    def step(remat):
        if remat:
            # Not "full": Keras cannot compute `BatchNormalization` again.
            names = ["stem", "depthwise", "project"]
            with keras.RematScope(mode="list_of_layers", layer_names=names):
                model = network()
        else:
            model = network()
        for _, layer in model.adapted_layers:
            set_random(layer.factors, scale=0.3)
        model.train_on_batch(X, Y)
        return model.trainable_weights

    for a, b in zip(step(True), step(False), strict=True):
        assert_close(a, b, 1e-5)


def test_what_no_word_finds_is_named():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 3)),
            keras.layers.Conv1D(4, 3, name="only"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, name="head"),
        ]
    )
    with pytest.raises(ValueError, match=r'"only".*"all-convolutions" every'):
        kld.enable_lora_dropout(model)
    kld.enable_lora_dropout(model, target_layers="only", rank=2)
    assert [path for path, _ in model.adapted_layers] == ["only"]


def test_peft_has_no_place_for_convolutions(tmp_path):
    with pytest.raises(ValueError):
        trained().export_peft(tmp_path / "peft")


def test_factors_start_at_random_but_not_from_the_kernel():
    model = network(init_lora_weights="gaussian", dropout_rate=0)
    plain = network()
    assert_close(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    with pytest.raises(ValueError, match=r"'pissa' is not made for Conv2D"):
        network(init_lora_weights="pissa")
