"""An error for lack of memory says what takes less of it."""

import contextlib

# In the name or the message of the error, whichever library raises it.
_SIGNS = (
    "memoryerror",
    "out of memory",
    "resource_exhausted",
    "resourceexhausted",
    "can't allocate memory",
    "not enough memory",
)


@contextlib.contextmanager
def memory_advice(method, sampling, num_samples):
    """Context in which an error for lack of memory gives advice, too.

    It stays of its own type.

    Args:
        method: String. What the user called.
        sampling: `"parallel"` or `"sequential"`.
        num_samples: Positive integer. Number of mask instances.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        advice = _advice(method, sampling, num_samples)
        try:
            advised = type(error)(f"{error}\n\n{advice}")
        except TypeError:  # Those of TensorFlow are made of more than a text.
            error.add_note(advice)
            raise error from None
        raise advised from error


def _is_out_of_memory(error):
    text = f"{type(error).__name__}: {error}".lower()
    return any(sign in text for sign in _SIGNS)


def _advice(method, sampling, num_samples):
    if sampling == "sequential" or num_samples == 1:
        return (
            f"`{method}` ran out of memory with one mask instance at a time. "
            "Pass a smaller `batch_size`."
        )
    return (
        f"`{method}` ran out of memory with num_samples={num_samples} mask "
        'instances of the batch at once. Pass `sampling="sequential"` to '
        "`enable_lora_dropout` (or `LoRADropoutModel`) to run one after "
        "another, a smaller `batch_size`, or fewer `num_samples`."
    )
