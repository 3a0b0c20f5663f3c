"""The reference against itself: derivatives, and two ways to write a sum."""

import itertools

import numpy as np
import pytest
from reference import AdaptedDense
from reference import Network
from reference import adalora_delta_matrix
from reference import bernoulli
from reference import cross_entropy
from reference import delta_matrix
from reference import einsum_delta_matrix
from reference import inverted
from reference import mean_mask
from reference import mean_squared_error
from reference import softmax

RATE = 0.4


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def random_network(generator, sizes=(4, 5, 3), outputs=2, rank=2):
    layers = []
    for input_dim, output_dim in itertools.pairwise(sizes):
        layers.append(
            AdaptedDense(
                kernel=generator.normal(size=(input_dim, output_dim)),
                bias=generator.normal(size=output_dim),
                a=generator.normal(size=(input_dim, rank)),
                b=generator.normal(size=(rank, output_dim)),
                scaling=1.5,
            )
        )
    return Network(
        layers,
        generator.normal(size=(sizes[-1], outputs)),
        generator.normal(size=outputs),
    )


def random_instances(generator, network, count, examples):
    return [
        [
            tuple(
                bernoulli(generator.random((examples, features)), RATE)
                for features in (len(layer.a), layer.b.shape[1])
            )
            for layer in network.layers
        ]
        for _ in range(count)
    ]


@pytest.mark.parametrize("examples_of_mask", [1, 6])
@pytest.mark.parametrize("loss", [cross_entropy, mean_squared_error])
def test_gradients_match_central_differences(generator, loss, examples_of_mask):
    network = random_network(generator)
    x = generator.normal(size=(6, 4))
    y = generator.integers(0, 2, 6)
    if loss is mean_squared_error:
        y = generator.normal(size=(6, 2))
    instances = random_instances(generator, network, 3, examples_of_mask)
    gradients = network.gradients(x, y, instances, loss)
    step = 1e-5
    for key, parameter in network.parameters().items():
        numeric = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + step
            above = network.objective(x, y, instances, loss)
            parameter[index] = kept - step
            below = network.objective(x, y, instances, loss)
            parameter[index] = kept
            numeric[index] = (above - below) / (2 * step)
        np.testing.assert_allclose(
            gradients[key], numeric, rtol=1e-6, atol=1e-9, err_msg=key
        )
    assert all(np.any(value != 0) for value in gradients.values())


def test_masked_product_by_hand():
    a = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    b = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    # a @ b = [[1, 2, 4], [3, 4, 10], [5, 6, 16]]; row 1 and column 0 go.
    delta = delta_matrix(a, b, [1, 0, 1], [0, 1, 1], scaling=0.5)
    np.testing.assert_array_equal(delta, [[0, 1, 2], [0, 0, 0], [0, 3, 8]])


def test_adalora_with_unit_singular_values_is_lora(generator):
    q, p = generator.normal(size=(4, 2)), generator.normal(size=(2, 3))
    masks = bernoulli(generator.random(4), 0.5), [1.0, 0.0, 1.0]
    np.testing.assert_allclose(
        adalora_delta_matrix(q, np.ones(2), p, *masks, scaling=2.0),
        delta_matrix(q, p, *masks, scaling=2.0),
    )
    np.testing.assert_allclose(
        adalora_delta_matrix(q, np.array([3.0, 0.0]), p, *masks),
        3 * delta_matrix(q[:, :1], p[:1], *masks, scaling=1.0),
    )


def test_einsum_delta_of_a_matrix_is_the_matrix_delta(generator):
    a, b = generator.normal(size=(4, 2)), generator.normal(size=(2, 6))
    mask_a = bernoulli(generator.random(4), 0.5)
    mask_b = bernoulli(generator.random(6), 0.5)
    expected = delta_matrix(a, b, mask_a, mask_b, 0.5)
    np.testing.assert_allclose(
        einsum_delta_matrix("xy,yz->xz", (4, 6), a, b, mask_a, mask_b, 0.5),
        expected,
    )
    np.testing.assert_allclose(
        einsum_delta_matrix(
            "btd,ndh->btnh", (2, 4, 3), a, b, mask_a, mask_b, 0.5
        ),
        expected.reshape(4, 2, 3).transpose(1, 0, 2),
    )


def test_mean_mask_is_the_mean_of_all_masks():
    rate = 0.25
    both = inverted([0.0, 1.0], rate, True), inverted([0.0, 1.0], rate, False)
    chances = np.array([rate, 1 - rate])
    assert chances @ both[0] == mean_mask(1, rate, True) == 1.0
    assert chances @ both[1] == mean_mask(1, rate, False) == 0.75


def test_losses_by_hand():
    logits = np.log([[1.0, 3.0], [1.0, 1.0]])
    loss, _ = cross_entropy(logits, [1, 0])
    np.testing.assert_allclose(loss, -(np.log(0.75) + np.log(0.5)) / 2)
    np.testing.assert_allclose(softmax(logits), [[0.25, 0.75], [0.5, 0.5]])
    loss, gradient = mean_squared_error(np.array([[1.0, 4.0]]), [[0.0, 2.0]])
    assert loss == 2.5
    np.testing.assert_array_equal(gradient, [[1.0, 2.0]])


def test_ensemble_and_mean_network_without_dropout_agree(generator):
    network = random_network(generator)
    x = generator.normal(size=(3, 4))
    all_kept = [
        [(np.ones((1, 4)), np.ones((1, 5))), (np.ones((1, 5)), np.ones((1, 3)))]
    ] * 2
    np.testing.assert_allclose(
        network.ensemble_outputs(x, all_kept),
        network.mean_network_outputs(x, 0.0, False),
    )
