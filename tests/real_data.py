"""Where real data lie, which the package works without."""

import os
import pathlib

import pytest

REAL = pathlib.Path(
    os.environ.get(
        "KERAS_LORA_DROPOUT_DATA",
        pathlib.Path(__file__).parents[2] / "shared" / "data",
    )
)


def needs(*path):
    """Skip a test unless a file or folder of the real data is there."""
    return pytest.mark.skipif(
        not REAL.joinpath(*path).exists(),
        reason=f"No {'/'.join(path)}: set KERAS_LORA_DROPOUT_DATA.",
    )
