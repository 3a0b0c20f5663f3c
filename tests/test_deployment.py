"""`as_ensemble`, and exports of it and of the mean network."""

import keras
import numpy as np
import pytest
from families import TEXTS
from families import bert
from families import deberta
from families import llama
from helpers import BACKEND
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import seeded_dense
from helpers import tiny_mlp

import keras_lora_dropout as kld

NUM_SAMPLES = 2
TOLERANCE = 1e-4
X, Y = classification_data()


def tiny_sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            seeded_dense(8, 1, activation="tanh", name="first"),
            seeded_dense(3, 2, name="head"),
        ]
    )


class Subclassed(keras.Model):
    """Two layers; its `call` has no `training`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = seeded_dense(8, 1, activation="tanh", name="first")
        self.head = seeded_dense(3, 2, name="head")

    def call(self, inputs):
        return self.head(self.first(inputs))


def tiny_subclassed():
    model = Subclassed()
    model(X)
    return model


def adapted(make, **options):
    """An adapted model whose adapters act, and a batch for it."""
    model = kld.enable_lora_dropout(make(), rank=2, seed=0, **options)
    randomize(model, scale=1.0)
    if getattr(model, "preprocessor", None) is None:
        return model, X
    batch = model.preprocessor(TEXTS)
    batch = batch[0] if isinstance(batch, tuple) else batch
    # The types of the model's inputs; the mask comes as booleans.
    batch = {
        name: keras.ops.convert_to_numpy(value).astype("int32")
        for name, value in batch.items()
    }
    return model, batch


PLAIN = [tiny_mlp, tiny_sequential, tiny_subclassed]
TASKS = [bert, deberta, llama]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("make", PLAIN)
def test_it_is_the_ensemble_of_ensemble_predict(make, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, x = adapted(make)
        ensemble = model.as_ensemble(num_samples=3, seed=5)
        outputs = ensemble.predict(x, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    expected = model.ensemble_predict(x, num_samples=3, seed=5, verbose=0)
    assert outputs.dtype == expected.dtype
    assert ensemble.compute_dtype == model.compute_dtype
    tolerance = 1e-6 if policy == "float32" else 1e-2
    assert_close(array(outputs), array(expected), tolerance)
    mean_network = array(model.predict(x, verbose=0))
    assert np.abs(array(outputs) - mean_network).max() > 3 * tolerance


@pytest.mark.parametrize("make", TASKS)
def test_it_takes_what_the_preprocessor_gives(make):
    model, x = adapted(make)
    ensemble = model.as_ensemble(num_samples=2, seed=5)
    expected = model.ensemble_predict(TEXTS, num_samples=2, seed=5, verbose=0)
    assert_close(ensemble.predict(x, verbose=0), expected)
    assert np.abs(model.predict(TEXTS, verbose=0) - expected).max() > 1e-4
    assert set(ensemble.input) == set(model.input)


def test_probabilities_are_averaged_on_request():
    model = adapted_mlp()
    ensemble = model.as_ensemble(num_samples=3, seed=5, average="probability")
    expected = model.ensemble_predict(
        X, num_samples=3, seed=5, average="probability", verbose=0
    )
    outputs = ensemble.predict(X, verbose=0)
    assert_close(outputs, expected)
    assert_close(outputs.sum(axis=-1), np.ones(len(X)))


def test_the_masks_are_fixed():
    model = adapted_mlp()
    ensemble = model.as_ensemble(num_samples=3)
    outputs = array(ensemble(X))
    model.ensemble_predict(X, seed=1, verbose=0)
    model.fit(X, Y, epochs=0, verbose=0)
    assert_close(ensemble(X), outputs)
    assert_close(ensemble(X, training=True), outputs)
    assert_close(ensemble.predict(X, batch_size=3, verbose=0), outputs)
    assert_close(ensemble(X[::-1]), outputs[::-1])
    other = array(model.as_ensemble(num_samples=3)(X))
    assert np.abs(other - outputs).max() > 1e-3


def test_the_model_has_its_own_n():
    model = adapted_mlp(num_samples=3)
    expected = model.ensemble_predict(X, seed=5, verbose=0)
    assert_close(model.as_ensemble(seed=5)(X), expected)


def test_weights_are_shared_and_not_copied():
    model = adapted_mlp()
    ensemble = model.as_ensemble(num_samples=5, seed=5)
    own = {id(variable) for variable in ensemble.weights}
    shared = {id(variable) for variable in model.weights}
    assert shared < own
    assert len(own) == len(shared) + 1
    assert [v.name for v in ensemble.trainable_weights] == [
        v.name for v in model.trainable_weights
    ]
    model.fit(X, Y, epochs=2, verbose=0)
    expected = model.ensemble_predict(X, num_samples=5, seed=5, verbose=0)
    assert_close(ensemble(X), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "positive integer.*num_samples=0"),
        ({"seed": "a"}, TypeError, "integer, or None.*'a'"),
        ({"average": "mode"}, ValueError, '"output" or "probability".*mode'),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        adapted_mlp().as_ensemble(**options)


@pytest.mark.parametrize("make", [tiny_mlp, tiny_sequential, bert])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_it_can_be_saved(make, tmp_path):
    model, x = adapted(make)
    ensemble = model.as_ensemble(3, seed=5, average="probability")
    ensemble.save(tmp_path / "ensemble.keras")
    loaded = keras.saving.load_model(tmp_path / "ensemble.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), ensemble.predict(x, verbose=0)
    )


def test_it_needs_the_adapters():
    model = adapted_mlp()
    ensemble = model.as_ensemble(2)
    model.merge_adapters()
    with pytest.raises(ValueError, match="unmerge_adapters"):
        ensemble(X)
    kld.unmerge_adapters(model)
    ensemble(X)


# Exports.

NETWORKS = {
    "mean": lambda model: model,
    "merged": lambda model: model.merge_adapters(),
    "ensemble": lambda model: model.as_ensemble(NUM_SAMPLES, seed=5),
}
# Format, model, shape of a task's inputs (`None` is any length). What is not
# here, the exporters cannot do, and `docs/deployment.md` says why.
EXPORTS = {
    "jax": [
        ("onnx", tiny_mlp, None),
        ("onnx", tiny_sequential, None),
        ("onnx", bert, (6, 8)),
        ("tf_saved_model", tiny_mlp, None),
        ("tf_saved_model", tiny_subclassed, None),
        ("tf_saved_model", bert, (None, 8)),
        ("tf_saved_model", deberta, (None, 8)),
        ("tf_saved_model", llama, (None, 8)),
    ],
    "torch": [
        ("onnx", tiny_mlp, None),
        ("onnx", tiny_sequential, None),
        ("onnx", bert, (6, 8)),
        ("onnx", deberta, (6, 8)),
        ("onnx", llama, (6, 8)),
    ],
    "tensorflow": [
        ("onnx", tiny_mlp, None),
        ("onnx", tiny_sequential, None),
        ("onnx", bert, (None, None)),
        ("onnx", llama, (None, None)),
        ("tf_saved_model", tiny_mlp, None),
        ("tf_saved_model", tiny_subclassed, None),
        ("tf_saved_model", bert, (None, None)),
        ("tf_saved_model", deberta, (None, None)),
        ("tf_saved_model", llama, (None, None)),
    ],
}
CASES = [
    (*export, network)
    for export in EXPORTS[BACKEND]
    for network in NETWORKS
    # An ensemble is the harder one, and some exports take seconds.
    if network == "ensemble" or export[1] not in (deberta, llama)
    if network != "merged" or export[1] in (tiny_mlp, bert)
]
# The exporters warn of their own insides.
exporting = pytest.mark.filterwarnings("ignore")


def signature(batch, shape):
    """What `export` is told of the inputs of a task."""
    if shape is None:
        return None
    return [
        {
            name: keras.InputSpec(shape=shape, dtype="int32", name=name)
            for name in batch
        }
    ]


def predicted(network, batch):
    """What `predict` says; a task preprocesses its inputs itself.

    A call outside of it differs: on JAX, KerasHub's DeBERTaV3 rounds its
    relative positions in another way when it is not compiled.
    """
    is_task = getattr(network, "preprocessor", None) is not None
    return network.predict(TEXTS if is_task else batch, verbose=0)


def run_onnx(path, batch):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    inputs = session.get_inputs()
    if not isinstance(batch, dict):
        return session.run(None, {inputs[0].name: batch})[0]
    assert {node.name for node in inputs} == set(batch)
    return session.run(None, batch)[0]


def run_saved_model(path, batch):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return loaded.serve(keras.tree.map_structure(tf.constant, batch)).numpy()


RUNNERS = {"onnx": run_onnx, "tf_saved_model": run_saved_model}


@exporting
@pytest.mark.parametrize(("file_format", "make", "shape", "network"), CASES)
def test_an_export_computes_the_same(
    file_format, make, shape, network, tmp_path
):
    model, batch = adapted(make)
    other = predicted(model.as_ensemble(NUM_SAMPLES, seed=6), batch)
    exported = NETWORKS[network](model)
    path = str(tmp_path / "model.onnx")
    exported.export(
        path,
        format=file_format,
        verbose=False,
        input_signature=signature(batch, shape),
    )
    outputs = RUNNERS[file_format](path, batch)
    assert_close(outputs, predicted(exported, batch), TOLERANCE)
    assert np.abs(outputs - other).max() > 2 * TOLERANCE


@exporting
@pytest.mark.skipif(BACKEND == "jax", reason="repeats the graph's constants")
def test_an_export_holds_the_weights_once(tmp_path):
    """An ensemble adds its masked adapters, and no copy of a kernel."""
    import onnx

    def constants(network, name):
        path = str(tmp_path / name)
        network.export(path, format="onnx", verbose=False)
        arrays = [
            onnx.numpy_helper.to_array(initializer)
            for initializer in onnx.load(path).graph.initializer
        ]
        return [array for array in arrays if array.shape == (8, 8)]

    model, _ = adapted(tiny_mlp)
    once = constants(model, "mean.onnx")
    several = constants(model.as_ensemble(4, seed=5), "ensemble.onnx")
    assert len(several) == len(once) == 1


@exporting
@pytest.mark.skipif(BACKEND != "torch", reason="the other backends can")
def test_a_saved_model_needs_torch_xla(tmp_path):
    model, _ = adapted(tiny_mlp)
    spec = keras.InputSpec(shape=(2, 6), dtype="float32", name="features")
    with pytest.raises(ImportError, match="torch_xla"):
        model.export(
            str(tmp_path / "model"), verbose=False, input_signature=[spec]
        )


@exporting
def test_a_trained_model_can_be_exported(tmp_path):
    model = adapted_mlp()
    model.fit(X, Y, epochs=1, verbose=0)
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    expected = model.predict(X, verbose=0)
    assert_close(run_onnx(path, X), expected, TOLERANCE)


def test_a_model_whose_inputs_are_not_known(monkeypatch):
    model, _ = adapted(tiny_subclassed)
    monkeypatch.setattr(model, "get_build_config", lambda: None)
    with pytest.raises(ValueError, match=r"not known.*called on a batch"):
        model.as_ensemble()
