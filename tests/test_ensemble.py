"""Ensembles: the same N instances for every batch, from every data source."""

import itertools

import families
import keras
import language_models
import numpy as np
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import seeded_dense
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core import products

X, Y = classification_data(examples=70)


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def shared_model(request):
    return adapted_mlp({"metrics": ["accuracy"]}, sampling=request.param)


@pytest.fixture
def model(shared_model):
    """The model of the module; tests may train it."""
    weights = shared_model.get_weights()
    yield shared_model
    shared_model.set_weights(weights)


@pytest.fixture
def expected(model):
    return model.ensemble_predict(X, seed=3, verbose=0)


def test_is_the_mean_of_its_members(model, expected):
    samples = model.ensemble_predict(X, seed=3, return_samples=True, verbose=0)
    assert samples.shape == (4, 70, 3)
    assert_close(samples.mean(axis=0), expected, 1e-6)
    for first, second in itertools.pairwise(samples):
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_does_not_depend_on_the_batch_size(model, expected, batch_size):
    actual = model.ensemble_predict(X, batch_size=batch_size, seed=3, verbose=0)
    assert_close(actual, expected, 1e-6)


def test_does_not_depend_on_order_or_neighbours(model, expected):
    order = np.random.default_rng(0).permutation(len(X))
    shuffled = model.ensemble_predict(X[order], seed=3, verbose=0)
    assert_close(shuffled, expected[order], 1e-6)
    assert_close(
        model.ensemble_predict(X[5:6], seed=3, verbose=0), expected[5:6], 1e-6
    )


def test_the_seed_reproduces_it(model, expected):
    again = model.ensemble_predict(X, seed=3, verbose=0)
    np.testing.assert_array_equal(again, expected)
    other = model.ensemble_predict(X, seed=4, verbose=0)
    assert np.abs(other - expected).max() > 1e-3
    first, second = (model.ensemble_predict(X, verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_the_seed_outlives_training_and_other_predictions(model):
    before = model.ensemble_predict(X, seed=3, verbose=0)
    weights = model.get_weights()
    model.fit(X, Y, verbose=0)
    model.predict(X, verbose=0)
    assert np.abs(model.ensemble_predict(X, seed=3, verbose=0) - before).max()
    model.set_weights(weights)
    assert_close(model.ensemble_predict(X, seed=3, verbose=0), before, 1e-6)


def test_the_number_of_samples(model, expected):
    two = model.ensemble_predict(
        X, seed=3, num_samples=2, return_samples=True, verbose=0
    )
    assert two.shape == (2, 70, 3)
    many = model.ensemble_predict(X, seed=1, num_samples=300, verbose=0)
    others = model.ensemble_predict(X, seed=2, num_samples=300, verbose=0)
    spread = np.abs(many - others).mean()
    assert spread < 0.5 * np.abs(expected - many).mean()


def test_predict_is_still_the_mean_network(model):
    plain = model.predict(X, verbose=0)
    model.ensemble_predict(X, verbose=0)
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain)
    assert_close(plain, model(X, training=False), 1e-6)


def test_average_of_probabilities(model):
    samples = model.ensemble_predict(
        X, seed=3, return_samples=True, verbose=0
    ).astype("float64")
    softmax = np.exp(samples) / np.exp(samples).sum(axis=-1, keepdims=True)
    actual = model.ensemble_predict(X, seed=3, average="probability", verbose=0)
    assert_close(actual, softmax.mean(axis=0))
    each = model.ensemble_predict(
        X, seed=3, average="probability", return_samples=True, verbose=0
    )
    assert_close(each, softmax)


def cross_entropy(probabilities):
    return -np.log(probabilities[np.arange(len(Y)), Y]).mean()


@pytest.mark.parametrize("average", ["output", "probability"])
def test_evaluate_is_loss_and_metrics_of_the_ensemble(model, average):
    output = model.ensemble_predict(X, seed=3, average=average, verbose=0)
    if average == "output":
        output = np.exp(output) / np.exp(output).sum(axis=-1, keepdims=True)
    logs = model.ensemble_evaluate(
        X, Y, seed=3, average=average, verbose=0, return_dict=True
    )
    assert set(logs) == {"loss", "accuracy"}
    assert_close(logs["loss"], cross_entropy(output))
    assert_close(logs["accuracy"], (output.argmax(axis=-1) == Y).mean())
    listed = model.ensemble_evaluate(X, Y, seed=3, average=average, verbose=0)
    assert_close(listed, [logs["loss"], logs["accuracy"]])


def test_evaluate_with_sample_weight(model):
    weight = np.zeros(len(X), "float32")
    weight[:7] = 1.0
    logs = model.ensemble_evaluate(
        X, Y, sample_weight=weight, seed=3, verbose=0, return_dict=True
    )
    assert 0 < logs["loss"] < cross_entropy(np.full((70, 3), 1 / 3)) / 5


def test_compile_is_respected_after_an_ensemble():
    model = adapted_mlp({"loss": "mse"})
    targets = np.zeros((70, 3), "float32")
    output = model.ensemble_predict(X, seed=3, verbose=0)

    def loss():
        logs = model.ensemble_evaluate(
            X, targets, seed=3, verbose=0, return_dict=True
        )
        return logs["loss"]

    assert_close(loss(), np.square(output).mean())
    model.compile("sgd", "mae")
    assert_close(loss(), np.abs(output).mean())


def test_evaluate_before_and_after_is_that_of_the_mean_network(model):
    """Neither may see what was compiled for the other."""
    plain = model.evaluate(X, Y, verbose=0)
    ensemble = model.ensemble_evaluate(X, Y, seed=3, verbose=0)
    assert abs(plain[0] - ensemble[0]) > 1e-4
    assert_close(model.evaluate(X, Y, verbose=0), plain, 1e-6)


@pytest.mark.parametrize("average", ["output", "probability"])
def test_the_callback_logs_the_ensemble(model, average):
    seen = []

    class Later(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(dict(logs))

    callback = kld.EnsembleEvaluation((X, Y), num_samples=2, average=average)
    history = model.fit(
        X, Y, epochs=2, verbose=0, callbacks=[callback, Later()]
    ).history
    assert set(history) == {
        "loss",
        "accuracy",
        "ensemble_val_loss",
        "ensemble_val_accuracy",
    }
    assert len(history["ensemble_val_loss"]) == 2
    assert seen[0]["ensemble_val_loss"] == history["ensemble_val_loss"][0]
    now = model.ensemble_evaluate(
        X, Y, num_samples=2, seed=0, average=average, verbose=0
    )
    assert_close(now[0], history["ensemble_val_loss"][-1])


def test_evaluating_the_ensemble_does_not_change_training():
    def trained(callbacks):
        model = adapted_mlp(num_samples=2)
        model.fit(X, Y, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return [ops.convert_to_numpy(v) for v in model.trainable_variables]

    plain = trained([])
    watched = trained([kld.EnsembleEvaluation((X, Y))])
    for first, second in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_callback_needs_an_adapted_model():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="enable_lora_dropout"):
        model.fit(
            X, X[:, :3], verbose=0, callbacks=[kld.EnsembleEvaluation((X, Y))]
        )


class Batches(keras.utils.PyDataset):
    def __init__(self, with_labels):
        super().__init__()
        self.with_labels = with_labels

    def __len__(self):
        return 10

    def __getitem__(self, index):
        rows = slice(7 * index, 7 * index + 7)
        return (X[rows], Y[rows]) if self.with_labels else (X[rows],)


def tf_dataset(with_labels):
    import tensorflow as tf

    data = (X, Y) if with_labels else (X,)
    return tf.data.Dataset.from_tensor_slices(data).batch(7)


def grain_dataset(with_labels):
    import grain

    rows = list(zip(X, Y, strict=True)) if with_labels else [(x,) for x in X]
    return grain.MapDataset.source(rows).batch(7)


def torch_loader(with_labels):
    import torch

    tensors = [torch.tensor(X), torch.tensor(Y)][: 1 + with_labels]
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*tensors), batch_size=7
    )


def generator(with_labels):
    def batches():
        for start in range(0, 70, 7):
            rows = slice(start, start + 7)
            yield (X[rows], Y[rows]) if with_labels else (X[rows],)

    return batches()


# A run on one backend loads no other, so torch's loader is for torch.
SOURCES = [Batches, tf_dataset, grain_dataset, generator]
if BACKEND == "torch":
    SOURCES.append(torch_loader)


# Keras says this of every source that does not know its length.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("source", SOURCES)
def test_data_sources(model, expected, source):
    actual = model.ensemble_predict(source(False), seed=3, verbose=0)
    assert_close(actual, expected, 1e-6)
    assert_close(
        model.ensemble_evaluate(source(True), seed=3, verbose=0),
        model.ensemble_evaluate(X, Y, seed=3, verbose=0),
    )
    history = model.fit(source(True), shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_steps_callbacks_and_progress_bar(model, capsys):
    batches = []

    class Counter(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            batches.append(batch)

    some = model.ensemble_predict(
        Batches(False), steps=3, seed=3, verbose=1, callbacks=[Counter()]
    )
    assert some.shape == (21, 3)
    assert len(batches) == 3
    assert "3/3" in capsys.readouterr().out


def test_several_inputs_and_outputs():
    left, right = (
        keras.Input((3,), name="left"),
        keras.Input((3,), name="right"),
    )
    x = keras.layers.Concatenate()([left, right])
    x = seeded_dense(8, 1, activation="tanh", name="first")(x)
    outputs = {
        "label": seeded_dense(3, 2, name="label")(x),
        "chance": seeded_dense(1, 3, activation="sigmoid", name="chance")(x),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    randomize(kld.enable_lora_dropout(model, rank=2, seed=0))
    model.compile(
        loss={
            "label": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            "chance": "binary_crossentropy",
        }
    )
    data = {"left": X[:, :3], "right": X[:, 3:]}
    samples = model.ensemble_predict(
        data, seed=1, return_samples=True, verbose=0
    )
    assert samples["label"].shape == (4, 70, 3)
    mean = model.ensemble_predict(data, seed=1, verbose=0)
    assert_close(mean["label"], samples["label"].mean(axis=0), 1e-6)
    probability = model.ensemble_predict(
        data, seed=1, average="probability", verbose=0
    )
    assert_close(probability["label"].sum(axis=-1), np.ones(70))
    # The second output is a probability already.
    assert_close(probability["chance"], mean["chance"], 1e-6)


@pytest.mark.parametrize(
    ("activation", "loss", "link"),
    [
        (None, keras.losses.BinaryCrossentropy(from_logits=True), "sigmoid"),
        (None, None, "softmax"),
        ("softmax", None, "identity"),
        ("sigmoid", "binary_crossentropy", "identity"),
        (None, keras.losses.CategoricalFocalCrossentropy(), "identity"),
    ],
)
def test_how_outputs_become_probabilities(activation, loss, link):
    inputs = keras.Input((6,))
    x = seeded_dense(8, 1, name="first")(inputs)
    head = seeded_dense(3, 2, activation=activation, name="head")
    model = keras.Model(inputs, head(x))
    randomize(kld.enable_lora_dropout(model, rank=2))
    if loss is not None:
        model.compile(loss=loss)
    samples = model.ensemble_predict(
        X, seed=1, return_samples=True, verbose=0
    ).astype("float64")
    functions = {
        "identity": lambda s: s,
        "sigmoid": lambda s: 1 / (1 + np.exp(-s)),
        "softmax": lambda s: np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True),
    }
    actual = model.ensemble_predict(X, seed=1, average="probability", verbose=0)
    assert_close(actual, functions[link](samples).mean(axis=0))


def test_half_precision_is_averaged_in_float32():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, dtype="mixed_bfloat16", name="first")(inputs)
    model = keras.Model(
        inputs, keras.layers.Dense(3, dtype="float32", name="head")(x)
    )
    randomize(kld.enable_lora_dropout(model, rank=2))
    samples = model.ensemble_predict(
        X, seed=1, num_samples=8, return_samples=True, verbose=0
    )
    mean = model.ensemble_predict(X, seed=1, num_samples=8, verbose=0)
    assert mean.dtype == np.float32
    assert_close(mean, samples.mean(axis=0), 1e-6)


@pytest.mark.parametrize(
    "data, options, message",
    [
        ((X, Y), {"num_samples": 0}, "num_samples=0"),
        ((X, Y), {"batch_size": -1}, "batch_size=-1"),
        ((X, Y), {"seed": -1}, "seed=-1"),
        ((X, Y), {"average": "mean"}, "average='mean'"),
        ((X[:0], Y[:0]), {}, "`validation_data` holds no examples"),
    ],
)
def test_the_callback_is_refused_before_an_epoch_is_lost(
    data, options, message
):
    with pytest.raises(ValueError, match=message):
        kld.EnsembleEvaluation(data, **options)


@pytest.mark.skipif(
    BACKEND != "torch", reason="Other backends infer every shape."
)
def test_what_has_no_shape_is_computed_for_few_rows(monkeypatch):
    """PyTorch repeats keys by number; it must not do so for 1009 rows."""
    rows = []
    plain = products.adapted_product

    def recorded(inputs, *args, **kwargs):
        if inputs.device.type != "meta":
            rows.append(inputs.shape[0])
        return plain(inputs, *args, **kwargs)

    monkeypatch.setattr(products, "adapted_product", recorded)
    model = language_models.adapted("llama", num_samples=3)
    model.ensemble_predict(families.TEXTS, batch_size=2, verbose=0)
    assert set(rows) <= {2, 3, 6, 9}


def test_a_lost_batch_axis_is_found_without_shapes():
    """The axis moves behind an operation that PyTorch has to compute."""
    inputs = keras.Input((4, 6))
    x = keras.layers.Dense(5, name="first")(inputs)
    x = keras.ops.transpose(keras.ops.repeat(x, 2, axis=1), (1, 0, 2))
    x = keras.layers.Dense(5, name="second")(x)
    outputs = keras.layers.Dense(2, name="head")(
        keras.ops.transpose(x, (1, 0, 2))
    )
    model = kld.enable_lora_dropout(keras.Model(inputs, outputs), rank=2)
    x = np.ones((8, 4, 6), "float32")
    with pytest.raises(ValueError, match=r"second.*sampling=.sequential"):
        model.ensemble_predict(x, num_samples=4, verbose=0)


class CountedCalls(keras.layers.Layer):
    """Counts its calls, and asks for outputs near 0."""

    def build(self, input_shape):
        self.calls = self.add_weight(
            initializer="zeros", dtype="int32", trainable=False, name="calls"
        )

    def call(self, inputs):
        self.calls.assign_add(1)
        self.add_loss(ops.mean(ops.square(inputs)))
        return inputs


def test_layers_that_change_themselves_see_every_instance():
    counted = CountedCalls()
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            counted,
            keras.layers.Dense(3, name="head"),
        ]
    )
    model = kld.enable_lora_dropout(model, rank=2, sampling="sequential")
    randomize(model)
    samples = model.ensemble_predict(
        X, seed=3, return_samples=True, batch_size=70, verbose=0
    )
    assert int(ops.convert_to_numpy(counted.calls)) == 4
    mean = model.ensemble_predict(X, seed=3, batch_size=70, verbose=0)
    assert int(ops.convert_to_numpy(counted.calls)) == 8
    assert_close(mean, samples.mean(axis=0), 1e-6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.ensemble_evaluate(X, Y, batch_size=70, verbose=0)
    assert int(ops.convert_to_numpy(counted.calls)) == 12
