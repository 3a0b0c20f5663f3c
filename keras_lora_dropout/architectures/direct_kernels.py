"""Layers that a KerasHub block goes past, straight to their kernels.

Blocks of Gemma 4 multiply by `layer.kernel` in place of calling the layer. An
adapter on it would train nothing and change nothing.
"""

from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers

# Class of the block, which KerasHub does not export, -> names of its layers.
_GONE_PAST = {
    "Gemma4TextDecoderBlock": ("ffw_gating", "ffw_gating_2", "ffw_linear"),
    "Gemma4ClippableEinsumDense": ("dense",),
}


def uncalled_layers(model):
    """Return the ids of the layers that their block never calls."""
    return {
        id(layer)
        for block in descendants(model)
        for layer in sublayers(block)
        if layer.name in _GONE_PAST.get(type(block).__name__, ())
    }
