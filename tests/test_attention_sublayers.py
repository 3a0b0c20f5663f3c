"""The projections inside Keras's own attention layers."""

import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import set_random

import keras_lora_dropout as kld

X = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(4, 2)).astype("float32")
ATTENTION = {
    "multi-head": lambda: keras.layers.MultiHeadAttention(
        2, 4, name="attention"
    ),
    "grouped": lambda: keras.layers.GroupQueryAttention(
        4, 4, 2, name="attention"
    ),
}


def network(kind, adapted=True, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(X.shape[1:])
    x = ATTENTION[kind]()(inputs, inputs, use_causal_mask=True)
    x = keras.layers.GlobalAveragePooling1D()(inputs + x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    if adapted:
        options = {"rank": 2, "num_samples": 2, "seed": 0, **options}
        kld.enable_lora_dropout(model, **options)
        for _, layer in model.adapted_layers:
            set_random(layer.factors, scale=0.3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.fixture(params=ATTENTION)
def kind(request):
    return request.param


def test_all_four_projections_are_adapted_and_train(kind):
    model = network(kind)
    names = {path.rpartition("/")[2] for path, _ in model.adapted_layers}
    assert names == {"query", "key", "value", "attention_output"}
    before = [array(layer.factors[1]) for _, layer in model.adapted_layers]
    model.train_on_batch(X, Y)
    for (path, layer), start in zip(model.adapted_layers, before, strict=True):
        assert np.abs(array(layer.factors[1]) - start).max() > 1e-6, path


def test_parallel_instances_are_those_in_sequence(kind):
    first, second = (
        network(kind, sampling=s) for s in ("parallel", "sequential")
    )
    for model in (first, second):
        model.train_on_batch(X, Y)
    for a, b in zip(
        first.trainable_weights, second.trainable_weights, strict=True
    ):
        assert_close(a, b, 1e-5)
    samples, others = (
        model.ensemble_predict(X, seed=1, return_samples=True, verbose=0)
        for model in (first, second)
    )
    assert_close(samples, others, 1e-5)
    assert np.abs(samples[0] - samples[1]).max() > 1e-4


def test_merged_attention_predicts_the_same(kind, tmp_path):
    model = network(kind)
    expected = model.predict(X, verbose=0)
    assert np.abs(expected - network(kind, False).predict(X, verbose=0)).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), expected)
    model.merge_adapters()
    assert type(model.get_layer("attention")) is type(ATTENTION[kind]())
    assert_close(model.predict(X, verbose=0), expected)
