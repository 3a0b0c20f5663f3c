"""Whether a model can run N mask instances as one batch."""

import keras
from keras import ops

from keras_lora_dropout.core.instances import LayoutError
from keras_lora_dropout.core.instances import has_rows
from keras_lora_dropout.core.instances import split
from keras_lora_dropout.core.masks import Draws
from keras_lora_dropout.core.masks import use_draws

# A batch size that no axis of a real model is a multiple of by accident.
_PROBE_ROWS = 1009


class _Forward(keras.Operation):
    """Lets Keras infer the output of a function without computing it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def check_parallel_layout(plan, forward, inputs, num_instances):
    """Raise `LayoutError` unless the leading axis is the batch axis throughout.

    A model that moves its batch axis away would mix mask instances whenever
    another axis happens to be as long as the batch. So the model is traced
    once with a batch size that nothing else has; nothing is computed.

    Args:
        plan: The model's `MaskPlan`, which remembers a passed check.
        forward: Function that runs the model on inputs like `inputs`.
        inputs: Nested structure of tensors, one batch of one instance.
        num_instances: Positive integer.
    """
    if plan.layout_checked:
        return
    rows = _PROBE_ROWS * num_instances

    def symbolic(leaf):
        if not has_rows(leaf):
            return leaf
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        return keras.KerasTensor((rows, *leaf.shape[1:]), dtype)

    def checked(x):
        values = ops.zeros((num_instances, plan.width))
        with use_draws(Draws(plan, values, rows)):
            outputs = forward(x)
        split(outputs, num_instances, rows)
        return outputs

    try:
        _Forward(checked).compute_output_spec(
            keras.tree.map_structure(symbolic, inputs)
        )
    except LayoutError:
        raise
    except Exception as error:
        # Keras words some errors anew; and not every model can be traced.
        if LayoutError.__name__ in repr(error) or "mask_sharing" in repr(error):
            raise LayoutError(str(error)) from error
    plan.layout_checked = True
