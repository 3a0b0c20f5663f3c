"""The questions of MMLU as prompts, and the subjects in groups."""

LETTERS = "ABCD"
_GROUPS = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry "
        "college_computer_science college_mathematics college_physics "
        "computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry "
        "high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "Social": (
        "econometrics high_school_geography "
        "high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality "
        "professional_psychology public_relations security_studies sociology "
        "us_foreign_policy"
    ),
    "Humanities": (
        "formal_logic high_school_european_history high_school_us_history "
        "high_school_world_history international_law jurisprudence "
        "logical_fallacies moral_disputes moral_scenarios philosophy "
        "prehistory professional_law world_religions"
    ),
    "Other": (
        "anatomy business_ethics clinical_knowledge college_medicine "
        "global_facts human_aging management marketing medical_genetics "
        "miscellaneous nutrition professional_accounting "
        "professional_medicine virology"
    ),
}
GROUPS = {name: tuple(words.split()) for name, words in _GROUPS.items()}
GROUP_OF = {
    subject: name for name, subjects in GROUPS.items() for subject in subjects
}


def prompt_of(row, shots=()):
    """Write a question as MMLU's own program does.

    Args:
        row: Dictionary of `subject`, `question`, `choices`.
        shots: Rows of the same subject, with their answers.

    Returns:
        String that ends in "Answer:"; " A" would come next.
    """
    subject = row["subject"].replace("_", " ")
    title = (
        "The following are multiple choice questions (with answers) about "
        f"{subject}.\n\n"
    )
    answered = [
        f"{_question(shot)} {LETTERS[shot['answer']]}\n\n" for shot in shots
    ]
    return "".join([title, *answered, _question(row)])


def _question(row):
    choices = [
        f"{letter}. {choice}"
        for letter, choice in zip(LETTERS, row["choices"], strict=True)
    ]
    return "\n".join([row["question"], *choices, "Answer:"])


class PromptTokens:
    """Tokens of prompts, and of the letters that may follow them.

    Args:
        tokenizer: A KerasHub tokenizer.
        max_length: Integer. The most tokens of a prompt. Worked examples are
            left out until it fits, the last of them first, and then the
            question loses its beginning.

    Attributes:
        letters: List of four token ids.

    Raises:
        ValueError: If the letters are not four tokens.
    """

    def __init__(self, tokenizer, max_length):
        self._tokenizer = tokenizer
        self._max_length = max_length
        start = getattr(tokenizer, "start_token_id", None)
        self._start = [] if start is None else [start]
        found = [_letters(tokenizer, gap) for gap in (" ", "")]
        if not any(found):
            raise ValueError(
                f"The vocabulary has no tokens of their own for {LETTERS}, "
                'neither after "Answer: " nor after "Answer:".'
            )
        self._space, self.letters = next(pair for pair in found if pair)

    def of(self, row, shots=()):
        """Return the ids of a prompt, and whether all of it is there."""
        for count in range(len(shots), -1, -1):
            text = prompt_of(row, shots[:count])
            ids = [*_ids(self._tokenizer, text), *self._space]
            room = self._max_length - len(self._start)
            if len(ids) <= room:
                return self._start + ids, count == len(shots)
        return self._start + ids[-room:], False


def _letters(tokenizer, gap):
    """Find the tokens of the letters after "Answer:" and a gap.

    Returns:
        Tuple of the tokens of the gap itself and those of the letters; `None`
        where these are not one token each, after equal ones.
    """
    before = _ids(tokenizer, "Answer:")
    ends = [_ids(tokenizer, f"Answer:{gap}{letter}") for letter in LETTERS]
    begins = {tuple(end[:-1]) for end in ends}
    letters = [end[-1] for end in ends]
    if len(begins) > 1 or len(set(letters)) < len(LETTERS):
        return None
    (begin,) = begins
    if list(begin[: len(before)]) != before:
        return None
    return list(begin[len(before) :]), letters


def _ids(tokenizer, text):
    return [int(token) for token in tokenizer(text)]
