"""DoRA: magnitudes beside the factors, with masks and without."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from helpers import tiny_mlp
from peft_layers import run_oracle

import keras_lora_dropout as kld

X = np.random.default_rng(0).normal(size=(6, 6)).astype("float32")
Y = np.arange(6) % 3


def network(random=True, **options):
    options = {"rank": 2, "alpha": 3, "num_samples": 2, "seed": 0, **options}
    model = kld.enable_lora_dropout(tiny_mlp(), use_dora=True, **options)
    if random:
        for _, layer in model.adapted_layers:
            set_random(layer.factors)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def reference(layer, x, masks=None, kernel=None):
    """The layer's output before bias and activation, in float64."""
    a, magnitude, b = (array(factor) for factor in layer.factors)
    kernel = array(layer.kernel).reshape(len(a), -1)
    mean = layer.scaling * a @ b
    if not layer.rescale:
        mean = mean * (1 - layer.dropout_rate) ** 2
    gain = magnitude / np.linalg.norm(kernel + mean, axis=0)
    delta = mean
    if masks is not None:
        delta = layer.scaling * (masks[0][:, None] * a) @ (b * masks[1])
    return (x @ (kernel + delta)) * gain


def bare(layer, x, **options):
    """The layer without bias and activation."""
    layer.bias.assign(np.zeros(layer.bias.shape))
    layer.activation = keras.activations.linear
    return layer(x, **options)


def test_a_fresh_adapter_changes_nothing():
    plain, model = tiny_mlp(), network(random=False)
    assert_close(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    for _, layer in model.adapted_layers:
        norms = np.linalg.norm(array(layer.kernel), axis=0)
        assert_close(layer.lora_magnitude, norms)
        assert layer.lora_magnitude.trainable


@pytest.mark.parametrize("rescale", [False, True])
def test_outputs_are_scaled_to_their_magnitudes(rescale):
    layer = network(rescale=rescale).get_layer("first")
    assert_close(bare(layer, X), reference(layer, X), 1e-4)
    keep = np.random.default_rng(1).integers(0, 2, (3, 6 + 8))
    with draws_of([layer], keep, rows=6):
        found = bare(layer, X, training=True)
    for n, masks in enumerate(keep):
        rows = slice(2 * n, 2 * n + 2)
        if rescale:
            masks = masks / (1 - layer.dropout_rate)
        expected = reference(layer, X[rows], (masks[:6], masks[6:]))
        assert_close(found[rows], expected, 1e-4)


def test_kernels_of_several_axes_have_a_magnitude_for_each_feature():
    inputs = keras.Input((4, 6))
    layer = keras.layers.EinsumDense(
        "abc,cde->abde", (None, 2, 3), bias_axes="de", name="query"
    )
    outputs = keras.layers.Dense(2)(keras.layers.Reshape((4, 6))(layer(inputs)))
    model = keras.Model(inputs, outputs)
    kld.enable_lora_dropout(
        model, target_layers=["query"], rank=2, use_dora=True, seed=0
    )
    layer = model.get_layer("query")
    set_random(layer.factors)
    assert layer.lora_magnitude.shape == (6,)
    x = np.random.default_rng(2).normal(size=(3, 4, 6)).astype("float32")
    expected = reference(layer, x)
    assert_close(array(bare(layer, x)).reshape(3, 4, 6), expected, 1e-4)
    before = model.predict(x, verbose=0)
    model.merge_adapters()
    assert_close(model.predict(x, verbose=0), before, 1e-4)


def test_training_is_that_of_peft():
    model = network(dropout_rate=0, num_samples=1, target_layers=["first"])
    layer = model.get_layer("first")
    y = np.random.default_rng(3).normal(size=(6, 8)).astype("float32")
    single = keras.Model(layer.input, layer.output)
    bare(layer, X)
    values = [array(factor).astype("float32") for factor in layer.factors]
    weight = array(layer.kernel).T.astype("float32")
    case = {
        "weight": weight.tolist(),
        "a": values[0].T.tolist(),
        "magnitude": values[1].tolist(),
        "b": values[2].T.tolist(),
        "inputs": X.tolist(),
        "target": y.tolist(),
        "r": 2,
        "lora_alpha": 3,
        "learning_rate": 0.1,
        "steps": 3,
    }
    theirs = run_oracle(case, "peft_dora_oracle.py")
    assert_close(np.linalg.norm(weight, axis=1), theirs["initial"])
    assert_close(single(X), np.array(theirs["output"]), 1e-4)
    layer.bias.trainable = False
    single.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(3):
        single.train_on_batch(X, y)
    end = theirs["end"]
    a, magnitude, b = layer.factors
    assert_close(array(a).T, end["lora_A.default.weight"], 1e-4)
    assert_close(array(b).T, end["lora_B.default.weight"], 1e-4)
    expected = end["lora_magnitude_vector.default.weight"]
    assert_close(magnitude, expected, 1e-4)
    assert np.abs(array(magnitude) - values[1]).max() > 1e-3


def trained(**options):
    model = network(**options)
    for _ in range(2):
        model.train_on_batch(X, Y)
    return model


def test_parallel_instances_are_those_in_sequence():
    first, second = (trained(sampling=s) for s in ("parallel", "sequential"))
    for a, b in zip(
        first.trainable_weights, second.trainable_weights, strict=True
    ):
        assert_close(a, b, 1e-4)
    options = {"seed": 1, "verbose": 0}
    samples = first.ensemble_predict(X, return_samples=True, **options)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3
    mean = second.ensemble_predict(X, **options)
    assert_close(samples.mean(0), mean, 1e-4)


def test_merged_networks_predict_the_same():
    model = trained()
    expected = model.predict(X, verbose=0)
    ensemble = model.ensemble_predict(X, num_samples=3, seed=2, verbose=0)
    outputs = [
        plain.predict(X, verbose=0)
        for plain in model.merge_instances(num_samples=3, seed=2)
    ]
    assert_close(np.mean(outputs, axis=0), ensemble, 1e-4)
    with model.disable_adapters():
        base = model.predict(X, verbose=0)
    assert np.abs(base - expected).max() > 1e-3
    model.merge_adapters()
    assert_close(model.predict(X, verbose=0), expected, 1e-4)
    kld.unmerge_adapters(model)
    assert_close(model.predict(X, verbose=0), expected, 1e-5)


def test_files_bring_magnitudes_back(tmp_path):
    model = trained()
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(X, verbose=0), expected, 1e-5)
    model.save_adapters(tmp_path / "adapters")
    fresh = network(random=False)
    fresh.load_adapters(tmp_path / "adapters")
    assert_close(fresh.predict(X, verbose=0), expected, 1e-5)
    text = []
    model.adapter_summary(print_fn=text.append)
    assert "Adapter: DoRA" in text[0]
    lora = kld.enable_lora_dropout(tiny_mlp(), rank=2, alpha=3, seed=0)
    with pytest.raises(ValueError, match="DoRA"):
        lora.load_adapters(tmp_path / "adapters")


def test_several_adapters_keep_their_magnitudes():
    model = trained()
    expected = model.predict(X, verbose=0)
    base = tiny_mlp()
    model.add_adapter("other", rank=1)
    model.set_adapter("other")
    for _, layer in model.adapted_layers:
        norms = np.linalg.norm(array(layer.kernel), axis=0)
        assert_close(layer.lora_magnitude, norms)
    base.get_layer("head").set_weights(
        [array(w) for w in model.get_layer("head").weights]
    )
    assert_close(model.predict(X, verbose=0), base.predict(X, verbose=0))
    model.set_adapter("default")
    assert_close(model.predict(X, verbose=0), expected, 1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_it_goes_with_other_starts(start):
    plain = tiny_mlp()
    model = network(random=False, init_lora_weights=start, dropout_rate=0.1)
    expected = plain.predict(X, verbose=0)
    assert_close(model.predict(X, verbose=0), expected, 1e-4)
    for _ in range(3):
        model.train_on_batch(X, Y)
    expected = model.predict(X, verbose=0)
    model.merge_adapters()
    assert_close(model.predict(X, verbose=0), expected, 1e-4)


def bert():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None, dropout=0.0
    )
    return model


def test_peft_reads_what_it_wrote(tmp_path):
    model = kld.enable_lora_dropout(bert(), rank=2, use_dora=True, seed=0)
    for _, layer in model.adapted_layers:
        set_random(layer.factors, scale=0.3)
    words = np.random.default_rng(0).integers(1, 20, (3, 8))
    x = {
        "token_ids": words,
        "segment_ids": np.zeros_like(words),
        "padding_mask": np.ones_like(words),
    }
    model.export_peft(tmp_path / "peft", instances=2, seed=3)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["use_dora"] is True
    expected = model.predict(x, verbose=0)
    again = kld.import_peft(bert(), tmp_path / "peft")
    assert_close(again.predict(x, verbose=0), expected, 1e-5)
    ensemble = model.ensemble_predict(x, num_samples=2, seed=3, verbose=0)
    instances = [
        kld.import_peft(bert(), tmp_path / f"peft/instance_{n}")
        for n in range(2)
    ]
    outputs = [m.predict(x, verbose=0) for m in instances]
    assert_close(np.mean(outputs, axis=0), ensemble, 1e-4)
    lora = kld.enable_lora_dropout(bert(), rank=2, seed=0)
    with pytest.raises(ValueError, match=r"magnitudes.*the other has none"):
        lora.import_peft(tmp_path / "peft")
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(ValueError, match="but `use_dora` is not true"):
        kld.import_peft(bert(), tmp_path / "peft")


def test_lean_attention_computes_the_same():
    def classifier(optimize):
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.DebertaV3Backbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=8,
            bucket_size=4,
            dropout=0.0,
        )
        model = keras_hub.models.DebertaV3TextClassifier(
            backbone, num_classes=2, preprocessor=None, dropout=0.0
        )
        kld.enable_lora_dropout(
            model, rank=2, use_dora=True, seed=0, optimize=optimize
        )
        for _, layer in model.adapted_layers:
            # Large, or positions would hardly count.
            set_random([layer.kernel, *layer.factors], scale=0.7)
        return model

    words = np.random.default_rng(0).integers(1, 20, (3, 8))
    x = {"token_ids": words, "padding_mask": np.ones_like(words)}
    lean, plain = classifier(True), classifier(False)
    expected = plain.predict(x, verbose=0)
    assert_close(lean.predict(x, verbose=0), expected, 1e-4)
    options = {"seed": 3, "return_samples": True, "verbose": 0}
    samples = lean.ensemble_predict(x, **options)
    assert_close(samples, plain.ensemble_predict(x, **options), 1e-4)


def test_what_it_is_not_for_is_refused():
    budget = kld.RankBudget(
        target_rank=1, warmup_steps=1, final_steps=1, mask_interval=1
    )
    with pytest.raises(ValueError, match="Leave one of them out"):
        network(rank_budget=budget)
    with pytest.raises(TypeError, match="`use_dora` must be True or False"):
        kld.enable_lora_dropout(tiny_mlp(), use_dora="yes")
    inputs = keras.Input((8, 3))
    x = keras.layers.Conv1D(4, 3, name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    with pytest.raises(ValueError, match="for Dense and EinsumDense, not for"):
        kld.enable_lora_dropout(
            model, target_layers=["conv"], use_dora=True, rank=2
        )
    model = tiny_mlp()
    model.get_layer("first").quantize("int8")
    with pytest.raises(ValueError, match=r"\(int8\), but.*floats alone"):
        kld.enable_lora_dropout(model, use_dora=True, rank=2)
