"""Layers that drop, in attention and feed-forward of KerasHub models."""

import keras
import numpy as np
import pytest
from helpers import assert_close
from keras import ops
from keras_hub import models

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout import enable_transformer_dropout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import structured_dropout as sd
from keras_lora_dropout.layers import transformer_dropout as td

SIZES = {"vocabulary_size": 20, "num_layers": 2, "hidden_dim": 16}
ENCODER = {**SIZES, "num_heads": 2, "intermediate_dim": 32, "dropout": 0.0}
ROTARY = {
    **SIZES,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_dim": 32,
}
BUILDERS = {
    "bert": lambda: models.BertBackbone(**ENCODER, max_sequence_length=8),
    "roberta": lambda: models.RobertaBackbone(**ENCODER, max_sequence_length=8),
    "deberta": lambda: models.DebertaV3Backbone(
        **ENCODER, max_sequence_length=16, bucket_size=4
    ),
    "gpt2": lambda: models.GPT2Backbone(**ENCODER, max_sequence_length=8),
    "llama": lambda: models.LlamaBackbone(**ROTARY),
    "mistral": lambda: models.MistralBackbone(**ROTARY, sliding_window=4),
    "gemma": lambda: models.GemmaBackbone(**ROTARY, head_dim=4),
}
CAUSAL = "gpt2", "llama", "mistral", "gemma"
LENGTHS = np.array([6, 4, 1])
TOKENS = np.random.default_rng(0).integers(1, 20, (3, 6))


def inputs():
    mask = (np.arange(6) < LENGTHS[:, None]).astype("int32")
    return {"token_ids": TOKENS * mask, "padding_mask": mask}


def inputs_of(name):
    x = inputs()
    if name == "bert":
        x["segment_ids"] = np.zeros_like(TOKENS)
    return x


def dropping(name, attention=None, hidden=None):
    """A backbone with LoRA whose blocks drop."""
    keras.utils.set_random_seed(0)
    backbone = BUILDERS[name]()
    enable_lora_dropout(backbone, rank=2, dropout_rate=0.0)
    return enable_transformer_dropout(
        backbone, attention=attention, hidden=hidden, blocks="all"
    )


def dropping_pass(backbone, seed=0):
    """Context of one pass of a backbone in which its blocks drop."""
    state = keras.random.SeedGenerator(seed).next()
    dropout = sd.DropoutDraws(state)
    return masks.use_draws(masks.Draws(backbone.mask_plan, dropout=dropout))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_rate_of_zero_changes_nothing(name):
    backbone = dropping(name, td.DropKey(0.0), td.HiddenCut(0.0))
    x, calls = inputs_of(name), []

    def outputs():
        y = backbone(x, training=False)
        y = y["sequence_output"] if isinstance(y, dict) else y
        return ops.convert_to_numpy(y)[x["padding_mask"] > 0]

    before = outputs()
    draw = sd.draw_keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sd, "draw_keys", lambda *a: calls.append(a[0]) or draw(*a)
        )
        assert_close(outputs(), before, 0)
        assert not calls
        with dropping_pass(backbone):
            assert_close(outputs(), before, 1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("position", [td.DropKey, td.DropAttention])
@pytest.mark.parametrize("name", BUILDERS)
def test_masks_of_padding_and_of_the_future_are_respected(name, position):
    backbone = dropping(name, position(0.7))
    seen = []
    original = sd.draw_keys

    def recorded(shape, valid, *more):
        keep = original(shape, valid, *more)
        seen.append((tuple(shape), valid, ops.convert_to_numpy(keep)))
        return keep

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "draw_keys", recorded)
        with dropping_pass(backbone):
            outputs = backbone(inputs_of(name), training=False)
    for leaf in keras.tree.flatten(outputs):
        assert np.isfinite(ops.convert_to_numpy(leaf)).all()
    expected = (np.arange(6) < LENGTHS[:, None])[:, None, None]
    if name in CAUSAL:
        expected = expected & np.tri(6, dtype=bool)
    if name == "mistral":
        expected = expected & ~np.tri(6, k=-4, dtype=bool)
    for shape, valid, keep in seen:
        valid = ops.convert_to_numpy(valid)
        heads = valid.reshape(3, -1, *valid.shape[-2:])[:, :1]
        # Of queries that are padding themselves, nothing is asked.
        for row, length in enumerate(LENGTHS):
            np.testing.assert_array_equal(
                np.broadcast_to(heads, (3, 1, 6, 6))[row, 0, :length],
                np.broadcast_to(expected, (3, 1, 6, 6))[row, 0, :length],
            )
        keep = np.broadcast_to(keep, shape)
        assert not (keep & ~valid).any()
        assert (keep.any(-1) == np.broadcast_to(valid, shape).any(-1)).all()
    assert len(seen) == 2


@pytest.mark.parametrize(
    "more",
    [{"attention": td.DropKey(0.5)}, {"hidden": td.HiddenCut(0.5)}],
    ids=["attention", "hidden"],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_what_drops_differs_from_pass_to_pass(name, more):
    backbone = dropping(name, **more)

    def outputs():
        y = backbone(inputs_of(name), training=False)
        y = y["sequence_output"] if isinstance(y, dict) else y
        return ops.convert_to_numpy(y)[0]

    before = outputs()
    with dropping_pass(backbone, 0):
        first = outputs()
        assert_close(outputs(), first, 0)
    with dropping_pass(backbone, 1):
        second = outputs()
    assert_close(outputs(), before, 0)
    assert np.abs(first - before).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.DropKey(1.0), "rate"),
        (lambda: td.DropAttention("much"), "rate"),
        (lambda: td.DropKey(0.1, "row"), "pattern"),
        (lambda: td.HiddenCut(0.1, "block"), "pattern"),
        (lambda: td.HiddenCut(0.1, rescale=2), "rescale"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
