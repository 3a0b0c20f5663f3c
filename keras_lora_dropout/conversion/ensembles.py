"""The ensemble methods that a model gains, [L] Eq. 8."""

import contextlib
import dataclasses
import threading

import keras
import numpy as np

from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.out_of_memory import memory_advice
from keras_lora_dropout.core.probabilities import output_links
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.inference.ensemble import EnsembleRequest
from keras_lora_dropout.inference.ensemble import ensemble_draws

# What Keras, and KerasHub's generating models, compile once and keep.
COMPILED_FUNCTIONS = ("predict_function", "test_function", "generate_function")


class _InProgress(threading.local):
    """The ensembles that are computed, by the id of the model.

    Each thread has its own: a call of the model in another one is none.
    """

    def __init__(self):
        self.requests = {}

    @contextlib.contextmanager
    def doing(self, model, request):
        """Let the model's calls inside compute what a request asks for."""
        outer = self.requests.get(id(model))
        self.requests[id(model)] = request
        try:
            yield
        finally:
            self.requests[id(model)] = outer
            if outer is None:
                del self.requests[id(model)]


_in_progress = _InProgress()


class EnsembleMethods:
    """Mixin of `AdaptedModel`: predict and evaluate with N mask instances."""

    @property
    def _request(self):
        """`EnsembleRequest` while this thread computes an ensemble."""
        return _in_progress.requests.get(id(self))

    def _start_ensembles(self, streams):
        """Set up the random state; `streams` also seeds calls without one."""
        self._ensemble_state = _EnsembleState(streams)
        self.ensemble_seed_generator = masks.FixedSeedGenerator(
            streams.randrange(validation.MAX_SEED)
        )

    @in_turn
    def ensemble_predict(
        self,
        x,
        batch_size=None,
        *,
        num_samples=None,
        seed=None,
        average="output",
        return_samples=False,
        include_transformer_dropout=False,
        verbose="auto",
        steps=None,
        callbacks=None,
    ):
        """Predict with the average of N mask instances.

        The N instances are drawn once for the whole call, so that the result
        for an example depends neither on the batch size nor on the order or
        the other examples.

        Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 8.

        Args:
            x: Inputs, whatever `predict` accepts; raw strings for a KerasHub
                task with a preprocessor.
            batch_size: Integer or `None`, as in `predict`. With
                `sampling="parallel"`, `num_samples * batch_size` rows are in
                memory at once.
            num_samples: Positive integer or `None` for the model's own N.
            seed: Integer or `None`. The same seed gives the same instances;
                `None` draws new ones at each call.
            average: `"output"` averages what the model puts out;
                `"probability"` applies softmax or sigmoid first, as the
                compiled loss says (softmax, or sigmoid for a single unit, if
                there is no such loss), unless the outputs already are
                probabilities; an output that is trained with another loss next
                to such a one is averaged as it is.
            return_samples: Boolean. Whether to return the N outputs instead
                of their mean. A task that decodes what it predicts, such as a
                detector, decodes the average once, or each of the N outputs.
            include_transformer_dropout: Boolean. Whether each instance also
                drops what `enable_transformer_dropout` says; all examples of
                an instance drop the same places, so of the same length.
            verbose, steps, callbacks: As in `predict`.

        Returns:
            NumPy array(s) as from `predict`, with a leading axis of
            `num_samples` if `return_samples`.

        Raises:
            ValueError: If `x` is empty, if an argument is out of range, if the
                model has no transformer dropout to include, or if nothing says
                which outputs of a task that decodes them are probabilities.
        """
        validation.not_empty("x", x)
        batch_size = validation.batch_size(batch_size)
        validation.boolean("return_samples", return_samples)
        request = self._ensemble_request(
            num_samples, average, return_samples, include_transformer_dropout
        )
        with self._as_ensemble(request, seed, "ensemble_predict"):
            outputs = self.predict(
                x,
                batch_size=batch_size,
                verbose=verbose,
                steps=steps,
                callbacks=callbacks,
            )
        if return_samples:
            return keras.tree.map_structure(
                lambda leaf: np.moveaxis(leaf, 1, 0), outputs
            )
        return outputs

    @in_turn
    def ensemble_evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        *,
        sample_weight=None,
        num_samples=None,
        seed=None,
        average="output",
        include_transformer_dropout=False,
        verbose="auto",
        steps=None,
        callbacks=None,
        return_dict=False,
    ):
        """Compute the compiled loss and metrics on the ensemble's output.

        A `compute_loss` of a task's own that runs parts of the model again, as
        BASNet's and PARSeq's do, has the mean network there.

        Args:
            x, y, batch_size, sample_weight: Data, as in `evaluate`.
            num_samples, seed, average: As in `ensemble_predict`. Averaged
                probabilities of a model with logits are turned back into
                logits, so that its loss and metrics keep their meaning.
            include_transformer_dropout: As in `ensemble_predict`.
            verbose, steps, callbacks, return_dict: As in `evaluate`.

        Returns:
            As `evaluate`.

        Raises:
            ValueError: As `ensemble_predict`.
        """
        validation.not_empty("x", x)
        batch_size = validation.batch_size(batch_size)
        request = self._ensemble_request(
            num_samples, average, drops=include_transformer_dropout
        )
        request = dataclasses.replace(request, as_outputs=True)
        with self._as_ensemble(request, seed, "ensemble_evaluate"):
            return self.evaluate(
                x,
                y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                verbose=verbose,
                steps=steps,
                callbacks=callbacks,
                return_dict=return_dict,
            )

    def predict_step(self, *args):
        """As `keras.Model.predict_step`; samples are decoded one by one."""
        request = self._request
        step = super().predict_step
        samples = request is not None and request.return_samples
        if not samples or not self._decodes_predictions():
            return step(*args)
        results = []
        for n in range(request.num_samples):
            one = dataclasses.replace(request, return_samples=False, only=n)
            with _in_progress.doing(self, one):
                results.append(step(*args))
        states = ()
        if keras.config.backend() == "jax":
            results, states = zip(*results, strict=True)
        outputs = keras.tree.map_structure(
            lambda *leaves: keras.ops.stack(leaves, axis=1), *results
        )
        return (outputs, states[-1]) if states else outputs

    def _decodes_predictions(self):
        """Whether `predict` returns something else than the model's outputs."""
        step = super().predict_step
        return step.__func__ is not keras.Model.predict_step

    def _ensemble_request(
        self, num_samples, average, return_samples=False, drops=False
    ):
        if num_samples is None:
            num_samples = self.lora_dropout.num_samples
        validation.word("average", average, validation.AVERAGES)
        if validation.boolean("include_transformer_dropout", drops):
            self._check_has_transformer_dropout("include_transformer_dropout")
        links, decodes = None, self._decodes_predictions()
        if average == "probability":
            links = output_links(self)
            if decodes and None in links:
                raise ValueError(
                    f"{type(self).__name__} decodes what it predicts, and its "
                    "compiled loss does not say which of its outputs are "
                    'probabilities. Use `average="output"`. Received: '
                    'average="probability".'
                )
        return EnsembleRequest(
            num_samples=validation.num_samples(num_samples),
            return_samples=return_samples,
            drops=drops,
            links=links,
            as_outputs=decodes,
        )

    def _set_ensemble_seed(self, seed):
        """Set the seed of the instances; `None` takes a new one."""
        seed = validation.seed(seed)
        if seed is None:
            seed = self._ensemble_state.random.randrange(validation.MAX_SEED)
        self.ensemble_seed_generator.set(seed)

    @contextlib.contextmanager
    def _seeded(self, seed):
        """Set the seed of the instances; after an error it is what it was."""
        with self._seed_kept():
            self._set_ensemble_seed(seed)
            yield

    @contextlib.contextmanager
    def _seed_kept(self):
        """Restore the seed of the instances after an error inside."""
        generator = self.ensemble_seed_generator
        state = keras.ops.convert_to_numpy(generator.state).copy()
        stream = self._ensemble_state.random.getstate()
        try:
            yield
        except BaseException:
            generator.state.assign(state)
            self._ensemble_state.random.setstate(stream)
            raise

    def _instances(self, num_samples, seed):
        """Return the `Draws` of the instances of `ensemble_predict`."""
        if num_samples is None:
            num_samples = self.lora_dropout.num_samples
        count = validation.num_samples(num_samples)
        plan = self.mask_plan
        self._set_ensemble_seed(seed)
        return masks.Draws(plan, ensemble_draws(self, count))

    @contextlib.contextmanager
    def _as_ensemble(self, request, seed, method):
        """Let `predict` and `evaluate` compute the ensemble's outputs."""
        key = request, self._adapters_disabled
        advice = memory_advice(
            method, self.lora_dropout.sampling, request.num_samples
        )
        with advice, self._seeded(seed), self._functions_of(key):
            with _in_progress.doing(self, request):
                yield

    @contextlib.contextmanager
    def _functions_of(self, key):
        """Put compiled functions of another kind in the place of Keras's own.

        Keras keeps one compiled function each; those for a `key` are kept apart
        and put in their place for the duration.
        """
        names = [name for name in COMPILED_FUNCTIONS if hasattr(self, name)]
        state = self._ensemble_state
        plain = {name: getattr(self, name) for name in names}
        kept = state.functions(key, self._compilation())
        for name in names:
            setattr(self, name, kept.get(name))
        try:
            yield
        finally:
            made = {name: getattr(self, name) for name in names}
            state.keep(key, self._compilation(), made)
            for name in names:
                setattr(self, name, plain[name])

    def _compilation(self):
        """What a compiled function depends on besides the request.

        Each `compile` makes a new loss tracker, the first of the metrics.
        """
        tracker = self.metrics[0] if self.compiled else None
        return (
            tracker,
            self.jit_compile,
            self.run_eagerly,
            self.steps_per_execution,
        )


class _EnsembleState:
    """Compiled functions by what they compute, and seeds not given.

    What `cache_size` says of the model is kept, too, once it was asked.
    """

    def __init__(self, random_source):
        self.random = random_source
        self.cache_size = None
        self._functions = {}

    def functions(self, key, compilation):
        """Return the functions kept, by name; none of an older compilation."""
        known, functions = self._functions.get(key, (None, {}))
        return functions if known == compilation else {}

    def forget(self):
        """Drop all functions: the model is not what it was."""
        self._functions.clear()

    def keep(self, key, compilation, functions):
        """Keep functions; those of an earlier compilation are dropped."""
        self._functions = {
            other: entry
            for other, entry in self._functions.items()
            if entry[0] == compilation
        }
        self._functions[key] = compilation, functions
