"""What was measured, in a file that is whole at any moment."""

import json
import os
import pathlib
import re

from children import shorten


class Results:
    """Samples by contender and action, and what they were taken with.

    Args:
        path: The JSON file.
        settings: Dict of what was asked for, and on which machine.
        planned: Dict from each `Contender` to the actions to measure.

    Attributes:
        content: What is in the file. Each of its `results` is one action of
            one contender: `ms` are its samples, in the order of the rounds, so
            that samples of equal index are neighbours in time.
    """

    def __init__(self, path, settings, planned):
        self._path = pathlib.Path(path)
        self.content = {
            **settings,
            "finished": False,
            "versions": {},
            "devices": {},
            "contenders": [
                {
                    "backend": contender.backend,
                    "contender": contender.key,
                    "label": contender.entry.label,
                    "options": contender.entry.options,
                    "trainable_weights": None,
                }
                for contender in planned
            ],
            "results": [
                {
                    "backend": contender.backend,
                    "contender": contender.key,
                    "action": action,
                    "failed": None,
                    "memory": None,
                    "ms": [],
                }
                for contender, actions in planned.items()
                for action in actions
            ],
        }

    def ready(self, contender, report):
        """Take in what a contender said when it was ready."""
        self.content["versions"][contender.backend] = report["versions"]
        self.content["devices"][contender.backend] = report["device"]
        for about in self._of(contender, "contenders"):
            about["trainable_weights"] = report["trainable_weights"]
        for row in self._of(contender, "results"):
            action = row["action"]
            row["memory"] = row["memory"] or report["memory"].get(action)
            if action in report["failures"]:
                row["failed"] = shorten(report["failures"][action])

    def fail(self, contender, reason):
        """Note why a contender cannot go on; its samples are kept."""
        for row in self._of(contender, "results"):
            if len(row["ms"]) < self.content["repeats"]:
                row["failed"] = row["failed"] or shorten(reason)

    def add(self, contender, action, milliseconds):
        for row in self._of(contender, "results"):
            if row["action"] == action:
                row["ms"].append(round(milliseconds, 3))

    def has_failed(self, contender):
        """Whether none of a contender's actions can be measured."""
        return all(row["failed"] for row in self._of(contender, "results"))

    def save(self, finished=False):
        """Write all so far: a kill leaves the file of before, or this one."""
        self.content["finished"] = finished
        text = json.dumps(self.content, indent=1)
        # Samples stand on one line.
        text = re.sub(r"\[[\d\s.,]+\]", lambda m: " ".join(m[0].split()), text)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with open(temporary, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)

    def _of(self, contender, part):
        wanted = contender.backend, contender.key
        for row in self.content[part]:
            if (row["backend"], row["contender"]) == wanted:
                yield row
