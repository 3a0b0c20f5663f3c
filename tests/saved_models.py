"""Adapted models of every kind, to save, to kill and to load again.

Run as a program, it loads files in a process that imports nothing but Keras and
the package: `python saved_models.py data.npz results.npz train model.keras...`
writes what each of them predicts, and its weights after some more training
(not with `no` in the place of `train`).
"""

import sys

import keras
import numpy as np

import keras_lora_dropout as kld

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def block(name):
    return keras.Sequential(
        [
            keras.layers.Dense(8, activation="tanh", name=f"{name}_dense"),
            keras.layers.Dropout(0.3, name=f"{name}_dropout"),
        ],
        name=name,
    )


def functional():
    inputs = keras.Input((6,), name="features")
    x = block("first")(inputs)
    x = keras.layers.Dense(8, activation="tanh")(x)  # Keras numbers it.
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="hidden"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, name="head"),
        ]
    )


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.block = block("block")
        self.dense = keras.layers.Dense(units, name="dense")
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x, training=None):
        return self.head(self.dense(self.block(x, training=training)))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    return model


@keras.saving.register_keras_serializable("tests")
class ByHand(kld.LoRADropoutModel):
    """A hand-built model with a `call` of its own."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.dense = kld.LoRADropoutDense(units, rank=2, seed=1)
        self.drop = keras.layers.Dropout(0.3)
        self.head = keras.layers.Dense(3)

    def call(self, x, training=None):
        return self.head(self.drop(self.dense(x), training=training))


def by_hand():
    model = ByHand(
        num_samples=3,
        mask_sharing="example",
        mask_sampling="balanced",
        seed=0,
    )
    model(np.zeros((1, 6), "float32"))
    return model


def by_hand_functional(layer=kld.LoRADropoutDense, **options):
    inputs = keras.Input((6,))
    x = layer(8, rank=3, seed=1, activation="tanh")(inputs)
    x = keras.layers.Dropout(0.3)(x)
    outputs = keras.layers.Dense(3)(x)
    return kld.LoRADropoutModel(inputs, outputs, seed=0, **options)


def enabled(plain, **options):
    return kld.enable_lora_dropout(
        plain(), **{"rank": 3, "num_samples": 2, "seed": 0, **options}
    )


def compacted():
    model = enabled(functional, rank_budget=kld.RankBudget(1, total_steps=4))
    train(compiled(model), epochs=2)
    model.compact_ranks()
    return model


KINDS = {
    "functional": lambda: enabled(functional, mask_sampling="balanced"),
    "sequential": lambda: enabled(sequential, sampling="sequential"),
    "subclassed": lambda: enabled(
        subclassed,
        mask_sharing="example",
        mask_sampling="balanced",
        rescale=True,
    ),
    "trainable": lambda: enabled(
        functional, trainable_layers=["norm", "head"], sampling="sequential"
    ),
    "adalora": lambda: enabled(functional, rank_budget=kld.RankBudget(1)),
    "compacted": compacted,
    "by_hand": by_hand,
    "by_hand_functional": by_hand_functional,
    "by_hand_adalora": lambda: by_hand_functional(
        kld.AdaLoRADropoutDense, rank_budget=kld.RankBudget(1)
    ),
}


def compiled(model):
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9)
        ),
        LOSS,
        metrics=["accuracy"],
    )
    return model


def data(examples=16):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(examples, 6)).astype("float32")
    return x, generator.integers(0, 3, examples)


def train(model, epochs=2, **options):
    x, y = data()
    return model.fit(
        x, y, 4, epochs, shuffle=False, **{"verbose": 0, **options}
    )


def outputs(model, x):
    """What `predict` and a seeded ensemble return."""
    return (
        model.predict(x, verbose=0),
        model.ensemble_predict(x, num_samples=2, seed=5, verbose=0),
    )


def main(data_path, results_path, trains, *model_paths):
    with np.load(data_path, allow_pickle=False) as inputs:
        inputs = dict(inputs)
    results = {}
    for path in model_paths:
        model = keras.saving.load_model(path)
        x = inputs.get(path, inputs["x"])
        x = x.tolist() if x.dtype.kind == "U" else x
        predicted = outputs(model, x)
        results[f"{path}/predict"], results[f"{path}/ensemble"] = predicted
        results[f"{path}/class"] = type(model).__name__
        if trains == "train" and model.compiled and path not in inputs:
            train(model)
            for index, weight in enumerate(model.get_weights()):
                results[f"{path}/trained_{index}"] = weight
    np.savez(results_path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
