"""Windows of questions and contexts: by hand, by properties, and back."""

import functools

import families
import keras_hub
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops
from keras_hub import models

from keras_lora_dropout.question_answering import windows as windows_module
from keras_lora_dropout.question_answering.decoding import decode_answers
from keras_lora_dropout.question_answering.offsets import tokenize_with_spans
from keras_lora_dropout.question_answering.windows import make_windows

# A tokenizer leaves closing its vocabulary file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TEXT = st.lists(st.sampled_from(families.WORDS), max_size=12).map(" ".join)


def distil_bert():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *families.WORDS]
    return models.DistilBertTextClassifierPreprocessor(
        models.DistilBertTokenizer(vocabulary)
    )


def f_net():
    return models.FNetTextClassifierPreprocessor(
        models.FNetTokenizer(
            families.sentencepiece_model(
                pad_id=3,
                bos_id=4,
                eos_id=5,
                unk_id=0,
                pad_piece="<pad>",
                bos_piece="[CLS]",
                eos_piece="[SEP]",
                unk_piece="<unk>",
                user_defined_symbols="[MASK]",
            )
        )
    )


PREPROCESSORS = {
    "bert": lambda: families.bert().preprocessor,
    "roberta": lambda: families.roberta().preprocessor,
    "deberta": lambda: families.deberta().preprocessor,
    "distil_bert": distil_bert,
    "f_net": f_net,
}
INPUTS = {
    "bert": {"token_ids", "padding_mask", "segment_ids"},
    "f_net": {"token_ids", "segment_ids"},
}


@functools.cache
def preprocessor_of(name):
    preprocessor = PREPROCESSORS[name]()
    preprocessor.build(None)
    return preprocessor


@pytest.fixture(scope="module", params=PREPROCESSORS)
def name(request):
    return request.param


def with_length(name, length):
    preprocessor = preprocessor_of(name)
    preprocessor.sequence_length = length
    return preprocessor


def bert_ids(text):
    return [5 + families.WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize("packed_at_once", [3, 1024])
def test_by_hand(packed_at_once, monkeypatch):
    monkeypatch.setattr(windows_module, "_BATCH", packed_at_once)
    # [CLS] fox [SEP] ... [SEP]: 7 of 10 tokens are left, 4 of them new.
    context = "a fox jumped over the lazy brown dog the dog"
    windows = make_windows(
        with_length("bert", 10),
        ["fox", "the dog"],
        [context, "a fox"],
        [("lazy brown", 22), None],
        doc_stride=3,
        max_question_length=2,
    )
    cls, sep, pad = [2], [3], [0]
    words = context.split()
    rows = [
        cls + bert_ids("fox") + sep + bert_ids(" ".join(words[:6])) + sep,
        cls + bert_ids("fox") + sep + bert_ids(" ".join(words[3:9])) + sep,
        cls + bert_ids("fox") + sep + bert_ids(" ".join(words[6:])) + sep,
        cls + bert_ids("the dog") + sep + bert_ids("a fox") + sep,
    ]
    expected = np.array([row + pad * (10 - len(row)) for row in rows])
    np.testing.assert_array_equal(windows.inputs["token_ids"], expected)
    mask = windows.inputs["padding_mask"]
    np.testing.assert_array_equal(mask, expected != 0)
    segments = windows.inputs["segment_ids"]
    assert segments[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert segments[3].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert windows.questions.tolist() == [0, 0, 0, 1]
    assert windows.contexts == (context, "a fox")
    # "lazy brown" is whole in the second window alone.
    assert windows.targets.tolist() == [[0, 0], [5, 6], [0, 0], [0, 0]]
    assert windows.spans[1, 5:7].tolist() == [[22, 26], [27, 32]]
    assert (windows.spans[3] >= 0).all(-1).tolist() == [0] * 4 + [1] * 2 + [
        0
    ] * 4


def test_inputs_are_those_of_the_preprocessor(name):
    preprocessor = with_length(name, 40)
    question, context = "the quick fox", "a brown dog jumped over"
    windows = make_windows(
        preprocessor,
        [question],
        [context],
        doc_stride=0,
        max_question_length=15,
    )
    expected = preprocessor(x=([question], [context]))
    default = {"token_ids", "padding_mask"}
    assert set(windows.inputs) == set(expected) == INPUTS.get(name, default)
    for key, array in windows.inputs.items():
        assert array.shape == (1, 40)
        np.testing.assert_array_equal(
            array, ops.convert_to_numpy(expected[key]), key
        )
    assert windows.targets is None


@given(
    question=TEXT,
    context=TEXT,
    room=st.integers(1, 9),
    doc_stride=st.integers(0, 4),
    most=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_every_token_is_in_a_window(
    name, question, context, room, doc_stride, most
):
    assume(room > doc_stride)
    preprocessor = with_length(name, 100)
    tokens, spans = tokenize_with_spans(preprocessor.tokenizer, context)
    asked, _ = tokenize_with_spans(preprocessor.tokenizer, question)
    packer = preprocessor.packer
    special = [packer.start_value, packer.sep_value, packer.end_value]
    preprocessor.sequence_length = most + room + sum(map(len, special))
    windows = make_windows(
        preprocessor,
        ["a", question],
        ["dog", context],
        doc_stride=doc_stride,
        max_question_length=most,
    )
    mine = windows.questions == 1
    rows = windows.inputs["token_ids"][mine]
    places = windows.spans[mine]
    assert windows.questions[0] == 0 and len(rows) >= 1
    start = 0
    for row, place in zip(rows, places, strict=True):
        shown = np.flatnonzero(place[:, 0] >= 0)
        stop = start + len(shown)
        # The tokens of the context, in their order, side by side.
        np.testing.assert_array_equal(row[shown], tokens[start:stop])
        np.testing.assert_array_equal(place[shown], spans[start:stop])
        asked_part = asked[:most].tolist()
        head = special[0] + asked_part + special[1]
        assert row[: len(head)].tolist() == head
        assert not len(shown) or shown[0] == len(head)
        assert row[len(head) + len(shown)] == special[2][0]
        if stop < len(tokens):
            assert stop - start == most + room - len(asked_part)
            start = stop - doc_stride
    assert stop == len(tokens)


@given(
    context=TEXT.filter(len),
    first=st.integers(0, 11),
    count=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_answers_come_back(name, context, first, count):
    words = context.split()
    assume(first + count <= len(words))
    text = " ".join(words[first : first + count])
    start = len(" ".join([*words[:first], ""]))
    preprocessor = with_length(name, 60)
    # An answer of so many tokens as neighbours share is whole in one of them.
    tokens, _ = tokenize_with_spans(preprocessor.tokenizer, text)
    windows = make_windows(
        preprocessor,
        ["dog", "a fox"],
        ["the fox", context],
        [None, (text, start)],
        doc_stride=len(tokens) + 1,
        max_question_length=5,
    )
    logits = np.zeros((len(windows.targets), 2, 60))
    for row, (begin, end) in zip(logits, windows.targets, strict=True):
        row[0, begin] = row[1, end] = 5 if begin else 1
    assert (windows.targets[1:] > 0).all(-1).any()
    found = decode_answers(logits, windows, max_length=60, null_threshold=0)
    assert found == ["", text]


def test_an_answer_may_end_inside_a_token():
    windows = make_windows(
        with_length("bert", 12),
        ["who"],
        ["the lazy brown dog"],
        [("zy bro", 6)],
        doc_stride=1,
        max_question_length=2,
    )
    assert windows.targets.tolist() == [[4, 5]]
    logits = np.zeros((1, 2, 12))
    logits[0, 0, 4] = logits[0, 1, 5] = 1
    assert decode_answers(logits, windows) == ["lazy brown"]
    # RoBERTa's tokens are letters here: [<s>, a, </s>, </s>, t, h, e, d, o, g].
    windows = make_windows(
        with_length("roberta", 12),
        ["a"],
        ["the dog"],
        [("og", 5)],
        doc_stride=1,
        max_question_length=1,
    )
    assert windows.targets.tolist() == [[8, 9]]


def test_decoding_takes_the_windows_of_each_question():
    windows = make_windows(
        with_length("bert", 8),
        ["fox", "a", "dog"],
        ["the lazy brown dog jumped over", "", "a fox"],
        doc_stride=1,
        max_question_length=1,
    )
    assert windows.questions.tolist() == [0, 0, 1, 2]
    logits = np.zeros((4, 2, 8))
    logits[1, 0, 4] = logits[1, 1, 5] = 2  # The second window's "jumped over".
    logits[0, 0, 3] = logits[0, 1, 6] = 1
    logits[3, 0, 3] = 1
    assert decode_answers(logits, windows) == ["jumped over", "", "a"]
    assert decode_answers(logits, windows, max_length=1) == ["jumped", "", "a"]
    logits[3, :, 0] = 1
    found = decode_answers(logits, windows, null_threshold=0.5)
    assert found == ["jumped over", "", ""]
    with pytest.raises(ValueError, match=r"\(4, 2, 8\). Received: \(2, 4, 2"):
        decode_answers(np.stack([logits] * 2), windows)


def test_equal_contexts_are_tokenized_once(monkeypatch):
    calls = []

    def counted(tokenizer, texts):
        calls.append(texts)
        return tokenize_with_spans(tokenizer, texts)

    monkeypatch.setattr(windows_module, "tokenize_with_spans", counted)
    windows = make_windows(
        with_length("bert", 12),
        ["the fox", "a dog", "the fox"],
        ["a dog"] * 3,
        doc_stride=1,
        max_question_length=3,
    )
    assert windows.questions.tolist() == [0, 1, 2]
    assert calls == [["the fox", "a dog"]]


ONE = {"questions": ["a"], "contexts": ["the dog"]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"questions": []}, ValueError, "0 questions, 1 contexts"),
        ({"contexts": []}, ValueError, "1 questions, 0 contexts"),
        ({"answers": []}, ValueError, "1 contexts, 0 answers"),
        ({"questions": "a"}, TypeError, "`questions`.*'a'. Put it in a list"),
        ({"contexts": "a"}, TypeError, "`contexts` must be a list"),
        ({"questions": [b"a"]}, TypeError, "A question .*bytes.* question 0"),
        ({"contexts": [None]}, TypeError, "A context .*NoneType"),
        ({"answers": ["dog"]}, TypeError, r"\(text, start\).*'dog'"),
        ({"answers": [("dog", "4")]}, TypeError, r"\('dog', '4'\)"),
        ({"answers": [("", 0)]}, TypeError, "`None` if there is none"),
        ({"answers": [("dog", 3)]}, ValueError, "'dog'.*character 3.*' do'"),
        ({"answers": [("the", -3)]}, ValueError, "character -3 of"),
        ({"doc_stride": 6}, ValueError, "so that 6 are left; doc_stride=6"),
        ({"max_question_length": 9}, ValueError, "take 3, so that 0 are left"),
        ({"doc_stride": -1}, ValueError, "doc_stride=-1"),
        ({"doc_stride": 1.5}, ValueError, "doc_stride=1.5"),
        ({"max_question_length": 0}, ValueError, "max_question_length=0"),
    ],
)
def test_wrong_input(arguments, error, message):
    options = {"doc_stride": 1, "max_question_length": 2, **ONE, **arguments}
    if arguments.get("max_question_length") == 9:
        preprocessor = with_length("bert", 10)
    else:
        preprocessor = with_length("bert", 11)
    with pytest.raises(error, match=message):
        make_windows(preprocessor, **options)


@pytest.mark.parametrize(
    "preprocessor",
    [
        lambda: families.llama().preprocessor,
        lambda: families.bert().preprocessor.tokenizer,
        lambda: keras_hub.layers.MultiSegmentPacker(8, 1, 2),
    ],
)
def test_wrong_preprocessor(preprocessor):
    with pytest.raises(TypeError, match="packs two texts, a KerasHub `TextCl"):
        make_windows(preprocessor(), **ONE)
