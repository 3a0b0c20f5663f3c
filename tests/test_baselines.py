"""BitFit and bottleneck adapters: what trains, what is computed, what stays."""

import math

import families
import keras
import numpy as np
import pytest
from keras import ops
from scipy.special import erf

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout.baselines import enable_bitfit
from keras_lora_dropout.baselines import enable_bottleneck_adapters

pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")

ENCODERS = [families.bert, families.roberta, families.deberta]
# Two blocks of 16 features and 32 in between, as in `families`.
DIM, HIDDEN, BLOCKS = 16, 32, 2


def count(variables):
    return sum(math.prod(variable.shape) for variable in variables)


def compiled(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def fitted(model, epochs=1):
    compiled(model).fit(
        families.TEXTS, families.LABELS, epochs=epochs, verbose=0
    )
    return model


def arrays(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


@pytest.mark.parametrize("family", ENCODERS)
def test_bitfit_trains_biases_and_the_head(family):
    model = enable_bitfit(family())
    trained = {weight.path for weight in model.trainable_weights}
    inside = {weight.path for weight in model.backbone.trainable_weights}
    every = [w for w in model.backbone.weights if w.name in ("bias", "beta")]
    assert inside == {weight.path for weight in every}
    # Four projections and two feed-forward layers, two normalizations.
    in_blocks = [w for w in every if "layer_0/" in w.path]
    assert count(in_blocks) == 4 * DIM + HIDDEN + DIM + 2 * DIM
    assert any(path.endswith("logits/kernel") for path in trained - inside)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_bottleneck_weights_are_counted_as_published(family, use_bias):
    size = 4
    each = 2 * DIM * size + use_bias * (size + DIM)
    model = enable_bottleneck_adapters(
        family(), bottleneck_size=size, placement="pfeiffer", use_bias=use_bias
    )
    assert count(model.backbone.trainable_weights) == BLOCKS * each
    model = enable_bottleneck_adapters(
        family(), bottleneck_size=size, use_bias=use_bias
    )
    norms = 2 * 2 * DIM  # Scale and shift of two in each block.
    assert count(model.backbone.trainable_weights) == BLOCKS * (
        2 * each + norms
    )


def test_table_1_counts():
    """1.22M and 1.18M weights on 12 blocks of 768: Table 1 of the paper."""
    dim, blocks = 768, 12
    houlsby = blocks * 2 * (2 * dim * 32 + 2 * dim)
    pfeiffer = blocks * (2 * dim * 64)
    assert (round(houlsby / 1e6, 2), round(pfeiffer / 1e6, 2)) == (1.22, 1.18)


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("use_bias", [True, False])
def test_output_of_an_adapted_layer(use_bias):
    model = enable_bottleneck_adapters(
        families.bert(), bottleneck_size=3, use_bias=use_bias, seed=0
    )
    generator = np.random.default_rng(0)
    block = model.backbone.transformer_layers[0]
    layer = block._feedforward_output_dense
    for weight in layer.weights:
        weight.assign(generator.normal(size=weight.shape))
    x = generator.normal(size=(2, 5, HIDDEN)).astype("float32")
    kernel, bias, down, *rest = arrays(layer.weights)
    down_bias, up, up_bias = rest if use_bias else (0.0, *rest, 0.0)
    y = x @ kernel + bias
    expected = y + gelu(y @ down + down_bias) @ up + up_bias
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x)), expected, rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_adapters_are_near_the_identity_and_then_train(placement):
    model = families.deberta()
    before = model.predict(families.TEXTS, verbose=0)
    enable_bottleneck_adapters(
        model, bottleneck_size=4, placement=placement, seed=0
    )
    np.testing.assert_allclose(
        model.predict(families.TEXTS, verbose=0), before, atol=1e-2
    )
    frozen = arrays(model.non_trainable_weights)
    trained = arrays(model.trainable_weights)
    fitted(model)
    for old, weight in zip(frozen, model.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), old)
    for old, weight in zip(trained, model.trainable_weights, strict=True):
        assert np.any(ops.convert_to_numpy(weight) != old), weight.path


def test_same_seed_same_adapters():
    def weights(seed):
        model = enable_bottleneck_adapters(families.bert(), seed=seed)
        return arrays(
            w for w in model.trainable_weights if "adapter_down_k" in w.path
        )

    first, again, other = weights(1), weights(1), weights(2)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)
    assert np.any(first[0] != first[1])


def test_weights_are_saved_and_loaded(tmp_path):
    path = tmp_path / "model.weights.h5"
    model = fitted(
        enable_bottleneck_adapters(families.bert(), bottleneck_size=4)
    )
    model.save_weights(path)
    other = compiled(
        enable_bottleneck_adapters(families.bert(), bottleneck_size=4)
    )
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    np.testing.assert_allclose(
        other.predict(families.TEXTS, verbose=0),
        model.predict(families.TEXTS, verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_recipes_that_would_lose_adapters_are_refused(tmp_path):
    model = enable_bottleneck_adapters(families.bert(), bottleneck_size=4)
    path = tmp_path / "model.keras"
    with pytest.raises(ValueError, match="`save_weights`"):
        model.save(path)
    assert not path.exists()
    with pytest.raises(ValueError, match="would lose"):
        model.backbone.get_config()


def test_trainable_layers():
    model = enable_bitfit(families.bert(), trainable_layers=None)
    assert {w.name for w in model.trainable_weights} == {"bias", "beta"}
    model = enable_bottleneck_adapters(
        families.bert(), trainable_layers=["pooled_dense"]
    )
    paths = [weight.path for weight in model.trainable_weights]
    assert any("pooled_dense" in path for path in paths)
    assert not any("logits" in path for path in paths)


def test_mixed_precision_computes_in_half_and_keeps_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = enable_bottleneck_adapters(families.bert(), bottleneck_size=4)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {w.dtype for w in model.trainable_weights} == {"float32"}
    layer = model.backbone.transformer_layers[0]._feedforward_output_dense
    output = layer(np.ones((1, 2, HIDDEN), "float32"))
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"


def plain_model():
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, use_bias=False)]
    )


@pytest.mark.parametrize(
    "enable, model, error, words",
    [
        (enable_bitfit, lambda: "bert", TypeError, "keras.Model"),
        (enable_bitfit, plain_model, ValueError, "has none"),
        (enable_bitfit, families.llama, ValueError, "has none"),
        (enable_bitfit, keras.Sequential, ValueError, "not built"),
        (enable_bottleneck_adapters, plain_model, ValueError, "no transformer"),
        (
            enable_bottleneck_adapters,
            families.vit,
            ValueError,
            "no transformer",
        ),
        (enable_bottleneck_adapters, lambda: None, TypeError, "keras.Model"),
    ],
)
def test_models_that_do_not_fit(enable, model, error, words):
    with pytest.raises(error, match=words):
        enable(model())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"bottleneck_size": 0}, "bottleneck_size"),
        ({"placement": "adapterhub"}, '"houlsby" or "pfeiffer"'),
        ({"use_bias": 1}, "use_bias"),
        ({"seed": -1}, "seed"),
        ({"activation": "gelo"}, "gelo"),
        ({"trainable_layers": ["nothing"]}, "nothing"),
    ],
)
def test_bad_arguments_change_nothing(arguments, words):
    model = families.bert()
    kinds = [type(layer) for layer in model._flatten_layers()]
    trained = len(model.trainable_weights)
    with pytest.raises((TypeError, ValueError), match=words):
        enable_bottleneck_adapters(model, **arguments)
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    assert len(model.trainable_weights) == trained


@pytest.mark.parametrize("first", [enable_bottleneck_adapters, enable_bitfit])
def test_methods_do_not_mix_unnoticed(first):
    model = enable_bottleneck_adapters(families.bert())
    with pytest.raises(ValueError, match="adapted already"):
        first(model)
    model = enable_lora_dropout(families.bert(), rank=2)
    with pytest.raises(ValueError, match="adapted already"):
        first(model)
