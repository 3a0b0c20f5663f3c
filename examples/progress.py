"""A line that says what a long run is doing, and for how long it will."""

import sys
import time

# Seconds between two lines where one line cannot be written over.
INTERVAL = 15


class Progress:
    """Counts the work of a run and says how long the rest will take.

    Args:
        total: Number. All the work, in any unit.
        unit: String. The unit; `None` shows the share that is done instead.
        stream: Where to write; a terminal sees one line that changes.
    """

    def __init__(self, total, unit=None, stream=sys.stderr):
        self._total = total
        self._unit = unit
        self._stream = stream
        self._done = 0
        self._seconds = 0.0
        self._started = time.monotonic()
        self._last = 0.0
        self._width = 0

    def tell(self, text):
        """Say what goes on."""
        now = time.monotonic()
        line = f"{self._share()}  {text}"
        if self._stream.isatty():
            padding = " " * max(0, self._width - len(line))
            print(f"\r{line}{padding}", end="", file=self._stream, flush=True)
            self._width = len(line)
        elif now - self._last > INTERVAL:
            print(line, file=self._stream, flush=True)
            self._last = now

    def advance(self, work, text, seconds=None):
        """Count work that was done.

        Args:
            work: Number, in the unit of the total.
            text: String that says what it was.
            seconds: What it took; by default the time since the start is what
                all so far took.
        """
        self._done += work
        if seconds is None:
            self._seconds = time.monotonic() - self._started
        else:
            self._seconds += seconds
        rest = max(0, self._total - self._done)
        left = self._seconds / self._done * rest
        self.tell(f"{text}; {left / 60:.0f} min left")

    def end(self):
        if self._stream.isatty():
            print(file=self._stream)

    def _share(self):
        if self._unit is None:
            return f"{self._done / self._total:.0%}"
        return f"{self._done}/{self._total} {self._unit}"
