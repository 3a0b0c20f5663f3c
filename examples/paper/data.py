"""Rows of all data sets, from TFDS or from JSON Lines files."""

import gzip
import json
import logging
import os
import pathlib
import random
import zlib

import numpy as np
from rows import DATASETS
from rows import checked

LOGGER = logging.getLogger(__name__)
ENDINGS = (".jsonl", ".jsonl.gz", "_part.jsonl", "_part.jsonl.gz")
# TFDS 4.9.10 downloads with a package that it does not require.
INSTALL = "pip install tensorflow-datasets tensorflow importlib_resources"


def load_rows(dataset, split, data_dir=None, tfds_dir=None):
    """Read and check all rows of a split.

    What a user should know, such as that a file holds a part of the split, is
    logged as a warning.

    Args:
        dataset: Name as in TFDS, "glue/mrpc" or "squad/v2.0"; `DATASETS` has
            them all.
        split: Name as in TFDS, "train" or "validation"; MNLI has
            "validation_matched" and "validation_mismatched".
        data_dir: Folder of the files `<dataset>/<split>.jsonl`, which may end
            in `_part.jsonl` or `.gz`: one JSON object of TFDS's fields a line.
            By default, TFDS prepares the data, and downloads them if need be.
        tfds_dir: Folder of TFDS. By default `~/tensorflow_datasets`.

    Returns:
        List of dicts of TFDS's fields: strings as `str`, labels as `int` (STS-B
        as `float`), answers as `{"text": [...], "answer_start": [...]}`.

    Raises:
        ValueError: If an argument, a file or a row is not as it must be.
        FileNotFoundError: If there is no such file, or the download fails.
        ImportError: If TFDS is needed and not installed.
    """
    if dataset not in DATASETS:
        raise ValueError(
            f"Unknown data set {dataset!r}. Pass one of {', '.join(DATASETS)}."
        )
    known = DATASETS[dataset].splits
    if split not in known:
        raise ValueError(
            f"{dataset} has no split {split!r}. Pass one of {', '.join(known)}."
        )
    if data_dir is None and not DATASETS[dataset].in_tfds:
        raise ValueError(
            f"TFDS does not have {dataset}. Pass `--data-dir` with a folder "
            f"that has the file {dataset}/{split}.jsonl."
        )
    if data_dir is None:
        source, numbered = "TFDS", _from_tfds(dataset, split, tfds_dir)
    elif tfds_dir is None:
        source = find_file(dataset, split, data_dir)
        numbered = _from_file(source)
    else:
        raise ValueError(
            f"Received data_dir={str(data_dir)!r} and "
            f"tfds_dir={str(tfds_dir)!r}. Pass one of the two."
        )
    rows, blank = [], []
    for place, row in numbered:
        rows.append(checked(row, dataset, place))
        texts = [rows[-1][name] for name in DATASETS[dataset].texts]
        if not all(text.strip() for text in texts):
            blank.append(place)
    if not rows:
        raise ValueError(
            f"{source} has no rows of {dataset}, split {split}. Write or "
            "prepare it anew."
        )
    if blank:
        LOGGER.warning("Rows with an empty text: %d. %s", len(blank), blank[0])
    return rows


def find_file(dataset, split, data_dir):
    """Return the path of a split's file: the whole split, or else a part.

    Raises:
        FileNotFoundError: If there is neither.
    """
    folder = pathlib.Path(data_dir) / dataset
    names = [f"{split}{ending}" for ending in ENDINGS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has no file {', '.join(names[:-1])} or {names[-1]}. Put one "
        "there, or leave out `--data-dir` to get the data from TFDS."
    )


def _from_file(path):
    """Yield each line's place and object."""
    if path.name.endswith(ENDINGS[2:]):
        LOGGER.warning("%s holds a part of the split, not all of it.", path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                yield place, _parsed(line, place)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is no whole gzip file: {error}. Write it anew; if it is "
            "not compressed, let its name end in .jsonl."
        ) from None


def _parsed(line, place):
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: {error}. Save the file as UTF-8; if it is "
            "compressed with gzip, let its name end in .jsonl.gz."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not JSON: {error}. Each line must be one JSON object, "
            "and no line may be empty."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} is a {type(row).__name__}. Each line must be one JSON "
            'object, {"field": value, ...}.'
        )
    return row


def _from_tfds(dataset, split, folder):
    """Yield each row's place and record, in the order of the files."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{dataset} comes from TensorFlow Datasets, which is not installed "
            f"({error}). Run `{INSTALL}`, or pass `--data-dir` to read JSON "
            "Lines files."
        ) from error
    builder = tfds.builder(dataset, data_dir=folder)
    if not builder.data_path.exists():
        _download(builder, dataset)
    if split not in builder.info.splits:
        raise ValueError(
            f"{builder.data_path} has no split {split!r}, but "
            f"{', '.join(builder.info.splits) or 'none'}. Delete that folder "
            "to have TFDS prepare it anew."
        )
    # Reading files must not take all the memory of a GPU.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    number = 0
    try:
        for number, record in enumerate(_records(tfds, builder, split), 1):
            place = f"TFDS {dataset}, split {split}, row {number}"
            yield place, _plain(record)
    except Exception as error:
        raise ValueError(
            f"TFDS cannot read {builder.data_path} after row {number} of split "
            f"{split}: {_reason(error)}. Delete that folder to have TFDS "
            f"prepare it anew, after `{INSTALL}` if a module is missing; or "
            "pass `--data-dir` to read JSON Lines files."
        ) from error


def _download(builder, dataset):
    LOGGER.warning(
        "TFDS downloads %s to %s; without a network, it tries for minutes.",
        dataset,
        builder.data_path,
    )
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(
            f"{builder.data_path} is not there, and TFDS cannot prepare it: "
            f"{_reason(error)}. Where there is no network, pass `--data-dir` "
            f"with a folder that has the file {dataset}/<split>.jsonl, or copy "
            "TFDS's folder from a machine that has one. If a module is "
            f"missing, run `{INSTALL}`."
        ) from None


def _records(tfds, builder, split):
    try:
        return builder.as_data_source(split)
    except NotImplementedError:  # TFRecord files have no random access.
        one_by_one = tfds.ReadConfig(interleave_cycle_length=1)
        return tfds.as_numpy(
            builder.as_dataset(split=split, read_config=one_by_one)
        )


def _plain(value):
    """Turn NumPy's scalars and arrays into Python's numbers and lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _reason(error):
    """The first line of an error, without its full stop."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".rstrip(". ")


def sample(rows, count, seed):
    """Draw rows at random without replacement, in random order.

    If labels are integers, each class keeps its share of the rows, rounded up
    or down. A seed gives the same rows on any platform.

    Args:
        rows: List of dicts.
        count: Integer. How many to draw, from 1 to `len(rows)`.
        seed: Integer, not negative.

    Returns:
        List of `count` of the rows.

    Raises:
        ValueError: If `count` or `seed` is out of range.
    """
    if not 1 <= count <= len(rows):
        raise ValueError(
            f"Cannot draw count={count} of {len(rows)} rows. Pass a count from "
            f"1 to {len(rows)}."
        )
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"Received seed={seed!r}. Pass an integer >= 0.")
    labels = [row.get("label") for row in rows]
    if not all(isinstance(label, int) for label in labels):
        labels = [None] * len(rows)  # Scores and answers are one class.
    left = _shares(labels, count)
    # Of all methods of `random`, only this one never changes its numbers.
    draw = random.Random(seed).random
    chosen = []
    for index in sorted(range(len(rows)), key=lambda _: draw()):
        if left[labels[index]]:
            left[labels[index]] -= 1
            chosen.append(rows[index])
    return chosen


def _shares(labels, count):
    """Split a count by the frequency of labels, largest remainders first."""
    shares, remainders = {}, {}
    for label in sorted(set(labels)):
        parts = count * labels.count(label)
        shares[label], remainders[label] = divmod(parts, len(labels))
    rest = count - sum(shares.values())
    for label in sorted(shares, key=remainders.get, reverse=True)[:rest]:
        shares[label] += 1
    return shares
