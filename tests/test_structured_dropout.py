"""DropKey, DropAttention and HiddenCut, against loops in NumPy."""

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_lora_dropout.core import structured_dropout as sd

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

ROWS, HEADS, QUERIES, KEYS = 3, 2, 5, 7


def scores_of(seed=0, scale=3.0):
    shape = ROWS, HEADS, QUERIES, KEYS
    return np.random.default_rng(seed).normal(0, scale, shape).astype("float32")


def valid_of(kind):
    """Keys that queries may see: all, without padding, or those before."""
    if kind is None:
        return None
    if kind == "padding":
        lengths = np.array([7, 4, 1])
        return (np.arange(KEYS) < lengths[:, None])[:, None, None, :]
    if kind == "left padding":
        return (np.arange(KEYS) >= np.array([0, 3, 6])[:, None])[:, None, None]
    return np.arange(KEYS) <= np.arange(QUERIES)[:, None][None, None]


KINDS = [None, "padding", "left padding", "causal"]


def draws_of(seed):
    return sd.DropoutDraws(keras.random.SeedGenerator(seed).next())


def drawn(rate, pattern, kind, seed=0, shape=(ROWS, HEADS, QUERIES, KEYS)):
    keep = sd.draw_keys(shape, valid_of(kind), rate, pattern, draws_of(seed))
    return np.broadcast_to(ops.convert_to_numpy(keep), shape)


def every_valid(kind):
    valid = valid_of(kind)
    shape = ROWS, HEADS, QUERIES, KEYS
    return np.broadcast_to(True if valid is None else valid, shape)


# Masks


def test_each_layer_has_a_stream_of_its_own():
    draws = draws_of(3)
    first, again, second = (
        ops.convert_to_numpy(draws.of_layer(stream).uniform((50, 4)))
        for stream in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3
    for drawn in first, second:
        assert 0 <= drawn.min() < 0.05 and 0.95 < drawn.max() < 1


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_entries_are_kept_independently_at_their_rate(rate):
    keep = ops.convert_to_numpy(draws_of(7).keep((40, 50, 101), rate))
    assert keep.shape == (40, 50, 101) and keep.dtype == bool
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation / np.sqrt(keep.size)
    # Of each position in a pair, too: two of them come out of one number.
    for half in keep[..., ::2], keep[..., 1::2]:
        error = deviation / np.sqrt(half.size)
        assert abs(half.mean() - (1 - rate)) < 4 * error
    centred = (keep - keep.mean()) / deviation
    for shift in 1, 2, 50:
        products = centred[..., shift:] * centred[..., :-shift]
        assert abs(products.mean()) < 4 / np.sqrt(products.size)


def test_entries_are_kept_at_the_ends_of_the_rates():
    draws = draws_of(0)
    assert ops.convert_to_numpy(draws.keep((100, 100), 0.0)).all()
    keep = ops.convert_to_numpy(draws.keep((1000, 100), 1 - 1e-9))
    assert keep.sum() < 12  # 1.5 expected.


def test_rows_of_an_instance_are_kept_alike():
    state = keras.random.SeedGenerator(0).next()
    draws = sd.DropoutDraws(state, num_instances=2, rows_alike=True)
    keep = ops.convert_to_numpy(draws.keep((6, 31), 0.5))
    np.testing.assert_array_equal(keep, keep[[0, 0, 0, 3, 3, 3]])
    assert (keep[0] != keep[3]).any()
    alone = ops.convert_to_numpy(draws.only(1).keep((3, 31), 0.5))
    np.testing.assert_array_equal(alone, keep[3:4])


@given(
    rate=st.floats(0, 0.99),
    pattern=st.sampled_from(sd.PATTERNS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_a_query_keeps_a_key_that_it_may_see(rate, pattern, kind, seed):
    keep, valid = drawn(rate, pattern, kind, seed), every_valid(kind)
    assert not (keep & ~valid).any()
    assert (keep.any(-1) == valid.any(-1)).all()
    if rate == 0:
        np.testing.assert_array_equal(keep, valid)


@pytest.mark.parametrize("kind", [None, "padding", "left padding"])
def test_columns_and_spans_are_the_same_for_all_queries(kind):
    for pattern in "column", "span":
        keep = drawn(0.5, pattern, kind)
        assert (keep == keep[:, :, :1]).all()
    assert (drawn(0.5, "element", kind) != drawn(0.5, "column", kind)).any()
    keep = drawn(0.5, "element", None)
    assert (keep != keep[:, :, :1]).any()


@pytest.mark.parametrize("pattern", sd.PATTERNS)
def test_rows_and_heads_are_drawn_apart(pattern):
    keep = drawn(0.5, pattern, None, shape=(16, 4, 3, 12))
    assert len({row.tobytes() for row in keep}) > 8
    assert any((row[0] != row[1]).any() for row in keep)


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_is_contiguous_among_the_valid_keys(kind):
    valid = every_valid(kind)
    for seed in range(20):
        keep = drawn(0.4, "span", kind, seed)
        for row in range(ROWS):
            for head in range(HEADS):
                # The last query sees all that any of them does.
                seen = np.flatnonzero(valid[row, head, -1])
                gone = np.flatnonzero(~keep[row, head, -1][seen])
                assert len(gone) in (
                    int(0.4 * len(seen)),
                    min(int(0.4 * len(seen)) + 1, len(seen) - 1),
                )
                if len(gone):
                    assert gone[-1] - gone[0] == len(gone) - 1


@pytest.mark.parametrize("pattern", sd.PATTERNS)
@pytest.mark.parametrize("rate", [0.1, 0.45])
def test_the_share_of_dropped_keys(pattern, rate):
    keep = drawn(rate, pattern, None, shape=(4000, 1, 1, 20))
    # Of 4,000 rows of 20 keys; the deviation of a row's share is below 0.12.
    assert abs((~keep).mean() - rate) < 4 * 0.12 / np.sqrt(4000)


def test_the_last_chance_takes_each_key_alike():
    keep = drawn(0.99, "column", None, shape=(6000, 1, 1, 3))
    alone = keep[keep.sum(-1) == 1]
    assert len(alone) > 0.99 * len(keep)  # Of 3, two stay once in 3,000 rows.
    share = alone.reshape(-1, 3).mean(0)
    assert abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / len(alone))


# Attention


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(scores, keep):
    """Softmax over the kept keys of each query, one after another."""
    weights = np.zeros_like(scores)
    for place in np.ndindex(scores.shape[:-1]):
        kept = keep[place]
        if kept.any():
            weights[place][kept] = softmax(scores[place][kept])
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", sd.PATTERNS)
def test_both_positions_against_numpy(pattern, kind):
    scores, keep = scores_of(), drawn(0.4, pattern, kind)
    expected = reference(scores, keep)
    assert_close(sd.drop_keys(scores, keep), expected)
    assert_close(sd.drop_attention(scores, keep, valid_of(kind)), expected)


def test_attention_in_low_precision():
    scores = ops.cast(scores_of(), "bfloat16")
    keep = drawn(0.4, "column", None)
    for weights in (
        sd.drop_keys(scores, keep),
        sd.drop_attention(scores, keep),
    ):
        assert keras.backend.standardize_dtype(weights.dtype) == "bfloat16"
        expected = reference(array(ops.cast(scores, "float32")), keep)
        assert_close(ops.cast(weights, "float32"), expected, 0.01)


def gradient(function, scores, coefficients):
    """Gradient of `sum(coefficients * function(scores))`."""

    def total(x):
        return ops.sum(ops.multiply(function(x), coefficients))

    if BACKEND == "jax":
        import jax

        return np.asarray(jax.grad(total)(scores))
    if BACKEND == "torch":
        import torch

        leaf = torch.tensor(scores, requires_grad=True)
        total(leaf).backward()
        return leaf.grad.numpy()
    import tensorflow as tf

    leaf = tf.Variable(scores)
    with tf.GradientTape() as tape:
        result = total(leaf.value())
    return tape.gradient(result, leaf).numpy()


def expected_gradient(scores, keep, valid, coefficients, constant):
    """Of one query after another, by the derivative of the softmax."""
    result = np.zeros_like(scores)
    for place in np.ndindex(scores.shape[:-1]):
        kept, seen = keep[place], valid[place]
        if not kept.any():
            continue
        dropped = np.zeros(len(kept))
        dropped[kept] = softmax(scores[place][kept])
        full = np.zeros(len(kept))
        full[seen] = softmax(scores[place][seen])
        inner = full if constant else dropped
        jacobian = np.diag(dropped) - np.outer(dropped, inner)
        result[place] = coefficients[place] @ jacobian
    return result


@pytest.mark.parametrize("kind", [None, "padding", "causal"])
@pytest.mark.parametrize("pattern", sd.PATTERNS)
def test_gradients_of_both_positions(pattern, kind):
    scores, keep = scores_of(), drawn(0.4, pattern, kind)
    coefficients = scores_of(1)
    valid = every_valid(kind)
    found = gradient(lambda x: sd.drop_keys(x, keep), scores, coefficients)
    expected = expected_gradient(scores, keep, valid, coefficients, False)
    assert_close(found, expected, 1e-4)

    found = gradient(
        lambda x: sd.drop_attention(x, keep, valid_of(kind)),
        scores,
        coefficients,
    )
    expected = expected_gradient(scores, keep, valid, coefficients, True)
    assert_close(found, expected, 1e-4)


def test_the_constant_sum_is_all_that_sets_the_positions_apart(monkeypatch):
    scores, keep = scores_of(), drawn(0.4, "element", None)
    coefficients = scores_of(1)
    monkeypatch.setattr(sd.ops, "stop_gradient", lambda x: x)
    both = [
        gradient(lambda x, f=f: f(x, keep), scores, coefficients)
        for f in (sd.drop_keys, sd.drop_attention)
    ]
    assert_close(*both, 1e-4)


def test_ratio_of_the_gradients():
    """That of a kept key to its own score is k times larger for DropKey."""
    scores = np.array([[0.3, -1.0, 2.0, 0.5]], "float32")
    keep = np.array([[True, True, False, True]])
    for key in np.flatnonzero(keep[0]):
        one = np.eye(4, dtype="float32")[key][None]
        ours, theirs = (
            gradient(lambda x, f=f: f(x, keep), scores, one)[0, key]
            for f in (sd.drop_keys, sd.drop_attention)
        )
        e = np.exp(scores[0])
        k = (1 - e[key] / e[keep[0]].sum()) / (1 - e[key] / e.sum())
        assert k < 1
        assert ours / theirs == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_no_nan_with_one_key_at_a_high_rate(size):
    """However little of the weight is left, nothing is divided by zero."""
    scores = size * scores_of()
    for pattern in sd.PATTERNS:
        for kind in KINDS:
            keep = drawn(0.99, pattern, kind)
            for function, more in (
                (sd.drop_keys, (keep,)),
                (sd.drop_attention, (keep, valid_of(kind))),
            ):
                weights = array(function(scores, *more))
                assert np.isfinite(weights).all()
                assert_close(weights.sum(-1), every_valid(kind).any(-1), 1e-5)
                slope = gradient(
                    lambda x, f=function, m=more: f(x, *m),
                    scores,
                    scores_of(1),
                )
                assert np.isfinite(slope).all()


# Hidden representations


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("pattern", sd.PATTERNS)
def test_hidden_cut(pattern, rescale):
    rows, positions, features = 400, 10, 6
    hidden = np.ones((rows, positions, features), "float32")
    draws = draws_of(0)
    cut = array(sd.cut_hidden(hidden, 0.25, pattern, rescale, draws))
    kept = cut != 0
    assert_close(cut[kept], 1 / 0.75 if rescale else 1.0)
    deviation = {"element": 1 / 60, "column": 1 / 6, "span": 1 / 10}[pattern]
    error = np.sqrt(0.25 * 0.75 * deviation / rows)
    assert abs((~kept).mean() - 0.25) < 4 * error
    if pattern == "column":
        assert (kept == kept[:, :1]).all()
    if pattern == "span":
        assert (kept == kept[..., :1]).all()
        for row in kept[..., 0]:
            gone = np.flatnonzero(~row)
            assert len(gone) in (2, 3)
            assert gone[-1] - gone[0] == len(gone) - 1
        # A run may begin at either end, and anywhere between.
        assert not kept[:, 0].all() and not kept[:, -1].all()
    if pattern == "element":
        assert (kept != kept[:, :1]).any() and (kept != kept[..., :1]).any()
    assert len({row.tobytes() for row in kept}) > 5


def test_hidden_cut_keeps_the_dtype():
    hidden = ops.ones((2, 3, 4), "bfloat16")
    cut = sd.cut_hidden(hidden, 0.5, "element", True, draws_of(0))
    assert keras.backend.standardize_dtype(cut.dtype) == "bfloat16"
    whole = sd.cut_hidden(scores_of()[0], 0.0, "span", True, draws_of(0))
    assert_close(whole, scores_of()[0])
