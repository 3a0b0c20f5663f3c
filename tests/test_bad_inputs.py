"""Bad inputs: each error says what was given, what is allowed, what to do."""

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import classification_data
from helpers import tiny_mlp

import keras_lora_dropout as kld

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_rate": 1.0}, ValueError, r"\[0, 1\).*dropout_rate=1.0"),
        ({"dropout_rate": -0.1}, ValueError, r"\[0, 1\).*dropout_rate=-0.1"),
        ({"dropout_rate": NAN}, ValueError, r"\[0, 1\).*dropout_rate=nan"),
        ({"dropout_rate": "half"}, ValueError, "'half'.*str"),
        ({"dropout_rate": True}, ValueError, "True.*bool"),
        ({"rank": 0}, ValueError, "positive integer.*rank=0"),
        ({"rank": -2}, ValueError, "positive integer.*rank=-2"),
        ({"rank": 2.0}, ValueError, r"positive integer.*rank=2.0.*float"),
        ({"rank": "8"}, ValueError, "positive integer.*rank='8'"),
        ({"rank": True}, ValueError, "positive integer.*rank=True"),
        ({"rank": 7}, ValueError, r'"first".*at most 6.*rank=7.*smaller'),
        ({"alpha": NAN}, ValueError, "positive finite.*alpha=nan"),
        ({"alpha": INFINITY}, ValueError, "positive finite.*alpha=inf"),
        ({"alpha": 0}, ValueError, "positive finite.*alpha=0"),
        ({"alpha": "16"}, ValueError, "positive finite.*alpha='16'"),
        ({"num_samples": 0}, ValueError, "positive integer.*num_samples=0"),
        ({"num_samples": 1.5}, ValueError, "positive integer.*1.5"),
        ({"mask_sharing": "rows"}, ValueError, '"batch" or "example".*rows'),
        ({"mask_sampling": "even"}, ValueError, 'bernoulli" or "balan.*even'),
        ({"sampling": "both"}, ValueError, '"parallel" or "sequential".*both'),
        ({"sampling": None}, ValueError, '"parallel" or "sequential".*None'),
        ({"rescale": 1}, TypeError, "True or False.*rescale=1"),
        ({"seed": "a"}, TypeError, "integer, or None.*'a'"),
        ({"seed": -1}, ValueError, "between 0 and.*seed=-1"),
        ({"seed": 2**31}, ValueError, "between 0 and.*seed=2147483648"),
        ({"target_layers": ["qury"]}, ValueError, "qury.*first"),
        ({"target_layers": "qury"}, ValueError, 'no layer.*qury.*"first"'),
        ({"target_layers": "("}, ValueError, r"regular expression.*'\('"),
        ({"target_layers": []}, ValueError, r"no layer.*\[\]"),
        ({"target_layers": 3}, TypeError, "list of layer names.*3.*int"),
        ({"target_layers": [3]}, TypeError, r"list of layer names.*\[3\]"),
        (
            {"target_layers": lambda path, layer: False},
            ValueError,
            "found no layer",
        ),
        ({"trainable_layers": ["hat"]}, ValueError, "hat.*head"),
        ({"trainable_layers": "^hat"}, ValueError, "matches no layer.*head"),
        ({"trainable_layers": 1.0}, TypeError, "list of layer names.*1.0"),
    ],
)
def test_arguments_of_enable_lora_dropout(options, error, message):
    model = tiny_mlp()
    with pytest.raises(error, match=f"(?s){message}"):
        kld.enable_lora_dropout(model, **{"rank": 2, **options})
    assert not hasattr(model, "adapted_layers")


def test_arguments_are_by_keyword():
    with pytest.raises(TypeError):
        kld.enable_lora_dropout(tiny_mlp(), 8)


@pytest.mark.parametrize("model", [None, "bert_base_en", keras.layers.Dense(2)])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"adapts a `keras.Model`.*type"):
        kld.enable_lora_dropout(model)


def test_a_model_without_linear_layers():
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.BatchNormalization()]
    )
    with pytest.raises(ValueError, match=r"no layer of the kinds Dense, "):
        kld.enable_lora_dropout(model)


def test_a_model_that_is_only_a_head():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="but the output head"):
        kld.enable_lora_dropout(model)


def test_an_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"not built.*`Input`"):
        kld.enable_lora_dropout(model)


def test_a_model_adapted_before():
    model = adapted_mlp()
    with pytest.raises(ValueError, match=r"already enabled.*fresh model"):
        kld.enable_lora_dropout(model)
    outer = keras.Sequential([model, keras.layers.Dense(2)])
    outer(np.zeros((1, 6), "float32"))
    with pytest.raises(ValueError, match="already enabled"):
        kld.enable_lora_dropout(outer, rank=1)


def test_a_train_step_of_ones_own():
    class Own(keras.Sequential):
        def train_step(self, *args):
            return super().train_step(*args)

    model = Own([keras.Input((6,)), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match=r"`train_step` of its own.*Own"):
        kld.enable_lora_dropout(model, rank=2)


def test_keras_lora_enabled_before():
    model = tiny_mlp()
    model.get_layer("second").enable_lora(2)
    with pytest.raises(ValueError, match=r'"second".*own LoRA.*`enable_lora`'):
        kld.enable_lora_dropout(model, rank=2)
    model = adapted_mlp()
    with pytest.raises(ValueError, match="already has a LoRA Dropout"):
        model.get_layer("first").enable_lora(2)


def test_quantized_kernels():
    model = tiny_mlp()
    with pytest.warns(UserWarning, match="InputLayer"):
        model.quantize("float8")
    with pytest.raises(
        ValueError, match=r'"first".*quantized.*float8.*int8 and int4'
    ):
        kld.enable_lora_dropout(model, rank=2)


def test_constrained_kernels():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, kernel_constraint="non_neg", name="tight")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    with pytest.raises(ValueError, match=r'"tight".*exclude_layers'):
        kld.enable_lora_dropout(model, rank=2)


def test_stacked_einsum_kernels():
    inputs = keras.Input((4, 6))
    stacked = keras.layers.EinsumDense("bec,ecd->bed", (4, 5), name="experts")
    x = keras.layers.Dense(2, name="head")(stacked(inputs))
    model = keras.Model(inputs, x)
    with pytest.raises(ValueError, match=r"bec,ecd->bed.*exclude_layers"):
        kld.enable_lora_dropout(model, rank=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "positive integer.*num_samples=0"),
        ({"average": "median"}, ValueError, '"output" or "probability"'),
        ({"seed": 1.5}, TypeError, "integer, or None.*1.5"),
        ({"seed": -1}, ValueError, "between 0 and"),
        ({"return_samples": "yes"}, TypeError, "True or False.*yes"),
    ],
)
def test_arguments_of_ensemble_predict(options, error, message):
    x, _ = classification_data()
    model = adapted_mlp()
    plain = model.predict(x, verbose=0)
    with pytest.raises(error, match=message):
        model.ensemble_predict(x, verbose=0, **options)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain)


EMPTY = np.zeros((0, 6), "float32")


@pytest.mark.parametrize("empty", [EMPTY, [], {"features": EMPTY}, [EMPTY]])
def test_empty_inputs(empty):
    model = adapted_mlp()
    labels = np.zeros((0,), "int32")
    for call in (
        lambda: model.fit(empty, labels, verbose=0),
        lambda: model.ensemble_predict(empty, verbose=0),
        lambda: model.ensemble_evaluate(empty, labels, verbose=0),
    ):
        with pytest.raises(ValueError, match=r"no examples.*at least one"):
            call()


def test_labels_of_another_length():
    x, y = classification_data()
    model = adapted_mlp()
    for call in (
        lambda: model.fit(x, y[:-1], verbose=0),
        lambda: model.ensemble_evaluate(x, y[:-1], verbose=0),
    ):
        with pytest.raises(ValueError, match=r"10.*9|cardinality"):
            call()


def test_an_error_in_an_ensemble_leaves_the_model_usable():
    x, _ = classification_data()
    model = adapted_mlp()
    plain = model.predict(x, verbose=0)
    wrong = np.zeros((10, 5), "float32")
    expected = (ValueError, RuntimeError)
    with pytest.raises(expected):
        model.ensemble_predict(wrong, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain)
    with pytest.raises(expected):
        model.predict(wrong, verbose=0)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        model.fit(x, np.zeros((10, 7)), verbose=0)
    assert model.ensemble_predict(x, verbose=0).shape == (10, 3)


def test_fit_before_compile():
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    x, y = classification_data()
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y, verbose=0)


def test_the_backend_is_the_one_asked_for():
    assert keras.config.backend() == BACKEND
