"""`ensemble_generate` where the instances run one after another."""

import functools
import os

import hub_models
import language_models
import numpy as np
import pytest
from helpers import BACKEND
from helpers import randomize
from test_hub_models import runs_in_sequence
from uncached import Uncached

from keras_lora_dropout import enable_lora_dropout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core.instances import LayoutError

PROMPTS = ["the quick", "a fox jumped over", "brown dog"]
MIXTURES = [
    name
    for name in hub_models.tried_tasks()
    if runs_in_sequence(name) and name.endswith("CausalLM")
]
# Compilation takes its time.
if BACKEND != "torch" and not os.environ.get("ALL_MODELS"):
    MIXTURES = ["MixtralCausalLM"]
# KerasHub's linear attention reads the last token of a prompt twice, so that
# its `generate`, too, writes something else with a cache than without one.
CACHE_DIFFERS = ("Qwen3_5MoeCausalLM",)


@functools.cache
def mixture(name, sampling="sequential", **options):
    """A mixture of experts that tests may generate with."""
    model = enable_lora_dropout(
        hub_models.build(name), rank=2, sampling=sampling, seed=0, **options
    )
    randomize(model, scale=1.0)
    model.compile(sampler="greedy")
    return model


def tokens():
    """Prompts of several lengths: token ids and where they are."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, hub_models.VOCABULARY, (3, 8)).astype("int32")
    prompt = (np.arange(8) < np.array([[3], [5], [2]])).astype("int32")
    return ids * prompt, prompt


def generated(model, ids, prompt, **options):
    outputs = model.ensemble_generate(
        {"token_ids": ids, "padding_mask": prompt},
        stop_token_ids=None,
        **options,
    )
    return np.array(outputs["token_ids"])


@pytest.mark.parametrize(
    "name", [name for name in MIXTURES if name not in CACHE_DIFFERS]
)
def test_mixtures_of_experts_generate(name):
    """One instance and three, each with its own cache, token for token."""
    ids, prompt = tokens()
    texts = []
    for count in (1, 3):
        options = {"num_samples": count, "seed": 5}
        model = mixture(name)
        expected = Uncached(model, count, 5).write(ids, prompt)
        found = generated(model, ids, prompt, **options)
        np.testing.assert_array_equal(found, expected)
        texts.append(found.tolist())
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", MIXTURES)
def test_no_dropout_is_generate(name):
    """All instances are the plain adapted model."""
    model = mixture(name, dropout_rate=0.0)
    ids, prompt = tokens()
    expected = model.generate(
        {"token_ids": ids, "padding_mask": prompt}, stop_token_ids=None
    )
    found = generated(model, ids, prompt, num_samples=3, seed=1)
    np.testing.assert_array_equal(found, expected["token_ids"])


def test_neighbours_change_nothing():
    model = mixture("MixtralCausalLM")
    ids, prompt = tokens()
    options = {"num_samples": 3, "seed": 2}
    together = generated(model, ids, prompt, **options)
    for row in range(len(ids)):
        only = slice(row, row + 1)
        alone = generated(model, ids[only], prompt[only], **options)
        np.testing.assert_array_equal(alone, together[only])


def test_mixtures_of_experts_say_how_they_generate():
    """In one batch, their experts see the tokens of all instances."""
    model = mixture("MixtralCausalLM", "parallel")
    with pytest.raises(LayoutError, match='pass `sampling="sequential"`'):
        generated(model, *tokens(), num_samples=3)


@pytest.mark.parametrize("name", language_models.ANY)
def test_sequential_is_parallel(name):
    options = {
        "max_length": 20,
        "num_samples": 3,
        "seed": 5,
        "return_uncertainty": True,
    }
    found = []
    for sampling in ("parallel", "sequential"):
        model = language_models.adapted(name, scale=0.5, sampling=sampling)
        model.compile(sampler="greedy")
        texts, uncertainty = model.ensemble_generate(PROMPTS, **options)
        found.append((texts, uncertainty))
    (texts, first), (others, second) = found
    assert texts == others
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.generated, second.generated)
    for measure in ("predictive_entropy", "mutual_information"):
        np.testing.assert_allclose(
            getattr(first, measure), getattr(second, measure), atol=1e-4
        )


def test_one_instance_at_a_time():
    """No layer is called with more than one instance's rows and masks."""
    model = language_models.adapted("llama", sampling="sequential")
    model.compile(sampler="greedy", run_eagerly=True)
    seen = []
    step = model.call_with_cache

    def recorded(token_ids, *args, **kwargs):
        draws = masks.current_draws()
        if draws is not None:  # Not while the size of the cache is inferred.
            seen.append((*token_ids.shape, draws.groups))
        return step(token_ids, *args, **kwargs)

    model.call_with_cache = recorded
    model.ensemble_generate(PROMPTS, 20, num_samples=4, seed=0)
    rows, lengths, groups = zip(*seen, strict=True)
    assert set(rows) == {len(PROMPTS)}
    assert set(groups) == {1}
    # First the prompts of each instance, then each token of all of them.
    assert lengths[:4] == (20,) * 4
    assert set(lengths[4:]) == {1}
    assert len(lengths) % 4 == 0
