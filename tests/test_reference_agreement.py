"""Layers, losses, gradients and ensembles agree with `reference.py`.

The masks that the package used are computed from a copy of its generator's
state, taken before; everything else comes from the weights.
"""

import keras
import numpy as np
import pytest
import reference
from helpers import array
from helpers import assert_close
from helpers import draws_after
from helpers import set_random
from helpers import tiny_mlp

import keras_lora_dropout as kld

RATE, RANK, ALPHA = 0.5, 2, 3.0
EXAMPLES, FEATURES, CLASSES = 7, 6, 3
LOSSES = {
    "cross_entropy": reference.cross_entropy,
    "mse": reference.mean_squared_error,
}


def build_model(seed=3, **options):
    """An adapted MLP, every weight random, and the reference of it."""
    model = kld.enable_lora_dropout(
        tiny_mlp(FEATURES, CLASSES),
        rank=RANK,
        alpha=ALPHA,
        dropout_rate=RATE,
        seed=seed,
        **options,
    )
    set_random(model.weights, seed)
    return model


def reference_network(model):
    layers = [
        reference.AdaptedDense(
            kernel=array(layer.kernel),
            bias=array(layer.bias),
            a=array(layer.lora_kernel_a),
            b=array(layer.lora_kernel_b),
            scaling=ALPHA / RANK,
        )
        for _, layer in model.adapted_layers
    ]
    head = model.get_layer("head")
    return reference.Network(layers, array(head.kernel), array(head.bias))


def mask_width(network):
    return sum(len(layer.a) + layer.b.shape[1] for layer in network.layers)


def instances_of(network, draws, rescale):
    """Turn draws `(instances, groups, columns)` into masks of a `Network`."""
    instances = []
    for values in reference.bernoulli(draws, RATE):
        values = reference.inverted(values, RATE, rescale)
        pairs, start = [], 0
        for layer in network.layers:
            middle = start + len(layer.a)
            stop = middle + layer.b.shape[1]
            pairs.append((values[:, start:middle], values[:, middle:stop]))
            start = stop
        instances.append(pairs)
    return instances


def drawn(model, state, num_samples, shape):
    """What the model draws next with a generator in a given state."""
    if model.lora_dropout.mask_sampling == "bernoulli":
        return draws_after(state, (num_samples, *shape))
    return reference.balanced(draws_after(state, (num_samples + 1, *shape)))


def batch(loss, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(EXAMPLES, FEATURES)).astype("float32")
    if loss == "mse":
        return x, generator.normal(size=(EXAMPLES, CLASSES)).astype("float32")
    return x, generator.integers(0, CLASSES, EXAMPLES)


def compile_model(model, loss, **options):
    losses = {
        "cross_entropy": keras.losses.SparseCategoricalCrossentropy(True),
        "mse": "mse",
    }
    optimizer = keras.optimizers.SGD(learning_rate=1.0)
    model.compile(optimizer, losses[loss], **options)


def trained(model):
    """The values that `Network.parameters` names, as they are now."""
    network = reference_network(model)
    return {k: v.copy() for k, v in network.parameters().items()}


def check_one_step(model, rescale, loss, step):
    """Hold loss and gradients of one SGD step against the reference.

    With a learning rate of 1 the gradient is the change of each weight.
    """
    network = reference_network(model)
    settings = model.lora_dropout
    groups = EXAMPLES if settings.mask_sharing == "example" else 1
    draws = drawn(
        model,
        model.mask_seed_generator.state,
        settings.num_samples,
        (groups, mask_width(network)),
    )
    instances = instances_of(network, draws, rescale)
    x, y = batch(loss)
    before, fixed = trained(model), model.get_layer("first").get_weights()[:2]
    measured = step(x, y)
    expected = network.objective(x, y, instances, LOSSES[loss])
    assert_close(measured, expected)
    after = trained(model)
    for key, value in network.gradients(x, y, instances, LOSSES[loss]).items():
        assert np.abs(value).max() > 1e-3, key
        assert_close(before[key] - after[key], value)
    for old, new in zip(
        fixed, model.get_layer("first").get_weights()[:2], strict=True
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "rescale, loss", [(False, "cross_entropy"), (True, "mse")]
)
@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_gradients_and_loss_of_fit(
    sampling, mask_sharing, num_samples, rescale, loss
):
    model = build_model(
        sampling=sampling,
        mask_sharing=mask_sharing,
        num_samples=num_samples,
        rescale=rescale,
    )
    compile_model(model, loss)

    def step(x, y):
        history = model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
        return history.history["loss"][0]

    check_one_step(model, rescale, loss, step)


@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_gradients_and_loss_of_balanced_masks(sampling, mask_sharing):
    model = build_model(
        sampling=sampling,
        mask_sharing=mask_sharing,
        mask_sampling="balanced",
        num_samples=3,
    )
    compile_model(model, "cross_entropy")

    def step(x, y):
        history = model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
        return history.history["loss"][0]

    check_one_step(model, False, "cross_entropy", step)


@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("rescale", [False, True])
def test_gradients_and_loss_of_eager_steps_on_arrays(
    sampling, mask_sharing, rescale
):
    model = build_model(
        sampling=sampling,
        mask_sharing=mask_sharing,
        num_samples=3,
        rescale=rescale,
    )
    compile_model(model, "cross_entropy", run_eagerly=True)
    check_one_step(model, rescale, "cross_entropy", model.train_on_batch)


def test_second_step_uses_new_masks_and_the_weights_of_the_first():
    model = build_model(num_samples=2)
    compile_model(model, "mse")
    for _ in range(2):
        check_one_step(model, False, "mse", model.train_on_batch)


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def ensemble_model(request):
    model = build_model(
        sampling=request.param,
        num_samples=3,
        rescale=request.param != "parallel",
    )
    compile_model(model, "cross_entropy")
    return model


def ensemble_instances(model, seed, num_samples=3):
    """The network and masks behind `ensemble_predict(seed=seed)`."""
    network = reference_network(model)
    rescale = model.adapted_layers[0][1].rescale
    draws = drawn(model, [seed, 0], num_samples, (mask_width(network),))
    return network, instances_of(network, draws[:, None], rescale)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_ensemble_predict(ensemble_model, num_samples):
    x, _ = batch("cross_entropy")
    network, instances = ensemble_instances(ensemble_model, 5, num_samples)
    # Batches of 3, 3 and 1: all must see the same masks.
    outputs = ensemble_model.ensemble_predict(
        x, batch_size=3, seed=5, num_samples=num_samples, verbose=0
    )
    assert_close(outputs, network.ensemble_outputs(x, instances))


def test_ensemble_members_and_probabilities(ensemble_model):
    x, _ = batch("cross_entropy")
    network, instances = ensemble_instances(ensemble_model, 6)
    expected = np.stack([network.outputs(x, masks) for masks in instances])
    options = {"batch_size": 4, "seed": 6, "verbose": 0}
    members = ensemble_model.ensemble_predict(x, return_samples=True, **options)
    assert_close(members, expected)
    probabilities = ensemble_model.ensemble_predict(
        x, average="probability", **options
    )
    assert_close(probabilities, reference.softmax(expected).mean(axis=0))


def test_ensemble_evaluate(ensemble_model):
    x, y = batch("cross_entropy")
    network, instances = ensemble_instances(ensemble_model, 7)
    loss = ensemble_model.ensemble_evaluate(
        x, y, batch_size=4, seed=7, verbose=0
    )
    outputs = network.ensemble_outputs(x, instances)
    assert_close(loss, reference.cross_entropy(outputs, y)[0])


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_ensemble_predict_of_balanced_masks(sampling):
    model = build_model(
        num_samples=3, sampling=sampling, mask_sampling="balanced"
    )
    x, _ = batch("cross_entropy")
    network, instances = ensemble_instances(model, 5, 4)
    # Batches of 3, 3 and 1: all must see the same masks.
    outputs = model.ensemble_predict(
        x, batch_size=3, seed=5, num_samples=4, verbose=0
    )
    assert_close(outputs, network.ensemble_outputs(x, instances))


def test_ensemble_predict_run_eagerly():
    model = build_model(num_samples=3)
    compile_model(model, "mse", run_eagerly=True)
    x, _ = batch("mse")
    network, instances = ensemble_instances(model, 8)
    outputs = model.ensemble_predict(x, batch_size=4, seed=8, verbose=0)
    assert_close(outputs, network.ensemble_outputs(x, instances))


def test_predict_is_the_mean_network(ensemble_model):
    x, _ = batch("cross_entropy")
    rescale = ensemble_model.adapted_layers[0][1].rescale
    network = reference_network(ensemble_model)
    expected = network.mean_network_outputs(x, RATE, rescale)
    assert_close(ensemble_model.predict(x, verbose=0), expected)
