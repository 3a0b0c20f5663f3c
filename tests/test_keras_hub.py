"""KerasHub tasks: raw text and images in, adapted models and ensembles out."""

import math

import families
import keras
import numpy as np
import pytest
from families import FAMILIES
from helpers import assert_close
from helpers import randomize
from keras import ops
from keras_hub import models

import keras_lora_dropout as kld
from keras_lora_dropout.core import masks

# KerasHub reads arrays in the order given and says so of `fit`'s default; and
# its tokenizers leave closing a vocabulary file to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f[0].__name__)
def case(request):
    """A family's adapted task and what is expected of it."""
    family, layers, weights = request.param
    model = family()
    original = type(model)
    x, y = families.data_of(family)
    fresh = model.predict(x, verbose=0)
    kld.enable_lora_dropout(model, rank=2, num_samples=3, seed=0)
    return model, original, x, y, fresh, layers, weights


def test_what_is_adapted(case):
    model, original, x, _, fresh, layers, weights = case
    assert isinstance(model, original)
    assert_close(model.predict(x, verbose=0), fresh, 1e-5)
    adapted = model.adapted_layers
    assert len(adapted) == 2 * layers
    assert 2 * weights == sum(
        math.prod(factor.shape)
        for _, layer in adapted
        for factor in layer.factors
    )
    adapters = {id(f) for _, layer in adapted for f in layer.factors}
    inside = {id(v) for v in model.backbone.variables}
    for variable in model.trainable_variables:
        assert id(variable) in adapters or id(variable) not in inside
    for variable in model.variables:
        is_head = id(variable) not in inside and "seed" not in variable.path
        if is_head and "generator" not in variable.path:
            assert variable.trainable


def test_fit_predict_and_ensemble_on_raw_data(case):
    model, _, x, y, *_ = case
    randomize(model, scale=0.5)
    trained = {id(v) for v in model.trainable_variables}
    frozen = [
        (v, ops.convert_to_numpy(v))
        for v in model.weights
        if id(v) not in trained
    ]
    options = {"batch_size": 3, "verbose": 0}
    history = (
        model.fit(x, **options) if y is None else model.fit(x, y, **options)
    )
    assert np.isfinite(history.history["loss"]).all()
    for variable, value in frozen:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    mean_network = model.predict(x, batch_size=3, verbose=0)
    samples = model.ensemble_predict(x, seed=5, return_samples=True, **options)
    assert samples.shape == (3, *mean_network.shape)
    assert samples.std(axis=0).max() > 1e-4
    ensemble = model.ensemble_predict(x, seed=5, **options)
    assert_close(ensemble, samples.mean(axis=0), 1e-5)
    assert np.abs(ensemble - mean_network).max() > 1e-5
    one = x[1:2]
    assert_close(
        model.ensemble_predict(one, seed=5, verbose=0), ensemble[1:2], 1e-4
    )


def test_deberta_base_has_the_papers_number_of_weights():
    """[L] Table 1: 1.33M; the real width and depth, a small vocabulary."""
    backbone = models.DebertaV3Backbone(
        vocabulary_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=8,
        bucket_size=4,
    )
    model = models.DebertaV3TextClassifier(backbone=backbone, num_classes=2)
    kld.enable_lora_dropout(model, rank=8)
    assert len(model.adapted_layers) == 72
    assert 1_327_104 == sum(
        math.prod(factor.shape)
        for _, layer in model.adapted_layers
        for factor in layer.factors
    )


def deberta_calls(monkeypatch, forward):
    """Masks that each `query` and `key` layer used, call by call."""
    used = {}
    adapter = kld.LoRADropoutEinsumDense
    plain = adapter._masks

    def recorded(self, training):
        result = plain(self, training)
        both = np.concatenate([*map(ops.convert_to_numpy, result)], axis=1)
        used.setdefault(self.path, []).append(both)
        return result

    monkeypatch.setattr(adapter, "_masks", recorded)
    forward()
    return {
        path: calls
        for path, calls in used.items()
        if path.endswith(("query", "key"))
    }


@pytest.mark.parametrize("way", ["call", "step", "ensemble"])
def test_deberta_shares_masks_between_both_calls(monkeypatch, way):
    """Content and positions go through `query` and `key` in one pass."""
    model = families.deberta()
    kld.enable_lora_dropout(model, rank=2, num_samples=2, seed=0)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    x = model.preprocessor(families.TEXTS[:2])
    # The layout is checked once, with masks that all keep.
    model.mask_plan.layout_checked = True
    ways = {
        "call": lambda: model(x, training=True),
        "step": lambda: model.fit(
            families.TEXTS[:2], families.LABELS[:2], verbose=0
        ),
        "ensemble": lambda: model.ensemble_predict(
            families.TEXTS[:2], verbose=0
        ),
    }
    if way == "step":
        # JAX traces the step's gradient even when it runs eagerly.
        values = masks.draw_uniform((2, model.mask_plan.width), 0)
        draws = masks.Draws(model.mask_plan, values, 4)
        tiled = keras.tree.map_structure(
            lambda t: ops.concatenate([t, t], axis=0), x
        )

        def forward():
            with masks.use_draws(draws):
                model(tiled, training=True)

        ways["step"] = forward
    calls = deberta_calls(monkeypatch, ways[way])
    assert len(calls) == 4
    for path, used in calls.items():
        assert len(used) >= 2, path
        for other in used[1:]:
            np.testing.assert_array_equal(used[0], other)
        assert 0 < used[0].mean() < 1
    first, second = list(calls.values())[:2]
    assert (first[0] != second[0]).any()


def test_parallel_equals_sequential_on_deberta():
    """Loss of one step, N = 3: the same masks, laid out in two ways."""
    model = families.deberta()
    kld.enable_lora_dropout(model, rank=2, num_samples=3, seed=0)
    randomize(model, scale=0.5)
    x = model.preprocessor(families.TEXTS)
    values = masks.draw_uniform((3, model.mask_plan.width), 7)
    outputs = []
    for n in range(3):
        with masks.use_draws(masks.Draws(model.mask_plan, values[n : n + 1])):
            outputs.append(ops.convert_to_numpy(model(x, training=False)))
    tiled = keras.tree.map_structure(
        lambda t: ops.concatenate([t] * 3, axis=0), x
    )
    with masks.use_draws(masks.Draws(model.mask_plan, values, 18)):
        together = ops.convert_to_numpy(model(tiled, training=False))
    assert_close(together, np.concatenate(outputs), 1e-5)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4
