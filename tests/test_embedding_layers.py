"""Adapted embeddings: what they compute, in both directions."""

import keras
import keras_hub
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops
from peft_layers import run_oracle

import keras_lora_dropout as kld

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

WORDS, FEATURES, RANK = 7, 5, 2
CLASSES = [kld.LoRADropoutEmbedding, kld.LoRADropoutReversibleEmbedding]
X = np.array([[0, 3, 6], [1, 1, 5], [6, 0, 2], [4, 4, 4]])
HIDDEN = (
    np.random.default_rng(2).normal(size=(4, 3, FEATURES)).astype("float32")
)


def built(cls=kld.LoRADropoutReversibleEmbedding, **options):
    options = {"rank": RANK, "alpha": 3, "seed": 1, **options}
    layer = cls(WORDS, FEATURES, **options)
    layer.build((None, 3))
    set_random(layer.weights, scale=1.0)
    return layer


def table(layer, mask_a=1.0, mask_b=1.0):
    """The embeddings with the masked delta, in float64."""
    a, b = (array(factor) for factor in layer.factors)
    delta = (np.broadcast_to(mask_a, WORDS)[:, None] * a) @ (b * mask_b)
    return array(layer.embeddings) + layer.scaling * delta


@pytest.fixture(params=CLASSES)
def cls(request):
    return request.param


@given(st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=10)
def test_each_block_of_rows_has_masks_of_its_own(blocks, seed):
    generator = np.random.default_rng(seed)
    layer = built()
    keep = generator.integers(0, 2, (blocks, WORDS + FEATURES))
    x = generator.integers(0, WORDS, (2 * blocks, 3))
    hidden = generator.normal(size=(2 * blocks, 3, FEATURES)).astype("float32")
    with draws_of([layer], keep, rows=2 * blocks):
        found = layer(x, training=True)
        logits = layer(hidden, reverse=True, training=True)
    for n, masks in enumerate(keep):
        rows = slice(2 * n, 2 * n + 2)
        masked = table(layer, masks[:WORDS], masks[WORDS:])
        assert_close(found[rows], masked[x[rows]])
        assert_close(logits[rows], hidden[rows] @ masked.T, 1e-4)


@pytest.mark.parametrize("rescale, factor", [(True, 1), (False, 0.36)])
def test_inference_is_the_mean_network(cls, rescale, factor):
    layer = built(cls, dropout_rate=0.4, rescale=rescale)
    plain = array(layer.embeddings)
    mean = plain + factor * (table(layer) - plain)
    assert_close(layer(X), mean[X])
    if cls is not kld.LoRADropoutEmbedding:
        assert_close(layer(HIDDEN, reverse=True), HIDDEN @ mean.T, 1e-4)


def test_a_fresh_adapter_has_no_effect_and_leaves_other_words_alone(cls):
    layer = cls(WORDS, FEATURES, rank=RANK, dropout_rate=0, seed=0)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    start = array(layer.embeddings)
    assert_close(model(X), start[X])
    assert not array(layer.lora_kernel_a).any()
    assert array(layer.lora_kernel_b).std() > 0.3
    model.compile(keras.optimizers.Adam(0.1), "mse")
    x = np.array([[0, 1, 2]])
    model.fit(x, np.ones((1, 3, FEATURES)), epochs=3, verbose=0, shuffle=False)
    words = np.arange(WORDS)
    moved = np.abs(array(layer(words)) - start[words]).max(axis=1)
    assert (moved[:3] > 0.01).all()
    assert_close(moved[3:], np.zeros(WORDS - 3))
    np.testing.assert_array_equal(array(layer.embeddings), start)


def test_masks_change_from_call_to_call(cls):
    layer = built(cls)
    first, second = (array(layer(X, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_separate_tables_adapt_the_embeddings_alone():
    layer = built(tie_weights=False)
    expected = HIDDEN @ array(layer.reverse_embeddings)
    assert_close(layer(HIDDEN, reverse=True, training=True), expected, 1e-4)
    assert np.abs(array(layer(X)) - array(layer.embeddings)[X]).max() > 0.1


def test_logits_are_capped_and_in_their_own_dtype():
    layer = built(logit_soft_cap=2.0, reverse_dtype="float32", dropout_rate=0)
    expected = 2 * np.tanh(HIDDEN @ table(layer).T / 2)
    assert_close(layer(HIDDEN, reverse=True, training=True), expected, 1e-4)
    layer = built(reverse_dtype="float32", dtype="bfloat16")
    logits = layer(HIDDEN, reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    found = layer(X)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"


def test_the_padding_mask_goes_on(cls):
    layer = built(cls, mask_zero=True)
    inputs = keras.Input((3,), dtype="int32")
    pooled = keras.layers.GlobalAveragePooling1D()(layer(inputs))
    model = keras.Model(inputs, pooled)
    rows = array(layer(X))
    expected = [
        row[words != 0].mean(0) for row, words in zip(rows, X, strict=True)
    ]
    assert_close(model(X), np.array(expected))


def test_configuration_and_weights_come_back(cls, tmp_path):
    layer = built(cls)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].get_config() == layer.get_config()
    assert_close(loaded(X), model(X))
    assert_close(loaded(X, training=True), model(X, training=True))


def test_a_wrong_layer_is_refused(cls):
    with pytest.raises(ValueError, match=r"`rank` is larger than.*at most 5"):
        built(cls, rank=6)
    with pytest.raises(ValueError, match="without `embeddings_constraint`"):
        built(cls, embeddings_constraint="non_neg")
    layer = (
        keras.layers.Embedding
        if cls is kld.LoRADropoutEmbedding
        else keras.layers.ReversibleEmbedding
    )(WORDS, FEATURES, name="words")
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), layer, keras.layers.Dense(2)]
    )
    layer.quantize("int8")
    with pytest.raises(ValueError, match=r"\(int8\), but.*floats alone"):
        kld.enable_lora_dropout(model, target_layers=["words"], rank=2)


def test_embeddings_equal_those_of_peft():
    layer = built(kld.LoRADropoutEmbedding, dropout_rate=0)
    tensors = {
        "base_layer.weight": array(layer.embeddings),
        "lora_embedding_A.default": array(layer.lora_kernel_a).T,
        "lora_embedding_B.default": array(layer.lora_kernel_b).T,
    }
    case = {
        "layer": "Embedding",
        "arguments": [WORDS, FEATURES],
        "r": RANK,
        "lora_alpha": 3,
        "tensors": {name: value.tolist() for name, value in tensors.items()},
        "inputs": X.tolist(),
    }
    assert_close(layer(X), np.array(run_oracle([case])[0]))


# In models

TOKENS = np.random.default_rng(0).integers(1, 20, (4, 8)).astype("int32")


def language_model(target=("token_embedding", "query"), **options):
    """A tiny GPT-2 whose input and output share one adapted table."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    options = {"rank": 2, "num_samples": 2, "seed": 0, **options}
    kld.enable_lora_dropout(model, target_layers=list(target), **options)
    model.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
        weighted_metrics=[],
    )
    return model


def data():
    return {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}


def trained(**options):
    model = language_model(**options)
    for _, layer in model.adapted_layers:
        set_random(layer.factors)
    for _ in range(2):
        model.train_on_batch(data(), np.roll(TOKENS, -1, axis=1))
    return model


def test_tied_embeddings_train_alike_in_parallel_and_in_sequence():
    first, second = (trained(sampling=s) for s in ("parallel", "sequential"))
    paths = [path for path, _ in first.adapted_layers]
    assert any("token_embedding" in path for path in paths) and len(paths) == 2
    for a, b in zip(
        first.trainable_weights, second.trainable_weights, strict=True
    ):
        assert_close(a, b, 1e-4)
    options = {"seed": 3, "return_samples": True, "verbose": 0}
    samples = first.ensemble_predict(data(), **options)
    assert_close(samples, second.ensemble_predict(data(), **options), 1e-4)
    assert np.abs(samples[0] - samples[1]).max() > 1e-3


def test_tied_embeddings_merge_and_come_back(tmp_path):
    model = trained()
    expected = model.predict(data(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(data(), verbose=0), expected, 1e-4)
    model.save_adapters(tmp_path / "adapters")
    fresh = language_model()
    fresh.load_adapters(tmp_path / "adapters")
    assert_close(fresh.predict(data(), verbose=0), expected, 1e-4)
    instances = list(model.merge_instances(num_samples=2, seed=3))
    mean = np.mean([m.predict(data(), verbose=0) for m in instances], axis=0)
    ensemble = model.ensemble_predict(data(), num_samples=2, seed=3, verbose=0)
    assert_close(mean, ensemble, 1e-4)
    model.merge_adapters()
    assert type(model) is keras_hub.models.GPT2CausalLM
    assert_close(model.predict(data(), verbose=0), expected, 1e-4)
    kld.unmerge_adapters(model)
    assert_close(model.predict(data(), verbose=0), expected, 1e-4)
    with model.disable_adapters():
        base = language_model().predict(data(), verbose=0)
        assert_close(model.predict(data(), verbose=0), base, 1e-4)


def test_ranks_of_embeddings_adapt():
    budget = kld.RankBudget(
        target_rank=1, warmup_steps=1, final_steps=1, mask_interval=1
    )
    model = language_model(rank_budget=budget, dropout_rate=0.2)
    y = np.roll(TOKENS, -1, axis=1)
    model.fit(data(), y, batch_size=1, epochs=2, verbose=0, shuffle=False)
    assert sum(model.rank_pattern().values()) == 2
    expected = model.predict(data(), verbose=0)
    model.compact_ranks()
    assert_close(model.predict(data(), verbose=0), expected, 1e-4)


def test_ensembles_generate_with_adapted_embeddings():
    model = trained()
    prompt = data()
    prompt["padding_mask"][:, 4:] = 0
    text = model.ensemble_generate(prompt, stop_token_ids=None, seed=0)
    tokens = ops.convert_to_numpy(text["token_ids"])
    np.testing.assert_array_equal(tokens[:, :4], TOKENS[:, :4])


def test_embeddings_have_one_start():
    with pytest.raises(ValueError, match="'gaussian' is not made for Revers"):
        language_model(init_lora_weights="gaussian")
