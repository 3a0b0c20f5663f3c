"""The size of the cache of keys and values that KerasHub's decoders keep."""

import inspect
import math

import keras


def cache_line(model):
    """Size of what a KerasHub `CausalLM` keeps between two tokens.

    It is inferred from the caches of two short rows.

    Args:
        model: A `keras_hub.models.CausalLM`.

    Returns:
        Tuple of integers: bytes that one row takes whatever its length, and
        bytes that each of its tokens takes. Both are 0, unknown, of a model
        whose cache depends on more than the tokens, such as images.
    """
    # Private, since nothing public tells the size before it is allocated.
    build = getattr(model, "_build_cache", None)
    if build is None or list(inspect.signature(build).parameters) != [
        "token_ids"
    ]:
        return 0, 0
    two, three = (_bytes_of(build, tokens) for tokens in (2, 3))
    return 3 * two - 2 * three, three - two


def _bytes_of(build, length):
    tokens = keras.KerasTensor((1, length), "int32")
    _, cache = keras.layers.Lambda(build).compute_output_spec(tokens)
    return sum(
        math.prod(leaf.shape) * _item_bytes(leaf.dtype)
        for leaf in keras.tree.flatten(cache)
    )


def _item_bytes(dtype):
    name = keras.backend.standardize_dtype(dtype)
    return int("".join(filter(str.isdigit, name))) // 8
