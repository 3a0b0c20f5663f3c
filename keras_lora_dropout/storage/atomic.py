"""Writing a file so that a kill leaves the old content or the new one."""

import contextlib
import os
import pathlib
import secrets

_SUFFIX = ".tmp"


def write_atomically(path, data):
    """Replace the content of a file, all at once.

    The data goes to a temporary file next to it, is forced to the disk, and
    takes the name of the file in one step. Whoever reads the file at any
    moment, even after a power failure, finds the old content or the new.

    Args:
        path: Path of the file; its directory must exist.
        data: Bytes.

    Raises:
        OSError: If the operating system refuses a step. The file is unchanged
            then, and the temporary file is removed.
    """
    path = pathlib.Path(path)
    token = secrets.token_hex(8)
    temporary = path.with_name(f".{path.name}.{token}{_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def leftovers(directory, pattern):
    """Paths of the temporary files that killed writers have left.

    Args:
        directory: Path of a directory.
        pattern: Glob pattern of the names of the files that were written.

    Returns:
        List of paths.
    """
    return list(pathlib.Path(directory).glob(f".{pattern}.*{_SUFFIX}"))


def _sync_directory(directory):
    """Force a new name to the disk, where directories can be opened at all."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
