"""One process's share of a batch that several processes hold together."""

import keras
import numpy as np
from keras import ops

# Odd, so that no two processes have the same; another one than that of layers.
_STREAM = 0x85EBCA6B


class BatchShare:
    """Which rows of the whole batch a process has.

    Rows are dealt out in turn, as to players of a card game: with P processes
    of equally many rows, process k has the rows k, P + k, 2P + k and so on.
    So do `x[k::P]`, `torch.utils.data.DistributedSampler` and
    `tf.data.Dataset.shard`.

    Args:
        sizes: List of the number of rows of each process.
        process: Integer. Which of the processes this one is.

    Attributes:
        rows: Number of rows of this process.
        total: Number of rows of all processes.
        mean_rows: Number of rows of a process on average.
        positions: Integer array `(rows,)`, rising. Where in the whole batch
            the rows of this process stand.
    """

    def __init__(self, sizes, process):
        self.process = process
        self.rows = sizes[process]
        self.total = sum(sizes)
        self.mean_rows = self.total / len(sizes)
        rounds = np.arange(max(sizes))[:, None] < np.array(sizes)
        order = np.cumsum(rounds).reshape(rounds.shape) - 1
        self.positions = order[rounds[:, process], process]

    def take(self, draws):
        """Return this process's rows of what was drawn for all.

        Args:
            draws: Tensor `(..., total, columns)`.
        """
        return ops.take(draws, self.positions, axis=-2)

    def own_seed(self, seed):
        """Return a seed that each process has another one of.

        Args:
            seed: Integer tensor `(2,)`, the state of a `SeedGenerator`.
        """
        return seed + seed_offset(self.process, seed)


def seed_offset(process, seed):
    """Return what a process adds to a seed; nothing in process 0."""
    offset = [process * _STREAM % 2**31, 0]
    dtype = keras.backend.standardize_dtype(seed.dtype)
    return ops.convert_to_tensor(offset, dtype)
