"""A small transformer whose blocks can drop, for tests."""

import keras
import numpy as np
from helpers import randomize
from helpers import seeded_dense

import keras_lora_dropout as kld

LENGTH, FEATURES = 6, 8
SETTINGS = {
    "attention": kld.DropKey(0.4),
    "hidden": kld.HiddenCut(0.3),
}


def block(name):
    x = inputs = keras.Input((LENGTH, FEATURES))
    attention = keras.layers.MultiHeadAttention(
        2,
        4,
        kernel_initializer=keras.initializers.GlorotUniform(1),
        name=f"{name}_attention",
    )
    hidden = seeded_dense(12, 2, activation="relu", name=f"{name}_inner")
    # KerasHub's name, by which the last layer of the sublayer is known.
    last = seeded_dense(FEATURES, 3, name="feedforward_output_dense")
    x = x + attention(x, x)
    return keras.Model(inputs, x + last(hidden(x)), name=name)


def small_transformer(units=3, activation=None):
    """Two blocks and a head, unadapted."""
    x = inputs = keras.Input((LENGTH, FEATURES))
    for name in "first", "second":
        x = block(name)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    head = seeded_dense(units, 4, name="head", activation=activation)
    return keras.Model(inputs, head(x))


def adapted(units=3, activation=None, **options):
    """The same with adapters that are not zero."""
    options = {"rank": 2, "dropout_rate": 0.0, "num_samples": 1, **options}
    model = kld.enable_lora_dropout(
        small_transformer(units, activation), seed=0, **options
    )
    return randomize(model) if "rank_budget" not in options else model


def compiled(model, loss=None, optimizer=None, **options):
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(1.0), loss, **options)
    return model


def batch(rows=5, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, LENGTH, FEATURES)).astype("float32")
    return x, generator.integers(0, 3, rows)
