"""Where the tokens of a text stand in it.

KerasHub's tokenizers return tokens without their places. No token reaches from
one word into the next, so words are tokenized one by one, and the tokens of a
word are laid along its letters.
"""

import functools
import itertools
import re
import unicodedata

import numpy as np
from keras_hub import tokenizers

from keras_lora_dropout.core import validation

# A space before a word: the word's own in byte-pair vocabularies.
_GAP = re.compile(r" (?=\S)")
# Before all of these, WordPiece starts a new word.
_BLANK = re.compile(r"[ \t\n\r\f]")
# What SentencePiece writes in the place of a space.
_SPACE = "\u2581"
# Separators, control and format characters, and accents.
_SILENT = {"Zs", "Zl", "Zp", "Cc", "Cf", "Mn"}


def tokenize_with_spans(tokenizer, text):
    """Tokenize text, and find each token in it.

    The ids are those of `tokenizer(text)`. With SentencePiece they can differ
    where the vocabulary has pieces that reach over a space, keeps repeated
    spaces, or puts none before a text; those of KerasHub's encoders do not.

    The tokenizer is called once, on the different words of all texts, so that
    many texts are best given in one list.

    Args:
        tokenizer: A KerasHub `WordPieceTokenizer`, `SentencePieceTokenizer` or
            `BytePairTokenizer`, as that of any KerasHub encoder, without
            `sequence_length`, `add_bos` and `add_eos`.
        text: String, or list of strings.

    Returns:
        Tuple of two integer arrays: the ids, of shape `(tokens,)`, and the
        spans, of shape `(tokens, 2)`: where a token starts and ends in the
        text, in characters, without spaces around it. The span is empty if no
        character is the token's own, as SentencePiece's lone space has none. A
        token that does not spell its text, such as that of the unknown, has all
        the text between its neighbours in the word. For a list of strings, a
        list of such tuples.

    Raises:
        TypeError: If the tokenizer is of another kind, or the text is neither
            a string nor a list of strings.
        ValueError: If the tokenizer adds tokens of its own, or UTF-8 cannot
            hold the text.

    Example:

    >>> import keras_hub
    >>> tokenizer = keras_hub.tokenizers.WordPieceTokenizer(
    ...     ["[UNK]", "snow", "##s", "."], lowercase=True
    ... )
    >>> ids, spans = tokenize_with_spans(tokenizer, "Snow ... snows")
    >>> ids.tolist()
    [1, 3, 3, 3, 1, 2]
    >>> spans.tolist()
    [[0, 4], [5, 6], [6, 7], [7, 8], [9, 13], [13, 14]]
    """
    if isinstance(text, str):
        return tokenize_with_spans(tokenizer, [text])[0]
    _check(tokenizer, text)
    texts = list(text)
    letters_of, letters_of_token = _spelling(tokenizer)
    texts_words = [list(_words(tokenizer, text)) for text in texts]
    words = dict.fromkeys(w for words in texts_words for _, w in words)
    known = {}
    for word, ids in zip(words, _tokenize(tokenizer, words), strict=True):
        tokens = [letters_of_token(token) for token in ids]
        known[word] = ids, _lay_along(word, letters_of, tokens)
    return [_joined(words, known) for words in texts_words]


def _words(tokenizer, text):
    """Yield the start and the text of each word, as the tokenizer needs it."""
    is_word_piece = isinstance(tokenizer, tokenizers.WordPieceTokenizer)
    gap = _BLANK if is_word_piece else _GAP
    cuts = [0, *(found.start() for found in gap.finditer(text)), len(text)]
    for start, end in itertools.pairwise(cuts):
        word = text[start:end]
        if not isinstance(tokenizer, tokenizers.BytePairTokenizer):
            word = word.lstrip(" ")
        if word:
            yield end - len(word), word


def _tokenize(tokenizer, words):
    if not words:
        return []
    return [[int(token) for token in ids] for ids in tokenizer(list(words))]


def _lay_along(word, letters_of, tokens):
    """Find tokens, given as their letters, in a word.

    Returns:
        List of `(start, end)`, in characters of the word.
    """
    letters, starts, ends = "", [], []
    for place, character in enumerate(word):
        added = letters_of(character)
        letters += added
        starts += [place] * len(added)
        ends += [place + 1] * len(added)
        if ends and not added and unicodedata.category(character) == "Mn":
            ends[-1] = place + 1  # An accent is part of the letter before it.
    starts.append(len(word))
    at, places, waiting = 0, [], 0
    for token in tokens:
        # After what is not spelled, the next that is tells where it ends.
        found = letters.find(token, at) if token or not waiting else -1
        if found == at or (waiting and found > at):
            places += [(at, found)] * waiting
            places.append((found, found + len(token)))
            at, waiting = found + len(token), 0
        else:
            waiting += 1
    places += [(at, len(letters))] * waiting
    return [
        (starts[first], ends[last - 1] if first < last else starts[first])
        for first, last in places
    ]


def _joined(words, known):
    """Join the ids and the spans of a text's words."""
    all_ids, all_spans = [], []
    for start, word in words:
        ids, spans = known[word]
        all_ids += ids
        all_spans += [(start + first, start + last) for first, last in spans]
    return (
        np.array(all_ids, "int32"),
        np.array(all_spans, "int32").reshape(-1, 2),
    )


def _spelling(tokenizer):
    """Return the functions that spell a character, and a token by its id."""
    if isinstance(tokenizer, tokenizers.BytePairTokenizer):
        symbols = _byte_symbols()
        spaces = {ord(symbols[byte]): None for byte in b" \t\n\v\f\r"}

        def letters_of(character):
            text = "".join(symbols[byte] for byte in character.encode())
            return text.translate(spaces)

        def letters_of_token(token):
            return token.translate(spaces)

    elif isinstance(tokenizer, tokenizers.SentencePieceTokenizer):
        letters_of = _folded

        def letters_of_token(token):
            return _folded(token.replace(_SPACE, ""))

    else:
        letters_of = _folded

        def letters_of_token(token):
            return _folded(token.removeprefix(tokenizer.suffix_indicator))

    return functools.cache(letters_of), functools.cache(
        lambda token: letters_of_token(tokenizer.id_to_token(token))
    )


def _folded(text):
    """Return text without case, accents, spaces and compatibility forms."""
    text = unicodedata.normalize("NFKD", text)
    heard = (c for c in text if unicodedata.category(c) not in _SILENT)
    return "".join(heard).casefold()


def _byte_symbols():
    """Return the characters that byte-pair vocabularies write bytes with.

    Those of GPT-2: printable bytes stand for themselves, all others for the
    characters from 256 on.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(b if b in shown else next(others)) for b in range(256)]


def _check(tokenizer, texts):
    kinds = (
        tokenizers.WordPieceTokenizer,
        tokenizers.SentencePieceTokenizer,
        tokenizers.BytePairTokenizer,
    )
    if not isinstance(tokenizer, kinds):
        raise TypeError(
            "Places of tokens are known for KerasHub's WordPiece, "
            "SentencePiece and byte-pair tokenizers, such as "
            f"`preprocessor.tokenizer`. Received: {tokenizer!r} (of type "
            f"{type(tokenizer).__name__})."
        )
    for name in ("sequence_length", "add_bos", "add_eos"):
        value = getattr(tokenizer, name, None)
        if value:
            raise ValueError(
                "A tokenizer must return the tokens of the text alone. "
                f"Received: one with {name}={value}. Construct it without."
            )
    if not isinstance(texts, (list, tuple)):
        raise TypeError(
            "Text must be a string, or a list of strings. Received: "
            f"{texts!r} (of type {type(texts).__name__})."
        )
    for text in texts:
        validation.check_text("A text", text)
