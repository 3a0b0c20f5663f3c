"""The contract that every adapted layer keeps, as one table."""

import contextlib
import dataclasses
import json

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from keras import ops

from keras_lora_dropout import AdaLoRADropoutDense
from keras_lora_dropout import AdaLoRADropoutEinsumDense
from keras_lora_dropout import LoRADropoutDense
from keras_lora_dropout import LoRADropoutEinsumDense
from keras_lora_dropout import LoRADropoutModel

RATE = 0.4
X = np.random.default_rng(9).normal(size=(4, 3, 5)).astype("float32")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer class; `make` gives it any number of features."""

    adapted: type
    plain: type
    heads: int = 0
    factors: tuple = ("lora_kernel_a", "lora_kernel_b")

    def make(self, cls, features=6, **options):
        if not self.heads:
            return cls(features, **options)
        return cls(
            "abc,cde->abde",
            (None, self.heads, features // self.heads),
            bias_axes="de",
            **options,
        )

    def build(self, features=6, inputs=5, random=True, **options):
        """An adapted layer `inputs -> features`, every weight random."""
        options = {"rank": 2, "dropout_rate": RATE, "seed": 1, **options}
        layer = self.make(self.adapted, features, **options)
        layer.build((None, 3, inputs))
        if random:
            set_random([layer.kernel, layer.bias, *layer.factors])
        return layer


TRIPLETS = ("lora_kernel_a", "lora_lambda", "lora_kernel_b")
CASES = {
    "dense": Case(LoRADropoutDense, keras.layers.Dense),
    "einsum": Case(LoRADropoutEinsumDense, keras.layers.EinsumDense, heads=2),
    "adalora": Case(AdaLoRADropoutDense, keras.layers.Dense, factors=TRIPLETS),
    "adalora-einsum": Case(
        AdaLoRADropoutEinsumDense,
        keras.layers.EinsumDense,
        heads=2,
        factors=TRIPLETS,
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def flat(outputs, leading=2):
    """Outputs with all features on one axis."""
    values = array(outputs)
    return values.reshape(*values.shape[:leading], -1)


def matrices(layer):
    """Kernel `(in, out)`, bias `(out,)` and delta `(in, out)`."""
    a, *middle, b = (array(factor) for factor in layer.factors)
    for singular_values in middle:
        a = a @ np.diag(singular_values)
    kernel = array(layer.kernel).reshape(len(a), -1)
    return kernel, array(layer.bias).ravel(), layer.scaling * (a @ b)


def masked_delta(layer, training=True):
    """The delta matrix that one call of the layer used."""
    inputs = layer.lora_kernel_a.shape[0]
    kernel, bias, _ = matrices(layer)
    unit_rows = np.eye(inputs, dtype="float32")[None]
    return flat(layer(unit_rows, training=training))[0] - kernel - bias


def masks_in(delta, layer):
    """Recover both masks of a call, and check that they explain its delta."""
    kept = np.abs(delta) > 1e-4
    mask_a, mask_b = kept.any(axis=1), kept.any(axis=0)
    assert_close(delta, np.outer(mask_a, mask_b) * matrices(layer)[2])
    return mask_a, mask_b


def visible(layer):
    """Make every entry of `A B` clearly nonzero, so that zeros are masks."""
    generator = np.random.default_rng(0)
    for factor in layer.factors:
        factor.assign(generator.uniform(0.5, 1.5, factor.shape))
    return layer


def model_of(layer, cls=keras.Model, **options):
    inputs = keras.Input(X.shape[1:])
    return cls(inputs, layer(inputs), **options)


@pytest.mark.parametrize("training", [True, False])
def test_rate_zero_is_plain_lora(case, training):
    layer = case.build(dropout_rate=0, alpha=3)
    kernel, bias, delta = matrices(layer)
    assert layer.scaling == 1.5
    expected = X @ (kernel + delta) + bias
    assert_close(flat(layer(X, training=training)), expected)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fresh_adapter_changes_nothing(case, training, rescale):
    layer = case.build(random=False, rescale=rescale)
    set_random([layer.kernel, layer.bias])
    plain = case.make(case.plain)
    plain.build((None, 3, 5))
    plain.set_weights([layer.kernel, layer.bias])
    assert_close(layer(X, training=training), plain(X))
    assert np.abs(array(layer.lora_kernel_a)).min() > 0


@pytest.mark.parametrize("rescale, factor", [(True, 1), (False, 0.36)])
def test_inference_is_the_mean_network(case, rescale, factor):
    layer = case.build(rescale=rescale, alpha=3)
    kernel, bias, delta = matrices(layer)
    expected = X @ (kernel + factor * delta) + bias
    for _ in range(2):
        assert_close(flat(layer(X, training=False)), expected)
        assert_close(flat(layer(X)), expected)


@pytest.mark.parametrize("rescale", [True, False])
def test_masks_cover_features_and_never_ranks(case, rescale):
    layer = visible(case.build(40, 30, rank=3, rescale=rescale))
    scale = 1 / (1 - RATE) ** 2 if rescale else 1
    mask_a, mask_b = masks_in(masked_delta(layer) / scale, layer)
    assert 0 < mask_a.mean() < 1
    assert 0 < mask_b.mean() < 1


def test_share_of_zeros(case):
    """The mean of each mask is `1 - p`, zeros of the product `2p - p**2`."""
    size, calls = 60, 40
    layer = visible(case.build(size, size))
    pairs = [masks_in(masked_delta(layer), layer) for _ in range(calls)]
    keep = 1 - RATE
    variance = keep * RATE / size  # Of the mean of one mask.
    for masks in zip(*pairs, strict=True):
        assert abs(np.mean(masks) - keep) < 4 * np.sqrt(variance / calls)
    zeros = np.mean([1 - np.outer(*pair).mean() for pair in pairs])
    # Variance of the product of two independent such means.
    variance = (keep**2 + variance) ** 2 - keep**4
    error = 4 * np.sqrt(variance / calls)
    assert abs(zeros - (2 * RATE - RATE**2)) < error
    # Far enough from one mask alone (p) for the test to tell them apart.
    assert error < 0.05


def test_mask_a_and_mask_b_are_independent(case):
    layer = visible(case.build(200, 200))
    mask_a, mask_b = masks_in(masked_delta(layer), layer)
    # The correlation of 200 independent pairs has standard error 0.07.
    assert abs(np.corrcoef(mask_a, mask_b)[0, 1]) < 0.28


def test_same_seed_same_masks(case):
    first, second, other = (case.build(40, 30, seed=s) for s in (7, 7, 8))
    calls = [
        [masked_delta(layer) for _ in range(2)] for layer in (first, second)
    ]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert np.any(calls[0][0] != calls[0][1])
    assert np.any(calls[0][0] != masked_delta(other))
    fresh = [case.build(random=False, seed=s) for s in (7, 7, 8)]
    factors = [array(layer.lora_kernel_a) for layer in fresh]
    np.testing.assert_array_equal(factors[0], factors[1])
    assert np.any(factors[0] != factors[2])


def test_config_round_trip(case):
    options = {
        "rank": np.int64(3),
        "alpha": 5,
        "dropout_rate": np.float32(0.25),
        "rescale": True,
        "seed": 11,
        "activation": "tanh",
        "name": "layer",
    }
    layer = case.build(random=False, **options)
    config = json.loads(json.dumps(layer.get_config()))
    expected = {"rank": 3, "alpha": 5.0, "dropout_rate": 0.25, "seed": 11}
    assert expected.items() <= config.items()
    assert config["rescale"] is True
    assert "lora_rank" not in config and "lora_alpha" not in config
    copies = [
        case.adapted.from_config(config),
        keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(layer)
        ),
    ]
    for copy in copies:
        assert type(copy) is case.adapted
        assert json.loads(json.dumps(copy.get_config())) == config
        copy(X)
        copy.kernel.assign(layer.kernel)
        visible(copy)
    visible(layer)
    outputs = [array(one(X, training=True)) for one in (layer, *copies)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_configuration_without_the_adapter_gives_its_defaults(case):
    config = case.make(case.plain).get_config()
    layer = case.adapted.from_config(config)
    assert (layer.lora_rank, layer.dropout_rate) == (8, 0.5)


def test_default_config(case):
    layer = case.make(case.adapted)
    config = layer.get_config()
    assert config["rank"] == 8
    assert config["alpha"] == 8.0
    assert config["dropout_rate"] == 0.5
    assert config["rescale"] is False
    assert config["seed"] is None
    assert layer.scaling == 1.0


def test_save_and_load_weights(case, tmp_path):
    saved, loaded = (model_of(case.build(seed=seed)) for seed in (1, 2))
    set_random(saved.weights, seed=5)
    assert np.any(array(loaded(X)) != array(saved(X)))
    saved.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(loaded.weights, saved.weights, strict=True):
        assert_close(ours, theirs, 0)
    assert_close(loaded(X), saved(X), 0)


def test_save_and_load_model(case, tmp_path):
    saved = model_of(case.build(rescale=True, alpha=5))
    saved.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is case.adapted
    # Same seed, same masks, across save and load.
    for training in (False, True):
        ours = loaded(X, training=training)
        assert_close(ours, saved(X, training=training), 0)
    names = [w.name for w in loaded.trainable_weights]
    assert names == ["bias", *case.factors]


def test_resumed_training_goes_on_with_the_next_masks(case, tmp_path):
    saved, loaded = (model_of(case.build()) for _ in range(2))
    saved(X, training=True)
    saved.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_close(loaded(X, training=True), saved(X, training=True), 0)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]
)
@pytest.mark.parametrize("training", [True, False])
def test_low_precision(case, policy, training):
    layer = case.build(dtype=policy)
    exact = case.build()
    for factor in layer.factors:
        assert keras.backend.standardize_dtype(factor.dtype) == "float32"
    outputs = layer(X, training=training)
    assert keras.backend.standardize_dtype(outputs.dtype) == (
        policy.removeprefix("mixed_")
    )
    outputs = keras.ops.cast(outputs, "float32")
    # Same seed, same masks, whatever the dtype.
    assert_close(outputs, exact(X, training=training), 0.05)


@pytest.mark.parametrize("cls", [LoRADropoutDense, AdaLoRADropoutDense])
def test_inputs_of_higher_precision(cls):
    """A layer that casts nothing promotes, as Keras's `Dense` does."""
    case = Case(cls, keras.layers.Dense)
    options = {"dtype": "bfloat16", "autocast": False}
    inputs = keras.ops.cast(X, "float32")
    promoted = case.make(case.plain, **options)(inputs)
    outputs = case.build(**options)(inputs, training=True)
    dtype_of = keras.backend.standardize_dtype
    assert dtype_of(outputs.dtype) == dtype_of(promoted.dtype) == "float32"
    assert_close(outputs, case.build()(X, training=True), 0.05)


def test_only_the_kernel_is_frozen(case):
    layer = case.build()
    names = [w.name for w in layer.trainable_weights]
    assert names == ["bias", *case.factors]
    assert "kernel" in [w.name for w in layer.non_trainable_weights]


def test_kernel_stays_frozen_when_the_layer_is_thawed(case):
    layer = case.build()
    layer.trainable = False
    assert layer.trainable_weights == []
    layer.trainable = True
    names = [w.name for w in layer.trainable_weights]
    assert names == ["bias", *case.factors]


def test_alone_in_a_model_with_stock_fit(case):
    layer = case.build()
    model = model_of(layer)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    y = np.zeros(model(X).shape, "float32")
    losses = [model.train_on_batch(X, y) for _ in range(4)]
    assert len(set(map(float, losses))) > 1  # New masks in each step.
    kernel, *before = (array(w) for w in (layer.kernel, *layer.factors))
    model.optimizer.learning_rate = 0.1
    model.fit(X, y, epochs=10, verbose=0)
    np.testing.assert_array_equal(array(layer.kernel), kernel)
    for old, new in zip(before, layer.factors, strict=True):
        assert np.any(array(new) != old)
    assert model.evaluate(X, y, verbose=0) < np.mean(losses)


def two_steps(case, model_class, scope, **options):
    """Losses and factors; `scope` names what is checkpointed."""
    nothing = contextlib.nullcontext()
    full = keras.RematScope(mode="full")
    with nothing if scope is None else full:
        layer = case.build()
    with full if scope == "model" else nothing:
        model = model_of(layer, model_class, **options)
    # Keras's own layers fail in a compiled RematScope on TensorFlow.
    eager = BACKEND == "tensorflow"
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=eager)
    y = np.zeros(model(X).shape, "float32")
    losses = [model.train_on_batch(X, y) for _ in range(2)]
    return [*losses, *map(array, layer.factors)]


def check_checkpointing(scope, *arguments, **options):
    expected = two_steps(*arguments, None, **options)
    actual = two_steps(*arguments, scope, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_gradient_checkpointing(case, sampling, scope):
    options = {"num_samples": 2, "seed": 0, "sampling": sampling}
    check_checkpointing(scope, case, LoRADropoutModel, **options)


def test_gradient_checkpointing_of_a_layer_alone(case):
    check_checkpointing("layer", case, keras.Model)


def test_one_set_of_draws_serves_every_call(case):
    layer = visible(case.build())
    values = np.random.default_rng(0).random((1, 11))
    with draws_of([layer], values):
        deltas = [masked_delta(layer) for _ in range(2)]
    np.testing.assert_array_equal(deltas[0], deltas[1])
    mask_a, mask_b = masks_in(deltas[0], layer)
    np.testing.assert_array_equal(mask_a, values[0, :5] >= RATE)
    np.testing.assert_array_equal(mask_b, values[0, 5:] >= RATE)


@pytest.mark.skipif(BACKEND != "torch", reason="others place tensors alone")
@pytest.mark.parametrize("use_bias", [True, False])
def test_inputs_go_where_the_weights_are(case, use_bias):
    """As in Keras's layers; every machine has the device "meta"."""
    x = ops.convert_to_tensor(X)
    with keras.device("meta"):
        layer = case.build(random=False)
        if not use_bias:
            layer.bias = None
        for training in (False, True):
            assert layer(x, training=training).device.type == "meta"


def test_draws_of_other_layers_leave_a_layer_alone(case):
    inside, outside = case.build(), case.build()
    with draws_of([inside], np.zeros((1, 11))):
        kernel, bias, delta = matrices(outside)
        expected = X @ (kernel + (1 - RATE) ** 2 * delta) + bias
        assert_close(flat(outside(X)), expected)
        assert np.any(masked_delta(outside) != masked_delta(outside))
