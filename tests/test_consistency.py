"""The consistency loss against NumPy, and its place in the training step."""

import keras
import numpy as np
import pytest
import scipy.special
from dropping_models import SETTINGS
from dropping_models import adapted
from dropping_models import batch
from dropping_models import compiled
from helpers import array
from helpers import assert_close
from helpers import draws_after
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core import divergence
from keras_lora_dropout.core import masks

WEIGHT = 0.7


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def both_ways(p, q):
    return (kl(p, q) + kl(q, p)) / 2


def with_consistency(consistency=None, units=3, activation=None, **options):
    dropout = options.pop("settings", {})
    model = adapted(units, activation, **options)
    consistency = consistency or kld.Consistency(WEIGHT)
    return kld.enable_transformer_dropout(
        model, consistency=consistency, **dropout
    )


# Divergences


@given(seed=st.integers(0, 10**6), scale=st.floats(0, 30))
@settings(max_examples=30, deadline=None)
def test_divergences_are_those_of_numpy(seed, scale):
    logits = np.random.default_rng(seed).normal(0, scale, (2, 4, 5))
    logs = [
        divergence.log_probabilities(
            ops.convert_to_tensor(x, "float32"), "softmax", False
        )
        for x in logits
    ]
    # In logarithms: probabilities of float64 can be too small, too.
    p, q = logits - scipy.special.logsumexp(logits, -1, keepdims=True)
    tolerance = 1e-5 * (1 + scale)
    forward = (np.exp(p) * (p - q)).sum(-1)
    backward = (np.exp(q) * (q - p)).sum(-1)
    assert_close(divergence.kl_divergence(*logs), forward, tolerance)
    both = divergence.bidirectional_kl(*logs)
    assert_close(both, (forward + backward) / 2, tolerance)
    assert_close(divergence.bidirectional_kl(*logs[::-1]), both, tolerance)
    assert (array(both) >= 0).all()
    same = divergence.bidirectional_kl(logs[0], logs[0])
    assert not array(same).any()


def test_units_that_are_events_of_their_own():
    logits = np.array([[2.0, -1.0, 0.5]])
    p = 1 / (1 + np.exp(-logits))
    expected = np.log(np.stack([p, 1 - p], -1))
    for given_, link in (logits, "sigmoid"), (p, "identity"):
        logs = divergence.log_probabilities(
            ops.convert_to_tensor(given_, "float32"), link, True
        )
        assert_close(logs, expected)
    logs = divergence.log_probabilities(
        ops.convert_to_tensor([[0.25, 0.75, 0.0]]), "identity", False
    )
    assert_close(logs[:, :2], np.log([[0.25, 0.75]]))
    assert np.isfinite(array(logs)).all()


# The training step


def instance_outputs(model, x, count, state):
    """Outputs of the instances that the next step draws, one at a time."""
    values = draws_after(state, (count, 1, model.mask_plan.width))
    outputs = []
    for n in range(count):
        drawn = ops.convert_to_tensor(values[n], "float32")
        with masks.use_draws(masks.Draws(model.mask_plan, drawn, len(x))):
            outputs.append(array(model(x, training=True)))
    return np.stack(outputs)


def step(model, x, y, **options):
    before = [array(w) for w in model.trainable_variables]
    logs = model.train_on_batch(x, y, return_dict=True, **options)
    after = [array(w) for w in model.trainable_variables]
    paths = [w.path for w in model.trainable_variables]
    changes = [a - b for a, b in zip(before, after, strict=True)]
    return logs, dict(zip(paths, changes, strict=True))


def head_bias(gradients):
    (found,) = [g for path, g in gradients.items() if "head/bias" in path]
    return found


def gradient_of_bias(loss, logits):
    """Central differences of a loss by a bias of all logits."""
    steps = np.eye(logits.shape[-1]) * 1e-5
    return np.array(
        [(loss(logits + h) - loss(logits - h)) / 2e-5 for h in steps]
    )


def cross_entropy(logits, y):
    p = softmax(logits)
    return -np.log(p[..., np.arange(len(y)), y]).mean()


def assert_step(done, logits, y, compare, partners):
    """The partners are constants: gradients flow through one branch."""
    logs, gradients = done
    expected = compare(softmax(logits), partners).mean()
    assert expected > 1e-3
    assert_close(logs["consistency_loss"], expected)
    assert_close(logs["loss"], cross_entropy(logits, y))

    def objective(logits):
        consistency = compare(softmax(logits), partners).mean()
        return cross_entropy(logits, y) + WEIGHT * consistency

    expected = gradient_of_bias(objective, logits)
    assert_close(head_bias(gradients), expected, 2e-5)


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_parallel_instances_are_each_others_partners(kind):
    model = compiled(
        with_consistency(
            kld.Consistency(WEIGHT, kind), dropout_rate=0.5, num_samples=3
        )
    )
    x, y = batch()
    logits = instance_outputs(
        model, x, 3, ops.copy(model.mask_seed_generator.state.value)
    )
    plain = array(model(x, training=False))
    partners = softmax(np.roll(logits, 1, axis=0) if kind == "kl" else plain)
    compare = both_ways if kind == "kl" else kl
    assert_step(step(model, x, y), logits, y, compare, partners)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_single_passes_have_one_partner(sampling):
    count = {"parallel": 1, "sequential": 3}[sampling]
    model = compiled(
        with_consistency(dropout_rate=0.5, num_samples=count, sampling=sampling)
    )
    x, y = batch()
    state = ops.copy(model.mask_seed_generator.state.value)
    logits = instance_outputs(model, x, count, state)
    # One draw for the passes, and the next one for their partner.
    generator = keras.random.SeedGenerator(0)
    generator.state.assign(state)
    generator.next()
    partner = instance_outputs(model, x, 1, generator.state.value)[0]
    model.mask_seed_generator.state.assign(state)
    assert_step(step(model, x, y), logits, y, both_ways, softmax(partner))


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_passes_that_are_equal_cost_nothing(kind):
    consistent = compiled(with_consistency(kld.Consistency(5.0, kind)))
    plain = compiled(adapted())
    x, y = batch()
    logs, gradients = step(consistent, x, y)
    assert_close(logs["consistency_loss"], 0.0, 1e-6)
    for path, gradient in step(plain, x, y)[1].items():
        assert_close(gradients[path], gradient, 1e-5)


def test_blocks_that_drop_differ_among_the_passes():
    x, y = batch()
    for count in 1, 2:
        model = compiled(with_consistency(settings=SETTINGS, num_samples=count))
        logs, _ = step(model, x, y)
        assert float(logs["consistency_loss"]) > 1e-3


def test_rows_are_weighted_as_in_the_loss():
    weights = np.array([1.0, 0.0, 2.0, 0.5, 3.0], "float32")
    x, y = batch()
    for reduction in "sum_over_batch_size", "mean_with_sample_weight", "sum":
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction
        )
        model = with_consistency(dropout_rate=0.5, num_samples=2)
        compiled(model, loss)
        state = ops.copy(model.mask_seed_generator.state.value)
        p = softmax(instance_outputs(model, x, 2, state))
        logs, _ = step(model, x, y, sample_weight=weights)
        each = both_ways(p, p[::-1]) * weights
        total = {
            "sum": each.sum(),
            "sum_over_batch_size": each.mean(),
            "mean_with_sample_weight": each.sum() / (2 * weights.sum()),
        }[reduction]
        assert_close(logs["consistency_loss"], total, 1e-4)


@pytest.mark.parametrize(
    ("loss", "units", "activation", "labels"),
    [
        ("binary_crossentropy", 1, "sigmoid", 1),
        ("binary_crossentropy", 3, "sigmoid", 3),
        ("sparse_categorical_crossentropy", 3, "softmax", None),
        (keras.losses.BinaryCrossentropy(from_logits=True), 1, None, 1),
    ],
)
def test_other_distributions(loss, units, activation, labels):
    model = with_consistency(
        units=units, activation=activation, dropout_rate=0.5, num_samples=2
    )
    compiled(model, loss)
    x, y = batch()
    if labels is not None:
        y = np.random.default_rng(0).integers(0, 2, (len(x), labels))
    state = ops.copy(model.mask_seed_generator.state.value)
    outputs = instance_outputs(model, x, 2, state)
    logs, _ = step(model, x, y)
    if activation is None:
        outputs = 1 / (1 + np.exp(-outputs))
    if activation != "softmax":
        outputs = np.stack([outputs, 1 - outputs], -1)
        outputs = np.maximum(outputs, keras.config.epsilon())
    expected = both_ways(outputs, outputs[::-1]).mean()
    assert_close(logs["consistency_loss"], expected, 1e-4)


@pytest.mark.parametrize("loss", ["mse", "kl", "outputs"])
def test_regression_compares_representations(loss):
    compares = "representations" if loss == "kl" else "auto"
    compares = "outputs" if loss == "outputs" else compares
    model = with_consistency(
        kld.Consistency(WEIGHT, compares=compares),
        units=2,
        dropout_rate=0.5,
        num_samples=2,
    )
    compiled(model, None if loss == "kl" else "mse")
    x, y = batch()
    y = y % 2 if loss == "kl" else np.zeros((len(x), 2), "float32")
    inner = keras.Model(model.input, model.layers[-1].input)
    state = ops.copy(model.mask_seed_generator.state.value)
    values = draws_after(state, (2, 1, model.mask_plan.width))
    seen = []
    for n in range(2):
        drawn = ops.convert_to_tensor(values[n], "float32")
        with masks.use_draws(masks.Draws(model.mask_plan, drawn, len(x))):
            network = model if loss == "outputs" else inner
            seen.append(softmax(array(network(x, training=True))))
    logs, gradients = step(model, x, y)
    expected = both_ways(*seen).mean()
    assert expected > 1e-4
    assert_close(logs["consistency_loss"], expected)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_the_metric_is_the_mean_of_an_epoch_and_of_training_alone():
    model = with_consistency(dropout_rate=0.5, num_samples=2)
    compiled(model, optimizer=keras.optimizers.SGD(0.0))
    x, y = batch(8)
    state = ops.copy(model.mask_seed_generator.state.value)
    steps = []
    for rows in slice(4), slice(4, 8):
        model.reset_metrics()
        logs, _ = step(model, x[rows], y[rows])
        steps.append(float(logs["consistency_loss"]))
    model.mask_seed_generator.state.assign(state)
    history = model.fit(
        x,
        y,
        batch_size=4,
        shuffle=False,
        validation_data=(x, y),
        verbose=0,
    ).history
    assert set(history) == {"loss", "val_loss", "consistency_loss"}
    assert abs(steps[0] - steps[1]) > 1e-2
    assert_close(history["consistency_loss"][0], np.mean(steps))
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss"}


def test_losses_that_layers_add_count_once():
    def build(consistency):
        inputs = keras.Input((4,))
        x = keras.layers.Dense(6, name="hidden")(inputs)
        x = keras.layers.ActivityRegularization(l2=0.1)(x)
        model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
        kld.enable_lora_dropout(model, rank=2, num_samples=1, seed=0)
        if consistency:
            consistency = kld.Consistency(1.0)
            kld.enable_transformer_dropout(model, consistency=consistency)
        return compiled(model)

    plain, consistent = build(False), build(True)
    consistent.set_weights(plain.get_weights())
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    y = np.arange(5) % 3
    first, _ = step(plain, x, y)
    second, _ = step(consistent, x, y)
    assert_close(second["loss"], first["loss"], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": "much"}, "weight"),
        ({"kind": "mse"}, "kind"),
        ({"compares": "weights"}, "compares"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        kld.Consistency(**options)
