"""Tasks with a loss or predictions of their own, as KerasHub's detectors."""

import dropping_models
import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import tiny_mlp
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core.structured_dropout import DropoutDraws


class Task(keras.Model):
    """A functional model around another one, as KerasHub's tasks are."""

    def __init__(self, body=None):
        body = body or tiny_mlp()
        super().__init__(inputs=body.input, outputs=body(body.input))
        self.body = body


class GivenOutputs(Task):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return ops.mean(ops.square(y_pred[:, 0] - ops.cast(y, "float32")))


class OutputsAnew(GivenOutputs):
    """Its loss runs the model again, as those of BASNet and PARSeq do."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return super().compute_loss(x, y, self.body(x))


class Decoded(Task):
    """Predicts what its outputs say, as a detector does."""

    def predict_step(self, *args):
        outputs = super().predict_step(*args)
        if isinstance(outputs, tuple):  # JAX puts out its state, too.
            return self.decode(outputs[0]), outputs[1]
        return self.decode(outputs)

    def decode(self, outputs):
        return {"class": ops.argmax(outputs, 1), "score": ops.max(outputs, 1)}


def adapted(cls, body=None, **options):
    model = kld.enable_lora_dropout(
        cls(body), **{"rank": 2, "seed": 0, "num_samples": 2, **options}
    )
    return randomize(model)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
def test_loss_that_runs_the_model_again_sees_the_same_masks(
    sampling, mask_sharing
):
    x, y = classification_data(6)
    options = {"sampling": sampling, "mask_sharing": mask_sharing}
    expected, model = (
        adapted(cls, **options) for cls in (GivenOutputs, OutputsAnew)
    )
    for each in (expected, model):
        each.compile(keras.optimizers.SGD(0.1))
        each.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(
        model.trainable_variables, expected.trainable_variables, strict=True
    ):
        assert_close(a, b)


@pytest.mark.parametrize("num_instances", [1, 3])
def test_one_instance_drops_what_it_drops_among_all(num_instances):
    seed = keras.random.SeedGenerator(3).next()
    draws = DropoutDraws(seed, num_instances).of_layer(2)
    together = array(draws.uniform((2 * num_instances, 5)))
    for n in range(num_instances):
        alone = array(draws.only(n).uniform((2, 5)))
        np.testing.assert_array_equal(alone, together[2 * n : 2 * n + 2])


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_ensemble_decodes_the_average_once(sampling):
    x, _ = classification_data(5)
    model = adapted(Decoded, sampling=sampling)
    plain = adapted(Task, sampling=sampling)
    options = {"seed": 3, "batch_size": 2, "verbose": 0}
    outputs = plain.ensemble_predict(x, **options)
    found = model.ensemble_predict(x, **options)
    np.testing.assert_array_equal(found["class"], outputs.argmax(-1))
    assert_close(found["score"], outputs.max(-1))
    # Samples are decoded one by one.
    outputs = plain.ensemble_predict(x, return_samples=True, **options)
    found = model.ensemble_predict(x, return_samples=True, **options)
    assert found["class"].shape == (2, 5)
    np.testing.assert_array_equal(found["class"], outputs.argmax(-1))
    assert_close(found["score"], outputs.max(-1))
    assert np.abs(found["score"][0] - found["score"][1]).max() > 1e-3
    # And plain predictions are those of the mean network, as ever.
    assert_close(
        model.predict(x, verbose=0)["score"],
        plain.predict(x, verbose=0).max(-1),
    )


def test_samples_drop_each_their_own():
    def build(cls):
        model = adapted(cls, dropping_models.small_transformer())
        return kld.enable_transformer_dropout(model, **dropping_models.SETTINGS)

    x, _ = dropping_models.batch()
    options = {"return_samples": True, "include_transformer_dropout": True}
    samples = build(Task).ensemble_predict(x, seed=3, verbose=0, **options)
    found = build(Decoded).ensemble_predict(x, seed=3, verbose=0, **options)
    assert_close(found["score"], samples.max(-1))


def test_averaged_probabilities_are_decoded_as_logits():
    x, _ = classification_data(5)
    model, plain = adapted(Decoded), adapted(Task)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for each in (model, plain):
        each.compile("sgd", loss)
    options = {"seed": 3, "average": "probability", "verbose": 0}
    averaged = plain.ensemble_predict(x, **options)
    found = model.ensemble_predict(x, **options)
    assert_close(found["score"], np.log(averaged.max(-1)))
    # The model that is made to be served puts out what it always does.
    served = model.as_ensemble(seed=3, average="probability")
    assert_close(array(served(ops.convert_to_tensor(x))), averaged)


def test_probabilities_of_unknown_outputs_are_refused():
    x, _ = classification_data(5)
    model = adapted(Decoded)
    with pytest.raises(ValueError, match='Use `average="output"`'):
        model.ensemble_predict(x, average="probability")


def test_regression_next_to_a_classification_is_averaged_as_it_is():
    def build():
        body = tiny_mlp()
        box = keras.layers.Dense(4, kernel_initializer="ones", name="box")
        outputs = {"box": box(body.output), "kind": body.output}
        model = keras.Model(body.input, outputs)
        return adapted(lambda _: model, target_layers=["first", "second"])

    x, _ = classification_data(5)
    model = build()
    model.compile(
        loss={
            "box": "mse",
            "kind": keras.losses.CategoricalCrossentropy(from_logits=True),
        }
    )
    options = {"seed": 3, "verbose": 0}
    outputs = model.ensemble_predict(x, **options)
    averaged = model.ensemble_predict(x, average="probability", **options)
    assert_close(averaged["box"], outputs["box"])
    assert_close(averaged["kind"].sum(-1), np.ones(5))
