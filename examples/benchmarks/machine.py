"""What the numbers are taken on."""

import contextlib
import os
import pathlib
import platform
import re
import subprocess


def available_cores():
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def limit_cores(count):
    """Let this process and its children use so many cores, on Linux.

    JAX takes as many threads as it has cores.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:count])


def can_keep_memory():
    """Whether the C library has the settings of `children.KEEP_MEMORY`."""
    name, version = platform.libc_ver()
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    return name == "glibc" and numbers >= [2, 35]


def memory_left():
    """Bytes that processes can still take, and all; `None` where unknown."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return None
    names = "MemAvailable", "MemTotal"
    sizes = [re.search(rf"^{name}:\s+(\d+) kB", text, re.M) for name in names]
    return [1024 * int(size[1]) for size in sizes]


def processor():
    """Name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit():
    """The commit that is measured, or `None` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        folder = pathlib.Path(__file__).parent
        printed = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
        return printed.stdout.strip()
    return None
