"""Which Hugging Face architecture a KerasHub model is."""

import dataclasses
import re

from keras_lora_dropout.architectures.blocks import backbone_of
from keras_lora_dropout.architectures.huggingface import decoders
from keras_lora_dropout.architectures.huggingface import encoders


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The names of one architecture's parts.

    Attributes:
        name: What people call it.
        prefix: Name of the base model inside a Hugging Face task model.
        table: KerasHub layer path -> module name, of the backbone; `{i}`
            stands for the number of a block.
        head: The same for a text classifier's head.
        head_modules: Modules of the head that PEFT stores as a whole.
        unused_positions: Rows before the first one of the position embedding
            that Hugging Face has and KerasHub has not.
        zero_rows: Embeddings of one row that Hugging Face adds to all tokens
            and KerasHub has not.
    """

    name: str
    prefix: str
    table: dict
    head: dict = dataclasses.field(default_factory=dict)
    head_modules: tuple = ()
    unused_positions: int = 0
    zero_rows: tuple = ()

    def module_name(self, path, tables):
        """Return the module of a layer path in some tables, or `None`."""
        number = re.search(r"_(\d+)/", path)
        if number is not None:
            path = f"{path[: number.start()]}_{{i}}/{path[number.end() :]}"
        for table in tables:
            if path in table:
                block = number[1] if number is not None else ""
                return table[path].replace("{i}", block)
        return None


# By the name of KerasHub's backbone class.
ARCHITECTURES = {
    "BertBackbone": Architecture(
        "BERT",
        "bert",
        encoders.BERT,
        head=encoders.BERT_HEAD,
        head_modules=("classifier",),
    ),
    "RobertaBackbone": Architecture(
        "RoBERTa",
        "roberta",
        encoders.ROBERTA,
        head=encoders.ROBERTA_HEAD,
        head_modules=("classifier",),
        # Positions count from the index of the padding token, 1, onwards.
        unused_positions=2,
        zero_rows=("embeddings.token_type_embeddings.weight",),
    ),
    "DebertaV3Backbone": Architecture(
        "DeBERTaV3",
        "deberta",
        encoders.DEBERTA_V3,
        head=encoders.DEBERTA_V3_HEAD,
        head_modules=("pooler.dense", "classifier"),
    ),
    "LlamaBackbone": Architecture("Llama", "model", decoders.LLAMA),
    "MistralBackbone": Architecture("Mistral", "model", decoders.MISTRAL),
    "GemmaBackbone": Architecture("Gemma", "model", decoders.GEMMA),
    "QwenBackbone": Architecture("Qwen2", "model", decoders.QWEN2),
}


def architecture_of(model):
    """Return the `Architecture` of a KerasHub task or backbone.

    Raises:
        ValueError: If the model is none of the table's architectures.
    """
    backbone = backbone_of(model)
    for base in type(backbone).__mro__:
        if base.__module__.startswith("keras_hub."):
            if base.__name__ in ARCHITECTURES:
                return ARCHITECTURES[base.__name__]
    known = ", ".join(entry.name for entry in ARCHITECTURES.values())
    what = "no KerasHub backbone"
    if backbone is not None:
        what = f"a backbone of type {type(backbone).__name__}"
    raise ValueError(
        f'Model "{model.name}" has {what}, so the names of its layers at '
        "Hugging Face, which PEFT adapters go by, are not known. They are "
        f"known for KerasHub's models of these architectures: {known}."
    )
