"""The N-sample objective, [L] Eq. 7, written once for all backends.

A step consists of passes. `sampling="parallel"` makes one pass that carries
all N instances in its batch; `sampling="sequential"` makes N passes of one
instance each. The backends differ only in how they turn the loss of a pass
into gradients and add those up.
"""

import contextlib
import inspect

import keras
from keras import ops

from keras_lora_dropout.core import instances
from keras_lora_dropout.core import layout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.training.row_losses import is_mean_over_rows


def draw_passes(model, x):
    """Draw the masks of one training step.

    Args:
        model: The adapted model.
        x: Inputs of the batch, a nested structure of tensors.

    Returns:
        A list of draws, one entry for each pass: tensors of shape
        `(groups, columns)`, one group for each mask in the pass.
    """
    settings = model.lora_dropout
    groups = 1
    if settings.mask_sharing == "example":
        groups = instances.batch_size(x)
    plan = model.mask_plan
    values = masks.draw_instances(
        (settings.num_samples, groups, plan.width),
        model.mask_seed_generator,
        settings.mask_sampling,
    )
    if settings.sampling == "sequential":
        return [values[n] for n in range(settings.num_samples)]
    if settings.num_samples > 1:
        layout.check_parallel_layout(
            model, _forward(model), x, settings.num_samples
        )
    return [ops.reshape(values, (settings.num_samples * groups, plan.width))]


def kept_prefix(model, x):
    """Run what the passes of one step share, before the first of them.

    Returns:
        What `pass_loss` takes; `None` if the passes share nothing, as when
        there is a single one, or when layers add losses of their own.
    """
    settings = model.lora_dropout
    if settings.sampling == "parallel" or settings.num_samples == 1:
        return None
    kept = shared_prefix.kept_by(
        model.mask_plan, lambda: _forward(model)(x), for_gradients=True
    )
    return None if model.losses else kept


def instances_per_pass(model):
    """Number of mask instances that one forward pass carries."""
    settings = model.lora_dropout
    return settings.num_samples if settings.sampling == "parallel" else 1


def pass_draws(model, x, values):
    """Return the `Draws` that layers read in the pass of `values`."""
    rows = instances.batch_size(x) * instances_per_pass(model)
    return masks.Draws(model.mask_plan, values, rows)


def pass_loss(model, x, y, sample_weight, kept):
    """Mean loss over the instances of one pass, and their mean output.

    Call it inside `use_draws(pass_draws(...))`. Each instance's loss is the
    model's own `compute_loss` on its own outputs, so that every loss,
    reduction, weight and custom `compute_loss` keeps its meaning.

    Args:
        model: The adapted model.
        x, y, sample_weight: The batch.
        kept: What `kept_prefix` returned for it.

    Returns:
        Tuple `(objective, losses, outputs)`: the scalar to differentiate, the
        losses to report by name, the outputs averaged over the instances, or
        `None` if no metric reads them. The objective adds AdaLoRA's
        orthogonality penalty to the loss and applies the optimizer's loss
        scale, where there are such.
    """
    count = instances_per_pass(model)
    with shared_prefix.reuse(kept):
        outputs = layout.run_parallel(model, _forward(model), x, count)
    rows = instances.batch_size(x) * count
    compute_loss = _compute_loss(model)
    if count > 1 and is_mean_over_rows(model):
        instances.check_outputs(outputs, rows)
        samples = None
        y, sample_weight = instances.tile((y, sample_weight), count)
        loss = compute_loss(x, y, outputs, sample_weight)
    else:
        samples = instances.split(outputs, count, rows)
        losses = [compute_loss(x, y, out, sample_weight) for out in samples]
        loss = losses[0] if count == 1 else sum(losses) / count
    reported = {"loss": loss}
    objective = loss
    allocator = model.rank_allocator
    if allocator is not None and allocator.settings.orthogonal_penalty:
        penalty = allocator.penalty()
        reported["orthogonal_penalty"] = penalty
        objective = loss + allocator.settings.orthogonal_penalty * penalty
    objective = model.optimizer.scale_loss(objective)
    # Logits over a vocabulary can be the largest tensors of all.
    if not _reads_outputs(model):
        return objective, reported, None
    if samples is None:
        return objective, reported, instances.mean_of_blocks(outputs, count)
    return objective, reported, instances.mean(samples)


def around_update(model, weights, gradients):
    """Return the context in which the optimizer takes its step.

    On leaving it, AdaLoRA scores and prunes the ranks, if the model has a rank
    schedule.
    """
    allocator = model.rank_allocator
    if allocator is None or not allocator.is_open:
        return contextlib.nullcontext()
    return allocator.around_update(model.optimizer, weights, gradients)


def update_metrics(model, x, y, outputs, sample_weight, losses):
    """Track the loss, update the metrics, return the logs."""
    losses = dict(losses)
    loss = losses.pop("loss")
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=instances.batch_size(x))
            break
    logs = model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
    if model.rank_allocator is not None:
        losses.update(model.rank_allocator.logs())
    return {**logs, **losses}


def _reads_outputs(model):
    """Whether a metric of the training step reads the model's outputs."""
    is_own = type(model).compute_metrics is keras.Model.compute_metrics
    return not is_own or len(model.metrics) > 1


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
