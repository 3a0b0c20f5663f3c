"""A line that says what a long run is doing, and for how long it will."""

import sys
import time

# Seconds between two lines where one line cannot be written over.
INTERVAL = 15


class Progress:
    """Counts the samples of a run.

    Args:
        total: Number of samples that are planned.
        stream: Where to write; a terminal sees one line that changes.
    """

    def __init__(self, total, stream=sys.stderr):
        self._total = total
        self._done = 0
        self._seconds = 0.0
        self._stream = stream
        self._last = 0.0
        self._width = 0

    def tell(self, text):
        """Say what goes on."""
        now = time.monotonic()
        if self._stream.isatty():
            line = f"{self._done}/{self._total} samples  {text}"
            padding = " " * max(0, self._width - len(line))
            print(f"\r{line}{padding}", end="", file=self._stream, flush=True)
            self._width = len(line)
        elif now - self._last > INTERVAL:
            print(
                f"{self._done}/{self._total} samples  {text}", file=self._stream
            )
            self._stream.flush()
            self._last = now

    def sample(self, name, milliseconds):
        """Count a sample and say how long the rest will take."""
        self._done += 1
        self._seconds += milliseconds / 1000
        left = self._seconds / self._done * max(0, self._total - self._done)
        self.tell(f"{name}: {milliseconds:.0f} ms; {left / 60:.0f} min left")

    def end(self):
        if self._stream.isatty():
            print(file=self._stream)
