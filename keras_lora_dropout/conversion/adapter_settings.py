"""What the settings of an adapter in a file have to be."""

from keras_lora_dropout.conversion.starting_factors import INITIAL
from keras_lora_dropout.conversion.starting_factors import initial_entry
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.rank_budget import RankBudget
from keras_lora_dropout.layers.adapt import KINDS

# What is written of each layer, and how JSON reads it.
_FIELDS = {
    "kind": (str,),
    "rank": (int,),
    "alpha": (float, int),
    "dropout_rate": (float, int),
    "rescale": (bool,),
    "seed": (int, type(None)),
    "input_dim": (int,),
    "output_dim": (int,),
}


def budget_from(data):
    """Return the `RankBudget` that `dataclasses.asdict` was applied to."""
    return None if data is None else RankBudget(**data)


def checked_settings(settings, path):
    """Return settings read from a file, if `save_adapters` writes such.

    Raises:
        ValueError: If something is missing or of a wrong type.
    """
    try:
        layers = {
            path: _checked_layer(layer)
            for path, layer in settings["layers"].items()
        }
        budget = settings["rank_budget"]
        record = settings["rank_record"]
        _check_ranks(layers, _typed("rank_budget", budget, dict, type(None)))
        if record is not None:
            record = _checked_record(record, layers, budget)
        return {
            "layers": layers,
            "rank_budget": budget,
            "rank_record": record,
            "base_fingerprint": _typed(
                "base_fingerprint", settings["base_fingerprint"], str
            ),
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The settings of the adapter in {str(path)!r} are not what "
            f"`save_adapters` writes: {error!r}. Save the adapter again."
        ) from error


def _typed(name, value, *types):
    """Return a value of a file; raise `TypeError` if JSON reads another."""
    if type(value) not in types:
        raise TypeError(f'"{name}" is {validation.shown(value)}')
    return value


def _checked_layer(layer):
    fields = {
        name: _typed(name, layer[name], *types)
        for name, types in _FIELDS.items()
    }
    validation.word("kind", fields["kind"], KINDS)
    for name in ("rank", "input_dim", "output_dim"):
        validation.integer(name, fields[name], at_least=0)
    fields["alpha"] = validation.alpha(fields["alpha"], fields["rank"])
    fields["dropout_rate"] = validation.dropout_rate(fields["dropout_rate"])
    validation.seed(fields["seed"])
    initial = _typed(INITIAL, layer.get(INITIAL, False), bool)
    return fields | initial_entry(initial)


def _check_ranks(layers, budget):
    """Raise `ValueError` unless a budget and the layers' ranks fit."""
    if budget is None:
        return
    ranks = [lyr["rank"] for lyr in layers.values() if lyr["kind"] == "AdaLoRA"]
    if not ranks:
        raise ValueError('there is a "rank_budget", but no AdaLoRA layer')
    budget_from(budget)


def _checked_record(record, layers, budget):
    """Return the history of ranks that are compact by now."""
    if budget is None:
        raise ValueError('there is a "rank_record", but no "rank_budget"')
    steps = _typed("step", record["step"], list)
    ranks = _typed("ranks", record["ranks"], dict)
    adaptive = [p for p, lyr in layers.items() if lyr["kind"] == "AdaLoRA"]
    if set(ranks) != set(adaptive):
        raise ValueError(f'"rank_record" is of the layers {list(ranks)}')
    for name, values in {"step": steps, **ranks}.items():
        if len(_typed(name, values, list)) != len(steps):
            raise ValueError(
                f'"rank_record" has {len(steps)} steps, but {len(values)} '
                f'entries of "{name}"'
            )
        for value in values:
            validation.integer(name, value, at_least=0)
    return {"step": steps, "ranks": ranks}
