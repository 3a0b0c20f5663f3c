"""`RankBudget`: how many ranks AdaLoRA keeps, and when."""

import bisect
import dataclasses

import keras
import numpy as np

from keras_lora_dropout.core import validation

ORTHOGONAL_FORMS = ("squared_norms", "mean_norm")
# A step that no run reaches.
NEVER = 2**31 - 1


@keras.saving.register_keras_serializable("keras_lora_dropout")
@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Settings of AdaLoRA: from which rank to which, and when.

    Pass it to `enable_lora_dropout` or `LoRADropoutModel`. All adapters
    together start with a budget of `b_0 = initial_rank * layers` triplets and
    end with `b_T = target_rank * layers`; which layers keep more and which
    fewer is what the training finds out. After optimizer step `t` of `T`,

        `b(t) = b_0`                                for `t <= warmup_steps`,
        `b(t) = b_T`                                for the `final_steps`,
        `b(t) = int(b_T + (b_0 - b_T) * (1 - s)**3)` in between,

    where `s` is the share of the steps in between that are done. Every
    `mask_interval` steps the `b(t)` triplets of highest importance are kept
    and the singular values of all others set to zero, where they stay until
    the next such step; `final_steps` before the end the choice becomes final.

    A step is one update of the optimizer: with `gradient_accumulation_steps`
    several batches, with dynamic loss scaling one whose gradients are finite.

    Reference: [Zhang et al., 2023](https://arxiv.org/abs/2303.10512), Eq. 4
    (penalty), 7-11 (importance), 12 (budget).

    Args:
        target_rank: Integer, 0 or more. Average rank at the end.
        initial_rank: Positive integer or `None`. Rank of every adapter at the
            start, at least `target_rank`. `None` means the `rank` of
            `enable_lora_dropout`, or those of the layers of a
            `LoRADropoutModel`. The AdaLoRA paper takes 1.5 `target_rank`.
        warmup_steps: Integer, or fraction of the run as a float in `[0, 1)`.
            Steps at the start with the full budget. Defaults to 0.1.
        final_steps: Integer or fraction, as above. Steps at the end with the
            final ranks. Defaults to 0.5, about what the AdaLoRA authors'
            scripts use.
        mask_interval: Positive integer, or fraction. Steps from one choice of
            ranks to the next. Defaults to 1.
        total_steps: Positive integer or `None`. Steps `T` of the run. `None`
            means those of the first `fit`: epochs times steps per epoch.
        beta_1: Float in `(0, 1)`. Smoothing of the sensitivity. Defaults to
            0.85.
        beta_2: Float in `(0, 1)`. Smoothing of its uncertainty. Defaults to
            0.85.
        orthogonal_penalty: Number, 0 or more. Weight of the penalty that keeps
            P and Q near orthogonal; 0 turns it off. Defaults to 0.5.
        orthogonal_form: `"squared_norms"`: the penalty is the sum over all
            layers of `||P.T P - I||**2 + ||Q Q.T - I||**2` (Frobenius norms),
            as in the paper. `"mean_norm"`: the mean over all P and Q of the
            norms, not squared, as in PEFT. At the same weight the sum pulls
            far harder, by a factor that grows with the number of layers.

    Raises:
        TypeError: If an argument has a type that is not listed.
        ValueError: If an argument is out of range, or if `total_steps` leaves
            no step between the first and the last phase.

    Example:

    >>> budget = RankBudget(
    ...     target_rank=4, initial_rank=6, warmup_steps=0.1, final_steps=0.5
    ... )
    >>> schedule = budget.schedule(total_steps=1000, ranks=[6, 6])
    >>> [schedule.budget(step) for step in (100, 200, 300, 500, 1000)]
    [12, 9, 8, 8, 8]
    """

    target_rank: int
    initial_rank: int | None = None
    warmup_steps: int | float = 0.1
    final_steps: int | float = 0.5
    mask_interval: int | float = 1
    total_steps: int | None = None
    beta_1: float = 0.85
    beta_2: float = 0.85
    orthogonal_penalty: float = 0.5
    orthogonal_form: str = "squared_norms"

    def __post_init__(self):
        checked = {
            "target_rank": validation.integer(
                "target_rank", self.target_rank, at_least=0
            ),
            "orthogonal_penalty": validation.number(
                "orthogonal_penalty", self.orthogonal_penalty, "0 or more"
            ),
        }
        for name in ("initial_rank", "total_steps"):
            value = getattr(self, name)
            if value is not None:
                checked[name] = validation.positive_integer(name, value)
        for name in ("warmup_steps", "final_steps", "mask_interval"):
            at_least = int(name == "mask_interval")
            checked[name] = _steps(name, getattr(self, name), at_least)
        for name in ("beta_1", "beta_2"):
            value = getattr(self, name)
            checked[name] = validation.number(name, value, "in (0, 1)", 0, 1)
        validation.word(
            "orthogonal_form", self.orthogonal_form, ORTHOGONAL_FORMS
        )
        validation.keep(self, **checked)
        if self.initial_rank is not None:
            check_target(self.target_rank, self.initial_rank)
        if self.total_steps is not None:
            self.phases(self.total_steps)

    def get_config(self):
        """Return the settings as a dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """Return the budget of a dictionary of settings."""
        return cls(**config)

    def phases(self, total_steps):
        """Return `(warmup_steps, final_steps, mask_interval)` as integers.

        Args:
            total_steps: Positive integer. Optimizer steps of the run.

        Raises:
            ValueError: If no step is left between the first and last phase.
        """
        total_steps = validation.positive_integer("total_steps", total_steps)
        warmup, final, interval = (
            round(steps * total_steps) if isinstance(steps, float) else steps
            for steps in (
                self.warmup_steps,
                self.final_steps,
                self.mask_interval,
            )
        )
        if warmup + final >= total_steps:
            raise ValueError(
                f"A run of {total_steps} optimizer steps is too short for its "
                f"phases: {_given('warmup_steps', self.warmup_steps, warmup)} "
                f"and {_given('final_steps', self.final_steps, final)} leave "
                "no step in which ranks are pruned. Their sum must be less "
                f"than total_steps={total_steps}. Train for more epochs, or "
                "pass smaller numbers or fractions of the run, such as "
                "`RankBudget(..., warmup_steps=0.1, final_steps=0.5)`."
            )
        return warmup, final, max(1, interval)

    def schedule(self, total_steps, ranks):
        """Return the `RankSchedule` of a run.

        Args:
            total_steps: Positive integer. Optimizer steps of the run.
            ranks: Sequence of integers. Initial rank of each adapted layer.

        Raises:
            TypeError: If `ranks` is no sequence.
            ValueError: If an argument is out of range, or if no step is left
                between the first and last phase.
        """
        total_steps = validation.positive_integer("total_steps", total_steps)
        ranks = [
            validation.integer(f"ranks[{index}]", rank, at_least=0)
            for index, rank in enumerate(
                validation.as_list("ranks", ranks, "integers")
            )
        ]
        if ranks:
            check_target(self.target_rank, sum(ranks) / len(ranks))
        return RankSchedule(
            *self.phases(total_steps),
            total_steps=total_steps,
            initial_budget=sum(ranks),
            target_budget=self.target_rank * len(ranks),
        )


@dataclasses.dataclass(frozen=True)
class RankSchedule:
    """The budget of every step of one run, in plain integers.

    Attributes:
        warmup_steps: Steps at the start with the full budget.
        final_steps: Steps at the end with the final ranks.
        mask_interval: Steps from one choice of ranks to the next.
        total_steps: Steps of the run.
        initial_budget: Triplets at the start, over all layers.
        target_budget: Triplets at the end, over all layers.
    """

    warmup_steps: int
    final_steps: int
    mask_interval: int
    total_steps: int
    initial_budget: int
    target_budget: int

    @property
    def freeze_step(self):
        """The step after which the ranks are final."""
        return self.total_steps - self.final_steps

    def budget(self, step):
        """`b(t)` of [A] Eq. 12: triplets to keep after step `t`, from 1.

        The arithmetic is that of the AdaLoRA authors, in double precision, so
        that the truncated numbers agree with theirs.
        """
        if step <= self.warmup_steps:
            return self.initial_budget
        if step >= self.freeze_step:
            return self.target_budget
        done = (step - self.warmup_steps) / (
            self.freeze_step - self.warmup_steps
        )
        pruned = self.initial_budget - self.target_budget
        return int(pruned * (1 - done) ** 3 + self.target_budget)

    def removal_steps(self):
        """The budgets of all steps in an array that does not grow with them.

        Returns:
            Array of `initial_budget` integers. Entry `i` is the first step
            whose budget is `i` or less, so that `b(t)` is the number of
            entries greater than `t`.
        """
        steps = np.full(self.initial_budget, NEVER, "int32")
        run = range(1, self.freeze_step + 1)
        for kept in range(self.target_budget, self.initial_budget):
            steps[kept] = run[
                bisect.bisect_left(run, -kept, key=lambda t: -self.budget(t))
            ]
        return steps


def check_rank_budget(value):
    """Return `value`; raise `TypeError` unless it is a budget or `None`."""
    if value is not None and not isinstance(value, RankBudget):
        raise TypeError(
            "`rank_budget` must be a `RankBudget`, or None for fixed ranks. "
            f"Received: rank_budget={value!r} (of type "
            f"{type(value).__name__})."
        )
    return value


def check_target(target_rank, initial_rank):
    """Raise `ValueError` unless the target is reached by pruning."""
    if target_rank > initial_rank:
        raise ValueError(
            "`target_rank` must be at most the initial rank: ranks are pruned, "
            f"never added. Received: target_rank={target_rank}, "
            f"initial_rank={initial_rank}. Raise `initial_rank` (1.5 times "
            "`target_rank` is usual), or lower `target_rank`."
        )


def _steps(name, value, at_least):
    """Return steps as `int`, or a fraction of the run as `float`."""
    if not isinstance(value, (float, np.floating)):
        return validation.integer(name, value, at_least)
    if not (0 <= value < 1) or (at_least and value == 0):
        raise ValueError(
            f"`{name}` as a float is a fraction of the run, less than 1. "
            f"Received: {name}={value}. Pass a number of steps as an "
            f"integer, or a fraction such as {name}=0.1."
        )
    return float(value)


def _given(name, given, steps):
    if isinstance(given, float):
        return f"{name}={given} ({steps} steps)"
    return f"{name}={steps}"
