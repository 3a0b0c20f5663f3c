"""The demo's data set: sizes, no text in two parts, the same each time."""

import collections
import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[1] / "examples" / "docstrings.py"
SIZES = {"train": 20, "validation": 20, "held-out": 80}


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(docstrings):
    return docstrings.load(SIZES)


@pytest.fixture
def library(tmp_path):
    """A standard library of two packages with the texts given."""

    def write(**packages):
        for name, texts in packages.items():
            (tmp_path / name).mkdir()
            functions = [
                f"def f{number}():\n    {text!r}\n"
                for number, text in enumerate(texts)
            ]
            (tmp_path / name / "code.py").write_text("\n".join(functions))
        return tmp_path

    return write


def test_parts_are_balanced(docstrings, data):
    assert list(data) == list(SIZES)
    for part, (texts, labels) in data.items():
        classes = range(len(docstrings.PACKAGES))
        expected = dict.fromkeys(classes, SIZES[part])
        assert collections.Counter(labels) == expected
        assert len(texts) == len(labels)
        # Shuffled: the first batch does not hold a single class.
        assert len(set(labels[:8])) > 2


def test_texts_are_short_paragraphs(data):
    for texts, _ in data.values():
        for text in texts:
            assert len(text.split()) >= 5
            assert "\n" not in text


def test_no_text_is_in_two_parts_or_classes(data):
    letters = [
        "".join(filter(str.isalnum, text.lower()))
        for texts, _ in data.values()
        for text in texts
    ]
    assert len(set(letters)) == len(letters) == 8 * 120


def test_same_seed_same_data(docstrings, data):
    assert docstrings.load(SIZES) == data
    other = docstrings.load(SIZES, seed=1)
    assert set(other["held-out"][0]) != set(data["held-out"][0])


def test_labels_name_the_package(docstrings, library):
    folder = library(
        first=["One two three four five.", "Too short, this."],
        second=["Five four three two one.\n\nMore text."],
    )
    data = docstrings.load(
        {"all": 1}, packages=("first", "second"), library=folder
    )
    assert dict(zip(*data["all"], strict=True)) == {
        "One two three four five.": 0,
        "Five four three two one.": 1,
    }


def test_duplicates_are_left_out(docstrings, library):
    folder = library(
        first=["In both of the two packages.", "a b c d e", "A b C, d e!"],
        second=["in BOTH of the two\npackages", "f g h i j"],
    )
    data = docstrings.load(
        {"all": 1}, packages=("first", "second"), library=folder
    )
    assert sorted(data["all"][0]) == ["a b c d e", "f g h i j"]


def test_too_few_and_missing_are_told(docstrings, library):
    folder = library(first=["One two three four five."])
    with pytest.raises(ValueError, match="has 1 different docstrings"):
        docstrings.load({"all": 2}, packages=("first",), library=folder)
    with pytest.raises(FileNotFoundError, match='sources of the package "tk"'):
        docstrings.load({"all": 1}, packages=("first", "tk"), library=folder)
