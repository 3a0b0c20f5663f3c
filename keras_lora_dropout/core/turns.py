"""Threads that use one model take turns."""

import contextlib
import functools
import logging
import threading
import weakref

logger = logging.getLogger("keras_lora_dropout")

_PATIENCE = 60.0  # Seconds until a thread that waits says so.

# Beside the models: a lock can be neither copied nor saved.
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_making_locks = threading.Lock()


@contextlib.contextmanager
def turn_of(model):
    """Context in which no other thread uses a model.

    It can be entered again inside, as when a callback of `fit` predicts.
    """
    with _making_locks:
        lock = _locks.setdefault(model, threading.RLock())
    if not lock.acquire(timeout=_PATIENCE):
        logger.warning(
            'Thread "%s" waits until another one is done with model %r. If the '
            "other one waits for this one, as when data that `fit` reads is "
            "predicted in a thread of its own, both wait for ever: predict "
            "with a copy of the model there.",
            threading.current_thread().name,
            model.name,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def in_turn(method):
    """Wrap a method of a model so that threads call it one after another."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with turn_of(self):
            return method(self, *args, **kwargs)

    return wrapped
