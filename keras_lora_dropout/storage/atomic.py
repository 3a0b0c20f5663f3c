"""Writing a file so that a kill leaves the old content or the new one."""

import contextlib
import glob
import os
import pathlib
import secrets
import time

_SUFFIX = ".tmp"
_OLD_SECONDS = 3600


@contextlib.contextmanager
def replacing(path, suffix=_SUFFIX):
    """Write to a temporary file that takes a path's place at the end.

    The temporary file lies in the same directory. Its content is forced to the
    disk, and it takes the name of the file in one step: whoever reads the file
    at any moment, even after a power failure, finds the old content or the new.

    Args:
        path: Path of the file; its directory must exist.
        suffix: String that the temporary name ends in.

    Yields:
        `pathlib.Path` to write to.

    Raises:
        OSError: If the operating system refuses a step. The file is unchanged
            then, and the temporary file is removed.
    """
    path = pathlib.Path(path)
    _remove_old_leftovers(path, suffix)
    token = secrets.token_hex(8)
    temporary = path.with_name(f".{path.name}.{token}{suffix}")
    try:
        yield temporary
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        force_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # Some systems open no directories.
        force_to_disk(path.parent)


def reserve(path, size):
    """Make a file of so many bytes, to learn whether the disk has the room.

    Args:
        path: Path of the file.
        size: Integer.

    Raises:
        OSError: If it has not.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # Unix has it.
            os.posix_fallocate(file.fileno(), 0, size)


def write_atomically(path, data):
    """Replace the content of a file, all at once, see `replacing`.

    Args:
        path: Path of the file; its directory must exist.
        data: Bytes.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)


def leftovers(directory, pattern, suffix=_SUFFIX):
    """Paths of the temporary files that killed writers have left.

    Args:
        directory: Path of a directory.
        pattern: Glob pattern of the names of the files that were written.
        suffix: What their temporary names end in.

    Returns:
        List of paths.
    """
    return list(pathlib.Path(directory).glob(f".{pattern}.*{suffix}"))


def _remove_old_leftovers(path, suffix):
    """Remove what killed writers left, and nothing that is being written."""
    for leftover in leftovers(path.parent, glob.escape(path.name), suffix):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _OLD_SECONDS:
                leftover.unlink()


def force_to_disk(path):
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
