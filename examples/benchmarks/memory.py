"""How much memory one call of a function needs at its peak.

On a CPU it is the resident memory of the process, on a GPU what the allocator
of the framework has handed out.
"""

import ctypes
import gc
import pathlib
import re


class ProcessMemory:
    """Resident memory, which Linux tells; elsewhere it is not known."""

    kind = "resident memory of the process"
    # Linux lets a process forget the peak so far.
    can_reset = True

    def now(self):
        return self._status("VmRSS")

    def peak(self):
        return self._status("VmHWM")

    def reset(self):
        # Memory that was freed is given back first, not counted as used.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def _status(self, name):
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.M)[1])


class TorchMemory:
    """What PyTorch has allocated on a CUDA device."""

    kind = "allocator of PyTorch"
    can_reset = True

    def __init__(self):
        import torch

        self._cuda = torch.cuda

    def now(self):
        return self._cuda.memory_allocated()

    def peak(self):
        return self._cuda.max_memory_allocated()

    def reset(self):
        self._cuda.reset_peak_memory_stats()


class JaxMemory:
    """What JAX has allocated on a GPU; its peak cannot be reset."""

    kind = "allocator of JAX"
    can_reset = False

    def __init__(self):
        import jax

        self._device = jax.devices()[0]

    def now(self):
        return self._device.memory_stats()["bytes_in_use"]

    def peak(self):
        return self._device.memory_stats()["peak_bytes_in_use"]

    def reset(self):
        pass


class MemoryMeter:
    """Measures peaks of calls against the memory before there was a model.

    Args:
        backend: "jax", "torch" or "peft".
        device: "cpu" or "cuda".
    """

    def __init__(self, backend, device):
        if device == "cpu":
            self._source = ProcessMemory()
        else:
            self._source = JaxMemory() if backend == "jax" else TorchMemory()
        self.baseline = self._try(self._source.now)

    def measure(self, function):
        """Call a function; return its peak in bytes, or `None` if unknown.

        Returns:
            Dict of `peak`, `excess` (over the baseline), `resting` (before the
            call), `source`, and `since_start`: whether the peak may be that of
            an earlier call.
        """
        gc.collect()
        reset = self._try(self._reset)
        resting = self._try(self._source.now)
        function()
        peak = self._try(self._source.peak)
        if peak is None or self.baseline is None:
            return None
        return {
            "peak": peak,
            "excess": peak - self.baseline,
            "resting": resting,
            "source": self._source.kind,
            "since_start": reset is None,
        }

    def _reset(self):
        self._source.reset()
        return self._source.can_reset or None

    def _try(self, question):
        try:
            return question()
        except (OSError, AttributeError, TypeError, KeyError):
            return None
