"""Running N mask instances as one batch, by models that can."""

import contextlib
import functools

import keras
from keras import ops

from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.core.instances import LAYOUT_ADVICE
from keras_lora_dropout.core.instances import LayoutError
from keras_lora_dropout.core.instances import batch_size
from keras_lora_dropout.core.instances import has_rows
from keras_lora_dropout.core.instances import split
from keras_lora_dropout.core.instances import tile
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.masks import Draws
from keras_lora_dropout.core.masks import use_draws
from keras_lora_dropout.core.structured_dropout import DropoutDraws

# A batch size that no axis of a real model is a multiple of by accident.
_PROBE_ROWS = 1009
# Layers, by class, whose input says by numbers which rows of a batch they read.
_READ_ROWS_BY_NUMBER = ("SAM3GeometryEncoder",)
# Where tensors have to be computed: two sizes, which no axis has both.
_FEW_PROBE_ROWS = 2, 3


class _ComputesError(Exception):
    """Keras would compute an output in order to infer its shape."""


class _Forward(keras.Operation):
    """Lets Keras infer the output of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def check_parallel_layout(model, forward, inputs, num_instances):
    """Raise `LayoutError` unless the model keeps N instances apart.

    A model that moves its batch axis away would mix mask instances whenever
    another axis happens to be as long as the batch. So the model is traced
    once with a batch size that nothing else has; nothing is computed. Some
    operations on PyTorch have no shape without numbers; then the model computes
    a few rows instead.

    Args:
        model: The adapted model; its `mask_plan` remembers a passed check.
        forward: Function that runs the model on inputs like `inputs`.
        inputs: Nested structure of tensors, one batch of one instance.
        num_instances: Positive integer.
    """
    if model.mask_plan.layout_checked:
        return
    _check_batch_axis_is_free(model)
    _check_no_batch_statistics(model)
    _check_no_row_numbers(model)
    plan = model.mask_plan
    if plan.keeps_prefix:
        try:
            _trace(model, forward, inputs, num_instances, spreads_prefix=True)
            plan.spreads_prefix = True
        except Exception:
            pass  # A batch that is laid out from the start may still do.
    if not plan.spreads_prefix:
        try:
            _trace(model, forward, inputs, num_instances, spreads_prefix=False)
        except Exception as error:
            # Keras words some errors anew; and not every model can be traced.
            if isinstance(error, LayoutError) or LAYOUT_ADVICE in str(error):
                raise
    plan.layout_checked = True


def run_parallel(model, forward, inputs, num_instances):
    """Run a model under N mask instances at once.

    Args:
        model: The adapted model; its layout has been checked.
        forward: Function that runs the model on inputs like `inputs`.
        inputs: Nested structure of tensors, one batch of one instance.
        num_instances: Positive integer.

    Returns:
        The outputs, with leading axes of `num_instances` blocks of rows.
    """
    if num_instances == 1:
        return forward(inputs)
    if not model.mask_plan.spreads_prefix:
        return forward(tile(inputs, num_instances))
    rows = batch_size(inputs)
    with shared_prefix.spread(model.mask_plan, num_instances, rows):
        return forward(inputs)


def _trace(model, forward, inputs, num_instances, spreads_prefix):
    """Infer a model's outputs for a batch of a length that nothing else has.

    Raises:
        LayoutError: If a tensor that has to carry the instances does not.
        Exception: Whatever the model raises.
    """
    arguments = model, forward, inputs, num_instances, spreads_prefix
    try:
        _infer(*arguments, _PROBE_ROWS, may_compute=False)
    except _ComputesError:
        for probe_rows in _FEW_PROBE_ROWS:
            _infer(*arguments, probe_rows, may_compute=True)


def _infer(
    model,
    forward,
    inputs,
    num_instances,
    spreads_prefix,
    probe_rows,
    may_compute,
):
    plan, state = model.mask_plan, _state_of(model)
    rows = probe_rows * num_instances
    given_rows = probe_rows if spreads_prefix else rows

    # What is no tensor, such as `training`, stays as it is given.
    leaves = keras.tree.flatten(inputs)
    places = [n for n, leaf in enumerate(leaves) if has_rows(leaf)]

    def symbolic(leaf):
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        return keras.KerasTensor((given_rows, *leaf.shape[1:]), dtype)

    def checked(tensors):
        if not may_compute and any(map(_has_numbers, tensors)):
            raise _ComputesError
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        x = keras.tree.pack_sequence_as(inputs, filled)
        values = ops.zeros((num_instances, plan.width))
        spread = contextlib.nullcontext()
        if spreads_prefix:
            spread = shared_prefix.spread(plan, num_instances, given_rows)
        draws = Draws(plan, values, rows, dropout=_dropout_of(model))
        with state(), use_draws(draws), spread:
            outputs = forward(x)
        split(outputs, num_instances, rows)
        return outputs

    _Forward(checked).compute_output_spec(
        [symbolic(leaves[place]) for place in places]
    )


def _dropout_of(model):
    """Let what may drop be traced as if it did."""
    if not model.mask_plan.dropping:
        return None
    dtype = model.mask_seed_generator.state.dtype
    return DropoutDraws(ops.zeros((2,), dtype))


def _has_numbers(tensor):
    """Whether a tensor is one of PyTorch that is more than a shape."""
    device = getattr(tensor, "device", None)
    is_torch = keras.config.backend() == "torch"
    return is_torch and getattr(device, "type", "meta") != "meta"


def _state_of(model):
    """Return a context that gives the model's variables their values.

    During `fit` on JAX, variables hold no value of their own: the step's scope
    does, and Keras leaves that scope to infer an output.
    """
    if keras.config.backend() != "jax":
        return contextlib.nullcontext
    values = [(variable, variable.value) for variable in model.variables]
    return functools.partial(keras.StatelessScope, values)


def _check_batch_axis_is_free(model):
    for tensor in getattr(model, "inputs", None) or []:
        if tensor.shape[0] is not None:
            raise LayoutError(
                f'Input "{tensor.name}" of shape {tuple(tensor.shape)} has a '
                f"fixed batch size, so the batch cannot grow. {LAYOUT_ADVICE}"
            )


def _check_no_batch_statistics(model):
    for layer in descendants(model):
        is_batch_norm = isinstance(layer, keras.layers.BatchNormalization)
        if is_batch_norm and layer.trainable:
            raise LayoutError(
                f'Layer "{layer.path or layer.name}" normalizes over the batch '
                "and is trainable, so instances in one batch would change each "
                f"other. Freeze it, or: {LAYOUT_ADVICE}"
            )


def _check_no_row_numbers(model):
    for layer in descendants(model):
        if type(layer).__name__ in _READ_ROWS_BY_NUMBER:
            raise LayoutError(
                f'Layer "{layer.path or layer.name}" reads the rows of the '
                "batch whose numbers its input has, so instances in one batch "
                f"would read each other's. {LAYOUT_ADVICE}"
            )
