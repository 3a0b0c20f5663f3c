"""The adapted model that stands beside PEFT's, driven step by step."""

import keras
import numpy as np
import peft_scenarios
from helpers import array
from helpers import seeded_dense
from peft_scenarios import LAYERS
from peft_scenarios import flat
from peft_scenarios import step_values

import keras_lora_dropout as kld


def rank_budget(run, **options):
    return kld.RankBudget(
        target_rank=run.target_rank,
        initial_rank=run.initial_rank,
        warmup_steps=run.warmup_steps,
        final_steps=run.final_steps,
        mask_interval=run.mask_interval,
        beta_1=run.beta_1,
        beta_2=run.beta_2,
        **{"total_steps": run.total_steps, **options},
    )


class Adapted:
    """A model of the oracle's layers, and its `RankAllocator`."""

    def __init__(self, run, **options):
        inputs = x = keras.Input((LAYERS["first"][0],))
        for seed, (name, (_, units)) in enumerate(LAYERS.items()):
            x = seeded_dense(units, seed, name=name)(x)
        self.model = kld.enable_lora_dropout(
            keras.Model(inputs, seeded_dense(2, 9, name="head")(x)),
            rank_budget=rank_budget(run, **options),
            dropout_rate=0.0,
            num_samples=1,
            trainable_layers=None,
            seed=0,
        )
        self.run = run
        self.allocator = self.model.rank_allocator
        self.layers = [layer for _, layer in self.model.adapted_layers]
        paths = [path for path, _ in self.model.adapted_layers]
        assert paths == list(LAYERS), "not in forward order"
        self.optimizer = keras.optimizers.SGD(peft_scenarios.LEARNING_RATE)
        self.optimizer.build(self.model.trainable_variables)

    def assign(self, values):
        for layer, given in zip(self.layers, values, strict=True):
            for factor, value in zip(layer.factors, given, strict=True):
                factor.assign(value)

    def step(self, gradients, update):
        """One allocator step around an optimizer step.

        Args:
            gradients: A triple of gradients for each layer.
            update: Function of `(gradients, weights)` that takes the step.
        """
        weights = self.model.trainable_variables
        gradient_of = {
            id(factor): keras.ops.convert_to_tensor(gradient)
            for layer, given in zip(self.layers, gradients, strict=True)
            for factor, gradient in zip(layer.factors, given, strict=True)
        }
        gradients = [gradient_of[id(weight)] for weight in weights]
        with self.allocator.around_update(self.optimizer, weights, gradients):
            update(gradients, weights)

    def step_to(self, values, gradients):
        """A step whose optimizer leaves given parameters."""

        def update(*_):
            self.assign(values)
            self.optimizer.iterations.assign_add(1)

        self.step(gradients, update)

    def train(self, steps):
        """Plain SGD on the run's gradients; `(kept, lambdas)` of each step."""
        kept, lambdas = [], []
        for step in steps:
            self.step(step_values(self.run, step)[1], self.optimizer.apply)
            kept.append(self.kept())
            lambdas.append(self.lambdas())
        return np.array(kept), np.array(lambdas)

    def kept(self):
        return array(self.allocator.rank_mask) > 0

    def lambdas(self):
        return flat(array(layer.lora_lambda) for layer in self.layers)

    def rows(self):
        return flat(
            rows_of(array(f) for f in lyr.factors) for lyr in self.layers
        )

    def scores(self):
        """Smoothed sensitivity and uncertainty, laid out `flat`."""
        return tuple(
            self._flat_state(state)
            for state in (
                self.allocator.smoothed_sensitivity,
                self.allocator.uncertainty,
            )
        )

    def _flat_state(self, variables):
        """The allocator keeps layers of equal shapes in one variable."""
        found = {}
        for positions, variable in zip(
            self.allocator.stacks, variables, strict=True
        ):
            found.update(zip(positions, array(variable), strict=True))
        return flat(found[position] for position in range(len(self.layers)))


def rows_of(factors):
    """The triplets of one layer as NumPy rows."""
    lora_kernel_a, lora_lambda, lora_kernel_b = factors
    return np.concatenate(
        [lora_kernel_a.T, lora_lambda[:, None], lora_kernel_b], axis=1
    )


def assert_same_ranks(actual, expected, step):
    """The same triplets kept."""
    assert np.array_equal(actual, expected), (
        f"After step {step} ours keeps {np.flatnonzero(actual)}, PEFT "
        f"{np.flatnonzero(expected)}."
    )
