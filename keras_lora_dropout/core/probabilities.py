"""Turning a model's outputs into probabilities, and back."""

import keras
from keras import ops

from keras_lora_dropout.core.keras_internals import producer

_PROBABILITY_ACTIVATIONS = (
    keras.activations.softmax,
    keras.activations.sigmoid,
)


def output_links(model):
    """Say how each flattened output of a model becomes probabilities.

    Returns:
        Tuple of `"softmax"`, `"sigmoid"`, `"identity"` (the output already is
        a probability, or is none) or `None` (nothing tells; see
        `default_link`). It has a single entry where the number of outputs is
        not known.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [None])
    losses = _losses(model, len(outputs))
    links = [link_of(loss) for loss in losses]
    # A regression next to a classification, as the boxes of a detector.
    others = "identity" if any(links) else None
    return tuple(
        "identity" if _is_probability(output) else link or (loss and others)
        for output, loss, link in zip(outputs, losses, links, strict=True)
    )


def link_of(loss):
    """The link that a compiled loss implies, or `None` if it implies none.

    Args:
        loss: What `compile` was given for one output: a `keras.losses.Loss`,
            a name, a function or `None`.
    """
    title = _title_of(loss)
    if "crossentropy" not in title:
        return None
    if isinstance(loss, type):
        loss = loss()
    if not isinstance(loss, keras.losses.Loss) or not _from_logits(loss):
        return "identity"
    return "sigmoid" if "binary" in title else "softmax"


def are_events(model):
    """Say of each flattened output whether its units are events of their own.

    Returns:
        Tuple of booleans, as long as `output_links`: whether the output comes
        out of a sigmoid, or is trained with a loss for such. It tells apart
        what `"identity"` leaves open.
    """
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [None])
    losses = _losses(model, len(outputs))
    return tuple(
        _activation_of(output) is keras.activations.sigmoid
        or "binary" in _title_of(loss)
        for output, loss in zip(outputs, losses, strict=True)
    )


def default_link(outputs):
    """Softmax over a last axis of several entries, sigmoid over one."""
    return "softmax" if outputs.shape[-1] != 1 else "sigmoid"


def to_probabilities(outputs, link):
    """Apply a link in float32 at the least."""
    if link == "identity":
        return outputs
    outputs = ops.cast(
        outputs, keras.backend.result_type(outputs.dtype, "float32")
    )
    function = ops.softmax if link == "softmax" else ops.sigmoid
    return function(outputs)


def to_outputs(probabilities, link):
    """Undo `to_probabilities`, so that the model's own loss can be applied."""
    if link == "identity":
        return probabilities
    tiny = keras.config.epsilon() ** 2
    log = ops.log(ops.maximum(probabilities, tiny))
    if link == "softmax":
        return log
    return log - ops.log(ops.maximum(1.0 - probabilities, tiny))


def _losses(model, count):
    loss = model.loss if model.compiled else None
    if not keras.tree.is_nested(loss):
        return [loss] * count
    if isinstance(loss, dict):
        outputs = getattr(model, "output", None)
        names = getattr(model, "output_names", sorted(loss))
        if isinstance(outputs, dict):
            names = sorted(outputs)  # In the order that they are flattened in.
        losses = [loss.get(name) for name in names]
    else:
        losses = keras.tree.flatten(loss)
    return losses if len(losses) == count else [None] * count


def _is_probability(output):
    """Whether a symbolic output comes out of a softmax or sigmoid."""
    return _activation_of(output) in _PROBABILITY_ACTIVATIONS


def _activation_of(output):
    """Return the activation that a symbolic output comes out of."""
    if output is None:
        return None
    operation, _ = producer(output)
    if isinstance(operation, keras.layers.Softmax):
        return keras.activations.softmax
    return getattr(operation, "activation", None)


def _title_of(loss):
    """Return the name of a loss: lower case, no underscores."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        loss = type(loss)
    return getattr(loss, "__name__", "").replace("_", "").lower()


def _from_logits(loss):
    return bool(loss.get_config().get("from_logits", False))
