"""DeBERTaV3's attention, exact and lean.

KerasHub tiles the table of relative positions to the batch, projects all of it
for each example in every layer, and gathers scores with an index of shape
(batch, heads, length, length). A score depends on a position through its
distance from the query alone, so here the table is projected once for each
mask instance, at the distances that occur, and rows of scores are shifted into
place. Output and gradients are the same.

One thing is drawn otherwise: dropout on the table of positions falls alike on
all examples of a forward pass, as in the authors' own code
(https://github.com/microsoft/DeBERTa), instead of on each example apart. What
any one example sees has the same distribution.
"""

import functools
import hashlib
import inspect
import logging

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.light_ops import matmul
from keras_lora_dropout.core.light_ops import matrix_transpose
from keras_lora_dropout.core.light_ops import reshape
from keras_lora_dropout.core.light_ops import transpose
from keras_lora_dropout.core.masks import current_draws
from keras_lora_dropout.core.masks import shared_inputs
from keras_lora_dropout.core.products import add_low_rank

logger = logging.getLogger("keras_lora_dropout")

_MODULE = "keras_hub.src.models.deberta_v3."
# Queries are scored in blocks: a block of b queries meets length + b distances
# instead of 2 * length, but has a copy of its own of their projections.
_LARGEST_BLOCK = 32
# A table of positions costs more than fewer rows than these that it serves.
_FEW_ROWS = 4


class LeanRelativeEmbedding:
    """Mixin: the table of relative positions, with a leading axis of 1."""

    def call(self, inputs):
        table = ops.convert_to_tensor(self.rel_embeddings)
        return self.layer_norm(ops.expand_dims(table, axis=0))


class LeanDisentangledSelfAttention:
    """Mixin: disentangled attention that projects each distance once."""

    def _compute_attention(
        self,
        query,
        key,
        value,
        rel_embeddings,
        attention_mask=None,
        training=None,
    ):
        rows, length = ops.shape(query)[:2]
        table = rel_embeddings[:1]  # Whatever it was tiled to, rows are equal.
        if not isinstance(length, int):
            # A length that only the running program knows, as in exports.
            table = ops.broadcast_to(table, (rows, *table.shape[1:]))
            return super()._compute_attention(
                query, key, value, table, attention_mask, training
            )
        if self._has_row_for_each_distance(length):
            middle = self.bucket_size  # The row of distance 0.
            table = table[:, middle - length : middle + length + 1]
        # Keras hands `training` on to both dropout layers. If given here, it
        # would have all arguments searched for tensors, which takes longer.
        table = self._position_dropout_layer(table)
        query = query * self.scale_factor
        scores = matmul(
            transpose(query, (0, 2, 1, 3)), transpose(key, (0, 2, 3, 1))
        )
        # Never in place: PyTorch copies the gradients of views written to.
        scores = scores + self._scores_of_distances(
            query, self._key_dense, table, -1
        )
        scores = scores + matrix_transpose(
            self._scores_of_distances(
                key * self.scale_factor, self._query_dense, table, 1
            )
        )
        weights = self._masked_softmax(scores, attention_mask)
        weights = self._attn_dropout_layer(weights)
        mean = matmul(weights, transpose(value, (0, 2, 1, 3)))
        return transpose(mean, (0, 2, 1, 3)), weights

    def _scores_of_distances(self, states, projection, table, sign):
        """Score contents against the distances to all positions.

        Args:
            states: Tensor of shape `(rows, length, heads, size)`.
            projection: Layer from the table's last axis to `(heads, size)`.
            table: Tensor of shape `(1, 2 * bucket_size, hidden_dim)`, or its
                rows in reach alone: `(1, 2 * length + 1, hidden_dim)`.
            sign: 1 or -1. Position `j` is at distance `sign * (j - i)` of
                position `i`.

        Returns:
            Tensor of shape `(rows, heads, length, length)`.
        """
        rows, length, heads, _ = ops.shape(states)
        draws = current_draws()
        groups = 1 if draws is None else draws.groups
        positions, *low_rank = self._project(
            projection,
            table,
            length,
            sign,
            in_parts=groups != 1 and _are_few(rows, groups),
        )
        few = _are_few(rows, positions.shape[0])
        block = length if few else _block_size(length)
        scores = _meet(states, positions, block, *low_rank)
        # Row i of a block is shifted to the left by block - 1 - i entries: each
        # row one entry less than the row before.
        blocks, width = length // block, length + block
        flat = scores[..., : block * (width - 1)]
        scores = reshape(flat, (heads, blocks, -1, block, width - 1))
        scores = transpose(scores[..., block - 1 :], (2, 0, 1, 3, 4))
        return reshape(scores, (-1, heads, length, length))

    def _project(self, projection, table, length, sign, in_parts):
        """Project the rows of `sign * d` for d from `1 - length` to `length`.

        Positions `i` and `j` meet in entry `length - 1 - i + j`; the last one
        fills the last window up.

        Returns:
            Tuple of `(groups, 2 * length, heads, size)`. With `in_parts`, if
            the projection has masks: instead, of that with one group, what all
            groups share, and of the factors of what a group adds,
            `(groups, 2 * length, rank)` and `(groups, rank, heads, size)`.
        """
        span, rows = self.bucket_size, None
        if self._has_row_for_each_distance(length):
            table = ops.flip(table, axis=1) if sign < 0 else table
            table = table[:, 1:]
        else:
            distances = ops.arange(1 - length, length + 1)
            distances = sign * ops.cast(distances, "int")
            rows = self._make_log_bucket_position(distances)
            rows = ops.clip(rows + span, 0, 2 * span - 1)
            if length <= span:
                table, rows = _take_rows(table, rows), None
        with shared_inputs(in_parts):
            projected = projection(table)
        if not isinstance(projected, tuple):
            projected = (projected,)
        if rows is None:
            return projected
        positions, *low_rank = projected
        if low_rank:
            low_rank[0] = _take_rows(low_rank[0], rows)
        return _take_rows(positions, rows), *low_rank

    def _has_row_for_each_distance(self, length):
        """Whether no two distances between so many positions share a bucket."""
        return length <= self.bucket_size // 2


_MIXINS = {
    f"{_MODULE}relative_embedding.RelativeEmbedding": LeanRelativeEmbedding,
    f"{_MODULE}disentangled_self_attention.DisentangledSelfAttention": (
        LeanDisentangledSelfAttention
    ),
}
# SHA-256 of the source of the classes that the mixins were written against; the
# same from KerasHub 0.32.0 on.
_KNOWN_SOURCES = {
    "RelativeEmbedding": (
        "13e2205610115d0f6c58186d0da208ad4ae09a019e6f0185afe32f354c66c57f"
    ),
    "DisentangledSelfAttention": (
        "896c69402df66c83b0af23b5c19c15522f563f7f44e59925e601bc24316bfcf2"
    ),
}


def make_lean(model):
    """Give DeBERTaV3's attention layers their lean form, in place.

    Nothing is changed, and the reason logged, where KerasHub's code is not the
    one that this file knows.

    Args:
        model: A built model with any layers.
    """
    layers = [lyr for lyr in descendants(model) if _mixin_of(type(lyr))]
    classes = {type(layer) for layer in layers}
    unknown = [cls.__name__ for cls in classes if not _is_known(cls)]
    if unknown:
        logger.warning(
            "DeBERTaV3's attention stays as it is in KerasHub, slower and just "
            "as exact: the installed version has another %s than those that "
            "this release of keras_lora_dropout knows.",
            " and ".join(sorted(unknown)),
        )
        return
    if {_mixin_of(cls) for cls in classes} != set(_MIXINS.values()):
        return  # Each needs the other.
    for layer in layers:
        layer.__class__ = _lean_class(type(layer))


def lean_layers(model):
    """Return `(layer, KerasHub's class)` of the layers in lean form."""
    mixins = tuple(_MIXINS.values())
    return [
        (layer, type(layer).__bases__[1])
        for layer in descendants(model)
        if isinstance(layer, mixins)
    ]


def make_stock(model):
    """Undo `make_lean`."""
    for layer, cls in lean_layers(model):
        layer.__class__ = cls


@functools.cache
def _lean_class(cls):
    # Keras names the weights in its files after classes: the name stays.
    return type(cls.__name__, (_mixin_of(cls), cls), {})


def _mixin_of(cls):
    return _MIXINS.get(f"{cls.__module__}.{cls.__name__}")


@functools.cache
def _is_known(cls):
    try:
        source = inspect.getsource(cls)
    except OSError:
        return False
    digest = hashlib.sha256(source.encode()).hexdigest()
    return digest == _KNOWN_SOURCES[cls.__name__]


def _take_rows(tensor, rows):
    """Take rows of axis 1."""
    if tensor.shape[0] > 1:
        return ops.take(tensor, rows, axis=1)
    # Of a matrix: else, Keras on torch squeezes the axis, which ONNX refuses.
    matrix = reshape(tensor, (tensor.shape[1], -1))
    taken = ops.take(matrix, rows, axis=0)
    return reshape(taken, (1, -1, *tensor.shape[2:]))


def _are_few(rows, groups):
    """Whether tables of each group's own cost more than the rows do."""
    known = isinstance(rows, int) and isinstance(groups, int)
    return known and rows < _FEW_ROWS * groups


def _meet(states, positions, block, low=None, high=None):
    """Score the queries of each block against its window of positions.

    Args:
        states: Tensor of shape `(rows, length, heads, size)`.
        positions: Tensor of shape `(groups, 2 * length, heads, size)`.
        block: Number of queries of a block; it divides the length.
        low, high: Factors of what each group adds to positions that all share:
            `(groups, 2 * length, rank)` and `(groups, rank, heads, size)`;
            `None` for nothing.

    Returns:
        Tensor of shape `(heads, blocks, rows, block * (length + block))`.
    """
    _, length, heads, size = ops.shape(states)
    blocks, width = length // block, length + block
    states = reshape(states, (-1, blocks, block, heads, size))
    states = transpose(states, (3, 1, 0, 2, 4))
    windows = transpose(_windows(positions, block), (3, 1, 0, 4, 2))
    groups = ops.shape(windows)[2]
    scores = matmul(_in_groups(states, groups), _for_groups(windows, states))
    if low is not None:
        groups = ops.shape(high)[0]
        high = ops.expand_dims(transpose(high, (2, 0, 3, 1)), 1)
        low = ops.expand_dims(transpose(_windows(low, block), (1, 0, 3, 2)), 0)
        scores = reshape(scores, (heads, blocks, -1, block, width))
        scores = add_low_rank(
            _in_groups(scores, groups),
            _in_groups(states, groups),
            _for_groups(high, states),
            _for_groups(low, states),
        )
    return reshape(scores, (heads, blocks, -1, block * width))


def _in_groups(rows, groups):
    """Split `(heads, blocks, rows, ...)` as `matmul` takes it best."""
    heads, blocks, _, block, size = ops.shape(rows)
    if keras.config.backend() == "torch":
        # Each group is one matrix. Elsewhere, rows and the queries of a block
        # stay apart: where devices share the rows, XLA would collect them all.
        return reshape(rows, (heads * blocks * groups, -1, size))
    return reshape(rows, (heads, blocks, groups, -1, block, size))


def _for_groups(matrices, rows):
    """Give `(heads, blocks, groups, ...)` the axes of what `_in_groups` gave.

    The matrices of all heads, or of all blocks, may be one.
    """
    if keras.config.backend() == "torch":
        shape = *rows.shape[:2], *matrices.shape[2:]
        matrices = ops.broadcast_to(matrices, shape)
        return reshape(matrices, (-1, *shape[3:]))
    return ops.expand_dims(matrices, 3)


def _windows(positions, block):
    """Return what each block of queries meets, `(groups, blocks, ...)`."""
    length = positions.shape[1] // 2
    starts = range(length - block, -1, -block)
    windows = [positions[:, at : at + length + block] for at in starts]
    return ops.stack(windows, axis=1)


def _block_size(length):
    """Choose how many queries are scored at once; it divides the length."""
    divisors = (
        size
        for size in range(_LARGEST_BLOCK, _LARGEST_BLOCK // 4 - 1, -1)
        if length % size == 0
    )
    return next(divisors, length)
