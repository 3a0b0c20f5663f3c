"""What the constructors of the layers refuse, and how they say so."""

import keras
import numpy as np
import pytest

from keras_lora_dropout import AdaLoRADropoutDense
from keras_lora_dropout import LoRADropoutDense
from keras_lora_dropout import LoRADropoutEinsumDense

RATE = r"`dropout_rate` must .*\[0, 1\).*Received: dropout_rate="
RANK = "`rank` must be a positive integer.*Received: rank="
ALPHA = "`alpha` must be a positive finite number.*Received: alpha="
SEED = "`seed` must .*Received: seed="

BAD = [
    ("dropout_rate", -0.1, ValueError, RATE + "-0.1"),
    ("dropout_rate", 1.0, ValueError, RATE + "1.0"),
    ("dropout_rate", 1, ValueError, RATE + "1"),
    ("dropout_rate", float("nan"), ValueError, RATE + "nan"),
    ("dropout_rate", float("inf"), ValueError, RATE + "inf"),
    ("dropout_rate", "x", ValueError, RATE + "'x'"),
    ("dropout_rate", True, ValueError, RATE + "True"),
    ("dropout_rate", None, ValueError, RATE + "None"),
    ("rank", 0, ValueError, RANK + "0"),
    ("rank", -1, ValueError, RANK + "-1"),
    ("rank", 2.5, ValueError, RANK + "2.5"),
    ("rank", True, ValueError, RANK + "True"),
    ("rank", "8", ValueError, RANK + "'8'"),
    ("rank", None, ValueError, RANK + "None"),
    ("alpha", float("nan"), ValueError, ALPHA + "nan"),
    ("alpha", float("inf"), ValueError, ALPHA + "inf"),
    ("alpha", 0, ValueError, ALPHA + "0"),
    ("alpha", -2.0, ValueError, ALPHA + "-2.0"),
    ("alpha", "x", ValueError, ALPHA + "'x'"),
    ("alpha", True, ValueError, ALPHA + "True"),
    ("rescale", 1, TypeError, "True or False.*Received: rescale=1"),
    ("rescale", None, TypeError, "True or False.*Received: rescale=None"),
    ("seed", -1, ValueError, SEED + "-1"),
    ("seed", 2**31, ValueError, SEED + "2147483648"),
    ("seed", "a", TypeError, SEED + "'a'"),
    ("seed", 1.5, TypeError, SEED + "1.5"),
    ("seed", True, TypeError, SEED + "True"),
    ("lora_rank", 4, ValueError, "`lora_rank` .*Pass `rank` instead"),
    ("lora_alpha", 4, ValueError, "`lora_alpha` .*Pass `alpha` instead"),
]


def dense(**options):
    return LoRADropoutDense(6, name="query", **options)


def einsum(**options):
    return LoRADropoutEinsumDense(
        "abc,cde->abde", (None, 2, 3), name="query", **options
    )


def adalora(**options):
    return AdaLoRADropoutDense(6, name="query", **options)


@pytest.fixture(params=[dense, einsum, adalora])
def make(request):
    return request.param


@pytest.mark.parametrize(
    "argument, value, error, message", BAD, ids=[f"{b[0]}={b[1]}" for b in BAD]
)
def test_refused_in_the_constructor(make, argument, value, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        make(**{argument: value})


@pytest.mark.parametrize(
    "argument, value",
    [
        ("dropout_rate", 0),
        ("dropout_rate", np.float32(0.5)),
        ("rank", np.int64(2)),
        ("rank", 5),
        ("alpha", 1e-3),
        ("alpha", np.float64(2)),
        ("seed", 0),
        ("seed", 2**31 - 1),
        ("seed", np.int32(3)),
    ],
)
def test_accepted_at_the_edge(make, argument, value):
    layer = make(**{"rank": 2, argument: value})
    assert layer.get_config()[argument] == value
    assert layer(np.ones((1, 3, 5))).shape[:2] == (1, 3)


BUILD_ERRORS = [
    (
        {"rank": 6},
        '`rank` is larger than layer "query" can hold.*5 features to 6.*at '
        "most 5.*Received: rank=6",
    ),
    (
        {"rank": 2, "kernel_constraint": "non_neg"},
        'layer "query".*constraint.*NonNeg.*Build the layer without '
        "`kernel_constraint`",
    ),
    (
        {"rank": 2, "dtype": "float8_from_float32"},
        r'layer "query".*quantized \(float8\).*int8 and int4',
    ),
]


@pytest.mark.parametrize(
    "options, message", BUILD_ERRORS, ids=["rank", "constraint", "quantized"]
)
def test_refused_in_build(make, options, message):
    layer = make(**options)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        layer.build((None, 3, 5))


@pytest.mark.parametrize(
    "equation, shape, output_shape",
    [
        ("abc,bcd->abd", (2, 3, 5), (3, 6)),
        ("abc,acd->abd", (2, 3, 5), (3, 6)),
        ("ab,b->ab", (2, 5), 5),
    ],
)
def test_stacked_kernels_are_refused(equation, shape, output_shape):
    layer = LoRADropoutEinsumDense(equation, output_shape, rank=1)
    with pytest.raises(
        ValueError, match=f"one matrix from input to output.*{equation}"
    ):
        layer.build(shape)


def test_keras_lora_is_refused(make):
    layer = make(rank=2)
    layer.build((None, 3, 5))
    with pytest.raises(
        ValueError, match=r'"query" already has.*dropout_rate=0'
    ):
        layer.enable_lora(2)


def test_a_layer_that_failed_to_build_leaves_no_factors(make):
    layer = make(rank=6)
    with pytest.raises(ValueError, match="at most 5"):
        layer.build((None, 3, 5))
    assert not hasattr(layer, "lora_kernel_a")
    assert layer.lora_rank == 6


def test_unknown_keyword_is_refused(make):
    with pytest.raises((TypeError, ValueError), match="lora_dropout"):
        make(lora_dropout=0.5)


def test_positional_arguments_of_keras_keep_their_place():
    layer = LoRADropoutDense(6, "tanh", False, rank=2)
    assert layer.activation is keras.activations.tanh
    assert layer.use_bias is False
    layer = LoRADropoutEinsumDense("ab,bc->ac", 6, "tanh", "c", rank=2)
    assert layer.activation is keras.activations.tanh
    layer.build((None, 5))
    assert layer.bias.shape == (6,)
