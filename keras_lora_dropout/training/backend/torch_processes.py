"""Several processes that train one model on torch, each on its own rows.

Each process holds the whole model and runs the passes of a step on its share of
the batch; then gradients and losses are averaged, before AdaLoRA and the
optimizer see them. So weights and ranks stay the same everywhere.

Processes are told apart by `torch.distributed`'s default group. Before they
exchange anything, they say where in the training they are: two that are not at
the same place raise an error, where they would mix up or wait for each other.
"""

import contextlib
import hashlib
import json
import logging

import keras
import torch
from torch import distributed

from keras_lora_dropout.core import instances
from keras_lora_dropout.core.batch_share import BatchShare
from keras_lora_dropout.core.batch_share import seed_offset
from keras_lora_dropout.core.keras_internals import descendants

logger = logging.getLogger("keras_lora_dropout")

_PLACES = (
    "the start of `fit`",
    "a training step",
    "the end of an epoch or of an evaluation inside `fit`",
    "the end of `fit`",
)
_START, _STEP, _METRICS, _END = range(len(_PLACES))
_NAMED = 5  # Differences that an error names.


def are_several(model):
    """Whether this process trains a model together with others."""
    return (
        model.train_across_processes
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def begin_run(model, params):
    """Make sure that all processes start `fit` alike.

    Args:
        model: The adapted model, once callbacks have restored it.
        params: Dictionary, the `params` of callbacks.

    Raises:
        ValueError: If the processes differ, or if the model has what cannot be
            right in several processes.
    """
    if not are_several(model):
        return
    _check_loss(model)
    _check_layers(model)
    _compare(_facts(model, params))
    logger.info(
        "Model %r trains in %d processes: gradients and losses are averaged.",
        model.name,
        distributed.get_world_size(),
    )
    _part_random_states(model)
    _let_exchange(model, True)


def finish_run(model):
    """Wait until all processes are through with `fit`."""
    if model._exchanges_metrics:
        _meet(_END)


def end_run(model):
    """Leave what `begin_run` began, also after an error."""
    if model._exchanges_metrics:
        _let_exchange(model, False)
        _shift_generators(model, -1)


@torch.compiler.disable
def share_of_batch(model, x):
    """Return the `BatchShare` of this process; `None` if it is alone."""
    if not are_several(model):
        return None
    rows = _meet(_STEP, instances.batch_size(x))
    return BatchShare(rows, distributed.get_rank())


@torch.compiler.disable
def averaged(weights, gradients, losses, share):
    """Average gradients and losses over all processes, by their rows.

    Args:
        weights: List of the trainable variables.
        gradients: List of their gradients, or `None` entries.
        losses: Dictionary of scalar tensors.
        share: What `share_of_batch` returned.

    Returns:
        The same gradients and losses, of the whole batch. A gradient is `None`
        if it is so in all processes.
    """
    if share is None:
        return gradients, losses
    found = [gradient is not None for gradient in gradients]
    filled = [
        torch.zeros_like(weight.value) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    tensors = [*filled, *losses.values()]
    scaled = [tensor * (share.rows / share.total) for tensor in tensors]
    flags = torch.tensor(found, dtype=torch.float32, device=scaled[0].device)
    *sums, counts = _sums([*scaled, flags])
    means = sums[: len(weights)]
    if not all(found):  # Reading the counts waits for the device.
        counts = counts.tolist()
        means = [m if n else None for m, n in zip(means, counts, strict=True)]
    return means, dict(zip(losses, sums[len(weights) :], strict=True))


@contextlib.contextmanager
def metrics_exchanged(model, exchanges=True):
    """Let results of metrics be those of all processes' rows, or not."""
    outer = model._exchanges_metrics
    _let_exchange(model, exchanges)
    try:
        yield
    finally:
        _let_exchange(model, outer)


def _let_exchange(model, exchanges):
    """Set whether metrics are exchanged; a model at rest bears no trace."""
    vars(model).pop("_exchanges_metrics", None)
    if exchanges:
        model._exchanges_metrics = True


@contextlib.contextmanager
def summed_metrics(model):
    """Let the states of metrics be the sums over all processes inside.

    Keras's metrics are made for that: their states are sums, unless they say
    otherwise (`aggregation`).
    """
    if not model._exchanges_metrics:
        yield
        return
    states = [v for v in model.metrics_variables if v.aggregation == "sum"]
    _meet(_METRICS, len(states))
    own = [state.value.detach().clone() for state in states]
    for state, value in zip(states, _sums(own, torch.float64), strict=True):
        state.assign(value)
    try:
        yield
    finally:
        for state, value in zip(states, own, strict=True):
            state.assign(value)


def _meet(place, count=0):
    """Wait for the other processes.

    Args:
        place: Where this process is, one of the constants above.
        count: Integer that the others are told.

    Returns:
        List of the counts of all processes.

    Raises:
        ValueError: In all processes, if they are not at the same place.
    """
    messages = _gathered(torch.tensor([place, int(count)]))
    places = [message[0] for message in messages]
    if len(set(places)) > 1:
        listed = "; ".join(
            f"process {process} is at {_PLACES[place]}"
            for process, place in enumerate(places)
        )
        raise ValueError(
            "The processes that train this model have gone apart. Received: "
            f"{listed}. Give each the same number of batches and epochs, and "
            "let them all evaluate and stop alike."
        )
    return [message[1] for message in messages]


def _gathered(message):
    """Return the message of each process, as lists of integers."""
    message = message.to(_message_device())
    messages = [
        torch.empty_like(message) for _ in range(distributed.get_world_size())
    ]
    distributed.all_gather(messages, message)
    return [other.tolist() for other in messages]


def _message_device():
    """Where messages lie: with the host, if the group can, to save a wait."""
    backends = distributed.get_backend_config()
    return "cpu" if "cpu:" in backends else keras.ops.zeros(()).device


def _sums(tensors, dtype=None):
    """Add up each of some tensors over the processes, in one exchange.

    Args:
        tensors: List of tensors, of the same shapes in all processes.
        dtype: What to add up in; by default float32, or what holds more.
    """
    if dtype is None:
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.reshape(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _compare(facts):
    """Raise `ValueError`, in all processes, if some fact is not the same."""
    sizes = set(_meet(_START, len(facts)))
    different = ["the number of weights"]
    if len(sizes) == 1:
        rows = _gathered(torch.tensor(list(facts.values())))
        columns = zip(facts, *rows, strict=True)
        different = [name for name, *column in columns if len(set(column)) > 1]
    if not different:
        return
    named = ", ".join(different[:_NAMED])
    if len(different) > _NAMED:
        named += f" and {len(different) - _NAMED} more"
    raise ValueError(
        "The processes that are to train this model together do not start "
        f"alike. They differ in: {named}. Let all load the same weights and "
        "backups, call `keras.utils.set_random_seed` with the same seed before "
        "the model is made, pass `seed` to `enable_lora_dropout`, and give "
        "each as many batches as the others. To train a model of its own in "
        "each process, set `model.train_across_processes = False`."
    )


def _facts(model, params):
    """What must be the same in all processes: names and integers."""
    layers = [
        (layer.kind, layer.lora_rank, layer.lora_alpha, layer.dropout_rate)
        for _, layer in model.adapted_layers
    ]
    settings = (
        model.lora_dropout,
        model.rank_budget,
        model.transformer_dropout,
        layers,
    )
    facts = {
        "the settings of the adapters": _digest(repr(settings)),
        "the settings of the optimizer": _digest(_configuration(model)),
        "the number of epochs": params.get("epochs") or 0,
        "the number of batches": params.get("steps") or 0,
        "the epoch to go on after": model._restored_epochs or 0,
        "the masks (`seed`)": _checksum(model.mask_seed_generator.state),
    }
    for kind, variables in (
        ("weight", model.weights),
        ("optimizer's", model.optimizer.variables),
    ):
        for variable in variables:
            facts[f'{kind} "{variable.path}"'] = _checksum(variable)
    return facts


def _configuration(model):
    config = model.optimizer.get_config()
    return json.dumps(config, default=lambda value: type(value).__name__)


def _digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _checksum(variable):
    """Sum up the bits of a variable, in integers, so in any order alike."""
    value = variable.value.detach().reshape(-1).clone()
    bits = value.view(torch.uint8)
    words, rest = bits.split([len(bits) // 8 * 8, len(bits) % 8])
    return int(words.view(torch.int64).sum() + rest.sum(dtype=torch.int64))


def _check_loss(model):
    """Raise `ValueError` for losses of which the mean is not what is meant."""
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", None)
        if reduction in ("sum", "mean_with_sample_weight"):
            raise ValueError(
                "Several processes average their losses by rows, which is not "
                f"what this loss means. Received: {type(loss).__name__}("
                f'reduction="{reduction}"). Use "sum_over_batch_size".'
            )


def _check_layers(model):
    """Raise `ValueError` for layers that need the rows of all processes."""
    for layer in descendants(model):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        if is_norm and layer.trainable:
            raise ValueError(
                f'Layer "{layer.path}" normalizes by the rows of the whole '
                "batch, of which each process has its own alone. Received: a "
                "`BatchNormalization` with trainable=True in several "
                "processes. Set `trainable = False`, or use "
                "`GroupNormalization` or `LayerNormalization`."
            )


def _part_random_states(model):
    """Let ordinary dropout drop other places in each process's rows.

    Process 0 keeps its states, and files that it writes hold those.
    """
    process = distributed.get_rank()
    seed = int(torch.randint(2**31, (), device="cpu"))
    if process:
        torch.manual_seed(seed + process)
    _shift_generators(model, 1)


def _shift_generators(model, sign):
    """Shift the seed generators of layers; masks are drawn for all."""
    process = distributed.get_rank()
    common = model.mask_seed_generator, model.ensemble_seed_generator
    known = {id(generator.state) for generator in common}
    for state in model._generators():
        if id(state) not in known:
            state.assign(state.value + sign * seed_offset(process, state))
