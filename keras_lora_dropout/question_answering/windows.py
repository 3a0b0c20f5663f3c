"""Questions and contexts as windows of a fixed length: a model's inputs."""

import dataclasses
import numbers
import typing

import keras
import numpy as np
from keras_hub import layers
from keras_hub import models

from keras_lora_dropout.core import validation
from keras_lora_dropout.question_answering.offsets import tokenize_with_spans

# Windows that the packer gets at once, as Python lists.
_BATCH = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerWindows:
    """Questions, each with a stretch of its context.

    The windows of a question follow one another, in the order of the context,
    and each question has one at the least.

    Attributes:
        inputs: Dictionary of the model's inputs, arrays of shape `(windows,
            length)`: `"token_ids"`, and what else the encoder takes of
            `"padding_mask"` and `"segment_ids"`.
        spans: Integer array of shape `(windows, length, 2)`. Where the text of
            each token starts and ends in the context, in characters; -1 for
            tokens that are none of the context's.
        questions: Integer array of shape `(windows,)`. Number of the question
            of each window; numbers never decrease.
        contexts: Tuple of strings, the context of each question.
        targets: Integer array of shape `(windows, 2)`, or `None` if no answers
            were given. Positions of the answer's first and last token; twice 0,
            the first token of all, where the window has not the whole answer.

    Example:

    >>> windows = AnswerWindows(
    ...     inputs={"token_ids": np.array([[2, 7, 3, 5, 6, 3]])},
    ...     spans=np.array([[[-1, -1]] * 3 + [[0, 6], [7, 14], [-1, -1]]]),
    ...     questions=np.array([0]),
    ...     contexts=("Denver Broncos",),
    ... )
    >>> start, end = windows.spans[0, 4]
    >>> windows.contexts[0][start:end]
    'Broncos'
    """

    inputs: dict
    spans: np.ndarray
    questions: np.ndarray
    contexts: tuple
    targets: np.ndarray | None = None


def make_windows(
    preprocessor,
    questions,
    contexts,
    answers=None,
    *,
    doc_stride=128,
    max_question_length=64,
):
    """Make windows of questions and their contexts.

    A window holds a question, and as much of its context as fits. A longer
    context is spread over several windows that overlap. Special tokens are
    those that the preprocessor's packer puts around two texts.

    Reference: [Devlin et al., 2019](https://arxiv.org/abs/1810.04805), section
    4.2, and its published program for SQuAD.

    Args:
        preprocessor: A KerasHub `TextClassifierPreprocessor`, such as
            `BertTextClassifierPreprocessor.from_preset(preset)`. Its
            `sequence_length` is the length of the windows, 384 in most work on
            SQuAD.
        questions: List of strings.
        contexts: List of strings, one for each question. Equal ones are
            tokenized once.
        answers: List of `(text, start)`, one for each question: the answer and
            where it starts in the context, in characters; `None` for a question
            without an answer. `None` in the place of the list to predict.
        doc_stride: Non-negative integer. Tokens of the context that two
            neighbouring windows share, as in Hugging Face's `run_qa`; in BERT's
            own program the name means the tokens from one start to the next.
            Defaults to 128.
        max_question_length: Positive integer. Most tokens of a question; the
            rest of a longer one is cut off. Defaults to 64.

    Returns:
        `AnswerWindows`.

    Raises:
        TypeError: If the preprocessor packs no two texts, or what should be a
            list of strings is none.
        ValueError: If there are no questions or not one context for each, if
            an answer is not where it is said to be, if the longest question
            would leave no more tokens for the context than `doc_stride`, if
            UTF-8 cannot hold a text, or if a number is out of range.

    Example:

    >>> import keras_hub
    >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] who won ? Denver did".split()
    >>> preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
    ...     keras_hub.models.BertTokenizer(words), sequence_length=9
    ... )
    >>> windows = make_windows(
    ...     preprocessor,
    ...     ["who won?"],
    ...     ["Denver did"],
    ...     [("Denver", 0)],
    ...     doc_stride=1,
    ...     max_question_length=3,
    ... )
    >>> windows.inputs["token_ids"].tolist()
    [[2, 5, 6, 7, 3, 8, 9, 3, 0]]
    >>> windows.targets.tolist()
    [[5, 5]]
    """
    questions = validation.as_list("questions", questions)
    contexts = validation.as_list("contexts", contexts)
    if answers is not None:
        answers = validation.as_list("answers", answers, "`(text, start)`")
    doc_stride = validation.integer("doc_stride", doc_stride, 0)
    max_question_length = validation.positive_integer(
        "max_question_length", max_question_length
    )
    _check_data(questions, contexts, answers)
    packer, input_names = _packing(preprocessor)
    special = len(packer.start_value + packer.sep_value + packer.end_value)
    space = packer.sequence_length - special
    _check_space(space, packer.sequence_length, doc_stride, max_question_length)

    tokens_of = _tokenized(preprocessor.tokenizer, questions + contexts)
    rows = []
    for number, question in enumerate(questions):
        asked = tokens_of[question][0][:max_question_length]
        told, spans = tokens_of[contexts[number]]
        answer = _answer_tokens(spans, answers[number]) if answers else None
        before = len(packer.start_value) + len(asked) + len(packer.sep_value)
        room = space - len(asked)
        for start in _window_starts(len(told), room, doc_stride):
            shown = slice(start, start + room)
            target = _target(answer, start, len(told[shown]), before)
            rows.append(
                _Row(number, asked, told[shown], spans[shown], before, target)
            )
    arrays = _packed(packer, rows)
    return AnswerWindows(
        inputs={name: arrays[name] for name in input_names},
        spans=_placed_spans(rows, packer.sequence_length),
        questions=np.array([row.number for row in rows], "int32"),
        contexts=tuple(contexts),
        targets=(
            np.array([row.target for row in rows], "int32") if answers else None
        ),
    )


class _Row(typing.NamedTuple):
    """One window.

    Attributes:
        number: Number of the question.
        question: Token ids of the question.
        context: Token ids of the context that the window shows.
        spans: Their characters.
        before: Tokens that stand before them in the window.
        target: Positions of the answer's first and last token.
    """

    number: int
    question: np.ndarray
    context: np.ndarray
    spans: np.ndarray
    before: int
    target: tuple


def _tokenized(tokenizer, texts):
    """Return ids and spans by text."""
    texts = list(dict.fromkeys(texts))
    return dict(zip(texts, tokenize_with_spans(tokenizer, texts), strict=True))


def _window_starts(count, room, doc_stride):
    """Return where windows start among the tokens of a context."""
    return range(0, max(count - doc_stride, 1), room - doc_stride)


def _answer_tokens(spans, answer):
    """Return the first and last token with a character of the answer.

    `None` if there is no answer, or no token has one.
    """
    if answer is None:
        return None
    text, start = answer
    first, last = np.maximum(spans[:, 0], start), spans[:, 1]
    found = np.flatnonzero(first < np.minimum(last, start + len(text)))
    return (found[0], found[-1]) if len(found) else None


def _target(answer, start, count, before):
    """Return the positions of the answer in a window that has all of it."""
    if answer is None or answer[0] < start or answer[1] >= start + count:
        return 0, 0
    return before + answer[0] - start, before + answer[1] - start


def _packed(packer, rows):
    """Return arrays of all windows, by the name of the model's input."""
    token_ids = np.empty((len(rows), packer.sequence_length), "int32")
    segment_ids = np.empty_like(token_ids)
    for start in range(0, len(rows), _BATCH):
        batch = slice(start, start + _BATCH)
        segments = (
            [row.question.tolist() for row in rows[batch]],
            [row.context.tolist() for row in rows[batch]],
        )
        token_ids[batch], segment_ids[batch] = map(
            keras.ops.convert_to_numpy, packer(segments)
        )
    return {
        "token_ids": token_ids,
        "padding_mask": token_ids != packer.pad_value,
        "segment_ids": segment_ids,
    }


def _placed_spans(rows, length):
    """Return the spans of all windows, -1 where no context is."""
    spans = np.full((len(rows), length, 2), -1, "int32")
    for placed, row in zip(spans, rows, strict=True):
        placed[row.before : row.before + len(row.spans)] = row.spans
    return spans


def _packing(preprocessor):
    """Return a preprocessor's packer, and the names of the inputs it makes."""
    if isinstance(preprocessor, models.TextClassifierPreprocessor):
        if not preprocessor.built:
            preprocessor.build(None)
        if isinstance(preprocessor.packer, layers.MultiSegmentPacker):
            return preprocessor.packer, list(preprocessor(x=(["a"], ["a"])))
    raise TypeError(
        "Windows of a question and a context need a preprocessor that packs "
        "two texts, a KerasHub `TextClassifierPreprocessor` such as "
        f"`BertTextClassifierPreprocessor`. Received: {preprocessor!r} (of "
        f"type {type(preprocessor).__name__})."
    )


def _check_space(space, length, doc_stride, max_question_length):
    room = space - max_question_length
    if room > doc_stride:
        return
    raise ValueError(
        "A window must have room for more tokens of the context than "
        "`doc_stride`, those that it shares with the next one. Received: "
        f"windows of sequence_length={length} tokens, of which a question "
        f"takes max_question_length={max_question_length} and special tokens "
        f"take {length - space}, so that {max(room, 0)} are left; "
        f"doc_stride={doc_stride}. Make `preprocessor.sequence_length` larger, "
        "or one of the other two smaller."
    )


def _check_data(questions, contexts, answers):
    counts = {"questions": len(questions), "contexts": len(contexts)}
    if answers is not None:
        counts["answers"] = len(answers)
    if len(set(counts.values())) > 1 or not questions:
        received = ", ".join(
            f"{count} {name}" for name, count in counts.items()
        )
        raise ValueError(
            "There must be a question, and for each question one context, and "
            f"one answer if answers are given. Received: {received}."
        )
    for name, texts in (("question", questions), ("context", contexts)):
        for number, text in enumerate(texts):
            where = f" for question {number}"
            validation.check_text(f"A {name}", text, where)
    for number, answer in enumerate(answers or []):
        if answer is not None:
            _check_answer(number, answer, contexts[number])


def _check_answer(number, answer, context):
    match answer:
        case (str() as text, numbers.Integral() as start) if text:
            found = context[max(start, 0) :][: len(text)]
        case _:
            raise TypeError(
                "An answer must be `(text, start)`: its text and where it "
                "starts in the context, or `None` if there is none. Received: "
                f"{answer!r} for question {number}."
            )
    if start < 0 or found != text:
        raise ValueError(
            f"The answer {text!r} of question {number} is not at character "
            f"{start} of its context. Received: {(text, start)!r}, where there "
            f"is {found!r}. Count characters, not bytes, in the context as it "
            "is given here."
        )
