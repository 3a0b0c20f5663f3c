"""Adapters of their own: in files, and several on one base."""

import json

import families
import hypothesis
import keras
import numpy as np
import pytest
import saved_models
from helpers import adapted_mlp
from helpers import array
from helpers import assert_close
from helpers import classification_data
from helpers import randomize
from helpers import tiny_mlp
from hypothesis import strategies as st
from saved_models import KINDS
from saved_models import compiled
from saved_models import outputs
from saved_models import train

import keras_lora_dropout as kld
from keras_lora_dropout.storage.adapter_files import read_adapter_files
from keras_lora_dropout.storage.adapter_files import write_adapter_files

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def copy_base(model, other):
    """Give another model the same base; its adapters and head differ."""
    adapter = {id(f) for _, lyr in other.adapted_layers for f in lyr.factors}
    for ours, theirs in zip(model.weights, other.weights, strict=True):
        if id(theirs) not in adapter and not theirs.trainable:
            theirs.assign(array(ours))
    return other


def make(build):
    """Build a model as a process of its own does: equal names and weights."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    return build()


def state(model):
    return [array(variable) for variable in model.variables]


def assert_same(before, after):
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "compacted"])
def test_a_saved_adapter_makes_the_same_model(kind, tmp_path):
    model = compiled(make(KINDS[kind]))
    train(model)
    model.save_adapters(tmp_path / "adapter")
    other = compiled(make(KINDS[kind]))
    if kind == "trainable":  # Its head holds the statistics.
        assert any("moving_mean" in n for n in tensors_in(tmp_path))
    other.load_adapters(tmp_path / "adapter", check_fingerprint=False)
    x, _ = saved_models.data()
    copy_base(model, other)
    other.load_adapters(tmp_path / "adapter")
    for ours, theirs in zip(outputs(model, x), outputs(other, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    train(other)


def tensors_in(folder):
    return read_adapter_files(folder / "adapter")[1]


def test_settings_come_from_the_file(tmp_path, caplog):
    model = adapted_mlp(alpha=3.0, dropout_rate=0.25, rescale=True)
    model.save_adapters(tmp_path)
    other = adapted_mlp(num_samples=7)
    x, _ = classification_data()
    other.predict(x, verbose=0)
    other.test_on_batch(*classification_data())
    other.load_adapters(tmp_path)
    for name in ("alpha", "dropout_rate", "rescale"):
        assert name in caplog.text
    assert {lyr.lora_alpha for _, lyr in other.adapted_layers} == {3.0}
    assert other.lora_dropout.num_samples == 7
    assert_close(other.predict(x, verbose=0), model.predict(x, verbose=0), 1e-7)
    assert_close(
        other.test_on_batch(*classification_data()),
        model.test_on_batch(*classification_data()),
        1e-6,
    )


def test_the_rank_pattern_of_compact_ranks_is_taken_on(tmp_path):
    model = make(KINDS["compacted"])
    model.save_adapters(tmp_path)
    budget = kld.RankBudget(1, total_steps=4)
    other = make(
        lambda: saved_models.enabled(
            saved_models.functional, rank_budget=budget
        )
    )
    norms = [m.get_layer("norm") for m in (model, other)]
    norms[1].set_weights(norms[0].get_weights())
    other.load_adapters(tmp_path)
    assert other.rank_pattern() == model.rank_pattern()
    x, _ = saved_models.data()
    np.testing.assert_array_equal(outputs(other, x), outputs(model, x))
    assert not other.rank_allocator.is_open
    assert len(other.rank_history()["step"])


def test_every_difference_is_named(tmp_path):
    model = adapted_mlp(rank=2)
    model.save_adapters(tmp_path)
    plain = tiny_mlp(features=5, classes=4)
    other = kld.enable_lora_dropout(plain, rank=3, target_layers=["first"])
    before = state(other)
    with pytest.raises(ValueError) as caught:
        other.load_adapters(tmp_path)
    message = str(caught.value)
    for part in (
        'layer "second" is adapted in the file, but not in the model',
        'layer "first" has 6 input features in the file, but 5 in the model',
        'layer "first" has rank 2 in the file, but 3 in the model',
        'tensor "head/head/kernel" has shape (8, 3) in the file, but (8, 4)',
        "base weights are not those",
        "enable_lora_dropout",
    ):
        assert part in message
    assert_same(before, state(other))


def test_kinds_do_not_mix(tmp_path):
    adapted_mlp(rank=2).save_adapters(tmp_path)
    other = adapted_mlp(rank=2, rank_budget=kld.RankBudget(1))
    before = state(other)
    with pytest.raises(ValueError, match="kind LoRA in the file, but AdaLoRA"):
        other.load_adapters(tmp_path)
    assert_same(before, state(other))


def test_another_base_is_refused(tmp_path):
    adapted_mlp().save_adapters(tmp_path)
    other = adapted_mlp()
    kernel = other.get_layer("second")._kernel
    value = array(kernel)
    value[3, 4] = np.nextafter(np.float32(value[3, 4]), np.float32(9))
    kernel.assign(value)
    before = state(other)
    with pytest.raises(ValueError, match="check_fingerprint=False"):
        other.load_adapters(tmp_path)
    assert_same(before, state(other))
    other.load_adapters(tmp_path, check_fingerprint=False)


def test_the_fingerprint_is_that_of_the_base_alone(tmp_path):
    model = compiled(KINDS["functional"]())
    model.save_adapters(tmp_path / "before")
    train(model)
    model.save_adapters(tmp_path / "after")
    before, after = (
        read_adapter_files(tmp_path / name)[0] for name in ("before", "after")
    )
    assert before["base_fingerprint"] == after["base_fingerprint"]


@pytest.mark.parametrize("name", ["adapters.json", "adapters-*.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_files_leave_the_model_alone(tmp_path, name, damage):
    model = adapted_mlp()
    model.save_adapters(tmp_path)
    randomize(model, seed=5)
    path = next(tmp_path.glob(name))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-9])
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.unlink()
    before = state(model)
    with pytest.raises((ValueError, FileNotFoundError), match="adapters"):
        model.load_adapters(tmp_path)
    assert_same(before, state(model))


@pytest.fixture(scope="module")
def saved_mlp(tmp_path_factory):
    """A model, the directory of its adapter, and the content of the files."""
    model, folder = adapted_mlp(), tmp_path_factory.mktemp("adapter")
    model.save_adapters(folder)
    return model, {path: path.read_bytes() for path in folder.iterdir()}


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.data())
def test_no_damage_changes_the_model(saved_mlp, data):
    """Flipped bits, lost and added bytes, blocks in another order."""
    model, files = saved_mlp
    path = data.draw(st.sampled_from(sorted(files)))
    content = files[path]
    place = st.integers(0, len(content) - 1)
    first, second = sorted([data.draw(place), data.draw(place)])
    damaged = data.draw(
        st.sampled_from(
            [
                content[:first],
                content[:first] + content[second:],
                content[second:] + content[:second],
                content[:first] + content[second:] + content[first:second],
                content + content[first:second],
                content[:first]
                + bytes([content[first] ^ (1 << (second % 8))])
                + content[first + 1 :],
            ]
        )
    )
    before = state(model)
    try:
        path.write_bytes(damaged)
        model.load_adapters(path.parent)
    except ValueError:
        assert damaged != content
    finally:
        path.write_bytes(content)
    assert_same(before, state(model))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("layers"),
        lambda s: s.update(layers=3),
        lambda s: s["layers"]["first"].update(rank=-1),
        lambda s: s["layers"]["first"].update(alpha="nan"),
        lambda s: s["layers"]["first"].update(dropout_rate=1.5),
        lambda s: s["layers"]["first"].update(kind="other"),
        lambda s: s["layers"]["first"].update(rank=10**12),
        lambda s: s.update(rank_budget={"target": 1}),
        lambda s: s.update(rank_record={"step": "x"}),
        lambda s: s.pop("base_fingerprint"),
    ],
)
def test_foreign_settings_are_refused(tmp_path, change):
    """A file whose checksums are right, but not what is in it."""
    model = adapted_mlp()
    model.save_adapters(tmp_path)
    settings, tensors = read_adapter_files(tmp_path)
    change(settings)
    write_adapter_files(tmp_path, settings, tensors)
    before = state(model)
    with pytest.raises(ValueError, match="adapter"):
        model.load_adapters(tmp_path)
    with pytest.raises(ValueError, match="adapter"):
        model.add_adapter("other", path=tmp_path)
    assert_same(before, state(model))
    assert model.adapter_names == ["default"]


def test_what_is_written_is_readable(tmp_path):
    model = adapted_mlp(rank_budget=kld.RankBudget(1))
    model.save_adapters(tmp_path)
    settings = json.loads((tmp_path / "adapters.json").read_text())["settings"]
    assert settings["rank_pattern"] == {"first": 2, "second": 2}
    assert settings["rank_budget"]["target_rank"] == 1
    assert settings["sampling"]["num_samples"] == 4
    assert settings["layers"]["second"]["alpha"] == 2.0


class TestSeveralAdapters:
    def test_each_is_as_if_it_were_alone(self):
        """Training in turns ends as training each without a break."""
        x, _ = saved_models.data()
        keras.utils.set_random_seed(1)
        model = compiled(KINDS["functional"]())
        # Keras's dropout on torch draws from one generator for all models.
        model.get_layer("first").layers[1].rate = 0.0
        kernel_b = {
            p: array(lr.lora_kernel_b) for p, lr in model.adapted_layers
        }
        untrained = outputs(model, x)[0]
        model.add_adapter("b", rank=1, alpha=4, seed=3)
        train(model)
        trained = outputs(model, x)
        model.set_adapter("b")
        assert_close(outputs(model, x)[0], base_output(model, x), 1e-6)
        for path, layer in model.adapted_layers:
            assert layer.lora_rank == 1 and layer.lora_alpha == 4
            assert (
                array(layer.lora_kernel_b).shape[1] == kernel_b[path].shape[1]
            )
        train(model)
        model.set_adapter("default")
        np.testing.assert_array_equal(outputs(model, x), trained)
        assert np.abs(trained[0] - untrained).max() > 1e-3

    def test_the_optimizer_goes_on_with_its_adapter(self):
        """Two models: one that is switched away and back, one that is not."""
        results = []
        for switched in (False, True):
            keras.utils.set_random_seed(1)
            model = adapted_mlp({"optimizer": keras.optimizers.Adam(0.01)})
            model.add_adapter("b", seed=1)
            x, y = classification_data()
            options = {"verbose": 0, "shuffle": False}
            model.fit(x, y, epochs=2, **options)
            if switched:
                masks = array(model.mask_seed_generator.state)
                model.set_adapter("b")
                model.fit(x, y, epochs=3, **options)
                model.set_adapter("default")
                model.mask_seed_generator.state.assign(masks)
            model.fit(x, y, epochs=2, **options)
            results.append([array(w) for w in model.trainable_variables])
            results[-1] += [array(w) for w in model.optimizer.variables]
        assert_same(*results)

    def test_kinds_may_differ(self):
        x, _ = saved_models.data()
        model = compiled(KINDS["functional"]())
        train(model)
        before = outputs(model, x)
        model.add_adapter("ranks", rank=4, rank_budget=kld.RankBudget(1))
        model.set_adapter("ranks")
        train(model, epochs=4)
        kept = model.rank_pattern()
        assert sum(kept.values()) == len(kept)
        ranks = outputs(model, x)
        model.set_adapter("default")
        assert model.rank_budget is None
        np.testing.assert_array_equal(outputs(model, x), before)
        train(model)
        model.set_adapter("ranks")
        assert model.rank_pattern() == kept
        np.testing.assert_array_equal(outputs(model, x), ranks)
        model.compact_ranks()
        model.set_adapter("default")
        model.set_adapter("ranks")
        assert model.rank_pattern() == kept
        np.testing.assert_allclose(outputs(model, x), ranks, atol=1e-6)

    def test_a_closed_schedule_stays_closed_and_an_open_one_open(
        self, tmp_path
    ):
        """Even if nothing was pruned, so that all settings are the same."""
        budget = kld.RankBudget(2, initial_rank=2, total_steps=4)
        model = adapted_mlp(rank_budget=budget)
        model.add_adapter("open", rank_budget=budget)
        model.set_adapter("open")
        assert model.rank_allocator.is_open
        model.set_adapter("default")
        model.save_adapters(tmp_path)
        model.compact_ranks()
        for name in ("open", "default", "open", "default"):
            model.set_adapter(name)
            assert model.rank_allocator.is_open == (name == "open")
            variables = [v.name for v in model.weights if "rank_" in v.name]
            assert len(variables) == (5 if name == "open" else 0)
        model.load_adapters(tmp_path)
        assert model.rank_allocator.is_open

    def test_an_adapter_from_a_file(self, tmp_path):
        model = adapted_mlp(rank=2)
        x, _ = classification_data()
        expected = model.predict(x, verbose=0)
        model.save_adapters(tmp_path)
        other = adapted_mlp(rank=5, dropout_rate=0.1)
        other.add_adapter("stored", path=tmp_path)
        other.set_adapter("stored")
        assert_close(other.predict(x, verbose=0), expected, 1e-7)
        with pytest.raises(ValueError, match="settings of its own"):
            other.add_adapter("more", path=tmp_path, rank=3)

    def test_the_ensemble_uses_the_active_one(self):
        model = adapted_mlp()
        x, y = classification_data()
        first = model.ensemble_predict(x, seed=1, verbose=0)
        loss = model.ensemble_evaluate(x, y, seed=1, verbose=0)
        model.add_adapter("other", dropout_rate=0.9)
        model.set_adapter("other")
        randomize(model, seed=9)
        second = model.ensemble_predict(x, seed=1, verbose=0)
        assert np.abs(first - second).max() > 1e-3
        instances = [
            instance.predict(x, verbose=0)
            for instance in model.merge_instances(seed=1)
        ]
        assert_close(second, np.mean(instances, axis=0), 1e-6)
        assert model.ensemble_evaluate(x, y, seed=1, verbose=0) != loss
        model.set_adapter("default")
        np.testing.assert_array_equal(
            model.ensemble_predict(x, seed=1, verbose=0), first
        )

    def test_names_are_checked(self):
        model = adapted_mlp()
        model.add_adapter("other")
        for call, part in (
            (lambda: model.add_adapter("other"), "already has"),
            (lambda: model.add_adapter("default"), "already has"),
            (lambda: model.add_adapter(""), "at least one character"),
            (lambda: model.add_adapter(3), "string"),
            (lambda: model.add_adapter("x", rank=0), "positive integer"),
            (lambda: model.add_adapter("x", rank=99), "at most 6"),
            (lambda: model.add_adapter("x", dropout_rate=1.0), r"\[0, 1\)"),
            (lambda: model.set_adapter("third"), r"\['default', 'other'\]"),
            (lambda: model.delete_adapter("third"), "no such adapter"),
            (lambda: model.delete_adapter("default"), "active"),
        ):
            with pytest.raises(ValueError, match=part):
                call()
        assert model.adapter_names == ["default", "other"]
        model.delete_adapter("other")
        assert model.adapter_names == ["default"]

    def test_a_task(self, tmp_path):
        model = kld.enable_lora_dropout(families.bert(), rank=2, seed=0)
        randomize(model)
        expected = model.predict(families.TEXTS, verbose=0)
        model.save_adapters(tmp_path)
        randomize(model, seed=4)
        model.load_adapters(tmp_path)
        assert_close(model.predict(families.TEXTS, verbose=0), expected, 1e-7)
        paths = {name.split("/", 1)[0] for name in tensors_of(tmp_path)}
        assert paths == {"adapters", "head"}


def tensors_of(folder):
    return read_adapter_files(folder)[1]


def base_output(model, x):
    with model.disable_adapters():
        return model.predict(x, verbose=0)
