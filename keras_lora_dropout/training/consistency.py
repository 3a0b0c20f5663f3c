"""The consistency loss: passes under different masks shall agree.

Reference: [H], Wang et al., "LoRA Meets Dropout under a Unified Framework",
2024, https://arxiv.org/abs/2403.00812, section 3: a compensation for the gap
between training, where layers drop, and prediction, where none does.
"""

import dataclasses

import keras
from keras import ops

from keras_lora_dropout.core import divergence
from keras_lora_dropout.core import instances
from keras_lora_dropout.core import probabilities
from keras_lora_dropout.core import validation

KINDS = ("kl", "js")
# Name of the metric and of the entry in the logs.
CONSISTENCY = "consistency_loss"
COMPARED = ("auto", "outputs", "representations")


@dataclasses.dataclass(frozen=True)
class Consistency:
    """How much, and in what, passes under different masks shall agree.

    The loss gains `weight` times the divergence, in nats, of each pass from
    another one, which counts as a constant: gradients flow through one of the
    two. It is reported as `consistency_loss`, before the weight.

    Reference: [Wang et al., 2024](https://arxiv.org/abs/2403.00812), section 3.

    Attributes:
        weight: Positive number.
        kind: `"kl"`: bidirectional KL, the mean of KL(P || Q) and KL(Q || P),
            of two passes with masks of their own. With N > 1 instances in
            parallel, each is compared with the one before it, for no more than
            the divergence costs; else all are compared with one further
            forward pass. `"js"`: KL(P || Q) with Q the pass without any mask
            and dropout, one further forward pass in any case. (The paper calls
            it so; it is not the Jensen-Shannon divergence.)
        compares: `"outputs"`: the distributions that the model puts out.
            `"representations"`: the inputs of its last layer, under a softmax
            over the features. `"auto"`: the former if the compiled losses are
            cross-entropies (classification), the latter otherwise
            (regression).

    Example:

    >>> Consistency(0.5)
    Consistency(weight=0.5, kind='kl', compares='auto')
    """

    weight: float = 1.0
    kind: str = "kl"
    compares: str = "auto"

    def __post_init__(self):
        weight = validation.number("weight", self.weight, "above 0", low=0)
        validation.keep(self, weight=weight)
        validation.word("kind", self.kind, KINDS)
        validation.word("compares", self.compares, COMPARED)


class ConsistencyMetric(keras.metrics.Mean):
    """Mean of the consistency loss over the batches of an epoch."""

    def save_own_variables(self, store):
        """Write nothing: files are the same with and without it."""

    def load_own_variables(self, store):
        """Read nothing, likewise."""


def compared_tensors(model, outputs, representations):
    """Return what the consistency of a model compares.

    Args:
        model: The adapted model.
        outputs: Nested structure of its outputs in some pass.
        representations: List of the inputs of its last layers in that pass.

    Returns:
        List of tensors with a leading axis of rows.
    """
    if _compares_outputs(model):
        return keras.tree.flatten(outputs)
    if not representations:
        raise ValueError(
            f'Model "{model.name}" has no layer of which the inputs could be '
            "taken for its last representations. Received: "
            f"compares={model.consistency.compares!r}. Pass "
            '`Consistency(..., compares="outputs")`.'
        )
    return keras.tree.flatten(representations)


def consistency_loss(model, tensors, partners, sample_weight):
    """Return the divergence of each row from its partner, averaged.

    Reduced over rows, and weighted, as the model's compiled loss is.

    Args:
        model: The adapted model.
        tensors: What `compared_tensors` returned for this pass.
        partners: The same of what it is compared with, of the same shapes; no
            gradients flow through it.
        sample_weight: Nested structure of weights of these rows, or `None`.

    Returns:
        Scalar tensor.
    """
    count = len(tensors)
    weights = keras.tree.flatten(sample_weight)
    if len(weights) != count:
        weights = weights[:1] * count or [None] * count
    links = [("softmax", False)] * count
    if _compares_outputs(model):
        links = _links(model, tensors)
    total = 0.0
    for tensor, partner, weight, link in zip(
        tensors, partners, weights, links, strict=True
    ):
        loss = _Divergence(model.consistency.kind, *link, _reduction(model))
        if weight is not None and len(weight.shape) >= len(tensor.shape):
            weight = None  # Weights of tokens tell nothing of pooled ones.
        total += loss(ops.stop_gradient(partner), tensor, weight)
    return total


def partners_among(tensors, count):
    """Return for the rows of each instance those of the one before it."""

    def previous(tensor):
        blocks = instances.blocks(tensor, count)
        rolled = instances.join(ops.roll(blocks, 1, axis=0))
        instances.copy_mask(tensor, rolled)
        return rolled

    return [previous(tensor) for tensor in tensors]


class _Divergence(keras.losses.Loss):
    def __init__(self, kind, link, is_binary, reduction):
        super().__init__(name="consistency", reduction=reduction)
        self.kind, self.link, self.is_binary = kind, link, is_binary

    def call(self, y_true, y_pred):
        p, q = (
            divergence.log_probabilities(outputs, self.link, self.is_binary)
            for outputs in (y_pred, y_true)
        )
        if self.kind == "kl":
            values = divergence.bidirectional_kl(p, q)
        else:
            values = divergence.kl_divergence(p, q)
        return ops.mean(values, axis=-1) if self.is_binary else values


def _compares_outputs(model):
    compares = model.consistency.compares
    if compares == "auto":
        return None not in probabilities.output_links(model)
    return compares == "outputs"


def _links(model, outputs):
    """Return `(link, is_binary)` of each output."""
    links = probabilities.output_links(model)
    events = probabilities.are_events(model)
    if len(links) == 1:  # A model without a graph has one entry for all.
        links, events = links * len(outputs), events * len(outputs)
    found = []
    for output, link, is_event in zip(outputs, links, events, strict=True):
        link = link or probabilities.default_link(output)
        is_binary = link == "sigmoid" or (
            link == "identity" and (is_event or output.shape[-1] == 1)
        )
        found.append((link, is_binary))
    return found


def _reduction(model):
    """How the model's own loss is reduced over rows."""
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", None)
        if reduction in ("sum", "mean", "mean_with_sample_weight"):
            return reduction
    return "sum_over_batch_size"
