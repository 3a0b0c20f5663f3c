"""AdaLoRA in the training step: which ranks of which layers stay.

The state lives in variables of the model, so that it is compiled into the
training step, saved and restored like any weight, and moved to the device.
"""

import contextlib
import logging
import math

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.core import factors
from keras_lora_dropout.core import importance
from keras_lora_dropout.core.keras_internals import forget_weights
from keras_lora_dropout.core.rank_budget import NEVER
from keras_lora_dropout.training.step_gradients import batches_per_step
from keras_lora_dropout.training.step_gradients import step_gradients

logger = logging.getLogger("keras_lora_dropout")

# Columns of the rank history: more than a plot can show.
HISTORY_LENGTH = 200


class RankAllocator:
    """The rank schedule of one model, and the scores that it prunes by.

    Args:
        model: The adapted model; it gains non-trainable weights.
        layers: List of `(path, layer)` of its AdaLoRA layers.
        budget: A `RankBudget`.
        record: `None`, or what `record_as_data` returned for an allocator that
            was closed; the new one is closed, too, then.

    Attributes:
        is_open: Whether ranks are still chosen, until `close`.
        variables: Dictionary of name -> variable; empty once closed.
    """

    def __init__(self, model, layers, budget, record=None):
        self.settings = budget
        self.is_open = record is None
        self._started = False
        self.layers = layers
        self.ranks = [layer.lora_rank for _, layer in layers]
        self.variables = {}
        if record is not None:
            self._final_record = _record_from(record)
            return
        sizes = [(lyr.lora_rank, *lyr.factor_sizes) for _, lyr in layers]
        self.stacks = factors.stacks(sizes)
        initial = {
            "rank_removal_steps": NEVER,
            "rank_mask": 1,
            "rank_history": -1,
        }
        for name, (shape, dtype) in state_shapes(sizes).items():
            self.variables[name] = model.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer=keras.initializers.Constant(initial.get(name, 0)),
                trainable=False,
            )
        self.step = self.variables["rank_step"]
        # [total_steps, warmup_steps, freeze_step, mask_interval]; zeros while
        # the length of the run is not known.
        self.schedule = self.variables["rank_schedule"]
        self.removal_steps = self.variables["rank_removal_steps"]
        self.rank_mask = self.variables["rank_mask"]
        self.history = self.variables["rank_history"]
        self.smoothed_sensitivity, self.uncertainty = (
            [
                self.variables[f"{name}_{index}"]
                for index in range(len(self.stacks))
            ]
            for name in ("smoothed_sensitivity", "uncertainty")
        )
        if budget.total_steps is not None:
            self._set_schedule(budget.total_steps)

    @property
    def total_steps(self):
        """Optimizer steps of the whole run, or `None` if not known yet."""
        return int(ops.convert_to_numpy(self.schedule)[0]) or None

    def start(self, optimizer, epochs, steps_per_epoch):
        """Set the schedule, unless it is set, when `fit` begins.

        Args:
            optimizer: The compiled optimizer.
            epochs: Integer. Epochs of the run.
            steps_per_epoch: Integer, or `None` if it is not known.

        Raises:
            ValueError: If the length of the run is not known, or too short.
        """
        if not self.is_open or self.total_steps is not None:
            return
        if steps_per_epoch is None:
            raise ValueError(
                "The length of the data is not known, so the rank schedule "
                "does not know how many steps the run has. Received: "
                "RankBudget(total_steps=None) and data without a length. Pass "
                "`total_steps` to `RankBudget`, or `steps_per_epoch` to `fit`."
            )
        schedule = self._set_schedule(
            epochs * steps_per_epoch // batches_per_step(optimizer)
        )
        logger.info("Ranks are pruned by this schedule: %s", schedule)

    def check_started(self):
        """Raise `ValueError` unless the length of the run is known."""
        if self._started or not self.is_open:
            return
        if self.total_steps is None:
            raise ValueError(
                "`train_on_batch` does not know how many steps the run has, "
                "so the rank schedule cannot start. Received: "
                "RankBudget(total_steps=None). Pass `total_steps` to "
                "`RankBudget`, or train with `fit`."
            )
        self._started = True  # Reading the variable waits for the device.

    def _set_schedule(self, total_steps):
        schedule = self.settings.schedule(total_steps, self.ranks)
        self.removal_steps.assign(schedule.removal_steps())
        self.schedule.assign(
            [
                total_steps,
                schedule.warmup_steps,
                schedule.freeze_step,
                schedule.mask_interval,
            ]
        )
        return schedule

    @contextlib.contextmanager
    def around_update(self, optimizer, weights, gradients):
        """Take one allocator step after the optimizer step made inside.

        The sensitivity is that of the weights after the optimizer step with
        the gradients before it, as in the AdaLoRA authors' code.

        Args:
            optimizer: The compiled optimizer.
            weights: List of the trainable variables.
            gradients: List of their gradients, as given to the optimizer.
        """
        gradients = step_gradients(optimizer, weights, gradients)
        self._check_trainable(gradients)
        iterations = optimizer.iterations + 0  # A copy: it is updated in place.
        yield
        self._update(gradients, ops.not_equal(optimizer.iterations, iterations))

    def _check_trainable(self, gradients):
        for path, layer in self.layers:
            if any(id(factor) not in gradients for factor in layer.factors):
                raise ValueError(
                    f'Layer "{path}" is frozen, so AdaLoRA cannot tell how '
                    "important its ranks are. Received: trainable=False on the "
                    "layer, on a layer around it or on one of its factors. Set "
                    "`trainable = True` and compile the model again, or leave "
                    "the layer out with `exclude_layers`."
                )

    def _update(self, gradients, updated):
        """Score the triplets, choose those that stay, prune the others.

        Args:
            gradients: Dictionary of gradients by the id of their variable.
            updated: Boolean scalar tensor: whether the optimizer took a step,
                or is still accumulating or skipped one.
        """
        total_steps, warmup_steps, freeze_step, mask_interval = (
            self.schedule.value[i] for i in range(4)
        )
        step = self.step.value + ops.cast(updated, "int32")
        scores = self._update_scores(
            gradients, ops.logical_and(updated, step < freeze_step)
        )
        choosing = ops.logical_and(
            step > warmup_steps,
            ops.equal(ops.mod(step, ops.maximum(mask_interval, 1)), 0),
        )
        choosing = ops.logical_or(
            ops.logical_and(choosing, step < freeze_step),
            ops.equal(step, freeze_step),
        )
        budget = importance.current_budget(step, self.removal_steps.value)
        mask = ops.where(
            ops.logical_and(updated, choosing),
            importance.rank_mask(scores, budget),
            self.rank_mask.value,
        )
        self.step.assign(step)
        self.rank_mask.assign(mask)
        self._record(step, total_steps, mask)
        self.prune()

    def _update_scores(self, gradients, updating):
        """Update the smoothed state; return the importance of all triplets."""
        scores = {}
        for positions, smoothed, uncertainty in zip(
            self.stacks,
            self.smoothed_sensitivity,
            self.uncertainty,
            strict=True,
        ):
            layers = [self.layers[position][1] for position in positions]
            old = smoothed.value, uncertainty.value
            new = importance.updated_scores(
                *old,
                importance.triplets(*factors.stacked_factors(layers)),
                importance.triplets(
                    *factors.stacked_factors(layers, lambda f: gradients[id(f)])
                ),
                self.settings.beta_1,
                self.settings.beta_2,
            )
            new = [
                ops.where(updating, *pair)
                for pair in zip(new, old, strict=True)
            ]
            smoothed.assign(new[0])
            uncertainty.assign(new[1])
            input_dim = layers[0].factor_sizes[0]
            stack = importance.importance(*new, input_dim)
            scores.update(zip(positions, ops.unstack(stack), strict=True))
        return ops.concatenate([scores[i] for i in range(len(self.layers))])

    def _record(self, step, total_steps, mask):
        """Write the ranks after this step into their row of the history."""
        row = (step - 1) * HISTORY_LENGTH // ops.maximum(total_steps, 1)
        rows = ops.reshape(ops.arange(HISTORY_LENGTH), (-1, 1))
        owners = np.repeat(np.arange(len(self.ranks)), self.ranks)
        kept = ops.segment_sum(
            ops.cast(mask, "int32"),
            ops.convert_to_tensor(owners, "int32"),
            num_segments=len(self.ranks),
        )
        history = ops.where(ops.equal(rows, row), kept, self.history.value)
        self.history.assign(history)

    def prune(self):
        """Set the singular values of all pruned triplets to zero."""
        if not self.is_open:
            return
        kept = self.rank_mask.value > 0
        start = 0
        for (_, layer), rank in zip(self.layers, self.ranks, strict=True):
            values = layer.lora_lambda.value
            layer.lora_lambda.assign(
                ops.where(kept[start : start + rank], values, 0.0)
            )
            start += rank

    def penalty(self):
        """The orthogonality penalty without its weight, a scalar tensor."""
        layers = [layer for _, layer in self.layers if layer.lora_rank]
        pairs = []
        for positions in factors.stacks(
            (layer.lora_rank, *layer.factor_sizes) for layer in layers
        ):
            lora_kernel_a, _, lora_kernel_b = factors.stacked_factors(
                [layers[position] for position in positions]
            )
            pairs.append((lora_kernel_a, lora_kernel_b))
        if not pairs:
            return ops.zeros(())
        return importance.orthogonal_penalty(
            pairs, self.settings.orthogonal_form
        )

    def logs(self):
        """What `fit` reports of the ranks: the triplets kept at present."""
        if self.is_open:
            return {"budget": ops.sum(self.rank_mask)}
        return {"budget": ops.convert_to_tensor(float(sum(self.ranks)))}

    def recorded(self):
        """Return the history as `AdaptiveRank.rank_history` documents it."""
        if not self.is_open:
            return self._final_record
        history = ops.convert_to_numpy(self.history)
        rows = np.flatnonzero(history[:, 0] >= 0)
        # The last step that writes into a row, and that has been taken.
        last = -(-(rows + 1) * (self.total_steps or 0) // HISTORY_LENGTH)
        step = int(ops.convert_to_numpy(self.step))
        return {
            "step": np.minimum(last, step),
            "ranks": {
                path: history[rows, index]
                for index, (path, _) in enumerate(self.layers)
            },
        }

    def pattern(self):
        """Return a dictionary of layer path -> number of kept ranks."""
        kept = [int(np.sum(mask)) for mask in self._kept()]
        return {path: n for (path, _), n in zip(self.layers, kept, strict=True)}

    def _kept(self):
        """Return a boolean array `(rank,)` for each layer, in order."""
        if not self.is_open:
            return [np.ones(rank, bool) for rank in self.ranks]
        mask = ops.convert_to_numpy(self.rank_mask) > 0
        return np.split(mask, np.cumsum(self.ranks)[:-1])

    def close(self, model):
        """Drop the pruned triplets, and all that they were chosen by.

        Args:
            model: The adapted model; it loses the allocator's weights.
        """
        self.prune()
        self._final_record = self.recorded()
        for (_, layer), kept in zip(self.layers, self._kept(), strict=True):
            layer.keep_triplets(kept)
        self.is_open = False
        self.ranks = [layer.lora_rank for _, layer in self.layers]
        self.forget(model)

    def forget(self, model):
        """Take the allocator's weights off the model."""
        forget_weights(model, self.variables.values())
        self.variables.clear()
        self.smoothed_sensitivity = self.uncertainty = []

    def record_as_data(self):
        """Return the history of ranks as lists and integers, for JSON."""
        recorded = self.recorded()
        return {
            "step": recorded["step"].tolist(),
            "ranks": {p: r.tolist() for p, r in recorded["ranks"].items()},
        }

    def count_factors(self):
        """Number of weights of the adapters."""
        return sum(
            math.prod(factor.shape)
            for _, layer in self.layers
            for factor in layer.factors
        )


def state_shapes(sizes):
    """Return shape and dtype of each of an allocator's variables, by name.

    Args:
        sizes: List of `(rank, input_dim, output_dim)` of the AdaLoRA layers.
    """
    total = sum(rank for rank, _, _ in sizes)
    shapes = {
        "rank_step": ((), "int32"),
        "rank_schedule": ((4,), "int32"),
        "rank_removal_steps": ((total,), "int32"),
        "rank_mask": ((total,), "float32"),
        "rank_history": ((HISTORY_LENGTH, len(sizes)), "int32"),
    }
    for name in ("smoothed_sensitivity", "uncertainty"):
        for index, positions in enumerate(factors.stacks(sizes)):
            rank, input_dim, output_dim = sizes[positions[0]]
            shape = len(positions), rank, input_dim + 1 + output_dim
            shapes[f"{name}_{index}"] = shape, "float32"
    return shapes


def _record_from(data):
    return {
        "step": np.array(data["step"], int),
        "ranks": {p: np.array(r, int) for p, r in data["ranks"].items()},
    }
