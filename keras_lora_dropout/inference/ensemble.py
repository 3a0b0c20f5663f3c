"""The test-time ensemble, [L] Eq. 8: mean over N mask instances."""

import dataclasses

import keras
from keras import ops

from keras_lora_dropout.core import instances
from keras_lora_dropout.core import layout
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import probabilities
from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.core.structured_dropout import DropoutDraws
from keras_lora_dropout.training.backend import each_in_turn
from keras_lora_dropout.training.backend import python_loop


@dataclasses.dataclass(frozen=True)
class EnsembleRequest:
    """What one `ensemble_predict` or `ensemble_evaluate` call asks for.

    Attributes:
        num_samples: Number of mask instances N.
        return_samples: Whether the N outputs stay apart, `(B, N, ...)`.
        links: `None` to average raw outputs; else, for each flattened output,
            how it becomes probabilities, which are averaged then.
        as_outputs: Whether averaged probabilities are turned back into what
            the model's own loss expects.
        drops: Whether structured dropout is part of the instances.
        only: `None`, or the index of the one instance that is computed.
    """

    num_samples: int
    return_samples: bool = False
    links: tuple | None = None
    as_outputs: bool = False
    drops: bool = False
    only: int | None = None


def ensemble_draws(model, count):
    """Draw the `count` instances of the model's ensemble seed.

    Returns:
        Tensor of shape `(count, model.mask_plan.width)`.
    """
    return masks.draw_instances(
        (count, model.mask_plan.width),
        model.ensemble_seed_generator,
        model.lora_dropout.mask_sampling,
    )


def ensemble_outputs(model, call, request, args, kwargs):
    """Run a forward pass of the model under N mask instances.

    Every call draws from the model's fixed ensemble seed, so that all batches
    of one prediction see the same N instances whatever their size.

    Args:
        model: The adapted model.
        call: The model's own `call`, a function of `(model, *args, **kwargs)`.
        request: An `EnsembleRequest`.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The outputs averaged over the instances, stacked along axis 1, or those
        of one of them.
    """
    count, plan = request.num_samples, model.mask_plan
    values = ensemble_draws(model, count)
    dropout = None
    if request.drops:
        seed = model.ensemble_seed_generator.next()
        dropout = DropoutDraws(seed, count, rows_alike=True)

    def forward(inputs):
        args, kwargs = inputs
        return call(model, *args, **kwargs)

    inputs = args, kwargs
    if request.only is not None:
        n = request.only
        draws = values[n : n + 1]
        return runner(plan, lambda: forward(inputs), draws, dropout)(n, draws)
    if model.lora_dropout.sampling == "parallel" and count > 1:
        layout.check_parallel_layout(model, forward, inputs, count)
        rows = instances.batch_size(inputs)
        of_blocks = instances.lay_out(ops.expand_dims(values, 1), rows)
        rows = rows * count
        draws = masks.Draws(plan, of_blocks, rows, dropout=dropout)
        with masks.use_draws(draws):
            outputs = layout.run_parallel(model, forward, inputs, count)
        samples = instances.split(outputs, count, rows)
        return combine(lambda n, _: samples[n], values, request)
    run = runner(plan, lambda: forward(inputs), values, dropout)
    return combine(run, values, request, each_in_turn)


def runner(plan, forward, values, dropout=None):
    """Prepare to run a model under one mask instance after another.

    Args:
        plan: The model's `MaskPlan`.
        forward: Function without arguments that calls the model.
        values: Tensor of shape `(num_instances, plan.width)`, the draws.
        dropout: `DropoutDraws` of all instances, or `None`.

    Returns:
        Function of an instance's index and draws, `(1, plan.width)`, that
        returns the instance's outputs.
    """
    kept = None
    if values.shape[0] > 1:
        kept = shared_prefix.kept_by(
            plan, forward, for_gradients=False, dropout=dropout
        )

    def run(n, draw):
        draws = masks.Draws(plan, draw, dropout=dropout and dropout.only(n))
        with masks.use_draws(draws), shared_prefix.reuse(kept):
            return forward()

    return run


def combine(run, values, request, in_turn=python_loop.each_in_turn):
    """Average outputs, or stack them, as a request says.

    Args:
        run: Function of an instance's index and draws that returns its outputs.
        values: Tensor of shape `(num_instances, width)`, the draws.
        request: An `EnsembleRequest`.
        in_turn: What calls that function: `each_in_turn` of the backend, or of
            Python.
    """

    def each(sample, function):
        if request.links is None:
            return sample
        leaves = keras.tree.flatten(sample)
        links = request.links
        if len(links) == 1:  # A model without a graph has one entry for all.
            links *= len(leaves)
        changed = [
            function(leaf, link or probabilities.default_link(leaf))
            for leaf, link in zip(leaves, links, strict=True)
        ]
        return keras.tree.pack_sequence_as(sample, changed)

    def sample(n, draw):
        return each(run(n, draw), probabilities.to_probabilities)

    if request.return_samples:
        _, samples = in_turn(
            lambda _, *args: (None, sample(*args)), None, values
        )
        return keras.tree.map_structure(
            lambda *leaves: ops.stack(leaves, axis=1), *samples
        )
    outputs = instances.mean_in_turn(sample, values, in_turn)
    if request.as_outputs:
        outputs = each(outputs, probabilities.to_outputs)
    return outputs
