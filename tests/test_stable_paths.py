"""Files name layers alike in every process, whatever Keras numbers them."""

import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import randomize
from helpers import seeded_dense

import keras_lora_dropout as kld
from keras_lora_dropout.storage.adapter_files import read_adapter_files


def without_names(**options):
    """A model whose layers Keras names: another number each time."""
    layers = [seeded_dense(5, seed, activation="tanh") for seed in (1, 2, 3)]
    model = keras.Sequential([keras.Input((4,)), *layers, seeded_dense(2, 4)])
    return kld.enable_lora_dropout(model, rank=2, seed=0, **options)


def paths_of(model):
    return [path for path, _ in model.adapted_layers]


@pytest.mark.parametrize("adaptive", [False, True])
def test_adapters_fit_whatever_was_built_before(tmp_path, adaptive):
    budget = kld.RankBudget(
        1, warmup_steps=0, final_steps=1, mask_interval=1, total_steps=2
    )
    options = {"rank_budget": budget} if adaptive else {}
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    model, other = without_names(**options), without_names(**options)
    assert not set(paths_of(model)) & set(paths_of(other))
    randomize(model)
    if adaptive:
        for _, layer in model.adapted_layers:
            layer.lora_lambda.assign([1.0, 2.0])
        model.compile("sgd", "mse")
        model.fit(x, np.ones((6, 2)), batch_size=3, verbose=0)
        model.compact_ranks()
    model.save_adapters(tmp_path)
    other.load_adapters(tmp_path)
    assert_close(array(other(x)), array(model(x)))
    assert list(other.rank_pattern().values()) == list(
        model.rank_pattern().values()
    )
    settings, _ = read_adapter_files(tmp_path)
    assert sorted(settings["layers"]) == ["dense", "dense_1", "dense_2"]
    assert settings["rank_pattern"].keys() == settings["layers"].keys()
    # As an adapter beside another one, too.
    third = without_names(**options)
    third.add_adapter("other", path=tmp_path)
    third.set_adapter("other")
    assert_close(array(third(x)), array(model(x)))


def test_given_names_keep_their_meaning(tmp_path):
    def build():
        layers = [seeded_dense(5, 1), keras.layers.ReLU(name="dense")]
        other = keras.layers.EinsumDense("bi,io->bo", 5)
        head = seeded_dense(2, 4, name="head")
        model = keras.Sequential([keras.Input((4,)), *layers, other, head])
        return kld.enable_lora_dropout(model, rank=2)

    build()
    model = randomize(build())
    model.save_adapters(tmp_path)
    settings, _ = read_adapter_files(tmp_path)
    dense, einsum = paths_of(model)
    assert sorted(settings["layers"]) == sorted([dense, "einsum_dense"])
    assert einsum != "einsum_dense"  # Others are named alike nevertheless.


def test_other_layers_are_refused_by_name(tmp_path):
    fewer = without_names(
        exclude_layers=lambda _, lyr: lyr.kernel.shape[0] == 4
    )
    fewer.save_adapters(tmp_path)
    model = without_names()
    with pytest.raises(ValueError, match="is adapted in the model, but not"):
        model.load_adapters(tmp_path)
