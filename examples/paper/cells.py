"""One training run, what it is made of, and the file of its result."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import shutil

from keras_lora_dropout.storage.atomic import write_atomically


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training run: all that its result depends on but the versions.

    Counts of steps (`warmup`, `budget_warmup`, `budget_final`) may be shares of
    the run. `train_examples` and `selection_examples` are drawn from the
    training split with the seed, `None` is all of it; the learning rate is
    chosen on the second. With `curves`, the networks are evaluated after each
    epoch, not only after the last. The next three are those of SQuAD; the rest
    say how transformer blocks drop (`block_dropout`), if they do.
    """

    task: str
    method: str
    preset: str
    backend: str
    seed: int
    learning_rate: float
    batch_size: int
    epochs: int
    sequence_length: int
    train_examples: int | None
    selection_examples: int
    warmup: float
    weight_decay: float
    head_dropout: float
    rank: int
    alpha: float
    initial_rank: int
    adalora_alpha: float
    budget_warmup: float
    budget_final: float
    mask_interval: int
    orthogonal_penalty: float
    orthogonal_form: str
    houlsby_size: int
    pfeiffer_size: int
    dropout_rate: float
    num_samples: int
    dtype_policy: str
    curves: bool = False
    doc_stride: int = 128
    max_question_length: int = 64
    null_threshold: float = 0.0
    attention: str = ""
    attention_pattern: str = "column"
    attention_rate: float = 0.1
    hidden_pattern: str = ""
    hidden_rate: float = 0.1
    hidden_rescale: bool = True
    consistency: str = ""
    consistency_weight: float = 1.0

    @property
    def name(self):
        """A name that no other run has; fields may be added with a default."""
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if values[field.name] == field.default:
                del values[field.name]
        text = json.dumps(values, sort_keys=True)
        token = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.task}-{self.method}-{self.seed}-{token}"


class Store:
    """The results of cells, a JSON file each.

    Args:
        folder: Path; it is created.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, cell):
        return self._path(cell).exists()

    def read(self, cell):
        """Return the result of a cell.

        Raises:
            SystemExit: If its file is damaged.
        """
        path = self._path(cell)
        try:
            result = json.loads(path.read_text())
            cell = result["cell"]
            scores = result["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path} holds no result of a run ({error}). Restore it, or "
                "delete it to run its cell again."
            ) from error
        if not isinstance(cell, dict) or not isinstance(scores, dict):
            raise SystemExit(
                f"{path} holds no result of a run: `cell` and `scores` must "
                "be objects. Restore it, or delete it to run its cell again."
            )
        return result

    def write(self, cell, result):
        """Keep a result: the file is whole at any moment."""
        content = {"cell": dataclasses.asdict(cell), **result}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self._path(cell), text.encode())

    @contextlib.contextmanager
    def claimed(self, cell):
        """Keep other processes from running the same cell.

        Yields:
            Path of the folder where the unfinished run keeps its state, or
            `None` if another process runs it, or has finished it.
        """
        parent = self.folder / "unfinished"
        parent.mkdir(exist_ok=True)
        with open(parent / f"{cell.name}.lock", "w") as lock:
            try:
                # The system unlocks the file of a process that is killed.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if cell in self:
                yield None
                return
            folder = parent / cell.name
            folder.mkdir(exist_ok=True)
            yield folder
            if cell in self:
                shutil.rmtree(folder, ignore_errors=True)

    def remove_leftovers(self):
        """Delete the state of runs that were killed after their result."""
        for folder in (self.folder / "unfinished").glob("*/"):
            if (self.folder / f"{folder.name}.json").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, cell):
        return self.folder / f"{cell.name}.json"
