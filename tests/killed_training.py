"""Training runs that are killed, each in a process of its own.

`python killed_training.py EPOCHS` imports Keras once and then forks a process
for every run that it reads from its input: lines of `folder results`. It
answers with the process id, and with how the process ended once it did.
"""

import os
import sys

# A child starts the backend's threads itself: none may run at the fork.
import keras
import saved_models

import keras_lora_dropout as kld

STEPS = 4  # in each epoch


class Progress(keras.callbacks.Callback):
    """Appends a byte for each step, for the parent to count."""

    def __init__(self, path):
        super().__init__()
        self.file = open(path, "ab", buffering=0)

    def on_train_batch_end(self, batch, logs=None):
        self.file.write(b".")


def run(epochs, folder, results):
    keras.utils.set_random_seed(3)
    model = saved_models.compiled(
        saved_models.enabled(
            saved_models.functional, rank_budget=kld.RankBudget(1)
        )
    )
    saved_models.train(
        model,
        int(epochs),
        callbacks=[
            keras.callbacks.BackupAndRestore(f"{folder}/backup"),
            keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
            Progress(f"{folder}/progress"),
        ],
    )
    model.save_weights(results)


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(sys.argv[1], *line.split())
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
