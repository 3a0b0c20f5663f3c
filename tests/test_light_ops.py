"""What stands in for operations of Keras does what they do."""

import keras
import numpy as np
import pytest
from helpers import array
from keras import ops

from keras_lora_dropout.core import light_ops

VALUES = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")


def assert_same(actual, expected):
    assert tuple(actual.shape) == tuple(expected.shape)
    dtypes = [
        keras.backend.standardize_dtype(t.dtype) for t in (actual, expected)
    ]
    assert dtypes[0] == dtypes[1]
    np.testing.assert_array_equal(array(actual), array(expected))


def test_shapes():
    x = ops.convert_to_tensor(VALUES)
    assert_same(light_ops.reshape(x, (6, -1)), ops.reshape(x, (6, -1)))
    axes = (2, 0, 1)
    assert_same(light_ops.transpose(x, axes), ops.transpose(x, axes))
    assert_same(light_ops.matrix_transpose(x), ops.swapaxes(x, 1, 2))


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("int8", "int8"),
        ("int32", "float32"),
    ],
)
def test_products(dtypes):
    a, b = (ops.cast(3 * VALUES, dtype) for dtype in dtypes)
    b = ops.swapaxes(b, 1, 2)
    assert_same(light_ops.matmul(a, b), ops.matmul(a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casts_of_tensors_and_variables(dtype):
    for x in (ops.convert_to_tensor(VALUES), keras.Variable(VALUES)):
        assert_same(light_ops.cast(x, dtype), ops.cast(x, dtype))
        assert_same(light_ops.value_of(x), ops.convert_to_tensor(x))
