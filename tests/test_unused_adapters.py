"""Adapters that have no part in the forward pass are told of."""

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data
from keras import ops

import keras_lora_dropout as kld


class PastTheLayer(keras.layers.Layer):
    """Multiplies by the kernel of a layer that it does not call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(4, name="inner")

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, x):
        return ops.matmul(x, self.inner.kernel)


def fitted(model, caplog):
    model.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    with caplog.at_level("WARNING", logger="keras_lora_dropout"):
        model.fit(x, np.ones((4, 2)), epochs=2, verbose=0)
    return [
        record.getMessage()
        for record in caplog.records
        if "no part" in record.getMessage()
    ]


def past_the_layer():
    hidden = keras.layers.Dense(4, name="hidden")
    head = keras.layers.Dense(2, name="head")
    return keras.Sequential(
        [keras.Input((3,)), hidden, PastTheLayer(name="past"), head]
    )


# Keras says so of the weights, on PyTorch.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_layer_that_is_not_called_is_told_of_once(caplog):
    model = kld.enable_lora_dropout(past_the_layer(), rank=2)
    (message,) = fitted(model, caplog)
    assert message.startswith("1 of 2 adapters") and '"past/inner"' in message
    assert "exclude_layers" in message


def test_without_it_there_is_nothing_to_tell(caplog):
    model = kld.enable_lora_dropout(
        past_the_layer(), rank=2, exclude_layers=["inner"]
    )
    assert not fitted(model, caplog)


def test_called_layers_are_not_told_of(caplog):
    for options in ({}, {"sampling": "sequential"}, {"dropout_rate": 0.0}):
        model = adapted_mlp(**options)
        x, y = classification_data(4)
        with caplog.at_level("WARNING", logger="keras_lora_dropout"):
            model.fit(x, y, verbose=0)
    assert not [r for r in caplog.records if "no part" in r.getMessage()]
