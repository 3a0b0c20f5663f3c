"""Sums over the gradients of many training steps, at the same weights."""

import keras
import numpy as np


class GradientSums(keras.optimizers.Optimizer):
    """Changes no weight: adds up the gradients, and their squares."""

    def __init__(self):
        super().__init__(learning_rate=0.0)

    def build(self, variables):
        super().build(variables)
        self.sums, self.squares = (
            [self.add_variable_from_reference(v, name) for v in variables]
            for name in ("sum", "squares")
        )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        gradient = keras.ops.cast(gradient, variable.dtype)
        self.assign_add(self.sums[index], gradient)
        self.assign_add(self.squares[index], keras.ops.square(gradient))

    def take(self, names):
        """Return both sums of the weights whose path has `names`, and reset."""
        parts = []
        for variables in (self.sums, self.squares):
            chosen = [v for v in variables if names in v.path]
            values = [keras.ops.convert_to_numpy(v).ravel() for v in chosen]
            parts.append(np.concatenate(values).astype("float64"))
            for variable in variables:
                variable.assign(keras.ops.zeros(variable.shape))
        return parts
