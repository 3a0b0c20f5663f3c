"""Tiny models and comparisons that the tests share."""

import keras
import numpy as np

import keras_lora_dropout as kld

BACKEND = keras.config.backend()


def assert_close(actual, expected, tolerance=1e-5):
    """Assert that tensors or arrays agree to an absolute tolerance."""
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(actual),
        keras.ops.convert_to_numpy(expected),
        rtol=tolerance,
        atol=tolerance,
    )


def tiny_mlp(features=6, classes=3, **layer_options):
    """A functional model: two hidden layers and a head, unadapted."""
    inputs = keras.Input((features,), name="features")
    x = keras.layers.Dense(
        8, activation="tanh", name="first", **layer_options
    )(inputs)
    x = keras.layers.Dense(8, activation="tanh", name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(x))


def randomize(model, seed=0, scale=0.3):
    """Give every adapter's second factor random values, so that it acts."""
    generator = np.random.default_rng(seed)
    for _, layer in model.adapted_layers:
        value = generator.normal(0, scale, layer.lora_kernel_b.shape)
        layer.lora_kernel_b.assign(value.astype("float32"))
    return model


def adapted_mlp(compile_options=None, **options):
    """An adapted `tiny_mlp` whose adapters are not zero, compiled."""
    options = {"rank": 2, "dropout_rate": 0.5, "seed": 0, **options}
    model = kld.enable_lora_dropout(tiny_mlp(), **options)
    randomize(model)
    model.compile(
        **{
            "optimizer": keras.optimizers.SGD(0.1),
            "loss": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            **(compile_options or {}),
        }
    )
    return model


def classification_data(examples=10, features=6, classes=3, seed=0):
    """Random features and labels."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(examples, features)).astype("float32")
    return x, generator.integers(0, classes, examples)
