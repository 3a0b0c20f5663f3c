"""The files of saved adapters: what goes in comes out, or an error says why."""

import hashlib
import json
import os
import pathlib
import tempfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from stored_adapters import SETTINGS
from stored_adapters import TENSORS
from stored_adapters import assert_read
from stored_adapters import names_in

from keras_lora_dropout.storage import adapter_files
from keras_lora_dropout.storage import manifest
from keras_lora_dropout.storage.adapter_files import read_adapter_files
from keras_lora_dropout.storage.adapter_files import write_adapter_files

DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("int64", "uint64", "float16", "float32", "float64"),
]


@pytest.fixture
def saved(tmp_path):
    """A directory with saved adapters."""
    write_adapter_files(tmp_path / "adapters", SETTINGS, TENSORS)
    return tmp_path / "adapters"


def data_file(directory):
    return next(directory.glob("adapters-*.safetensors"))


def forge(directory, **changes):
    """Change fields of the JSON, and make its checksum right again."""
    path = directory / "adapters.json"
    fields = {**json.loads(path.read_text()), **changes}
    fields["checksum"] = manifest.checksum(fields)
    path.write_text(json.dumps(fields))


def forge_data(directory, data):
    """Change the data, and make sizes and checksums right again."""
    data_file(directory).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    forge(directory, size=len(data), sha256=digest)


# What comes out.


def test_settings_and_tensors_come_back(saved):
    assert_read(saved, SETTINGS, TENSORS)


def test_two_files_are_written(saved):
    digest = hashlib.sha256(data_file(saved).read_bytes()).hexdigest()
    data_name = f"adapters-{digest[:16]}.safetensors"
    assert names_in(saved) == [data_name, "adapters.json"]
    fields = json.loads((saved / "adapters.json").read_text("utf-8"))
    assert fields["format"] == "keras_lora_dropout.adapters"
    assert fields["version"] == 1
    assert fields["file"] == data_name
    assert fields["sha256"] == digest


def test_the_data_is_a_plain_safetensors_file(tmp_path):
    write_adapter_files(tmp_path, {}, {"x": np.arange(3.0)})
    found = safetensors.numpy.load_file(data_file(tmp_path))
    np.testing.assert_array_equal(found["x"], np.arange(3.0))


numbers = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)
).filter(lambda value: value not in (float("inf"), -float("inf")))
json_values = st.recursive(
    st.one_of(numbers, st.text(st.characters(exclude_categories=["Cs"]))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)
shapes = st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
arrays = st.one_of(
    st.sampled_from(DTYPES).flatmap(lambda d: st_numpy.arrays(d, shapes)),
    st_numpy.arrays("uint16", shapes).map(
        lambda bits: bits.view(ml_dtypes.bfloat16)
    ),
)
tensor_names = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda name: name != "__metadata__"
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(
    st.dictionaries(tensor_names, json_values, max_size=3),
    st.dictionaries(tensor_names, arrays, max_size=3),
)
def test_anything_that_can_be_stored_comes_back(settings, tensors):
    with tempfile.TemporaryDirectory() as directory:
        write_adapter_files(directory, settings, tensors)
        assert_read(directory, settings, tensors)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::2],
        np.arange(12.0).reshape(3, 4)[:, 1:3],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
    ],
)
def test_any_memory_layout_can_be_stored(tmp_path, array):
    write_adapter_files(tmp_path, {}, {"x": array})
    found = read_adapter_files(tmp_path)[1]["x"]
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable
    assert found.flags.c_contiguous


def test_tuples_come_back_as_lists_and_keys_as_strings(tmp_path):
    write_adapter_files(tmp_path, {"shape": (2, 3), "ranks": {1: 2}}, {})
    expected = {"shape": [2, 3], "ranks": {"1": 2}}
    assert read_adapter_files(tmp_path) == (expected, {})


def test_a_save_replaces_an_earlier_one(saved):
    stray = saved / f".{data_file(saved).name}.0123.tmp"
    stray.write_bytes(b"half")
    (saved / "notes.txt").write_text("mine")
    write_adapter_files(saved, {"rank": 3}, {"x": np.ones(2)})
    assert_read(saved, {"rank": 3}, {"x": np.ones(2)})
    assert names_in(saved) == [
        data_file(saved).name,
        "adapters.json",
        "notes.txt",
    ]


def test_same_tensors_with_other_settings(saved):
    write_adapter_files(saved, {"rank": 3}, TENSORS)
    assert_read(saved, {"rank": 3}, TENSORS)


def test_missing_parents_are_made(tmp_path):
    write_adapter_files(tmp_path / "a" / "b", SETTINGS, TENSORS)
    assert_read(tmp_path / "a" / "b", SETTINGS, TENSORS)


# What cannot be stored.


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"x": {1, 2}}, {}, "set is not JSON.*Use dictionaries"),
        ({"x": float("nan")}, {}, "not JSON compliant.*finite numbers"),
        ({1: 0, "1": 0}, {}, "stored as JSON.*string keys"),
        ({"x": "\ud800"}, {}, "surrogates.*valid Unicode"),
        ({}, {"x": np.ones(2, complex)}, "'x' has dtype complex128.*float32"),
        ({}, {"x": np.array([None])}, "'x' has dtype object.*Cast"),
        ({}, {"__metadata__": np.ones(2)}, "__metadata__.*Rename"),
        ({}, {"\ud800": np.ones(2)}, "valid Unicode.*Rename"),
        ({}, {3: np.ones(2)}, "strings.*Received: 3"),
    ],
)
def test_what_cannot_be_stored(saved, settings, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_adapter_files(saved, settings, tensors)
    assert_read(saved, SETTINGS, TENSORS)


def test_settings_too_large_to_be_read_again(saved, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 2000)
    with pytest.raises(ValueError, match=r"at most 2,000 can be.*as tensors"):
        write_adapter_files(saved, {"x": "a" * 2000}, {})
    assert_read(saved, SETTINGS, TENSORS)


def test_a_file_where_the_directory_should_be(tmp_path):
    path = tmp_path / "adapters"
    path.write_text("a file")
    with pytest.raises(ValueError, match=r"adapters is a file.*directory"):
        write_adapter_files(path, SETTINGS, TENSORS)
    with pytest.raises(ValueError, match=r"is a file.*adapters.json"):
        read_adapter_files(path)


# What is missing or damaged.


def test_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory.*nowhere"):
        read_adapter_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no adapters.json.*has: adap"):
        read_adapter_files(tmp_path)
    data_file(saved).unlink()
    with pytest.raises(FileNotFoundError, match="Copy the whole directory"):
        read_adapter_files(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "UTF-8.*can't decode"),
        (b"[1, 2", "not valid JSON"),
        (b"[]", '"format" is not "keras_lora_dropout.adapters"'),
        (b'{"format": "other"}', '"format" is not'),
        (b'{"format": 1, "format": 2}', "'format' stands there twice"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_json_that_is_none_or_another(saved, text, message):
    (saved / "adapters.json").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter_files(saved)
    assert "adapters.json" in str(caught.value)
    assert "copy it again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2.*up to version 1; upgrade the package"),
        ({"version": 0}, "positive integer, but is 0"),
        ({"version": "1"}, "positive integer, but is '1'"),
        ({"version": True}, "positive integer, but is True"),
        ({"version": 1.0}, "positive integer, but is 1.0"),
        ({"version": None}, "positive integer, but is None"),
        ({"settings": []}, '"settings" must be of type dict, but is'),
        ({"tensors": 1}, '"tensors" must be of type dict, but is 1'),
        ({"size": True}, '"size" must be of type int, but is True'),
        ({"sha256": None}, '"sha256" must be of type str, but is None'),
        ({"file": ["x"]}, '"file" must be of type str, but is'),
        ({"size": 3}, "it has .* bytes, but adapters.json says 3"),
        ({"size": -1}, "it has .* bytes, but adapters.json says -1"),
        ({"sha256": "0" * 64}, "SHA-256 is not the one in adapters.json"),
        ({"tensors": {}}, "tensors are not those in.*not expected"),
        ({"tensors": {"x": 1}}, r"\['x'\] missing"),
        (
            {"tensors": {name: {"shape": [1]} for name in TENSORS}},
            "tensor 'block/query/.*but .*'shape': .1.",
        ),
    ],
)
def test_a_checksum_does_not_excuse_the_rest(saved, changes, message):
    forge(saved, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter_files(saved)


@pytest.mark.parametrize(
    "name",
    [
        "../{}",
        "../secret.safetensors",
        "folder/{}",
        "folder\\{}",
        "..\\{}",
        "/{}",
        "{parent}/{}",
        "C:{}",
        "C:\\{}",
        "{}\0",
        "{}\n",
        "./{}",
        "..",
        "",
        "adapters.json",
        "adapters-0123456789ABCDEF.safetensors",
    ],
)
def test_the_tensors_lie_in_the_same_directory(saved, name):
    data = data_file(saved)
    outside = saved.parent / data.name
    outside.write_bytes(data.read_bytes())
    (saved.parent / "secret.safetensors").write_bytes(data.read_bytes())
    forge(saved, file=name.format(data.name, parent=saved.parent))
    with pytest.raises(ValueError, match=r'"file" must be.*without a folder'):
        read_adapter_files(saved)


def test_a_changed_setting_does_not_match_the_checksum(saved):
    path = saved / "adapters.json"
    path.write_text(path.read_text().replace('"rank": 2', '"rank": 3'))
    with pytest.raises(ValueError, match="checksum differs from its content"):
        read_adapter_files(saved)


def test_a_number_that_overflows(saved):
    path = saved / "adapters.json"
    path.write_text(path.read_text().replace('"rank": 2', '"rank": 1e999'))
    with pytest.raises(ValueError, match="not valid JSON"):
        read_adapter_files(saved)


def test_sizes_are_limited_before_anything_is_parsed(saved, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    monkeypatch.setattr(manifest, "decode", None)
    with pytest.raises(ValueError, match="bytes, and at most 100 are read"):
        read_adapter_files(saved)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((2**63).to_bytes(8, "little"), "claims 9,223,372.*at most 92"),
        ((93).to_bytes(8, "little"), "claims 93 bytes, and at most 92"),
        (b"", "at most 0 are possible"),
        (b"\1", "claims 1 bytes, and at most 0"),
        ((2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        ((100).to_bytes(8, "little") + b"[" * 100, "no safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "no safetensors file|not those in"),
    ],
)
def test_headers_that_lie(saved, header, message):
    body = b" " * 92 if len(header) == 8 else b""
    forge_data(saved, header + body)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter_files(saved)
    assert data_file(saved).name in str(caught.value)


def test_headers_are_limited_whatever_the_file(saved, monkeypatch):
    monkeypatch.setattr(adapter_files, "MAX_HEADER_BYTES", 20)
    monkeypatch.setattr(safetensors, "deserialize", None)
    with pytest.raises(ValueError, match="at most 20 are possible"):
        read_adapter_files(saved)


def test_a_tensor_of_a_dtype_that_is_not_known(saved):
    info = {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}
    header = json.dumps({"x": info}).encode()
    forge_data(saved, len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(ValueError, match=r"no safetensors file"):
        read_adapter_files(saved)


def test_what_is_no_regular_file(saved):
    data_file(saved).unlink()
    name = json.loads((saved / "adapters.json").read_text())["file"]
    os.mkfifo(saved / name)
    with pytest.raises(ValueError, match="not a regular file"):
        read_adapter_files(saved)


# Damage of any kind.


def damaged(draw, content):
    """Flip, cut, append or reorder bytes."""
    kind = draw(st.sampled_from(["flip", "truncate", "append", "swap"]))
    place = st.integers(0, max(len(content) - 1, 0))
    if kind == "truncate":
        return content[: draw(place)]
    if kind == "append":
        return content + draw(st.binary(min_size=1, max_size=20))
    if kind == "swap":
        cuts = sorted(draw(st.lists(place, min_size=4, max_size=4)))
        a, b, c, d = cuts
        return (
            content[:a]
            + content[c:d]
            + content[b:c]
            + content[a:b]
            + content[d:]
        )
    changed = bytearray(content)
    for position in draw(st.lists(place, min_size=1, max_size=4)):
        changed[position] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The files of saved adapters, by name."""
    directory = tmp_path_factory.mktemp("original")
    write_adapter_files(directory, SETTINGS, TENSORS)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@hypothesis.settings(deadline=None, max_examples=500)
@hypothesis.given(data=st.data())
def test_damage_is_found_or_harmless(originals, data):
    victims = st.sets(st.sampled_from(sorted(originals)), min_size=1)
    victims = data.draw(victims)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        for name, content in originals.items():
            if name in victims:
                content = damaged(data.draw, content)
            (directory / name).write_bytes(content)
        try:
            read_adapter_files(directory)
        except (ValueError, FileNotFoundError) as error:
            assert str(directory) in str(error)
        else:
            assert_read(directory, SETTINGS, TENSORS)
