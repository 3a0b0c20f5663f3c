"""What lies before the first adapted layer, computed once for N instances.

The mask instances of a batch differ from the first adapted layer on. So the
graph of a functional model runs on the batch as it is up to there, and only
what an adapted layer needs is given to each instance: repeated in one batch of
N * B rows (`spread`), or kept for the passes that follow (`keep`, `reuse`).

Operations are told apart while the graph runs. One that contains no adapted
layer and reads nothing that depends on one is *shared*; all others are not. A
nested model that gets nothing but what is shared runs its own graph likewise.
Random layers among the shared ones draw once for all instances.
"""

import contextlib
import itertools
import threading

import keras

from keras_lora_dropout.core import instances
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import graph_of
from keras_lora_dropout.core.keras_internals import num_outputs
from keras_lora_dropout.core.keras_internals import run_graph_with
from keras_lora_dropout.core.masks import Draws
from keras_lora_dropout.core.masks import use_draws

_state = threading.local()


def install(model, plan):
    """Let the graphs of an adapted model share what they can.

    Nothing is shared by a model that is no graph.

    Args:
        model: The adapted model.
        plan: Its `MaskPlan`; it learns whether there is a graph.
    """
    for graph in _graphs(model):
        run_graph_with(graph, _run_graph)
    plan.keeps_prefix = graph_of(model, model.plain_class()) is not None


def uninstall(model):
    """Undo `install`."""
    for graph in _graphs(model):
        run_graph_with(graph, None)


def spread(plan, num_instances, rows):
    """Context in which a model returns outputs of `num_instances * rows` rows.

    Args:
        plan: The model's `MaskPlan`.
        num_instances: Positive integer.
        rows: Length of the batch axis of what the model is called on.
    """
    return _walking(_Spread(plan, num_instances, rows))


def keep(plan, for_gradients):
    """Context in which a model computes only what its instances share.

    It yields what `reuse` takes; the model's own output is of no use.

    Args:
        plan: The model's `MaskPlan`.
        for_gradients: Boolean. Whether each pass is differentiated by itself,
            so that operations with weights that train are not shared.
    """
    return _walking(_Keep(plan, for_gradients))


def kept_by(plan, forward, for_gradients, dropout=None):
    """Run what all passes share, before the first of them.

    Args:
        plan: The model's `MaskPlan`.
        forward: Function without arguments that calls the model.
        for_gradients: As in `keep`.
        dropout: What the passes have as `Draws.dropout`, any of them.

    Returns:
        What `reuse` takes; `None` if nothing can be kept.
    """
    if not plan.keeps_prefix:
        return None
    draws = Draws(plan, dropout=dropout)
    with use_draws(draws), keep(plan, for_gradients) as kept:
        forward()
    return kept


def reuse(kept):
    """Context in which a model computes only what its instances do not share.

    Args:
        kept: What `keep` yielded, for the same inputs; with `None`, the model
            computes everything.
    """
    if kept is None:
        return contextlib.nullcontext()
    return _walking(_Reuse(kept))


@contextlib.contextmanager
def _walking(walk):
    outer = getattr(_state, "walk", None)
    _state.walk = walk
    try:
        yield walk
    finally:
        _state.walk = outer


def _graphs(model):
    graphs = [graph_of(model, model.plain_class())]
    graphs += [graph_of(layer, type(layer)) for layer in descendants(model)]
    return [graph for graph in graphs if graph is not None]


class _Absent:
    """Stands for a tensor that is not computed in this walk."""


class _Walk:
    """How the graphs of a model run.

    Attributes:
        plan: The model's `MaskPlan`.
        enters_shared: Whether the graph that runs next has shared inputs, and
            is part of the walk.
    """

    def __init__(self, plan):
        self.plan = plan
        self.enters_shared = True

    def separates(self, operation):
        """Whether each instance has an operation for itself in any case."""
        return self.plan.touches(operation)

    def run_shared(self, operation, function, args, kwargs):
        """Run an operation that all instances share."""
        self.enters_shared = False
        return function(*args, **kwargs)

    def run_other(self, operation, function, args, kwargs, nested):
        """Run an operation for each instance, or the graph in it (`nested`)."""
        self.enters_shared = nested
        return function(*args, **kwargs)

    def leave(self, key, structure, is_shared, nested):
        """Give each instance its part of what it shares with the others.

        Args:
            key: By this, later walks over the same graphs know the place.
            structure: Nested structure that holds shared and other tensors.
            is_shared: Function that tells the shared ones.
            nested: Boolean. Whether they are inputs of a graph of this walk.
        """
        raise NotImplementedError


class _Spread(_Walk):
    def __init__(self, plan, num_instances, rows):
        super().__init__(plan)
        self._num_instances = num_instances
        self._is_one_row = isinstance(rows, int) and rows == 1
        self._tiled = {}

    def leave(self, key, structure, is_shared, nested):
        if nested:
            return structure
        return keras.tree.map_structure(
            lambda leaf: self._tile(leaf) if is_shared(leaf) else leaf,
            structure,
        )

    def _tile(self, leaf):
        if not instances.has_rows(leaf):
            return leaf
        if leaf.shape[0] == 1 and not self._is_one_row:
            return leaf  # It serves all rows as it is.
        if id(leaf) not in self._tiled:
            copies = instances.tile(leaf, self._num_instances)
            self._tiled[id(leaf)] = leaf, copies
        return self._tiled[id(leaf)][1]


class _InTurn(_Walk):
    def __init__(self, plan, for_gradients):
        super().__init__(plan)
        self.for_gradients = for_gradients

    def separates(self, operation):
        trains = (
            self.for_gradients
            and isinstance(operation, keras.Layer)
            and bool(operation.trainable_variables)
        )
        return trains or super().separates(operation)


class _Keep(_InTurn):
    def __init__(self, plan, for_gradients):
        super().__init__(plan, for_gradients)
        self.structures = {}

    def run_other(self, operation, function, args, kwargs, nested):
        if nested:
            return super().run_other(operation, function, args, kwargs, True)
        return [_Absent()] * num_outputs(operation)

    def leave(self, key, structure, is_shared, nested):
        self.structures[key] = structure
        return structure


class _Reuse(_InTurn):
    def __init__(self, kept):
        super().__init__(kept.plan, kept.for_gradients)
        self._structures = kept.structures

    def run_shared(self, operation, function, args, kwargs):
        return [_Absent()] * num_outputs(operation)

    def leave(self, key, structure, is_shared, nested):
        return keras.tree.map_structure(
            lambda now, then: then if isinstance(now, _Absent) else now,
            structure,
            self._structures[key],
        )


def _run_graph(graph, run, inputs, operation_fn=lambda op: op, call_fn=None):
    """Run a graph in the way of the walk that is under way.

    Args:
        graph: A functional model.
        run: Keras's own method that runs it.
        inputs, operation_fn, call_fn: Its arguments.
    """
    walk = getattr(_state, "walk", None)
    if walk is None or not walk.enters_shared or call_fn is not None:
        return run(inputs, operation_fn=operation_fn, call_fn=call_fn)
    # Tensors by id; the tensors themselves keep their ids from being reused.
    shared = {id(leaf): leaf for leaf in keras.tree.flatten(inputs)}
    others = {}
    steps = itertools.count()

    def is_shared(leaf):
        return id(leaf) in shared

    def record(outputs, known):
        known.update((id(leaf), leaf) for leaf in keras.tree.flatten(outputs))
        return outputs

    def wrapped(operation):
        function = operation_fn(operation)

        def call(*args, **kwargs):
            key = id(graph), next(steps)
            leaves = keras.tree.flatten((args, kwargs))
            reads_others = any(id(leaf) in others for leaf in leaves)
            if not reads_others and not walk.separates(operation):
                outputs = walk.run_shared(operation, function, args, kwargs)
                return record(outputs, shared)
            nested = not reads_others and _is_open(operation)
            args, kwargs = walk.leave(key, (args, kwargs), is_shared, nested)
            outputs = walk.run_other(operation, function, args, kwargs, nested)
            return record(outputs, others)

        return call

    outputs = run(inputs, operation_fn=wrapped)
    return walk.leave((id(graph), "outputs"), outputs, is_shared, False)


def _is_open(operation):
    """Whether an operation is a model whose graph runs in the same walk."""
    return graph_of(operation, type(operation)) is not None
