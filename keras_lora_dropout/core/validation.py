"""Checks of arguments, with messages that say how to mend them."""

import math
import numbers

SAMPLINGS = ("parallel", "sequential")
MASK_SHARINGS = ("batch", "example")
MASK_SAMPLINGS = ("bernoulli", "balanced")
AVERAGES = ("output", "probability")
MAX_SEED = 2**31 - 1


def positive_integer(name, value):
    """Return `value` as `int`; raise `ValueError` unless it is 1 or more."""
    return integer(name, value, at_least=1)


def integer(name, value, at_least):
    """Return `value` as `int`; raise unless it is `at_least` or more."""
    is_integer = isinstance(value, numbers.Integral)
    if isinstance(value, bool) or not is_integer or value < at_least:
        kind = "a positive integer" if at_least else "an integer, 0 or more"
        raise ValueError(
            f"`{name}` must be {kind}, e.g. {name}=8. "
            f"Received: {name}={value!r} (of type {type(value).__name__})."
        )
    return int(value)


def dropout_rate(value):
    """Return the rate as `float`; raise unless it lies in `[0, 1)`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            "`dropout_rate` must be a number in [0, 1), the chance that a mask "
            f"entry is zero. Received: dropout_rate={value!r} "
            f"(of type {type(value).__name__})."
        )
    if not 0.0 <= value < 1.0:
        raise ValueError(
            "`dropout_rate` must lie in [0, 1), the chance that a mask entry "
            f"is zero; 0 is plain LoRA. Received: dropout_rate={value}."
        )
    return float(value)


def number(name, value, allowed, low=None, high=math.inf):
    """Return `value` as `float`; raise `ValueError` unless it is in range.

    Args:
        name: String. Name of the argument.
        value: The argument.
        allowed: String that says what is allowed.
        low: The value must be more; with `None`, 0 or more.
        high: The value must be less.
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_real and low is None and 0 <= value < high:
        return float(value)
    if is_real and low is not None and low < value < high:
        return float(value)
    raise ValueError(
        f"`{name}` must be a number, {allowed}. Received: {name}={value!r}."
    )


def alpha(value, rank, name="alpha"):
    """Return the strength as `float`; `None` means `rank` (scaling 1)."""
    if value is None:
        return float(rank)
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"`{name}` must be a positive finite number, or None for alpha = "
            f"rank (scaling 1). Received: {name}={value!r}."
        )
    return float(value)


def boolean(name, value):
    """Return `value`; raise `TypeError` unless it is a `bool`."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r} "
            f"(of type {type(value).__name__})."
        )
    return value


def word(name, value, allowed):
    """Return `value`; raise `ValueError` unless it is one of `allowed`."""
    if value not in allowed:
        choices = " or ".join(f'"{choice}"' for choice in allowed)
        raise ValueError(
            f"`{name}` must be {choices}. Received: {name}={value!r}."
        )
    return value


def seed(value):
    """Return an integer seed or `None`; raise if it is neither."""
    if value is None:
        return None
    is_integer = isinstance(value, numbers.Integral)
    if isinstance(value, bool) or not is_integer:
        raise TypeError(
            "`seed` must be an integer, or None for a random one. "
            f"Received: seed={value!r} (of type {type(value).__name__})."
        )
    if not 0 <= value <= MAX_SEED:
        raise ValueError(
            f"`seed` must lie between 0 and {MAX_SEED}. Received: seed={value}."
        )
    return int(value)


def rank_fits(rank, input_dim, output_dim, where):
    """Raise `ValueError` if `rank` exceeds what the layer can hold."""
    if rank > min(input_dim, output_dim):
        raise ValueError(
            f"`rank` is larger than {where} can hold: its kernel maps "
            f"{input_dim} features to {output_dim}, so the rank is at most "
            f"{min(input_dim, output_dim)}. Received: rank={rank}. Choose a "
            "smaller rank, or leave this layer out with `exclude_layers`."
        )


def not_empty(name, data):
    """Raise `ValueError` if arrays or a sized data set hold no example."""
    parts = [data]
    if isinstance(data, dict):
        parts = list(data.values())
    elif isinstance(data, (list, tuple)):
        parts += [part for part in data if hasattr(part, "shape")]
    if any(_length(part) == 0 for part in parts):
        raise ValueError(
            f"`{name}` holds no examples, but at least one is needed. "
            f"Received: {name} of type {type(data).__name__} with length 0."
        )


def _length(data):
    if isinstance(data, str):  # One example, such as an empty prompt.
        return None
    shape = getattr(data, "shape", None)
    if shape is not None:
        return shape[0] if len(shape) else None
    try:
        return len(data)
    except TypeError:  # A data set that does not know its length.
        return None
