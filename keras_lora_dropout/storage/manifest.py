"""The JSON of saved adapters: what it must hold, and how it is checked."""

import hashlib
import json
import re

FORMAT = "keras_lora_dropout.adapters"
VERSION = 1
MAX_BYTES = 64 * 2**20
DATA_NAME = re.compile(r"adapters-[0-9a-f]{16}\.safetensors")

_FIELDS = {
    "checksum": str,
    "file": str,
    "settings": dict,
    "sha256": str,
    "size": int,
    "tensors": dict,
}


def encode(settings, tensors, file, data):
    """Return the JSON, as bytes.

    Args:
        settings: Dictionary of what JSON can hold.
        tensors: Dictionary of names and `{"shape": ..., "dtype": ...}`.
        file: Name of the safetensors file.
        data: Its content, as bytes.

    Raises:
        ValueError: If something is not JSON, or too large to be read again.
    """
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "tensors": tensors,
        "file": file,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        # What JSON makes of tuples and of keys that are no strings.
        fields = _parse(_canonical(fields))
        fields["checksum"] = checksum(fields)
        text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
        encoded = f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`settings` cannot be stored as JSON: {error}. Use dictionaries "
            "with string keys, lists, strings, finite numbers, booleans and "
            "`None`, and valid Unicode."
        ) from error
    if len(encoded) > MAX_BYTES:
        raise ValueError(
            f"`settings` and the names of the tensors take {len(encoded):,} "
            f"bytes as JSON, and at most {MAX_BYTES:,} can be read again. Pass "
            "large values as tensors."
        )
    return encoded


def decode(encoded):
    """Parse and check the JSON.

    Args:
        encoded: Bytes, as from `encode`.

    Returns:
        Dictionary with the keys `settings`, `tensors`, `file`, `size`,
        `sha256` and others. The values are of the right type, and `file` is a
        plain file name; names, shapes and dtypes of `tensors` are not checked.

    Raises:
        ValueError: Whose message says what is wrong.
    """
    try:
        fields = _parse(encoded.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON in UTF-8 ({error})") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f'its "format" is not "{FORMAT}"')
    _check_version(fields.get("version"))
    for key, kind in _FIELDS.items():
        if type(fields.get(key)) is not kind:
            raise ValueError(
                f'"{key}" must be of type {kind.__name__}, but is '
                f"{_short(fields.get(key))}"
            )
    try:
        is_intact = checksum(fields) == fields["checksum"]
    except (ValueError, RecursionError) as error:  # Infinity from "1e999"
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not is_intact:
        raise ValueError("its checksum differs from its content")
    if not DATA_NAME.fullmatch(fields["file"]):
        raise ValueError(
            f'"file" must be a name like "adapters-0123456789abcdef.'
            f'safetensors", without a folder, but is {_short(fields["file"])}'
        )
    return fields


def checksum(fields):
    """SHA-256 of the canonical JSON of all fields but the checksum itself."""
    content = {key: fields[key] for key in fields if key != "checksum"}
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _check_version(version):
    if type(version) is not int or version < 1:
        raise ValueError(
            f'its "version" must be a positive integer, but is '
            f"{_short(version)}"
        )
    if version > VERSION:
        raise ValueError(
            f"it has format version {_short(version)}, and this release of "
            f"keras_lora_dropout reads up to version {VERSION}; upgrade the "
            "package to read it"
        )


def _canonical(fields):
    """One text for one content."""
    return json.dumps(
        fields, sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def _parse(text):
    return json.loads(
        text, object_pairs_hook=_without_duplicates, parse_constant=_refuse
    )


def _without_duplicates(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in fields if keys.count(key) > 1)
        raise ValueError(f"the key {_short(twice)} stands there twice")
    return fields


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def _short(value):
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
