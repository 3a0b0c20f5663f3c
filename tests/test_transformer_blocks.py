"""Which blocks of a model drop, and input that is refused."""

import keras
import keras_hub
import pytest
from dropping_models import SETTINGS
from dropping_models import adapted
from dropping_models import small_transformer
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.mixed_classes import has_mixin


def dropping():
    return kld.enable_transformer_dropout(adapted(), **SETTINGS)


def mixed(model):
    return [layer for layer in descendants(model) if has_mixin(layer)]


# Which blocks


def decoder(layers=3):
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=20,
        num_layers=layers,
        hidden_dim=16,
        num_query_heads=4,
        num_key_value_heads=2,
        intermediate_dim=32,
    )
    return kld.enable_lora_dropout(backbone, rank=2)


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [("auto", [1, 2]), ("all", [0, 1, 2]), ([-1, 0, 2], [0, 2])],
)
def test_blocks_of_a_decoder(blocks, chosen):
    model = kld.enable_transformer_dropout(
        decoder(), **kld.hidden_key(), blocks=blocks
    )
    settings = model.transformer_dropout
    expected = [f"transformer_layer_{n}" for n in chosen]
    for paths in settings.attention_layers, settings.hidden_layers:
        assert [path.split("/")[0] for path in paths] == expected


def test_blocks_of_an_encoder_are_all():
    assert len(dropping().transformer_dropout.attention_layers) == 2


def test_hidden_key_is_the_papers_choice():
    assert kld.hidden_key(0.2, 0.1, 2.0) == {
        "attention": kld.DropKey(0.2, "column"),
        "hidden": kld.HiddenCut(0.1, "element", rescale=True),
        "consistency": kld.Consistency(2.0, "kl"),
    }
    assert kld.hidden_key(0.2, 0.1)["consistency"] is None


# Bad input


def no_blocks():
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3)(keras.layers.Dense(5)(inputs))
    return kld.enable_lora_dropout(keras.Model(inputs, outputs), rank=2)


class OddAttention(keras.layers.Layer):
    """Attention that nobody knows."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.softmax = keras.layers.Softmax()

    def call(self, x):
        scores = ops.matmul(x, ops.swapaxes(x, 1, 2))
        return ops.matmul(self.softmax(scores), x)


def odd_attention():
    x = inputs = keras.Input((4, 6))
    x = OddAttention()(keras.layers.Dense(6)(x))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    return kld.enable_lora_dropout(model, rank=2)


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (small_transformer, SETTINGS, TypeError, "enable_lora_dropout"),
        (lambda: "model", SETTINGS, TypeError, "str"),
        (adapted, {}, ValueError, "needs a setting"),
        (adapted, {"attention": kld.HiddenCut()}, TypeError, "DropKey"),
        (adapted, {"attention": 0.1}, TypeError, "float"),
        (adapted, {"hidden": kld.DropKey()}, TypeError, "HiddenCut"),
        (adapted, {"consistency": 1.0}, TypeError, "Consistency"),
        (adapted, {**SETTINGS, "blocks": "some"}, ValueError, "blocks"),
        (adapted, {**SETTINGS, "blocks": [2]}, ValueError, "2 blocks"),
        (adapted, {**SETTINGS, "blocks": []}, ValueError, "at least one"),
        (adapted, {**SETTINGS, "blocks": [True]}, ValueError, "blocks"),
        (no_blocks, SETTINGS, ValueError, "no transformer blocks"),
        (odd_attention, SETTINGS, ValueError, "OddAttention"),
        (
            odd_attention,
            {"hidden": kld.HiddenCut()},
            ValueError,
            "no feed-forward",
        ),
        (dropping, SETTINGS, ValueError, "already enabled"),
    ],
)
def test_bad_input_changes_nothing(build, options, error, message):
    model = build()
    before = None if isinstance(model, str) else mixed(model)
    with pytest.raises(error, match=message):
        kld.enable_transformer_dropout(model, **options)
    if before is not None:
        assert mixed(model) == before


def test_there_must_be_something_to_remove():
    for method in "remove_transformer_dropout", "disable_transformer_dropout":
        with pytest.raises(ValueError, match=method):
            with getattr(adapted(), method)():
                pass
