"""Adapters from and for PEFT, on the Hugging Face twin of a KerasHub model."""

import dataclasses
import pathlib

import keras
import numpy as np
from keras import ops

from keras_lora_dropout.architectures.huggingface.twin import HuggingFaceTwin
from keras_lora_dropout.conversion.import_plan import ImportPlan
from keras_lora_dropout.core import factors
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import sharding
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.layers.adalora_dropout import AdaLoRAFactors
from keras_lora_dropout.layers.dora import DoRAFactors
from keras_lora_dropout.storage.peft import LowRank
from keras_lora_dropout.storage.peft import PeftAdapter
from keras_lora_dropout.storage.peft_writing import earlier_exports
from keras_lora_dropout.storage.peft_writing import remove_peft
from keras_lora_dropout.storage.peft_writing import write_peft
from keras_lora_dropout.training.backend import writes_files

_INSTANCE = "instance_"


class PeftExchange:
    """Mixin of `AdaptedModel`: write adapters for PEFT, and read PEFT's."""

    @in_turn
    def export_peft(
        self,
        directory,
        instances=0,
        *,
        seed=None,
        base_model_name_or_path=None,
    ):
        """Write the adapters as PEFT adapters of the Hugging Face model.

        `directory` becomes the mean network, which `predict` runs: plain LoRA
        whose `lora_alpha` is multiplied by `(1 - dropout_rate)**2` (not with
        `rescale=True`), or AdaLoRA with its rank pattern. The head's weights
        are stored with it (`modules_to_save`).

        With `instances=N`, the folders `instance_0` to `instance_{N-1}` inside
        it are the N mask instances, as plain LoRA: the factors with the masks
        multiplied in. The mean of their outputs is that of
        `ensemble_predict(x, num_samples=N, seed=seed)`.

        Layers that started as PiSSA or OLoRA have twice their rank there: as
        PEFT's own conversion to plain LoRA does, what the factors started at
        is subtracted, since the base model is the unchanged one.

        BERT, RoBERTa, DeBERTaV3, Llama, Mistral, Gemma and Qwen2 are known.

        Args:
            directory: Folder to write. It may be new, empty or an earlier
                export, which is replaced.
            instances: Integer, 0 or more. Number N of mask instances.
            seed: Integer or `None`. Seed of the instances, as in
                `ensemble_predict`.
            base_model_name_or_path: String or `None`. The Hugging Face model
                that the adapters belong to; noted in the configuration.

        Raises:
            TypeError: If an argument has another type.
            ValueError: If the architecture is not known, if weights train that
                have no name at Hugging Face, if the head is adapted, or if
                other files are in the folder. Nothing is written then.
        """
        count = validation.num_samples(instances, "instances", at_least=0)
        validation.seed(seed)
        _check_name_or_path(base_model_name_or_path)
        twin = HuggingFaceTwin(self)
        saved = _saved_weights(self, twin)
        settings = {
            "task_type": twin.task_type or "FEATURE_EXTRACTION",
            "base_model_name_or_path": base_model_name_or_path,
            "modules_to_save": sorted(set(map(twin.module_to_save, saved)))
            or None,
        }
        directory = pathlib.Path(directory)
        outdated = earlier_exports(directory, _INSTANCE)
        layers = [(twin.modules[p], lyr) for p, lyr in self.adapted_layers]
        kept = _kept_triplets(self)
        mean = {
            name: _mean_network(lyr, kept.get(id(lyr))) for name, lyr in layers
        }
        if not any(module.rank for module in mean.values()):
            raise ValueError(
                f'Model "{self.name}" has no rank left in any adapter, so '
                "there is nothing to export."
            )
        folders = {".": mean}
        if count:
            draws = self._instances(count, seed)
            for n in range(count):
                folders[f"{_INSTANCE}{n}"] = {
                    name: _instance(lyr, kept.get(id(lyr)), draws, n)
                    for name, lyr in layers
                }
        if not writes_files():
            return
        for folder, modules in folders.items():
            adapter = PeftAdapter(modules, saved, settings)
            write_peft(directory / folder, adapter)
        for folder in outdated:
            if folder.name not in folders:
                remove_peft(folder)

    @in_turn
    def import_peft(self, directory):
        """Take over factors and head of a PEFT adapter, in place.

        The adapter is LoRA or AdaLoRA of the model's Hugging Face twin. Its
        layers must be those that are adapted here; ranks are taken over, and
        strengths such that the mean network computes what PEFT does. The
        singular values of AdaLoRA stay apart where the layers here have them,
        too, and are multiplied into `lora_kernel_b` otherwise. The optimizer
        starts anew, with the same settings.

        Args:
            directory: Folder with `adapter_config.json` and
                `adapter_model.safetensors`.

        Raises:
            ValueError: If the files are damaged, hold what is not supported,
                or do not fit the model. All differences are named, and the
                model is unchanged.
        """
        plan = ImportPlan(self, directory)
        plan.compare_adapted()
        plan.apply()


def _check_name_or_path(value):
    if value is not None and not isinstance(value, str):
        raise TypeError(
            "`base_model_name_or_path` must be a string or None. Received: "
            f"base_model_name_or_path={validation.shown(value)} (of type "
            f"{type(value).__name__})."
        )


def _saved_weights(model, twin):
    """Values of `modules_to_save`, by weight name."""
    unknown = [p for p, _ in model.adapted_layers if p not in twin.modules]
    if unknown:
        raise ValueError(
            f'Model "{model.name}" has adapted layers without a name at '
            f"Hugging Face: {unknown}. Leave them out with `exclude_layers`."
        )
    tied = [p for p, layer in model.adapted_layers if twin.is_tied(layer)]
    if tied:
        raise ValueError(
            f"The layers {tied} are adapted and make the logits, too, but "
            "PEFT adapts embeddings alone. Leave them out with "
            "`exclude_layers`, or merge the adapters and export the model."
        )
    saved = twin.saved_variables()
    heads = {id(layer) for layer, _ in saved.values()}
    adapted = [p for p, layer in model.adapted_layers if id(layer) in heads]
    if adapted:
        raise ValueError(
            f"The layers {adapted} belong to the head and are adapted, but "
            "PEFT stores a head as a whole, without adapters. Leave them out "
            "with `exclude_layers`: the head trains without adapters."
        )
    return {name: twin.value_of(name, *where) for name, where in saved.items()}


def _kept_triplets(model):
    """Return `{id(layer): kept}` of layers whose ranks are being chosen."""
    model._find_allocator()
    allocator = model.rank_allocator
    if allocator is None or not allocator.is_open:
        return {}
    return {
        id(layer): kept
        for (_, layer), kept in zip(
            allocator.layers, allocator._kept(), strict=True
        )
    }


def _low_rank(layer, kept, masked):
    """The adapter of a layer as PEFT has it, without masks."""
    a, *middle, b = (
        np.asarray(sharding.to_numpy(factor), "float32")
        for factor in layer.factors
    )
    kept = np.ones(layer.lora_rank, bool) if kept is None else kept
    more = {}
    is_embedding = isinstance(layer, keras.layers.Embedding)
    if isinstance(layer, AdaLoRAFactors):
        more = {"e": middle[0][kept], "initial_rank": max(1, layer.lora_rank)}
    if isinstance(layer, DoRAFactors):
        more = {"magnitude": middle[0]}
    scaling = masks.delta_scale(
        layer.scaling, layer.dropout_rate, layer.rescale, masked=masked
    )
    module = LowRank(
        a.T[kept], b.T[:, kept], scaling, is_embedding=is_embedding, **more
    )
    # PEFT's AdaLoRA has no embeddings; one plain module makes all plain.
    return module.without_singular_values() if is_embedding else module


def _mean_network(layer, kept):
    return _minus_initial(layer, _low_rank(layer, kept, masked=False))


def _instance(layer, kept, draws, n):
    """The adapter of a layer under one mask instance, as plain LoRA."""
    module = _low_rank(layer, kept, masked=True).without_singular_values()
    mask_a, mask_b = draws.masks_of(layer)
    masked = dataclasses.replace(
        module, a=module.a * mask_a[n], b=module.b * mask_b[n][:, None]
    )
    masked = _minus_initial(layer, masked)
    if module.magnitude is None:
        return masked
    # PEFT divides by the norm of this instance, we by the mean network's.
    pair = masked.a.T, np.float32(masked.scaling) * masked.b.T
    pair = [ops.convert_to_tensor(factor, "float32") for factor in pair]
    norms = factors.column_norms(layer._kernel, layer._axes, *pair)
    magnitude = ops.convert_to_numpy(layer.gain() * norms)
    return dataclasses.replace(masked, magnitude=magnitude)


def _minus_initial(layer, module):
    """Subtract what the layer's factors started at, as further ranks.

    So does PEFT itself (`subtract_mutated_init`).
    """
    if not layer.initial_factors:
        return module
    a, b = map(sharding.to_numpy, layer.initial_factors)
    b = b * (layer.mean_scale / module.scaling)
    return dataclasses.replace(
        module,
        a=np.concatenate([module.a, a.T], axis=0),
        b=np.concatenate([module.b, -b.T], axis=1),
    )
