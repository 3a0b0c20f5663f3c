"""Prompts and responses as arrays; the loss is on the responses alone."""

import dataclasses
import numbers

import numpy as np

from keras_lora_dropout.core import validation

_MAX_LENGTH = 2**24  # More than any model has positions for.


@dataclasses.dataclass(frozen=True)
class ResponseData:
    """What `fit` and `evaluate` of a `CausalLM` take, without a preprocessor.

    Attributes:
        x: Dictionary of `token_ids` and `padding_mask`, int32 arrays of shape
            `(rows, sequence_length)`. The mask counts the examples of a row
            from 1; 0 is padding.
        y: Int32 array of that shape: the token that follows.
        sample_weight: Float32 array of that shape: 1 where that token belongs
            to a response, else 0.
        cut: Number of responses that lost tokens to `sequence_length`.
        dropped: Indices of the examples that are not there, because nothing of
            their response would be.

    Example:

    >>> data = ResponseData(
    ...     x={"token_ids": np.ones((1, 2)), "padding_mask": np.ones((1, 2))},
    ...     y=np.array([[5, 2]]),
    ...     sample_weight=np.array([[0.0, 1.0]]),
    ...     cut=0,
    ...     dropped=(),
    ... )
    >>> data.num_response_tokens
    1
    """

    x: dict
    y: np.ndarray
    sample_weight: np.ndarray
    cut: int
    dropped: tuple

    @property
    def num_response_tokens(self):
        """Number of tokens that the loss is a mean of."""
        return int(self.sample_weight.sum())


def make_response_data(
    tokenizer, prompts, responses, *, sequence_length, packed=False
):
    """Lay out prompts and responses for training.

    Each example is the start token, the prompt, the response and the end
    token. The prompt has the tokens that `generate` makes of it. Give `compile`
    a loss whose mean is one over the weighted tokens, whatever their number:
    `keras.losses.SparseCategoricalCrossentropy(from_logits=True,
    reduction="mean_with_sample_weight")`.

    Args:
        tokenizer: A `keras_hub.tokenizers.Tokenizer` with an `end_token_id`,
            and a `start_token_id` if its models begin with one.
        prompts: Sequence of strings.
        responses: Sequence of as many strings.
        sequence_length: Positive integer. Tokens in a row. Longer examples lose
            the end of their response.
        packed: Boolean. Whether rows hold several examples, as many as fit,
            rather than one and padding. Call `isolate_packed_examples` on the
            model, so that they do not see each other.

    Returns:
        `ResponseData`.

    Raises:
        TypeError: If a prompt or response is no string, or `tokenizer` none.
        ValueError: If there are none, or not as many of both, if an argument is
            out of range, if UTF-8 cannot hold a text, or if no example has room
            for its response.

    Example:

    >>> class Bytes:  # Stands for the tokenizer of a preset.
    ...     start_token_id, end_token_id = 256, 257
    ...     def __call__(self, text):
    ...         return list(text.encode())
    >>> data = make_response_data(Bytes(), ["a"], ["b"], sequence_length=4)
    >>> data.x["token_ids"].tolist(), data.y.tolist()
    ([[256, 97, 98, 0]], [[97, 98, 257, 0]])
    >>> data.sample_weight.tolist()
    [[0.0, 1.0, 1.0, 0.0]]
    """
    length = validation.positive_integer(
        "sequence_length", sequence_length, at_most=_MAX_LENGTH
    )
    validation.boolean("packed", packed)
    prompts = validation.as_list("prompts", prompts)
    responses = validation.as_list("responses", responses)
    _check_tokenizer(tokenizer)
    validation.not_empty("prompts", prompts)
    if len(prompts) != len(responses):
        raise ValueError(
            "Each prompt needs one response. Received: "
            f"{len(prompts)} prompts and {len(responses)} responses."
        )
    examples, dropped, cut = [], [], 0
    for number, texts in enumerate(zip(prompts, responses, strict=True)):
        tokens, start = _tokens(tokenizer, *texts, number)
        kept = tokens[: length + 1]
        if start >= len(kept):
            dropped.append(number)
            continue
        cut += len(kept) < len(tokens)
        examples.append((kept, start))
    if not examples:
        raise ValueError(
            f"No prompt leaves room for a response: sequence_length={length} "
            "is too small for each of them."
        )
    rows = _packed([len(t) - 1 for t, _ in examples], length, packed)
    return _laid_out(examples, rows, length, cut, tuple(dropped), tokenizer)


def _check_tokenizer(tokenizer):
    end = getattr(tokenizer, "end_token_id", None)
    if not callable(tokenizer) or not isinstance(end, numbers.Integral):
        raise TypeError(
            "`tokenizer` must be a KerasHub tokenizer with an `end_token_id`. "
            f"Received: tokenizer={tokenizer!r} (of type "
            f"{type(tokenizer).__name__})."
        )


def _tokens(tokenizer, prompt, response, number):
    """Return the tokens of an example, and where its response starts."""
    for name, text in (("prompt", prompt), ("response", response)):
        validation.check_text(f"A {name}", text, f" for example {number}")
    start = [getattr(tokenizer, "start_token_id", None)]
    before = [t for t in start if t is not None] + _ids(tokenizer, prompt)
    # Most vocabularies join words to the space before them, so a response is
    # not what it would be alone.
    whole = _ids(tokenizer, prompt + response)
    own = len(before) - (start != [None])
    after = whole[own:]
    if whole[:own] != before[len(before) - own :]:
        after = _ids(tokenizer, response)
    return [*before, *after, tokenizer.end_token_id], len(before)


def _ids(tokenizer, text):
    return np.asarray(tokenizer(text)).reshape(-1).tolist()


def _packed(lengths, limit, packed):
    """Share the examples out among rows.

    Returns:
        List of lists of positions. The longest come first, each to the fullest
        row that has room for it (best-fit decreasing).
    """
    if not packed:
        return [[n] for n in range(len(lengths))]
    rows, room = [], np.zeros(0, "int64")
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = np.where(room >= lengths[n], room, limit + 1)
        best = int(np.argmin(fits)) if len(fits) else 0
        if not len(fits) or fits[best] > limit:
            best = len(rows)
            rows.append([])
            room = np.append(room, limit)
        rows[best].append(n)
        room[best] -= lengths[n]
    return rows


def _laid_out(examples, rows, length, cut, dropped, tokenizer):
    shape = len(rows), length
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    token_ids = np.full(shape, padding, "int32")
    mask = np.zeros(shape, "int32")
    y = np.full(shape, padding, "int32")
    weight = np.zeros(shape, "float32")
    for row, members in enumerate(rows):
        begin = 0
        for count, n in enumerate(members, start=1):
            tokens, start = examples[n]
            end = begin + len(tokens) - 1
            token_ids[row, begin:end] = tokens[:-1]
            y[row, begin:end] = tokens[1:]
            mask[row, begin:end] = count
            # The token before the first of the response predicts it.
            weight[row, begin + start - 1 : end] = 1
            begin = end
    x = {"token_ids": token_ids, "padding_mask": mask}
    return ResponseData(x, y, weight, cut, dropped)
