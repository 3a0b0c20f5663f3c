"""Adapted language models, small and real, for the tests."""

import functools
import pathlib
import sys

import families
import keras
import pytest
import real_data
from helpers import randomize

from keras_lora_dropout import enable_lora_dropout

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

STORIES = "weights", "stories260K"
needs_stories = real_data.needs(*STORIES)
ATTENTION = ["query", "key", "value", "attention_output"]


def stories(**options):
    """stories260K, a Llama 2 that writes English."""
    from stories import load_stories

    return load_stories(real_data.REAL.joinpath(*STORIES), **options)


BASES = {
    "stories": stories,
    "llama": families.llama,
    "gemma": families.gemma,
}
ANY = [
    pytest.param("stories", marks=needs_stories),
    "llama",
    "gemma",
]


def adapted(name, scale=0.1, **options):
    """An adapted language model whose adapters are not zero."""
    keras.utils.set_random_seed(7)
    options = {"target_layers": ATTENTION, "rank": 4, "seed": 0, **options}
    return randomize(enable_lora_dropout(BASES[name](), **options), scale=scale)


@functools.cache
def shared(name):
    """One that tests may generate with, greedily, and may not change."""
    model = adapted(name)
    model.compile(sampler="greedy")
    return model
