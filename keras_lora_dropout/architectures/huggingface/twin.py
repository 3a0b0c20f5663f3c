"""The Hugging Face twin of a KerasHub model: names and values of its parts."""

import numpy as np

from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.architectures.huggingface import weights
from keras_lora_dropout.architectures.huggingface.architecture import (
    architecture_of,
)
from keras_lora_dropout.core.keras_internals import descendants
from keras_lora_dropout.core.keras_internals import sublayers

_TASK_TYPES = {"TextClassifier": "SEQ_CLS", "CausalLM": "CAUSAL_LM"}
_OUTPUT_WEIGHT = "lm_head.weight"


class HuggingFaceTwin:
    """What the parts of a KerasHub model are called at Hugging Face.

    Args:
        model: A KerasHub task or backbone, plain or adapted.

    Attributes:
        architecture: The `Architecture`.
        task_type: PEFT's name of the task; `None` for a backbone, and for a
            task whose head has no names here.
        modules: Dictionary of layer path -> module name.

    Raises:
        ValueError: If the architecture is not known.
    """

    def __init__(self, model):
        self.model = model
        self.architecture = architecture_of(model)
        self.is_task = backbone_of(model) is not model
        bases = (base.__name__ for base in type(model).__mro__)
        self.task_type = next(filter(None, map(_TASK_TYPES.get, bases)), None)
        self._layers = {
            (layer.path or layer.name).removeprefix(f"{model.name}/"): layer
            for layer in descendants(model)
        }
        self.modules = {
            path: module
            for path in self._layers
            if (module := self._module(path)) is not None
        }

    def _module(self, path):
        architecture = self.architecture
        inside = architecture.module_name(path, [architecture.table])
        if inside is not None:
            prefix = f"{architecture.prefix}." if self.is_task else ""
            return prefix + inside
        if self.task_type != "SEQ_CLS":
            return None
        return architecture.module_name(path, [architecture.head])

    def canonical(self, name):
        """Return a module or weight name as this twin has it.

        An adapter of the base model alone names its modules without the prefix
        that they have in a task model, and the other way round.
        """
        prefix = f"{self.architecture.prefix}."
        if not self.is_task:
            return name.removeprefix(prefix)
        tops = {m.partition(".")[0] for m in self.architecture.table.values()}
        return prefix + name if name.partition(".")[0] in tops else name

    def variables(self):
        """Return `{weight name: (layer, variable)}` of all that has a name."""
        found = {}
        for path, module in self.modules.items():
            layer = self._layers[path]
            for variable in own_variables(layer):
                name = weights.weight_name(module, variable)
                if variable.name == "reverse_embeddings":
                    name = _OUTPUT_WEIGHT
                if name is not None:
                    found[name] = layer, variable
        return found

    def nameless(self):
        """Return paths of the model's weights that have no name there."""
        named = {id(variable) for _, variable in self.variables().values()}
        return [
            f"{path}/{variable.name}"
            for path, _, variable in self._own_variables()
            if id(variable) not in named
        ]

    def saved_variables(self):
        """Return the weights that PEFT stores as they are.

        These are the head's, and all others that train besides the adapters.

        Returns:
            Dictionary of weight name -> `(layer, variable)`.

        Raises:
            ValueError: If such a weight has no name at Hugging Face.
        """
        inside = {id(layer) for layer in descendants(backbone_of(self.model))}
        wanted = {
            id(variable): f"{path}/{variable.name}"
            for path, layer, variable in self._own_variables()
            if variable.trainable or id(layer) not in inside
        }
        saved = {
            name: (layer, variable)
            for name, (layer, variable) in self.variables().items()
            if wanted.pop(id(variable), None) is not None
        }
        if wanted:
            raise ValueError(
                f'Model "{self.model.name}" has weights outside its adapters '
                "that belong into the export, but have no name at Hugging "
                f"Face: {list(wanted.values())}. Known are backbones, text "
                "classifiers (BERT, RoBERTa, DeBERTaV3) and causal language "
                "models. Export from such a model, or freeze these weights."
            )
        return saved

    def _own_variables(self):
        """Yield `(path, layer, variable)` of all weights but adapters'."""
        for path, layer in self._layers.items():
            for variable in own_variables(layer):
                if not variable.name.startswith("lora_"):
                    yield path, layer, variable

    def is_tied(self, layer):
        """Whether a layer embeds words and makes logits by the same table.

        PEFT adapts the embeddings alone, not the logits.
        """
        makes_logits = self.is_task and self.task_type != "SEQ_CLS"
        return makes_logits and getattr(layer, "tie_weights", False)

    def module_to_save(self, weight):
        """Return the module as which PEFT stores a weight."""
        for module in self.architecture.head_modules:
            if self.task_type == "SEQ_CLS" and weight.startswith(f"{module}."):
                return module
        return weight.rpartition(".")[0]

    def value_of(self, name, layer, variable):
        """Return the value of a weight as Hugging Face stores it."""
        value = weights.to_huggingface(layer, variable)
        if name.endswith("position_embeddings.weight"):
            value = weights.with_unused_rows(
                value, self.architecture.unused_positions
            )
        return value

    def keras_value(self, name, layer, variable, value):
        """Return the value of a weight as the layer's variable stores it.

        Raises:
            ValueError: If its shape does not fit.
        """
        if name.endswith("position_embeddings.weight"):
            value = value[self.architecture.unused_positions :]
        return weights.from_huggingface(layer, variable, value)


def own_variables(layer):
    """Return the weights of a layer that belong to no layer inside it."""
    inside = {id(v) for part in sublayers(layer) for v in part.weights}
    return [v for v in layer.weights if id(v) not in inside]


def huggingface_weights(model):
    """Return the weights of a KerasHub model as its Hugging Face twin has them.

    Adapters are not part of it: an adapted layer gives its frozen kernel.

    Args:
        model: A KerasHub task or backbone of a known architecture.

    Returns:
        Dictionary of weight name -> NumPy array, float32.

    Raises:
        ValueError: If the architecture, or a part of the model, is not known.
    """
    twin = HuggingFaceTwin(model)
    nameless = twin.nameless()
    if nameless:
        raise ValueError(
            f'Model "{model.name}" has weights without a known name at Hugging '
            f"Face: {nameless}."
        )
    found = {
        name: twin.value_of(name, layer, variable)
        for name, (layer, variable) in twin.variables().items()
    }
    width = backbone_of(model).hidden_dim
    for name in twin.architecture.zero_rows:
        found[twin.canonical(name)] = np.zeros((1, width), "float32")
    return found
