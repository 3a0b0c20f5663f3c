"""DeBERTaV3's lean attention against KerasHub's own, in float64."""

import importlib
import logging

import keras
import keras_hub
import numpy as np
import pytest
from families import deberta
from helpers import BACKEND
from helpers import array
from helpers import randomize
from helpers import set_biases

import keras_lora_dropout as kld
from keras_lora_dropout.architectures import deberta_v3

# Keras warns of a softmax over a single key.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using a softmax", "ignore:Exception encountered when"
)
# All of 1 to 600 agree; compiled backends compile each length anew.
LENGTHS = {
    2: [1, 600],
    8: [7, 31],
    32: [64, 300],
    256: [2, 513],
}
if BACKEND == "torch":
    LENGTHS = {size: range(1 + n, 601, 13) for n, size in enumerate(LENGTHS)}


@pytest.fixture(autouse=True)
def doubles():
    """Let JAX compute in float64."""
    if BACKEND != "jax":
        yield
        return
    jax = importlib.import_module("jax")
    with jax.enable_x64(True):
        yield


def backbone_of(bucket_size=32, dropout=0.0, layers=1, **options):
    keras.utils.set_random_seed(1)
    model = keras_hub.models.DebertaV3Backbone(
        vocabulary_size=11,
        num_layers=layers,
        num_heads=2,
        hidden_dim=6,
        intermediate_dim=8,
        max_sequence_length=2 * bucket_size,
        bucket_size=bucket_size,
        dropout=dropout,
        **{"dtype": "float64", **options},
    )
    # Scores that matter; KerasHub computes their softmax in float32.
    for variable in model.weights:
        if "kernel" in variable.path or "embedding" in variable.path:
            variable.assign(variable * 4)
    return model


def batch(length, rows=2, padded=True):
    generator = np.random.default_rng(length)
    mask = np.ones((rows, length), "int32")
    if padded:
        mask[0, (length + 1) // 2 :] = 0
    return {
        "token_ids": generator.integers(0, 11, (rows, length), "int32"),
        "padding_mask": mask,
    }


def assert_equal_to_1e6(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def output(model, x):
    return array(model(x))


def lean(model):
    deberta_v3.make_lean(model)
    # A table and one attention layer for each block.
    blocks = len(model.transformer_layers)
    assert len(deberta_v3.lean_layers(model)) == 1 + blocks
    return model


@pytest.mark.parametrize("bucket_size", LENGTHS)
def test_output_is_that_of_keras_hub(bucket_size):
    model = backbone_of(bucket_size)
    for length in LENGTHS[bucket_size]:
        x = batch(length)
        expected = output(model, x)
        assert_equal_to_1e6(output(lean(model), x), expected)
        deberta_v3.make_stock(model)
        assert not deberta_v3.lean_layers(model)


def gradients(model, x):
    """Gradients of all weights, taken by one step of gradient descent."""
    weights = [array(w) for w in model.weights]
    target = np.linspace(-1, 1, 6) * np.ones((*x["token_ids"].shape, 1))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    loss = model.train_on_batch(x, target)
    after = [array(w) for w in model.weights]
    model.set_weights(weights)
    return loss, [old - new for old, new in zip(weights, after, strict=True)]


@pytest.mark.parametrize(
    ("length", "bucket_size"),
    [(1, 8), (31, 2), (96, 256), (600, 256)],
)
def test_gradients_are_those_of_keras_hub(length, bucket_size):
    model = backbone_of(bucket_size)
    x = batch(length)
    loss, expected = gradients(model, x)
    lean_loss, actual = gradients(lean(model), x)
    assert_equal_to_1e6(lean_loss, loss)
    assert max(np.abs(g).max() for g in expected) > 1e-3
    for ours, theirs in zip(actual, expected, strict=True):
        assert_equal_to_1e6(ours, theirs)


def moments(model, x, draws, silent):
    """Mean and variance over dropout of one example's attended values."""
    layer = model.transformer_layers[0]._self_attention_layer
    getattr(layer, silent).rate = 0.0
    states = np.random.default_rng(0).normal(size=(*x["token_ids"].shape, 6))
    table = model.relative_embeddings(states)
    every = np.ones((2, 1, 5), bool)
    samples = [
        array(layer(states, table, every, training=True))[-1]
        for _ in range(draws)
    ]
    return np.mean(samples, 0), np.var(samples, 0)


@pytest.mark.parametrize(
    "silent", ["_attn_dropout_layer", "_position_dropout_layer"]
)
def test_dropout_keeps_its_distribution(silent):
    x = batch(5, padded=False)
    (mean, var), (lean_mean, lean_var) = (
        moments(change(backbone_of(8, dropout=0.3)), x, 600, silent)
        for change in (lambda model: model, lean)
    )
    error = np.sqrt((var + lean_var) / 600)
    assert np.abs((mean - lean_mean) / error).max() < 5
    np.testing.assert_allclose(lean_var, var, rtol=0.4)
    assert var.min() > 1e-9


@pytest.mark.parametrize(
    ("mask_sharing", "length", "rows"),
    [
        # A row of the table for each distance, fewer rows, and all of it.
        ("example", 16, 2),
        ("example", 20, 2),
        ("batch", 64, 2),
        # So many that each mask group has a table of its own.
        ("batch", 20, 8),
    ],
)
def test_training_and_ensembles_are_the_same(mask_sharing, length, rows):
    labels = np.arange(rows) % 2
    results = []
    for optimize in (True, False):
        model = keras_hub.models.DebertaV3TextClassifier(
            backbone_of(32, dtype="float32"), num_classes=2
        )
        kld.enable_lora_dropout(
            model,
            rank=2,
            num_samples=3,
            mask_sharing=mask_sharing,
            optimize=optimize,
            seed=0,
        )
        assert bool(deberta_v3.lean_layers(model)) == optimize
        randomize(model)
        set_biases(model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        x = batch(length, rows)
        losses = [model.train_on_batch(x, labels) for _ in range(2)]
        ensemble = model.ensemble_predict(x, seed=1, verbose=0)
        results.append((losses, model.predict(x, verbose=0), ensemble))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_unknown_code_stays_as_it_is(monkeypatch, caplog):
    name = "DisentangledSelfAttention"
    monkeypatch.setitem(deberta_v3._KNOWN_SOURCES, name, "another")
    deberta_v3._is_known.cache_clear()
    try:
        model = deberta()
        with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
            kld.enable_lora_dropout(model, rank=2)
    finally:
        deberta_v3._is_known.cache_clear()
    assert not deberta_v3.lean_layers(model)
    assert f"another {name} than" in caplog.text


def test_other_models_are_left_alone(caplog):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    deberta_v3.make_lean(model)
    assert not deberta_v3.lean_layers(model)
    assert not caplog.text


def test_a_merged_model_is_keras_hubs_own():
    model = kld.enable_lora_dropout(deberta(), rank=2)
    assert deberta_v3.lean_layers(model)
    plain = model.merge_adapters()
    assert not deberta_v3.lean_layers(plain)
    assert kld.unmerge_adapters(plain) is model
    assert deberta_v3.lean_layers(model)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_copy_is_optimized_as_the_model_was(optimize):
    model = kld.enable_lora_dropout(deberta(), rank=2, optimize=optimize)
    copy = type(model).from_config(model.get_config())
    assert bool(deberta_v3.lean_layers(copy)) == optimize


def test_optimize_is_a_boolean():
    with pytest.raises(TypeError, match="optimize"):
        kld.enable_lora_dropout(deberta(), optimize="yes")
