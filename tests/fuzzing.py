"""Odd values, and what holds of a call whatever it is given.

A call either works, and then does what it says, or raises a documented error
that says what was received, and then nothing has changed.
"""

import collections
import dataclasses
import decimal
import fractions
import numbers
import os

import keras
import numpy as np
import pytest
from helpers import BACKEND
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st

from keras_lora_dropout.conversion import adapter_state
from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import descendants

# Some 5,000 cases in all; in `make test-all` 100,000 on torch, of which about
# 85,000 need no model, and 15,000 a model or files.
ALL = bool(os.environ.get("ALL_MODELS"))
OF_MODELS, OF_NONE = (6, 32) if ALL and BACKEND == "torch" else (1, 1)
# What a model is given is checked by the same code on every backend, and most
# of the time would go into compiling.
ONE_BACKEND = pytest.mark.skipif(
    BACKEND != "torch" and not ALL,
    reason="`make test-all` runs it on every backend, others on torch alone",
)

NAN, INFINITY = float("nan"), float("inf")
NUMBERS = [
    *(0, 1, 2, 3, 7, -1, 2**31, 2**63, -(2**63), 10**30, 10**400, -(10**400)),
    *(True, False, 0.0, -0.0, 1.0, 2.0, 0.5, -0.5, 0.1, NAN, INFINITY),
    *(-INFINITY, 5e-324, 1e-45, 1e-30, 1e30, 1e39, 1.7e308, 1 - 2**-53, 1j),
    fractions.Fraction(1, 3),
    fractions.Fraction(10**400 - 1, 10**400),
    decimal.Decimal("0.5"),
    *(np.int8(3), np.int64(2), np.uint64(2**64 - 1), np.bool_(True)),
    *(np.float16(0.5), np.float32(0.25), np.float64(0.5), np.float32(NAN)),
    *(np.longdouble(0.5), np.complex64(1), np.datetime64("2024-01-01")),
]
ARRAYS = [
    *(np.array(2), np.array(0.5), np.array([2]), np.array([[0.5, 0.5]])),
    *(np.array([]), np.zeros((0, 6)), np.zeros((2, 0)), np.array("2")),
    *(np.array([None]), np.array([1, "a"]), np.ones((2, 3, 4), "float16")),
    *(np.full((3,), NAN), np.array([INFINITY, 0.0]), np.array([True, False])),
    *(np.arange(6, dtype="uint8"), np.array([1j, 2.0])),
]
TEXTS = [
    *("", " ", "2", "0.5", "nan", "None", "True", "batch", "output", "head"),
    *("first", "last 2", "last 0", "first 9" + 5000 * "9", "é", "\0", "\ud800"),
    *("(", "a{99999999999}", 3000 * "(", "(?i)first", ".*", "\\", 5000 * "x"),
]
OBJECTS = [
    *(None, (), [], {}, set(), [2], (0.5,), [[1, 2], [3]], [None], ["first"]),
    *({"first": 2}, {2: 2}, {"first": None}, {"first": {"first": 1}}, range(2)),
    *(range(10**12), object(), object, lambda *arguments: True, b"2", ...),
    *(iter([1]), NotImplemented, dataclasses, slice(2)),
]
# Any value that a caller might pass by mistake.
ODD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(NUMBERS + ARRAYS + TEXTS + OBJECTS),
    st.deferred(lambda: st.just(keras.ops.convert_to_tensor([2.0, 1.0]))),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.recursive(
        st.one_of(st.none(), st.integers(-9, 9), st.floats(), st.text("ab/(")),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text("ab/(", max_size=2), inner, max_size=3),
        ),
        max_leaves=4,
    ),
)


def _stays_here(value):
    text = os.fsdecode(value) if isinstance(value, (str, bytes)) else ""
    return "/" not in text and ".." not in text


# The same for paths, which must not lead out of the working directory.
ODD_PATHS = ODD.filter(_stays_here)


def _is_quick(value):
    is_integer = isinstance(value, numbers.Integral)
    return not is_integer or not 8 < value <= validation.MAX_SAMPLES


# The same for numbers of instances: many are allowed, and take their time.
ODD_COUNTS = ODD.filter(_is_quick)


def cases(count, factor=OF_MODELS):
    """Settings of a test that has so many cases, or more in `test-all`."""
    return settings(
        max_examples=count * factor,
        deadline=None,
        database=None,
        derandomize=not ALL,
        suppress_health_check=list(HealthCheck),
    )


def one_of(*values):
    return st.sampled_from(values)


@dataclasses.dataclass(frozen=True)
class Call:
    """A public function or method, and what to drive it with.

    Attributes:
        function: Takes the subject, if there is one, and the arguments.
        arguments: Dictionary of name -> strategy of values that are allowed.
        check: Asserts what holds of `(result, arguments)`; with a subject,
            of `(result, subject, arguments)`.
        subject: Function that builds what the call acts on, or `None`.
        errors: Documented errors besides `ValueError` and `TypeError`.
        keras: Names of arguments that Keras alone looks at: what it makes of
            odd ones is not ours, but the model stays as it is then, too.
        odd: Dictionary of name -> strategy in the place of `ODD`.
        count: Number of cases, without `ALL_MODELS`.
    """

    function: collections.abc.Callable
    arguments: dict
    check: collections.abc.Callable = lambda *_: None
    subject: collections.abc.Callable | None = None
    errors: tuple = ()
    keras: tuple = ()
    odd: dict = dataclasses.field(default_factory=dict)
    count: int = 60


_ODD_OF = {"num_samples": ODD_COUNTS, "instances": ODD_COUNTS}


class Driver:
    """Makes a call again and again, on one subject as long as it can."""

    def __init__(self, call):
        self.call = call
        self.outcomes = collections.Counter()
        self._subject = self._before = None

    def drive(self, data):
        """Draw arguments, up to three of them odd, and make the call."""
        call = self.call
        names = sorted(call.arguments)
        spoiled = data.draw(st.sets(st.sampled_from(names), max_size=3))
        arguments = {
            name: data.draw(
                call.odd.get(name, _ODD_OF.get(name, ODD))
                if name in spoiled
                else allowed,
                label=name,
            )
            for name, allowed in call.arguments.items()
        }
        self.make(arguments, spoiled)

    def make(self, arguments, spoiled=()):
        call = self.call
        if call.subject is not None and self._subject is None:
            self._subject = call.subject()
            self._before = state_of(self._subject)
        before = global_state()
        acts_on = [] if call.subject is None else [self._subject]
        try:
            result = call.function(*acts_on, **arguments)
        except Exception as error:
            if not set(spoiled) & set(call.keras):
                self._check_error(error, arguments)
            assert_same_state(global_state(), before)
            if acts_on:
                assert_same_state(state_of(self._subject), self._before)
            self.outcomes["refused"] += 1
            return
        call.check(result, *acts_on, arguments)
        self.outcomes["works"] += 1
        if acts_on:
            try:
                assert_same_state(state_of(self._subject), self._before)
            except (AssertionError, AttributeError):
                self._subject = None  # It did what it was called for.

    def _check_error(self, error, arguments):
        if isinstance(error, self.call.errors):
            return
        if not isinstance(error, (ValueError, TypeError)):
            raise error
        message = str(error)
        told = [v for v in arguments.values() if isinstance(v, str)]
        told = [text for text in told if len(text) > 2]
        # What Python says of paths will do, too.
        told += [f"{name}=" for name in arguments]
        told += ["eceived", "os.PathLike", "null byte", '" holds']
        told += ["surrogates not allowed"]
        assert any(part in message for part in told), error
        assert len(message) < 6000


def state_of(subject):
    """All that a call could change in a model, or in another object."""
    if not isinstance(subject, keras.Model):
        return _plain_attributes(subject)
    if isinstance(subject, AdaptedModel):
        subject._find_mask_plan()  # It is made once, at first use.
    parts = [subject, *descendants(subject)]
    optimizer = getattr(subject, "optimizer", None)
    metrics = {id(v) for v in subject.metrics_variables}
    variables = [v for v in subject.variables if id(v) not in metrics]
    variables += [] if optimizer is None else optimizer.variables
    state = {
        "classes": [type(part) for part in parts],
        **{
            f"attributes of {number} {part.name}": _plain_attributes(part)
            for number, part in enumerate(parts)
        },
        "trainable": [part.trainable for part in parts],
        "variables": [id(v) for v in variables],
        "flags": [v.trainable for v in variables],
        "values": [adapter_state.array_of(v).tobytes() for v in variables],
        "compiled": (subject.compiled, id(optimizer)),
    }
    if isinstance(subject, AdaptedModel):
        state |= {
            "settings": subject.lora_dropout,
            "budget": subject.rank_budget,
            "drops": subject.transformer_dropout,
            "random": subject._ensemble_state.random.getstate(),
            "adapters": {
                name: (
                    state.settings,
                    {n: t.tobytes() for n, t in state.tensors.items()},
                )
                for name, state in subject._inactive_adapters.items()
            },
        }
    return state


def _plain_attributes(part):
    kinds = (str, int, float, type(None), tuple, frozenset)
    # Where Keras puts weights while it trains or predicts on JAX.
    passing = "_jax_state", "_jax_state_synced"
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, kinds) and name not in passing
    }


def global_state():
    """What a call could leave behind in the process."""
    import matplotlib.pyplot as plt

    name, keys, *rest = np.random.get_state()
    return {
        "numpy": (name, keys.tobytes(), *rest),
        "floatx": keras.config.floatx(),
        "policy": keras.config.dtype_policy().name,
        "figures": plt.get_fignums(),
    }


def assert_same_state(now, before):
    """Assert that two states are equal, and name what is not."""
    assert now.keys() == before.keys()
    different = [name for name in before if now[name] != before[name]]
    assert not different, {n: (before[n], now[n]) for n in different}
