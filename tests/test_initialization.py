"""`init_lora_weights`: where factors start, and that the model does not.

`test_peft_initialization.py` compares with PEFT.
"""

import families
import keras
import numpy as np
import pytest
import reference
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import draws_of
from helpers import move_factors
from helpers import set_random
from helpers import tiny_mlp

import keras_lora_dropout as kld
from keras_lora_dropout.conversion.merging import merged_kernels
from keras_lora_dropout.core import initialization

pytestmark = [
    pytest.mark.usefixtures("quick_collection"),
    pytest.mark.filterwarnings(
        # KerasHub feeds strings to `fit` by a reader that keeps their order.
        "ignore:`shuffle=True` was passed:UserWarning",
        "ignore:unclosed file:ResourceWarning",
        # Keras names each layer that it does not quantize.
        "ignore:Layer .* does not have a `quantize` method:UserWarning",
    ),
]
FAST = "pissa_niter_8"
ALL = (*initialization.INITIALIZATIONS, FAST)
FROM_KERNEL = (*initialization.FROM_KERNEL, FAST)


def network():
    """Linear layers of all forms, with biases; no factor is square."""
    inputs = keras.Input((5, 6))
    x = keras.layers.EinsumDense(
        "abc,cde->abde", (None, 2, 5), bias_axes="de", name="heads"
    )(inputs)
    x = keras.layers.EinsumDense(
        "abde,dec->abc", (None, 7), bias_axes="c", name="joined"
    )(keras.ops.tanh(x))
    x = keras.layers.Dense(8, activation="relu", name="dense")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    set_random(model.weights, seed=3)
    return model


def inputs_of(rows=4):
    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, 5, 6)).astype("float32")


def adapted(plain=network, init="pissa", **options):
    options = {"rank": 3, "alpha": 2, "num_samples": 2, "seed": 0, **options}
    return kld.enable_lora_dropout(plain(), init_lora_weights=init, **options)


def kernel_matrix(layer):
    return array(layer.kernel).reshape(layer.mask_sizes)


def delta(layer, pair=None):
    """The mean network's product of two factors of a layer."""
    a, b = map(array, pair or layer.factors)
    keep = 1 if layer.rescale else (1 - layer.dropout_rate) ** 2
    return layer.lora_alpha / layer.lora_rank * keep * a @ b


def predicted(model, x):
    return model.predict(x, verbose=0)


# The factors, against NumPy


@pytest.mark.parametrize("init", ["pissa", FAST])
@pytest.mark.parametrize("rescale", [False, True])
def test_pissa_is_the_best_approximation(init, rescale):
    model = adapted(init=init, rescale=rescale)
    for _, layer in model.adapted_layers:
        left, values, right = np.linalg.svd(kernel_matrix(layer))
        best = left[:, :3] * values[:3] @ right[:3]
        assert_close(delta(layer), best, 1e-5)
        a, b = map(array, layer.factors)
        # The singular values are halved between the factors.
        assert_close(a.T @ a, b @ b.T, 1e-4)
        assert_close(a.T @ a, np.diag(np.diag(a.T @ a)), 1e-4)


def test_iterations_find_the_principal_part_of_a_large_kernel():
    """Singular values that fall slowly, as those of trained kernels do."""
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.normal(size=(300, 200)))
    right, _ = np.linalg.qr(generator.normal(size=(200, 200)))
    values = 1 / np.sqrt(np.arange(1, 201))
    kernel = (left * values @ right.T).astype("float32")
    best = left[:, :8] * values[:8] @ right[:, :8].T
    errors = []
    for iterations in (1, 4, 16):
        a, b = initialization.pissa(kernel, 8, 2.0, iterations, generator)
        errors.append(np.linalg.norm(2.0 * a @ b - best))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-2 * np.linalg.norm(best)
    assert np.linalg.norm(2.0 * a @ b - kernel) <= (
        1.0001 * np.linalg.norm(best - kernel)
    )


def test_olora_is_the_start_of_a_qr_decomposition():
    model = adapted(init="olora")
    for _, layer in model.adapted_layers:
        a, b = map(array, layer.factors)
        assert_close(b @ b.T, np.eye(3), 1e-5)
        assert_close(np.tril(a), a, 0)
        # What is left of the kernel does not reach the first output features.
        kernel = kernel_matrix(layer)
        assert_close(a @ b, kernel @ b.T @ b, 1e-5)
        assert_close((kernel - a @ b)[:3], np.zeros((3, b.shape[1])), 1e-5)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_orthogonal_factors_have_no_product(rank):
    model = adapted(init="orthogonal", rank=rank)
    for _, layer in model.adapted_layers:
        a, b = map(array, layer.factors)
        assert np.linalg.matrix_rank(a, tol=1e-5) == (rank + 1) // 2
        assert np.linalg.matrix_rank(b, tol=1e-5) == rank // 2
        assert np.abs(a @ b).max() < 1e-7


# The model


@pytest.mark.parametrize("init", ALL)
@pytest.mark.parametrize(
    "options",
    [
        {"dropout_rate": 0.5},
        {"dropout_rate": 0.5, "rescale": True},
        {"dropout_rate": 0.0, "alpha": 12},
        {"dropout_rate": 0.9, "rank_pattern": {"dense": 2}},
    ],
    ids=lambda options: " ".join(options),
)
def test_the_mean_network_starts_at_the_base_model(init, options):
    plain, x = network(), inputs_of()
    before, weights = predicted(plain, x), list(map(array, plain.weights))
    count = len(plain.weights)
    model = adapted(lambda: plain, init, **options)
    assert_close(predicted(model, x), before, 2e-6)
    ours = [w for _, lyr in model.adapted_layers for w in lyr.adapter_weights]
    assert len(ours) == 3 * (4 if init in FROM_KERNEL else 2)
    assert len(model.weights) == count + len(ours)
    model.merge_adapters()
    # Merging has added what is zero up to rounding.
    for value, weight in zip(weights, model.weights, strict=True):
        assert_close(weight, value, 2e-6)


@pytest.mark.parametrize("init", FROM_KERNEL)
def test_kernels_stay_bit_for_bit(init):
    plain = network()
    kernels = {
        layer.name: array(layer.kernel)
        for layer in plain.layers
        if layer.weights
    }
    model = adapted(lambda: plain, init)
    model.compile("sgd", "mse")
    model.fit(inputs_of(), np.ones((4, 3)), verbose=0)
    for path, layer in model.adapted_layers:
        np.testing.assert_array_equal(array(layer.kernel), kernels[path])
        for first, now in zip(
            layer.initial_factors, layer.factors, strict=True
        ):
            assert not first.trainable and now.trainable
            assert np.abs(array(first) - array(now)).max() > 1e-5


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("init", FROM_KERNEL)
def test_masks_do_not_cover_what_is_subtracted(init, rescale):
    """Two groups of given masks, and the mean network, by the equation."""
    model = adapted(init=init, rescale=rescale, dropout_rate=0.25)
    move_factors(model)
    x = inputs_of(4)
    layer = model.get_layer("dense")
    layer.activation = keras.activations.linear
    x = np.random.default_rng(2).normal(size=(4, 5, 7)).astype("float32")
    a, b = map(array, layer.factors)
    kernel = kernel_matrix(layer) - delta(layer, layer.initial_factors)
    mask = np.random.default_rng(1).integers(0, 2, (2, layer.mask_width))
    with draws_of([layer], mask, rows=4):
        actual = array(layer(x))
    for n in range(2):
        mask_a, mask_b = (
            reference.inverted(part, 0.25, rescale)
            for part in np.split(mask[n], [7])
        )
        rows = slice(2 * n, 2 * n + 2)
        expected = reference.adapted_product(
            x[rows], kernel, a, b, mask_a, mask_b, layer.scaling
        )
        assert_close(actual[rows], expected + array(layer.bias), 1e-5)
    expected = x @ (kernel + delta(layer)) + array(layer.bias)
    assert_close(layer(x), expected, 1e-5)


@pytest.mark.parametrize("sharing", ["batch", "example"])
def test_parallel_training_is_sequential_training(sharing):
    results = []
    for sampling in ("parallel", "sequential"):
        model = adapted(
            sampling=sampling,
            mask_sharing=sharing,
            dropout_rate=0.3,
            num_samples=3,
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x, y = inputs_of(6), np.ones((6, 3), "float32")
        model.fit(x, y, 6, epochs=2, shuffle=False, verbose=0)
        results.append([array(w) for w in model.weights])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("init", ["orthogonal", *FROM_KERNEL])
@pytest.mark.parametrize(
    "family", [families.deberta, families.bert, families.llama]
)
def test_keras_hub_models(family, init):
    model = family()
    # At KerasHub's own start, outputs hardly depend on kernels.
    set_random([w for w in model.weights if "kernel" in w.name], 1, 0.3)
    x, y = families.data_of(family)
    before = predicted(model, x)
    adapted(lambda: model, init, dropout_rate=0.1)
    assert_close(predicted(model, x), before, 2e-5)
    kernels = [array(layer.kernel) for _, layer in model.adapted_layers]
    model.fit(*((x,) if y is None else (x, y)), batch_size=6, verbose=0)
    after = predicted(model, x)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 1e-5
    with model.disable_adapters():
        found = [array(layer.kernel) for _, layer in model.adapted_layers]
    for old, new in zip(kernels, found, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("init", FROM_KERNEL)
def test_lean_attention_takes_them_in_parts(init):
    results = []
    for optimize in (True, False):
        model = families.deberta_of_any_backend()
        set_random(model.weights, seed=1, scale=0.3)
        adapted(lambda m=model: m, init, optimize=optimize, dropout_rate=0.3)
        move_factors(model)
        results.append(
            # So few rows for each instance that positions come in parts.
            model.ensemble_predict(
                families.TEXTS[:2], num_samples=4, seed=1, verbose=0
            )
        )
    assert_close(*results, 2e-5)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("init", FROM_KERNEL)
def test_quantized_kernels(mode, init, caplog):
    plain, x = network(), inputs_of()
    names = {layer.name for layer in plain.layers if layer.weights} - {"head"}
    config = {
        "int8": keras.quantizers.Int8QuantizationConfig,
        "int4": keras.quantizers.Int4QuantizationConfig,
    }[mode]
    config = config(activation_quantizer=None)
    plain.quantize(config=config, filters=lambda layer: layer.name in names)
    before = predicted(plain, x)
    model = adapted(lambda: plain, init, dropout_rate=0.5)
    assert_close(predicted(model, x), before, 1e-5)
    layer = model.get_layer("dense")
    # Rows of the identity read off the kernel that the integers stand for.
    with model.disable_adapters():
        product = layer._frozen_product(np.eye(7, dtype="float32"))
    kernel = array(product) - array(layer.bias)
    scale = layer.scaling * 0.25
    if init.startswith("pissa"):
        expected = initialization.pissa(kernel, 3, scale)
    else:
        expected = initialization.olora(kernel, 3)
    a, b = map(array, layer.factors)
    assert_close(a @ b, expected[0] @ expected[1], 1e-4)
    move_factors(model)
    exact = array(merged_kernels(layer)[0])
    start = delta(layer, layer.initial_factors)
    assert_close(exact, kernel - start + delta(layer), 1e-5)
    model.merge_adapters()
    assert "quantized again" in caplog.text


def test_half_precision_starts_at_the_base_model():
    plain = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, dtype="mixed_bfloat16", name="dense"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    x = np.random.default_rng(0).normal(size=(8, 64)).astype("float32")
    before = predicted(plain, x)
    model = adapted(lambda: plain, rank=16, dropout_rate=0.5)
    assert model.get_layer("dense").initial_kernel_a.dtype == "float32"
    assert_close(predicted(model, x), before, 0.02)


# Errors


def zeros():
    model = tiny_mlp()
    model.get_layer("second").kernel.assign(np.zeros((8, 8)))
    return model


def not_finite():
    model = tiny_mlp()
    model.get_layer("second").kernel.assign(np.full((8, 8), np.nan))
    return model


@pytest.mark.parametrize(
    ("plain", "options", "message"),
    [
        (
            tiny_mlp,
            {"init": "pisa"},
            '"he_uniform" or "gaussian" or "orthogonal" or "pissa" or "olora".*'
            "Received: init_lora_weights='pisa'",
        ),
        (tiny_mlp, {"init": True}, "init_lora_weights=True"),
        (tiny_mlp, {"init": "pissa_niter_0"}, '"pissa_niter_16".*niter_0'),
        (
            tiny_mlp,
            {"init": "pissa", "rank_budget": kld.RankBudget(2)},
            "rank_budget.*init_lora_weights='pissa'.*Leave one",
        ),
        (
            tiny_mlp,
            {"init": "orthogonal", "rank_pattern": {"second": 1}},
            'layer "second".*rank of 2 or more.*rank=1',
        ),
        (zeros, {"init": "pissa"}, 'layer "second".*0 that are not zero.*=3'),
        (not_finite, {"init": "pissa"}, 'layer "second".*not finite'),
        (not_finite, {"init": "olora"}, 'layer "second".*not finite'),
    ],
)
def test_errors_change_nothing(plain, options, message):
    model = plain()
    before = [type(layer) for layer in model.layers], len(model.weights)
    with pytest.raises(ValueError, match=message):
        adapted(lambda: model, **options)
    assert before == ([type(lyr) for lyr in model.layers], len(model.weights))
    assert all(weight.trainable for weight in model.weights)


def test_an_adapter_from_peft_says_where_it_starts():
    with pytest.raises(ValueError, match=r"takes no.*init_lora_weights"):
        kld.import_peft(tiny_mlp(), "folder", init_lora_weights="pissa")


def test_a_kernel_of_zeros_is_no_obstacle_to_others():
    x, _ = classification_data()
    for init in ("gaussian", "orthogonal", "olora"):
        model = zeros()
        before = predicted(model, x)
        assert_close(predicted(adapted(lambda m=model: m, init), x), before)
