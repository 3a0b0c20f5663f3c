"""The child process of one contender; `speed.py` starts it.

It reads one JSON object from its argument, builds the model, compiles, warms
up, and then does the action that each line of its input names. Its answers are
lines of JSON, too.
"""

import importlib
import json
import os
import queue
import sys
import threading
import time

from contenders import Contender
from machine import available_cores
from memory import MemoryMeter
from workloads import Workload

# From what needs least memory to what needs most: a peak that cannot be reset
# is then that of the last action.
WARM_UP_ORDER = ["predict", "four_predicts", "ensemble_predict", "train"]


def main():
    settings = json.loads(sys.argv[1])
    answer = take_over_output()
    commands = queue.Queue()
    threading.Thread(target=listen, args=(commands,), daemon=True).start()
    try:
        actions = prepare(settings, answer)
    except Exception as error:
        answer(failed=describe(error))
        os._exit(1)
    while True:
        action = commands.get()
        started = time.perf_counter()
        try:
            actions[action]()
        except Exception as error:
            answer(failed=describe(error))
        else:
            answer(ms=1000 * (time.perf_counter() - started))


def listen(commands):
    """Take in commands; end at once when there is nobody to give any."""
    for line in sys.stdin:
        commands.put(json.loads(line)["action"])
    os._exit(0)


def take_over_output():
    """Return a function that answers; what libraries print goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**content):
        channel.write(json.dumps(content) + "\n")

    return answer


def prepare(settings, answer):
    """Build, compile, warm up, and measure memory on the way."""
    contender = Contender(settings["backend"], settings["key"])
    workload = Workload(**settings["workload"])
    answer(doing="imports")
    device = describe_device(contender.backend, settings["device"])
    side = "peft_side" if contender.backend == "peft" else "keras_side"
    side = importlib.import_module(side)
    meter = MemoryMeter(contender.backend, settings["device"])
    answer(doing="builds its model")
    actions, weights = side.build(workload, contender.entry.options)
    memory, failures = warm_up(actions, settings, meter, answer)
    answer(
        ready=True,
        device=device,
        versions=side.versions(),
        trainable_weights=int(weights),
        memory=memory,
        failures=failures,
    )
    return actions


def warm_up(actions, settings, meter, answer):
    """Do all actions until nothing compiles; measure their peaks of memory.

    Returns:
        Peaks by action, and reasons of failure by action.
    """
    peaks, failures = {}, {}
    for action in WARM_UP_ORDER:
        if action in settings["actions"]:
            answer(doing=f"compiles and warms up {action}")
            try:
                for _ in range(settings["warm_up"]):
                    actions[action]()
                peaks[action] = meter.measure(actions[action])
            except Exception as error:
                failures[action] = describe(error)
    answer(doing="warms up once more")
    # `torch.compile` compiles prediction again after the first training.
    for action in peaks:
        actions[action]()
    return peaks, failures


def describe_device(backend, wanted):
    """Start the framework; return what it runs on.

    Raises:
        RuntimeError: If a GPU is wanted and the framework sees none.
    """
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        found, name = device.platform == "gpu", device.device_kind
        threads = available_cores()
    else:
        import torch

        found = torch.cuda.is_available()
        if found:
            # JAX multiplies float32 in TF32 on a GPU that can; so may torch.
            torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name() if found else "cpu"
        threads = torch.get_num_threads()
    if wanted == "cuda" and not found:
        raise RuntimeError(f"{backend} sees no CUDA device here")
    return {"name": name, "threads": threads}


def describe(error):
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
