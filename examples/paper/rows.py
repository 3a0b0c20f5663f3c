"""What a row of each data set holds, and the check of one."""

import dataclasses

import numpy as np

GLUE_SPLITS = ("train", "validation", "test")
MNLI_SPLITS = (
    "train",
    "validation_matched",
    "validation_mismatched",
    "test_matched",
    "test_mismatched",
)
SCORES = (0.0, 5.0)
HIDDEN = -1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Fields as TFDS names them, classes and splits.

    Attributes:
        texts: Names of the fields that hold a string, which says something.
        others: Names of the other fields, and their kind, a key of `KINDS`.
        classes: Names of the labels 0, 1, ...; none for scores and answers.
        splits: Names of the splits.
        in_tfds: Whether TFDS has it.
    """

    texts: tuple
    others: dict
    classes: tuple = ()
    splits: tuple = GLUE_SPLITS
    in_tfds: bool = True

    @property
    def fields(self):
        """Each name with its kind."""
        return dict.fromkeys(self.texts, "text") | self.others


def _classes(texts, classes, splits=GLUE_SPLITS):
    others = {"label": "label", "idx": "count"}
    return Dataset(tuple(texts), others, tuple(classes), splits)


PAIR = ("sentence1", "sentence2")
SQUAD = ("id", "title", "context", "question")
SQUAD_SPLITS = ("train", "validation")
ENTAILED = ("entailment", "not_entailment")
DATASETS = {
    "glue/mrpc": _classes(PAIR, ["not_equivalent", "equivalent"]),
    "glue/cola": _classes(["sentence"], ["unacceptable", "acceptable"]),
    "glue/sst2": _classes(["sentence"], ["negative", "positive"]),
    "glue/mnli": _classes(
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        MNLI_SPLITS,
    ),
    "glue/rte": _classes(PAIR, ENTAILED),
    "glue/qnli": _classes(["question", "sentence"], ENTAILED),
    "glue/qqp": _classes(
        ["question1", "question2"], ["not_duplicate", "duplicate"]
    ),
    "glue/stsb": Dataset(PAIR, {"label": "score", "idx": "count"}),
    "squad/v1.1": Dataset(SQUAD, {"answers": "answers"}, (), SQUAD_SPLITS),
    # TFDS has `plausible_answers`, too: nobody trains or scores with them.
    "squad/v2.0": Dataset(
        SQUAD, {"is_impossible": "flag", "answers": "answers"}, (), SQUAD_SPLITS
    ),
    "alpaca_cleaned": Dataset(
        ("instruction",),
        {"input": "text", "output": "text"},
        (),
        ("train",),
        in_tfds=False,
    ),
    "mmlu": Dataset(
        ("subject", "question"),
        {"choices": "choices", "answer": "answer"},
        tuple("ABCD"),
        ("dev", "validation", "test"),
        in_tfds=False,
    ),
}


def checked(row, dataset, place):
    """Return a row's fields in Python's own types; leave out any others.

    Args:
        row: Dict of field name -> value. Strings may be bytes.
        dataset: Key of `DATASETS`.
        place: String that tells where the row stands.

    Raises:
        ValueError: If a field is missing, of another type, or out of range.
    """
    about = DATASETS[dataset]
    missing = [name for name in about.fields if name not in row]
    if missing:
        raise ValueError(
            f"{place} has no field {_listed(missing)}; it has {_listed(row)}. "
            f"A row of {dataset} must have {_listed(about.fields)}."
        )
    result = {}
    try:
        for name, kind in about.fields.items():
            result[name] = KINDS[kind](row[name], about)
        if "answers" in about.fields:
            _check_answers(result)
    except ValueError as error:
        raise ValueError(f'{place}: field "{name}" {error}') from None
    return result


def _text(value, about=None):
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # JSON's "\ud800" is half a character.
            return value
    except UnicodeError as error:
        raise ValueError(
            f"holds text that is not Unicode ({error}). Write it as UTF-8 anew."
        ) from None
    raise ValueError(f"is {_shown(value)}. It must be a string.")


def _count(value, about=None):
    if type(value) is not int or value < 0:
        raise ValueError(f"is {_shown(value)}. It must be an integer >= 0.")
    return value


def _flag(value, about=None):
    if type(value) is not bool:
        raise ValueError(f"is {_shown(value)}. It must be true or false.")
    return value


def _label(value, about):
    _refuse_hidden(value)
    if type(value) is not int or value not in range(len(about.classes)):
        allowed = [f"{n} ({name})" for n, name in enumerate(about.classes)]
        raise ValueError(
            f"is {_shown(value)}. It must be one of the integers "
            f"{', '.join(allowed)}; look for a mixed-up column or data set."
        )
    return value


def _score(value, about):
    _refuse_hidden(value)
    low, high = SCORES
    # No comparison with NaN holds.
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(
            f"is {_shown(value)}. It must be a number from {low} to {high}: "
            "give it unscaled, and leave out rows that have none."
        )
    # TFDS stores 3.8 as a float32, which is 3.79999995.
    return float(str(np.float32(value)))


def _refuse_hidden(value):
    if type(value) in (int, float) and value == HIDDEN:
        raise ValueError(
            f"is {HIDDEN}, which stands for a hidden label: GLUE does not "
            "publish those of its test splits. Take the validation split."
        )


def _answers(value, about):
    lists = ("text", "answer_start")
    if not isinstance(value, dict) or not all(
        isinstance(value.get(name), list) for name in lists
    ):
        raise ValueError(
            f"is {_shown(value)}. It must be an object of two lists, "
            '{"text": ["..."], "answer_start": [0]}.'
        )
    result = {}
    for name, kind in zip(lists, (_text, _count), strict=True):
        result[name] = []
        for number, item in enumerate(value[name]):
            try:
                result[name].append(kind(item))
            except ValueError as error:
                raise ValueError(
                    f"has {name}[{number}], which {error}"
                ) from None
    texts, starts = (len(result[name]) for name in lists)
    if texts != starts:
        raise ValueError(
            f"has {texts} in its list text, but {starts} in answer_start. Each "
            "answer must have one of both."
        )
    return result


def _choices(value, about):
    count = len(about.classes)
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(
            f"is {_shown(value)}. It must be a list of {count} strings."
        )
    try:
        return [_text(item) for item in value]
    except ValueError as error:
        raise ValueError(f"has a choice that {error}") from None


def _answer(value, about):
    letters = ", ".join(f"{n} ({name})" for n, name in enumerate(about.classes))
    if type(value) is not int or value not in range(len(about.classes)):
        raise ValueError(f"is {_shown(value)}. It must be one of {letters}.")
    return value


def _check_answers(row):
    """Check that answers are there if they must be, and where they stand."""
    answers, context = row["answers"], row["context"]
    impossible = row.get("is_impossible", False)
    if bool(answers["text"]) == impossible:
        found = len(answers["text"]) or "no"
        allowed = "have none" if impossible else "have one at least"
        rule = f", as is_impossible is {impossible}" * ("is_impossible" in row)
        hint = " Unanswerable questions are those of squad/v2.0." * (not rule)
        raise ValueError(f"has {found} answers. It must {allowed}{rule}.{hint}")
    for number, (text, start) in enumerate(zip(*answers.values(), strict=True)):
        found = context[start : start + len(text)]
        if not text or found != text:
            elsewhere = context.find(text) if text else -1
            hint = (
                f"It stands at {elsewhere}"
                if elsewhere >= 0
                else "The context does not hold it"
            )
            raise ValueError(
                f"has answer {number}, {_shown(text)}, which does not stand at "
                f"its answer_start {start}: there the context has "
                f"{_shown(found)}. {hint}; offsets count characters, not bytes."
            )


def _shown(value):
    """A short form of a value, with what it is."""
    text = repr(value)
    if len(text) > 60:
        text = f"{text[:57]}..."
    if value is None or value != value:
        return text
    return f"{text} ({type(value).__name__})"


def _listed(names):
    return ", ".join(f'"{name}"' for name in names) or "none"


KINDS = {
    "text": _text,
    "count": _count,
    "flag": _flag,
    "label": _label,
    "score": _score,
    "answers": _answers,
    "choices": _choices,
    "answer": _answer,
}
