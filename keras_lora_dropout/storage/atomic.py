"""Files that are there in full or not at all."""

import os
import pathlib
import uuid


def write_atomically(path, data):
    """Write bytes to a file; whatever interrupts it, the old file stays.

    Args:
        path: The file. Its folder must exist.
        data: Bytes, all that the file holds afterwards.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # The new name must be on disk too.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
