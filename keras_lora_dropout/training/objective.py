"""The N-sample objective, [L] Eq. 7, written once for all backends.

A step consists of passes. `sampling="parallel"` makes one pass that carries
all N instances in its batch; `sampling="sequential"` makes N passes of one
instance each. The backends differ only in how they turn the loss of a pass
into gradients and add those up.
"""

import contextlib
import inspect

import keras

from keras_lora_dropout.core import instances
from keras_lora_dropout.core import layout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.core.structured_dropout import DropoutDraws
from keras_lora_dropout.layers.recorded_inputs import recorded_inputs
from keras_lora_dropout.training.consistency import CONSISTENCY
from keras_lora_dropout.training.consistency import compared_tensors
from keras_lora_dropout.training.consistency import consistency_loss
from keras_lora_dropout.training.consistency import partners_among
from keras_lora_dropout.training.row_losses import is_mean_over_rows
from keras_lora_dropout.training.unused_adapters import warn_of_unused


def draw_passes(model, x, share=None):
    """Draw the masks of one training step.

    Args:
        model: The adapted model.
        x: Inputs of the batch, a nested structure of tensors.
        share: `BatchShare`, if the batch is a part of a larger one.

    Returns:
        A list of draws, one entry for each pass: a tensor of shape
        `(groups, columns)`, one group for each mask in the pass, and the seed
        of structured dropout, or `None`.
    """
    settings = model.lora_dropout
    plan = model.mask_plan
    values = masks.draw_instances(
        (settings.num_samples, _mask_groups(model, x, share), plan.width),
        model.mask_seed_generator,
        settings.mask_sampling,
    )
    values = _own_groups(model, values, share)
    rows = instances.batch_size(x)
    if settings.sampling == "sequential":
        return [
            (
                instances.lay_out(values[n : n + 1], rows),
                _dropout_seed(model, share),
            )
            for n in range(settings.num_samples)
        ]
    if settings.num_samples > 1:
        layout.check_parallel_layout(
            model, _forward(model), x, settings.num_samples
        )
    return [(instances.lay_out(values, rows), _dropout_seed(model, share))]


def _mask_groups(model, x, share):
    """Number of mask groups of one instance, those of all processes."""
    if model.lora_dropout.mask_sharing == "batch":
        return 1
    return instances.batch_size(x) if share is None else share.total


def _own_groups(model, values, share):
    """Keep this process's groups `(..., groups, width)` of all."""
    if share is None or model.lora_dropout.mask_sharing == "batch":
        return values
    return share.take(values)


def _dropout_seed(model, share):
    """Seed of structured dropout, which each process draws for its own rows."""
    seed = model.next_dropout_seed()
    return seed if share is None or seed is None else share.own_seed(seed)


def kept_prefix(model, x, passes):
    """Run what the passes of one step share, before the first of them.

    Args:
        model: The adapted model.
        x: Inputs of the batch.
        passes: What `draw_passes` returned.

    Returns:
        What `pass_loss` takes; `None` if the passes share nothing, as when
        there is a single one, or when layers add losses of their own.
    """
    settings = model.lora_dropout
    if settings.sampling == "parallel" or settings.num_samples == 1:
        return None
    kept = shared_prefix.kept_by(
        model.mask_plan,
        lambda: _forward(model)(x),
        for_gradients=True,
        dropout=_dropout(passes[0]),
    )
    return None if model.losses else kept


def partner(model, x, share=None):
    """Run the pass that all passes of one step are compared with.

    Call it where no gradients are recorded. Takes what `draw_passes` takes.

    Returns:
        What `pass_loss` takes: list of tensors of `B` rows. `None` if the
        instances of the one pass are compared with each other, or if nothing
        is.
    """
    consistency = model.consistency
    if consistency is None:
        return None
    draws, training = masks.Draws(model.mask_plan), False
    if consistency.kind == "kl":
        if instances_per_pass(model) > 1:
            return None
        rows = instances.batch_size(x)
        shape = _mask_groups(model, x, share), model.mask_plan.width
        values = masks.draw_uniform(shape, model.mask_seed_generator)
        values = _own_groups(model, values, share)
        values = instances.lay_out(values[None], rows)
        seed, training = _dropout_seed(model, share), True
        draws = masks.Draws(
            model.mask_plan, values, rows, dropout=_dropout((values, seed))
        )
    with masks.use_draws(draws), recorded_inputs() as representations:
        outputs = model(x, training=training)
    return compared_tensors(model, outputs, representations)


def instances_per_pass(model):
    """Number of mask instances that one forward pass carries."""
    settings = model.lora_dropout
    return settings.num_samples if settings.sampling == "parallel" else 1


def pass_draws(model, x, drawn):
    """Return the `Draws` that layers read in a pass of `draw_passes`."""
    count = instances_per_pass(model)
    rows = instances.batch_size(x) * count
    dropout = _dropout(drawn, count)
    return masks.Draws(model.mask_plan, drawn[0], rows, dropout=dropout)


def _dropout(drawn, num_instances=1):
    _, seed = drawn
    return None if seed is None else DropoutDraws(seed, num_instances)


def pass_loss(model, x, y, sample_weight, kept, partner):
    """Mean loss over the instances of one pass, and their mean output.

    Call it inside `use_draws(pass_draws(...))`. Each instance's loss is the
    model's own `compute_loss` on its own outputs, so that every loss,
    reduction, weight and custom `compute_loss` keeps its meaning.

    Args:
        model: The adapted model.
        x, y, sample_weight: The batch.
        kept: What `kept_prefix` returned for it.
        partner: What `partner` returned for it.

    Returns:
        Tuple `(objective, losses, outputs)`: the scalar to differentiate, the
        losses to report by name, the outputs averaged over the instances, or
        `None` if no metric reads them. The objective adds AdaLoRA's
        orthogonality penalty and the consistency loss to the loss, and applies
        the optimizer's loss scale, where there are such.
    """
    count = instances_per_pass(model)
    with shared_prefix.reuse(kept), recorded_inputs() as representations:
        outputs = layout.run_parallel(model, _forward(model), x, count)
    warn_of_unused(model)
    reported = {}
    if model.consistency is not None:
        tensors = compared_tensors(model, outputs, representations)
        partners = instances.tile(partner, count)
        if partner is None:
            partners = partners_among(tensors, count)
        weights = instances.tile(sample_weight, count)
        reported[CONSISTENCY] = consistency_loss(
            model, tensors, partners, weights
        )
    rows = instances.batch_size(x) * count
    compute_loss = _compute_loss(model)
    if count > 1 and is_mean_over_rows(model):
        instances.check_outputs(outputs, rows)
        samples = None
        y, sample_weight = instances.tile((y, sample_weight), count)
        loss = compute_loss(x, y, outputs, sample_weight)
    else:
        samples = instances.split(outputs, count, rows)
        losses = []
        for n, out in enumerate(samples):
            with _draws_of_instance(model, n):
                losses.append(compute_loss(x, y, out, sample_weight))
        loss = losses[0] if count == 1 else sum(losses) / count
    reported["loss"] = loss
    objective = loss
    if model.consistency is not None:
        penalty = model.consistency.weight * reported[CONSISTENCY]
        objective = objective + penalty
    allocator = model.rank_allocator
    if allocator is not None and allocator.settings.orthogonal_penalty:
        penalty = allocator.penalty()
        reported["orthogonal_penalty"] = penalty
        weight = allocator.settings.orthogonal_penalty
        objective = objective + weight * penalty
    objective = model.optimizer.scale_loss(objective)
    # Logits over a vocabulary can be the largest tensors of all.
    if not _reads_outputs(model):
        return objective, reported, None
    if samples is None:
        return objective, reported, instances.mean_of_blocks(outputs, count)
    return objective, reported, instances.mean(samples)


def _draws_of_instance(model, instance):
    """Return the context in which one instance's loss is computed.

    A `compute_loss` of the model's own may run parts of the model again, on the
    rows of one instance.
    """
    count = instances_per_pass(model)
    is_keras = type(model).compute_loss is keras.Model.compute_loss
    if count == 1 or is_keras:
        return contextlib.nullcontext()
    return masks.use_draws(masks.current_draws().only(instance, count))


def around_update(model, weights, gradients):
    """Return the context in which the optimizer takes its step.

    On leaving it, AdaLoRA scores and prunes the ranks, if the model has a rank
    schedule.
    """
    allocator = model.rank_allocator
    if allocator is None or not allocator.is_open:
        return contextlib.nullcontext()
    return allocator.around_update(model.optimizer, weights, gradients)


def update_metrics(model, x, y, outputs, sample_weight, losses, share=None):
    """Track the loss, update the metrics, return the logs.

    With a `BatchShare`, losses are those of the whole batch.
    """
    losses = dict(losses)
    loss = losses.pop("loss")
    # Metrics add up over the processes, which have the same loss.
    rows = instances.batch_size(x) if share is None else share.mean_rows
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=rows)
            break
    logs = model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
    if CONSISTENCY in losses:
        model.consistency_metric.update_state(
            losses[CONSISTENCY], sample_weight=rows
        )
        losses[CONSISTENCY] = model.consistency_metric.result()
    if model.rank_allocator is not None:
        losses.update(model.rank_allocator.logs())
    return {**logs, **losses}


def _reads_outputs(model):
    """Whether a metric of the training step reads the model's outputs."""
    is_own = type(model).compute_metrics is keras.Model.compute_metrics
    others = [metric for metric in model.metrics if metric.name != CONSISTENCY]
    return not is_own or len(others) > 1


def _forward(model):
    return lambda inputs: model(inputs, training=True)


def _compute_loss(model):
    # Overrides written for an early Keras 3 take no `training`.
    parameters = inspect.signature(model.compute_loss).parameters
    extra = {"training": True} if "training" in parameters else {}

    def compute_loss(x, y, y_pred, sample_weight):
        return model.compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **extra
        )

    return compute_loss
