"""From the scores of tokens to the text of an answer."""

import itertools

import numpy as np

from keras_lora_dropout.core import validation
from keras_lora_dropout.question_answering.windows import AnswerWindows


def best_span(start_scores, end_scores, allowed, max_length=30):
    """Find the span of tokens with the highest score.

    Args:
        start_scores: Array of shape `(windows, length)`. Score, such as the
            logit, of each token as the first of the answer.
        end_scores: Array of the same shape. Score as the last one.
        allowed: Boolean array of the same shape. Where an answer may start and
            end: on the tokens of the context.
        max_length: Positive integer. Most tokens of an answer.

    Returns:
        Tuple of window, first token, last token and score, the sum of the two;
        `None` if no token is allowed.

    Raises:
        ValueError: If shapes differ, a score is NaN, or `max_length` is not
            positive.

    Example:

    >>> best_span([[0, 1, 3]], [[0, 9, 4]], [[False, True, True]], max_length=2)
    (0, 1, 1, 10.0)
    """
    max_length = validation.positive_integer("max_length", max_length)
    start_scores = _numbers("start_scores", start_scores)
    end_scores = _numbers("end_scores", end_scores)
    allowed = _numbers("allowed", allowed).astype(bool)
    shapes = start_scores.shape, end_scores.shape, allowed.shape
    if start_scores.ndim != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "Scores of starts and ends need the shape (windows, length) of "
            f"the tokens. Received: {shapes[0]}, {shapes[1]}, and tokens of "
            f"shape {shapes[2]}."
        )
    if np.isnan(start_scores).any() or np.isnan(end_scores).any():
        raise ValueError(
            "Scores must be numbers. Received: NaN; look for what made the "
            "model diverge."
        )
    if not start_scores.size:
        return None
    length = start_scores.shape[1]
    start = np.where(allowed, start_scores, -np.inf)
    end = np.where(allowed, end_scores, -np.inf)
    best, found = -np.inf, None
    for extra in range(min(max_length, length)):
        scores = start[:, : length - extra] + end[:, extra:]
        place = int(np.argmax(scores))
        window, first = divmod(place, length - extra)
        if scores[window, first] > best:
            best = scores[window, first]
            found = window, first, first + extra, float(best)
    return found


def decode_answer(
    start_scores,
    end_scores,
    spans,
    context,
    *,
    max_length=30,
    null_threshold=None,
):
    """Return the answer to one question, as text of its context.

    Each window of a long context has scores of its own, and the best span of
    them all is the answer. A question may have no answer (SQuAD v2.0) if there
    is a `null_threshold`: windows vote for that with their first token.

    Reference: [Devlin et al., 2019](https://arxiv.org/abs/1810.04805), section
    4.3.

    Args:
        start_scores: Array of shape `(windows, length)`. Score, such as the
            logit, of each token as the first of the answer.
        end_scores: Array of the same shape. Score as the last one.
        spans: Integer array of shape `(windows, length, 2)`. Where the text of
            each token starts and ends in the context, in characters; negative
            for tokens that are none of the context's.
        context: String.
        max_length: Positive integer. Most tokens of an answer.
        null_threshold: Number, or `None` if there always is an answer. The
            answer is `""` if the best score of no answer is more than this
            above the best score of a span.

    Returns:
        String, a part of the context, or `""`.

    Raises:
        TypeError: If `context` is no string.
        ValueError: As from `best_span`, and if `spans` do not fit the scores
            or `null_threshold` is no number.

    Example:

    >>> spans = [[[-1, -1], [0, 6], [7, 14]]]
    >>> decode_answer([[0, 1, 3]], [[0, 2, 4]], spans, "Denver Broncos")
    'Broncos'
    """
    if not isinstance(context, str):
        raise TypeError(
            "`context` must be a string. Received: context="
            f"{validation.shown(context)} (of type {type(context).__name__})."
        )
    if null_threshold is not None:
        null_threshold = _threshold(null_threshold)
    spans = _numbers("spans", spans)
    is_place = np.abs(spans) <= validation.MAX_INTEGER
    if spans.ndim != 3 or spans.shape[2] != 2 or not is_place.all():
        raise ValueError(
            "`spans` needs the shape (windows, length, 2), and places in a "
            f"text. Received: spans of shape {spans.shape}, {spans}."
        )
    spans = spans.astype("int64")
    allowed = spans[:, :, 0] >= 0
    found = best_span(start_scores, end_scores, allowed, max_length)
    if found is None:
        return ""
    window, first, last, score = found
    if null_threshold is not None:
        null = np.min(np.add(start_scores, end_scores)[:, 0])
        if null - score > null_threshold:
            return ""
    return context[spans[window][first][0] : spans[window][last][1]]


def decode_answers(logits, windows, *, max_length=30, null_threshold=None):
    """Return the answers to all questions that windows were made of.

    Args:
        logits: Array of shape `(windows, 2, length)`: what `predict` or
            `ensemble_predict` of an `ExtractiveQA` return for
            `windows.inputs`. Scores of starts and of ends, which are added up.
        windows: `AnswerWindows`.
        max_length, null_threshold: As in `decode_answer`.

    Returns:
        List of strings, one for each question.

    Raises:
        TypeError: If `windows` are no `AnswerWindows`.
        ValueError: If the logits are not those of the windows, or one is NaN,
            or an argument is out of range.

    Example:

    >>> windows = AnswerWindows(
    ...     inputs={"token_ids": np.array([[2, 5, 6, 3]])},
    ...     spans=np.array([[[-1, -1], [0, 6], [7, 14], [-1, -1]]]),
    ...     questions=np.array([0]),
    ...     contexts=("Denver Broncos",),
    ... )
    >>> decode_answers([[[0, 1, 3, 0], [0, 2, 4, 0]]], windows)
    ['Broncos']
    """
    if not isinstance(windows, AnswerWindows):
        raise TypeError(
            "`windows` must be what `make_windows` returned. Received: windows="
            f"{validation.shown(windows)} (of type {type(windows).__name__})."
        )
    logits = _numbers("logits", logits)
    count, length = windows.spans.shape[:2]
    if logits.shape != (count, 2, length):
        raise ValueError(
            "Logits need the shape (windows, 2, length) of the windows, here "
            f"{(count, 2, length)}. Received: {logits.shape}. Pass what "
            "`model.predict(windows.inputs)` returns."
        )
    bounds = np.searchsorted(
        windows.questions, np.arange(len(windows.contexts) + 1)
    )
    return [
        decode_answer(
            logits[first:stop, 0],
            logits[first:stop, 1],
            windows.spans[first:stop],
            context,
            max_length=max_length,
            null_threshold=null_threshold,
        )
        for context, (first, stop) in zip(
            windows.contexts, itertools.pairwise(bounds), strict=True
        )
    ]


def _numbers(name, values):
    """Return an array of numbers, or booleans; raise if it is none."""
    array = validation.numbers_of(values, booleans=True)
    if array is None:
        raise ValueError(
            f"`{name}` must be an array of numbers. Received: "
            f"{name}={validation.shown(values)} (of type "
            f"{type(values).__name__})."
        )
    return array


def _threshold(value):
    """The threshold as `float`, of either sign; raise if it is no number."""
    found = validation.real(value)
    if found is None or np.isnan(found):
        raise ValueError(
            "`null_threshold` must be a number, or None. Received: "
            f"null_threshold={validation.shown(value)} (of type "
            f"{type(value).__name__})."
        )
    return found
