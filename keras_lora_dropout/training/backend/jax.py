"""The training step on JAX: pure functions of the model's state."""

import contextlib
import functools

import jax
import keras

from keras_lora_dropout.core.host_memory import free_host_memory
from keras_lora_dropout.core.keras_internals import KeptSteps
from keras_lora_dropout.core.keras_internals import ScopeState
from keras_lora_dropout.core.masks import use_draws
from keras_lora_dropout.training import objective
from keras_lora_dropout.training.backend import python_loop


class NSampleTrainStep(KeptSteps):
    """Mixin: `train_step` on the N-sample objective."""

    def make_train_function(self, force=False):
        with _fresh(self, "train_step"):
            super().make_train_function(force)

    def make_test_function(self, force=False):
        with _fresh(self, "test_step"):
            super().make_test_function(force)

    def make_predict_function(self, force=False):
        with _fresh(self, "predict_step"):
            super().make_predict_function(force)

    def train_step(self, state, data):
        trainable, non_trainable, optimizer_variables, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_of_pass(trainable, non_trainable, metrics, drawn):
            # XLA would take what depends on labels alone, such as one-hot
            # labels of the size of the logits, out of the loop over the passes
            # and hold it in memory. So labels seem to depend on the pass.
            drawn, *labels = jax.lax.optimization_barrier(
                (drawn, y, sample_weight)
            )
            draws = objective.pass_draws(self, x, drawn)
            with (
                _state(
                    (self.trainable_variables, trainable),
                    (self.non_trainable_variables, non_trainable),
                    (self.metrics_variables, metrics),
                    (self.optimizer.variables, optimizer_variables),
                ) as scope,
                use_draws(draws),
            ):
                total, losses, outputs = objective.pass_loss(
                    self, x, *labels, kept, partner
                )
            non_trainable = _values(scope, self.non_trainable_variables)
            metrics = _values(scope, self.metrics_variables)
            return total, (losses, outputs, non_trainable, metrics)

        gradient_of_pass = jax.value_and_grad(loss_of_pass, has_aux=True)

        def run_pass(non_trainable, metrics, drawn):
            (_, aux), gradients = gradient_of_pass(
                trainable, non_trainable, metrics, drawn
            )
            losses, outputs, non_trainable, metrics = aux
            return (non_trainable, metrics), (gradients, losses, outputs)

        with _state(
            (self.trainable_variables, trainable),
            (self.non_trainable_variables, non_trainable),
        ) as scope:
            passes = objective.draw_passes(self, x)
            kept = objective.kept_prefix(self, x, passes)
            partner = objective.partner(self, x)
        non_trainable = _values(scope, self.non_trainable_variables)

        (non_trainable, metrics), (gradients, losses, outputs) = _mean_over(
            run_pass, (non_trainable, metrics), passes
        )
        with _state(
            (self.trainable_variables, trainable),
            (self.non_trainable_variables, non_trainable),
            (self.optimizer.variables, optimizer_variables),
            (self.metrics_variables, metrics),
        ) as scope:
            with objective.around_update(
                self, self.trainable_variables, gradients
            ):
                trainable, optimizer_variables = self.optimizer.stateless_apply(
                    optimizer_variables, gradients, trainable
                )
                _assign(self.trainable_variables, trainable)
                _assign(self.optimizer.variables, optimizer_variables)
            logs = objective.update_metrics(
                self, x, y, outputs, sample_weight, losses
            )
        return logs, tuple(
            _values(scope, variables)
            for variables in (
                self.trainable_variables,
                self.non_trainable_variables,
                self.optimizer.variables,
                self.metrics_variables,
            )
        )


def each_in_turn(step, carry, values, first=0):
    """Take steps one after another, as `python_loop.each_in_turn`.

    A compiler that sees all steps may take them side by side and hold what all
    of them need, so it gets a loop. Steps that change variables or add losses
    cannot be in one: Keras would not learn of it.
    """
    if not isinstance(values, jax.core.Tracer):
        return python_loop.each_in_turn(step, carry, values, first)

    def taken(leaves, item):
        index, draw = item
        structure = keras.tree.pack_sequence_as(carry, leaves)
        structure, kept = step(structure, index, draw[None])
        if not state.is_as_noted():
            raise _StateChangedError
        forms.append(kept)
        return keras.tree.flatten(structure), keras.tree.flatten(kept)

    forms, state = [], ScopeState()
    items = jax.numpy.arange(first, len(values)), values[first:]
    try:
        leaves, kept = jax.lax.scan(taken, keras.tree.flatten(carry), items)
    except _StateChangedError:
        state.restore()
        return python_loop.each_in_turn(step, carry, values, first)
    results = [
        keras.tree.pack_sequence_as(
            forms[-1], [None if leaf is None else leaf[n] for leaf in kept]
        )
        for n in range(len(values) - first)
    ]
    return keras.tree.pack_sequence_as(carry, leaves), results


class _StateChangedError(Exception):
    """A step of a loop has changed what is no part of it."""


def free_memory():
    """Return the free bytes where new arrays lie; `None` if not known."""
    (device,) = jax.numpy.zeros(()).devices()
    if device.platform == "cpu":
        return free_host_memory()
    known = device.memory_stats() or {}
    if "bytes_limit" not in known:
        return None
    return known["bytes_limit"] - known.get("bytes_in_use", 0)


def writes_files():
    """Whether this process writes files that all would write alike."""
    return jax.process_index() == 0


def global_random_states():
    """All random state is in the model's own generators here."""
    return {}


def set_global_random_states(states):
    """There is none to restore, whatever another backend has written."""


@contextlib.contextmanager
def state_kept(model):
    """Give the model its variables back when an error ends a loop.

    Keras takes the values out of the variables while it loops over batches,
    and an error, such as an input of a wrong shape, leaves them empty.
    """
    try:
        yield
        # Steps run in the background: an error of theirs belongs to this loop.
        jax.block_until_ready([variable.value for variable in model.variables])
    except BaseException as error:
        model.jax_state_sync()
        if _is_lost(model):
            error.add_note(
                f'The step took the weights of model "{model.name}" with it: '
                "load them again before you go on."
            )
        raise


@contextlib.contextmanager
def _fresh(model, step):
    """Let a step be compiled anew.

    JAX keeps one trace for all bound methods that are equal, but what a step
    computes changes with the request, the adapter and the optimizer.
    """
    setattr(model, step, functools.partial(getattr(type(model), step), model))
    try:
        yield
    finally:
        delattr(model, step)


def _is_lost(model):
    try:
        jax.block_until_ready([variable.value for variable in model.variables])
    except RuntimeError:  # Consumed by a step, or never computed.
        return True
    return False


def _mean_over(run_pass, state, passes):
    """Run the passes in turn; thread their state, average their results.

    A scan compiles the pass once and keeps one pass alive at a time. Results
    are added up as they come, so that memory does not grow with the passes.
    """
    if len(passes) == 1:
        return run_pass(*state, passes[0])
    _, shapes = jax.eval_shape(run_pass, *state, passes[0])
    zeros = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)

    def step(carry, drawn):
        state, total = carry
        state, result = run_pass(*state, drawn)
        return (state, jax.tree.map(jax.numpy.add, total, result)), None

    (state, total), _ = jax.lax.scan(
        step,
        (state, zeros),
        jax.tree.map(lambda *drawn: jax.numpy.stack(drawn), *passes),
    )
    mean = jax.tree.map(lambda t: t / len(passes), total)
    return state, mean


def _state(*pairs):
    """A scope in which variables hold the given values, and collect losses."""
    mapping = [
        entry
        for variables, values in pairs
        for entry in zip(variables, values, strict=True)
    ]
    return keras.StatelessScope(mapping, collect_losses=True)


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _values(scope, variables):
    return [scope.get_current_value(variable) for variable in variables]
