"""Which rows of a batch each of several processes has."""

import numpy as np
import pytest
from helpers import array
from keras import ops

from keras_lora_dropout.core.batch_share import BatchShare


def shares(sizes):
    return [BatchShare(sizes, process) for process in range(len(sizes))]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_rows_are_dealt_out_as_slices_are(rows, processes):
    dealt = [
        np.arange(rows)[process::processes] for process in range(processes)
    ]
    for share, own in zip(shares(list(map(len, dealt))), dealt, strict=True):
        assert share.positions.tolist() == own.tolist()
        assert (share.rows, share.total) == (len(own), rows)
        assert share.mean_rows == rows / processes


def test_each_row_has_one_process_whatever_their_sizes():
    sizes = [1, 5, 0, 2]
    found = [share.positions.tolist() for share in shares(sizes)]
    assert list(map(len, found)) == sizes
    # In turn, without those that have no rows left.
    assert found == [[0], [1, 3, 5, 6, 7], [], [2, 4]]


def test_draws_are_those_of_the_own_rows():
    draws = np.arange(2 * 6 * 3).reshape(2, 6, 3).astype("float32")
    share = BatchShare([2, 2, 2], 1)
    own = array(share.take(ops.convert_to_tensor(draws)))
    np.testing.assert_array_equal(own, draws[:, [1, 4]])
    own = array(share.take(ops.convert_to_tensor(draws[1])))
    np.testing.assert_array_equal(own, draws[1, [1, 4]])


def test_each_process_has_a_seed_of_its_own():
    seed = ops.convert_to_tensor([5, 7], "int32")
    seeds = [
        tuple(array(share.own_seed(seed)).tolist())
        for share in shares([1] * 64)
    ]
    assert seeds[0] == (5, 7)
    assert len(set(seeds)) == 64
