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


def test_a_task(tmp_path):
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
