"""What to drive the public names of texts and plots with."""

import functools

import families
import keras_hub
import numpy as np
from fuzzed_calls import BOOLEAN
from fuzzed_calls import BOUND
from fuzzed_calls import PREDICTIONS
from fuzzing import Call
from fuzzing import one_of
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from keras_lora_dropout import plots
from keras_lora_dropout.instruction_tuning import prompts
from keras_lora_dropout.instruction_tuning import response_data
from keras_lora_dropout.question_answering import decoding
from keras_lora_dropout.question_answering import offsets
from keras_lora_dropout.question_answering import scores
from keras_lora_dropout.question_answering import windows

# Text.


class Bytes:
    """A tokenizer with a token for each byte."""

    start_token_id, end_token_id = 256, 257

    def __call__(self, text):
        return list(text.encode())


@functools.cache
def tokenizer():
    words = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + families.WORDS
    return keras_hub.models.BertTokenizer(words)


@functools.cache
def preprocessor():
    return keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer(), sequence_length=12
    )


def check_response_data(result, arguments):
    length = arguments["sequence_length"]
    assert result.x["token_ids"].shape[1] == length == result.y.shape[1]
    assert result.num_response_tokens > 0
    assert 0 <= result.sample_weight.min() <= result.sample_weight.max() == 1


def check_spans(result, arguments):
    text = arguments["text"]
    pairs = [(result, text)] if isinstance(text, str) else []
    if not isinstance(text, str):
        pairs = zip(result, text, strict=True)
    for (ids, spans), one in pairs:
        assert len(ids) == len(spans)
        assert ((spans >= 0) & (spans <= len(one))).all()


def check_best_span(result, arguments):
    if result is None:
        return
    window, first, last, score = result
    assert 0 <= last - first < arguments["max_length"]
    allowed = np.asarray(arguments["allowed"])
    assert allowed[window, first] and allowed[window, last]
    start, end = arguments["start_scores"], arguments["end_scores"]
    assert score == start[window][first] + end[window][last]


def check_scores(result, arguments):
    assert result.count == len(arguments["predictions"])
    assert 0 <= result.exact_match <= result.f1 + 1e-9 <= 100 + 1e-6


SCORES = one_of([[0, 1, 3]], [[0.5, 2, 4]], [[-1, 0, 1], [2, 3, 4]])
ALLOWED = one_of([[False, True, True]], [[True] * 3] * 2, [[False] * 3])
SPANS = one_of(
    [[[-1, -1], [0, 6], [7, 14]]],
    np.array([[[-1, -1], [0, 6], [7, 14]]] * 2),
)
WINDOWS = windows.AnswerWindows(
    inputs={"token_ids": np.array([[2, 5, 6]])},
    spans=np.array([[[-1, -1], [0, 6], [7, 14]]]),
    questions=np.array([0]),
    contexts=("Denver Broncos",),
)
TEXT = {
    "alpaca_prompt": Call(
        prompts.alpaca_prompt,
        {"instruction": st.text(min_size=1), "input": st.text()},
        lambda result, arguments: result.index(arguments["instruction"]),
    ),
    "make_response_data": Call(
        response_data.make_response_data,
        {
            "tokenizer": st.just(Bytes()),
            "prompts": one_of(["ab"], ["a", ""], ("a", "bcd")),
            "responses": one_of(["cd"], ["x", ""], ("x", "y")),
            "sequence_length": one_of(1, 5, 8, np.int64(9)),
            "packed": BOOLEAN,
        },
        check_response_data,
        count=100,
    ),
    "tokenize_with_spans": Call(
        offsets.tokenize_with_spans,
        {
            "tokenizer": st.deferred(lambda: st.just(tokenizer())),
            "text": st.one_of(
                st.just(families.TEXTS[0]), st.just(families.TEXTS[:2])
            ),
        },
        check_spans,
        count=30,
    ),
    "make_windows": Call(
        windows.make_windows,
        {
            "preprocessor": st.deferred(lambda: st.just(preprocessor())),
            "questions": one_of(["fox"], ["dog", "dog"]),
            "contexts": one_of(["the fox"], ["a dog", "the quick dog"]),
            "answers": one_of(None, [("fox", 4)], [("dog", 2), None]),
            "doc_stride": one_of(0, 1, np.int64(2)),
            "max_question_length": one_of(1, 3, np.int64(2)),
        },
        lambda result, _: result.spans.shape[2] == 2,
        count=30,
    ),
    "best_span": Call(
        decoding.best_span,
        {
            "start_scores": SCORES,
            "end_scores": SCORES,
            "allowed": ALLOWED,
            "max_length": one_of(1, 2, 30, np.int64(2)),
        },
        check_best_span,
        count=100,
    ),
    "decode_answer": Call(
        decoding.decode_answer,
        {
            "start_scores": SCORES,
            "end_scores": SCORES,
            "spans": SPANS,
            "context": st.just("Denver Broncos"),
            "max_length": one_of(1, 2, 30),
            "null_threshold": one_of(None, 0, 0.5, -3, np.float32(1)),
        },
        lambda result, arguments: arguments["context"].index(result),
        count=100,
    ),
    "decode_answers": Call(
        decoding.decode_answers,
        {
            "logits": one_of(np.ones((1, 2, 3)), [[[0, 1, 3], [0, 2, 4]]]),
            "windows": st.just(WINDOWS),
            "max_length": one_of(1, 2, 30),
            "null_threshold": one_of(None, 0, 0.5),
        },
        lambda result, _: "Denver Broncos".index(*result),
    ),
    "score_answers": Call(
        scores.score_answers,
        {
            "predictions": st.lists(st.text(max_size=5), max_size=2),
            "accepted": st.lists(st.lists(st.text(max_size=5)), max_size=2),
        },
        check_scores,
        count=100,
    ),
    "normalize_answer": Call(
        scores.normalize_answer,
        {"text": st.text()},
        lambda result, _: result.encode("utf-8", "surrogatepass"),
    ),
}


# Plots.


def drawn(function):
    """A plot whose figure is closed; a failing one must not leave any."""

    def draw(**arguments):
        ax = function(**arguments)
        plt.close(ax.figure)
        return ax

    return draw


def check_axes(ax, arguments):
    assert isinstance(ax, plt.Axes)


HISTORY = {"val_loss": [3.0, 1.0, 2.0], "val_accuracy": [0.5, 0.6, np.nan]}
RANKS = {"first": [2, 2, 1], "second": [2, 1, 0]}
PLOTS = {
    "plot_reliability": Call(
        drawn(plots.plot_reliability),
        {
            "y_true": one_of([0, 1], [[1], [0]], [[1, 0], [0, 1]]),
            "y_pred": PREDICTIONS,
            "num_bins": one_of(1, 15),
            "from_logits": BOOLEAN,
            "label": one_of(None, "A", "ü"),
            "ax": st.none(),
        },
        check_axes,
        count=30,
    ),
    "plot_history": Call(
        drawn(plots.plot_history),
        {
            "histories": one_of(HISTORY, {"A": HISTORY, "B": HISTORY}),
            "metric": one_of("val_loss", "val_accuracy"),
            "mode": one_of("auto", "min", "max"),
            "ax": st.none(),
        },
        check_axes,
        count=30,
    ),
    "plot_rank_history": Call(
        drawn(plots.plot_rank_history),
        {
            "history": st.just({"step": [1, 2, 9], "ranks": RANKS}),
            "ax": st.none(),
        },
        check_axes,
        count=30,
    ),
    "plot_generalization_gap": Call(
        drawn(plots.plot_generalization_gap),
        {"bounds": one_of(BOUND, {"A": BOUND}), "ax": st.none()},
        check_axes,
        count=30,
    ),
}

CALLS = {**TEXT, **PLOTS}
