"""What a run keeps in its folder, so that it can go on."""

import json
import time

from keras_lora_dropout.storage.atomic import write_atomically


def check_settings(folder, settings, another="--output"):
    """Refuse to mix results of several settings in a folder.

    Args:
        folder: Path of the folder, which gets them if it has none yet.
        settings: Dictionary of all that a result depends on.
        another: The option that names another folder.
    """
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        other = [k for k in settings if settings[k] != before.get(k)]
        if other:
            raise SystemExit(
                f"{folder} holds results of other settings: "
                + ", ".join(
                    f"{k} was {before.get(k)!r}, now {settings[k]!r}"
                    for k in other
                )
                + f". Pass another {another}, or delete that folder."
            )
        return
    write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


class Journal:
    """Keeps what the epochs gave, the weights after the last, and the scores.

    Args:
        model: The compiled model; it gets the weights of an interrupted run.
        folder: Path of the run's own folder.
        seconds: Float. Entries that come sooner after the last ones that were
            kept are not kept at once.

    Attributes:
        entries: List of dictionaries, one for each epoch.
    """

    def __init__(self, model, folder, seconds=0.0):
        self._model, self._folder, self._seconds = model, folder, seconds
        self._path = folder / "epochs.json"
        self._started = self._saved = time.monotonic()
        self._scores_path = folder / "scores.json"
        self._scores, self.entries = {}, []
        if self._scores_path.exists():
            self._scores = json.loads(self._scores_path.read_text())
        if self._path.exists():
            self.entries = json.loads(self._path.read_text())
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self._weights(len(self.entries)))
        self._kept = len(self.entries)

    def add(self, entry):
        self.entries.append(entry)
        if time.monotonic() - self._saved >= self._seconds:
            self._save()

    def close(self):
        """Keep all epochs, if they took longer than an entry has to."""
        took = time.monotonic() - self._started
        if self._kept < len(self.entries) and took >= self._seconds:
            self._save()

    def score(self, name, compute):
        """Return what an interrupted run computed, or compute it.

        It is kept if the epochs before it all are.

        Args:
            name: String.
            compute: Function without arguments that returns a dictionary.
        """
        if name not in self._scores:
            self._scores[name] = compute()
            if self._kept == len(self.entries):
                content = json.dumps(self._scores, indent=1) + "\n"
                write_atomically(self._scores_path, content.encode())
        return self._scores[name]

    def _save(self):
        count = len(self.entries)
        self._model.save_weights(self._weights(count))
        # From here on a run that starts anew finds this epoch's weights.
        content = json.dumps(self.entries, indent=1) + "\n"
        write_atomically(self._path, content.encode())
        for path in self._folder.glob("*.weights.h5"):
            if path != self._weights(count):
                path.unlink()
        self._saved = time.monotonic()
        self._kept = count

    def _weights(self, count):
        return self._folder / f"after-{count}.weights.h5"
