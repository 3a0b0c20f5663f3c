"""Tensors in safetensors files, as NumPy arrays."""

import pathlib

import numpy as np
import safetensors

_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def read_tensors(path):
    """Read a safetensors file; floating-point numbers become float32.

    Returns:
        Dictionary of name -> array, sorted; `None` for tensors of other kinds.

    Raises:
        ValueError: If the file is no safetensors file, or not a whole one.
    """
    try:
        tensors = safetensors.deserialize(pathlib.Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(
            f'"{path}" is no whole safetensors file: {error}. It may be '
            "truncated or damaged; copy it again from where it was written."
        ) from error
    entries = dict(tensors)
    return {name: _array(entries[name]) for name in sorted(entries)}


def metadata_of(path):
    """Return the metadata of a safetensors file; empty if it has none."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError:
        return {}


def _array(entry):
    kind, data, shape = entry["dtype"], entry["data"], entry["shape"]
    if kind == "BF16":  # The upper half of a float32.
        bits = np.frombuffer(data, "<u2").astype("uint32") << 16
        return bits.view("float32").reshape(shape)
    if kind not in _FLOATS:
        return None
    values = np.frombuffer(data, _FLOATS[kind]).astype("float32")
    return values.reshape(shape)
