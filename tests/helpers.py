"""Tiny models and comparisons that the tests share."""

import keras
import numpy as np

import keras_lora_dropout as kld
from keras_lora_dropout.core import masks

BACKEND = keras.config.backend()


def assert_close(actual, expected, tolerance=1e-5):
    """Assert that tensors or arrays agree to an absolute tolerance."""
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(actual),
        keras.ops.convert_to_numpy(expected),
        rtol=tolerance,
        atol=tolerance,
    )


def seeded_dense(units, seed, **options):
    """A `Dense` layer that always starts from the same kernel."""
    initializer = keras.initializers.GlorotUniform(seed)
    return keras.layers.Dense(units, kernel_initializer=initializer, **options)


def tiny_mlp(features=6, classes=3):
    """A functional model: two hidden layers and a head, unadapted."""
    inputs = keras.Input((features,), name="features")
    x = seeded_dense(8, 1, activation="tanh", name="first")(inputs)
    x = seeded_dense(8, 2, activation="tanh", name="second")(x)
    return keras.Model(inputs, seeded_dense(classes, 3, name="head")(x))


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


def array(tensor):
    """A tensor or variable as a float64 array, for `reference.py`."""
    return keras.ops.convert_to_numpy(tensor).astype("float64")


def draws_of(layers, values, rows=None):
    """A context in which layers use given draws: 0 drops, 1 keeps.

    `values` has the shape `(groups, columns)`; each layer's columns are those
    of its input features, then those of its output features.
    """
    values = keras.ops.convert_to_tensor(values, "float32")
    return masks.use_draws(masks.Draws(masks.MaskPlan(layers), values, rows))


def draws_after(state, shape):
    """What a seed generator in a given state draws next."""
    generator = keras.random.SeedGenerator(0)
    generator.state.assign(keras.ops.convert_to_numpy(state))
    return array(keras.random.uniform(shape, seed=generator))


def set_random(variables, seed=0, scale=0.5):
    """Give all float variables normal values, so that none is trivial."""
    generator = np.random.default_rng(seed)
    for variable in variables:
        if "float" in keras.backend.standardize_dtype(variable.dtype):
            variable.assign(generator.normal(0, scale, variable.shape))


def set_biases(model):
    """Give all biases random values: Keras starts them at zero."""
    set_random([weight for weight in model.weights if weight.name == "bias"])


def move_factors(model, scale=0.1):
    """Move all factors from where they started."""
    generator = np.random.default_rng(5)
    for _, layer in model.adapted_layers:
        for factor in layer.factors:
            change = generator.normal(0, scale, factor.shape)
            factor.assign_add(change.astype("float32"))
