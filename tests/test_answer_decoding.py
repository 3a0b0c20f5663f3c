"""Answers are the best spans: by brute force, and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lora_dropout.question_answering.decoding import best_span
from keras_lora_dropout.question_answering.decoding import decode_answer

CONTEXT = "Denver beat Carolina"
# "[CLS] who ? [SEP] Denver beat Caro ##lina [SEP]", in two windows.
SPANS = np.full((2, 7, 2), -1)
SPANS[0, 2:5] = [[0, 6], [7, 11], [12, 16]]
SPANS[1, 2:5] = [[7, 11], [12, 16], [16, 20]]


@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_best_of_all_spans(windows, length, max_length, seed):
    generator = np.random.default_rng(seed)
    start, end = generator.normal(size=(2, windows, length))
    allowed = generator.uniform(size=(windows, length)) < 0.6
    spans = {
        (window, first, last): start[window, first] + end[window, last]
        for window in range(windows)
        for first, last in itertools.combinations_with_replacement(
            range(length), 2
        )
        if allowed[window, first] and allowed[window, last]
        if last - first < max_length
    }
    found = best_span(start, end, allowed, max_length)
    if not spans:
        assert found is None
    else:
        best = max(spans, key=spans.get)
        assert found[:3] == best
        assert found[3] == pytest.approx(spans[best])


def scores(window, first, last, score=5.0):
    """Scores of tokens with one span above all others."""
    start, end = np.zeros((2, *SPANS.shape[:2]))
    start[window, first] = end[window, last] = score / 2
    return start, end


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ((0, 2, 2), "Denver"),
        ((0, 2, 3), "Denver beat"),
        ((1, 3, 4), "Carolina"),
        ((1, 2, 4), "beat Carolina"),
    ],
)
def test_text_of_the_best_span(place, text):
    assert decode_answer(*scores(*place), SPANS, CONTEXT) == text


def test_answers_lie_in_the_context():
    start, end = scores(0, 0, 1)  # The question has the highest score.
    start[1, 4] = end[1, 4] = 0.5
    assert decode_answer(start, end, SPANS, CONTEXT) == "lina"
    nothing = np.full_like(SPANS, -1)
    assert decode_answer(start, end, nothing, CONTEXT) == ""


def test_no_answer():
    start, end = scores(0, 2, 2)
    # The first tokens' sum is 6 in one window, and 7 in the other: 6 counts.
    start[:, 0], end[:, 0] = [3, 4], 3
    for threshold, text in ((0.5, ""), (0.99, ""), (1.0, "Denver")):
        found = decode_answer(
            start, end, SPANS, CONTEXT, null_threshold=threshold
        )
        assert found == text
    assert decode_answer(start, end, SPANS, CONTEXT) == "Denver"


def test_wrong_scores():
    start, end = scores(0, 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 7\), \(2, 6\)"):
        decode_answer(start, end[:, :6], SPANS, CONTEXT)
    start[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        decode_answer(start, end, SPANS, CONTEXT)
