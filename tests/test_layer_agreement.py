"""Each layer agrees with `reference.py` under masks that the test chooses.

Also the golden numbers: the same small integers on every backend.
"""

import keras
import numpy as np
import pytest
import reference
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from keras import ops

from keras_lora_dropout import AdaLoRADropoutDense
from keras_lora_dropout import AdaLoRADropoutEinsumDense
from keras_lora_dropout import LoRADropoutDense
from keras_lora_dropout import LoRADropoutEinsumDense
from keras_lora_dropout import LoRADropoutModel
from keras_lora_dropout.core import masks
from keras_lora_dropout.core.instances import LayoutError

RATE, ALPHA = 0.5, 3.0

# Equation, shape of one batch, `output_shape`, `bias_axes`, whether the
# leading axis is the batch axis of inputs and outputs.
EQUATIONS = [
    ("abc,cde->abde", (4, 3, 5), (None, 2, 3), "de", True),
    ("abcd,cde->abe", (4, 3, 2, 5), (None, 6), "e", True),
    ("abc,cd->abd", (4, 3, 5), (None, 6), "d", True),
    ("...x,xy->...y", (4, 3, 5), 6, "y", True),
    ("...x,xy->...y", (4, 5), 6, None, True),
    ("ab...,bc->ac...", (4, 5, 3), 6, "c", True),
    ("btd,df->btf", (4, 3, 5), (None, 6), None, True),
    ("bquh,uhm->bqm", (4, 3, 2, 5), (None, 6), "m", True),
    ("abc,cdef->abdef", (4, 3, 5), (None, 2, 3, 2), "f", True),
    ("btd,ndh->btnh", (4, 3, 5), (None, 2, 3), "nh", True),
    ("abc,dc->abd", (4, 3, 5), (None, 6), "d", True),
    # An input axis that is summed away.
    ("abc,cd->ad", (4, 3, 5), 6, "d", True),
    ("abc,bd->ad", (4, 5, 3), 6, None, True),
    # Reordered outputs.
    ("abc,cd->adb", (4, 3, 5), (6, 3), "d", True),
    ("abc,cde->aebd", (4, 3, 5), (2, 3, 4), "e", True),
    # Another axis than the batch leads the output.
    ("th,ehm->etm", (3, 4), (3, 5), None, False),
    ("abc,cd->bad", (3, 3, 5), (3, 6), "d", False),
]
EINSUM_LAYERS = [LoRADropoutEinsumDense, AdaLoRADropoutEinsumDense]
NAMES = [f"{row[0]}-{len(row[1])}d" for row in EQUATIONS]


def weights_of(layer):
    return [layer.kernel, layer.bias, *layer.factors]


def random_layer(layer, x, seed=0):
    """Build a layer on an input and give every weight random values."""
    layer(x)
    set_random([w for w in weights_of(layer) if w is not None], seed, scale=1)
    return layer


def random_masks(layer, groups, seed=1):
    """Draws `(groups, columns)`, and the masks that they stand for."""
    sizes = layer.lora_kernel_a.shape[0], layer.lora_kernel_b.shape[1]
    draws = np.random.default_rng(seed).random((groups, sum(sizes)))
    draws = draws.astype("float32")
    keep = reference.bernoulli(draws, RATE)
    pairs = zip(keep[:, : sizes[0]], keep[:, sizes[0] :], strict=True)
    return draws, list(pairs)


def expected_blocks(layer, equation, x, pairs):
    """Outputs of the reference: one block of rows for each pair of masks."""
    bias = 0 if layer.bias is None else array(layer.bias)
    blocks = []
    for block, pair in zip(np.split(x, len(pairs)), pairs, strict=True):
        product = reference.einsum_product(
            equation,
            block,
            array(layer.kernel),
            *reference.two_factors(*map(array, layer.factors)),
            *(reference.inverted(m, RATE, layer.rescale) for m in pair),
            scaling=ALPHA / layer.lora_rank,
        )
        blocks.append(product + bias)
    return np.concatenate(blocks)


def mean_pair(layer):
    """The expectation of the layer's masks, before `inverted`."""
    sizes = layer.lora_kernel_a.shape[0], layer.lora_kernel_b.shape[1]
    return tuple(np.full(size, 1 - RATE) for size in sizes)


def inputs_of(shape, groups=1, seed=2):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(groups * shape[0], *shape[1:]))
    return x.astype("float32")


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("cls", EINSUM_LAYERS)
@pytest.mark.parametrize(
    "equation, shape, output_shape, bias_axes, batch_leads",
    EQUATIONS,
    ids=NAMES,
)
def test_einsum_dense(
    equation, shape, output_shape, bias_axes, batch_leads, cls, rescale
):
    x = inputs_of(shape)
    layer = cls(
        equation,
        output_shape,
        bias_axes=bias_axes,
        rank=2,
        alpha=ALPHA,
        dropout_rate=RATE,
        rescale=rescale,
    )
    random_layer(layer, x)
    draws, pairs = random_masks(layer, 1)
    assert all(0 < mask.mean() < 1 for mask in pairs[0])
    with draws_of([layer], draws):
        outputs = layer(x, training=True)
    assert_close(outputs, expected_blocks(layer, equation, x, pairs))
    mean = expected_blocks(layer, equation, x, [mean_pair(layer)])
    assert_close(layer(x), mean)
    assert_close(layer(x, training=False), mean)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("cls", EINSUM_LAYERS)
@pytest.mark.parametrize(
    "equation, shape, output_shape, bias_axes, batch_leads",
    EQUATIONS,
    ids=NAMES,
)
def test_einsum_dense_with_several_masks(
    equation, shape, output_shape, bias_axes, batch_leads, cls, groups
):
    if not batch_leads:
        shape = (1, *shape[1:])  # So that every shape works out.
        output_shape = (output_shape[0], output_shape[-1])
    x = inputs_of(shape, groups if batch_leads else 3)
    layer = cls(
        equation,
        output_shape,
        bias_axes=bias_axes,
        rank=2,
        alpha=ALPHA,
        dropout_rate=RATE,
    )
    random_layer(layer, x)
    draws, pairs = random_masks(layer, groups)
    if not batch_leads:
        with draws_of([layer], draws, len(x)), pytest.raises(LayoutError):
            layer(x, training=True)
        return
    with draws_of([layer], draws, len(x)):
        outputs = layer(x, training=True)
    assert_close(outputs, expected_blocks(layer, equation, x, pairs))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("cls", [LoRADropoutDense, AdaLoRADropoutDense])
def test_dense(shape, groups, use_bias, cls, rescale):
    x = inputs_of(shape, groups)
    layer = cls(
        6,
        activation="tanh" if use_bias else None,
        use_bias=use_bias,
        rank=3,
        alpha=ALPHA,
        dropout_rate=RATE,
        rescale=rescale,
    )
    random_layer(layer, x)
    draws, pairs = random_masks(layer, groups)
    with draws_of([layer], draws, len(x)):
        outputs = layer(x, training=True)
    expected = expected_blocks(layer, "...x,xy->...y", x, pairs)
    assert_close(outputs, np.tanh(expected) if use_bias else expected)
    mean = expected_blocks(layer, "...x,xy->...y", x, [mean_pair(layer)])
    assert_close(layer(x), np.tanh(mean) if use_bias else mean)


GOLDEN = {
    "kernel": [[1, 0], [0, 1], [2, 2]],
    "bias": [1, 0],
    "a": [[1], [2], [3]],
    "b": [[1, 10]],
}
X = [[1, 1, 1], [0, 1, 2]]
# x @ kernel + bias = [[4, 3], [5, 5]]; scaling = 2. Drawing 0 drops, 1 keeps.
DRAWS_1 = [1, 0, 1, 1, 1]  # Keeps inputs 0 and 2: x @ a is 4 and 6.
DRAWS_2 = [0, 1, 1, 1, 0]  # Keeps inputs 1, 2, output 0: x @ a is 5 and 8.
OUTPUTS_1 = [[4 + 8, 3 + 80], [5 + 12, 5 + 120]]
OUTPUTS_2 = [[4 + 10, 3], [5 + 16, 5]]


def golden_layer(cls, *args, **options):
    layer = cls(*args, rank=1, alpha=2, dropout_rate=0.5, **options)
    layer(np.ones((1, 3), "float32"))
    layer.kernel.assign(np.reshape(GOLDEN["kernel"], layer.kernel.shape))
    layer.bias.assign(np.reshape(GOLDEN["bias"], layer.bias.shape))
    layer.lora_kernel_a.assign(GOLDEN["a"])
    layer.lora_kernel_b.assign(GOLDEN["b"])
    return layer


def golden_layers(**options):
    yield golden_layer(LoRADropoutDense, 2, **options)
    yield golden_layer(
        LoRADropoutEinsumDense, "ab,bc->ac", 2, bias_axes="c", **options
    )


def outputs_under(layer, values, x):
    with draws_of([layer], values, len(x)):
        outputs = layer(np.asarray(x, "float32"), training=True)
    return ops.convert_to_numpy(outputs)


def test_golden_outputs():
    for layer in golden_layers():
        exact = np.testing.assert_array_equal
        exact(outputs_under(layer, [DRAWS_1], X), OUTPUTS_1)
        exact(outputs_under(layer, [DRAWS_2], X), OUTPUTS_2)
        exact(
            outputs_under(layer, [DRAWS_1, DRAWS_2], X + X),
            OUTPUTS_1 + OUTPUTS_2,
        )
        # One mask for each example.
        exact(
            outputs_under(layer, [DRAWS_1, DRAWS_2], X),
            [OUTPUTS_1[0], OUTPUTS_2[1]],
        )
        # The mean network: x @ a is 6 and 8, the delta counts a quarter.
        mean = layer(np.asarray(X, "float32"), training=False)
        exact(
            ops.convert_to_numpy(mean),
            [[4 + 3, 3 + 30], [5 + 4, 5 + 40]],
        )


def test_golden_outputs_with_rescale():
    for layer in golden_layers(rescale=True):
        # Both masks are doubled, so the delta is four times as large.
        np.testing.assert_array_equal(
            outputs_under(layer, [DRAWS_1], X),
            [[4 + 32, 3 + 320], [5 + 48, 5 + 480]],
        )
        mean = layer(np.asarray(X, "float32"), training=False)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(mean),
            [[4 + 12, 3 + 120], [5 + 16, 5 + 160]],
        )


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_golden_gradients(monkeypatch, sampling):
    """One example, x = (1, 1, 1), targets such that the errors are small.

    With two outputs, the gradient of their mean squared error is the error.
    Targets (13, 3): the errors are (12 - 13, 83 - 3) = (-1, 80) under the
    first masks and (14 - 13, 3 - 3) = (1, 0) under the second.
    Gradient of b: scaling * (x * mask_a) @ a * error * mask_b, which is
    2 * 4 * (-1, 80) = (-8, 640) and 2 * 5 * (1, 0) = (10, 0): mean (1, 320).
    Gradient of a: scaling * x * mask_a * sum(error * mask_b * b), which is
    2 * (1, 0, 1) * (-1 + 800) = (1598, 0, 1598) and 2 * (0, 1, 1) * 1 =
    (0, 2, 2): mean (799, 1, 800).
    Gradient of the bias: mean of (-1, 80) and (1, 0), (0, 40).
    Loss: mean of (1 + 6400) / 2 and (1 + 0) / 2, 1600.5.
    """
    values = ops.convert_to_tensor([[DRAWS_1], [DRAWS_2]], "float32")
    monkeypatch.setattr(masks, "draw_uniform", lambda shape, seed: values)
    layer = golden_layer(LoRADropoutDense, 2)
    inputs = keras.Input((3,))
    model = LoRADropoutModel(
        inputs, layer(inputs), num_samples=2, sampling=sampling
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = [array(w) for w in (*layer.factors, layer.bias)]
    history = model.fit(
        np.ones((1, 3), "float32"),
        np.array([[13, 3]], "float32"),
        verbose=0,
    )
    after = [array(w) for w in (*layer.factors, layer.bias)]
    by_a, by_b, by_bias = (x - y for x, y in zip(before, after, strict=True))
    np.testing.assert_array_equal(by_a, [[799], [1], [800]])
    np.testing.assert_array_equal(by_b, [[1, 320]])
    np.testing.assert_array_equal(by_bias, [0, 40])
    assert history.history["loss"] == [1600.5]
    np.testing.assert_array_equal(array(layer.kernel), GOLDEN["kernel"])
