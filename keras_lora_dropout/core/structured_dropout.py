"""Structured dropout inside transformer blocks, in one framework.

Where it drops: keys before the softmax (DropKey), weights after it
(DropAttention), or hidden features of the feed-forward sublayer (HiddenCut).
What goes together: single entries, whole columns, or one contiguous span.

Reference: [H], Wang et al., "LoRA Meets Dropout under a Unified Framework",
2024, https://arxiv.org/abs/2403.00812, section 3. Columns are keys and hidden
dimensions, rows are queries and positions.
"""

import copy

import keras
from keras import ops

from keras_lora_dropout.core.instances import lay_out
from keras_lora_dropout.core.masks import GivenSeed
from keras_lora_dropout.core.masks import draw_uniform

PATTERNS = ("element", "column", "span")
# Odd, so that no two layers have the same: 2 ** 32 over the golden ratio.
_STREAM = 0x9E3779B1


class DropoutDraws:
    """What layers with structured dropout draw in one forward pass.

    A layer that is computed again by gradient checkpointing draws the same.

    Args:
        seed: Tensor, the state of a `SeedGenerator`.
        num_instances: Positive integer N: the batch consists of the rows of N
            instances.
        rows_alike: Boolean. Whether all rows of an instance draw the same, as
            in an ensemble, instead of each for itself.
        instance: `None`, or which of the N instances the whole batch is.
        stream: Integer, another one for each layer.
    """

    def __init__(
        self,
        seed,
        num_instances=1,
        rows_alike=False,
        instance=None,
        stream=0,
    ):
        self.seed = seed
        self.num_instances = num_instances
        self.rows_alike = rows_alike
        self.instance = instance
        self.stream = stream

    def only(self, instance):
        """Return what one of the N instances draws."""
        return self._but(instance=instance)

    def of_layer(self, stream):
        """Return what a layer draws."""
        return self._but(stream=stream)

    def uniform(self, shape):
        """Draw numbers in `[0, 1)`.

        Args:
            shape: Shape, whose first axis is that of the rows.

        Returns:
            Float32 tensor that broadcasts to `shape`.
        """
        return self._draw(shape, draw_uniform)

    def keep(self, shape, rate):
        """Draw what stays, each entry alone, with probability `1 - rate`.

        Sixteen bits decide on an entry, for half the price of a float: the
        rate is met to within `2 ** -17`, one above `1 - 2 ** -16` becomes that.

        Args:
            shape: Shape, whose first axis is that of the rows.
            rate: Float in `[0, 1)`.

        Returns:
            Boolean tensor that broadcasts to `shape`.
        """
        *leading, last = shape
        words = self._draw((*leading, (last + 1) // 2), _draw_words)
        halves = ops.view(words, "int16")[..., :last]
        return halves >= min(round(rate * 2**16), 2**16 - 1) - 2**15

    def _draw(self, shape, draw):
        offset = [(self.stream + 1) * _STREAM % 2**31, 0]
        dtype = keras.backend.standardize_dtype(self.seed.dtype)
        seed = GivenSeed(self.seed + ops.convert_to_tensor(offset, dtype))
        rows = shape[0] // self.num_instances
        if self.instance is not None and not self.rows_alike:
            values = draw((self.num_instances, *shape), seed)
            return lay_out(values[self.instance][None], shape[0])
        if not self.rows_alike:
            values = draw((self.num_instances, rows, *shape[1:]), seed)
            return lay_out(values, rows)
        values = draw((self.num_instances, *shape[1:]), seed)
        if self.instance is not None:
            # The index of a loop is a tensor.
            return ops.expand_dims(ops.take(values, self.instance, axis=0), 0)
        blocks = lay_out(ops.expand_dims(values, 1), rows)
        return ops.repeat(blocks, shape[0] // blocks.shape[0], axis=0)

    def _but(self, **attributes):
        changed = copy.copy(self)
        vars(changed).update(attributes)
        return changed


def _draw_words(shape, seed):
    """Draw 32 random bits each (but for one value, which never comes)."""
    low, high = -(2**31), 2**31 - 1
    return keras.random.randint(shape, low, high, dtype="int32", seed=seed)


def draw_keys(shape, valid, rate, pattern, draws):
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
        draws: The layer's `DropoutDraws`.

    Returns:
        Boolean tensor that broadcasts to `shape`: False for dropped keys and
        for those that are not valid.
    """
    if valid is None:
        valid = ops.ones((1,) * len(shape), "bool")
    columns = (*shape[:-2], 1, shape[-1])
    if pattern == "span":
        ranks, count = _ranks_of_keys(valid, shape[-1])
        keep = _outside_span((*shape[:-2], 1, 1), ranks, count, rate, draws)
        # Any key may stay in place of the last one; this needs no draws.
        order = ops.cast(ops.arange(shape[-1]), "float32")
    else:
        order = draws.uniform(shape if pattern == "element" else columns)
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


def _outside_span(shape, ranks, count, rate, draws):
    """Draw a run of about `rate * count` ranks; True for what is outside.

    Its length is one of the two integers next to that, so that the expected
    share of dropped ranks is `rate`.
    """
    drawn = draws.uniform((*shape, 2))
    size = ops.floor(rate * count + drawn[..., 0])
    start = ops.floor(drawn[..., 1] * (count - size + 1))
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
    weights = ops.softmax(_masked(ops.cast(scores, "float32"), keep), axis=-1)
    return ops.cast(ops.where(keep, weights, 0.0), scores.dtype)


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
    scores_of_valid = _masked(ops.cast(scores, "float32"), valid)
    log_weights = ops.log_softmax(scores_of_valid, axis=-1)
    left = ops.logsumexp(_masked(log_weights, keep), axis=-1, keepdims=True)
    log_weights = log_weights - ops.stop_gradient(left)
    # The exponential of what is dropped must not overflow on its way to zero.
    weights = ops.exp(_masked(log_weights, keep))
    return ops.cast(ops.where(keep, weights, 0.0), scores.dtype)


def _masked(values, keep):
    if keep is None:
        return values
    return ops.where(keep, values, -1e9)


def cut_hidden(hidden, rate, pattern, rescale, draws):
    """Drop entries of hidden representations: HiddenCut.

    Args:
        hidden: Float tensor `(rows, positions, features)`.
        rate: Float in `[0, 1)`. Probability that an entry is dropped.
        pattern: `"element"`: each entry alone, as ordinary dropout.
            `"column"`: whole features of a row. `"span"`: one contiguous run
            of positions of a row, with all their features.
        rescale: Boolean. Whether what stays is divided by `1 - rate`.
        draws: The layer's `DropoutDraws`.

    Returns:
        Tensor like `hidden`.
    """
    rows, positions, features = ops.shape(hidden)
    if pattern == "span":
        ranks = ops.reshape(ops.arange(positions), (1, positions, 1))
        ranks = ops.cast(ranks, "float32")
        count = ops.cast(positions, "float32")
        keep = _outside_span((rows, 1, 1), ranks, count, rate, draws)
    else:
        shape = rows, positions if pattern == "element" else 1, features
        keep = draws.keep(shape, rate)
    dtype = keras.backend.standardize_dtype(hidden.dtype)
    keep = ops.cast(keep, dtype)
    return ops.multiply(hidden, keep / (1 - rate) if rescale else keep)
