"""The size of the caches that KerasHub's decoders keep."""

import dataclasses
import inspect
import math

import keras

# What `_build_cache` may be given here; images are not among it.
_TEXT = tuple(
    f"{side}{name}"
    for side in ("", "encoder_", "decoder_")
    for name in ("token_ids", "padding_mask")
)


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes of what a model keeps of one row between two tokens.

    Attributes:
        fixed: Integer. Bytes whatever the lengths of the row.
        each_token: Dictionary. Bytes that each token takes, by the name of the
            input that is so long.
    """

    fixed: int = 0
    each_token: dict = dataclasses.field(default_factory=dict)

    def of_row(self, inputs):
        """Bytes of one row of a batch."""
        return self.fixed + sum(
            size * inputs[name].shape[1]
            for name, size in self.each_token.items()
        )


def cache_size(model, inputs):
    """Size of what a KerasHub `CausalLM` keeps between two tokens.

    These are keys and values, and with an encoder what it made of its text. The
    size is inferred from the caches of a few short rows.

    Args:
        model: A `keras_hub.models.CausalLM`.
        inputs: Dictionary of preprocessed prompts.

    Returns:
        `CacheSize`; of nothing, unknown, for a model whose cache depends on
        more than the tokens, such as images.
    """
    # Private, since nothing public tells the size before it is allocated.
    build = getattr(model, "_build_cache", None)
    if build is None:
        return CacheSize()
    given = [
        parameter.name
        for parameter in inspect.signature(build).parameters.values()
        if parameter.default is parameter.empty
        or inputs.get(parameter.name) is not None
    ]
    if not set(given) <= set(_TEXT) & set(inputs):
        return CacheSize()
    texts = [name for name in given if name.endswith("token_ids")]

    def bytes_with(lengths):
        return _bytes_of(
            build,
            {
                name: keras.KerasTensor((1, lengths[_text_of(name)]), "int32")
                for name in given
            },
        )

    short = dict.fromkeys(texts, 2)
    base = bytes_with(short)
    each_token = {name: bytes_with({**short, name: 3}) - base for name in texts}
    return CacheSize(base - 2 * sum(each_token.values()), each_token)


def _text_of(name):
    """The name of the tokens that a mask belongs to, or of the tokens."""
    return name.replace("padding_mask", "token_ids")


def _bytes_of(build, tensors):
    # The first output, the hidden states, is not kept.
    _, *cache = keras.layers.Lambda(
        lambda given: build(**given)
    ).compute_output_spec(tensors)
    return sum(
        math.prod(leaf.shape) * _item_bytes(leaf.dtype)
        for leaf in keras.tree.flatten(cache)
    )


def _item_bytes(dtype):
    name = keras.backend.standardize_dtype(dtype)
    bits = "".join(filter(str.isdigit, name))
    return int(bits) // 8 if bits else 1  # A Boolean.
