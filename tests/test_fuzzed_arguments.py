"""Whatever a public name is given, it works or says what was wrong."""

import inspect

import fuzzed_calls
import fuzzed_methods
import fuzzed_texts
import fuzzing
import keras
import pytest
import test_documents
from hypothesis import given
from hypothesis import strategies as st

import keras_lora_dropout as kld
from keras_lora_dropout.core import validation

OF_NONE = {**fuzzed_calls.CALLS, **fuzzed_texts.CALLS}
CALLS = {**OF_NONE, **fuzzed_methods.CALLS}
# What only holds results, so that nobody gives it arguments of their own.
RESULTS = {"AnswerScores", "AnswerWindows", "EnsembleGain", "ResponseData"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Possible (nested set|set)"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", OF_NONE)
def test_a_call_works_or_says_what_was_received(name, fuzzed_cases):
    fuzzed_cases += drive_call(OF_NONE[name], fuzzing.OF_NONE)


@fuzzing.ONE_BACKEND
@pytest.mark.parametrize("name", fuzzed_methods.CALLS)
def test_a_call_leaves_the_model_as_it_was_if_it_fails(name, fuzzed_cases):
    fuzzed_cases += drive_call(fuzzed_methods.CALLS[name], fuzzing.OF_MODELS)


def drive_call(call, factor):
    driver = fuzzing.Driver(call)

    @fuzzing.cases(call.count, factor)
    @given(st.data())
    def drive(data):
        driver.drive(data)

    drive()
    assert driver.outcomes["works"]
    assert driver.outcomes["refused"]
    return driver.outcomes


def arguments_of(function):
    """Names of the arguments that a function says it takes."""
    kinds = inspect.Parameter
    return {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    }


@pytest.mark.parametrize("name", sorted(set(test_documents.PUBLIC) - RESULTS))
def test_every_argument_of_every_public_name_is_driven(name):
    subjects = {"model", "backbone"}
    wanted = arguments_of(test_documents.PUBLIC[name]) - subjects
    assert wanted <= set(CALLS[name].arguments)


def methods():
    """The methods with arguments that models gain, but not Keras's own."""
    model = kld.LoRADropoutModel
    for name in sorted(set(dir(model)) - set(dir(keras.Model))):
        method = inspect.getattr_static(model, name)
        if not name.startswith("_") and inspect.isfunction(method):
            if arguments_of(method) != {"self"}:
                yield name


@pytest.mark.parametrize("name", list(methods()))
def test_every_argument_of_every_method_is_driven(name):
    method = getattr(kld.LoRADropoutModel, name)
    assert arguments_of(method) - {"self"} <= set(CALLS[name].arguments)


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), [10**5000]],
    ids=["large", "small", "inside"],
)
def test_numbers_that_python_does_not_print(value):
    checks = {
        "rank": lambda: validation.positive_integer("rank", value),
        "alpha": lambda: validation.alpha(value, 1),
        "seed": lambda: validation.seed(value),
        "dropout_rate": lambda: validation.dropout_rate(value),
        "weight": lambda: validation.number("weight", value, "above 0", 0),
        "rescale": lambda: validation.boolean("rescale", value),
        "kind": lambda: validation.word("kind", value, ("a", "b")),
    }
    for name, check in checks.items():
        with pytest.raises((ValueError, TypeError), match=f"Received: {name}="):
            check()
