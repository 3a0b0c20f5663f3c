"""Check a PEFT adapter against a model, all of it, then take it over."""

import keras
import numpy as np

from keras_lora_dropout.architectures.huggingface.twin import HuggingFaceTwin
from keras_lora_dropout.architectures.huggingface.weights import matrix_axes
from keras_lora_dropout.conversion.targets import layer_paths
from keras_lora_dropout.layers.adalora_dropout import AdaLoRAFactors
from keras_lora_dropout.storage.peft_reading import read_peft


class ImportPlan:
    """What a PEFT adapter changes in a model, and what speaks against it.

    Args:
        model: A KerasHub model, plain or adapted.
        directory: Folder of the adapter.

    Attributes:
        modules: Dictionary of layer path -> `LowRank`, of layers that fit.

    Raises:
        ValueError: If the architecture is not known or a file is damaged.
    """

    def __init__(self, model, directory):
        self.model = model
        self.directory = directory
        twin = HuggingFaceTwin(model)
        self._names = twin.modules
        self._layers = layer_paths(model)
        self._adapter, self._problems = read_peft(directory)
        self.modules = {}
        self._find_modules(twin)
        self._saved = self._find_saved(twin)

    def _find_modules(self, twin):
        """Find the layer of each module of the adapter, and check its shape."""
        paths = {
            module: path
            for path, module in twin.modules.items()
            if matrix_axes(self._layers.get(path)) is not None
        }
        for name, module in self._adapter.modules.items():
            path = paths.get(twin.canonical(name))
            if path is None:
                self._problems.append(
                    f'"{name}" is no linear layer of the model'
                )
                continue
            layer = self._layers[path]
            is_embedding = isinstance(layer, keras.layers.Embedding)
            if is_embedding != module.is_embedding:
                kind = "an embedding" if is_embedding else "a linear layer"
                self._problems.append(
                    f'"{name}" has no factors of {kind}, as layer "{path}" is'
                )
                continue
            if module.magnitude is not None and is_embedding:
                self._problems.append(f'"{name}" is an embedding with DoRA')
                continue
            if twin.is_tied(layer):
                self._problems.append(
                    f'"{name}" adapts the embeddings alone, but layer "{path}" '
                    "makes the logits, too"
                )
                continue
            axes = matrix_axes(layer)
            found = module.b.shape[0], module.a.shape[1]
            if found != (axes.output_dim, axes.input_dim):
                self._problems.append(
                    f'"{name}" maps {found[1]} features to {found[0]}, layer '
                    f'"{path}" {axes.input_dim} to {axes.output_dim}'
                )
            elif module.rank > min(found):
                self._problems.append(
                    f'"{name}" has rank {module.rank}, layer "{path}" holds '
                    f"{min(found)} at most"
                )
            else:
                self.modules[path] = module

    def _find_saved(self, twin):
        """Return `(variable, value)` of the weights stored as a whole."""
        variables, found = twin.variables(), []
        for name, value in self._adapter.saved.items():
            where = variables.get(twin.canonical(name))
            if where is None:
                self._problems.append(
                    f'the weight "{name}" has no counterpart in the model'
                )
                continue
            layer, variable = where
            try:
                value = twin.keras_value(name, layer, variable, value)
            except ValueError as error:
                self._problems.append(f'the weight "{name}" {error}')
                continue
            found.append((variable, value))
        return found

    def compare_adapted(self):
        """Compare the adapter's layers with those that are adapted."""
        adapted = dict(self.model.adapted_layers)
        missing = [
            path
            for path, layer in adapted.items()
            if path not in self.modules and layer.lora_rank
        ]
        surplus = [path for path in self.modules if path not in adapted]
        # Of a layer whose factors do not fit, that alone is said.
        missing = [p for p in missing if not self._is_mentioned(p)]
        if missing:
            self._problems.append(
                f"the model adapts {missing}, which the adapter lacks"
            )
        if surplus:
            self._problems.append(
                f"the adapter has {surplus}, which the model does not adapt"
            )
        if missing or surplus:
            self._problems.append(
                "to adapt the adapter's layers alone, pass a plain model to "
                "`keras_lora_dropout.import_peft(model, directory)`, or "
                "`target_layers=[...]` to `enable_lora_dropout`"
            )
        unlike = [
            path
            for path, module in self.modules.items()
            if path in adapted
            and (adapted[path].kind == "DoRA") != (module.magnitude is not None)
        ]
        if unlike:
            self._problems.append(
                f"of {unlike}, either the adapter or the model has magnitudes "
                "(DoRA), the other has none; pass a plain model to "
                "`keras_lora_dropout.import_peft(model, directory)`"
            )
        self._compare_ranks(adapted)

    def _is_mentioned(self, path):
        name = self._names.get(path)
        return name is not None and any(
            f'"{name}"' in problem for problem in self._problems
        )

    def _compare_ranks(self, adapted):
        """Let no import meddle with ranks that are still being chosen."""
        allocator = getattr(self.model, "rank_allocator", None)
        if allocator is None or not allocator.is_open:
            return
        pattern = allocator.pattern()
        changed = {
            path: module.rank
            for path, module in self.modules.items()
            if path in adapted
            and not module.rank == adapted[path].lora_rank == pattern[path]
        }
        if changed:
            self._problems.append(
                "the model's rank schedule is running, and the adapter has "
                f"other ranks: {changed} instead of {pattern}. Call "
                "`compact_ranks` first, which ends the schedule, or use a "
                "model without `rank_budget`"
            )

    @property
    def is_dora(self):
        """Whether the adapter has magnitudes."""
        return any(m.magnitude is not None for m in self.modules.values())

    def check(self):
        """Raise `ValueError` that names all that speaks against the import."""
        if not self._problems and not self.modules:
            self._problems.append("it has no factors of any layer")
        if self._problems:
            listing = "\n".join(f"- {problem}." for problem in self._problems)
            raise ValueError(
                f'The PEFT adapter in "{self.directory}" does not fit model '
                f'"{self.model.name}", which is unchanged:\n{listing}'
            )

    def apply(self):
        """Take the adapter over into an adapted model, or raise."""
        self.check()
        for path, layer in self.model.adapted_layers:
            if path in self.modules:
                _replace(layer, self.modules[path])
        for variable, value in self._saved:
            variable.assign(value)
        allocator = self.model.rank_allocator
        if allocator is not None:
            allocator.ranks = [layer.lora_rank for _, layer in allocator.layers]
        self.model._mask_plan = None
        self.model._forget_compiled_state()


def _replace(layer, module):
    """Give a layer a module's factors; its mean network is what PEFT has."""
    if module.magnitude is not None:
        values = module.a.T, module.magnitude, module.b.T
    elif isinstance(layer, AdaLoRAFactors):
        e = np.ones(module.rank, "float32") if module.e is None else module.e
        values = module.a.T, e, module.b.T
    else:
        module = module.without_singular_values()
        values = module.a.T, module.b.T
    keep = 1.0 if layer.rescale else (1.0 - layer.dropout_rate) ** 2
    layer.replace_factors(values, module.scaling * max(module.rank, 1) / keep)
