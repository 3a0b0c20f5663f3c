"""The paper's bounds, and the gain of an ensemble on a trained model."""

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data
from helpers import randomize
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.plots import plot_generalization_gap
from keras_lora_dropout.theory import GeneralizationBound
from keras_lora_dropout.theory import ensemble_gain
from keras_lora_dropout.theory import sparsity

POSITIVE = st.floats(1e-3, 1e3)
RATE = st.floats(0, 1)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_sparsity_is_the_share_of_zeros():
    generator = np.random.default_rng(0)
    for rate in (0.0, 0.1, 0.5, 0.9, 1.0):
        rows, columns = generator.uniform(size=(2, 2000)) >= rate
        zeros = 1 - np.outer(rows, columns).mean()
        assert abs(sparsity(rate) - zeros) < 0.03
    assert sparsity(0.5) == 0.75
    np.testing.assert_allclose(sparsity([0, 0.5, 1]), [0, 0.75, 1])


def test_bounds_by_hand():
    bound = GeneralizationBound(
        100,
        lipschitz=2,
        smallest_eigenvalue=0.5,
        regularization=3,
        loss_range=4,
        failure_probability=0.1,
    )
    # 2 * 4 / ((0.5 + 6 * 0.75) * 100)
    assert bound.stability(0.5) == pytest.approx(8 / 500)
    # 16 + 24 * 4 * 4 / 5, over 2 * 100 * 0.1
    assert bound.gap(0.5) == pytest.approx(np.sqrt((16 + 76.8) / 20))
    np.testing.assert_allclose(bound.gap([0.5, 0.5]), [bound.gap(0.5)] * 2)


@given(
    st.integers(1, 10**6),
    st.tuples(POSITIVE, st.floats(0, 1e3), st.floats(0, 1e3), POSITIVE),
    st.floats(0.001, 0.999),
    RATE,
    RATE,
)
@settings(max_examples=60)
def test_gap_shrinks_with_the_dropout_rate(n, constants, chance, one, other):
    bound = GeneralizationBound(n, *constants, chance)
    lower, higher = sorted((one, other))
    assert bound.gap(higher) <= bound.gap(lower)
    assert GeneralizationBound(2 * n, *constants, chance).gap(one) <= (
        bound.gap(one)
    )


def test_nothing_bounds_what_nothing_holds():
    bound = GeneralizationBound(10)
    assert bound.gap(0.0) == bound.stability(0.0) == np.inf
    assert np.isfinite(bound.gap(0.01))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_examples": 0}, "`num_examples` must be a positive integer"),
        ({"lipschitz": 0}, "`lipschitz` must be a number, finite and above 0"),
        ({"lipschitz": np.inf}, "`lipschitz` must be a number, finite"),
        ({"loss_range": "1"}, "`loss_range` .*Received: loss_range='1'"),
        ({"smallest_eigenvalue": -1}, "`smallest_eigenvalue` .* 0 or more"),
        ({"regularization": np.nan}, "`regularization` must be a number"),
        ({"failure_probability": 1}, "`failure_probability` .*between 0 and 1"),
    ],
)
def test_wrong_assumptions(changed, message):
    with pytest.raises(ValueError, match=message):
        GeneralizationBound(**{"num_examples": 10, **changed})


@pytest.mark.parametrize("rate", [-0.1, 1.1, np.nan, [0.5, 2]])
def test_wrong_rates(rate):
    with pytest.raises(ValueError, match="`dropout_rate` must lie in"):
        sparsity(rate)


def trained(**compile_options):
    model = adapted_mlp({"loss": CROSS_ENTROPY, **compile_options})
    x, y = classification_data()
    model.fit(x, y, epochs=2, verbose=0)
    return model, x, y


def test_ensembles_lose_less_than_their_instances():
    model, x, y = trained()
    found = ensemble_gain(model, x, y, num_samples=5, seed=1, verbose=0)
    samples = model.ensemble_predict(
        x, num_samples=5, seed=1, return_samples=True, verbose=0
    )

    def loss(logits):
        logits = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.ravel(y)[:, None], -1)[:, 0]
        return np.mean(np.log(np.exp(logits).sum(-1)) - chosen)

    expected = [loss(sample) for sample in samples]
    np.testing.assert_allclose(found.instance_losses, expected, rtol=1e-5)
    assert found.ensemble_loss == pytest.approx(loss(samples.mean(0)), rel=1e-5)
    assert found.mean_instance_loss == pytest.approx(np.mean(expected))
    assert found.gain > 1e-4


def test_a_loss_that_is_not_convex_may_gain_nothing():
    model, x, y = trained()
    model.compile(loss=lambda y, outputs: -ops.mean(outputs**2, axis=-1))
    assert ensemble_gain(model, x, y, seed=1, verbose=0).gain < -1e-4


def test_weights_and_several_outputs():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, name="hidden")(inputs)
    outputs = [keras.layers.Dense(units)(hidden) for units in (2, 3)]
    model = keras.Model(inputs, outputs)
    kld.enable_lora_dropout(model, rank=2, target_layers=["hidden"])
    randomize(model)
    model.compile("sgd", ["mse", "mse"])
    x, _ = classification_data()
    y = [np.ones((10, units), "float32") for units in (2, 3)]
    weights = np.arange(10.0)
    found = ensemble_gain(
        model, x, y, sample_weight=[weights] * 2, seed=1, verbose=0
    )
    samples = model.ensemble_predict(x, seed=1, return_samples=True, verbose=0)
    expected = sum(
        np.mean(weights * ((part - labels) ** 2).mean(-1), -1)
        for part, labels in zip(samples, y, strict=True)
    )
    np.testing.assert_allclose(found.instance_losses, expected, rtol=1e-5)
    assert found.gain > 0


def test_what_cannot_be_measured():
    model, x, y = trained()
    with pytest.raises(ValueError, match=r"one label for each.* 3 labels for"):
        ensemble_gain(model, x, y[:3], verbose=0)
    with pytest.raises(TypeError, match=r"adapted model.* type Functional"):
        ensemble_gain(keras.Model(model.inputs, model.outputs), x, y)
    model = adapted_mlp({"loss": None})
    with pytest.raises(ValueError, match=r"compile\(optimizer, loss\)"):
        ensemble_gain(model, x, y, verbose=0)


def test_plot_of_bounds(closed_figures):
    bound = GeneralizationBound(512, smallest_eigenvalue=0.1)
    ax = plot_generalization_gap(bound)
    assert ax.get_legend() is None
    rates, gaps = ax.lines[0].get_data()
    np.testing.assert_allclose(gaps, bound.gap(rates))
    assert rates[0] == 0 and rates[-1] == 1
    plot_generalization_gap({"a": bound, "b": GeneralizationBound(9)}, ax=ax)
    assert len(ax.lines) == 3
    for wrong in (None, {}, [bound], {"a": 3}):
        with pytest.raises(TypeError, match="`bounds` must be"):
            plot_generalization_gap(wrong)
