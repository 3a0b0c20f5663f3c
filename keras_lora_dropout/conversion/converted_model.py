"""A Keras model that was adapted in place: its class, and its recipe."""

import functools
import logging

import keras

from keras_lora_dropout.architectures import presets
from keras_lora_dropout.architectures.deberta_v3 import make_lean
from keras_lora_dropout.conversion.generation import with_generation
from keras_lora_dropout.conversion.merging import merged_copy
from keras_lora_dropout.conversion.model import AdaptedModel
from keras_lora_dropout.conversion.model import SamplingSettings
from keras_lora_dropout.conversion.model import with_instances
from keras_lora_dropout.conversion.plain import guard_containers
from keras_lora_dropout.conversion.plain import plain_recipe
from keras_lora_dropout.conversion.plain import unguarded
from keras_lora_dropout.conversion.recipe import RECIPE
from keras_lora_dropout.conversion.recipe import recipe_of
from keras_lora_dropout.conversion.recipe import restore
from keras_lora_dropout.conversion.recipe import with_paths_of
from keras_lora_dropout.conversion.starting_factors import initial_names
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.layers import adapt
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter

logger = logging.getLogger("keras_lora_dropout")

_REGISTER = keras.saving.register_keras_serializable(
    "keras_lora_dropout", "AdaptedModel"
)


@_REGISTER
class ConvertedModel(AdaptedModel):
    """Mixin of the classes that `enable_lora_dropout` gives to models.

    A saved model names this one class, whatever model was adapted: its recipe
    holds that of the plain model, and what was done to it.
    """

    def get_config(self):
        """Return the recipe of the plain model and of its adapters."""
        return {"model": plain_recipe(self), RECIPE: recipe_of(self)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Build the plain model of a recipe and adapt it as it was."""
        config = dict(config)
        recipe = config.pop(RECIPE)
        if "model" in config:
            model = keras.saving.deserialize_keras_object(
                config["model"], custom_objects
            )
        else:
            # A preset: the plain model's own recipe, and ours beside it.
            model = cls.plain_class().from_config(config)
        return attach(model, recipe)


def convert(model, settings, seed, rank_budget, plain_trainable, optimize):
    """Give a model with adapted layers the class and state that they need.

    Args:
        model: The model, in place.
        settings: `SamplingSettings`.
        seed: Integer. Seed of the masks.
        rank_budget: `RankBudget` or `None`.
        plain_trainable: `trainable_flags` of the model before.
        optimize: Boolean. Whether layers take on their lean form.
    """
    if not isinstance(model, AdaptedModel):
        model.__class__ = converted_class(type(model))
    model._plain_trainable = plain_trainable
    model._start_sampling(settings, seed)
    model._start_allocation(rank_budget)
    model._optimized = optimize
    if optimize:
        make_lean(model)
    guard_containers(model)
    model._forget_compiled_state()


@functools.cache
def converted_class(cls):
    """A subclass of a model class with the methods of `AdaptedModel`."""
    namespace = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "call": with_instances(_plain_call),
        # A converted class has no instances but converted ones; Keras calls
        # it to clone some.
        "__init__": _refuse_to_construct,
    }
    if hasattr(cls, "generate_step"):
        namespace["generate_step"] = with_generation(cls.generate_step)
        namespace["generate"] = in_turn(cls.generate)
    if presets.has_presets(cls):
        namespace["save_to_preset"] = save_to_preset
        namespace["from_preset"] = cls.from_preset
        # KerasHub looks for the task of a backbone among all its subclasses.
        namespace["backbone_cls"] = None
    name = f"LoRADropout{cls.__name__}"
    converted = type(name, (ConvertedModel, cls), namespace)
    _REGISTER(converted)
    _REGISTER(ConvertedModel)  # The name leads back to the mixin.
    return converted


def _plain_call(self, *args, **kwargs):
    # Keras makes a functional class of a model's class when it first
    # constructs one, so which `call` that is shows late.
    return self.plain_class().call(self, *args, **kwargs)


def save_to_preset(self, preset_dir, max_shard_size=10):
    """Save the adapted model as a KerasHub preset.

    `from_preset` of the model's class, or of a base class of it, gives the
    adapted model back where `keras_lora_dropout` is imported; elsewhere it
    raises an error. Only the active adapter is written. The preset of a class
    that KerasHub does not ship holds the merged plain model instead, and a
    warning says so.

    Args:
        preset_dir: Path of the directory.
        max_shard_size: Number or `None`, as in KerasHub.
    """
    plain = self.plain_class()
    others = self._inactive_adapters
    if not presets.is_known(plain):
        logger.warning(
            "The preset in %r holds the merged plain model: `from_preset` "
            "would not find the adapted class of %s, which is no class of "
            "KerasHub. Keep the adapters with `save` or `save_adapters`.",
            str(preset_dir),
            plain.__name__,
        )
        merged_copy(self).save_to_preset(preset_dir, max_shard_size)
        return
    if others:
        logger.warning(
            "The preset in %r holds the adapter %r alone, without %s. Keep "
            "those with `save` or `save_adapters`.",
            str(preset_dir),
            self.active_adapter,
            list(others),
        )
    self._inactive_adapters = {}
    try:
        with presets.written_preset(preset_dir) as folder:
            with unguarded(self):
                plain.save_to_preset(self, folder, max_shard_size)
            presets.name_adapted_class(
                folder,
                plain,
                {**_preset_config(self), RECIPE: recipe_of(self)},
            )
    finally:
        self._inactive_adapters = others


def _preset_config(model):
    """The plain configuration as presets have it."""
    config = plain_recipe(model)["config"]
    entries = [config]
    while entries:
        entry = entries.pop()
        for key in ("build_config", "compile_config"):
            entry.pop(key, None)
        entries += [
            value for value in entry.values() if isinstance(value, dict)
        ]
    return config


def _refuse_to_construct(self, *args, **kwargs):
    raise ValueError(
        f"{type(self).__name__} is what `enable_lora_dropout` makes of a "
        f"{self.plain_class().__name__}; it cannot be "
        "constructed. Build the plain model and call `enable_lora_dropout`, or "
        "copy an adapted one with `type(model).from_config(model.get_config())`"
        " and `copy.set_weights(model.get_weights())`."
    )


def attach(model, recipe):
    """Adapt a model by a recipe, in place; its weights come later.

    Layers that are adapted already, by hand, take on ranks and settings.

    Raises:
        ValueError: If the model has not the layers that the recipe names.
    """
    recipe = with_paths_of(model, recipe)
    layers = layer_paths(model)
    for path, settings in recipe["adapter"]["layers"].items():
        layer, kind = layers[path], settings["kind"]
        if isinstance(layer, LoRADropoutAdapter):
            adapt.switch_kind(layer, kind=kind)
            layer.resize(settings["rank"], settings["alpha"])
        else:
            adapt.adapt(
                layer,
                kind=kind,
                rank=settings["rank"],
                alpha=settings["alpha"],
                dropout_rate=settings["dropout_rate"],
                rescale=settings["rescale"],
                seed=settings["seed"],
            )
        layer.hold_initial_factors(bool(initial_names(settings)))
    convert(
        model,
        SamplingSettings(**recipe["sampling"]),
        seed=None,
        rank_budget=None,
        plain_trainable=recipe["plain_trainable"],
        optimize=recipe["optimize"],
    )
    restore(model, recipe)
    return model


presets.register(converted_class)
