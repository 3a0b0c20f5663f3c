"""Kills and failures while adapters are written: the old files, or the new."""

import errno
import io
import os

import numpy as np
import pytest
from stored_adapters import SETTINGS
from stored_adapters import TENSORS
from stored_adapters import assert_read
from stored_adapters import names_in

from keras_lora_dropout.storage import atomic
from keras_lora_dropout.storage.adapter_files import write_adapter_files


@pytest.fixture
def saved(tmp_path):
    """A directory with saved adapters."""
    write_adapter_files(tmp_path / "adapters", SETTINGS, TENSORS)
    return tmp_path / "adapters"


class Stopped(BaseException):
    """The process is killed."""


class FaultyDisk:
    """Makes one of the calls to the operating system fail.

    Args:
        monkeypatch: Pytest's fixture.
        fatal: Index of the call that fails.
        kill: Whether the process is dead then: all later calls do nothing.
    """

    def __init__(self, monkeypatch, fatal, kill):
        self.calls, self.fatal, self.kill = [], fatal, kill
        disk = self

        class File(io.FileIO):
            def write(self, data):
                # Half of the data is on the disk when it fails.
                super().write(data[: len(data) // 2])
                disk.happens("write")
                return super().write(data[len(data) // 2 :])

        def opened(path, mode):
            disk.happens("open")
            return File(path, mode)

        monkeypatch.setattr(atomic, "open", opened, raising=False)
        for name in ("fsync", "replace", "open", "unlink"):
            monkeypatch.setattr(os, name, self.faulty(name, getattr(os, name)))

    def happens(self, name):
        self.calls.append(name)
        index = len(self.calls) - 1
        if index == self.fatal and not self.kill:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.kill and index >= self.fatal:
            raise Stopped

    def faulty(self, name, function):
        def call(*args, **kwargs):
            self.happens(name)
            return function(*args, **kwargs)

        return call


NEW = {"rank": 3}, {"block/query/lora_kernel_a": np.zeros(4, "float32")}
WRITE = ["open", "write", "open", "fsync", "replace"]
SYNC_DIRECTORY = ["open", "fsync"]  # Not every system can; it goes on then.
STEPS = [*WRITE, *SYNC_DIRECTORY, *WRITE, *SYNC_DIRECTORY, "unlink"]
REPLACED = 11  # The step that gives `adapters.json` its new content.


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_failure_leaves_the_old_or_the_new(saved, monkeypatch, step):
    fails = step <= REPLACED and step not in (5, 6)
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, step, kill=False)
        if fails:
            with pytest.raises(OSError, match="No space left"):
                write_adapter_files(saved, *NEW)
        else:
            write_adapter_files(saved, *NEW)
    assert disk.calls[: step + 1] == STEPS[: step + 1]
    assert_read(saved, *((SETTINGS, TENSORS) if fails else NEW))
    assert not [name for name in names_in(saved) if name.endswith(".tmp")]


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_kill_leaves_the_old_or_the_new(saved, monkeypatch, step):
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, step, kill=True)
        with pytest.raises(Stopped):
            write_adapter_files(saved, *NEW)
    assert disk.calls[: step + 1] == STEPS[: step + 1]
    assert_read(saved, *((SETTINGS, TENSORS) if step <= REPLACED else NEW))
    write_adapter_files(saved, *NEW)
    assert_read(saved, *NEW)
    assert len(names_in(saved)) == 2


def test_a_write_goes_through_all_steps(saved, monkeypatch):
    with monkeypatch.context() as patch:
        disk = FaultyDisk(patch, -1, kill=False)
        write_adapter_files(saved, *NEW)
    assert disk.calls == STEPS
