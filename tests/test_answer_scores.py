"""SQuAD's scores: by hand, and as another public implementation has them."""

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from keras_lora_dropout.question_answering.scores import normalize_answer
from keras_lora_dropout.question_answering.scores import score_answers

WORDS = st.sampled_from(
    [
        "the",
        "An",
        "a",
        "Denver",
        "denver",
        "Broncos,",
        "1,000",
        "don't",
        "\u2013",
        "é",
    ]
)
ANSWER = st.lists(WORDS, max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100, 100),
        ("the denver  broncos.", ["Denver Broncos"], 100, 100),
        # Two of three words, and both of two: 2 * 2 / (3 + 2).
        ("Denver Broncos team", ["Denver Broncos"], 0, 80),
        # The best accepted answer counts, for each score by itself.
        ("Broncos", ["Denver Broncos", "broncos"], 100, 100),
        ("Carolina", ["Denver Broncos"], 0, 0),
        # A word counts as often as both have it.
        ("no no no", ["no no"], 0, 80),
        # An article inside a word, and one between hyphens, are none.
        ("theatre", ["atre"], 0, 0),
        ("", [], 100, 100),
        ("Broncos", [], 0, 0),
        ("", ["Broncos"], 0, 0),
        # What is left of it is nothing: the question has no answer.
        ("", ["the"], 100, 100),
    ],
)
def test_by_hand(prediction, answers, exact, f1):
    found = score_answers([prediction], [answers])
    assert (found.exact_match, found.f1, found.count) == (exact, f1, 1)


def test_mean_over_questions():
    found = score_answers(["a b", "c", "x"], [["b"], ["c d"], ["y"]])
    assert found.exact_match == pytest.approx(100 / 3)
    assert found.f1 == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert found.count == 3


@given(
    st.lists(
        st.tuples(
            ANSWER,
            st.lists(ANSWER.filter(normalize_answer), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_as_torchmetrics_has_them(questions):
    predictions, accepted = zip(*questions, strict=True)
    expected = squad(
        [
            {"prediction_text": text, "id": str(n)}
            for n, text in enumerate(predictions)
        ],
        [
            {
                "answers": {"answer_start": [0] * len(texts), "text": texts},
                "id": str(n),
            }
            for n, texts in enumerate(accepted)
        ],
    )
    found = score_answers(predictions, accepted)
    assert found.exact_match == pytest.approx(float(expected["exact_match"]))
    assert found.f1 == pytest.approx(float(expected["f1"]), rel=1e-5)


@given(ANSWER)
def test_normalizing_twice_changes_nothing(text):
    once = normalize_answer(text)
    assert normalize_answer(once) == once


@pytest.mark.parametrize(
    ("predictions", "accepted", "error", "message"),
    [
        ([], [], ValueError, "0 predictions, 0 lists"),
        (["a"], [["a"], ["b"]], ValueError, "1 predictions, 2 lists"),
        ([None], [["a"]], TypeError, r"None \(of type NoneType\) .*question 0"),
        (["a", "b"], [["a"], "b"], TypeError, "list of strings.*question 1"),
        (["a"], [[3]], TypeError, "list of strings"),
    ],
)
def test_wrong_input(predictions, accepted, error, message):
    with pytest.raises(error, match=message):
        score_answers(predictions, accepted)
