"""Whatever is in an adapter's files, it is read rightly or refused."""

import functools
import hashlib
import json
import pathlib

import fuzzed_files
import fuzzing
import numpy as np
import pytest
import safetensors.numpy
from helpers import adapted_mlp
from helpers import randomize
from hypothesis import given
from hypothesis import strategies as st

import keras_lora_dropout as kld
from keras_lora_dropout.conversion import adapter_state
from keras_lora_dropout.storage import manifest
from keras_lora_dropout.storage.adapter_files import read_adapter_files
from keras_lora_dropout.storage.adapter_files import write_adapter_files

pytestmark = fuzzing.ONE_BACKEND


def compact():
    model = adapted_mlp(rank_budget=kld.RankBudget(1))
    model.compact_ranks()
    return model


KINDS = {
    "lora": adapted_mlp,
    "dora": functools.partial(adapted_mlp, use_dora=True),
    "pissa": functools.partial(adapted_mlp, init_lora_weights="pissa"),
    "adalora": functools.partial(adapted_mlp, rank_budget=kld.RankBudget(1)),
    "compact": compact,
}
# How the JSON of a field reads; anything else is no such field.
TYPES = {
    "kind": (str,),
    "rank": (int,),
    "alpha": (int, float),
    "dropout_rate": (int, float),
    "rescale": (bool,),
    "seed": (int, type(None)),
}


class Reader:
    """A model that reads changed files of its adapter, again and again."""

    def __init__(self, kind, folder):
        self.build, self.folder = KINDS[kind], folder
        self.works = self.refused = 0
        self.renew()
        self.model.save_adapters(folder)
        self.settings, self.tensors = read_adapter_files(folder)
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.renew()

    def renew(self):
        self.model = randomize(self.build(), seed=9)
        self.before = fuzzing.state_of(self.model)

    def restore(self):
        for path in self.folder.iterdir():
            path.unlink()
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def read(self, add=False):
        """Load the files: it works, or nothing changes, and it says why."""
        try:
            if add:
                self.model.add_adapter("added", path=self.folder)
            else:
                self.model.load_adapters(self.folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(self.folder) in str(error)
            self.refused += 1
            after = fuzzing.state_of(self.model)
            fuzzing.assert_same_state(after, self.before)
        else:
            self.works += 1
            if add:
                self.model.set_adapter("added")
            self._check()
            self.renew()

    def _check(self):
        """The model has what is written in the files, and works."""
        settings, tensors = read_adapter_files(self.folder)
        for path, layer in self.model.adapted_layers:
            written = settings["layers"][path]
            for name, types in TYPES.items():
                assert type(written[name]) in types, name
            found = adapter_state.layer_settings(layer)
            assert found == {name: written[name] for name in found}
            for name, weight in layer.adapter_weights.items():
                expected = tensors[f"adapters/{path}/{name}"]
                value = adapter_state.array_of(weight)
                np.testing.assert_array_equal(value, expected)
        self.model(np.ones((2, 6), "float32"), training=True)
        self.model.rank_pattern()
        self.model.save_adapters(self.folder / "again")
        _, again = read_adapter_files(self.folder / "again")
        for path in (self.folder / "again").iterdir():
            path.unlink()
        (self.folder / "again").rmdir()
        for name, value in tensors.items():
            np.testing.assert_array_equal(again[name], value)


@pytest.fixture(params=KINDS)
def reader(request, tmp_path, fuzzed_cases):
    reader = Reader(request.param, tmp_path / "adapter")
    yield reader
    fuzzed_cases.update(works=reader.works, refused=reader.refused)


def test_any_field_of_the_settings(reader):
    @fuzzing.cases(60)
    @given(st.data())
    def change(data):
        settings = fuzzed_files.changed_json(data.draw, reader.settings)
        reader.restore()
        try:
            write_adapter_files(reader.folder, settings, reader.tensors)
        except ValueError:  # Nothing that JSON can hold.
            return
        reader.read(add=data.draw(st.booleans()))

    change()
    assert reader.works
    assert reader.refused


def test_any_tensor(reader):
    @fuzzing.cases(40)
    @given(st.data())
    def change(data):
        tensors = fuzzed_files.changed_tensors(data.draw, reader.tensors)
        reader.restore()
        try:
            write_adapter_files(reader.folder, reader.settings, tensors)
        except ValueError:  # No name that can be stored.
            return
        reader.read(add=data.draw(st.booleans()))

    change()
    assert reader.works
    assert reader.refused


@pytest.fixture
def lora(tmp_path, fuzzed_cases):
    reader = Reader("lora", tmp_path / "adapter")
    yield reader
    fuzzed_cases.update(works=reader.works, refused=reader.refused)


def json_path(reader):
    return reader.folder / "adapters.json"


def test_any_field_of_the_manifest(lora):
    @fuzzing.cases(100)
    @given(st.data())
    def change(data):
        fields = json.loads(lora.files["adapters.json"])
        changed = fuzzed_files.changed_json(data.draw, fields)
        lora.restore()
        if changed.get("checksum") == fields["checksum"]:
            try:
                changed["checksum"] = manifest.checksum(changed)
            except ValueError:
                return
        json_path(lora).write_text(json.dumps(changed))
        lora.read()

    change()
    assert lora.refused


def test_any_text_in_the_manifest(lora):
    @fuzzing.cases(40)
    @given(st.data())
    def change(data):
        fields = json.loads(lora.files["adapters.json"])
        lora.restore()
        text = fuzzed_files.changed_text(data.draw, fields)
        json_path(lora).write_text(text)
        lora.read()

    change()
    assert lora.refused
    assert not lora.works


@pytest.mark.parametrize("forged", [False, True])
def test_any_bytes(lora, forged):
    @fuzzing.cases(60)
    @given(st.data())
    def change(data):
        name = data.draw(st.sampled_from(sorted(lora.files)))
        content = fuzzed_files.changed_bytes(data.draw, lora.files[name])
        lora.restore()
        (lora.folder / name).write_bytes(content)
        if forged and name != "adapters.json":
            fields = json.loads(lora.files["adapters.json"])
            fields["size"] = len(content)
            fields["sha256"] = hashlib.sha256(content).hexdigest()
            fields["checksum"] = manifest.checksum(fields)
            json_path(lora).write_text(json.dumps(fields))
        lora.read()

    change()
    assert lora.refused


def test_a_forged_header(lora):
    """Names, shapes, dtypes and offsets that are not those of the data."""

    @fuzzing.cases(60)
    @given(st.data())
    def change(data):
        (name,) = (n for n in lora.files if n != "adapters.json")
        content = lora.files[name]
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = fuzzed_files.changed_json(data.draw, header)
        encoded = json.dumps(header).encode()
        content = len(encoded).to_bytes(8, "little") + encoded
        content += lora.files[name][8 + length :]
        fields = json.loads(lora.files["adapters.json"])
        fields["size"] = len(content)
        fields["sha256"] = hashlib.sha256(content).hexdigest()
        fields["checksum"] = manifest.checksum(fields)
        lora.restore()
        (lora.folder / name).write_bytes(content)
        json_path(lora).write_text(json.dumps(fields))
        lora.read()

    change()
    assert lora.refused


def test_the_unchanged_files_are_read(reader):
    reader.read()
    assert reader.works == 1
    (data,) = pathlib.Path(reader.folder).glob("*.safetensors")
    assert set(safetensors.numpy.load_file(data)) == set(reader.tensors)
