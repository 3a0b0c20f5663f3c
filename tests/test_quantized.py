"""Adapters on kernels that Keras has quantized to int8 or int4."""

import logging

import families
import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import randomize
from keras.quantizers import Int4QuantizationConfig
from keras.quantizers import Int8QuantizationConfig

import keras_lora_dropout as kld
from keras_lora_dropout.core import factors
from keras_lora_dropout.layers import quantized
from keras_lora_dropout.layers.adapter import plain_class

pytestmark = [
    pytest.mark.usefixtures("quick_collection"),
    pytest.mark.filterwarnings(
        # Keras names each layer that it leaves as it is.
        "ignore:Layer .* does not have a `quantize` method:UserWarning",
        "ignore:The use of `x.T` on tensors:UserWarning",
        # KerasHub feeds strings to `fit` by a reader that keeps their order.
        "ignore:`shuffle=True` was passed:UserWarning",
    ),
]

# By name: whether Keras quantizes the layer's input, too.
CONFIGS = {
    "int8": (Int8QuantizationConfig(), True),
    "int8 weights": (Int8QuantizationConfig(activation_quantizer=None), False),
    "int4 in blocks": (Int4QuantizationConfig(block_size=4), False),
    "int4 by channel": (Int4QuantizationConfig(block_size=-1), False),
}
WEIGHTS_ALONE = [name for name, (_, rounds) in CONFIGS.items() if not rounds]


def network():
    """Linear layers of all forms, with bias and activation."""
    inputs = keras.Input((5, 6))
    x = keras.layers.EinsumDense(
        "abc,cde->abde",
        (None, 2, 3),
        bias_axes="de",
        activation="tanh",
        name="heads",
    )(inputs)
    x = keras.layers.EinsumDense(
        "abde,dec->abc", (None, 6), bias_axes="c", name="joined"
    )(x)
    x = keras.layers.Dense(7, activation="relu", name="odd")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    generator = np.random.default_rng(3)
    for weight in model.weights:
        weight.assign(generator.normal(0, 0.5, weight.shape))
    return model


def inputs_of(rows=4):
    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, 5, 6)).astype("float32")


def quantized_network(name):
    model = network()
    model.quantize(
        config=CONFIGS[name][0], filters=lambda layer: layer.name != "head"
    )
    return model


def kernel_of(layer):
    """The float kernel that the stored integers stand for, by NumPy alone."""
    stored = [
        keras.ops.convert_to_numpy(w) for w in quantized.kernel_weights(layer)
    ]
    packed, scale = stored[0].astype("int64"), stored[1].astype("float64")
    if layer.quantization_mode == "int8":
        # That of an einsum kernel has the axes of the output.
        return packed / scale.reshape(scale.shape[2:] or scale.shape)
    shape = layer.kernel.shape
    columns = scale.shape[-1]
    # The low half of a byte comes first; both are signed.
    halves = np.stack([packed & 15, (packed >> 4) & 15], axis=-1)
    entries = halves.reshape(len(packed), -1)[:, :columns]
    entries = np.where(entries > 7, entries - 16, entries)
    if len(stored) == 2:
        return (entries / scale).reshape(shape)
    zero, group = stored[2].astype("float64"), stored[3].astype("int64")
    return ((entries - zero[group]) * scale[group]).reshape(shape)


def float_twin(model):
    """The same model on floats: what the integers stand for."""
    twin = network()
    for layer in model.layers:
        if not layer.weights:
            continue
        other = twin.get_layer(layer.name)
        other.bias.assign(array(layer.bias))
        other.kernel.assign(
            kernel_of(layer) if layer.quantization_mode else array(layer.kernel)
        )
    return twin


def adapted(model, **options):
    options = {"rank": 2, "seed": 0, **options}
    return randomize(kld.enable_lora_dropout(model, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_adapting_changes_nothing(name):
    model = quantized_network(name)
    x = inputs_of()
    before = array(model(x))
    kld.enable_lora_dropout(model, rank=2)
    np.testing.assert_array_equal(array(model(x)), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_are_what_the_integers_stand_for(name):
    model = quantized_network(name)
    for layer in model.layers:
        if not layer.weights or layer.name == "head":
            continue
        shape = quantized.kernel_shape(layer)
        if isinstance(layer, keras.layers.EinsumDense):
            axes = factors.einsum_axes(layer.equation, shape, 3)
            if layer.name == "joined":
                axes = factors.einsum_axes(layer.equation, shape, 4)
        else:
            axes = factors.dense_axes(shape)
        kernel = quantized.dequantized_kernel(layer, axes, type(layer))
        assert_close(kernel, kernel_of(layer), 1e-6)
        # What it is rounded to again is what it was.
        again = quantized.quantized_like(layer, kernel)
        for weight, value in zip(
            quantized.kernel_weights(layer), again, strict=True
        ):
            assert weight.dtype == keras.backend.standardize_dtype(value.dtype)
            if name != "int4 in blocks":  # Its range need not reach its ends.
                assert_close(value, weight, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_the_float_kernel(name):
    """Given masks for two groups, and the mean network."""
    model = adapted(quantized_network(name))
    twin = adapted(float_twin(model))
    x = inputs_of(4)
    # An input entry is rounded by up to half a step of 127.
    tolerance = 0.05 if CONFIGS[name][1] else 1e-5
    assert_close(model(x), twin(x), tolerance)
    values = np.random.default_rng(1).uniform(size=(2, model.mask_plan.width))
    results = []
    for each in (model, twin):
        layers = [layer for _, layer in each.adapted_layers]
        with draws_of(layers, values, rows=4):
            results.append(array(each(x)))
    assert_close(*results, tolerance)
    with model.disable_adapters(), twin.disable_adapters():
        assert_close(model(x), twin(x), tolerance)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_training_is_that_of_the_float_kernel(name, sampling):
    options = {"num_samples": 3, "sampling": sampling}
    model = adapted(quantized_network(name), **options)
    twin = adapted(float_twin(model), **options)
    x, y = inputs_of(6), np.arange(6) % 3
    before = [
        keras.ops.convert_to_numpy(weight)
        for _, layer in model.adapted_layers
        for weight in quantized.kernel_weights(layer)
    ]
    start = [array(f) for _, lyr in model.adapted_layers for f in lyr.factors]
    for each in (model, twin):
        each.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        each.fit(x, y, batch_size=6, epochs=3, shuffle=False, verbose=0)
    pairs = zip(model.adapted_layers, twin.adapted_layers, strict=True)
    for (_, layer), (_, other) in pairs:
        for factor, expected in zip(layer.factors, other.factors, strict=True):
            assert factor.dtype == "float32"
            assert_close(factor, array(expected), 1e-5)
    after = [
        weight
        for _, layer in model.adapted_layers
        for weight in quantized.kernel_weights(layer)
    ]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(new), old)
    factors_now = [f for _, lyr in model.adapted_layers for f in lyr.factors]
    for old, new in zip(start, factors_now, strict=True):
        assert np.abs(array(new) - old).max() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_rounds_again_and_says_so(name, caplog):
    model = adapted(quantized_network(name))
    x = inputs_of()
    before = model.predict(x, verbose=0)
    twin = adapted(float_twin(model)).merge_adapters()
    weights = [
        keras.ops.convert_to_numpy(w)
        for _, layer in model.adapted_layers
        for w in quantized.kernel_weights(layer)
    ]
    dtypes = [w.dtype for w in weights]
    with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
        model.merge_adapters()
    (message,) = [r.getMessage() for r in caplog.records]
    assert "quantized again: entries changed by up to" in message
    steps = 255 if name.startswith("int8") else 15
    worst = 0
    for name_of_layer in ("heads", "joined", "odd"):
        layer = model.get_layer(name_of_layer)
        assert type(layer) is plain_class(type(layer))
        assert not any(w.trainable for w in quantized.kernel_weights(layer))
        exact = array(twin.get_layer(name_of_layer).kernel)
        error = np.abs(kernel_of(layer) - exact).max() / np.abs(exact).max()
        assert error <= 1.05 / steps * (1 if steps == 255 else 2)
        worst = max(worst, error)
    assert f"{worst:.2g}" in message
    assert dtypes == [
        keras.backend.standardize_dtype(w.dtype)
        for lyr in ("heads", "joined", "odd")
        for w in quantized.kernel_weights(model.get_layer(lyr))
    ]
    model = kld.unmerge_adapters(model)
    restored = [
        keras.ops.convert_to_numpy(w)
        for _, layer in model.adapted_layers
        for w in quantized.kernel_weights(layer)
    ]
    for old, new in zip(weights, restored, strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name, tmp_path):
    model = adapted(quantized_network(name))
    x = inputs_of()
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    model.save_adapters(tmp_path / "adapters")
    other = kld.enable_lora_dropout(quantized_network(name), rank=2)
    other.load_adapters(tmp_path / "adapters")
    np.testing.assert_array_equal(other.predict(x, verbose=0), expected)


@pytest.mark.parametrize("mode, least", [("int8", 3.5), ("int4", 6.5)])
def test_frozen_bytes_fall(mode, least):
    """A block of Llama, wide enough that scales and norms are few."""

    def bytes_of(weights):
        return sum(
            int(np.prod(w.shape))
            * int("".join(filter(str.isdigit, w.dtype)))
            // 8
            for w in weights
        )

    def block():
        return keras.Sequential(
            [
                keras.Input((3, 256)),
                *[keras.layers.Dense(256, name=f"d{n}") for n in range(3)],
            ]
        )

    floats = block()
    integers = block()
    integers.quantize(mode)
    kld.enable_lora_dropout(integers, rank=2)
    frozen = integers.non_trainable_weights
    assert bytes_of(floats.weights) >= least * bytes_of(frozen)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_language_model(mode):
    """All of a Llama: trains, predicts alike either way, generates."""
    base = families.llama()
    base.preprocessor(families.TEXTS[:1])  # Keras quantizes what is built.
    base.quantize(mode)
    model = randomize(
        kld.enable_lora_dropout(base, rank=2, num_samples=2, seed=0)
    )
    assert len(model.adapted_layers) == 14
    model.compile(optimizer=keras.optimizers.Adam(0.01), sampler="greedy")
    before = {w.path: array(w) for w in model.trainable_weights}
    model.fit(families.TEXTS, batch_size=6, verbose=0)
    for weight in model.trainable_weights:
        assert np.abs(array(weight) - before[weight.path]).max() > 0
        assert weight.dtype == "float32"
    samples = model.ensemble_predict(
        families.TEXTS, seed=1, return_samples=True, verbose=0
    )
    assert np.abs(samples[0] - samples[1]).max() > 1e-3
    one = model.ensemble_predict(
        families.TEXTS[:1], seed=1, return_samples=True, verbose=0
    )
    assert_close(samples[:, :1], one, 1e-5)
    text = model.ensemble_generate("the quick", 12, seed=1)
    assert text.startswith("the quick")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_lean_attention_takes_quantized_layers(mode):
    """Its positions are projected once for all instances, here as elsewhere."""
    outputs = []
    for optimize in (True, False):
        keras.utils.set_random_seed(0)
        base = families.deberta()
        base.preprocessor(families.TEXTS[:1])
        base.quantize(mode)
        model = kld.enable_lora_dropout(
            base, rank=2, seed=0, num_samples=3, optimize=optimize
        )
        randomize(model)
        # Four programs of integers compile for longer than they run eagerly.
        model.compile(run_eagerly=True)
        # Many examples of each instance, and one, which it multiplies anew.
        outputs.append(
            [
                model.ensemble_predict(
                    texts, seed=1, return_samples=True, verbose=0
                )
                for texts in (families.TEXTS * 6, families.TEXTS[:1])
            ]
        )
    for lean, stock in zip(*outputs, strict=True):
        assert_close(lean, stock, 1e-4)


def test_a_quantized_head_is_reported(caplog):
    """It is meant to train, and could not."""
    for filters, heads in [(None, ["head"]), ("heads|joined|odd", [])]:
        model = network()
        model.quantize("int8", filters=filters)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "keras_lora_dropout"):
            kld.enable_lora_dropout(model, rank=2)
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == len(heads)
        for text in texts:
            assert 'kernels of "head" are quantized and do not train' in text
        assert model.get_layer("head").kernel.trainable is not bool(heads)


def test_quantizing_afterwards_is_refused():
    model = adapted(network())
    x = inputs_of()
    before = array(model(x))
    for quantize in (model.quantize, model.get_layer("odd").quantize):
        with pytest.raises(ValueError, match="Quantize first"):
            quantize("int8")
    np.testing.assert_array_equal(array(model(x)), before)
    plain = model.merge_adapters()
    plain.quantize("int8")
    assert plain.get_layer("odd").quantization_mode == "int8"


def test_built_by_hand():
    """A layer that is quantized from the start."""
    layer = kld.LoRADropoutDense(
        6, rank=2, dtype="int8_from_float32", activation="relu"
    )
    layer.build((None, 5))
    kernel = np.random.default_rng(0).integers(-127, 128, (5, 6))
    layer._kernel.assign(kernel)
    layer.kernel_scale.assign(np.full(6, 64.0))
    layer.lora_kernel_b.assign(np.ones((2, 6)))
    x = np.eye(5, dtype="float32")
    delta = array(layer.lora_kernel_a) @ np.ones((2, 6)) * 0.25
    expected = np.maximum(kernel / 64 + delta, 0)
    assert_close(layer(x), expected, 1e-5)
