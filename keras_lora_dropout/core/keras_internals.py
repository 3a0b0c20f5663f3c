"""The few private names of Keras that have no public counterpart.

- A built layer gains weights only through its own `enable_lora` or `quantize`,
  and loses none.
- The sublayers of a layer, as opposed to those of a model, are listed nowhere.
- The graph of a functional model is not readable from an output back, and runs
  in a method of its own; whether a call of it is checkpointed shows nowhere.
- The product of a quantized layer, without bias and activation, has no method.
- Each layer and model has a `quantize` of its own since it was made, which asks
  its class for one thing alone.
- The padding mask that losses read from a tensor has no accessor.
- The gradients that an optimizer accumulates over batches have none either.
- The epoch that a callback lets `fit` resume at has no accessor.
- On JAX, the state that a step puts out reaches the model between steps only.
- The scope that holds the values of variables while JAX traces is not given.
- On PyTorch, a model lists its parameters when it is built, and never again.
- A variable takes the layout that a `keras.distribution` has for its path when
  it is made; another one cannot be given, nor can it be asked for.

Everything private is here, and a Keras that lacks it is refused by version.
"""

import contextlib
import functools

import keras
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.models.functional import Functional

from keras_lora_dropout.core.interrupts import interrupts_held


def sublayers(layer):
    """Return the direct sublayers of a layer or model, in order.

    The order is that of the graph for functional models and that of creation
    for all others.
    """
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    flatten = _private(layer, "_flatten_layers")
    return list(flatten(include_self=False, recursive=False))


def descendants(layer, seen=None):
    """Yield all layers below a layer, parents first, each once."""
    seen = set() if seen is None else seen
    for child in sublayers(layer):
        if id(child) not in seen:
            seen.add(id(child))
            yield child
            yield from descendants(child, seen)


def producer(tensor):
    """Return the operation behind a symbolic tensor, and its input tensors."""
    operation, node_index, _ = _private(tensor, "_keras_history")
    node = _private(operation, "_inbound_nodes")[node_index]
    return operation, list(node.input_tensors)


def graph_of(operation, cls):
    """Return the functional model whose graph a call of an operation runs.

    Args:
        operation: Any Keras operation.
        cls: Its class; of an adapted model, the plain one.

    Returns:
        `None` if the call runs no graph, or gradient checkpointing runs it.
    """
    if not isinstance(operation, keras.Model):
        return None
    if _is_checkpointed(operation):
        return None
    if issubclass(cls, keras.Sequential):
        is_own = cls.call is keras.Sequential.call
        return _private(operation, "_functional") if is_own else None
    is_own = issubclass(cls, Functional) and cls.call is Functional.call
    return operation if is_own else None


def _is_checkpointed(model):
    """Whether gradient checkpointing computes a model's calls again."""
    scope = _private(model, "_remat_mode")
    if scope is None or scope.mode == "activations":
        return False
    if scope.mode == "list_of_layers":
        return model.name in scope.layer_names
    return True


def run_graph_with(graph, function):
    """Let a function run the graph of a functional model.

    Args:
        graph: The functional model.
        function: Called with `graph`, Keras's own method, and the arguments of
            that method: `inputs`, `operation_fn`, `call_fn`. `None` lets Keras
            run it again.
    """
    name = "_run_through_graph"
    vars(graph).pop(name, None)
    if function is not None:
        run = functools.partial(function, graph, _private(graph, name))
        object.__setattr__(graph, name, run)


def num_outputs(operation):
    """Return how many tensors an operation of a graph puts out."""
    nodes = _private(operation, "_inbound_nodes")
    return max(len(node.outputs) for node in nodes)


class Unquantizable:
    """Mixin of what has adapters: `quantize` is refused."""

    def _check_quantize_args(self, *args, **kwargs):
        kind = "Model" if isinstance(self, keras.Model) else "Layer"
        raise ValueError(
            f'{kind} "{self.path or self.name}" has LoRA Dropout adapters, so '
            "kernels cannot be quantized any more. Quantize first: "
            '`model.quantize("int8")`, then `enable_lora_dropout(model)`.'
        )


class KeptSteps:
    """Mixin for JAX: the state of the last whole step is never lost.

    Keras takes the values out of the variables, a step consumes them, and Keras
    takes note of the new ones later. An error of the first step or of the data
    between two steps of one execution, or an interrupt when a step is done,
    would leave the model without its weights.
    """

    def _make_function(self, step_function, *args, **kwargs):
        def step(state, data):
            with interrupts_held():
                outputs, state = step_function(state, data)
                _note_state(self, state)
            return outputs, state

        make = _private(super(), "_make_function")
        steps = make(step, *args, **kwargs)

        def noted(state, iterator):
            _note_state(self, state)
            return steps(state, iterator)

        return noted


def _note_state(model, state):
    """Let `jax_state_sync` give a state to the model's variables."""
    names = _STATES[len(state)]
    # Keras's own attributes would track every array.
    vars(model)["_jax_state"] = dict(zip(names, state, strict=True))


# What `train_step`, `test_step` and `predict_step` put out, by its length.
_STATES = {
    4: (
        "trainable_variables",
        "non_trainable_variables",
        "optimizer_variables",
        "metrics_variables",
    ),
    3: ("trainable_variables", "non_trainable_variables", "metrics_variables"),
    2: ("trainable_variables", "non_trainable_variables"),
}


class ScopeState:
    """What variables and losses are in the current `keras.StatelessScope`."""

    def __init__(self):
        self._scope = get_stateless_scope()
        if self._scope is not None:
            self._values = dict(self._scope.state_mapping)
            self._losses = list(self._scope.losses)

    def is_as_noted(self):
        """Whether no variable has changed since, and no loss was added."""
        if self._scope is None:
            return True
        now = self._scope.state_mapping
        same = now.keys() == self._values.keys() and all(
            now[name] is value for name, value in self._values.items()
        )
        return same and len(self._scope.losses) == len(self._losses)

    def restore(self):
        """Undo what has changed since."""
        if self._scope is not None:
            self._scope.state_mapping = self._values
            self._scope.losses = self._losses


def copy_with(layer, cls, **attributes):
    """Return a copy of a layer that has the same weights, for single calls.

    Args:
        layer: A built layer.
        cls: Class of the copy.
        **attributes: What is another than in the layer.
    """
    for name in attributes:
        _private(layer, name)
    copy = object.__new__(cls)
    vars(copy).update(vars(layer), **attributes)
    return copy


@contextlib.contextmanager
def unlocked(layer):
    """Let a built layer or model gain weights or seed generators."""
    tracker = _private(layer, "_tracker")
    was_locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            tracker.lock()


def forget_weights(layer, variables):
    """Let a layer or model lose weights that it has gained."""
    untrack = _private(layer, "_untrack_variable")
    for variable in variables:
        untrack(variable)


def forget_attributes(layer, names):
    """Let a layer or model lose attributes that hold weights or generators.

    `delattr` does so, too, but collects the garbage of the whole process after
    each weight.
    """
    with unlocked(layer):
        for name in names:
            value = vars(layer)[name]
            if isinstance(value, keras.Variable):
                forget_weights(layer, [value])
            elif isinstance(value, keras.random.SeedGenerator):
                forget_weights(layer, [value.state])
            if isinstance(value, keras.random.SeedGenerator | keras.Metric):
                _private(layer, "_tracker").untrack(value)
            # On TensorFlow, exports walk the collections that a layer has.
            collections = getattr(layer, "_tracked", [])
            if name in collections:
                collections.remove(name)
            object.__delattr__(layer, name)


def list_parameters(model):
    """Let PyTorch see all weights of a model, those gained later, too.

    Without it, an export takes the weights that a layer has gained for
    constants, and refuses those that train.
    """
    if keras.config.backend() == "torch":
        _private(model, "_track_variables")()


def copy_mask(source, target, convert=lambda mask: mask):
    """Give `target` the padding mask of `source`, if it has one."""
    mask = get_keras_mask(source)
    if mask is not None:
        set_keras_mask(target, convert(mask))


def start_at_epoch(model, epoch):
    """Let the `fit` that is starting begin after an epoch; `None`: as asked."""
    _private(model, "_initial_epoch")
    model._initial_epoch = epoch


def accumulated_gradients(optimizer, variables):
    """Return what an optimizer has accumulated since its last step.

    Returns:
        List of tensors, the sums of earlier gradients, one for each variable;
        `None` entries where nothing is accumulated.
    """
    if not optimizer.gradient_accumulation_steps:
        return [None] * len(variables)
    sums = _private(optimizer, "_accumulated_gradients")
    index = _private(optimizer, "_get_variable_index")
    return [sums[index(variable)] for variable in variables]


def has_layout(variable):
    """Whether a variable lies where a `keras.distribution` has put it."""
    return _private(variable, "_layout") is not None


def set_layout(variable, layout):
    """Spread a variable over devices.

    Args:
        variable: A variable that a `keras.distribution` has placed.
        layout: `keras.distribution.TensorLayout`. The optimizer's variables
            for this one will have it, too.
    """
    _private(variable, "_layout")
    variable._layout = layout
    variable.assign(variable.value)


def _private(owner, name):
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"keras_lora_dropout does not know Keras {keras.__version__}: a "
            f"{type(owner).__name__} has no `{name}`. Install a Keras version "
            "that this release supports (see `pip show keras_lora_dropout`)."
        ) from None
