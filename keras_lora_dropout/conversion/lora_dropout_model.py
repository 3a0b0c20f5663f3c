"""`LoRADropoutModel`, for models built by hand from adapted layers."""

import functools

import keras

from keras_lora_dropout.conversion.converted_model import attach
from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.conversion.model import SamplingSettings
from keras_lora_dropout.conversion.model import with_instances
from keras_lora_dropout.conversion.plain import plain_recipe
from keras_lora_dropout.conversion.recipe import RECIPE
from keras_lora_dropout.conversion.recipe import recipe_of


@keras.saving.register_keras_serializable("keras_lora_dropout")
class LoRADropoutModel(AdaptedModel, keras.Model):
    """A `keras.Model` that trains and predicts with LoRA Dropout.

    Use it in place of `keras.Model` where you build a model yourself from
    `LoRADropoutDense`, `AdaLoRADropoutDense` and their einsum kin: of inputs
    and outputs, or by subclassing with a `call` of your own. `fit` minimises
    the N-sample objective, `ensemble_predict` and `ensemble_evaluate` average N
    instances. To adapt an existing model, use `enable_lora_dropout`.

    Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 7-8.

    Args:
        *args: Positional arguments of `keras.Model`.
        num_samples: Positive integer. Mask instances N, in training and in
            ensembles. Defaults to 4.
        rank_budget: `RankBudget` or `None`. Needed by AdaLoRA layers: how many
            of their ranks are kept, and when. Their own ranks are the initial
            ones.
        mask_sharing: `"batch"`: one mask per instance for the whole batch.
            `"example"`: each example draws its own masks, in each instance.
        mask_sampling: `"bernoulli"`: the N instances are independent.
            `"balanced"`: of the N, exactly `N * (1 - dropout_rate)`, rounded
            down or up, keep a mask entry, so that their mean varies less.
        sampling: `"parallel"`: the N instances are one batch of `N * B`.
            `"sequential"`: one after another, in the memory of one.
        seed: Integer or `None`. Seed of the masks.
        **kwargs: Keyword arguments of `keras.Model`.

    Raises:
        TypeError: If `rank_budget` is no `RankBudget`.
        ValueError: If an argument is out of range, or if the budget does not
            fit the layers.

    Example:

    >>> inputs = keras.Input((3,))
    >>> x = LoRADropoutDense(8, activation="relu", rank=2)(inputs)
    >>> model = LoRADropoutModel(inputs, keras.layers.Dense(1)(x))
    >>> model.compile("adam", "mse")
    >>> history = model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    >>> model.ensemble_predict(np.ones((4, 3)), verbose=0).shape
    (4, 1)
    """

    def __init__(
        self,
        *args,
        num_samples=4,
        rank_budget=None,
        mask_sharing="batch",
        mask_sampling="bernoulli",
        sampling="parallel",
        seed=None,
        **kwargs,
    ):
        settings = SamplingSettings(
            num_samples, mask_sharing, sampling, mask_sampling
        )
        if args or "inputs" in kwargs:
            # `keras.Model.__init__` would rebase `LoRADropoutModel` itself on
            # Keras's functional class and so break its other subclasses.
            self.__class__ = _functional_class(type(self))
        super().__init__(*args, **kwargs)
        self._start_sampling(settings, seed)
        self._start_allocation(rank_budget)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "call" in vars(cls):
            cls.call = with_instances(cls.call)

    def get_config(self):
        """Return the recipe of a functional model and of its adapters.

        A subclass with a `call` of its own keeps to Keras's rules: arguments of
        its constructor are stored if they are plain, else it overrides
        `get_config`.
        """
        if not _is_functional(self):
            return super().get_config()
        if self._plain_trainable is None:
            model = plain_recipe(self, layers=False)
        else:
            model = plain_recipe(self)
        return {"model": model, RECIPE: recipe_of(self)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Build the model of a recipe."""
        if RECIPE not in config:
            return super().from_config(config)
        model = keras.saving.deserialize_keras_object(
            config["model"], custom_objects
        )
        model.__class__ = _functional_class(cls)
        return attach(model, config[RECIPE])

    def get_build_config(self):
        config = super().get_build_config()
        if config is None or _is_functional(self):
            return config
        return {**config, RECIPE: recipe_of(self)}

    def build_from_config(self, config):
        recipe = config.get(RECIPE)
        super().build_from_config(
            {key: value for key, value in config.items() if key != RECIPE}
        )
        # Keras warns of a model that it cannot build.
        if recipe and all(layer.built for _, layer in self.adapted_layers):
            attach(self, recipe)


def _is_functional(model):
    return model.plain_class() is not keras.Model


@functools.cache
def _functional_class(cls):
    """A subclass of `cls` that is a functional model too."""
    inputs = keras.Input((1,))
    functional = type(keras.Model(inputs, inputs))
    if issubclass(cls, functional):
        return cls
    namespace = {"__module__": cls.__module__, "call": functional.call}
    made = type(cls.__name__, (cls, functional), namespace)
    package, _, name = keras.saving.get_registered_name(cls).rpartition(">")
    if package:
        # A saved model names the class that the user knows.
        register = keras.saving.register_keras_serializable(package, name)
        register(made)
        register(cls)
    return made
