"""Prompts and responses for training: the loss by hand, and packed rows."""

import families
import keras
import language_models
import numpy as np
import pytest
from helpers import assert_close
from helpers import randomize
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras_hub import models

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout.instruction_tuning.packing import (
    isolate_packed_examples,
)
from keras_lora_dropout.instruction_tuning.prompts import alpaca_prompt
from keras_lora_dropout.instruction_tuning.response_data import (
    make_response_data,
)

pytestmark = pytest.mark.filterwarnings(
    # KerasHub feeds arrays to `fit` by a reader that keeps their order.
    "ignore:`shuffle=True` was passed:UserWarning",
)
PROMPTS = ["the quick brown fox", "a fox", "over the lazy dog", "brown"]
RESPONSES = [" jumped over", " dog", " the fox over the dog", " fox"]


def loss():
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def compiled(model):
    model.preprocessor = None
    model.compile(
        optimizer=keras.optimizers.SGD(0.1),
        loss=loss(),
        weighted_metrics=[],
        sampler="greedy",
    )
    return model


def tokens_alone(tokenizer, text):
    return [int(t) for t in np.asarray(tokenizer(text))]


class WordTokenizer:
    """One token for each letter, 4 and up."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text):
        return [4 + ord(letter) - ord("a") for letter in text]


def test_rows_by_hand():
    data = make_response_data(
        WordTokenizer(), ["ab", "c"], ["cd", "ab"], sequence_length=6
    )
    assert data.x["token_ids"].tolist() == [
        [1, 4, 5, 6, 7, 0],
        [1, 6, 4, 5, 0, 0],
    ]
    assert data.y.tolist() == [[4, 5, 6, 7, 2, 0], [6, 4, 5, 2, 0, 0]]
    assert data.sample_weight.tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 0],
    ]
    assert data.x["padding_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
    ]
    assert data.num_response_tokens == 6
    assert (data.cut, data.dropped) == (0, ())


def test_long_examples_lose_their_end():
    data = make_response_data(
        WordTokenizer(),
        ["abc", "a", "abcde"],
        ["abc", "b", "a"],
        sequence_length=5,
    )
    assert data.dropped == (2,)
    assert data.cut == 1
    assert data.y.tolist() == [[4, 5, 6, 4, 5], [4, 5, 2, 0, 0]]
    assert data.sample_weight.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]


class JoiningTokenizer(WordTokenizer):
    """Marks where a text begins, and has one token for "ab"."""

    def __call__(self, text):
        return [3, *super().__call__(text.replace("ab", "z"))]


@pytest.mark.parametrize(
    ("prompt", "response", "tokens", "weights"),
    [
        # What follows a prompt has no beginning of its own,
        ("c", "d", [1, 3, 6, 7, 2], [0, 0, 1, 1]),
        # unless the prompt would not be the same with it.
        ("ca", "bd", [1, 3, 6, 4, 3, 5, 7, 2], [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_responses_join_the_prompt(prompt, response, tokens, weights):
    data = make_response_data(
        JoiningTokenizer(), [prompt], [response], sequence_length=len(weights)
    )
    assert data.x["token_ids"][0].tolist() == tokens[:-1]
    assert data.y[0].tolist() == tokens[1:]
    assert data.sample_weight[0].tolist() == weights


def test_long_examples_are_packed_first():
    """4 + 6 tokens fill a row of 10, twice; 4 + 4 would leave three rows."""
    responses = ["a", "a", "aaa", "aaa"]
    data = make_response_data(
        WordTokenizer(), ["aa"] * 4, responses, sequence_length=10, packed=True
    )
    assert data.x["padding_mask"].min() == 1
    assert len(data.y) == 2


letters = st.text("abc", min_size=1, max_size=9)


@settings(deadline=None)
@given(
    st.lists(st.tuples(letters, letters), min_size=1, max_size=12),
    st.integers(10, 30),
)
def test_packing_keeps_every_token(pairs, length):
    """Each example is in one row, whole, and rows are no longer than asked."""
    prompts, responses = zip(*pairs, strict=True)
    options = {"sequence_length": length}
    one, many = (
        make_response_data(
            WordTokenizer(), prompts, responses, packed=packed, **options
        )
        for packed in (False, True)
    )
    assert (one.cut, one.dropped) == (many.cut, many.dropped)
    assert sorted(examples_of(one)) == sorted(examples_of(many))
    assert len(many.y) <= len(one.y)
    # Two rows of which one would do are never left.
    used = sorted((many.x["padding_mask"] > 0).sum(1))
    assert len(used) < 2 or used[0] + used[1] > length


def examples_of(data):
    """The examples of all rows: tokens, followers and weights."""
    found = []
    for row in range(len(data.y)):
        mask = data.x["padding_mask"][row]
        numbers = [n for n in np.unique(mask) if n]
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers:
            place = mask == number
            assert np.diff(np.flatnonzero(place)).max(initial=1) == 1
            found.append(
                tuple(
                    tuple(array[row][place].tolist())
                    for array in (
                        data.x["token_ids"],
                        data.y,
                        data.sample_weight,
                    )
                )
            )
    return found


def test_prompts_have_the_tokens_that_generate_makes():
    model = families.llama()
    tokenizer = model.preprocessor.tokenizer
    data = make_response_data(tokenizer, PROMPTS, RESPONSES, sequence_length=40)
    for row, (prompt, response) in enumerate(
        zip(PROMPTS, RESPONSES, strict=True)
    ):
        whole = tokens_alone(tokenizer, prompt + response)
        batch = model.preprocessor.generate_preprocess([prompt], 40)
        ids = keras.ops.convert_to_numpy(batch["token_ids"])[0]
        count = int(keras.ops.convert_to_numpy(batch["padding_mask"]).sum())
        assert data.x["token_ids"][row][:count].tolist() == list(ids[:count])
        followers = data.y[row][data.sample_weight[row] > 0].tolist()
        assert followers == [*whole[count - 1 :], tokenizer.end_token_id]


@pytest.mark.parametrize("packed", [False, True])
def test_loss_by_hand(packed):
    """The mean over response tokens of the negative log-likelihood."""
    model = randomize(
        enable_lora_dropout(families.llama(), rank=2, num_samples=1, seed=0)
    )
    tokenizer = model.preprocessor.tokenizer
    model = compiled(isolate_packed_examples(model))
    total = count = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        alone = tokens_alone(tokenizer, prompt)
        ids = [1, *tokens_alone(tokenizer, prompt + response), 2]
        x = np.array([ids[:-1]])
        logits = model.predict(
            {"token_ids": x, "padding_mask": np.ones_like(x)}, verbose=0
        )[0].astype("float64")
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(len(alone), len(ids) - 1):
            total -= likely[place, ids[place + 1]]
            count += 1
    data = make_response_data(
        tokenizer, PROMPTS, RESPONSES, sequence_length=48, packed=packed
    )
    assert len(data.y) == (2 if packed else 4)
    measured = model.evaluate(
        data.x, data.y, sample_weight=data.sample_weight, verbose=0
    )
    assert data.num_response_tokens == count
    assert_close(measured, total / count, 1e-5)


BACKBONES = {
    "llama": (models.LlamaBackbone, {}),
    "mistral": (models.MistralBackbone, {"sliding_window": 16}),
    "phi3": (models.Phi3Backbone, {}),
    "qwen": (models.QwenBackbone, {}),
    "qwen3": (models.Qwen3Backbone, {"head_dim": 4}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_examples_do_not_see_each_other(name):
    """Each is what it would be alone, wherever it stands."""
    cls, extra = BACKBONES[name]
    backbone = cls(vocabulary_size=40, **families.DECODER, **extra)
    generator = np.random.default_rng(0)
    for weight in backbone.weights:
        if "norm" not in weight.path:
            weight.assign(generator.normal(0, 0.3, weight.shape))
    ids = generator.integers(3, 40, (2, 12))
    numbers = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    expected = []
    for row, place in [(0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 12))]:
        alone = ids[row : row + 1, place]
        mask = np.ones_like(alone)
        expected.append(
            (row, place, backbone({"token_ids": alone, "padding_mask": mask}))
        )
    packed = {"token_ids": ids, "padding_mask": numbers}
    seen = backbone(packed)
    assert isolate_packed_examples(backbone) is backbone
    isolated = isolate_packed_examples(backbone)(packed)
    for row, place, states in expected:
        assert_close(isolated[row : row + 1, place], states, 1e-4)
    second = np.asarray(keras.ops.convert_to_numpy(seen[0, 5:9]))
    alone = keras.ops.convert_to_numpy(expected[1][2])[0]
    assert np.abs(second - alone).max() > 1e-2


def test_training_on_packed_rows():
    """N instances, gradients and all: as on one example in each row."""
    weights = []
    for packed in (False, True):
        keras.utils.set_random_seed(0)
        model = randomize(
            enable_lora_dropout(families.llama(), rank=2, num_samples=2, seed=0)
        )
        tokenizer = model.preprocessor.tokenizer
        compiled(isolate_packed_examples(model))
        data = make_response_data(
            tokenizer, PROMPTS, RESPONSES, sequence_length=48, packed=packed
        )
        model.fit(
            data.x,
            data.y,
            sample_weight=data.sample_weight,
            batch_size=4,
            verbose=0,
        )
        weights.append(model.trainable_weights)
    for one, other in zip(*weights, strict=True):
        assert_close(one, other, 1e-5)


@language_models.needs_stories
def test_real_rows():
    """Alpaca's prompt in the tokens of a real vocabulary, packed or not."""
    model = language_models.stories()
    tokenizer = model.preprocessor.tokenizer
    prompts = [alpaca_prompt("Name a colour."), alpaca_prompt("Add.", "1, 2")]
    responses = ["Red.\n", "3"]
    model = compiled(isolate_packed_examples(model))
    losses = []
    for packed in (False, True):
        data = make_response_data(
            tokenizer, prompts, responses, sequence_length=450, packed=packed
        )
        assert len(data.y) == 2 - packed
        texts = {
            tokenizer.detokenize(np.array(y)[np.array(w) > 0])
            for _, y, w in examples_of(data)
        }
        assert texts == set(responses)
        losses.append(
            model.evaluate(
                data.x, data.y, sample_weight=data.sample_weight, verbose=0
            )
        )
    assert_close(*losses, 1e-4)


def test_alpaca_prompts():
    """As published, down to the blank lines."""
    assert alpaca_prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nDo it.\n\n"
        "### Response:\n"
    )
    assert alpaca_prompt("Do it.", "to this") == (
        "Below is an instruction that describes a task, paired with an input "
        "that provides further context. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\n"
        "to this\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "`prompts` holds no examples"),
        ({"responses": ["a"]}, "2 prompts and 1 responses"),
        ({"responses": ["a", None]}, "A response .*None .*example 1"),
        ({"prompts": ["a", 3]}, "A prompt .* 3 .*example 1"),
        ({"sequence_length": 0}, "`sequence_length` must be a positive"),
        ({"sequence_length": 1}, "sequence_length=1 is too small"),
        ({"packed": "yes"}, "`packed` must be True or False"),
    ],
)
def test_bad_data(changes, message):
    arguments = {
        "prompts": ["ab", "cd"],
        "responses": ["a", "b"],
        "sequence_length": 8,
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        make_response_data(WordTokenizer(), **arguments)


def test_bad_prompts_and_models():
    with pytest.raises(ValueError, match="must say what is to be done"):
        alpaca_prompt("  ")
    with pytest.raises(TypeError, match=r"`input` must be a string.*None"):
        alpaca_prompt("Do it.", None)
    with pytest.raises(ValueError, match=r"GemmaCausalLM.*LlamaBackbone"):
        isolate_packed_examples(families.gemma())
