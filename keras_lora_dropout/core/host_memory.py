"""How much memory of the host is free."""

import pathlib

_MEMORY = pathlib.Path("/proc/meminfo")
_GROUP = pathlib.Path("/sys/fs/cgroup")


def free_host_memory():
    """Return the free bytes, `None` where the system does not tell.

    What a container may use at most counts, too.
    """
    amounts = [_available(), _left_to_group()]
    return min((a for a in amounts if a is not None), default=None)


def _available():
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _left_to_group():
    try:
        limit, used = (
            int((_GROUP / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # No group, or none with a limit.
        return None
    return max(limit - used, 0)
