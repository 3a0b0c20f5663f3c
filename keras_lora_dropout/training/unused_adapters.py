"""Tells of adapters that have no part in the model's forward pass."""

import logging

logger = logging.getLogger("keras_lora_dropout")


def warn_of_unused(model):
    """Warn once of the adapters that no forward pass so far has called.

    Such a layer may belong to a part of the model that its inputs leave out,
    or some other layer may read its kernel in place of calling it.

    Args:
        model: The adapted model, after a forward pass.
    """
    plan = model.mask_plan
    if plan.usage_checked:
        return
    plan.usage_checked = True
    unused = [
        path
        for path, layer in model.adapted_layers
        if id(layer) not in plan.called and layer.adapter_enabled
    ]
    if unused:
        logger.warning(
            "%d of %d adapters have no part in the training step, because "
            "their layers are not called; they stay as they are: %s. Leave "
            "them out with `exclude_layers`.",
            len(unused),
            len(plan.columns),
            ", ".join(f'"{path}"' for path in unused),
        )
