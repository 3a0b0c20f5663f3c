"""What the tasks are to a training run: a model, arrays, a loss, scores."""

import dataclasses

import keras
import keras_hub
import numpy as np
from presets import load
from scores import score_answers
from scores import score_classes
from scores import score_numbers
from tasks import TASKS

from keras_lora_dropout import ExtractiveQA
from keras_lora_dropout.question_answering import decoding
from keras_lora_dropout.question_answering import windows


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows as a model takes them.

    Attributes:
        x: Dictionary of arrays.
        y: Array of what is to be learned.
        rows: The rows; of long ones, `x` has several examples.
        windows: `AnswerWindows`, if the rows are questions.
    """

    x: dict
    y: np.ndarray
    rows: list
    windows: object = None

    def __len__(self):
        return len(self.y)


def problem_of(cell):
    """Return the `Sentences` or `Questions` of a cell."""
    return (Sentences if TASKS[cell.task].classes else Questions)(cell)


class Sentences:
    """GLUE: a class, or a number, for each text or pair.

    Attributes:
        loss: Keras loss.
        average: How ensembles average, as in `ensemble_predict`.
    """

    def __init__(self, cell):
        self._cell, self._task = cell, TASKS[cell.task]
        if self._task.classes == 1:
            self.loss = keras.losses.MeanSquaredError()
            self.average = "output"
        else:
            self.loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            )
            self.average = "probability"

    def build(self):
        """Build the plain model."""
        cell = self._cell
        model = load(
            keras_hub.models.TextClassifier,
            cell.preset,
            num_classes=self._task.classes,
            dropout=cell.head_dropout,
        )
        self._preprocessor = model.preprocessor
        self._preprocessor.sequence_length = cell.sequence_length
        model.preprocessor = None  # It gets `Examples`.
        return model

    def encode(self, rows):
        """Turn rows into `Examples`; the model is built before."""
        columns = [[row[field] for row in rows] for field in self._task.texts]
        texts = columns[0] if len(columns) == 1 else tuple(columns)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(
            self._preprocessor(texts)
        )
        x = {k: keras.ops.convert_to_numpy(array) for k, array in x.items()}
        kind = "float32" if self._task.classes == 1 else "int32"
        return Examples(x, np.array([row["label"] for row in rows], kind), rows)

    def score(self, outputs, examples, probabilities=False):
        """Score outputs, or probabilities, of some `Examples`."""
        if self._task.classes == 1:
            return score_numbers(outputs[:, 0], examples.y)
        return score_classes(outputs, examples.y, probabilities)


class Questions:
    """SQuAD: where the answer to a question stands in its context.

    Attributes:
        loss: Keras loss.
        average: How ensembles average, as in `ensemble_predict`.
    """

    average = "probability"

    def __init__(self, cell):
        self._cell = cell
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def build(self):
        """Build the plain model."""
        models = keras_hub.models
        backbone = load(models.Backbone, self._cell.preset)
        self._preprocessor = load(
            models.TextClassifierPreprocessor,
            self._cell.preset,
            sequence_length=self._cell.sequence_length,
        )
        # KerasHub keeps the accents that vocabularies without case have not.
        tokenizer = self._preprocessor.tokenizer
        if getattr(tokenizer, "lowercase", False):
            tokenizer.strip_accents = True
        return ExtractiveQA(backbone)

    def encode(self, rows):
        """Turn rows into `Examples`; the model is built before."""
        made = windows.make_windows(
            self._preprocessor,
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            [_first_answer(row) for row in rows],
            doc_stride=self._cell.doc_stride,
            max_question_length=self._cell.max_question_length,
        )
        return Examples(made.inputs, made.targets, rows, made)

    def score(self, outputs, examples, probabilities=False):
        """Score outputs, or probabilities, of some `Examples`."""
        if probabilities:
            outputs = np.log(np.maximum(outputs, 1e-30))
        # Questions without an answer are in version 2.0 alone.
        may_be_none = "is_impossible" in examples.rows[0]
        answers = decoding.decode_answers(
            outputs,
            examples.windows,
            null_threshold=self._cell.null_threshold if may_be_none else None,
        )
        accepted = [row["answers"]["text"] for row in examples.rows]
        return score_answers(answers, accepted)


def _first_answer(row):
    answers = row["answers"]
    if not answers["text"]:
        return None
    return answers["text"][0], answers["answer_start"][0]
