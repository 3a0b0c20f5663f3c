"""Rows of GLUE and SQuAD: both sources, and whatever is wrong with a row."""

import collections
import contextlib
import copy
import gzip
import importlib.util
import itertools
import json
import logging
import math
import pathlib
import sys

import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from real_data import REAL

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "paper")
)

from data import find_file
from data import load_rows
from data import sample
from rows import DATASETS

ROOT = pathlib.Path(__file__).parents[1]
# TFDS has ArrayRecord on Linux alone.
FORMATS = ["tfrecord"]
if importlib.util.find_spec("array_record"):
    FORMATS.append("array_record")


def in_tfds(dataset):
    return DATASETS[dataset].in_tfds


def answers(*pairs):
    return {
        "text": [text for text, _ in pairs],
        "answer_start": [start for _, start in pairs],
    }


def numbered(rows):
    return [{**row, "idx": 3 * number} for number, row in enumerate(rows)]


PAIRS = numbered(
    {"sentence1": one, "sentence2": two, "label": label}
    for one, two, label in [
        ('He said : " no " .', "He said no .", 1),
        ("Zoë's café 😀", "A line\nand\u2028another\x85one", 0),
        ("Shares rose 3 % .", "Shares fell 3 % .", 0),
        ("It rains .", "Rain falls .", 1),
        ("Two of them .", "Both .", 1),
        (r"Back\slash \u00e9", "Tab\there", 0),
        ("The last one .", "The last one . ", 1),
    ]
)
# TFDS would mix shards of more than 16 rows.
SHARD = 17
MANY = numbered(PAIRS * 6)
SCORED = [
    {**row, "label": score}
    for row, score in zip(
        PAIRS, [5.0, 3.8, 0.0, 2.571, 0.2, 1.333, 4.75], strict=True
    )
]
INFERENCES = numbered(
    {"premise": f"Premise {label}", "hypothesis": "So be it.", "label": label}
    for label in [0, 2, 1, 1]
)
QUESTIONS = [
    {
        "id": "56be",
        "title": "Café_culture",
        "context": "😀 Zoë opened a café in 1901; the café burned.",
        "question": "What burned?",
        "answers": answers(("the café", 29), ("café", 33)),
    },
    {
        "id": "56bf",
        "title": "Café_culture",
        "context": "A \u2028 line.\nIt was 1902.",
        "question": "When?",
        "answers": answers(("1902", 17)),
    },
]
UNANSWERED = [
    {**QUESTIONS[0], "is_impossible": False},
    {**QUESTIONS[1], "is_impossible": True, "answers": answers()},
]


def read_file(dataset, split, count=None):
    """The first rows of a real file, read without the code under test."""
    path = REAL / dataset / f"{split}.jsonl.gz"
    if not path.exists():
        return None
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


WRITTEN = {
    ("glue/mrpc", "train"): PAIRS,
    ("glue/mrpc", "validation"): MANY,
    ("glue/stsb", "train"): SCORED,
    ("glue/mnli", "validation_matched"): INFERENCES,
    ("glue/mnli", "validation_mismatched"): INFERENCES[::-1],
    ("squad/v1.1", "train"): QUESTIONS,
    ("squad/v1.1", "validation"): QUESTIONS[::-1],
    ("squad/v2.0", "validation"): UNANSWERED,
}
SPLITS = {
    **WRITTEN,
    ("glue/mrpc", "train"): read_file("glue/mrpc", "train", 50) or PAIRS,
    ("squad/v1.1", "train"): (
        read_file("squad/v1.1", "train_part", 50) or QUESTIONS
    ),
}


def write(folder, dataset, name, rows):
    """Write rows as JSON Lines, or bytes as they are."""
    path = folder / dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(rows, bytes):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        rows = "".join(lines).encode()
        rows = gzip.compress(rows) if name.endswith(".gz") else rows
    path.write_bytes(rows)
    return path


def prepare(folder, dataset, splits, file_format="tfrecord"):
    """Prepare a data set with TFDS's own features, where TFDS finds it."""
    builder = tfds.builder(dataset, data_dir=folder, file_format=file_format)
    builder.data_path.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(
        builder.info, max_examples_per_shard=SHARD, file_format=file_format
    )
    writer.initialize_splits(list(splits))
    if dataset == "squad/v2.0":
        plausible = {"plausible_answers": answers(("nobody reads it", 0))}
        splits = {
            split: [row | plausible for row in rows]
            for split, rows in splits.items()
        }
    writer.add_examples(splits)
    writer.close_all()
    return builder.data_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of TFDS for each file format, with all of `SPLITS`."""
    folders = {}
    for file_format in FORMATS:
        folders[file_format] = tmp_path_factory.mktemp(file_format)
        for dataset in {dataset for dataset, _ in SPLITS}:
            splits = {
                s: rows for (d, s), rows in SPLITS.items() if d == dataset
            }
            prepare(folders[file_format], dataset, splits, file_format)
    return folders


def exactly(rows):
    """As JSON, for which True, 1 and 1.0 differ, and NumPy's 1 is none."""
    return [json.dumps(row, sort_keys=True) for row in rows]


@contextlib.contextmanager
def told(kind, *parts):
    with pytest.raises(kind) as caught:
        yield
    for part in parts:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dataset, split", SPLITS)
def test_both_sources_give_the_same_rows(
    dataset, split, file_format, prepared, tmp_path
):
    expected = exactly(SPLITS[dataset, split])
    ours = load_rows(dataset, split, tfds_dir=prepared[file_format])
    assert exactly(ours) == expected
    write(tmp_path, dataset, f"{split}.jsonl", SPLITS[dataset, split])
    assert exactly(load_rows(dataset, split, tmp_path)) == expected


@pytest.mark.parametrize("dataset", [d for d in DATASETS if not in_tfds(d)])
def test_what_tfds_does_not_have_comes_from_files(dataset):
    assert dataset not in tfds.list_builders(with_community_datasets=False)
    with pytest.raises(ValueError, match=f"TFDS does not have {dataset}"):
        load_rows(dataset, DATASETS[dataset].splits[0])


@pytest.mark.parametrize("dataset", list(filter(in_tfds, DATASETS)))
def test_fields_and_classes_are_those_of_tfds(dataset, tmp_path):
    features = tfds.builder(dataset, data_dir=tmp_path).info.features
    about = DATASETS[dataset]
    assert set(about.fields) == set(features) - {"plausible_answers"}
    dtypes = {
        "text": "string",
        "count": "int32",
        "flag": "bool",
        "label": "int64",
        "score": "float32",
    }
    for name, kind in about.fields.items():
        if kind == "answers":
            assert set(features[name].feature) == {"text", "answer_start"}
        else:
            assert features[name].tf_dtype.name == dtypes[kind]
    names = features["label"].names if about.classes else []
    assert list(about.classes) == names


def test_files_as_they_are_published(tmp_path, caplog):
    folder = REAL
    files = {
        ("glue/mrpc", "train"): "train.jsonl.gz",
        ("squad/v1.1", "train"): "train_part.jsonl.gz",
    }
    if not all((REAL / d / name).exists() for (d, _), name in files.items()):
        folder = tmp_path
        for key, name in files.items():
            write(folder, key[0], name, SPLITS[key])
    for (dataset, split), name in files.items():
        with gzip.open(folder / dataset / name, "rt", newline="\n") as file:
            expected = exactly(map(json.loads, file))
        caplog.clear()
        assert exactly(load_rows(dataset, split, folder)) == expected
        assert ("holds a part of the split" in caplog.text) == ("_part" in name)
        assert find_file(dataset, split, folder).name == name


def test_whole_file_goes_before_part(tmp_path, caplog):
    names = ["_part.jsonl.gz", "_part.jsonl", ".jsonl.gz", ".jsonl"]
    for name in names:
        write(tmp_path, "glue/mrpc", f"train{name}", PAIRS)
        assert find_file("glue/mrpc", "train", tmp_path).name == f"train{name}"
    load_rows("glue/mrpc", "train", tmp_path)
    assert not caplog.records


def test_other_fields_are_left_out(tmp_path):
    write(tmp_path, "glue/mrpc", "train.jsonl", [{**PAIRS[0], "more": 1}])
    assert load_rows("glue/mrpc", "train", tmp_path) == PAIRS[:1]


def test_scores_are_decimals_again(tmp_path):
    rows = [{**SCORED[0], "label": score} for score in (3.799999952316284, 4)]
    write(tmp_path, "glue/stsb", "train.jsonl", rows)
    read = load_rows("glue/stsb", "train", tmp_path)
    assert [repr(row["label"]) for row in read] == ["3.8", "4.0"]


def test_empty_text_is_told_not_refused(tmp_path, caplog):
    rows = [PAIRS[0], PAIRS[1] | {"sentence2": ""}, PAIRS[2]]
    rows += [PAIRS[3] | {"sentence1": " \t"}]
    path = write(tmp_path, "glue/mrpc", "train.jsonl", rows)
    assert load_rows("glue/mrpc", "train", tmp_path) == rows
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"empty text: 2. {path}, line 2" in record.getMessage()


@pytest.mark.parametrize(
    "dataset, changes, message",
    [
        (
            "glue/mrpc",
            {"sentence1": None},
            'field "sentence1" is None. It must',
        ),
        ("glue/mrpc", {"sentence1": 5}, "is 5 (int). It must be a string"),
        (
            "glue/mrpc",
            {"sentence2": ["a"]},
            "is ['a'] (list). It must be a str",
        ),
        (
            "glue/mrpc",
            {"sentence1": "\ud800"},
            "holds text that is not Unicode",
        ),
        (
            "glue/mrpc",
            {"label": "1"},
            "is '1' (str). It must be one of the int",
        ),
        ("glue/mrpc", {"label": True}, "is True (bool). It must be one of"),
        ("glue/mrpc", {"label": 1.0}, "is 1.0 (float). It must be one of"),
        (
            "glue/mrpc",
            {"label": None},
            "is None. It must be one of the integers",
        ),
        ("glue/mrpc", {"label": math.nan}, "is nan. It must be one of"),
        ("glue/mrpc", {"label": 2}, "0 (not_equivalent), 1 (equivalent)"),
        ("glue/mrpc", {"label": -2}, "is -2 (int). It must be one of"),
        ("glue/mrpc", {"label": -1}, "a hidden label: GLUE does not publish"),
        (
            "glue/mrpc",
            {"idx": -1},
            'field "idx" is -1 (int). It must be an int',
        ),
        ("glue/mrpc", {"idx": False}, "is False (bool). It must be an integer"),
        ("glue/mnli", {"label": 3}, "0 (entailment), 1 (neutral), 2 (contra"),
        (
            "glue/stsb",
            {"label": math.nan},
            "is nan. It must be a number from 0.0",
        ),
        (
            "glue/stsb",
            {"label": math.inf},
            "is inf (float). It must be a number",
        ),
        (
            "glue/stsb",
            {"label": 5.1},
            "is 5.1 (float). It must be a number from",
        ),
        ("glue/stsb", {"label": -0.1}, "a number from 0.0 to 5.0: give it uns"),
        (
            "glue/stsb",
            {"label": -1.0},
            "is -1, which stands for a hidden label",
        ),
        ("glue/stsb", {"label": "3.8"}, "is '3.8' (str). It must be a number"),
        ("glue/stsb", {"label": True}, "is True (bool). It must be a number"),
        ("glue/stsb", {"label": None}, "is None. It must be a number"),
        ("squad/v1.1", {"id": 7}, 'field "id" is 7 (int). It must be a string'),
        (
            "squad/v1.1",
            {"answers": None},
            "is None. It must be an object of two",
        ),
        (
            "squad/v1.1",
            {"answers": []},
            "is [] (list). It must be an object of",
        ),
        ("squad/v1.1", {"answers": {"text": []}}, '"answer_start": [0]}'),
        (
            "squad/v1.1",
            {"answers": {"text": "Zoë", "answer_start": [2]}},
            "an object of two lists",
        ),
        (
            "squad/v1.1",
            {"answers": answers()},
            "has no answers. It must have one",
        ),
        ("squad/v1.1", {"answers": answers()}, "are those of squad/v2.0"),
        (
            "squad/v1.1",
            {"answers": {"text": ["Zoë"], "answer_start": [2, 2]}},
            "has 1 in its list text, but 2 in answer_start",
        ),
        ("squad/v1.1", {"answers": answers((1, 2))}, "has text[0], which is 1"),
        (
            "squad/v1.1",
            {"answers": answers(("Zoë", 2), ("Zoë", "2"))},
            "has answer_start[1], which is '2' (str). It must be an integer",
        ),
        (
            "squad/v1.1",
            {"answers": answers(("burned.", -7))},
            "which is -7 (int). It must be an integer >= 0",
        ),
        (
            "squad/v1.1",
            # The offset in bytes of UTF-8, a common mistake.
            {"answers": answers(("Zoë", 2), ("1901", 28))},
            "has answer 1, '1901' (str), which does not stand at its "
            "answer_start 28: there the context has",
        ),
        ("squad/v1.1", {"answers": answers(("Zoë", 3))}, "It stands at 2; off"),
        (
            "squad/v1.1",
            {"answers": answers(("Zoé", 2))},
            "context does not hold",
        ),
        ("squad/v1.1", {"answers": answers(("", 2))}, "has answer 0, '' (str)"),
        ("squad/v1.1", {"answers": answers(("Zoë", 999))}, "has '' (str)"),
        (
            "squad/v2.0",
            {"is_impossible": 0},
            'field "is_impossible" is 0 (int). It must be true or false',
        ),
        (
            "squad/v2.0",
            {"is_impossible": True},
            "has 2 answers. It must have none, as is_impossible is True",
        ),
        (
            "squad/v2.0",
            {"answers": answers()},
            "has no answers. It must have one at least, as is_impossible is F",
        ),
    ],
)
def test_bad_row_is_refused(dataset, changes, message, tmp_path):
    split, good = next(
        (s, r[0]) for (d, s), r in WRITTEN.items() if d == dataset
    )
    path = tmp_path / dataset / f"{split}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | changes)}")
    with told(ValueError, f'{path}, line 2: field "', message):
        load_rows(dataset, split, tmp_path)


@pytest.mark.parametrize(
    "dataset, split",
    {dataset: (dataset, split) for dataset, split in WRITTEN}.values(),
)
def test_missing_field_is_told(dataset, split, tmp_path):
    (good, *_) = WRITTEN[dataset, split]
    for name in good:
        bad = {key: value for key, value in good.items() if key != name}
        path = write(tmp_path, dataset, f"{split}.jsonl", [good, bad])
        with told(ValueError, f'{path}, line 2 has no field "{name}"; it has'):
            load_rows(dataset, split, tmp_path)


LINE = json.dumps(PAIRS[0]).encode() + b"\n"
COMPRESSED = gzip.compress(LINE * 50)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train.jsonl", b"", "has no rows of glue/mrpc, split train. Write"),
        ("train.jsonl.gz", gzip.compress(b""), "has no rows of glue/mrpc"),
        ("train.jsonl", LINE + b"{oops}\n", ", line 2 is not JSON: Expecting"),
        ("train.jsonl", LINE + b"\n" + LINE, "no line may be empty"),
        ("train.jsonl", LINE + LINE[:30], ", line 2 is not JSON: Unterminated"),
        ("train.jsonl", LINE + LINE[:-1] + LINE, ", line 2 is not JSON: Extra"),
        ("train.jsonl", b"[" * 100_000, ", line 1 is not JSON: "),
        ("train.jsonl", b"[1]\n", ", line 1 is a list. Each line must be one"),
        ("train.jsonl", LINE + b"null\n", ", line 2 is a NoneType. Each line"),
        ("train.jsonl", LINE + b'"\xe9"\n', ", line 2 is not UTF-8: 'utf-8'"),
        ("train.jsonl", COMPRESSED, "gzip, let its name end in .jsonl.gz"),
        ("train.jsonl.gz", LINE, "is no whole gzip file: Not a gzipped"),
        (
            "train.jsonl.gz",
            COMPRESSED[:-9],
            "is no whole gzip file: Compressed",
        ),
        (
            "train.jsonl.gz",
            COMPRESSED[:12] + b"\xff\xff" + COMPRESSED[14:],
            "is no whole gzip file: Error",
        ),
        ("train_part.jsonl.gz", LINE, "if it is not compressed, let its name"),
    ],
)
def test_bad_file_is_refused(name, content, message, tmp_path):
    path = write(tmp_path, "glue/mrpc", name, content)
    with told(ValueError, path, message):
        load_rows("glue/mrpc", "train", tmp_path)


def test_missing_file_is_told(tmp_path):
    write(tmp_path, "glue/mrpc", "train.jsonl", PAIRS)
    with told(
        FileNotFoundError,
        tmp_path / "glue" / "mrpc",
        "no file validation.jsonl, validation.jsonl.gz, validation_part.jsonl "
        "or validation_part.jsonl.gz. Put one there, or leave out `--data-dir`",
    ):
        load_rows("glue/mrpc", "validation", tmp_path)


def test_wrong_arguments_are_told(tmp_path):
    with told(ValueError, "data set 'glue/wnli'. Pass one of glue/mrpc, "):
        load_rows("glue/wnli", "train", tmp_path)
    with told(ValueError, "no split 'validation'", "validation_mismatched"):
        load_rows("glue/mnli", "validation", tmp_path)
    with told(ValueError, "data_dir='a' and tfds_dir='b'. Pass one"):
        load_rows("glue/mrpc", "train", data_dir="a", tfds_dir="b")


@pytest.mark.parametrize(
    "dataset, changes, message",
    [
        ("glue/mrpc", {"label": -1}, "which stands for a hidden label"),
        ("glue/mrpc", {"sentence1": b"caf\xe9"}, "text that is not Unicode"),
        ("glue/stsb", {"label": math.nan}, "is nan. It must be a number"),
        ("squad/v1.1", {"answers": answers(("Zoë", 3))}, "It stands at 2"),
    ],
)
def test_bad_row_of_tfds_is_refused(dataset, changes, message, tmp_path):
    good = next(rows[0] for (d, _), rows in WRITTEN.items() if d == dataset)
    prepare(tmp_path, dataset, {"train": [good, good | changes]})
    place = f"TFDS {dataset}, split train, row 2: field "
    with told(ValueError, place, message):
        load_rows(dataset, "train", tfds_dir=tmp_path)


def test_split_that_tfds_lacks_is_told(prepared):
    folder = prepared["tfrecord"]
    with told(ValueError, "has no split 'test', but", "Delete that folder"):
        load_rows("glue/mrpc", "test", tfds_dir=folder)


def test_broken_files_of_tfds_are_told(tmp_path):
    folder = prepare(tmp_path, "glue/mrpc", {"train": MANY})
    shard = sorted(folder.glob("*train*"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with told(ValueError, f"cannot read {folder} after row ", "DataLossError"):
        load_rows("glue/mrpc", "train", tfds_dir=tmp_path)


def test_failing_download_is_told(tmp_path, monkeypatch, caplog):
    # With a proxy of no name, a request fails before anything is sent.
    for name in ["http_proxy", "https_proxy", "all_proxy"]:
        monkeypatch.setenv(name, "http://")
        monkeypatch.setenv(name.upper(), "http://")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with told(
        FileNotFoundError,
        f"{tmp_path / 'glue' / 'mrpc' / '2.0.0'} is not there, and TFDS cannot",
        "pass `--data-dir` with a folder that has the file glue/mrpc/<split>",
    ):
        load_rows("glue/mrpc", "train", tfds_dir=tmp_path)
    assert "TFDS downloads glue/mrpc to" in caplog.text


def test_missing_tfds_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    write(tmp_path, "glue/mrpc", "train.jsonl", PAIRS)
    assert load_rows("glue/mrpc", "train", tmp_path) == PAIRS
    with told(ImportError, "pip install tensorflow-datasets", "`--data-dir`"):
        load_rows("glue/mrpc", "train")


def labelled(*counts):
    """Rows of each class, one class after the other."""
    return [
        {"label": label, "idx": f"{label}-{number}"}
        for label, count in enumerate(counts)
        for number in range(count)
    ]


@given(st.data())
def test_sample_keeps_shares_and_draws_no_row_twice(data):
    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    rows = labelled(*counts, 1)
    count = data.draw(st.integers(1, len(rows)))
    seed = data.draw(st.integers(0, 2**64))
    before = copy.deepcopy(rows)
    drawn = sample(rows, count, seed)
    assert drawn == sample(rows, count, seed)
    assert rows == before
    assert len(drawn) == len({row["idx"] for row in drawn}) == count
    assert all(row in rows for row in drawn)
    found = collections.Counter(row["label"] for row in drawn)
    for label, total in collections.Counter(r["label"] for r in rows).items():
        assert abs(found[label] - count * total / len(rows)) < 1


@given(st.integers(1, 40), st.integers(0, 1000))
def test_sample_of_scores_needs_no_classes(count, seed):
    rows = [{"label": number / 8, "idx": number} for number in range(40)]
    drawn = sample(rows, count, seed)
    assert len({row["idx"] for row in drawn}) == len(drawn) == count
    plain = sample([{"idx": number} for number in range(40)], count, seed)
    assert [row["idx"] for row in drawn] == [row["idx"] for row in plain]


def test_sample_is_the_one_that_python_promises():
    # random.Random(0) gives 0.844, 0.758, 0.421, 0.259 and 0.511.
    rows = [{"id": name} for name in "abcde"]
    assert sample(rows, 3, seed=0) == [{"id": name} for name in "dce"]
    # 2.5, 1.5 and 1 of each: the first of equal remainders is rounded up.
    drawn = collections.Counter(
        row["label"] for row in sample(labelled(5, 3, 2), 5, seed=0)
    )
    assert drawn == {0: 3, 1: 1, 2: 1}


def test_sample_draws_each_row_equally_often():
    rows = labelled(6, 2)
    drawn = collections.Counter(
        row["idx"] for seed in range(2000) for row in sample(rows, 4, seed)
    )
    # 1000 each, and four standard deviations of 22.
    assert all(abs(drawn[row["idx"]] - 1000) < 90 for row in rows)
    firsts = {sample(rows, 4, seed)[0]["label"] for seed in range(20)}
    assert firsts == {0, 1}


@pytest.mark.parametrize("count", [0, -1, 9])
def test_sample_of_a_wrong_size_is_refused(count):
    with told(ValueError, f"count={count} of 8 rows. Pass a count from 1 to 8"):
        sample(labelled(6, 2), count, seed=0)


@pytest.mark.parametrize("seed", [None, -1, 1.5])
def test_sample_without_a_seed_is_refused(seed):
    with told(ValueError, f"seed={seed!r}. Pass an integer >= 0"):
        sample(labelled(6, 2), 4, seed)
