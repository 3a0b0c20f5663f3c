"""A program whose address space is limited, so that memory really runs out.

It writes the type and the text of the error of `fit` and of `ensemble_predict`
with N instances at once, and `done` when `fit` takes them one after another.
"""

import resource
import traceback

import keras
import numpy as np

import keras_lora_dropout as kld

# 16 instances of this batch need 1 GiB in each layer, one needs 64 MiB.
ROWS, UNITS, INSTANCES = 4096, 4096, 16
SPARE = 2**29
X = np.ones((ROWS, 4), "float32")
Y = np.ones((ROWS, 1), "float32")


def model_of(sampling):
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(UNITS, name="wide"), layers.Dense(1)]
    )
    kld.enable_lora_dropout(
        model,
        rank=2,
        num_samples=INSTANCES,
        sampling=sampling,
        target_layers=["wide"],
    )
    model.compile("sgd", "mse")
    return model


def runs(model, rows):
    options = {"batch_size": rows, "verbose": 0}
    x, y = X[:rows], Y[:rows]
    yield "fit", lambda: model.fit(x, y, **options)
    yield "ensemble_predict", lambda: model.ensemble_predict(x, **options)


def main():
    for sampling in ("parallel", "sequential"):
        for _, run in runs(model_of(sampling), 2):
            run()  # Threads and libraries take their address space.
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
    for name, _ in list(runs(None, ROWS)):
        run = dict(runs(model_of("parallel"), ROWS))[name]
        try:
            run()
        except Exception as error:
            print(f"<{name} {type(error).__name__}>", flush=True)
            print("".join(traceback.format_exception(error)), flush=True)
    dict(runs(model_of("sequential"), ROWS))["fit"]()
    print("<done>")


if __name__ == "__main__":
    main()
