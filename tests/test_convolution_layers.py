"""Adapted convolutions: what they compute, alone and in models."""

import itertools

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from peft_layers import run_oracle

import keras_lora_dropout as kld

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

LAYERS = {
    1: (kld.LoRADropoutConv1D, keras.layers.Conv1D),
    2: (kld.LoRADropoutConv2D, keras.layers.Conv2D),
    3: (kld.LoRADropoutConv3D, keras.layers.Conv3D),
}
DEPTHWISE = {
    1: (kld.LoRADropoutDepthwiseConv1D, keras.layers.DepthwiseConv1D),
    2: (kld.LoRADropoutDepthwiseConv2D, keras.layers.DepthwiseConv2D),
}
SIZES = {1: (7,), 2: (5, 6), 3: (4, 3, 4)}
CHANNELS, FILTERS = 4, 6


def built(layer, dims, channels_first=False):
    """A layer with an input shape of its own, every weight random."""
    size = SIZES[dims]
    shape = (CHANNELS, *size) if channels_first else (*size, CHANNELS)
    layer.build((None, *shape))
    factors = getattr(layer, "factors", [])
    bias = [] if layer.bias is None else [layer.bias]
    set_random([layer.kernel, *bias, *factors])
    return layer, shape


def examples(shape, rows=4):
    return (
        np.random.default_rng(5).normal(size=(rows, *shape)).astype("float32")
    )


def delta_kernel(layer, mask_a, mask_b, groups=1, depthwise=False):
    """The masked delta of a kernel, entry by entry."""
    a, b = (array(factor) for factor in layer.factors)
    shape = tuple(layer.kernel.shape)
    window = shape[:-2]
    delta = np.zeros(shape)
    each = 1 if depthwise else CHANNELS // groups
    filters = b.shape[1]
    of_group = filters // (CHANNELS if depthwise else groups)
    for row, place in enumerate(np.ndindex(*window)):
        for i, o in itertools.product(range(each), range(filters)):
            channel = (o // of_group) * each + i
            value = a[row * each + i] @ b[:, o] * mask_a[channel] * mask_b[o]
            where = (channel, o % of_group) if depthwise else (i, o)
            delta[(*place, *where)] = layer.scaling * value
    return delta


def assert_is_the_masked_convolution(layer, plain, shape, **form):
    """Three blocks of rows, each with masks of its own, and the mean."""
    generator = np.random.default_rng(3)
    filters = layer.factors[-1].shape[1]
    keep = generator.integers(0, 2, (3, CHANNELS + filters))
    x = examples(shape, rows=6)
    with draws_of([layer], keep, rows=6):
        actual = layer(x, training=True)
    kernel = array(layer.kernel)
    for n, (masks, block) in enumerate(zip(keep, np.split(x, 3), strict=True)):
        delta = delta_kernel(layer, masks[:CHANNELS], masks[CHANNELS:], **form)
        plain.kernel.assign(kernel + delta)
        assert_close(actual[2 * n : 2 * n + 2], plain(block), 1e-4)
        with draws_of([layer], keep[n : n + 1], rows=2):
            alone = layer(block, training=True)
        assert_close(alone, plain(block), 1e-4)
    ones = np.ones(CHANNELS), np.ones(filters)
    mean = (1 - layer.dropout_rate) ** 2 * delta_kernel(layer, *ones, **form)
    plain.kernel.assign(kernel + mean)
    assert_close(layer(x), plain(x), 1e-4)


def pair(classes, dims, *arguments, channels_first=False, **options):
    adapted, plain = classes[dims]
    settings_of_adapter = {"rank": 2, "alpha": 3, "dropout_rate": 0.5}
    if channels_first:
        options["data_format"] = "channels_first"
    layer, shape = built(
        adapted(*arguments, seed=1, **settings_of_adapter, **options),
        dims,
        channels_first,
    )
    plain, _ = built(plain(*arguments, **options), dims, channels_first)
    if layer.bias is not None:
        plain.bias.assign(layer.bias)
    return layer, plain, shape


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "strides": 2, "activation": "tanh"},
        {"padding": "same", "dilation_rate": 2, "use_bias": False},
    ],
    ids=["valid", "strides", "dilation"],
)
def test_convolution_of_the_masked_kernel(dims, options):
    layer, plain, shape = pair(LAYERS, dims, FILTERS, 2, **options)
    assert layer.mask_sizes == (CHANNELS, FILTERS)
    assert_is_the_masked_convolution(layer, plain, shape)


@pytest.mark.parametrize("dims", DEPTHWISE)
@pytest.mark.parametrize("depth_multiplier", [1, 2])
def test_depthwise_convolution_of_the_masked_kernel(dims, depth_multiplier):
    options = {"depth_multiplier": depth_multiplier, "padding": "same"}
    layer, plain, shape = pair(DEPTHWISE, dims, 3, **options)
    assert layer.mask_sizes == (CHANNELS, CHANNELS * depth_multiplier)
    assert_is_the_masked_convolution(layer, plain, shape, depthwise=True)


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow has no grouped kernels on CPUs"
)
def test_groups_of_channels_share_the_first_factor():
    layer, plain, shape = pair(LAYERS, 2, FILTERS, 3, groups=2)
    assert layer.lora_kernel_a.shape == (9 * CHANNELS // 2, 2)
    assert_is_the_masked_convolution(layer, plain, shape, groups=2)


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow has no such kernels on CPUs"
)
@pytest.mark.parametrize("classes", [LAYERS, DEPTHWISE])
def test_channels_may_come_first(classes):
    arguments = (FILTERS, 3) if classes is LAYERS else (3,)
    layer, plain, shape = pair(classes, 2, *arguments, channels_first=True)
    assert shape == (CHANNELS, *SIZES[2])
    form = {"depthwise": classes is DEPTHWISE}
    assert_is_the_masked_convolution(layer, plain, shape, **form)


def test_causal_padding_is_kept():
    layer, plain, shape = pair(
        LAYERS, 1, FILTERS, 3, padding="causal", dilation_rate=2
    )
    assert_is_the_masked_convolution(layer, plain, shape)


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=15)
def test_rate_zero_is_plain_lora(dims, window, strides, same, seed):
    options = {"strides": strides, "padding": "same" if same else "valid"}
    layer = LAYERS[dims][0](
        FILTERS, window, rank=1, dropout_rate=0, seed=seed, **options
    )
    layer, shape = built(layer, dims)
    plain, _ = built(LAYERS[dims][1](FILTERS, window, **options), dims)
    plain.bias.assign(layer.bias)
    ones = np.ones(CHANNELS), np.ones(FILTERS)
    plain.kernel.assign(array(layer.kernel) + delta_kernel(layer, *ones))
    x = examples(shape)
    assert_close(layer(x, training=True), plain(x), 1e-4)
    assert_close(layer(x), plain(x), 1e-4)


@pytest.mark.parametrize("classes", [LAYERS, DEPTHWISE])
def test_a_layer_alone_draws_masks_and_starts_at_no_effect(classes):
    arguments = (FILTERS, 3) if classes is LAYERS else (3,)
    layer, plain, shape = pair(classes, 2, *arguments)
    plain.kernel.assign(layer.kernel)
    x = examples(shape)
    first, second = (layer(x, training=True) for _ in range(2))
    assert np.abs(array(first) - array(second)).max() > 1e-3
    layer.lora_kernel_b.assign(np.zeros(layer.lora_kernel_b.shape))
    for training in (True, False):
        assert_close(layer(x, training=training), plain(x))
    assert not layer.kernel.trainable
    assert layer.lora_kernel_a.trainable


@pytest.mark.parametrize("classes", [LAYERS, DEPTHWISE])
def test_configuration_and_weights_come_back(classes, tmp_path):
    arguments = (FILTERS, 3) if classes is LAYERS else (3,)
    layer, _, shape = pair(classes, 2, *arguments, padding="same")
    model = keras.Sequential([keras.Input(shape), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.layers[0]
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    x = examples(shape)
    assert_close(loaded(x), model(x))
    assert_close(again(x, training=True), layer(x, training=True))


def test_a_wrong_layer_is_refused():
    with pytest.raises(ValueError, match=r"`rank` is larger than.*at most 6"):
        built(kld.LoRADropoutConv2D(FILTERS, 3, rank=7), 2)
    with pytest.raises(ValueError, match="at most 9"):
        built(kld.LoRADropoutDepthwiseConv2D(3, depth_multiplier=3, rank=10), 2)
    layer = kld.LoRADropoutConv2D(FILTERS, 3, kernel_constraint="non_neg")
    with pytest.raises(ValueError, match="without `kernel_constraint`"):
        built(layer, 2)
    layer = kld.LoRADropoutDepthwiseConv2D(
        3, depthwise_constraint="non_neg", rank=2
    )
    with pytest.raises(ValueError, match="without `depthwise_constraint`"):
        built(layer, 2)
    with pytest.raises(ValueError, match="`lora_rank` belongs to Keras's own"):
        kld.LoRADropoutConv2D(FILTERS, 3, lora_rank=2)
    layer, _ = built(kld.LoRADropoutConv2D(FILTERS, 3, rank=2), 2)
    with pytest.raises(ValueError, match="already has a LoRA Dropout adapter"):
        layer.enable_lora(2)


def test_convolutions_equal_those_of_peft():
    cases, expected = [], []
    for dims, (cls, _) in LAYERS.items():
        layer = cls(FILTERS, 2, rank=2, alpha=3, dropout_rate=0)
        layer, shape = built(layer, dims)
        x = examples(shape)
        expected.append(array(layer(x)))
        last = dims, dims + 1
        order = (*reversed(last), *range(dims))
        a = array(layer.lora_kernel_a).reshape(*[2] * dims, CHANNELS, 2)
        b = array(layer.lora_kernel_b).T.reshape(FILTERS, 2, *[1] * dims)
        tensors = {
            "base_layer.weight": array(layer.kernel).transpose(order),
            "base_layer.bias": array(layer.bias),
            "lora_A.default.weight": a.transpose(order),
            "lora_B.default.weight": b,
        }
        cases.append(
            {
                "layer": f"Conv{dims}d",
                "arguments": [CHANNELS, FILTERS, 2],
                "r": 2,
                "lora_alpha": 3,
                "tensors": {n: v.tolist() for n, v in tensors.items()},
                "inputs": np.moveaxis(x, -1, 1).tolist(),
            }
        )
    results = run_oracle(cases)
    for result, ours in zip(results, expected, strict=True):
        assert_close(np.moveaxis(np.array(result), 1, -1), ours, 1e-4)
