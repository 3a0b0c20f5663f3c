"""What lies before the first adapted layer is computed once, and exactly."""

import contextlib
import itertools

import keras
import keras_hub
import numpy as np
import pytest
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from helpers import randomize
from helpers import seeded_dense
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core import shared_prefix

ROWS, NUM_SAMPLES = 5, 3


class Witness(keras.layers.Layer):
    """Passes its input on, and notes how many rows it had."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rows = []

    def call(self, inputs):
        self.rows.append(inputs.shape[0])
        return inputs * 1.0


def chain():
    x = inputs = keras.Input((6,))
    x = seeded_dense(8, 1, activation="tanh", name="before")(x)
    x = Witness(name="early")(x)
    x = seeded_dense(8, 2, activation="tanh", name="adapted")(x)
    x = Witness(name="late")(x)
    return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))


def sequential():
    return keras.Sequential(chain().layers)


def skips():
    """Inputs and early states come back after the adapted layer, and twice."""
    one, two = keras.Input((6,), name="one"), keras.Input((8,), name="two")
    early = Witness(name="early")(seeded_dense(8, 1, name="before")(one))
    twice = seeded_dense(8, 5, activation="tanh", name="twice")
    x = seeded_dense(8, 2, name="adapted")(twice(early) + two)
    x = Witness(name="late")(x * early + twice(x))
    x = keras.layers.Concatenate()([x, one, early])
    return keras.Model([one, two], seeded_dense(3, 3, name="head")(x))


def nested():
    """A model in a model, which reads early states and late ones."""
    x = one = keras.Input((6,))
    x = Witness(name="early")(seeded_dense(8, 1, name="before")(x))
    inner_one, inner_two = keras.Input((8,)), keras.Input((8,))
    y = seeded_dense(8, 4, activation="relu")(inner_one) + inner_two
    adapted = seeded_dense(8, 2, name="adapted")(y)
    inner = keras.Model([inner_one, inner_two], [adapted, y], name="inner")
    first, passed = inner([x, x * 2.0])
    second, _ = inner([x, Witness(name="late")(first)])
    x = first + second + passed
    return keras.Model(one, seeded_dense(3, 3, name="head")(x))


def nested_before():
    """A model without adapters among what is shared."""
    x = one = keras.Input((6,))
    inner_input = keras.Input((6,))
    inner = keras.Model(inner_input, seeded_dense(8, 1)(inner_input))
    x = Witness(name="early")(inner(x))
    x = Witness(name="late")(seeded_dense(8, 2, name="adapted")(x))
    return keras.Model(one, seeded_dense(3, 3, name="head")(x))


def two_outputs():
    """One of the outputs does not depend on the adapted layer."""
    x = inputs = keras.Input((6,))
    x = Witness(name="early")(seeded_dense(8, 1, name="before")(x))
    y = Witness(name="late")(seeded_dense(8, 2, name="adapted")(x))
    heads = seeded_dense(3, 3, name="head"), seeded_dense(3, 4, name="other")
    return keras.Model(inputs, [heads[0](y), heads[1](x)])


def transposed():
    """The batch axis moves away, and back before the adapted layer."""
    x = inputs = keras.Input((6,))
    x = Witness(name="early")(seeded_dense(8, 1, name="before")(x))
    x = ops.transpose(ops.tanh(ops.transpose(x)))
    x = Witness(name="late")(seeded_dense(8, 2, name="adapted")(x))
    return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))


MODELS = [
    chain,
    sequential,
    skips,
    nested,
    nested_before,
    two_outputs,
    transposed,
]


def adapted(make, shares=True, compile_options=None, **options):
    keras.utils.set_random_seed(0)
    model = make()
    names = [path for path in layer_paths(model) if path.endswith("adapted")]
    hide = contextlib.nullcontext() if shares else without_sharing()
    with hide:
        kld.enable_lora_dropout(
            model,
            rank=2,
            num_samples=NUM_SAMPLES,
            target_layers=names,
            seed=0,
            **options,
        )
        randomize(model)
        loss = keras.losses.MeanSquaredError()
        options = {"optimizer": keras.optimizers.SGD(0.5), "loss": loss}
        model.compile(**{**options, **(compile_options or {})})
        _ = model.mask_plan
    return model


@contextlib.contextmanager
def without_sharing():
    install = shared_prefix.install
    shared_prefix.install = lambda model, plan: None
    try:
        yield
    finally:
        shared_prefix.install = install


def data(model):
    generator = np.random.default_rng(0)
    x = [
        generator.normal(size=(ROWS, *tensor.shape[1:])).astype("float32")
        for tensor in model.inputs
    ]
    y = [
        generator.normal(size=(ROWS, 3)).astype("float32")
        for _ in model.outputs
    ]
    return (x[0] if len(x) == 1 else x), (y[0] if len(y) == 1 else y)


def trained(model):
    """All that two steps and an ensemble give."""
    x, y = data(model)
    losses = [np.ravel(model.train_on_batch(x, y))[0] for _ in range(2)]
    ensemble = model.ensemble_predict(x, seed=1, verbose=0)
    weights = [array(w) for w in model.trainable_weights]
    return [losses, *keras.tree.flatten(ensemble), *weights]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_sharing_changes_nothing(make, sampling):
    model = adapted(make, sampling=sampling)
    expected = adapted(make, sampling=sampling, shares=False)
    assert model.mask_plan.keeps_prefix
    assert not expected.mask_plan.keeps_prefix
    assert_same(trained(model), trained(expected))


@pytest.mark.parametrize("first", ["train_on_batch", "ensemble_predict"])
def test_sharing_is_found_out_at_first_use(first):
    model = adapted(chain)
    x, y = data(model)
    assert not model.mask_plan.spreads_prefix
    if first == "train_on_batch":
        model.train_on_batch(x, y)
    else:
        model.ensemble_predict(x, verbose=0)
    assert model.mask_plan.spreads_prefix


class Halves(keras.layers.Layer):
    """Takes a batch apart, and needs an even number of rows for it."""

    def call(self, inputs):
        return ops.concatenate(ops.split(inputs, 2, axis=0), axis=0)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


def test_a_model_that_is_laid_out_from_the_start():
    """The probe that shares has an odd batch; two instances of it are even."""

    def make():
        inputs = keras.Input((6,))
        x = seeded_dense(8, 1, activation="tanh")(Halves()(inputs))
        x = seeded_dense(8, 2, activation="tanh", name="adapted")(x)
        return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))

    outputs = []
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    for sampling in ("parallel", "sequential"):
        model = adapted(make, sampling=sampling)
        outputs.append(
            model.ensemble_predict(x, num_samples=2, seed=1, verbose=0)
        )
        assert not model.mask_plan.spreads_prefix
    assert_close(*outputs, 1e-5)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_sharing_changes_nothing_per_example(sampling):
    options = {"sampling": sampling, "mask_sharing": "example"}
    assert_same(
        trained(adapted(skips, **options)),
        trained(adapted(skips, shares=False, **options)),
    )


def rows_seen(model, name):
    """How many rows a layer computed in one training step and one ensemble."""
    layers = layer_paths(model)
    witness = next(lyr for path, lyr in layers.items() if path.endswith(name))
    x, y = data(model)
    seen = []
    for run in (
        lambda: model.train_on_batch(x, y),
        lambda: model.ensemble_predict(x, verbose=0, batch_size=ROWS),
    ):
        run()  # Layouts are checked, and optimizers built, at first use.
        model.train_function = None
        model._ensemble_state.forget()
        witness.rows.clear()
        run()
        seen.append(sum(witness.rows))
    return seen


# Compiled backends trace a step more than once, and a loop of passes once.
@pytest.mark.skipif(BACKEND != "torch", reason="counts what runs eagerly")
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("make", MODELS)
def test_the_prefix_is_computed_once(make, sampling):
    model = adapted(make, sampling=sampling)
    assert rows_seen(model, "early") == [ROWS, ROWS]
    assert rows_seen(model, "late") == [NUM_SAMPLES * ROWS] * 2


@pytest.mark.skipif(BACKEND != "torch", reason="counts what runs eagerly")
def test_what_trains_in_the_prefix_is_recomputed_for_each_gradient():
    options = {"trainable_layers": ["before", "head"]}
    model = adapted(chain, sampling="sequential", **options)
    assert rows_seen(model, "early") == [NUM_SAMPLES * ROWS, ROWS]
    model = adapted(chain, sampling="parallel", **options)
    assert rows_seen(model, "early") == [ROWS, ROWS]


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_weights_that_train_before_the_first_adapter(sampling):
    options = {"trainable_layers": ["before", "head"], "sampling": sampling}
    model = adapted(skips, **options)
    before = array(model.get_layer("before").kernel)
    actual = trained(model)
    assert np.abs(array(model.get_layer("before").kernel) - before).max() > 1e-3
    assert_same(actual, trained(adapted(skips, shares=False, **options)))


def penalised():
    x = inputs = keras.Input((6,))
    x = seeded_dense(8, 1, name="before")(x)
    x = keras.layers.ActivityRegularization(l2=0.1)(x)
    x = seeded_dense(8, 2, name="adapted")(x)
    return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_losses_of_the_prefix_count(sampling):
    actual = trained(adapted(penalised, sampling=sampling))
    expected = trained(adapted(penalised, sampling=sampling, shares=False))
    assert_same(actual, expected)


def noisy():
    x = inputs = keras.Input((6,))
    x = keras.layers.Dropout(0.5, seed=1)(x)
    x = seeded_dense(8, 2, name="adapted")(x)
    return keras.Model(inputs, seeded_dense(3, 3, name="head")(x))


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_dropout_of_the_prefix_falls_alike_on_all_instances(sampling):
    model = adapted(noisy, sampling=sampling)
    for _, layer in model.adapted_layers:
        layer.lora_kernel_b.assign(np.zeros((2, 8), "float32"))
    model.optimizer.learning_rate = 0.0
    x, y = np.ones((1, 6), "float32"), np.zeros((1, 3), "float32")
    # Without a delta, instances differ in their dropout alone: a loss that is
    # none of those that one instance can have would be a mean over several.
    patterns = np.array(list(itertools.product([0.0, 2.0], repeat=6)))
    outputs = array(model(patterns.astype("float32")))
    possible = np.mean(outputs**2, axis=-1)
    losses = [np.ravel(model.train_on_batch(x, y))[0] for _ in range(6)]
    for loss in losses:
        assert np.abs(possible - loss).min() < 1e-5
    assert len(set(np.round(losses, 4))) > 1


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.before = seeded_dense(8, 1, name="before")
        self.adapted = seeded_dense(8, 2, name="adapted")
        self.head = seeded_dense(3, 3, name="head")

    def call(self, inputs):
        return self.head(self.adapted(self.before(inputs)))


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_a_model_without_a_graph_shares_nothing(sampling):
    model = Subclassed()
    model(np.zeros((1, 6), "float32"))
    kld.enable_lora_dropout(
        model, rank=2, target_layers=["adapted"], sampling=sampling
    )
    model.compile("sgd", "mse")
    x = np.ones((ROWS, 6), "float32")
    model.train_on_batch(x, x[:, :3])
    assert not model.mask_plan.keeps_prefix
    assert model.ensemble_predict(x, verbose=0).shape == (ROWS, 3)


@pytest.mark.parametrize(
    ("scope", "shares"),
    [
        ({"mode": "full"}, False),
        ({"mode": "activations"}, True),
        ({"mode": "list_of_layers", "layer_names": ["adapted"]}, True),
    ],
)
def test_a_graph_that_is_computed_again_shares_nothing(scope, shares):
    with keras.RematScope(**scope):
        model = chain()
    kld.enable_lora_dropout(model, rank=2, target_layers=["adapted"])
    assert model.mask_plan.keeps_prefix == shares


def test_merging_leaves_no_trace():
    model = adapted(nested)
    plain = model.merge_adapters()
    inner = plain.get_layer("inner")
    for graph in (plain, inner):
        assert "_run_through_graph" not in vars(graph)
    x, _ = data(plain)
    assert plain.predict(x, verbose=0).shape == (ROWS, 3)


def bert_with_adapters_on_top(**options):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30,
        num_layers=3,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=12,
        dropout=0.0,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, dropout=0.0
    )
    kld.enable_lora_dropout(
        model,
        rank=2,
        num_samples=NUM_SAMPLES,
        target_layers="transformer_layer_2/",
        seed=0,
        **options,
    )
    return randomize(model)


def test_ensembles_of_a_keras_hub_model_share():
    model = bert_with_adapters_on_top()
    x = {
        name: np.ones((2, 12), int)
        for name in ("token_ids", "padding_mask", "segment_ids")
    }
    model.ensemble_predict(x, verbose=0)
    assert model.mask_plan.spreads_prefix


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_the_top_of_a_keras_hub_model(sampling):
    results = []
    x = {
        "token_ids": np.arange(24).reshape(2, 12),
        "padding_mask": np.array([[1] * 12, [1] * 7 + [0] * 5]),
        "segment_ids": np.zeros((2, 12), int),
    }
    for hide in (contextlib.nullcontext(), without_sharing()):
        keras.utils.set_random_seed(0)
        with hide:
            model = bert_with_adapters_on_top(sampling=sampling)
            _ = model.mask_plan
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss, metrics=[])
        losses = [model.train_on_batch(x, np.array([0, 1])) for _ in range(2)]
        fixed = model.as_ensemble(seed=4)
        results.append(
            [
                np.ravel(losses),
                model.ensemble_predict(x, seed=4, verbose=0),
                fixed.predict(x, verbose=0),
            ]
        )
    assert_same(*results)
    assert_close(results[0][1], results[0][2], 1e-5)
