"""Paths of layers that are the same in every process.

Keras numbers layers that have no name of their own by how many of their class
came before, in any model: the same model has `mixture_2` in one process and
`mixture_10` in the next. In files, such a layer has its number among those of
its class in its own model.
"""

import collections
import dataclasses
import re

from keras_lora_dropout.core.keras_internals import descendants


def to_file(model, state):
    """Return a state of the model's adapter with stable paths."""
    return _renamed(state, _stable_names(model))


def from_file(model, state):
    """Return a state that was read from a file with the model's paths."""
    names = _stable_names(model)
    return _renamed(state, {stable: name for name, stable in names.items()})


def _stable_names(model):
    """Return `{name: stable name}` of the layers that Keras named."""
    layers = {layer.name: layer for layer in descendants(model)}
    numbered = collections.defaultdict(dict)  # By stem.
    for name, layer in layers.items():
        stem = _automatic_stem(layer)
        if stem is not None:
            names = numbered[stem]
            names[name] = f"{stem}_{len(names)}" if names else stem
    given = set(layers).difference(*numbered.values())
    # A name that someone has given keeps its meaning.
    return {
        name: stable
        for names in numbered.values()
        if not given & set(names.values())
        for name, stable in names.items()
    }


def _automatic_stem(layer):
    """Return the name that Keras gives layers of a class, if it did."""
    for cls in type(layer).__mro__:
        stem = _snake_case(cls.__name__)
        if re.fullmatch(rf"{re.escape(stem)}(_[0-9]+)?", layer.name):
            return stem
    return None


def _snake_case(name):
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _replaced(path, names):
    return "/".join(names.get(part, part) for part in path.split("/"))


def _renamed(state, names):
    """Return a state with other names in its paths."""

    def path(old):
        return _replaced(old, names)

    def by_path(entries):
        return {path(old): value for old, value in entries.items()}

    settings = dict(state.settings)
    for name in "layers", "rank_pattern":
        if name in settings:
            settings[name] = by_path(settings[name])
    record = settings["rank_record"]
    if record is not None:
        record = {**record, "ranks": by_path(record["ranks"])}
        settings["rank_record"] = record
    return dataclasses.replace(
        state, settings=settings, tensors=by_path(state.tensors)
    )
