"""Balanced draws: each mask entry is spread evenly over the N instances.

This is Latin hypercube sampling (McKay, Beckman and Conover, 1979; Owen, "Monte
Carlo theory, methods and examples", chapter 10) with one mask entry for each
dimension of the cube and one instance for each point.
"""

import numpy as np
from keras import ops

# Sorting few numbers takes longer than comparing all pairs of them.
MOST_COMPARED = 16


def stratify(draws):
    """Make N balanced draws of N + 1 independent ones.

    The first N numbers of an entry give each instance a stratum, the n-th of
    `[0, 1/N), [1/N, 2/N), ...` by their rank; the last one is the place
    inside the stratum. So each result alone is uniform and independent of the
    other entries, and the N results of an entry are evenly spaced: exactly
    the floor or the ceiling of `N * (1 - p)` of them reach a rate `p`.

    Args:
        draws: Float32 tensor of shape `(N + 1, ...)`, independent and uniform
            in `[0, 1)`. N is static.

    Returns:
        Float32 tensor of shape `(N, ...)` in `[0, 1)`.
    """
    count = draws.shape[0] - 1
    # Rounding must not lift a number into the stratum above its own.
    place = ops.minimum(draws[-1], 1.0 - count * 2.0**-22)
    return (_ranks(draws[:-1]) + place) / count


def _ranks(values):
    """Ranks 0 to N - 1 along the leading axis; equal values in their order."""
    count = values.shape[0]
    if count > MOST_COMPARED:
        order = ops.argsort(values, axis=0)
        return ops.cast(ops.argsort(order, axis=0), "float32")
    index = np.arange(count).reshape(count, *[1] * (len(values.shape) - 1))
    ranks = ops.zeros_like(values)
    for n in range(count):
        lower = ops.where(index > n, values[n] <= values, values[n] < values)
        ranks = ranks + ops.cast(lower, "float32")
    return ranks
