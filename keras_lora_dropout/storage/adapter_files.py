"""The files of saved adapters: settings as JSON, tensors as safetensors.

A directory holds `adapters.json` and `adapters-<hash>.safetensors`. The JSON
names the other file, which is called after its content. So a new save puts its
tensors beside the old ones, and replacing the JSON, in one step, makes them
the saved ones: a kill at any moment leaves the old adapters or the new.

Nothing that is read is executed or taken on trust: sizes, format, version,
checksums, names, shapes and dtypes are checked before a caller sees anything.
"""

import contextlib
import hashlib
import os
import pathlib
import stat

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from keras_lora_dropout.core import validation
from keras_lora_dropout.storage import manifest
from keras_lora_dropout.storage.atomic import leftovers
from keras_lora_dropout.storage.atomic import write_atomically

JSON_NAME = "adapters.json"
MAX_HEADER_BYTES = 100_000_000  # What safetensors itself allows.

_DTYPES = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "U16": np.dtype("uint16"),
    "I16": np.dtype("int16"),
    "U32": np.dtype("uint32"),
    "I32": np.dtype("int32"),
    "U64": np.dtype("uint64"),
    "I64": np.dtype("int64"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
}


def write_adapter_files(directory, settings, tensors):
    """Write the files of adapters; an earlier save is replaced.

    Only one process may write to a directory at a time.

    Args:
        directory: Path of the directory; it is made if it does not exist.
        settings: Dictionary of what JSON can hold.
        tensors: Dictionary of names and NumPy arrays of booleans, integers or
            floats (`bfloat16` is one).

    Raises:
        ValueError: If `directory` is a file, or settings or tensors cannot be
            stored. Nothing is written then.
        OSError: If the operating system refuses a step, such as on a full
            disk. What was saved before is still there then.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(
            f"Adapters are saved to a directory, and {directory} is a file. "
            "Pass the path of a directory, or of one that does not exist yet."
        )
    arrays = {name: _storable(name, tensors[name]) for name in tensors}
    data = safetensors.numpy.save(arrays)
    file = f"adapters-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    described = {name: _description(array) for name, array in arrays.items()}
    encoded = manifest.encode(settings, described, file, data)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / file, data)
    write_atomically(directory / JSON_NAME, encoded)
    _remove_earlier(directory, file)


def read_adapter_files(directory):
    """Read and check the files of adapters.

    Args:
        directory: Path of the directory.

    Returns:
        Tuple of `settings`, as they were written (tuples are lists now), and
        `tensors`, a dictionary of names and NumPy arrays.

    Raises:
        FileNotFoundError: If the directory or one of its files is missing.
        ValueError: If a file is damaged, forged or of another format.
    """
    directory = pathlib.Path(directory)
    path = directory / JSON_NAME
    _check_present(directory, path)
    with _telling(path):
        fields = manifest.decode(_read(path, manifest.MAX_BYTES))
    path = directory / fields["file"]
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, which {JSON_NAME} names: it holds the "
            "tensors. Copy the whole directory, or save the adapters again."
        )
    with _telling(path):
        data = _read(path, fields["size"], exactly=True)
        _check_header(data)
        if hashlib.sha256(data).hexdigest() != fields["sha256"]:
            raise ValueError(f"its SHA-256 is not the one in {JSON_NAME}")
        return fields["settings"], _tensors(data, fields["tensors"])


def _storable(name, array):
    """Return an array as the file has it: in C order, in native bytes."""
    if not _is_name(name):
        raise ValueError(
            "Names of tensors are strings of valid Unicode, and "
            "`__metadata__` means something else in safetensors files. "
            f"Received: {name!r}. Rename the tensor."
        )
    array = np.asarray(array, order="C")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype not in _DTYPES.values():
        raise ValueError(
            f"Tensor {name!r} has dtype {array.dtype}, which cannot be stored. "
            f"Cast it to one of {', '.join(map(str, _DTYPES.values()))}."
        )
    return array


def _is_name(name):
    if not isinstance(name, str) or name == "__metadata__":
        return False
    return validation.is_unicode(name)


def _description(array):
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def _remove_earlier(directory, file):
    """Remove files of earlier saves, and of such as never came to an end."""
    earlier = [
        path
        for path in directory.glob("adapters-*.safetensors")
        if path.name != file and manifest.DATA_NAME.fullmatch(path.name)
    ]
    for pattern in (JSON_NAME, "adapters-*.safetensors"):
        earlier += leftovers(directory, pattern)
    for path in earlier:
        with contextlib.suppress(OSError):  # No reader looks at it.
            path.unlink()


def _check_present(directory, path):
    if not directory.exists():
        raise FileNotFoundError(
            f"There is no directory {directory}. Pass the one that the "
            "adapters were saved to."
        )
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is a file; adapters are stored in a directory. Pass "
            f"the directory that contains {JSON_NAME}."
        )
    if not path.exists():
        found = sorted(entry.name for entry in directory.iterdir())[:5]
        raise FileNotFoundError(
            f"{directory} holds no saved adapters: it has no {JSON_NAME}. It "
            f"has: {', '.join(found) or 'nothing'}. Pass the directory that "
            "the adapters were saved to."
        )


@contextlib.contextmanager
def _telling(path):
    """Name the file in the `ValueError` that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"Cannot read adapters from {path}: {error}. If the file is "
            "damaged, copy it again from where it was saved, or save the "
            "adapters again."
        ) from error


def _read(path, size, exactly=False):
    """Read a file of a size at most (or exactly) the given one."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if exactly and status.st_size != size:
        raise ValueError(
            f"it has {status.st_size:,} bytes, but {JSON_NAME} says {size:,}"
        )
    if status.st_size > size:
        raise ValueError(
            f"it has {status.st_size:,} bytes, and at most {size:,} are read"
        )
    return path.read_bytes()


def _check_header(data):
    length = int.from_bytes(data[:8], "little")
    limit = min(len(data) - 8, MAX_HEADER_BYTES)
    if length > limit:
        raise ValueError(
            f"its header claims {length:,} bytes, and at most "
            f"{max(limit, 0):,} are possible"
        )


def _tensors(data, described):
    """Parse the tensors and compare them with what the JSON says of them."""
    try:
        entries = dict(safetensors.deserialize(data))
        tensors = {name: _array(entry) for name, entry in entries.items()}
    except Exception as error:  # Of whatever kind the parser raises.
        raise ValueError(f"it is no safetensors file ({error})") from error
    if set(tensors) != set(described):
        missing = sorted(set(described) - set(tensors))[:3]
        surplus = sorted(set(tensors) - set(described))[:3]
        raise ValueError(
            f"its tensors are not those in {JSON_NAME}: {missing} missing, "
            f"{surplus} not expected"
        )
    for name, array in tensors.items():
        if described[name] != _description(array):
            raise ValueError(
                f"tensor {name!r} is {_description(array)}, but "
                f"{described[name]} in {JSON_NAME}"
            )
    return tensors


def _array(entry):
    flat = np.frombuffer(bytes(entry["data"]), _DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"]).copy()
