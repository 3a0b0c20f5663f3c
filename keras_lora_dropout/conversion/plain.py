"""The plain model inside an adapted one: seen for a while, or for good."""

import contextlib
import functools

import keras

from keras_lora_dropout.architectures.deberta_v3 import lean_layers
from keras_lora_dropout.architectures.deberta_v3 import make_lean
from keras_lora_dropout.architectures.deberta_v3 import make_stock
from keras_lora_dropout.conversion.trainable import set_trainable_flags
from keras_lora_dropout.core import shared_prefix
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import forget_attributes
from keras_lora_dropout.core.mixed_classes import has_mixin
from keras_lora_dropout.core.mixed_classes import unmixed
from keras_lora_dropout.layers.adapt import unadapt
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.layers.adapter import plain_class

# What an adapted model has that a plain one has not.
ATTRIBUTES = (
    "lora_dropout",
    "mask_seed_generator",
    "ensemble_seed_generator",
    "rank_budget",
    "rank_allocator",
    "active_adapter",
    "_inactive_adapters",
    "_ensemble_state",
    "_finished_epochs",
    "_restored_epochs",
    "_restored_states",
    "_mask_plan",
    "_optimized",
    "_plain_trainable",
    "_generation",
    "_adapters_disabled",
    "_transformer_dropout_disabled",
)


def guard_containers(model):
    """Let no container of adapters be rebuilt from its own recipe.

    A backbone's or block's configuration builds plain layers, so a copy or a
    preset of it alone would lose the adapters without a word.
    """
    _guard(_containers(model))


def unguard_containers(model):
    """Undo `guard_containers`; return the layers that were guarded."""
    guarded = [
        layer for layer in _containers(model) if "get_config" in vars(layer)
    ]
    for layer in guarded:
        del layer.get_config
    return guarded


@contextlib.contextmanager
def unguarded(model):
    """Let containers be serialized, as parts of the whole model."""
    guarded = unguard_containers(model)
    try:
        yield
    finally:
        _guard(guarded)


def _guard(layers):
    for layer in layers:
        layer.get_config = functools.partial(_refuse_recipe, layer)


def plain_recipe(model, layers=True):
    """Return the serialized plain model inside an adapted one.

    Weights, and what the model was compiled with, are not part of it.

    Args:
        model: An adapted model.
        layers: Boolean. Whether its layers are plain, too.
    """
    with as_plain(model, layers):
        model.get_compile_config = lambda: None
        try:
            return keras.saving.serialize_keras_object(model)
        finally:
            del model.get_compile_config


@contextlib.contextmanager
def as_plain(model, layers=True):
    """Let an adapted model and its layers look as they did before.

    For the duration, classes and recipes are those of the plain model; weights
    are untouched.
    """
    mixed = [
        (layer, type(layer)) for layer in descendants(model) if has_mixin(layer)
    ]
    adapted = [
        (layer, unmixed(type(layer)), layer.lora_rank)
        for layer in descendants(model)
        if layers and isinstance(layer, LoRADropoutAdapter)
    ]
    optimized = lean_layers(model)
    adapted_class = type(model)
    with unguarded(model):
        try:
            for layer, cls in mixed:
                layer.__class__ = unmixed(cls)
            make_stock(model)
            for layer, cls, _ in adapted:
                layer.__class__ = plain_class(cls)
                layer.lora_rank = None
            model.__class__ = model.plain_class()
            yield
        finally:
            model.__class__ = adapted_class
            for layer, cls, rank in adapted:
                layer.__class__ = cls
                layer.lora_rank = rank
            if optimized:
                make_lean(model)
            for layer, cls in mixed:
                layer.__class__ = cls


def strip(model):
    """Take everything off a model that adapting it added, in place.

    A subclass of `LoRADropoutModel` with a `call` of its own has no plain class
    behind it: it stays what it is, with plain layers.
    """
    cls, flags = model.plain_class(), model._plain_trainable
    model._forget_compiled_state()
    unguard_containers(model)
    model._replace_allocation(None, None)
    model._drop_transformer_dropout()
    make_stock(model)
    shared_prefix.uninstall(model)
    for layer in list(descendants(model)):
        if isinstance(layer, LoRADropoutAdapter):
            unadapt(layer)
    model._mask_plan = None
    if cls is not keras.Model:
        forget_attributes(model, [n for n in ATTRIBUTES if n in vars(model)])
        model.__class__ = cls
    if flags is not None:
        set_trainable_flags(model, flags)


def _containers(model):
    for layer in descendants(model):
        if not isinstance(layer, LoRADropoutAdapter) and any(
            isinstance(part, LoRADropoutAdapter) for part in descendants(layer)
        ):
            yield layer


def _refuse_recipe(layer):
    raise ValueError(
        f'"{layer.name}" has LoRA Dropout adapters, which its own recipe '
        "(`get_config`, `clone_model`, `save_to_preset`) would lose. Save or "
        "copy the model that `enable_lora_dropout` was called on; "
        "`merge_adapters` turns it into a plain one."
    )
