"""How far two distributions over the same outcomes are apart."""

import keras
from keras import ops


def log_probabilities(outputs, link, is_binary):
    """Turn a model's outputs into logarithms of probabilities.

    Args:
        outputs: Float tensor `(..., units)`.
        link: `"softmax"` or `"sigmoid"` for logits, `"identity"` for
            probabilities.
        is_binary: Boolean. Whether each unit is an event for itself, or all of
            them are the outcomes of one.

    Returns:
        Tensor of at least float32 whose last axis is that of the outcomes:
        `(..., units)`, or `(..., units, 2)` if `is_binary`.
    """
    dtype = keras.backend.result_type(outputs.dtype, "float32")
    outputs = ops.cast(outputs, dtype)
    if link == "softmax":
        return ops.log_softmax(outputs, axis=-1)
    if link == "sigmoid":
        pair = ops.log_sigmoid(outputs), ops.log_sigmoid(-outputs)
        return ops.stack(pair, axis=-1)
    if is_binary:
        return ops.stack([_log(outputs), _log(1 - outputs)], axis=-1)
    return _log(outputs)


def kl_divergence(log_p, log_q):
    """KL(P || Q), in nats, over the last axis."""
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def bidirectional_kl(log_p, log_q):
    """The mean of KL(P || Q) and KL(Q || P), in nats, over the last axis."""
    weights = ops.exp(log_p) - ops.exp(log_q)
    return 0.5 * ops.sum(weights * (log_p - log_q), axis=-1)


def _log(probabilities):
    return ops.log(ops.maximum(probabilities, keras.config.epsilon()))
