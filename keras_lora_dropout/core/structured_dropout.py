"""Structured dropout inside transformer blocks, in one framework.

Where it drops: keys before the softmax (DropKey), weights after it
(DropAttention), or hidden features of the feed-forward sublayer (HiddenCut).
What goes together: single entries, whole columns, or one contiguous span.

Reference: [H], Wang et al., "LoRA Meets Dropout under a Unified Framework",
2024, https://arxiv.org/abs/2403.00812, section 3. Columns are keys and hidden
dimensions, rows are queries and positions.
"""

import contextlib
import threading

import keras
from keras import ops

from keras_lora_dropout.core.masks import draw_uniform

PATTERNS = ("element", "column", "span")
_state = threading.local()


@contextlib.contextmanager
def use_structured_dropout(active=True):
    """Let the layers called inside drop, or not; outside, none does."""
    outer = is_active()
    _state.active = active
    try:
        yield
    finally:
        _state.active = outer


def is_active():
    """Whether layers with structured dropout drop now."""
    return getattr(_state, "active", False)


def draw_keys(shape, valid, rate, pattern, seed):
    """Draw which keys each query keeps, at least one of those it may see.

    Args:
        shape: Shape of the attention scores, `(rows, heads..., T, S)`: T
            queries and S keys. Rows and heads are drawn independently.
        valid: Boolean tensor that broadcasts to `shape`: the keys that a query
            may see. `None`: all of them.
        rate: Float in `[0, 1)`. Probability that a key is dropped.
        pattern: `"element"`: for each query alone. `"column"`: the same keys
            for all queries of a head. `"span"`: likewise, one contiguous run
            of the keys that any query may see; a key is dropped with
            probability `rate` on average over the keys.
        seed: Integer or `SeedGenerator`.

    Returns:
        Boolean tensor that broadcasts to `shape`: False for dropped keys and
        for those that are not valid.
    """
    if valid is None:
        valid = ops.ones((1,) * len(shape), "bool")
    columns = (*shape[:-2], 1, shape[-1])
    if pattern == "span":
        ranks, count = _ranks_of_keys(valid, shape[-1])
        keep = _outside_span((*shape[:-2], 1, 1), ranks, count, rate, seed)
        # Any key may stay in place of the last one; this needs no draws.
        order = ops.cast(ops.arange(shape[-1]), "float32")
    else:
        order = draw_uniform(shape if pattern == "element" else columns, seed)
        keep = order >= rate
    return ops.logical_and(_or_the_highest(keep, order, valid), valid)


def _ranks_of_keys(valid, length):
    """Number the keys that any query may see, and count them.

    Returns:
        Float tensors that broadcast to `(rows, heads..., 1, S)` and to
        `(rows, heads..., 1, 1)`.
    """
    shape = (*valid.shape[:-1], length)
    seen = ops.any(ops.broadcast_to(valid, shape), axis=-2, keepdims=True)
    seen = ops.cast(seen, "float32")
    ranks = ops.where(seen > 0, ops.cumsum(seen, axis=-1) - 1, -1.0)
    return ranks, ops.sum(seen, axis=-1, keepdims=True)


def _outside_span(shape, ranks, count, rate, seed):
    """Draw a run of about `rate * count` ranks; True for what is outside.

    Its length is one of the two integers next to that, so that the expected
    share of dropped ranks is `rate`.
    """
    size, place = ops.split(draw_uniform((2, *shape), seed), 2, axis=0)
    size = ops.floor(rate * count + size[0])
    start = ops.floor(place[0] * (count - size + 1))
    return ops.logical_or(ranks < start, ranks >= start + size)


def _or_the_highest(keep, order, valid):
    """Keep the valid key of the highest order where a query keeps none."""
    kept = ops.any(ops.logical_and(keep, valid), axis=-1, keepdims=True)
    order = ops.where(valid, order, -1.0)
    highest = order >= ops.max(order, axis=-1, keepdims=True)
    return ops.logical_or(keep, ops.logical_and(~kept, highest))


def drop_keys(scores, keep):
    """Attend to the kept keys alone: DropKey.

    Args:
        scores: Attention scores before the softmax, `(..., T, S)`.
        keep: Boolean tensor that broadcasts to them. A query that keeps no
            key, because none is valid, has weights of zero.

    Returns:
        Attention weights in the dtype of the scores.
    """
    return _normalized(_log_weights(scores, keep), keep, scores.dtype)


def drop_attention(scores, keep, valid=None):
    """Drop weights, and divide by what is left, a constant: DropAttention.

    Its outputs are those of `drop_keys`; its gradients are not, since the sum
    of what is left counts as a constant. Computed from logarithms: what is
    left may be too little to divide by.

    Args:
        scores: Attention scores before the softmax, `(..., T, S)`.
        keep: Boolean tensor that broadcasts to them.
        valid: Boolean tensor likewise, the keys before any were dropped.

    Returns:
        Attention weights in the dtype of the scores.
    """
    log_weights = _log_weights(scores, valid)
    left = ops.logsumexp(_masked(log_weights, keep), axis=-1, keepdims=True)
    log_weights = log_weights - ops.stop_gradient(left)
    return _normalized(log_weights, keep, scores.dtype)


def _log_weights(scores, keep):
    return ops.log_softmax(_masked(ops.cast(scores, "float32"), keep), axis=-1)


def _normalized(log_weights, keep, dtype):
    # The exponential of what is dropped must not overflow on its way to zero.
    weights = ops.exp(_masked(log_weights, keep))
    return ops.cast(ops.where(keep, weights, 0.0), dtype)


def _masked(values, keep):
    if keep is None:
        return values
    return ops.where(keep, values, -1e9)


def cut_hidden(hidden, rate, pattern, rescale, seed):
    """Drop entries of hidden representations: HiddenCut.

    Args:
        hidden: Float tensor `(rows, positions, features)`.
        rate: Float in `[0, 1)`. Probability that an entry is dropped.
        pattern: `"element"`: each entry alone, as ordinary dropout.
            `"column"`: whole features of a row. `"span"`: one contiguous run
            of positions of a row, with all their features.
        rescale: Boolean. Whether what stays is divided by `1 - rate`.
        seed: Integer or `SeedGenerator`.

    Returns:
        Tensor like `hidden`.
    """
    rows, positions, features = ops.shape(hidden)
    if pattern == "span":
        ranks = ops.reshape(ops.arange(positions), (1, positions, 1))
        ranks = ops.cast(ranks, "float32")
        count = ops.cast(positions, "float32")
        keep = _outside_span((rows, 1, 1), ranks, count, rate, seed)
    else:
        shape = rows, positions if pattern == "element" else 1, features
        keep = draw_uniform(shape, seed) >= rate
    dtype = keras.backend.standardize_dtype(hidden.dtype)
    scale = 1 / (1 - rate) if rescale else 1.0
    return ops.multiply(hidden, ops.cast(ops.where(keep, scale, 0.0), dtype))
