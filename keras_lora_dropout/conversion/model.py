"""The methods that a model gains with LoRA Dropout."""

import contextlib
import dataclasses
import functools
import random

import keras
import numpy as np

from keras_lora_dropout.conversion.adaptive_rank import AdaptiveRank
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.inference.ensemble import EnsembleRequest
from keras_lora_dropout.inference.ensemble import ensemble_outputs
from keras_lora_dropout.inference.probabilities import output_links
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.training.backend import NSampleTrainStep
from keras_lora_dropout.training.backend import state_kept

_RANDOM_STATE = "mask_seed_generator_state"


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How an adapted model samples its masks.

    Attributes:
        num_samples: Number N of mask instances, in training and in ensembles.
        mask_sharing: `"batch"` or `"example"`.
        sampling: `"parallel"` or `"sequential"`.
    """

    num_samples: int = 4
    mask_sharing: str = "batch"
    sampling: str = "parallel"

    def __post_init__(self):
        validation.positive_integer("num_samples", self.num_samples)
        validation.word(
            "mask_sharing", self.mask_sharing, validation.MASK_SHARINGS
        )
        validation.word("sampling", self.sampling, validation.SAMPLINGS)


class AdaptedModel(AdaptiveRank, NSampleTrainStep):
    """What `enable_lora_dropout` adds to a model, and `LoRADropoutModel` has.

    It is mixed in front of a Keras model class. `fit` minimises the N-sample
    objective ([L] Eq. 7), `predict` and `evaluate` use the mean network, and
    the `ensemble_*` methods average N mask instances ([L] Eq. 8).
    """

    lora_dropout = None  # SamplingSettings, set by `_start_sampling`.
    _request = None  # EnsembleRequest while an ensemble is computed.

    def _start_sampling(self, settings, seed):
        """Give the model its settings and its random state."""
        streams = random.Random(validation.seed(seed))
        self.lora_dropout = settings
        self._ensemble_state = _EnsembleState(streams)
        self._mask_plan = None
        with unlocked(self):
            self.mask_seed_generator = keras.random.SeedGenerator(
                streams.randrange(validation.MAX_SEED)
            )
            self.ensemble_seed_generator = masks.FixedSeedGenerator(
                streams.randrange(validation.MAX_SEED)
            )

    def __call__(self, *args, **kwargs):
        # A `call` without `training` does not learn of it; its layers do.
        draws = None
        if kwargs.get("training") is not None:
            draws = self._draws_of_call(kwargs)
        if draws is None:
            return super().__call__(*args, **kwargs)
        with masks.use_draws(draws):
            return super().__call__(*args, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # Inside, JAX turns `training` into a traced value.
        draws = self._draws_of_call(kwargs)
        if draws is not None:
            layer_call = masks.with_draws(draws, layer_call)
        return super().rematerialized_call(layer_call, *args, **kwargs)

    def _draws_of_call(self, kwargs):
        """Draws for a call of the user's own: one instance, or none at all.

        `None` where masks are given already, in a training step, or left to
        the ensemble, or where the model is not built.
        """
        plan = self._find_mask_plan()
        given = masks.current_draws() is not None or self._request is not None
        if plan is None or given:
            return None
        values = None
        if kwargs.get("training"):
            values = masks.draw_uniform(
                (1, plan.width), self.mask_seed_generator
            )
        return masks.Draws(plan, values)

    @property
    def adapted_layers(self):
        """List of `(path, layer)` of the adapted layers, in forward order."""
        return [
            (path, layer)
            for path, layer in layer_paths(self).items()
            if isinstance(layer, LoRADropoutAdapter)
        ]

    @property
    def mask_plan(self):
        """The `MaskPlan` of the adapted layers, made at first use."""
        plan = self._find_mask_plan()
        if plan is None:
            raise ValueError(
                f'Model "{self.name}" has no adapted layer that is built. Use '
                "`LoRADropoutDense` or `LoRADropoutEinsumDense` in it, or call "
                "`enable_lora_dropout` on it; a subclassed model must be "
                "called on a batch of data first."
            )
        return plan

    def _find_mask_plan(self):
        """The `MaskPlan`, or `None` while the model is not ready for one."""
        if self.lora_dropout is None:
            return None
        if self._mask_plan is None:
            layers = [layer for _, layer in self.adapted_layers]
            if layers and all(layer.built for layer in layers):
                self._mask_plan = masks.MaskPlan(layers)
        return self._mask_plan

    def get_config(self):
        refuse_copy(self)

    def get_compile_config(self):
        refuse_copy(self)

    def __reduce__(self):
        refuse_copy(self)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store[_RANDOM_STATE] = self.mask_seed_generator.state

    def load_own_variables(self, store):
        # Keras counts the entries of weights alone.
        super().load_own_variables(
            {key: store[key] for key in store.keys() if key != _RANDOM_STATE}
        )
        if _RANDOM_STATE in store.keys():
            self.mask_seed_generator.state.assign(store[_RANDOM_STATE])

    def _forget_compiled_state(self):
        """Drop what was compiled for the model as it was before."""
        self.train_function = None
        self.test_function = None
        self.predict_function = None
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and optimizer.built:
            self.optimizer = type(optimizer).from_config(optimizer.get_config())

    def fit(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.fit`, minimising the N-sample objective."""
        validation.not_empty("x", x)
        try:
            with state_kept(self):
                return super().fit(x, y, *args, **kwargs)
        finally:
            # At its end, Keras puts the optimizer's averaged weights in place.
            self._prune()

    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`, on the mean network."""
        with state_kept(self):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As `keras.Model.predict`, with the mean network."""
        with state_kept(self):
            return super().predict(*args, **kwargs)

    def ensemble_predict(
        self,
        x,
        batch_size=None,
        *,
        num_samples=None,
        seed=None,
        average="output",
        return_samples=False,
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
                probabilities.
            return_samples: Boolean. Whether to return the N outputs instead
                of their mean.
            verbose, steps, callbacks: As in `predict`.

        Returns:
            NumPy array(s) as from `predict`, with a leading axis of
            `num_samples` if `return_samples`.

        Raises:
            ValueError: If `x` is empty or an argument is out of range.
        """
        validation.not_empty("x", x)
        validation.boolean("return_samples", return_samples)
        request = self._ensemble_request(num_samples, average, return_samples)
        with self._as_ensemble(request, seed):
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
        verbose="auto",
        steps=None,
        callbacks=None,
        return_dict=False,
    ):
        """Compute the compiled loss and metrics on the ensemble's output.

        Args:
            x, y, batch_size, sample_weight: Data, as in `evaluate`.
            num_samples, seed, average: As in `ensemble_predict`. Averaged
                probabilities of a model with logits are turned back into
                logits, so that its loss and metrics keep their meaning.
            verbose, steps, callbacks, return_dict: As in `evaluate`.

        Returns:
            As `evaluate`.

        Raises:
            ValueError: If `x` is empty or an argument is out of range.
        """
        validation.not_empty("x", x)
        request = self._ensemble_request(num_samples, average)
        request = dataclasses.replace(request, as_outputs=True)
        with self._as_ensemble(request, seed):
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

    def _ensemble_request(self, num_samples, average, return_samples=False):
        if num_samples is None:
            num_samples = self.lora_dropout.num_samples
        validation.word("average", average, validation.AVERAGES)
        return EnsembleRequest(
            num_samples=validation.positive_integer("num_samples", num_samples),
            return_samples=return_samples,
            links=output_links(self) if average == "probability" else None,
        )

    @contextlib.contextmanager
    def _as_ensemble(self, request, seed):
        """Let `predict` and `evaluate` compute the ensemble's outputs.

        Keras keeps one compiled function each; those of the ensemble are kept
        apart and put in their place for the duration.
        """
        state = self._ensemble_state
        seed = validation.seed(seed)
        if seed is None:
            seed = state.random.randrange(validation.MAX_SEED)
        self.ensemble_seed_generator.set(seed)
        plain = self.predict_function, self.test_function
        self.predict_function, self.test_function = state.functions(
            request, self._compilation()
        )
        self._request = request
        # JAX keeps one trace for all bound methods that are equal.
        self.test_step = functools.partial(type(self).test_step, self)
        try:
            yield
        finally:
            state.keep(
                request,
                self._compilation(),
                (self.predict_function, self.test_function),
            )
            self._request = None
            del self.test_step
            self.predict_function, self.test_function = plain

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


def refuse_copy(model, *args, **kwargs):
    """Raise `ValueError`: a copy by configuration would lose the adapters."""
    raise ValueError(
        f'"{model.name}" has LoRA Dropout adapters, which a copy by '
        "configuration (`clone_model`, `copy.deepcopy`, pickle, `save`) would "
        "lose. To copy the model, build it again, call `enable_lora_dropout` "
        "with the same arguments, then "
        "`copy.set_weights(model.get_weights())`. To store it, use "
        "`save_weights` and `load_weights`."
    )


class _EnsembleState:
    """Compiled ensemble functions, and the source of seeds not given."""

    def __init__(self, random_source):
        self.random = random_source
        self._functions = {}

    def functions(self, request, compilation):
        """Return the `(predict, test)` functions kept, or `(None, None)`."""
        known, functions = self._functions.get(request, (None, (None, None)))
        return functions if known == compilation else (None, None)

    def keep(self, request, compilation, functions):
        """Keep functions; those of an earlier compilation are dropped."""
        self._functions = {
            key: entry
            for key, entry in self._functions.items()
            if entry[0] == compilation
        }
        self._functions[request] = compilation, functions


def with_instances(call):
    """Wrap a model's `call` so that one pass of it has one set of masks.

    Inside a training step the masks are given and the call passes unchanged.
    Otherwise an ensemble in progress runs its N instances here, and a call in
    training, from a loop of the user's own, draws a single instance.
    """

    @functools.wraps(call)
    def wrapped(self, *args, **kwargs):
        if self._request is not None and masks.current_draws() is None:
            return ensemble_outputs(self, call, self._request, args, kwargs)
        draws = self._draws_of_call(kwargs)
        if draws is None:
            return call(self, *args, **kwargs)
        with masks.use_draws(draws):
            return call(self, *args, **kwargs)

    return wrapped
