"""KerasHub's side of the twins in `peft_twins.py`."""

import keras_hub
import numpy as np
import peft_twins
from helpers import set_random
from keras import ops

import keras_lora_dropout as kld
from keras_lora_dropout.architectures.huggingface.twin import HuggingFaceTwin
from keras_lora_dropout.storage.tensor_files import read_tensors


def plain(twin, folder):
    """The KerasHub model of a twin, with the base's weights and head."""
    models = keras_hub.models
    backbone_class = getattr(models, f"{twin.keras_class}Backbone")
    if twin.keras_backbone is not None:
        backbone = backbone_class(**twin.keras_backbone)
        # The task's head too; norms around 1, as in the other direction.
        model = _task(twin, backbone)
        set_random(model.weights, seed=3, scale=0.25)
        for variable in model.weights:
            if variable.name in ("gamma", "scale"):
                variable.assign(variable + 1)
        return model
    base = folder / twin.name / "base"
    model = _task(twin, backbone_class.from_preset(str(base)))
    load_head(model, base)
    return model


def _task(twin, backbone):
    models = keras_hub.models
    if twin.is_classifier:
        task_class = getattr(models, f"{twin.keras_class}TextClassifier")
        return task_class(backbone, num_classes=peft_twins.NUM_CLASSES)
    return getattr(models, f"{twin.keras_class}CausalLM")(backbone)


def load_head(model, base):
    """Load the head from the base's file: KerasHub's converters do not."""
    twin = HuggingFaceTwin(model)
    values = read_tensors(base / "model.safetensors")
    for name, (layer, variable) in twin.variables().items():
        if name.startswith("classifier"):
            value = twin.keras_value(name, layer, variable, values[name])
            variable.assign(value)


def inputs(model, twin):
    ids, mask = peft_twins.inputs(twin.padding)
    data = {
        "token_ids": ids,
        "padding_mask": mask,
        "segment_ids": np.zeros_like(ids),
    }
    return {name: data[name] for name in model.input}


def logits(model, twin, *, run_eagerly=False, **ensemble):
    """What the model predicts, or an ensemble of it, at real tokens."""
    model.run_eagerly = run_eagerly
    x = inputs(model, twin)
    if ensemble:
        outputs = model.ensemble_predict(x, verbose=0, **ensemble)
    else:
        outputs = model.predict(x, verbose=0)
    return peft_twins.of_tokens(outputs, x["padding_mask"])


def adapted(twin, folder, kind):
    """An adapted model of random factors, ranks and head."""
    options = {"rank": 4, "dropout_rate": 0.5, "seed": 5, "num_samples": 2}
    if kind == "adalora":
        options["rank_budget"] = kld.RankBudget(2)
    else:
        options["use_dora"] = twin.lora.get("use_dora", False)
        if "word_embeddings" in twin.lora["target_modules"]:
            options["target_layers"] = r"transformer_layer|token_embedding$"
    model = kld.enable_lora_dropout(plain(twin, folder), **options)
    layers = [layer for _, layer in model.adapted_layers]
    set_random([factor for layer in layers for factor in layer.factors], seed=7)
    set_random(model.trainable_weights, seed=6, scale=0.4)
    layers[2].lora_alpha *= 2  # Strengths differ from layer to layer.
    if kind == "adalora":
        _prune(model)
        if twin.is_classifier:
            model.compact_ranks()
    else:
        generator = np.random.default_rng(8)
        a, b = layers[1].mask_sizes
        values = (
            generator.normal(0, 0.4, (a, 2)),
            *layers[1].factors[1:-1],
            generator.normal(0, 1, (2, b)),
        )
        layers[1].replace_factors(values, alpha=3)
        model._mask_plan = None
    return model


def _prune(model):
    """Prune at random; one layer keeps nothing."""
    allocator = model.rank_allocator
    mask = np.random.default_rng(9).integers(0, 2, allocator.rank_mask.shape)
    mask[:4] = 0
    mask[4:8] = 1
    allocator.rank_mask.assign(ops.cast(mask, allocator.rank_mask.dtype))
    allocator.prune()
