"""SQuAD's own scores of answers: exact match and F1.

As the official scripts of v1.1 and v2.0 compute them
(https://rajpurkar.github.io/SQuAD-explorer/).
"""

import collections
import dataclasses
import re
import string

from keras_lora_dropout.core import validation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Scores of many answers, in percent.

    Attributes:
        exact_match: Share of answers that are one of the accepted ones.
        f1: Mean overlap of words with the best of the accepted ones.
        count: Number of questions.

    Example:

    >>> AnswerScores(exact_match=50.0, f1=75.0, count=2).f1
    75.0
    """

    exact_match: float
    f1: float
    count: int


def score_answers(predictions, accepted):
    """Compute exact match and F1 of predicted answers.

    Answers are compared without case, ASCII punctuation, articles and extra
    spaces, and the best of a question's accepted answers counts. An
    accepted answer of which nothing is left is none, as in v2.0's script.

    Args:
        predictions: List of strings, one for each question; `""` for no
            answer.
        accepted: List of lists of strings, the accepted answers of each
            question; an empty list for a question without an answer, as in
            SQuAD v2.0.

    Returns:
        `AnswerScores`.

    Raises:
        TypeError: If a prediction is no string, or accepted answers are no
            list of strings.
        ValueError: If there are no questions, or not one prediction for each.

    Example:

    >>> found = score_answers(["the Broncos"], [["Denver Broncos", "Broncos"]])
    >>> found.exact_match, found.f1
    (100.0, 100.0)
    """
    predictions = validation.as_list("predictions", predictions)
    accepted = validation.as_list("accepted", accepted, "lists of strings")
    _check(predictions, accepted)
    exact, overlap = 0.0, 0.0
    for prediction, answers in zip(predictions, accepted, strict=True):
        # An answer of articles and punctuation alone counts as none (v2.0).
        answers = [a for a in answers if normalize_answer(a)] or [""]
        exact += max(_is_same(prediction, answer) for answer in answers)
        overlap += max(_f1(prediction, answer) for answer in answers)
    count = len(predictions)
    return AnswerScores(100 * exact / count, 100 * overlap / count, count)


def normalize_answer(text):
    """Return an answer without case, punctuation, articles, extra spaces.

    Args:
        text: String.

    Returns:
        String; its words are separated by single spaces.

    Raises:
        TypeError: If `text` is no string.

    Example:

    >>> normalize_answer("The  Denver Broncos!")
    'denver broncos'
    """
    if not isinstance(text, str):
        raise TypeError(
            f"`text` must be a string. Received: text={text!r} "
            f"(of type {type(text).__name__})."
        )
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _is_same(prediction, answer):
    return normalize_answer(prediction) == normalize_answer(answer)


def _f1(prediction, answer):
    words = normalize_answer(prediction).split()
    expected = normalize_answer(answer).split()
    if not words or not expected:
        return float(words == expected)
    common = collections.Counter(words) & collections.Counter(expected)
    shared = sum(common.values())
    # 2 / (1 / precision + 1 / recall); 0 without a word in common.
    return 2 * shared / (len(words) + len(expected))


def _check(predictions, accepted):
    if len(predictions) != len(accepted) or not predictions:
        raise ValueError(
            "There must be one prediction and one list of accepted answers "
            f"for each question, and a question. Received: {len(predictions)} "
            f"predictions, {len(accepted)} lists of accepted answers."
        )
    for number, (text, answers) in enumerate(
        zip(predictions, accepted, strict=True)
    ):
        if not isinstance(text, str):
            raise TypeError(
                'A prediction must be a string, "" for no answer. Received: '
                f"{text!r} (of type {type(text).__name__}) for question "
                f"{number}."
            )
        is_list = isinstance(answers, (list, tuple))
        if not is_list or not all(isinstance(a, str) for a in answers):
            raise TypeError(
                "Accepted answers must be a list of strings, empty for a "
                f"question without an answer. Received: {answers!r} for "
                f"question {number}."
            )
