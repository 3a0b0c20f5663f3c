"""`ensemble_generate` of models with an encoder and a decoder."""

import functools
import os

import families
import hub_models
import keras
import keras_hub
import numpy as np
import pytest
from helpers import BACKEND
from helpers import randomize
from helpers import set_random
from uncached import Uncached
from uncached import entropy

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout.core import validation

TASKS = [name for name in hub_models.tried_tasks() if "Seq2Seq" in name]
# Compilation takes its time.
if BACKEND != "torch" and not os.environ.get("ALL_MODELS"):
    TASKS = ["BartSeq2SeqLM", "T5GemmaSeq2SeqLM"]
ENCODER_LENGTH, LENGTH = 6, 8
# KerasHub's EdRec reads the first token of a decoder's prompt alone.
PROMPT_LENGTHS = {"EdRecSeq2SeqLM": [1, 1, 1]}
# KerasHub's own: T5.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
]


class NoPadding(keras_hub.samplers.GreedySampler):
    """Never writes token 0, which EdRec takes for the end of the text."""

    def get_next_token(self, probabilities):
        return super().get_next_token(probabilities[:, 1:]) + 1


@functools.cache
def adapted(name, **options):
    """One that tests may generate with, and may not change."""
    model = hub_models.build(name)
    kernels = [w for w in model.backbone.weights if len(w.shape) > 1]
    set_random(kernels, scale=0.3)  # Not all tokens are as likely.
    randomize(enable_lora_dropout(model, rank=2, **options), scale=0.5)
    model.compile(sampler=NoPadding())
    return model


def prompts_of(name):
    """Texts of several lengths for the encoder, and for the decoder.

    BLIP-2's encoder sees, too.
    """
    generator = np.random.default_rng(0)

    def text(side, length, lengths):
        ids = generator.integers(1, hub_models.VOCABULARY, (3, length))
        mask = np.arange(length) < np.array(lengths)[:, None]
        return {
            f"{side}_token_ids": (ids * mask).astype("int32"),
            f"{side}_padding_mask": mask.astype("int32"),
        }

    encoder = text("encoder", ENCODER_LENGTH, [6, 3, 5])
    if name == "BLIP2Seq2SeqLM":
        images = generator.normal(size=(3, 16, 16, 3))
        encoder["images"] = images.astype("float32")
    return encoder, text("decoder", LENGTH, PROMPT_LENGTHS.get(name, [2, 4, 1]))


def generated(model, *texts, **options):
    options = {"stop_token_ids": None, "num_samples": 3, "seed": 5, **options}
    inputs = {name: value for text in texts for name, value in text.items()}
    return model.ensemble_generate(inputs, **options)


@pytest.mark.parametrize("name", TASKS)
def test_cache_changes_nothing(name):
    """One instance and three, each with its own encoder and its own cache."""
    encoder, decoder = prompts_of(name)
    ids, prompt = decoder.values()
    for count, samplings in [(1, ["parallel"]), (3, validation.SAMPLINGS)]:
        model = adapted(name, sampling=samplings[0], seed=0)
        reference = Uncached(model, count, 5, encoder, first_token=1)
        expected = reference.write(ids, prompt)
        distributions = reference.distributions(expected)
        for sampling in samplings:
            outputs, uncertainty = generated(
                adapted(name, sampling=sampling, seed=0),
                encoder,
                decoder,
                num_samples=count,
                return_uncertainty=True,
            )
            assert sorted(outputs) == sorted(decoder)
            found = outputs["decoder_token_ids"]
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(uncertainty.token_ids, expected)
            np.testing.assert_array_equal(uncertainty.generated, prompt == 0)
            check_uncertainty(uncertainty, distributions)
    assert np.nanmax(uncertainty.mutual_information) > 0.02


def check_uncertainty(uncertainty, distributions):
    total = entropy(distributions.mean(0))[:, :-1]
    between = total - entropy(distributions).mean(0)[:, :-1]
    place = uncertainty.generated[:, 1:]
    for measured, expected in [
        (uncertainty.predictive_entropy, total),
        (uncertainty.mutual_information, between),
    ]:
        assert np.isnan(measured[~uncertainty.generated]).all()
        np.testing.assert_allclose(
            measured[:, 1:][place], expected[place], atol=1e-4
        )


def test_neighbours_change_nothing():
    """Each prompt alone has the text that it has among others."""
    model = adapted("T5GemmaSeq2SeqLM", seed=0)
    texts = prompts_of("T5GemmaSeq2SeqLM")
    together = generated(model, *texts)["decoder_token_ids"]
    np.testing.assert_array_equal(
        generated(model, *texts)["decoder_token_ids"], together
    )
    for row in range(3):
        one = [{k: v[row : row + 1] for k, v in text.items()} for text in texts]
        alone = generated(model, *one)["decoder_token_ids"]
        np.testing.assert_array_equal(alone, together[row : row + 1])
    others = [
        np.array(generated(model, *texts, seed=seed)["decoder_token_ids"])
        for seed in range(6, 9)
    ]
    assert any((other != together).any() for other in others)


@pytest.fixture(scope="module")
def bart():
    """Bart with a tokenizer of letters."""
    tokenizer = families.letters(keras_hub.models.BartTokenizer)
    keras.utils.set_random_seed(3)
    backbone = keras_hub.models.BartBackbone(
        tokenizer.vocabulary_size(), **families.ENCODER
    )
    preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=8, decoder_sequence_length=8
    )
    model = keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)
    randomize(enable_lora_dropout(model, rank=2, seed=0), scale=1.0)
    model.compile(sampler="greedy")
    return model


def test_text_for_both_sides(bart):
    """Strings, one or several, for the encoder alone or for both."""
    options = {"max_length": 8, "seed": 2}
    both = {"encoder_text": ["a dog", "the fox"], "decoder_text": ["t", "fo"]}
    texts = bart.ensemble_generate(both, **options)
    assert [text[:2].strip()[0] for text in texts] == ["t", "f"]
    one = {"encoder_text": "a dog", "decoder_text": "t"}
    for _ in range(2):  # The dictionary is left as it is.
        assert bart.ensemble_generate(one, **options) == texts[0]
    empty = {"encoder_text": "a dog", "decoder_text": ""}
    text, uncertainty = bart.ensemble_generate(
        "a dog", return_uncertainty=True, **options
    )
    assert bart.ensemble_generate(empty, **options) == text
    assert uncertainty.token_ids.shape == (1, 8)
    assert uncertainty.generated[0, 2:].any()


def test_no_dropout_is_generate():
    """All instances are the plain adapted model, which stops where it stops."""
    model = adapted("T5GemmaSeq2SeqLM", dropout_rate=0.0, seed=0)
    encoder, decoder = prompts_of("T5GemmaSeq2SeqLM")
    free = model.generate({**encoder, **decoder}, stop_token_ids=None)
    stop = [int(free["decoder_token_ids"][2, 2])]
    expected = model.generate({**encoder, **decoder}, stop_token_ids=stop)
    assert not np.array(expected["decoder_padding_mask"]).all()
    found = generated(model, encoder, decoder, stop_token_ids=stop)
    for name in ("decoder_token_ids", "decoder_padding_mask"):
        np.testing.assert_array_equal(found[name], expected[name])


def masked(text, lengths):
    (name,) = (name for name in text if name.endswith("padding_mask"))
    places = np.arange(text[name].shape[1])
    return {**text, name: (places < np.array(lengths)[:, None]).astype("int32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, d: (e, masked(d, [2, 0, 1])), "Decoder prompt 1 is empty"),
        (
            lambda e, d: (e, masked(d, [2, 4, LENGTH])),
            f"Decoder prompt 2 fills all {LENGTH} positions",
        ),
        (
            lambda e, d: ({k: v[:2] for k, v in e.items()}, d),
            "encoder_token_ids: 2.*decoder_token_ids: 3",
        ),
        (
            lambda e, d: (e, {k: np.tile(v, 2) for k, v in d.items()}),
            r"positions for 8 tokens.*max_length=16",
        ),
        (
            lambda e, d: ({k: np.tile(v, 2) for k, v in e.items()}, d),
            r"12 tokens for the encoder.*`encoder_sequence_length`",
        ),
        (
            lambda e, d: (e, {"decoder_token_ids": d["decoder_token_ids"]}),
            r"'decoder_' before them.*'encoder_padding_mask'",
        ),
    ],
)
def test_bad_prompts_are_answered(change, message):
    model = adapted("BartSeq2SeqLM", seed=0)
    with pytest.raises(ValueError, match=message):
        generated(model, *change(*prompts_of("BartSeq2SeqLM")))
    assert model._generation is None


def test_prompts_are_not_stripped(bart):
    with pytest.raises(ValueError, match="without the encoder's"):
        bart.ensemble_generate("a dog", 8, strip_prompt=True)


def bart_bytes(encoder_length, length):
    """Keys and values of both sides, 2 layers of 16, and the encoder's 16."""
    of_keys_and_values = 2 * 2 * 16 * (length + encoder_length)
    return 4 * (of_keys_and_values + 16 * encoder_length)


def t5gemma_bytes(encoder_length, length):
    """2 heads of 4 instead, and the encoder's mask."""
    of_keys_and_values = 2 * 2 * 8 * (length + encoder_length)
    return 4 * (of_keys_and_values + 17 * encoder_length)


@pytest.mark.parametrize(
    ("name", "size"),
    [("BartSeq2SeqLM", bart_bytes), ("T5GemmaSeq2SeqLM", t5gemma_bytes)],
)
def test_cache_is_sized_before_it_is_there(name, size):
    model = adapted(name, seed=0)
    texts = prompts_of(name)
    one = 3 * size(ENCODER_LENGTH, LENGTH)
    with pytest.raises(ValueError, match=f"{one * 10**10:,} bytes.*{one:,}"):
        generated(model, *texts, num_samples=10**10)
