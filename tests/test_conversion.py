"""`enable_lora_dropout`: what it selects, rewrites, freezes and keeps."""

import logging

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import tiny_mlp
from keras import ops

import keras_lora_dropout as kld


class Subclassed(keras.Model):
    """A model without a graph, with a nested block and a head."""

    def __init__(self):
        super().__init__()
        self.block = keras.Sequential(
            [keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")],
            name="block",
        )
        self.norm = keras.layers.BatchNormalization(name="norm")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x, training=None):
        return self.head(self.norm(self.block(x), training=training))


def built_subclassed():
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    return model


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.Dense(8, name="second"),
            keras.layers.Dense(3, name="head"),
        ]
    )


@pytest.mark.parametrize("build", [tiny_mlp, sequential, built_subclassed])
def test_any_plain_model_is_adapted_in_place(build):
    model = build()
    original_class = type(model)
    layers = [id(layer) for layer in model.layers]
    x, y = classification_data()
    before = model.predict(x, verbose=0)
    assert kld.enable_lora_dropout(model, rank=2) is model
    assert isinstance(model, original_class)
    assert [id(layer) for layer in model.layers] == layers
    # A fresh adapter changes nothing, to the last bit but rounding.
    assert_close(model.predict(x, verbose=0), before, 1e-6)
    names = [layer.name for _, layer in model.adapted_layers]
    assert "head" not in names and len(names) == 2
    model.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(x, y, epochs=12, verbose=0).history["loss"]
    assert history[-1] < history[0]
    ensemble = model.ensemble_predict(x, verbose=0)
    assert ensemble.shape == before.shape
    assert np.abs(ensemble - before).max() > 1e-3


def test_fit_before_enabling_does_not_leave_a_compiled_step_behind():
    x, y = classification_data()
    model = tiny_mlp()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    kld.enable_lora_dropout(model, rank=2)
    kernel = ops.convert_to_numpy(model.get_layer("first").kernel)
    model.fit(x, y, verbose=0)
    layer = model.get_layer("first")
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel), kernel)
    assert np.abs(ops.convert_to_numpy(layer.lora_kernel_b)).max() > 0


def test_what_is_trainable_by_default():
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    assert sorted(v.path for v in model.trainable_variables) == [
        "first/lora_kernel_a",
        "first/lora_kernel_b",
        "head/bias",
        "head/kernel",
        "second/lora_kernel_a",
        "second/lora_kernel_b",
    ]


@pytest.mark.parametrize(
    ("trainable_layers", "expected"),
    [
        (None, set()),
        ("head", {"head"}),
        ("^sec", {"second"}),
        (["second", "head"], {"second", "head"}),
        (lambda path, layer: layer.name == "second", {"second"}),
    ],
)
def test_trainable_layers(trainable_layers, expected):
    model = kld.enable_lora_dropout(
        tiny_mlp(),
        rank=2,
        target_layers=["first"],
        trainable_layers=trainable_layers,
    )
    names = {v.path.split("/")[0] for v in model.trainable_variables}
    assert names == {"first", *expected}


def test_an_adapted_layer_trains_its_factors_alone():
    model = kld.enable_lora_dropout(
        tiny_mlp(), rank=2, trainable_layers=["first"]
    )
    assert sorted(v.path for v in model.trainable_variables) == [
        "first/lora_kernel_a",
        "first/lora_kernel_b",
        "second/lora_kernel_a",
        "second/lora_kernel_b",
    ]


@pytest.mark.parametrize(
    ("target_layers", "expected"),
    [
        ("all-linear", ["first", "second"]),
        (["second"], ["second"]),
        (["head", "first"], ["first", "head"]),
        ("first|head", ["first", "head"]),
        (lambda path, layer: path != "first", ["second", "head"]),
    ],
)
def test_target_layers(target_layers, expected):
    model = kld.enable_lora_dropout(
        tiny_mlp(), rank=2, target_layers=target_layers
    )
    assert [path for path, _ in model.adapted_layers] == expected


def test_frozen_batch_normalization_keeps_its_statistics():
    model = kld.enable_lora_dropout(built_subclassed(), rank=2)
    model.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x, y = classification_data()
    model.fit(x + 5.0, y, epochs=2, verbose=0)
    assert_close(model.norm.moving_mean, np.zeros(8), 0)


def test_trainable_batch_normalization_needs_sequential_sampling():
    def adapted(sampling):
        model = kld.enable_lora_dropout(
            built_subclassed(),
            rank=2,
            trainable_layers=["norm"],
            sampling=sampling,
        )
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        return model

    x, y = classification_data()
    with pytest.raises(ValueError, match='sampling="sequential"'):
        adapted("parallel").fit(x, y, verbose=0)
    assert np.isfinite(
        adapted("sequential").fit(x, y, verbose=0).history["loss"]
    )


def test_shared_layers_are_adapted_once():
    shared = keras.layers.Dense(6, name="shared")
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, keras.layers.Dense(1, name="head")(shared(shared(inputs)))
    )
    kld.enable_lora_dropout(model, rank=2)
    assert [path for path, _ in model.adapted_layers] == ["shared"]
    assert len(model.trainable_variables) == 4


def test_layers_of_equal_path_stay_apart():
    def tower(name):
        inputs = keras.Input((4,))
        return keras.Model(
            inputs, keras.layers.Dense(4, name="dense")(inputs), name=name
        )

    inputs = keras.Input((4,))
    x = tower("right")(tower("left")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    kld.enable_lora_dropout(model, rank=1)
    assert [p for p, _ in model.adapted_layers] == ["dense", "dense#2"]


def test_a_subclass_of_dense_stays_one():
    class Named(keras.layers.Dense):
        pass

    class Doubling(keras.layers.Dense):
        def call(self, inputs, training=None):
            return 2.0 * super().call(inputs)

    inputs = keras.Input((4,))
    x = Named(4, name="named")(inputs)
    x = Doubling(4, name="doubling")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    with pytest.raises(ValueError, match="`call` of its own"):
        kld.enable_lora_dropout(model, rank=1)
    kld.enable_lora_dropout(model, rank=1, target_layers=["named"])
    layer = model.get_layer("named")
    assert isinstance(layer, Named)
    assert isinstance(layer, kld.LoRADropoutDense)


def test_the_report_says_what_was_adapted(caplog):
    with caplog.at_level(logging.INFO, logger="keras_lora_dropout"):
        model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    # 2 * (6 + 8) + 2 * (8 + 8) = 60 adapter weights, and the head's 27.
    assert "adapts 2 layers" in caplog.text
    assert "with 60 weights" in caplog.text
    assert f"87 of {model.count_params():,} weights train" in caplog.text
    assert "  first\n  second" in caplog.text


def test_the_seed_fixes_factors_and_masks():
    x, y = classification_data()

    def trained(seed):
        model = adapted_mlp(seed=seed, num_samples=2)
        model.fit(x, y, shuffle=False, verbose=0)
        return np.concatenate(
            [ops.convert_to_numpy(v).ravel() for v in model.trainable_variables]
        )

    first, again, other = trained(5), trained(5), trained(6)
    assert_close(first, again, 1e-6)
    assert np.abs(first - other).max() > 1e-3


def test_every_layer_has_factors_of_its_own():
    model = kld.enable_lora_dropout(tiny_mlp(features=8), rank=2, seed=1)
    (_, first), (_, second) = model.adapted_layers
    assert first.lora_kernel_a.shape == second.lora_kernel_a.shape
    distance = ops.max(ops.abs(first.lora_kernel_a - second.lora_kernel_a))
    assert float(ops.convert_to_numpy(distance)) > 0.01


def test_an_error_leaves_the_model_as_it_was():
    model = tiny_mlp()
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match="rank"):
        kld.enable_lora_dropout(model, rank=7)  # "first" has 6 inputs.
    assert [type(layer) for layer in model.layers] == classes
    assert all(v.trainable for v in model.weights)
    kld.enable_lora_dropout(model, rank=6)


def compiled_subclassed():
    model = kld.enable_lora_dropout(built_subclassed(), rank=2)
    model.compile("sgd", "mse")
    return model


def compiled_sequential():
    model = kld.enable_lora_dropout(sequential(), rank=2)
    model.compile("sgd", "mse")
    return model


def nested():
    inputs = keras.Input((6,))
    body = tiny_mlp(classes=4)
    model = keras.Model(inputs, keras.layers.Dense(2, name="top")(body(inputs)))
    return kld.enable_lora_dropout(model, rank=2)


@pytest.mark.parametrize(
    "copies", [keras.models.clone_model, lambda m: m.layers[1].get_config()]
)
def test_a_container_is_not_rebuilt_without_its_adapters(copies):
    """Its own recipe knows of none."""
    with pytest.raises(ValueError, match="would lose"):
        copies(nested())


def test_a_converted_class_cannot_be_constructed():
    model = adapted_mlp()
    with pytest.raises(ValueError, match="cannot be constructed"):
        type(model)(model.inputs, model.outputs)


def test_the_advised_copy_works(tmp_path):
    x, _ = classification_data()
    model = adapted_mlp()
    copied = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    copied.set_weights(model.get_weights())
    assert_close(copied.predict(x, verbose=0), model.predict(x, verbose=0))
    path = tmp_path / "adapted.weights.h5"
    model.save_weights(path)
    loaded = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    loaded.load_weights(path)
    assert_close(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_clone_of_a_sequential_model_has_adapted_layers():
    """Keras clones it layer by layer; the layers come through whole."""
    model = randomize(kld.enable_lora_dropout(sequential(), rank=2))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x, _ = classification_data()
    assert_close(clone.predict(x, verbose=0), model.predict(x, verbose=0))


def transposing_model(steps=4):
    """A model that works time-major inside: (steps, batch, features)."""

    class TimeMajor(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(5, name="inner")
            self.head = keras.layers.Dense(2, name="head")

        def call(self, x):
            x = ops.transpose(x, (1, 0, 2))
            x = ops.tanh(self.inner(x))
            return self.head(ops.transpose(x, (1, 0, 2)))

    model = TimeMajor()
    model(np.zeros((1, steps, 3), "float32"))
    return model


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_axis_that_does_not_lead_is_an_error(batch):
    """Also where the steps (4) happen to be as many as the rows (2 * 2)."""
    x = np.ones((batch, 4, 3), "float32")
    y = np.ones((batch, 4, 2), "float32")

    def adapted(**options):
        model = kld.enable_lora_dropout(
            transposing_model(), rank=1, num_samples=2, **options
        )
        model.compile("sgd", "mse")
        return model

    with pytest.raises(ValueError, match='sampling="sequential"'):
        adapted().fit(x, y, verbose=0)
    with pytest.raises(ValueError, match='sampling="sequential"'):
        adapted().ensemble_predict(x, verbose=0)
    with pytest.raises(ValueError, match="mask_sharing"):
        adapted(sampling="sequential", mask_sharing="example").fit(
            x, y, verbose=0
        )
    model = adapted(sampling="sequential")
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"])
    assert model.ensemble_predict(x, verbose=0).shape == y.shape


def test_a_fixed_batch_size_needs_sequential_sampling():
    inputs = keras.Input(batch_shape=(4, 6))
    x = keras.layers.Dense(8, name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    kld.enable_lora_dropout(model, rank=2)
    model.compile("sgd", "mse")
    data = np.ones((4, 6), "float32"), np.ones((4, 3), "float32")
    with pytest.raises(ValueError, match='sampling="sequential"'):
        model.fit(*data, batch_size=4, verbose=0)


class HandBuilt(kld.LoRADropoutModel):
    def __init__(self, **options):
        super().__init__(**options)
        self.inner = kld.LoRADropoutDense(8, activation="tanh", rank=2)
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.inner(x))


def hand_built_functional(**options):
    inputs = keras.Input((6,))
    x = kld.LoRADropoutDense(8, activation="tanh", rank=2)(inputs)
    return kld.LoRADropoutModel(inputs, keras.layers.Dense(3)(x), **options)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("build", [HandBuilt, hand_built_functional])
def test_lora_dropout_model(build, sampling):
    # Both kinds side by side: neither may change the other's class.
    hand_built_functional()
    model = build(num_samples=3, sampling=sampling, seed=0)
    assert isinstance(model, kld.LoRADropoutModel)
    model.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = classification_data()
    model(x)
    history = model.fit(x, y, epochs=12, verbose=0).history["loss"]
    assert history[-1] < history[0]
    samples = model.ensemble_predict(x, return_samples=True, verbose=0)
    assert samples.shape == (3, 10, 3)
    assert samples.std(axis=0).max() > 1e-4


def test_lora_dropout_model_trains_unbuilt():
    model = HandBuilt(num_samples=2)
    model.compile("sgd", "mse")
    x, _ = classification_data()
    model.fit(x, x[:, :3], verbose=0)
    assert len(model.adapted_layers) == 1


def test_lora_dropout_model_without_adapters_says_so():
    inputs = keras.Input((6,))
    model = kld.LoRADropoutModel(inputs, keras.layers.Dense(3)(inputs))
    model.compile("sgd", "mse")
    x, _ = classification_data()
    with pytest.raises(ValueError, match="no adapted layer"):
        model.fit(x, x[:, :3], verbose=0)


def test_enabling_on_a_hand_built_model_of_plain_layers():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="first")(inputs)
    model = kld.LoRADropoutModel(inputs, keras.layers.Dense(3, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, num_samples=2)
    assert model.lora_dropout.num_samples == 2
    x, _ = classification_data()
    model.compile("sgd", "mse")
    model.fit(x, x[:, :3], verbose=0)
