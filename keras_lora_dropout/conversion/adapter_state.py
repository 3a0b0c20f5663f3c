"""One adapter of a model as plain data: taken from it, put into it.

An adapter is more than its factors: the head that was trained with it, its
settings, and, with AdaLoRA, the state by which ranks are chosen.
"""

import dataclasses
import hashlib

import numpy as np
from keras import backend

from keras_lora_dropout.conversion.adapter_settings import budget_from
from keras_lora_dropout.conversion.starting_factors import initial_entry
from keras_lora_dropout.conversion.starting_factors import initial_names
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.conversion.trainable import own_weights
from keras_lora_dropout.core import sharding
from keras_lora_dropout.layers.adapt import switch_kind
from keras_lora_dropout.layers.adapter import LoRADropoutAdapter
from keras_lora_dropout.training.rank_allocator import state_shapes


@dataclasses.dataclass(frozen=True)
class AdapterState:
    """An adapter without its model.

    Attributes:
        settings: What JSON can hold: `"layers"`, a dictionary of layer path ->
            kind, rank, alpha, dropout rate and so on, with
            `"initial_factors"` if it has some; `"rank_budget"`;
            `"rank_record"`, the history of ranks once they are compact.
        tensors: Dictionary of name -> NumPy array. The names start with
            `adapters/`, `head/` or `ranks/`.
    """

    settings: dict
    tensors: dict


def take(model):
    """Return the `AdapterState` of the model's active adapter."""
    variables = {**own_variables(model), **head_variables(model)}
    return AdapterState(
        settings_of(model),
        {name: array_of(variable) for name, variable in variables.items()},
    )


def empty(settings):
    """Return a state of given settings whose tensors are still zeros."""
    settings = dict(settings)
    return AdapterState(
        settings=settings,
        tensors={
            name: np.zeros(shape, dtype)
            for name, shape, dtype in settings.pop("tensors")
        },
    )


def settings_of(model):
    """Return the settings of the model's active adapter as plain data."""
    allocator = model.rank_allocator
    budget = model.rank_budget
    is_closed = allocator is not None and not allocator.is_open
    return {
        "layers": {
            path: layer_settings(layer) for path, layer in model.adapted_layers
        },
        "rank_budget": budget and dataclasses.asdict(budget),
        "rank_record": allocator.record_as_data() if is_closed else None,
    }


def layer_settings(layer):
    """Return the settings of one adapted layer as plain data."""
    input_dim, output_dim = layer.factor_sizes
    settings = {
        "kind": layer.kind,
        "rank": layer.lora_rank,
        "alpha": layer.lora_alpha,
        "dropout_rate": layer.dropout_rate,
        "rescale": layer.rescale,
        "seed": layer.seed,
        "input_dim": input_dim,
        "output_dim": output_dim,
    }
    return settings | initial_entry(bool(layer.initial_factors))


def put(model, state):
    """Make a state the model's active adapter.

    The state must fit, see `differences`. What was compiled is kept only if
    nothing but values changed.

    Returns:
        Boolean. Whether anything but values changed.
    """
    settings = state.settings
    layers = dict(model.adapted_layers)
    changed = False
    for path, new in settings["layers"].items():
        layer = layers[path]
        # A seed is of no account once there are factors.
        changed |= layer_settings(layer) | {"seed": None} != new | {
            "seed": None
        }
        switch_kind(layer, kind=new["kind"])
        layer.dropout_rate = new["dropout_rate"]
        layer.rescale = new["rescale"]
        layer.seed = new["seed"]
        values, initial = (
            [state.tensors[f"adapters/{path}/{name}"] for name in names]
            for names in (layer.factor_names, initial_names(new))
        )
        layer.replace_factors(values, new["alpha"], initial)
    budget = budget_from(settings["rank_budget"])
    changed |= budget != model.rank_budget
    # A new adapter has no state of ranks yet.
    changed |= budget is not None and "ranks/rank_step" not in state.tensors
    closed = settings["rank_record"] is not None
    allocator = model.rank_allocator
    was_closed = allocator is not None and not allocator.is_open
    if changed or closed or was_closed:
        model._replace_allocation(budget, settings["rank_record"])
        changed = True
    variables = {**head_variables(model), **_rank_variables(model)}
    for name, variable in variables.items():
        if name in state.tensors:
            variable.assign(state.tensors[name])
    if changed:
        model._mask_plan = None
    return changed


def differences(model, state):
    """Say where a state does not fit a model.

    Returns:
        List of strings, one for each difference: layers that only one of them
        has, sizes, kinds and ranks, missing, superfluous and misshapen
        tensors. An empty list: the state fits.
    """
    layers = dict(model.adapted_layers)
    wanted = state.settings["layers"]
    found = [
        f'layer "{path}" is adapted in the file, but not in the model'
        for path in wanted
        if path not in layers
    ]
    found += [
        f'layer "{path}" is adapted in the model, but not in the file'
        for path in layers
        if path not in wanted
    ]
    for path, new in wanted.items():
        if path in layers:
            found += _layer_differences(path, layers[path], new)
    expected = dict(_expected_tensors(model, state.settings))
    given = state.tensors
    found += [f'tensor "{n}" is missing' for n in expected if n not in given]
    found += [f'tensor "{n}" is unknown' for n in given if n not in expected]
    for name, (shape, dtype) in expected.items():
        if name not in given:
            continue
        array = given[name]
        if tuple(array.shape) != shape:
            found.append(
                f'tensor "{name}" has shape {tuple(array.shape)} in the file, '
                f"but {shape} in the model"
            )
        if array.dtype.name != dtype:
            found.append(
                f'tensor "{name}" has dtype {array.dtype.name} in the file, '
                f"but {dtype} in the model"
            )
    return found


def kind_differences(model, state):
    """Say where kinds and ranks of a state are not those of the model.

    AdaLoRA layers may have fewer ranks in the state, if these are final.
    """
    final = state.settings["rank_record"] is not None
    found = []
    for path, layer in model.adapted_layers:
        own, new = layer_settings(layer), state.settings["layers"].get(path)
        if new is None:
            continue
        for name in ("kind", "rank"):
            fewer = name == "rank" and final and new[name] <= own[name]
            if own[name] != new[name] and not fewer:
                found.append(
                    f'layer "{path}" has {name} {new[name]} in the file, but '
                    f"{own[name]} in the model"
                )
    new = budget_from(state.settings["rank_budget"])
    if new != model.rank_budget:
        found.append(
            f"the rank budget is {new} in the file, but {model.rank_budget} in "
            "the model"
        )
    return found


def _layer_differences(path, layer, new):
    own = layer_settings(layer)
    for name, what in (
        ("input_dim", "input features"),
        ("output_dim", "output features"),
    ):
        if new[name] != own[name]:
            yield (
                f'layer "{path}" has {new[name]} {what} in the file, but '
                f"{own[name]} in the model"
            )


def _expected_tensors(model, settings):
    """Yield `(name, (shape, dtype))` of all tensors that a state has."""
    layers = dict(model.adapted_layers)
    for path, new in settings["layers"].items():
        if path not in layers:
            continue
        rank, sizes = new["rank"], (new["input_dim"], new["output_dim"])
        yield f"adapters/{path}/lora_kernel_a", ((sizes[0], rank), "float32")
        if new["kind"] == "AdaLoRA":
            yield f"adapters/{path}/lora_lambda", ((rank,), "float32")
        if new["kind"] == "DoRA":
            yield f"adapters/{path}/lora_magnitude", ((sizes[1],), "float32")
        yield f"adapters/{path}/lora_kernel_b", ((rank, sizes[1]), "float32")
        shapes = (sizes[0], rank), (rank, sizes[1])
        for name, shape in zip(initial_names(new), shapes, strict=False):
            yield f"adapters/{path}/{name}", (shape, "float32")
    for name, variable in head_variables(model).items():
        dtype = backend.standardize_dtype(variable.dtype)
        yield name, (tuple(variable.shape), dtype)
    if settings["rank_budget"] and settings["rank_record"] is None:
        wanted = settings["layers"]
        yield from _expected_rank_tensors(
            [wanted[path] for path in layers if path in wanted]
        )


def head_variables(model):
    """Return what else trains, by name `head/<layer path>/<variable>`.

    Of a layer with something to train it is every variable, such as the
    statistics of a `BatchNormalization`; of an adapted layer what trains
    besides its factors.
    """
    found = {}
    ranks = {id(v) for v in _rank_variables(model).values()}
    for path, layer in {"": model, **layer_paths(model)}.items():
        own = [v for v in own_weights(layer) if id(v) not in ranks]
        if isinstance(layer, LoRADropoutAdapter):
            factors = {id(factor) for factor in layer.factors}
            own = [v for v in own if v.trainable and id(v) not in factors]
        elif not any(variable.trainable for variable in own):
            continue
        for variable in own:
            found[_unique(f"head/{path}/{variable.name}", found)] = variable
    return found


def fingerprint(model):
    """Return the SHA-256 of the weights that no adapter changes.

    Order, names, shapes, dtypes and every value count; the factors, the head
    and the state of ranks do not. Nor do paths, which Keras changes when it
    builds a layer late.
    """
    adapter = {**own_variables(model), **head_variables(model)}
    ours = {id(variable) for variable in adapter.values()}
    digest = hashlib.sha256()
    for layer in (model, *layer_paths(model).values()):
        for variable in own_weights(layer):
            if id(variable) not in ours:
                array = np.ascontiguousarray(array_of(variable))
                header = variable.name, array.shape, array.dtype.name
                digest.update(repr(header).encode())
                digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def own_variables(model):
    """Return by name the variables that the plain model does not have."""
    return {**_factors(model), **_rank_variables(model)}


def _factors(model):
    return {
        f"adapters/{path}/{name}": weight
        for path, layer in model.adapted_layers
        for name, weight in layer.adapter_weights.items()
    }


def _rank_variables(model):
    allocator = model.rank_allocator
    if allocator is None:
        return {}
    return {f"ranks/{n}": v for n, v in allocator.variables.items()}


def _expected_rank_tensors(layers):
    sizes = [
        (layer["rank"], layer["input_dim"], layer["output_dim"])
        for layer in layers
        if layer["kind"] == "AdaLoRA"
    ]
    for name, expected in state_shapes(sizes).items():
        yield f"ranks/{name}", expected


def _unique(name, taken):
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}#{count}"
    return unique


def array_of(variable):
    """The value of a variable in its own dtype."""
    dtype = backend.standardize_dtype(variable.dtype)
    return np.asarray(sharding.to_numpy(variable)).astype(dtype)
