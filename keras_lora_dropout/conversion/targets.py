"""Which layers of a model are adapted, and which stay trainable."""

import re

import keras

from keras_lora_dropout.architectures import experts
from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.architectures.blocks import block_layers
from keras_lora_dropout.architectures.blocks import head_layers
from keras_lora_dropout.architectures.direct_kernels import uncalled_layers
from keras_lora_dropout.architectures.transformer_blocks import choose_blocks
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.validation import shown
from keras_lora_dropout.layers.adapt import can_adapt
from keras_lora_dropout.layers.adapt import is_known
from keras_lora_dropout.layers.adapt import known_names

experts.register()
# What a word chooses, within the blocks or, of convolutions, anywhere.
_KINDS = {
    "all-linear": (keras.layers.Dense, keras.layers.EinsumDense),
    "all-convolutions": (
        keras.layers.Conv1D,
        keras.layers.Conv2D,
        keras.layers.Conv3D,
        keras.layers.DepthwiseConv1D,
        keras.layers.DepthwiseConv2D,
    ),
}
_SIZES = "units", "filters"
# What `re` raises: for nonsense, for absurd counts, for absurd depths.
_NO_PATTERN = re.error, OverflowError, RecursionError


def layer_paths(model):
    """Return `{path: layer}` of all layers below a model, in forward order.

    A path is Keras's `layer.path`, e.g. `transformer_layer_0/
    self_attention_layer/query`, without the name of the model itself, which
    Keras numbers; a layer that has none yet goes by its name, and paths that
    occur twice are numbered.
    """
    paths = {}
    for layer in descendants(model):
        path = (layer.path or layer.name).removeprefix(f"{model.name}/")
        unique, count = path, 1
        while unique in paths:
            count += 1
            unique = f"{path}#{count}"
        paths[unique] = layer
    return paths


def select_targets(model, target_layers, exclude_layers=None, blocks="all"):
    """Return `[(path, layer)]` of the layers to adapt.

    Args:
        model: A built `keras.Model`.
        target_layers: `"all-linear"`, `"all-convolutions"`, another string (a
            regular expression that `re.search` looks for in the path), a list
            of layer names or path endings, or a callable `(path, layer) ->
            bool`.
        exclude_layers: `None`, or a string, list or callable as above: which
            of them are left out.
        blocks: `"all"`, or which blocks' layers alone are adapted, as in
            `choose_blocks`.

    Raises:
        TypeError: If a selector is none of these.
        ValueError: If nothing, or not every name, matches a layer of a kind
            that adapters are for.
    """
    paths = layer_paths(model)
    known = {p: lyr for p, lyr in paths.items() if is_known(lyr)}
    uncalled = uncalled_layers(model)
    if isinstance(target_layers, str) and target_layers in _KINDS:
        wanted = _all_of(model, target_layers) - uncalled
        chosen = [(p, lyr) for p, lyr in known.items() if id(lyr) in wanted]
    else:
        chosen = _match("target_layers", target_layers, known)
    takes_all = isinstance(blocks, str) and blocks == "all"
    if not takes_all:
        inside = {
            id(layer)
            for block in choose_blocks(model, blocks)
            for layer in (block, *descendants(block))
        }
        chosen = [(p, lyr) for p, lyr in chosen if id(lyr) in inside]
    if exclude_layers is not None:
        excluded = dict(_match("exclude_layers", exclude_layers, known))
        chosen = [(p, lyr) for p, lyr in chosen if p not in excluded]
    if not chosen:
        received = f"target_layers={shown(target_layers)}"
        if exclude_layers is not None:
            received += f", exclude_layers={shown(exclude_layers)}"
        if not takes_all:
            received += f", blocks={shown(blocks)}"
        raise ValueError(
            "`enable_lora_dropout` found no layer to adapt in model "
            f'"{model.name}". Received: {received}. '
            f"{_adaptable(known)} Name some of these in `target_layers`; "
            '"all-linear" means every `Dense` and `EinsumDense`, '
            '"all-convolutions" every convolution, but the output head.'
        )
    for path, layer in chosen:
        if id(layer) in uncalled:
            raise ValueError(
                f'Cannot adapt layer "{path}": its block multiplies by the '
                "kernel itself and never calls the layer, so an adapter would "
                "have no part in the model. Leave it out with "
                "`exclude_layers`."
            )
        if not can_adapt(layer):
            raise ValueError(
                f'Cannot adapt layer "{path}": {type(layer).__name__} has a '
                "`call` of its own, so what it computes is not what the layer "
                "of Keras does that it inherits from. Leave it out with "
                "`exclude_layers`."
            )
    return chosen


def select_trainable(model, trainable_layers):
    """Return the layers that stay trainable besides the adapters.

    Args:
        model: A built `keras.Model`.
        trainable_layers: `"head"`, `None`, or as `target_layers` above, over
            layers of every kind.
    """
    if trainable_layers is None:
        return []
    if isinstance(trainable_layers, str) and trainable_layers == "head":
        return head_layers(model)
    weighted = {p: lyr for p, lyr in layer_paths(model).items() if lyr.weights}
    chosen = _match("trainable_layers", trainable_layers, weighted)
    if not chosen:
        raise ValueError(
            f'`trainable_layers` matches no layer of model "{model.name}". '
            f"Received: trainable_layers={shown(trainable_layers)}. Its layers "
            f"are named {_quoted_names(weighted)}."
            ' Pass some of these, or "head", or None.'
        )
    return [layer for _, layer in chosen]


def values_by_pattern(argument, patterns, paths):
    """Return `{path: value}` of the layers that a dictionary names.

    Args:
        argument: String. Name of the argument, for messages.
        patterns: `None`, or a dictionary. Each key is a layer name, a path
            ending or a regular expression for one; of several that match a
            path, the first counts.
        paths: List of paths of the adapted layers.

    Raises:
        TypeError: If `patterns` is neither.
        ValueError: If a key matches no path, or is no regular expression.
    """
    if patterns is None:
        return {}
    if not isinstance(patterns, dict) or not all(
        isinstance(key, str) for key in patterns
    ):
        raise TypeError(
            f"`{argument}` must be None or a dictionary from layer names, path "
            "endings or regular expressions to values, e.g. "
            f'{argument}={{"query": 4}}. Received: '
            f"{argument}={shown(patterns)}."
        )
    found = {}
    for key, value in patterns.items():
        matches = [p for p in paths if _ending(argument, key).search(p)]
        if not matches:
            raise ValueError(
                f"`{argument}` has a key that matches no adapted layer: "
                f"{shown(key)}. A key is a layer's name, the end of its path, "
                "or a regular expression for one of these. Received: "
                f"{argument}={shown(patterns)}. The adapted layers are "
                f"{_quoted(paths)}."
            )
        for path in matches:
            found.setdefault(path, value)
    return found


def _ending(argument, key):
    try:
        return re.compile(rf"(?:^|/)(?:{key})$")
    except _NO_PATTERN as error:
        raise ValueError(
            f"`{argument}` has a key that is no valid regular expression: "
            f"{error}. Received: {shown(key)}."
        ) from error


def _all_of(model, word):
    """Ids of the layers that a word chooses; of a plain model all but its head.

    Layers of one unit, such as the gate of a shared expert, are none of them:
    such a kernel has no lower rank.
    """
    backbone = backbone_of(model)
    if backbone is not None and word == "all-linear":
        layers = block_layers(backbone)
    elif backbone is not None:
        layers = descendants(backbone)  # Blocks of convolutions are no layers.
    else:
        heads = {id(layer) for layer in head_layers(model)}
        layers = (lyr for lyr in descendants(model) if id(lyr) not in heads)
    return {
        id(layer)
        for layer in layers
        if isinstance(layer, _KINDS[word])
        and 1 not in (getattr(layer, size, None) for size in _SIZES)
    }


def _match(argument, selector, paths):
    # A class can be called, too, but not with these.
    if callable(selector) and not isinstance(selector, type):
        return [(p, lyr) for p, lyr in paths.items() if selector(p, lyr)]
    if isinstance(selector, str):
        try:
            pattern = re.compile(selector)
        except _NO_PATTERN as error:
            raise ValueError(
                f"`{argument}` is a string and so a regular expression on the "
                f"layer path, but it is not a valid one: {error}. "
                f"Received: {argument}={shown(selector)}."
            ) from error
        return [(p, lyr) for p, lyr in paths.items() if pattern.search(p)]
    names = _list_of_names(argument, selector)
    unmatched = [
        name
        for name in names
        if not any(_named(name, p, lyr) for p, lyr in paths.items())
    ]
    if unmatched:
        raise ValueError(
            f"`{argument}` names layers that are not there: "
            f"{shown(unmatched)}. Received: "
            f"{argument}={shown(selector)}. Layers that can be named here: "
            f"{_quoted_names(paths)}."
        )
    return [
        (p, lyr)
        for p, lyr in paths.items()
        if any(_named(name, p, lyr) for name in names)
    ]


def _list_of_names(argument, selector):
    is_list = isinstance(selector, (list, tuple, set, frozenset))
    if not is_list or not all(isinstance(name, str) for name in selector):
        raise TypeError(
            f"`{argument}` must be a word, a regular expression on the layer "
            "path, a list of layer names or a callable `(path, layer) -> "
            f"bool`. Received: {argument}={shown(selector)} (of type "
            f"{type(selector).__name__})."
        )
    return list(selector)


def _named(name, path, layer):
    return name in (layer.name, path) or path.endswith(f"/{name}")


def _adaptable(known):
    if not known:
        return f"It has no layer of the kinds {', '.join(known_names())}."
    return f"Adaptable layers are named {_quoted_names(known)}."


def _quoted_names(paths):
    return _quoted(sorted({layer.name for layer in paths.values()}))


def _quoted(names):
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(f'"{name}"' for name in names[:20]) + more
