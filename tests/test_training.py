"""The N-sample training step: every way Keras lets people train."""

import keras
import numpy as np
import pytest
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import seeded_dense
from helpers import tiny_mlp
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.core import grouped_product
from keras_lora_dropout.core import masks

COMBINATIONS = [
    ("parallel", "batch"),
    ("parallel", "example"),
    ("sequential", "batch"),
    ("sequential", "example"),
]


def weights_of(model):
    return {
        variable.path: ops.convert_to_numpy(variable)
        for variable in model.trainable_variables
    }


def gradients_of(model, x, y, **options):
    """Gradients of one `train_on_batch` step of `SGD(1)`, and its logs."""
    before = weights_of(model)
    logs = model.train_on_batch(x, y, return_dict=True, **options)
    after = weights_of(model)
    return {path: before[path] - after[path] for path in before}, logs


def step(sampling="parallel", mask_sharing="batch", data=None, **options):
    """One step of a fresh model: gradients and logs."""
    compile_options = {
        "optimizer": keras.optimizers.SGD(1.0),
        **options.pop("compile_options", {}),
    }
    model = adapted_mlp(
        compile_options,
        sampling=sampling,
        mask_sharing=mask_sharing,
        num_samples=options.pop("num_samples", 3),
        use_dora=options.pop("use_dora", False),
    )
    x, y = data or classification_data()
    return gradients_of(model, x, y, **options)


def assert_same_step(first, second, tolerance=1e-5):
    for path, gradient in first[0].items():
        assert_close(second[0][path], gradient, tolerance)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in first[0].values())
    for name, value in first[1].items():
        assert_close(second[1][name], value, tolerance)


@pytest.mark.parametrize("mask_sharing", ["batch", "example"])
def test_parallel_equals_sequential(mask_sharing):
    assert_same_step(
        step("parallel", mask_sharing), step("sequential", mask_sharing)
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_parallel_equals_sequential_for_large_inputs(use_dora):
    """On torch, large stacks of inputs have a gradient of their own."""
    data = classification_data(
        examples=grouped_product.LARGE_INPUT // (3 * 6) + 1
    )
    parallel, sequential = (
        step(way, data=data, use_dora=use_dora)
        for way in ("parallel", "sequential")
    )
    assert_same_step(parallel, sequential)


@pytest.mark.skipif(BACKEND != "torch", reason="autocast is torch's own")
def test_large_inputs_under_autocast():
    import torch

    data = classification_data(
        examples=grouped_product.LARGE_INPUT // (3 * 6) + 1
    )
    plain, logs = step("parallel", data=data)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_logs = step("parallel", data=data)
    assert_close(cast_logs["loss"], logs["loss"], 0.02)
    for path, gradient in plain.items():
        assert_close(cast[path], gradient, 0.02)


def test_the_step_is_the_mean_of_its_instances(monkeypatch):
    """Loss and gradient of N instances against N steps of one instance."""
    values = None

    def recorded(shape, seed):
        nonlocal values
        values = np.random.default_rng(0).uniform(size=shape)
        return ops.convert_to_tensor(values.astype("float32"))

    monkeypatch.setattr(masks, "draw_uniform", recorded)
    compile_options = {"run_eagerly": True}
    together = step(num_samples=3, compile_options=compile_options)
    singles = []
    for n in range(3):
        monkeypatch.setattr(
            masks,
            "draw_uniform",
            lambda shape, seed, n=n: ops.convert_to_tensor(
                values[n : n + 1].astype("float32")
            ),
        )
        singles.append(step(num_samples=1, compile_options=compile_options))
    for path, gradient in together[0].items():
        assert_close(gradient, np.mean([s[0][path] for s in singles], axis=0))
    assert_close(together[1]["loss"], np.mean([s[1]["loss"] for s in singles]))


@pytest.mark.parametrize(("sampling", "mask_sharing"), COMBINATIONS)
def test_fit_lowers_the_loss_and_keeps_frozen_weights(sampling, mask_sharing):
    model = adapted_mlp(
        {"optimizer": keras.optimizers.Adam(0.02), "metrics": ["accuracy"]},
        sampling=sampling,
        mask_sharing=mask_sharing,
        num_samples=2,
    )
    x, y = classification_data(examples=10)
    trained = {id(variable) for variable in model.trainable_variables}
    frozen = {
        variable.path: ops.convert_to_numpy(variable)
        for variable in model.weights
        if id(variable) not in trained
    }
    assert any("kernel" in path for path in frozen)
    assert any("bias" in path for path in frozen)
    # 10 examples in batches of 4: the last batch is partial.
    history = model.fit(x, y, batch_size=4, epochs=15, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.05
    for variable in model.weights:
        if variable.path in frozen:
            np.testing.assert_array_equal(
                ops.convert_to_numpy(variable), frozen[variable.path]
            )


# To compile, torch imports deprecated parts of its own and looks at gradients
# that it then says are not there.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_jit_compiled_equals_eager(monkeypatch, sampling):
    # Compiled by XLA, TensorFlow draws other numbers from the same seed.
    monkeypatch.setattr(
        masks,
        "draw_uniform",
        lambda shape, seed: ops.convert_to_tensor(
            np.random.default_rng(0).uniform(size=shape).astype("float32")
        ),
    )
    assert_same_step(
        step(sampling, compile_options={"run_eagerly": True}),
        step(sampling, compile_options={"jit_compile": True}),
    )


@pytest.mark.parametrize("jit_compile", [True, False])
def test_torch_compile_shares_no_prefix(jit_compile):
    """There, a step that shares takes several times as long."""
    model = adapted_mlp()
    assert model.mask_plan.keeps_prefix
    model.compile("sgd", "mse", jit_compile=jit_compile)
    shares = BACKEND != "torch" or not jit_compile
    assert model.mask_plan.keeps_prefix == shares


def test_partial_batches_weigh_as_keras_weighs_them():
    """The epoch's loss is the mean over examples, not over batches."""
    model = adapted_mlp(
        {"optimizer": keras.optimizers.SGD(0.0)}, dropout_rate=0
    )
    x, y = classification_data(examples=7)
    logs = model.fit(x, y, batch_size=4, verbose=0).history
    assert_close(logs["loss"][0], model.evaluate(x, y, verbose=0))


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"]
)
def test_reductions_and_sample_weights(sampling, reduction):
    """With p = 0 all instances agree: N changes nothing whatever the loss."""
    x, y = classification_data()
    weight = np.linspace(0.1, 2.0, len(y)).astype("float32")

    def gradients(num_samples):
        model = adapted_mlp(
            {
                "optimizer": keras.optimizers.SGD(1.0),
                "loss": keras.losses.SparseCategoricalCrossentropy(
                    from_logits=True, reduction=reduction
                ),
                "weighted_metrics": ["accuracy"],
            },
            dropout_rate=0.0,
            num_samples=num_samples,
            sampling=sampling,
        )
        return gradients_of(model, x, y, sample_weight=weight)

    assert_same_step(gradients(1), gradients(3))


def test_class_weight():
    _, y = classification_data()
    class_weight = {0: 1.0, 1: 3.0, 2: 0.5}
    weight = np.array([class_weight[int(label)] for label in y], "float32")
    assert_same_step(
        step(class_weight=class_weight), step(sample_weight=weight)
    )


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_custom_compute_loss_sees_each_instance(sampling):
    class Custom(keras.Model):
        def compute_loss(
            self, x=None, y=None, y_pred=None, sample_weight=None, training=True
        ):
            # Not linear in the outputs, and tied to this batch's own rows.
            assert y_pred.shape[0] == x.shape[0] == y.shape[0]
            return ops.square(ops.sum(y_pred[:, 0] * x[:, 0]))

    inputs = keras.Input((6,))
    x = seeded_dense(8, 1, activation="tanh", name="first")(inputs)
    model = Custom(inputs, keras.layers.Dense(3, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, sampling=sampling, seed=0)
    randomize(model)
    model.compile(keras.optimizers.SGD(0.01))
    x, y = classification_data()
    before = weights_of(model)
    model.fit(x, y, batch_size=5, verbose=0)
    after = weights_of(model)
    assert any(np.abs(before[p] - after[p]).max() > 0 for p in before)


def test_compute_loss_without_training_argument():
    class Early(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.mean(ops.square(y_pred))

    layers = [keras.layers.Dense(4), keras.layers.Dense(2)]
    model = Early([keras.Input((6,)), *layers])
    kld.enable_lora_dropout(model, rank=1)
    model.compile("sgd")
    x, y = classification_data()
    assert model.fit(x, y, verbose=0).history["loss"][0] > 0


def two_headed(**options):
    inputs = keras.Input((6,), name="features")
    x = seeded_dense(8, 1, activation="tanh", name="first")(inputs)
    outputs = {
        "label": seeded_dense(3, 2, name="label")(x),
        "value": seeded_dense(1, 3, name="value")(x),
    }
    model = keras.Model(inputs, outputs)
    kld.enable_lora_dropout(model, rank=2, seed=0, num_samples=3, **options)
    randomize(model)
    model.compile(
        keras.optimizers.SGD(1.0),
        loss={
            "label": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            ),
            "value": "mse",
        },
        loss_weights={"label": 1.0, "value": 0.5},
        metrics={"label": ["accuracy"], "value": ["mae"]},
    )
    return model


def test_multi_output_models():
    x, y = classification_data()
    targets = {"label": y, "value": x[:, :1]}
    steps = [
        gradients_of(two_headed(sampling=sampling), x, targets)
        for sampling in ("parallel", "sequential")
    ]
    assert_same_step(*steps)
    logs = steps[0][1]
    assert_close(logs["loss"], logs["label_loss"] + 0.5 * logs["value_loss"])
    assert set(logs) >= {"label_accuracy", "value_mae"}


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_regularizers_count_once(sampling):
    """The extra loss of N instances at p = 0 is that of one plain pass."""

    def build():
        inputs = keras.Input((6,))
        x = keras.layers.Dense(8, name="first", activity_regularizer="l2")(
            inputs
        )
        head = keras.layers.Dense(3, name="head", kernel_regularizer="l2")
        return keras.Model(inputs, head(x))

    x, y = classification_data()
    plain = build()
    model = build()
    model.set_weights(plain.get_weights())
    kld.enable_lora_dropout(
        model, rank=2, dropout_rate=0.0, num_samples=4, sampling=sampling
    )
    for each in (plain, model):
        each.compile(
            keras.optimizers.SGD(0.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    expected = plain.train_on_batch(x, y)
    bare = ops.convert_to_numpy(
        keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
            y, plain(x)
        )
    )
    assert expected > bare + 0.01
    assert_close(model.train_on_batch(x, y), expected)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
def test_padding_masks_reach_the_loss(sampling):
    """Masked steps of a sequence count in no instance's loss."""

    def gradients(num_samples, padding):
        inputs = keras.Input((5, 4))
        x = keras.layers.Masking()(inputs)
        x = keras.layers.Dense(6, name="first")(x)
        model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
        keras.utils.set_random_seed(0)
        for variable in model.weights:
            variable.assign(keras.random.normal(variable.shape, seed=7))
        kld.enable_lora_dropout(
            model,
            rank=2,
            dropout_rate=0.0,
            num_samples=num_samples,
            sampling=sampling,
            seed=0,
        )
        randomize(model)
        model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
        x = np.random.default_rng(0).normal(size=(4, 5, 4)).astype("float32")
        x[:, 3:] = 0.0
        y = np.ones((4, 5, 2), "float32")
        y[:, 3:] = padding
        return gradients_of(model, x, y)

    assert_same_step(gradients(1, 0.0), gradients(3, 100.0))


def test_steps_per_execution():
    """Two steps in one call train as two calls do (torch allows one)."""
    x, y = classification_data(examples=8)

    def trained(steps):
        model = adapted_mlp({"steps_per_execution": steps})
        model.fit(x, y, batch_size=4, shuffle=False, epochs=2, verbose=0)
        return weights_of(model)

    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            trained(2)
        return
    one, two = trained(1), trained(2)
    for path, value in one.items():
        assert_close(two[path], value)


def test_gradient_accumulation():
    """Two accumulated half batches step like one batch (p = 0)."""
    x, y = classification_data(examples=8)

    def trained(accumulate, batch_size):
        model = adapted_mlp(
            {
                "optimizer": keras.optimizers.SGD(
                    0.5, gradient_accumulation_steps=accumulate
                )
            },
            dropout_rate=0.0,
            num_samples=2,
        )
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        return weights_of(model)

    whole, halves = trained(None, 8), trained(2, 4)
    for path, value in whole.items():
        assert_close(halves[path], value)


@pytest.mark.parametrize("sampling", ["parallel", "sequential"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_with_loss_scaling(policy, sampling):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", dtype=policy)(inputs)
    x = keras.layers.Dense(8, activation="tanh", dtype=policy)(x)
    model = keras.Model(inputs, keras.layers.Dense(3, dtype=policy)(x))
    kld.enable_lora_dropout(model, rank=2, num_samples=2, sampling=sampling)
    for _, layer in model.adapted_layers:
        assert layer.lora_kernel_a.dtype == "float32"
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.02), initial_scale=2.0**10
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = classification_data()
    history = model.fit(x, y, epochs=15, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0] - 0.02
    assert model.predict(x, verbose=0).dtype != np.float64


def test_own_training_loop_shares_masks_in_one_pass():
    """A call with `training=True` outside `fit` is one instance."""
    shared = keras.layers.Dense(6, use_bias=False, name="shared")
    inputs = keras.Input((6,))
    twice = keras.layers.Subtract()([shared(inputs), shared(inputs)])
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(twice))
    kld.enable_lora_dropout(model, rank=2, target_layers=["shared"], seed=0)
    randomize(model)
    model.get_layer("head").bias.assign([0.0, 0.0])
    x, _ = classification_data()
    assert_close(model(x, training=True), np.zeros((10, 2)))
    # Another pass is another instance.
    inner = keras.Model(inputs, shared(inputs))
    first, second = (
        ops.convert_to_numpy(inner(x, training=True)) for _ in range(2)
    )
    assert np.abs(first - second).max() > 1e-3


def test_own_training_loop_without_a_training_argument():
    """Masks are drawn, and shared, though `call` knows nothing of training."""

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.shared = keras.layers.Dense(6, name="shared")
            self.head = keras.layers.Dense(2, name="head")

        def call(self, x):
            return self.shared(x), self.shared(x), self.head(x)

    x, _ = classification_data()
    model = Twice()
    model(x)
    kld.enable_lora_dropout(model, rank=2, target_layers=["shared"])
    randomize(model)
    first, again, _ = model(x, training=True)
    assert_close(first, again, 0)
    other, _, _ = model(x, training=True)
    difference = ops.convert_to_numpy(ops.max(ops.abs(first - other)))
    assert difference > 1e-3


def test_metrics_see_the_mean_output():
    """A metric of one step equals that of the averaged member outputs."""
    x = np.ones((2, 6), "float32")
    y = np.zeros((2, 3), "float32")

    def logs(sampling):
        model = adapted_mlp(
            {
                "optimizer": keras.optimizers.SGD(0.0),
                "loss": "mse",
                "metrics": ["mse"],
            },
            sampling=sampling,
            num_samples=4,
        )
        return model.train_on_batch(x, y, return_dict=True)

    parallel, sequential = logs("parallel"), logs("sequential")
    for each in (parallel, sequential):
        # Jensen: the loss of the mean is below the mean of the losses.
        assert each["mse"] < each["loss"] - 1e-4
    assert_close(parallel["mse"], sequential["mse"])


def test_optimizer_of_an_earlier_run_is_renewed():
    model = tiny_mlp()
    x, y = classification_data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.123), loss)
    model.fit(x, y, verbose=0)
    kld.enable_lora_dropout(model, rank=2)
    assert_close(model.optimizer.learning_rate, 0.123)
    model.fit(x, y, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * len(
        model.trainable_variables
    )


def test_gradient_checkpointing_gives_the_same_step():
    x, y = classification_data()

    def gradients(*layer_names):
        with keras.RematScope("list_of_layers", layer_names=layer_names):
            model = adapted_mlp(
                {
                    "optimizer": keras.optimizers.SGD(1.0),
                    # In a graph, TensorFlow's takes no keyword arguments.
                    "run_eagerly": BACKEND == "tensorflow",
                },
                num_samples=2,
            )
        return gradients_of(model, x, y), model.evaluate(x, y, verbose=0)

    plain, checkpointed = gradients(), gradients("first", "second")
    assert_same_step(plain[0], checkpointed[0])
    assert_close(plain[1], checkpointed[1])
