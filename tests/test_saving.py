"""Whole models in files: the same model comes back, and trains on."""

import copy
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import families
import keras
import numpy as np
import pytest
import saved_models
from helpers import BACKEND
from helpers import array
from helpers import assert_close
from saved_models import KINDS
from saved_models import compiled
from saved_models import outputs
from saved_models import train

import keras_lora_dropout as kld

PROGRAM = pathlib.Path(saved_models.__file__)
BACKENDS = [
    backend
    for backend in ("jax", "torch", "tensorflow")
    if importlib.util.find_spec(backend)
]

# A tokenizer leaves closing its vocabulary file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def assert_equal_state(model, other):
    """All variables are equal: weights, optimizer, ranks, random states."""
    assert type(model) is type(other)
    assert len(model.variables) == len(other.variables)
    for ours, theirs in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs), ours.path)
        assert ours.trainable == theirs.trainable
    for ours, theirs in zip(
        model.optimizer.variables, other.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(array(ours), array(theirs), ours.path)


@pytest.fixture(params=KINDS, scope="module")
def trained(request, tmp_path_factory):
    """A trained model of each kind, and its file."""
    keras.utils.set_random_seed(3)
    model = compiled(KINDS[request.param]())
    train(model)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    return model, path


def test_the_same_model_comes_back(trained):
    model, path = trained
    loaded = keras.saving.load_model(path)
    assert_equal_state(model, loaded)
    assert loaded.lora_dropout == model.lora_dropout
    assert loaded.rank_budget == model.rank_budget
    assert loaded.rank_pattern() == dict(
        zip(
            [path for path, _ in loaded.adapted_layers],
            model.rank_pattern().values(),
            strict=True,
        )
    )
    for (_, ours), (_, theirs) in zip(
        model.adapted_layers, loaded.adapted_layers, strict=True
    ):
        assert type(ours) is type(theirs)
        for name in ("lora_rank", "lora_alpha", "dropout_rate", "rescale"):
            assert getattr(ours, name) == getattr(theirs, name)
    x, _ = saved_models.data()
    for ours, theirs in zip(outputs(model, x), outputs(loaded, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_training_goes_on_as_if_it_had_not_stopped(trained):
    model, path = trained
    loaded = keras.saving.load_model(path)
    again = keras.saving.load_model(path)
    train(again, epochs=1)
    train(again, epochs=1)
    train(loaded)
    assert_equal_state(loaded, again)
    difference = [
        np.abs(array(ours) - array(theirs)).max()
        for ours, theirs in zip(
            model.trainable_variables, loaded.trainable_variables, strict=True
        )
    ]
    assert min(difference) > 0


def test_copies_are_whole(trained):
    model, _ = trained
    x, _ = saved_models.data()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_state(model, copied)
        np.testing.assert_array_equal(outputs(model, x), outputs(copied, x))
    cloned = type(model).from_config(model.get_config())
    assert type(cloned) is type(model)


def test_a_run_cut_in_two_equals_one_that_was_not(tmp_path):
    """The uninterrupted run never saves, so saving cannot change it."""
    for kind in ("functional", "adalora"):
        results = []
        for cut in (False, True):
            keras.utils.set_random_seed(3)
            budget = kld.RankBudget(1, total_steps=12)
            model = saved_models.enabled(
                saved_models.functional,
                rank_budget=budget if kind == "adalora" else None,
            )
            train(compiled(model), epochs=1)
            if cut:
                model.save(tmp_path / "cut.keras")
                model = keras.saving.load_model(tmp_path / "cut.keras")
            train(model, epochs=2)
            results.append(model)
        assert_equal_state(*results)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of many kinds, and what was predicted before they were written."""
    folder = tmp_path_factory.mktemp("files")
    x, _ = saved_models.data()
    inputs, expected = {"x": x}, {}
    kinds = {
        kind: make
        for kind, make in KINDS.items()
        if kind not in ("subclassed", "by_hand")  # Classes of the tests.
    }
    for kind, make in kinds.items():
        path = str(folder / f"{kind}.keras")
        model = compiled(make())
        train(model)
        predicted = outputs(model, x)
        model.save(path)
        train(model)
        expected[path] = (model, *predicted, model.get_weights())
    for family in (families.deberta_of_any_backend, families.llama):
        path = str(folder / f"{family.__name__}.keras")
        model = kld.enable_lora_dropout(family(), rank=2, seed=0)
        for _, layer in model.adapted_layers:
            shape = layer.lora_kernel_b.shape
            layer.lora_kernel_b.assign(
                np.random.default_rng(1).normal(0, 0.3, shape)
            )
        model.save(path)
        predicted = outputs(model, families.TEXTS)
        expected[path] = (model, *predicted, None)
        inputs[path] = np.array(families.TEXTS)
    np.savez(folder / "data.npz", **inputs)
    return folder, expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_processes_on_all_backends(files, backend):
    folder, expected = files
    results = folder / f"{backend}.npz"
    trains = "train" if backend == BACKEND else "no"
    arguments = folder / "data.npz", results, trains, *expected
    process = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    with np.load(results, allow_pickle=False) as found:
        for path, (model, mean, ensemble, weights) in expected.items():
            assert found[f"{path}/class"] == type(model).__name__
            assert_close(found[f"{path}/predict"], mean, 1e-5)
            if backend != BACKEND:
                continue
            np.testing.assert_array_equal(found[f"{path}/predict"], mean)
            np.testing.assert_array_equal(found[f"{path}/ensemble"], ensemble)
            for index, weight in enumerate(weights or []):
                np.testing.assert_array_equal(
                    found[f"{path}/trained_{index}"], weight
                )


def test_a_task_keeps_tokenizer_sampler_and_optimizer(tmp_path):
    """KerasHub's tasks have a `compile` of their own, which Keras skips."""
    model = kld.enable_lora_dropout(families.llama(), rank=2, num_samples=2)
    model.compile(keras.optimizers.Adam(0.01), sampler="greedy")
    options = {"batch_size": 3, "verbose": 0, "shuffle": False}
    model.fit(families.TEXTS, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.sampler).__name__ == "GreedySampler"
    model.fit(families.TEXTS, **options)
    loaded.fit(families.TEXTS, **options)
    assert_equal_state(model, loaded)
    assert model.generate("the quick", 8) == loaded.generate("the quick", 8)


def test_several_adapters_come_back(tmp_path):
    model = compiled(KINDS["adalora"]())
    train(model)
    x, _ = saved_models.data()
    first = outputs(model, x)
    model.add_adapter("second", rank=1, dropout_rate=0.2)
    model.set_adapter("second")
    train(model)
    second = outputs(model, x)
    model.save(tmp_path / "model.keras")
    model.set_adapter("default")
    train(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.adapter_names == ["second", "default"]
    np.testing.assert_array_equal(outputs(loaded, x), second)
    loaded.set_adapter("default")
    np.testing.assert_array_equal(outputs(loaded, x), first)
    train(loaded)
    assert_equal_state(model, loaded)


def interrupted(folder, epochs):
    """A run that backs up each epoch, up to some epoch of five."""
    keras.utils.set_random_seed(3)
    model = compiled(KINDS["adalora"]())
    model.rank_allocator.start(model.optimizer, 5, 4)
    backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    history = train(model, epochs, callbacks=[backup])
    return model, history


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp("whole"), 5)[0]


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param('{"epoch": 2, "batch": 0}', id="of the last epoch"),
        pytest.param('{"epo', id="half written"),
        pytest.param("", id="empty"),
        pytest.param(None, id="missing"),
    ],
)
def test_backups_whose_weights_are_newer(uninterrupted, tmp_path, metadata):
    """`BackupAndRestore` killed between its two files."""
    interrupted(tmp_path, 3)
    path = tmp_path / "training_metadata.json"
    assert json.loads(path.read_text())["epoch"] == 3
    path.unlink()
    if metadata is not None:
        path.write_text(metadata)
    model, history = interrupted(tmp_path, 5)
    assert history.epoch == [3, 4]
    assert_equal_state(uninterrupted, model)


def test_a_fit_after_a_restored_one_starts_at_its_beginning(tmp_path):
    interrupted(tmp_path, 2)
    model, history = interrupted(tmp_path, 3)
    assert history.epoch == [2]
    assert train(model, epochs=2).epoch == [0, 1]


def test_loading_weights_does_not_move_the_first_epoch(tmp_path):
    model = compiled(KINDS["functional"]())
    train(model, epochs=3)
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    assert train(model, epochs=2).epoch == [0, 1]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    model = compiled(KINDS["functional"]())
    path = tmp_path / f"model{suffix}"
    save = model.save if suffix == ".keras" else model.save_weights
    save(path)
    before = path.read_bytes()

    def fails(self, store):
        raise OSError("No space left on device")

    monkeypatch.setattr(
        keras.layers.BatchNormalization, "save_own_variables", fails
    )
    with pytest.raises(OSError, match="No space"):
        save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["model.h5", "model.hdf5"])
def test_the_old_format_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.keras"):
        KINDS["functional"]().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_both_kinds(tmp_path):
    model = compiled(KINDS["functional"]())
    train(
        model,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "{epoch}.weights.h5", save_weights_only=True
            ),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "{batch}.keras", save_freq=3
            ),
        ],
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert {"1.keras", "2.keras", "1.weights.h5", "2.weights.h5"} <= names
    assert_equal_state(model, keras.saving.load_model(tmp_path / "2.keras"))
    other = compiled(KINDS["functional"]())
    other.load_weights(tmp_path / "2.weights.h5")
    assert_equal_state(model, other)
    loaded = keras.saving.load_model(tmp_path / "1.keras")
    train(loaded, epochs=1)
    assert_equal_state(model, loaded)


def test_other_random_generators_are_not_restored_but_said(tmp_path, caplog):
    model = KINDS["functional"]()
    model.save_weights(tmp_path / "model.weights.h5")

    def without_dropout():
        inputs = keras.Input((6,), name="features")
        plain = saved_models.functional()
        x = keras.Sequential([plain.layers[1].layers[0]], name="first")(inputs)
        for layer in plain.layers[2:]:
            x = layer(x)
        return keras.Model(inputs, x)

    other = saved_models.enabled(without_dropout)
    other.load_weights(tmp_path / "model.weights.h5")
    assert "random generators" in caplog.text


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    model = KINDS["functional"]()
    path = tmp_path / "model[1].keras"
    old, new = (tmp_path / f".{path.name}.{n}.keras" for n in (1, 2))
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    model.save(path)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, new.name}


def test_files_keep_their_permissions(tmp_path):
    model = KINDS["functional"]()
    path = tmp_path / "model.keras"
    model.save(path)
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    path.chmod(0o640)
    model.save(path)
    assert path.stat().st_mode & 0o777 == 0o640
