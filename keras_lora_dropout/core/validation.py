"""Checks of arguments, with messages that say how to mend them."""

import math
import numbers

import numpy as np

SAMPLINGS = ("parallel", "sequential")
MASK_SHARINGS = ("batch", "example")
MASK_SAMPLINGS = ("bernoulli", "balanced")
AVERAGES = ("output", "probability")
MAX_SEED = 2**31 - 1
MAX_INTEGER = 2**31 - 1  # Sizes and steps are int32 on every backend.
# More instances than anyone needs; their masks alone would fill a memory.
MAX_SAMPLES = 100_000
# `alpha / (1 - dropout_rate)**2` is finite in float32, whatever the rate.
_ALPHAS = 1e-20, 1e20
ALMOST_ONE = 1 - 2**-24


def shown(value):
    """Return how a message shows a value: its `repr`, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        text = f"<a {type(value).__name__} of too many digits>"
    return text if len(text) <= 400 else f"{text[:397]}..."


def is_unicode(text):
    """Whether UTF-8 can hold a string: it has no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_text(what, value, where=""):
    """Raise an error unless a tokenizer can take a value.

    Args:
        what: String that names it, "A question".
        value: Anything; a string is right.
        where: String that says which one it is, " for question 0".

    Raises:
        TypeError: If it is no string.
        ValueError: If UTF-8 cannot hold it.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"{what} must be a string. Received: {shown(value)} (of type "
            f"{type(value).__name__}){where}."
        )
    if not is_unicode(value):
        raise ValueError(
            f"{what} must be a string that UTF-8 can hold, without half of a "
            f"surrogate pair. Received: {shown(value)}{where}. Replace what "
            'cannot be held by `text.encode("utf-8", "replace").decode()`.'
        )


def positive_integer(name, value, at_most=MAX_INTEGER):
    """Return `value` as `int`; raise `ValueError` unless it is 1 or more."""
    return integer(name, value, 1, at_most)


def integer(name, value, at_least, at_most=MAX_INTEGER):
    """Return `value` as `int`; raise `ValueError` unless it is in range.

    Args:
        name: String. Name of the argument.
        value: The argument.
        at_least: 0 or 1.
        at_most: Integer.
    """
    is_integer = isinstance(value, numbers.Integral)
    is_integer = is_integer and not isinstance(value, bool)
    if is_integer and at_least <= value <= at_most:
        return int(value)
    kind = "a positive integer" if at_least else "an integer, 0 or more"
    if is_integer and value > at_most:
        kind = f"an integer, at most {at_most:,}"
    raise ValueError(
        f"`{name}` must be {kind}, e.g. {name}=8. Received: "
        f"{name}={shown(value)} (of type {type(value).__name__})."
    )


def num_samples(value, name="num_samples", at_least=1):
    """Return a number of mask instances as `int`; raise if out of range."""
    return integer(name, value, at_least, MAX_SAMPLES)


def batch_size(value):
    """Return an `int` or `None`; raise `ValueError` if it is neither."""
    return None if value is None else positive_integer("batch_size", value)


def dropout_rate(value):
    """Return the rate as `float`; raise unless it lies in `[0, 1)`."""
    rate = real(value)
    if rate is None:
        raise ValueError(
            "`dropout_rate` must be a number in [0, 1), the chance that a mask "
            f"entry is zero. Received: dropout_rate={shown(value)} "
            f"(of type {type(value).__name__})."
        )
    # Masks are drawn in float32, where a rate just below 1 is 1.
    if not 0.0 <= rate < ALMOST_ONE:
        raise ValueError(
            "`dropout_rate` must lie in [0, 1), the chance that a mask entry "
            "is zero; 0 is plain LoRA, and float32 takes more than "
            f"{ALMOST_ONE} for 1. Received: dropout_rate={shown(value)}."
        )
    return rate


def number(name, value, allowed, low=None, high=math.inf):
    """Return `value` as `float`; raise `ValueError` unless it is in range.

    Args:
        name: String. Name of the argument.
        value: The argument.
        allowed: String that says what is allowed.
        low: The value must be more; with `None`, 0 or more.
        high: The value must be less.
    """
    found = real(value)
    if found is not None and low is None and 0 <= found < high:
        return found
    if found is not None and low is not None and low < found < high:
        return found
    raise ValueError(
        f"`{name}` must be a number, {allowed}. Received: "
        f"{name}={shown(value)} (of type {type(value).__name__})."
    )


def alpha(value, rank, name="alpha"):
    """Return the strength as `float`; `None` means `rank` (scaling 1)."""
    if value is None:
        return float(rank)
    found, (low, high) = real(value), _ALPHAS
    if found is None or not low <= found <= high:
        raise ValueError(
            f"`{name}` must be a positive finite number, from {low:g} to "
            f"{high:g}, or None for alpha = rank (scaling 1). Received: "
            f"{name}={shown(value)} (of type {type(value).__name__})."
        )
    return found


def real(value):
    """The value as `float`; `None` unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # An integer or a fraction beyond all floats.
        return math.inf if value > 0 else -math.inf


def as_list(name, values, of="strings"):
    """Return a list of what is iterable; raise `TypeError` if it is not.

    Args:
        name: String. Name of the argument.
        values: The argument. A string is no list of strings.
        of: String. What the list is to hold, for the message.
    """
    try:
        if not isinstance(values, (str, bytes)):
            return list(values)
    except (TypeError, MemoryError):
        pass
    received = f"{name}={shown(values)} (of type {type(values).__name__})."
    if isinstance(values, str):
        received = f"the string {shown(values)}. Put it in a list."
    raise TypeError(f"`{name}` must be a list of {of}. Received: {received}")


def numbers_of(values, booleans=False):
    """Return numbers as a float64 array; `None` if they are none.

    Args:
        values: Number, array, or nested lists of numbers. Texts of numbers
            are none.
        booleans: Boolean. Whether booleans count as 0 and 1.
    """
    try:
        array = np.asarray(values)
    # Lists of different lengths, or a range of absurd length.
    except (ValueError, TypeError, RuntimeError, MemoryError):
        return None
    kinds = "iufb" if booleans else "iuf"
    if array.dtype.kind not in kinds and array.size:
        return None
    return array.astype("float64")


def keep(settings, **checked):
    """Put checked values into a frozen dataclass, as plain numbers."""
    for name, value in checked.items():
        object.__setattr__(settings, name, value)


def boolean(name, value):
    """Return `value`; raise `TypeError` unless it is a `bool`."""
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={shown(value)} "
            f"(of type {type(value).__name__})."
        )
    return value


def word(name, value, allowed):
    """Return `value`; raise `ValueError` unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        choices = " or ".join(f'"{choice}"' for choice in allowed)
        raise ValueError(
            f"`{name}` must be {choices}. Received: {name}={shown(value)}."
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
            f"Received: seed={shown(value)} (of type {type(value).__name__})."
        )
    if not 0 <= value <= MAX_SEED:
        raise ValueError(
            f"`seed` must lie between 0 and {MAX_SEED}. Received: "
            f"seed={shown(value)}."
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
