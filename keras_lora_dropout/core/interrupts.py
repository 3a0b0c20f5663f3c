"""Ctrl-C waits for the end of a step: a step is done, or was not begun."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def interrupts_held():
    """Context that hands on an interrupt (SIGINT) at its end.

    A second one is not held: whoever presses Ctrl-C twice will not wait.
    Outside of the main thread, where Python delivers no signals, and where the
    program ignores interrupts, it does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(previous):
        yield
        return
    held = []

    def hold(*received):
        if held:
            held.clear()
            previous(*received)
        else:
            held.append(received)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])
