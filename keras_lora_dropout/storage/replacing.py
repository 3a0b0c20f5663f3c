"""Writing a file so that it is there as a whole, or as it was before."""

import contextlib
import os
import pathlib
import tempfile


@contextlib.contextmanager
def replacing(path, suffix=""):
    """Write to a temporary file that takes a path's place at the end.

    Whatever stops the writer, a kill included, `path` holds the old content or
    the new one, never a part. The temporary file lies in the same directory.

    Args:
        path: Path of the file.
        suffix: String that the temporary name must end in.

    Yields:
        `pathlib.Path` to write to.
    """
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=suffix or ".tmp"
    )
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        mode = path.stat().st_mode & 0o777 if path.exists() else _new_mode()
        os.chmod(temporary, mode)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path):
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and pathlib.Path(path).is_dir():
        return  # Windows opens no directories.
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _new_mode():
    """Permissions of a new file; `mkstemp` leaves it to the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
