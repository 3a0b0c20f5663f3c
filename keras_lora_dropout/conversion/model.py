"""The methods that a model gains with LoRA Dropout."""

import dataclasses
import functools
import inspect
import random

import keras

from keras_lora_dropout.conversion.adapter_summary import AdapterSummary
from keras_lora_dropout.conversion.adapters import Adapters
from keras_lora_dropout.conversion.adaptive_rank import AdaptiveRank
from keras_lora_dropout.conversion.deployment import Deployment
from keras_lora_dropout.conversion.ensembles import COMPILED_FUNCTIONS
from keras_lora_dropout.conversion.ensembles import EnsembleMethods
from keras_lora_dropout.conversion.generation import Generation
from keras_lora_dropout.conversion.merging import Merging
from keras_lora_dropout.conversion.peft_exchange import PeftExchange
from keras_lora_dropout.conversion.run_callbacks import with_run_callbacks
from keras_lora_dropout.conversion.saving import Saving
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.conversion.transformer_dropout import (
    TransformerDropping,
)
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.keras_internals import Unquantizable
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.keras_internals import unlocked
from keras_lora_dropout.core.out_of_memory import memory_advice
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.inference.ensemble import ensemble_outputs
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import plain_class
from keras_lora_dropout.layers.transformer_dropout import drops
from keras_lora_dropout.training.backend import NSampleTrainStep
from keras_lora_dropout.training.backend import end_run
from keras_lora_dropout.training.backend import state_kept


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How an adapted model samples its masks.

    Attributes:
        num_samples: Number N of mask instances, in training and in ensembles.
        mask_sharing: `"batch"` or `"example"`.
        sampling: `"parallel"` or `"sequential"`.
        mask_sampling: `"bernoulli"` or `"balanced"`.
    """

    num_samples: int = 4
    mask_sharing: str = "batch"
    sampling: str = "parallel"
    mask_sampling: str = "bernoulli"

    def __post_init__(self):
        count = validation.num_samples(self.num_samples)
        validation.keep(self, num_samples=count)
        validation.word(
            "mask_sharing", self.mask_sharing, validation.MASK_SHARINGS
        )
        validation.word("sampling", self.sampling, validation.SAMPLINGS)
        validation.word(
            "mask_sampling", self.mask_sampling, validation.MASK_SAMPLINGS
        )


class AdaptedModel(
    Saving,
    Adapters,
    AdapterSummary,
    Merging,
    PeftExchange,
    Deployment,
    AdaptiveRank,
    Generation,
    EnsembleMethods,
    TransformerDropping,
    NSampleTrainStep,
    Unquantizable,
):
    """What `enable_lora_dropout` adds to a model, and `LoRADropoutModel` has.

    It is mixed in front of a Keras model class. `fit` minimises the N-sample
    objective ([L] Eq. 7), `predict` and `evaluate` use the mean network, and
    the `ensemble_*` methods average N mask instances ([L] Eq. 8).

    Attributes:
        train_across_processes: Boolean. Whether training on torch averages
            over the processes of `torch.distributed`'s default group, where
            there is one.
    """

    train_across_processes = True
    lora_dropout = None  # SamplingSettings, set by `_start_sampling`.
    _plain_trainable = None  # Set by `enable_lora_dropout`.
    _optimized = False

    @classmethod
    def plain_class(cls):
        """Return the class of the plain model."""
        return plain_class(cls, AdaptedModel)

    def _start_sampling(self, settings, seed):
        """Give the model its settings and its random state."""
        streams = random.Random(validation.seed(seed))
        self.lora_dropout = settings
        self._mask_plan = None
        self._inactive_adapters = {}
        names = "mask_seed_generator", "ensemble_seed_generator"
        forget_attributes(self, [name for name in names if name in vars(self)])
        with unlocked(self):
            self.mask_seed_generator = keras.random.SeedGenerator(
                streams.randrange(validation.MAX_SEED)
            )
            self._start_ensembles(streams)

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
        if not kwargs.get("training"):
            return masks.Draws(plan)
        values = masks.draw_uniform((1, plan.width), self.mask_seed_generator)
        return masks.Draws(plan, values, dropout=self.next_dropout())

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

    def _require_built(self):
        """Raise `ValueError` unless there are adapted layers that are built."""
        return self.mask_plan

    def _find_mask_plan(self):
        """The `MaskPlan`, or `None` while the model is not ready for one."""
        if self.lora_dropout is None:
            return None
        shares = not self._is_compiled_by_torch()
        if self._mask_plan is None or self._mask_plan.may_share != shares:
            self._mask_plan = None
            layers = [layer for _, layer in self.adapted_layers]
            if layers and all(layer.built for layer in layers):
                self._mask_plan = masks.MaskPlan(
                    layers, shares, filter(drops, descendants(self))
                )
                if shares:
                    shared_prefix.install(self, self._mask_plan)
                else:
                    shared_prefix.uninstall(self)
        return self._mask_plan

    def _is_compiled_by_torch(self):
        # `torch.compile` gives up on a walk that tells tensors apart by id, and
        # compiles parts of it anew in each step.
        is_torch = keras.config.backend() == "torch"
        return is_torch and self.compiled and self.jit_compile

    def _forget_compiled_state(self):
        """Drop what was compiled for the model as it was before."""
        for name in COMPILED_FUNCTIONS:
            if hasattr(self, name):
                setattr(self, name, None)
        self._ensemble_state.forget()
        self._restart_optimizer()

    def _restart_optimizer(self):
        """Let the optimizer start anew, with the same settings."""
        self.train_function = None
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and optimizer.built:
            self.optimizer = type(optimizer).from_config(optimizer.get_config())

    @in_turn
    def fit(self, *args, **kwargs):
        """As `keras.Model.fit`, minimising the N-sample objective."""
        bound = inspect.signature(super().fit).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        self._check_enabled("fit")
        validation.not_empty("x", arguments.get("x"))
        arguments["callbacks"] = with_run_callbacks(arguments.get("callbacks"))
        settings = self.lora_dropout
        advice = memory_advice("fit", settings.sampling, settings.num_samples)
        try:
            with advice, state_kept(self):
                return super().fit(**arguments)
        finally:
            end_run(self)
            # At its end, Keras puts the optimizer's averaged weights in place.
            self._prune()

    @in_turn
    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`, on the mean network."""
        with state_kept(self):
            return super().evaluate(*args, **kwargs)

    @in_turn
    def predict(self, *args, **kwargs):
        """As `keras.Model.predict`, with the mean network."""
        with state_kept(self):
            return super().predict(*args, **kwargs)

    @in_turn
    def test_on_batch(self, *args, **kwargs):
        """As `keras.Model.test_on_batch`, on the mean network."""
        return super().test_on_batch(*args, **kwargs)

    @in_turn
    def predict_on_batch(self, *args, **kwargs):
        """As `keras.Model.predict_on_batch`, with the mean network."""
        return super().predict_on_batch(*args, **kwargs)


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
