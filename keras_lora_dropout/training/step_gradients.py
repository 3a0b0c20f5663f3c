"""The gradients of one optimizer step, which is not always one batch."""

from keras import ops

from keras_lora_dropout.core.keras_internals import accumulated_gradients

_NO_SCALE = 1.0


def step_gradients(optimizer, weights, gradients):
    """Return the gradients by which the optimizer moves the weights.

    That is, without loss scale, and averaged over the batches of one step.

    Args:
        optimizer: The compiled optimizer, before it takes its step.
        weights: List of the trainable variables.
        gradients: List of their gradients, as given to the optimizer; `None`
            where the loss does not depend on a variable.

    Returns:
        Dictionary of tensors by the id of their variable.
    """
    if not optimizer.built:  # TensorFlow leaves that to the first step.
        optimizer.build(weights)
    scale = optimizer.scale_loss(_NO_SCALE)
    batches = batches_per_step(optimizer)
    accumulated = accumulated_gradients(_unscaled(optimizer), weights)
    found = {}
    for weight, gradient, earlier in zip(
        weights, gradients, accumulated, strict=True
    ):
        if gradient is None:
            gradient = ops.zeros(weight.shape, weight.dtype)
        if scale is not _NO_SCALE:
            gradient = gradient / scale
        if earlier is not None:
            gradient = (gradient + earlier) / batches
        found[id(weight)] = gradient
    return found


def batches_per_step(optimizer):
    """Number of batches whose gradients make up one optimizer step."""
    return _unscaled(optimizer).gradient_accumulation_steps or 1


def _unscaled(optimizer):
    """The optimizer inside a `LossScaleOptimizer`, which does the counting."""
    return getattr(optimizer, "inner_optimizer", optimizer)
