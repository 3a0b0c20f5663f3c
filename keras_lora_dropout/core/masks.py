"""Mask instances: how they are drawn, and which ones a forward pass uses.

A mask instance belongs to one forward pass of a whole model. The model draws
all its layers' masks at once (`draw_uniform`) and opens `use_draws` around
the pass; every call of a layer inside reads its columns of that one draw. So a
layer that is called twice, or computed again by gradient checkpointing, sees
the same masks, and nothing is stored on a layer that a tracer could leak from.
"""

import contextlib
import copy
import functools
import threading

import keras
from keras import ops

from keras_lora_dropout.core import instances
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.light_ops import cast
from keras_lora_dropout.core.stratified import stratify

_state = threading.local()


class FixedSeedGenerator(keras.random.SeedGenerator):
    """A seed generator whose `next` does not advance.

    Its `state` is a variable, so that a compiled function sees a new seed
    without being compiled again, and draws the same numbers for every batch.
    """

    def next(self, ordered=True):
        return self.state.value * 1

    def set(self, seed):
        """Set the seed to an integer."""
        self.state.assign(ops.convert_to_tensor([seed, 0], self.state.dtype))


class GivenSeed(keras.random.SeedGenerator):
    """A seed generator around a tensor, the state of another one."""

    def __init__(self, state):
        self._given = state  # No variable, unlike those of Keras.

    def next(self, ordered=True):
        return self._given


class MaskPlan:
    """Which columns of a model's draws belong to which adapted layer.

    Args:
        layers: The adapted layers, in forward order.
        may_share: Boolean. Whether instances may share what lies before the
            first of them.
        dropping: The layers with structured dropout, which instances do not
            share while it is active either.
    """

    def __init__(self, layers, may_share=True, dropping=()):
        self.may_share = may_share
        self.dropping = frozenset(map(id, dropping))
        self.columns = {}  # Two slices for each layer, one for each mask.
        self.width = 0
        for layer in layers:
            middle = self.width + layer.mask_sizes[0]
            stop = self.width + layer.mask_width
            own = slice(self.width, middle), slice(middle, stop)
            self.columns[id(layer)] = own
            self.width = stop
        self._touched = {}
        # Whether instances share what lies before the first adapted layer: one
        # after another, and in one batch, which is found out at first use.
        self.keeps_prefix = False
        self.spreads_prefix = False
        self.layout_checked = False
        # Ids of the layers whose adapters were called; whether anyone looked.
        self.called = set()
        self.usage_checked = False

    def touches(self, operation):
        """Whether each instance has an operation for itself.

        So it is for an adapted layer, for one with structured dropout while
        that is active, and for whatever contains such a layer.
        """
        if id(operation) not in self._touched:
            inside = [operation]
            if isinstance(operation, keras.Layer):
                inside += descendants(operation)
            self._touched[id(operation)] = (
                any(id(layer) in self.columns for layer in inside),
                any(id(layer) in self.dropping for layer in inside),
            )
        is_adapted, drops = self._touched[id(operation)]
        return is_adapted or (drops and current_dropout() is not None)


class Draws:
    """What the adapted layers of a model use in one forward pass.

    Args:
        plan: The model's `MaskPlan`.
        values: Tensor of shape `(groups, plan.width)` in `[0, 1)`; the rows of
            a batch are split into `groups` equal blocks, one mask each. `None`
            for the mean network: no masks.
        rows: Length of the leading axis of the batch, or `None` if unknown.
        inputs_shared: Boolean. Whether a layer's input has a leading axis of 1
            that all groups share; its output has one of `groups` then.
        in_parts: Boolean. Whether a layer with masks then returns its output
            in parts instead, not multiplied out (`products.shared_parts`).
        dropout: `structured_dropout.DropoutDraws`, or `None` if no layer drops
            in structured ways.
    """

    def __init__(
        self,
        plan,
        values=None,
        rows=None,
        inputs_shared=False,
        in_parts=False,
        dropout=None,
    ):
        self.plan = plan
        self.values = values
        self.rows = rows
        self.inputs_shared = inputs_shared
        self.in_parts = in_parts
        self.dropout = dropout
        self._masks = {}  # Those of all layers, by rate and dtype.

    @property
    def groups(self):
        """Number of mask groups; 1 without masks."""
        return 1 if self.values is None else self.values.shape[0]

    def only(self, instance, num_instances):
        """Return what one of N instances draws, for a batch of its own."""
        one = copy.copy(self)
        if self.values is not None:
            one.values = instances.blocks(self.values, num_instances)[instance]
            one._masks = {}
        if isinstance(self.rows, int):
            one.rows = self.rows // num_instances
        one.dropout = self.dropout and self.dropout.only(instance)
        return one

    def covers(self, layer):
        """Whether the layer is one of the model's adapted layers."""
        return id(layer) in self.plan.columns

    def masks_of(self, layer):
        """Return the 0/1 masks of a layer as NumPy arrays.

        Returns:
            Tuple of `mask_a (groups, in)` and `mask_b (groups, out)`, float32.
        """
        return tuple(map(ops.convert_to_numpy, self.keep(layer, "float32")))

    def keep(self, layer, dtype):
        """Return the 0/1 masks of a layer as tensors; `None` for no masks.

        Args:
            layer: A layer that `covers` is true of.
            dtype: String.
        """
        if self.values is None:
            return None
        rate, columns = layer.dropout_rate, self.plan.columns[id(layer)]
        if keras.config.backend() != "torch":
            draws = (self.values[:, own] for own in columns)
            return tuple(keep_mask(own, rate, dtype) for own in draws)
        # Eagerly, a comparison for all layers takes little longer than for one.
        if (rate, dtype) not in self._masks:
            self._masks[rate, dtype] = keep_mask(self.values, rate, dtype)
        return tuple(self._masks[rate, dtype][:, own] for own in columns)


@contextlib.contextmanager
def use_draws(draws):
    """Let all adapted layers called inside read their masks from `draws`."""
    outer = current_draws()
    _state.draws = draws
    try:
        yield
    finally:
        _state.draws = outer


@contextlib.contextmanager
def shared_inputs(in_parts=False):
    """Let the layers called inside take one input for all mask groups.

    Their inputs have a leading axis of 1, which stands for every row of the
    batch. A layer with masks returns one output for each group, along the
    leading axis; any other returns a leading axis of 1.

    Args:
        in_parts: Boolean. Whether a layer with masks returns what all groups
            share and the factors of the rest, as `products.shared_parts` does.
    """
    draws = current_draws()
    if draws is None:
        yield
        return
    shared = copy.copy(draws)
    shared.inputs_shared, shared.in_parts = True, in_parts
    with use_draws(shared):
        yield


def with_draws(draws, function):
    """Wrap a function so that it runs inside `use_draws(draws)`."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with use_draws(draws):
            return function(*args, **kwargs)

    return wrapped


def current_draws():
    """Return the active `Draws`, or `None` outside every `use_draws`."""
    return getattr(_state, "draws", None)


def current_dropout():
    """Return the active `DropoutDraws`, or `None` where no layer drops."""
    draws = current_draws()
    return None if draws is None else draws.dropout


def draw_uniform(shape, seed):
    """Draw float32 numbers in `[0, 1)`; each becomes one mask entry."""
    return keras.random.uniform(shape, dtype="float32", seed=seed)


def draw_instances(shape, seed, mask_sampling="bernoulli"):
    """Draw N mask instances.

    Args:
        shape: Tuple `(N, ...)`; N is an integer, other sizes may be tensors.
        seed: Integer or `SeedGenerator`.
        mask_sampling: `"bernoulli"`: the instances are independent.
            `"balanced"`: each alone is drawn as before, but the N draws of an
            entry are evenly spaced (`core.stratified.stratify`). The same for
            N = 1.

    Returns:
        Float32 tensor of that shape, each number uniform in `[0, 1)`.
    """
    if mask_sampling == "bernoulli" or shape[0] == 1:
        return draw_uniform(shape, seed)
    return stratify(draw_uniform((shape[0] + 1, *shape[1:]), seed))


def keep_mask(draws, dropout_rate, dtype):
    """Bernoulli(1 - p) masks, [L] Eq. 2: 1 where a draw reaches the rate."""
    return cast(draws >= dropout_rate, dtype)


def delta_scale(scaling, dropout_rate, rescale, masked):
    """Multiplier of the delta.

    A masked pass has no rescaling by default, as in [L] Eq. 2; `rescale`
    divides each of the two masks by `1 - p`. The unmasked pass is the mean
    network: the expectation of the masked delta.
    """
    keep = 1.0 - dropout_rate
    if masked:
        return scaling / keep**2 if rescale else scaling
    return scaling if rescale else scaling * keep**2
