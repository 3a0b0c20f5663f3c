"""What tests write into the files of adapters, and read out of them."""

import pathlib

import ml_dtypes
import numpy as np

from keras_lora_dropout.storage.adapter_files import read_adapter_files

SETTINGS = {"rank": 2, "alpha": 4.0, "names": ["query", "Größe"], "seed": None}
TENSORS = {
    "block/query/lora_kernel_a": np.arange(6, dtype="float32").reshape(3, 2),
    "block/query/lora_kernel_b": np.ones((2, 3), ml_dtypes.bfloat16),
    "block/query/state": np.array([1, 2], "uint32"),
}


def assert_read(directory, settings, tensors):
    """Assert that files hold these settings and these tensors, bit for bit."""
    found_settings, found = read_adapter_files(directory)
    assert found_settings == settings
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def names_in(directory):
    return sorted(path.name for path in pathlib.Path(directory).iterdir())
