"""Layers whose inputs are seen from outside: a model's representations."""

import contextlib
import threading

from keras_lora_dropout.core.mixed_classes import LayerMixin

_state = threading.local()


class RecordedInputs(LayerMixin):
    """Mixin of a layer: its inputs are kept where `recorded_inputs` asks."""

    def __call__(self, inputs, *args, **kwargs):
        record = getattr(_state, "record", None)
        if record is not None:
            record.append(inputs)
        return super().__call__(inputs, *args, **kwargs)


@contextlib.contextmanager
def recorded_inputs():
    """Context that yields a list, which gains the inputs of each call."""
    outer = getattr(_state, "record", None)
    _state.record = []
    try:
        yield _state.record
    finally:
        _state.record = outer
