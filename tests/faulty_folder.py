"""Saving where the system refuses: a program for `test_faulty_folder.py`.

`python faulty_folder.py full|read-only FOLDER` writes over files that are there
and says how each attempt ended.
"""

import os
import pathlib
import resource
import signal
import sys
import tempfile

import keras
import numpy as np
import saved_models

WRITES = {
    "model.keras": lambda model, path: model.save(path),
    "model.weights.h5": lambda model, path: model.save_weights(path),
    "adapters": lambda model, path: model.save_adapters(path),
}
LIMIT = 300  # Bytes of a file: less than any of these has.


def model_of(scale):
    """An adapted model whose adapters have another content for each scale."""
    keras.utils.set_random_seed(0)
    model = saved_models.compiled(saved_models.KINDS["functional"]())
    for _, layer in model.adapted_layers:
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, scale))
    model.optimizer.build(model.trainable_variables)
    return model


def refuse(how):
    if how == "full":
        # As on a full disk, `write` fails after so many bytes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    elif os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)  # The system refuses root nothing.


def main(how, folder):
    model = model_of(2.0)
    with tempfile.TemporaryDirectory() as elsewhere:
        for name, write in WRITES.items():
            write(model, pathlib.Path(elsewhere) / name)
    refuse(how)
    for name, write in WRITES.items():
        try:
            write(model, pathlib.Path(folder) / name)
        except OSError as error:
            print(name, type(error).__name__)
        else:
            print(name, "written")


if __name__ == "__main__":
    main(*sys.argv[1:])
