"""`ensemble_generate` against KerasHub's `generate`, and against no cache."""

import hub_models
import keras
import keras_hub
import language_models
import numpy as np
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import randomize
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras_hub.samplers import GreedySampler
from keras_hub.samplers import RandomSampler
from keras_hub.samplers import TopKSampler
from keras_hub.samplers import TopPSampler
from uncached import Uncached
from uncached import entropy
from uncached import softmax

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout.inference.generation import measure

PROMPTS = ["the quick", "a fox jumped over", "brown dog"]
LENGTH = 24


def tokens_of(model, prompts=PROMPTS, length=LENGTH):
    """Prompts as `generate` makes them: token ids and where they are."""
    batch = model.preprocessor.generate_preprocess(prompts, length)
    return [
        np.array(keras.ops.convert_to_numpy(batch[name]))
        for name in ("token_ids", "padding_mask")
    ]


@pytest.mark.parametrize("name", language_models.ANY)
def test_cache_changes_nothing(name):
    """One instance and four, each with its own cache, token for token."""
    model = language_models.shared(name)
    ids, prompt = tokens_of(model, length=20)
    texts = []
    for count in (1, 4):
        expected = Uncached(model, count, seed=5).write(ids, prompt)
        _, uncertainty = model.ensemble_generate(
            PROMPTS,
            max_length=20,
            stop_token_ids=None,
            num_samples=count,
            seed=5,
            return_uncertainty=True,
        )
        np.testing.assert_array_equal(uncertainty.token_ids, expected)
        np.testing.assert_array_equal(uncertainty.generated, prompt == 0)
        texts.append(expected.tolist())
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "sampler",
    [
        GreedySampler(),
        RandomSampler(temperature=0.7, seed=3),
        TopKSampler(k=4, seed=3),
        TopPSampler(p=0.6, temperature=1.3, seed=3),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_no_dropout_is_generate(sampler):
    """All instances are the plain adapted model: the same tokens, sampled."""
    model = language_models.adapted("llama", dropout_rate=0, scale=0.5)
    model.compile(sampler=sampler)
    start = [keras.ops.convert_to_numpy(v) for v in sampler.variables]
    expected = model.generate(PROMPTS, LENGTH)
    after = [keras.ops.convert_to_numpy(v) for v in sampler.variables]
    for variable, value in zip(sampler.variables, start, strict=True):
        variable.assign(value)
    assert model.ensemble_generate(PROMPTS, LENGTH, num_samples=3) == expected
    for variable, value in zip(sampler.variables, after, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_batch_changes_nothing():
    model = language_models.shared("llama")
    options = {"max_length": LENGTH, "seed": 2}
    together = model.ensemble_generate(PROMPTS, **options)
    assert isinstance(together, list)
    alone = [model.ensemble_generate(p, **options) for p in PROMPTS]
    assert alone == together
    assert model.ensemble_generate(PROMPTS, **options) == together
    others = [
        model.ensemble_generate(PROMPTS, max_length=LENGTH, seed=seed)
        for seed in range(3, 6)
    ]
    assert any(text != together for text in others)


def test_output_average_is_another():
    """Logits are averaged on request; some tokens show which was."""
    model = language_models.adapted("llama", scale=3.0)
    model.compile(sampler="greedy")
    ids = np.random.default_rng(0).integers(4, 40, (40, 4)).astype("int32")
    prompt = np.array([[1, 1, 1, 0]] * len(ids))
    last = Uncached(model, 2, seed=1).distributions(ids)[:, :, 2]
    expected = {
        "output": np.log(last).mean(0).argmax(-1),
        "probability": last.mean(0).argmax(-1),
    }
    assert list(expected["output"]) != list(expected["probability"])
    model.preprocessor = None
    for average, tokens in expected.items():
        outputs = model.ensemble_generate(
            {"token_ids": ids, "padding_mask": prompt},
            stop_token_ids=None,
            num_samples=2,
            seed=1,
            average=average,
        )
        np.testing.assert_array_equal(outputs["token_ids"][:, 3], tokens)


def test_uncertainty_is_that_of_the_tokens():
    """Measured from the instances' distributions without a cache."""
    model = language_models.shared("llama")
    plain = model.ensemble_generate(PROMPTS, LENGTH, seed=4)
    texts, uncertainty = model.ensemble_generate(
        PROMPTS, LENGTH, seed=4, return_uncertainty=True
    )
    assert texts == plain
    instances = Uncached(model, 4, seed=4).distributions(uncertainty.token_ids)
    total = entropy(instances.mean(0))[:, :-1]
    between = total - entropy(instances).mean(0)[:, :-1]
    place = uncertainty.generated[:, 1:]
    for measured, expected in [
        (uncertainty.predictive_entropy, total),
        (uncertainty.mutual_information, between),
    ]:
        assert measured.dtype == "float32"
        assert np.isnan(measured[~uncertainty.generated]).all()
        np.testing.assert_allclose(
            measured[:, 1:][place], expected[place], atol=1e-5
        )
    assert (uncertainty.mutual_information[uncertainty.generated] > 0).any()


finite = st.floats(-80, 80, width=32)


@settings(deadline=None)
@given(arrays.arrays("float32", (3, 2, 5), elements=finite))
def test_measures_are_entropies(logits):
    """As NumPy has them; the instances' part is nothing, or positive."""
    measured = {
        name: keras.ops.convert_to_numpy(value)
        for name, value in measure(keras.ops.convert_to_tensor(logits)).items()
    }
    likely = softmax(logits) + 1e-300
    total = entropy(likely.mean(0))
    np.testing.assert_allclose(measured["predictive_entropy"], total, atol=1e-4)
    between = np.maximum(total - entropy(likely).mean(0), 0)
    np.testing.assert_allclose(
        measured["mutual_information"], between, atol=1e-4
    )
    alone = measure(keras.ops.convert_to_tensor(logits[:1]))
    information = keras.ops.convert_to_numpy(alone["mutual_information"])
    np.testing.assert_allclose(information, 0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*'rwkv_ops' package is not installed")
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_prompts_that_are_read_apart(sampling):
    """RWKV7 has a state in place of a cache, and gives the prompt back."""
    model = hub_models.build("RWKV7CausalLM")
    enable_lora_dropout(model, rank=2, sampling=sampling, seed=0)
    randomize(model)
    model.compile(sampler="greedy")
    ids = np.random.default_rng(0).integers(1, hub_models.VOCABULARY, (3, 8))
    prompt = np.array([[1, 0, 0, 0]] * 3)
    _, uncertainty = model.ensemble_generate(
        {
            "token_ids": ids[:, :-1].astype("int32"),
            "input_padding_mask": np.ones((3, 7), "int32"),
            "predict_token_ids": (ids[:, -1:] * prompt).astype("int32"),
            "padding_mask": prompt.astype("int32"),
        },
        stop_token_ids=None,
        num_samples=2,
        seed=1,
        return_uncertainty=True,
    )
    place = np.arange(11) >= 8
    np.testing.assert_array_equal(uncertainty.generated, [place] * 3)
    reference = Uncached(model, 2, seed=1)
    start = np.pad(ids, ((0, 0), (0, 3)))
    expected = reference.write(start, np.array([~place] * 3))
    np.testing.assert_array_equal(uncertainty.token_ids, expected)
    total = entropy(reference.distributions(expected).mean(0))
    measured = uncertainty.predictive_entropy
    assert np.isnan(measured[:, :8]).all()
    np.testing.assert_allclose(measured[:, 8:], total[:, 7:-1], atol=1e-4)


def test_stop_tokens_and_stripped_prompts():
    model = language_models.shared("llama")
    options = {"max_length": LENGTH, "seed": 2}
    _, free = model.ensemble_generate(
        PROMPTS[0], stop_token_ids=None, return_uncertainty=True, **options
    )
    start = int((~free.generated[0]).sum())
    stop = int(free.token_ids[0, start + 2])
    places = np.flatnonzero(free.token_ids[0, start:] == stop)
    _, stopped = model.ensemble_generate(
        PROMPTS[0], stop_token_ids=[stop], return_uncertainty=True, **options
    )
    written = stopped.token_ids[0][stopped.generated[0]]
    np.testing.assert_array_equal(
        written, free.token_ids[0, start : start + places[0] + 1]
    )
    whole = model.ensemble_generate(PROMPTS, **options)
    answers = model.ensemble_generate(PROMPTS, strip_prompt=True, **options)
    assert answers != whole
    for text, answer in zip(whole, answers, strict=True):
        assert text.endswith(answer)


def test_tokens_instead_of_text():
    """Without a preprocessor, tokens come in and go out, as in `generate`."""
    model = language_models.adapted("llama")
    model.compile(sampler="greedy")
    options = {"stop_token_ids": None, "seed": 2}
    ids, prompt = tokens_of(model)
    _, expected = model.ensemble_generate(
        PROMPTS, LENGTH, return_uncertainty=True, **options
    )
    model.preprocessor = None
    outputs = model.ensemble_generate(
        {"token_ids": ids, "padding_mask": prompt}, **options
    )
    assert sorted(outputs) == ["padding_mask", "token_ids"]
    np.testing.assert_array_equal(outputs["token_ids"], expected.token_ids)


def test_compiled_once():
    """Equal requests run one function; `generate` keeps its own."""
    model = language_models.adapted("llama")
    model.compile(sampler="greedy")
    plain = model.generate(PROMPTS, LENGTH)
    mean_network = model.generate_function
    passes = []
    step = type(model).generate_step

    def counted(self, *args, **kwargs):
        passes.append(self._generation)
        return step(self, *args, **kwargs)

    model.generate_step = counted.__get__(model)
    for seed in (1, 2, 3):
        model.ensemble_generate(PROMPTS, LENGTH, seed=seed)
    assert len(passes) == (3 if BACKEND == "torch" else 1)
    assert model.generate_function is mean_network
    assert model.generate(PROMPTS, LENGTH) == plain
    with model.disable_adapters():
        base = model.generate(PROMPTS, LENGTH)
        assert model.ensemble_generate(PROMPTS, LENGTH, seed=1) == base


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_searching_samplers_are_refused(sampler):
    model = language_models.adapted("llama")
    model.compile(sampler=sampler)
    name = type(model.sampler).__name__
    with pytest.raises(ValueError, match=f"{name}.*sampler=.greedy"):
        model.ensemble_generate(PROMPTS, LENGTH)


def test_unknown_sampler_is_named():
    model = language_models.adapted("llama")
    model.sampler = "nucleus"
    with pytest.raises(ValueError, match=r"'nucleus'.*greedy"):
        model.ensemble_generate(PROMPTS, LENGTH)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "`inputs` holds no examples"),
        (PROMPTS, {"max_length": 3}, "Prompt 0 fills all 3 positions"),
        (PROMPTS, {"num_samples": 0}, "`num_samples` must be a positive"),
        (PROMPTS, {"average": "logits"}, "`average` must be"),
        (PROMPTS, {"seed": -1}, "`seed` must lie"),
        (PROMPTS, {"return_uncertainty": 1}, "must be True or False"),
        (PROMPTS, {"num_samples": 10**10}, r"need [\d,]+ bytes"),
    ],
)
def test_bad_input_is_answered(inputs, options, message):
    model = language_models.shared("llama")
    plain = model.sampler
    options = {"max_length": LENGTH, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        model.ensemble_generate(inputs, **options)
    assert model.sampler is plain
    assert model._generation is None


def test_empty_prompt_is_named():
    model = language_models.adapted("llama")
    model.preprocessor = None
    tokens = {
        "token_ids": np.ones((2, 6), "int32"),
        "padding_mask": np.array([[1, 1, 0, 0, 0, 0], [0] * 6]),
    }
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        model.ensemble_generate(tokens, stop_token_ids=None)


def test_text_without_a_preprocessor_is_answered():
    model = language_models.adapted("llama")
    model.preprocessor = None
    with pytest.raises(ValueError, match=r"Without a preprocessor.*list"):
        model.ensemble_generate(PROMPTS, stop_token_ids=None)


def test_empty_text_goes_on_from_the_start():
    """KerasHub puts a start token before it; no text is no example."""
    model = language_models.shared("llama")
    options = {"max_length": LENGTH, "seed": 2}
    text = model.ensemble_generate("", **options)
    assert text and model.ensemble_generate([""], **options) == [text]


def test_cache_is_sized_before_it_is_there():
    """Keys and values of 2 layers, 2 heads of 4, float32."""
    model = language_models.shared("llama")
    one = 2 * 2 * len(PROMPTS) * LENGTH * 2 * 4 * 4
    with pytest.raises(ValueError, match=f"{one * 10**10:,} bytes.*{one:,}"):
        model.ensemble_generate(PROMPTS, LENGTH, num_samples=10**10)


def test_positions_are_limited():
    model = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=20,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
            max_sequence_length=6,
        )
    )
    model = language_models.enable_lora_dropout(model, rank=2)
    model.compile(sampler="greedy")

    def tokens(length):
        mask = np.zeros((1, length), "int32")
        mask[:, 0] = 1
        return {"token_ids": mask, "padding_mask": mask}

    outputs = model.ensemble_generate(tokens(6), stop_token_ids=None)
    assert np.shape(outputs["token_ids"]) == (1, 6)
    with pytest.raises(ValueError, match="positions for 6 tokens"):
        model.ensemble_generate(tokens(7), stop_token_ids=None)


def test_models_that_do_not_generate_say_so():
    with pytest.raises(ValueError, match="does not generate text"):
        adapted_mlp().ensemble_generate(["the fox"])
