"""How a model was adapted, as plain data for files."""

import dataclasses

from keras_lora_dropout.conversion import adapter_settings
from keras_lora_dropout.conversion import adapter_state
from keras_lora_dropout.conversion import transformer_dropout
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.conversion.trainable import set_trainable_flags
from keras_lora_dropout.conversion.trainable import trainable_flags

# Where a recipe stands in the configuration of a model.
RECIPE = "lora_dropout"


def recipe_of(model):
    """Return how a model was adapted, as plain data."""
    return {
        "sampling": dataclasses.asdict(model.lora_dropout),
        "optimize": model._optimized,
        "transformer_dropout": transformer_dropout.as_data(
            model.transformer_dropout
        ),
        "active": model.active_adapter,
        "adapter": adapter_state.settings_of(model),
        "inactive": {
            name: {
                **state.settings,
                "tensors": [
                    [key, list(array.shape), array.dtype.name]
                    for key, array in state.tensors.items()
                ],
            }
            for name, state in model._inactive_adapters.items()
        },
        "trainable": trainable_flags(model),
        "plain_trainable": model._plain_trainable,
    }


def restore(model, recipe):
    """Restore what a recipe says of a model that is adapted already.

    Args:
        model: The adapted model; its adapters have the ranks of the recipe.
        recipe: What `with_paths_of` returned.
    """
    adapter = recipe["adapter"]
    model._replace_allocation(
        adapter_settings.budget_from(adapter["rank_budget"]),
        adapter["rank_record"],
    )
    model.active_adapter = recipe["active"]
    model._inactive_adapters = {
        name: adapter_state.empty(settings)
        for name, settings in recipe["inactive"].items()
    }
    # Files of the first releases say nothing of it.
    data = recipe.get("transformer_dropout")
    model._put_transformer_dropout(transformer_dropout.from_data(data))
    set_trainable_flags(model, recipe["trainable"])


def with_paths_of(model, recipe):
    """Return a recipe with the paths that a model's layers have now.

    Keras numbers layers without a name, so paths may differ from one process
    to the next; the order of the layers does not.

    Raises:
        ValueError: If the model has not as many layers as the recipe.
    """
    saved, now = list(recipe["trainable"]), ["", *layer_paths(model)]
    if set(saved) == set(now):
        return recipe
    if len(saved) != len(now):
        raise ValueError(
            f'Model "{model.name}" cannot be adapted as it was when it was '
            f"saved: it has {len(now) - 1} layers, but had {len(saved) - 1}. "
            "Rebuild it as it was, and check its `get_config` and "
            "`from_config`."
        )
    path = dict(zip(saved, now, strict=True))

    def by_path(entries):
        return entries and {path[old]: value for old, value in entries.items()}

    def tensor_name(name):
        room, _, rest = name.partition("/")
        if room not in ("adapters", "head"):
            return name
        layer, _, variable = rest.rpartition("/")
        return f"{room}/{path[layer]}/{variable}"

    def adapter(settings):
        record = settings["rank_record"]
        new = {
            **settings,
            "layers": by_path(settings["layers"]),
            "rank_record": record
            and {**record, "ranks": by_path(record["ranks"])},
        }
        if "tensors" in settings:
            new["tensors"] = [
                [tensor_name(name), *rest]
                for name, *rest in settings["tensors"]
            ]
        return new

    dropout = recipe.get("transformer_dropout")
    if dropout:
        names = "attention_layers", "hidden_layers"
        moved = {name: [path[old] for old in dropout[name]] for name in names}
        dropout = {**dropout, **moved}
    return {
        **recipe,
        "transformer_dropout": dropout,
        "adapter": adapter(recipe["adapter"]),
        "inactive": {n: adapter(s) for n, s in recipe["inactive"].items()},
        "trainable": by_path(recipe["trainable"]),
        "plain_trainable": by_path(recipe["plain_trainable"]),
    }
