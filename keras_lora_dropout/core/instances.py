"""N mask instances in one batch: lay it out, take it apart, average.

The layout is instance-major: rows `n * B` to `(n + 1) * B` belong to mask
instance `n`. Big matrix products then run on contiguous rows, and each
instance is one slice.

Where `keras.distribution` splits the batch axis over devices, each device lays
out the rows that it has in this way: first all instances of the rows of the
first device, then those of the second. So no row leaves its device, and layers
see what they always see, blocks of rows with a mask each; there are just more
blocks.
"""

import functools

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import copy_mask
from keras_lora_dropout.core.light_ops import reshape

LAYOUT_ADVICE = (
    "To run one mask instance after another instead, pass "
    '`sampling="sequential"`; masks of their own for each example '
    '(`mask_sharing="example"`) need a leading batch axis in any case.'
)


class LayoutError(ValueError):
    """The model's tensors cannot carry N instances in their leading axis."""


def tile(structure, num_instances):
    """Repeat every tensor's leading axis, once for each instance.

    Args:
        structure: Nested structure of tensors or arrays; scalars and anything
            that has no shape pass unchanged.
        num_instances: Positive integer.

    Returns:
        The same structure with leading axes of `num_instances * B`.
    """
    if num_instances == 1:
        return structure

    def repeat(leaf):
        if not has_rows(leaf):
            return leaf
        tensor = ops.convert_to_tensor(leaf)  # Once, not once per instance.
        tiled = _repeat(num_instances, tensor)
        copy_mask(leaf, tiled, functools.partial(_repeat, num_instances))
        return tiled

    return keras.tree.map_structure(repeat, structure)


def _repeat(num_instances, tensor):
    shape = ops.shape(tensor)
    shards = data_shards(shape[0])
    parts = reshape(tensor, (shards, -1, *shape[1:]))
    tiled = ops.concatenate([parts] * num_instances, axis=1)
    return reshape(tiled, (-1, *shape[1:]))


def data_shards(rows):
    """Over how many devices `keras.distribution` splits a batch axis.

    Args:
        rows: Length of the axis, of one instance. One that is not known, or
            cannot be split evenly, is not split.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not isinstance(rows, int):
        return 1
    mesh = distribution.device_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    return 1 if rows % mesh.shape[axis] else mesh.shape[axis]


def lay_out(values, rows):
    """Put what is drawn for mask groups into the order of a batch's blocks.

    Args:
        values: Tensor of shape `(num_instances, groups, ...)`: one group for
            all `rows` of an instance, or one for each of them.
        rows: Length of the batch axis of one instance, or `None` if unknown.

    Returns:
        Tensor of shape `(blocks, ...)`: that of `num_instances * groups`, or
        more, if devices have blocks of their own of the same group.
    """
    num_instances, groups, *shape = values.shape
    shards = data_shards(rows)
    if shards == 1:
        return reshape(values, (-1, *shape))
    if groups == 1:
        values = ops.repeat(values, shards, axis=1)
    values = reshape(values, (num_instances, shards, -1, *shape))
    blocks = reshape(ops.swapaxes(values, 0, 1), (-1, *shape))
    # Each device draws what it needs, instead of all of it.
    layout = keras.distribution.distribution().get_data_layout(blocks.shape)
    return keras.distribution.distribute_tensor(blocks, layout)


def split(structure, num_instances, rows=None):
    """Take the outputs of a tiled batch apart.

    Args:
        structure: Nested structure of tensors with a leading axis of
            `num_instances * B`.
        num_instances: Positive integer.
        rows: The expected length of that axis, if it is known.

    Returns:
        List of `num_instances` structures with leading axes of `B`.

    Raises:
        LayoutError: If an output has no such leading axis.
    """
    if num_instances == 1:
        return [structure]
    check_outputs(structure, rows)
    pieces = []
    for leaf in keras.tree.flatten(structure):
        parts = ops.unstack(blocks(leaf, num_instances), num_instances)
        for n, part in enumerate(parts):
            copy_mask(leaf, part, functools.partial(_nth, n, num_instances))
        pieces.append(parts)
    return [
        keras.tree.pack_sequence_as(structure, list(parts))
        for parts in zip(*pieces, strict=True)
    ]


def blocks(tensor, num_instances):
    """Give the instances of a tiled batch an axis of their own.

    Args:
        tensor: Tensor with a leading axis of `num_instances * B`.
        num_instances: Positive integer.

    Returns:
        Tensor of shape `(num_instances, B, ...)`.
    """
    parts = _parts(tensor, num_instances)
    shape = num_instances, -1, *ops.shape(tensor)[1:]
    return reshape(ops.swapaxes(parts, 0, 1), shape)


def join(values):
    """Undo `blocks`.

    Args:
        values: Tensor of shape `(num_instances, B, ...)`.

    Returns:
        Tensor with a leading axis of `num_instances * B`, in the order of a
        tiled batch.
    """
    num_instances, rows, *shape = ops.shape(values)
    parts = reshape(values, (num_instances, data_shards(rows), -1, *shape))
    return reshape(ops.swapaxes(parts, 0, 1), (-1, *shape))


def _parts(tensor, num_instances):
    """Return a tiled batch as `(shards, num_instances, B / shards, ...)`."""
    tiled, *shape = ops.shape(tensor)
    rows = tiled // num_instances if isinstance(tiled, int) else None
    return reshape(tensor, (data_shards(rows), num_instances, -1, *shape))


def _nth(n, num_instances, mask):
    return blocks(mask, num_instances)[n]


def check_outputs(structure, rows):
    """Raise `LayoutError` unless all outputs have the tiled batch axis."""
    for leaf in keras.tree.flatten(structure):
        check_rows("An output of the model", leaf.shape, rows)


def mean_of_blocks(structure, num_instances):
    """Average the instances of a tiled batch, as `mean(split(...))`.

    The number of operations does not grow with the number of instances.
    """

    def average(leaf):
        form = _Form(leaf)
        copy_mask(leaf, form, functools.partial(_nth, 0, num_instances))
        total = ops.sum(_widen(_parts(leaf, num_instances)), axis=1)
        total = reshape(total, (-1, *ops.shape(leaf)[1:]))
        return form.give(total, num_instances)

    return keras.tree.map_structure(average, structure)


def mean(structures):
    """Average structures leaf by leaf ([L] Eq. 7 and 8).

    Args:
        structures: Iterable of equal structures of tensors; `None` leaves stay
            `None`. It is consumed one by one, and only the running sum is kept.

    Returns:
        The mean, summed in float32 at the least, in the leaves' own dtype
        where that is a float and in float32 otherwise.
    """
    iterator = iter(structures)
    structure = next(iterator)
    form = keras.tree.map_structure(_Form, structure)
    total, count = None, 1
    for following in iterator:
        if total is None:
            total = keras.tree.map_structure(_widen, structure)
        # No structure but the sum is held while the next one is computed.
        structure = None
        total = keras.tree.map_structure(_add, total, following)
        count += 1
        del following
    if total is None:
        return structure
    return keras.tree.map_structure(
        lambda form, summed: form.give(summed, count), form, total
    )


def mean_in_turn(function, values, each_in_turn):
    """Average what a function gives for each of several values.

    Args:
        function: Called with an index and the values of that index, of shape
            `(1, ...)`; it returns a structure, as those of `mean`.
        values: Tensor of shape `(count, ...)`.
        each_in_turn: `training.backend.each_in_turn`.

    Returns:
        As `mean`.
    """
    structure = function(0, values[:1])
    if values.shape[0] == 1:
        return structure
    form = keras.tree.map_structure(_Form, structure)
    total = keras.tree.map_structure(_widen, structure)
    structure = None

    def step(total, n, value):
        following = function(n, value)
        return keras.tree.map_structure(_add, total, following), None

    total, _ = each_in_turn(step, total, values, first=1)
    return keras.tree.map_structure(
        lambda form, summed: form.give(summed, values.shape[0]), form, total
    )


class _Form:
    """Dtype and padding mask of a leaf, without its numbers."""

    def __init__(self, leaf):
        self._dtype = None
        if leaf is not None:
            self._dtype = keras.backend.standardize_dtype(leaf.dtype)
        copy_mask(leaf, self)

    def give(self, summed, count):
        if summed is None:
            return None
        result = summed / count
        if "float" in self._dtype:
            result = ops.cast(result, self._dtype)
        copy_mask(self, result)
        return result


def _widen(leaf):
    if leaf is None:
        return None
    is_double = keras.backend.standardize_dtype(leaf.dtype) == "float64"
    return ops.cast(leaf, "float64" if is_double else "float32")


def _add(total, leaf):
    return None if leaf is None else total + _widen(leaf)


def has_rows(leaf):
    """Whether a leaf is a tensor or array with a leading axis."""
    return len(getattr(leaf, "shape", ())) > 0


def batch_size(structure):
    """Length of the leading axis of the first tensor in a structure."""
    for leaf in keras.tree.flatten(structure):
        if has_rows(leaf):
            return ops.shape(leaf)[0]
    raise ValueError("The batch has no inputs: no entry of `x` is a tensor.")


def check_rows(what, shape, rows):
    """Raise `LayoutError` unless the leading axis is the tiled batch axis."""
    leading = shape[0] if len(shape) else 0
    if leading is None or not isinstance(rows, int) or leading == rows:
        return
    raise LayoutError(
        f"{what} has shape {tuple(shape)}, but its leading axis must be the "
        f"batch axis of {rows} rows. {LAYOUT_ADVICE}"
    )
