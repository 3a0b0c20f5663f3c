"""Layers that gain a mixin while they live, and lose it again."""

import functools


class LayerMixin:
    """Base of the mixins that a built layer may gain."""


def mix_in(layer, mixin):
    """Let a layer have a mixin before its own class.

    Args:
        layer: Any layer, in place.
        mixin: Subclass of `LayerMixin`.
    """
    layer.__class__ = _mixed(type(layer), mixin)


def has_mixin(layer):
    """Whether a layer has gained any mixin."""
    return isinstance(layer, LayerMixin)


def unmixed(cls):
    """Return the class that a layer had before it gained mixins."""
    while issubclass(cls, LayerMixin):
        _, cls = cls.__bases__
    return cls


def mixed_like(cls, other):
    """Return a class with the mixins that another one has gained."""
    if not issubclass(other, LayerMixin):
        return cls
    mixin, inner = other.__bases__
    return _mixed(mixed_like(cls, inner), mixin)


@functools.cache
def _mixed(cls, mixin):
    # Keras names the weights in its files after classes: the name stays.
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
