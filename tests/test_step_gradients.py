"""The gradients of a step are those of its batch, and of no earlier one."""

import dropping_models
import keras
from helpers import assert_close


def test_weights_of_one_path_forget_the_gradients_of_earlier_steps():
    # Each block has a layer "feedforward_output_dense", whose path says
    # nothing of the block.
    model = dropping_models.compiled(
        dropping_models.adapted(), optimizer=keras.optimizers.SGD(0.01)
    )
    paths = [weight.path for weight in model.trainable_weights]
    assert len(set(paths)) < len(paths)
    x, y = dropping_models.batch(8)
    model.train_on_batch(x[:4], y[:4])
    fresh = dropping_models.compiled(
        dropping_models.adapted(), optimizer=keras.optimizers.SGD(0.01)
    )
    fresh.set_weights(model.get_weights())
    for trained in (model, fresh):
        trained.train_on_batch(x[4:], y[4:])
    for weight, expected in zip(model.weights, fresh.weights, strict=True):
        assert_close(weight, expected, 1e-6)
