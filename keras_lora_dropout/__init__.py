"""LoRA Dropout for Keras 3: fine-tune, and predict with ensembles."""

from keras_lora_dropout.callbacks import EnsembleEvaluation
from keras_lora_dropout.callbacks import TerminateOnNonFinite
from keras_lora_dropout.conversion.enable import enable_lora_dropout
from keras_lora_dropout.conversion.enable_transformer_dropout import (
    enable_transformer_dropout,
)
from keras_lora_dropout.conversion.enable_transformer_dropout import hidden_key
from keras_lora_dropout.conversion.import_peft import import_peft
from keras_lora_dropout.conversion.lora_dropout_model import LoRADropoutModel
from keras_lora_dropout.conversion.unmerging import unmerge_adapters
from keras_lora_dropout.core.rank_budget import RankBudget
from keras_lora_dropout.layers.adalora_dropout import AdaLoRADropoutDense
from keras_lora_dropout.layers.adalora_dropout import AdaLoRADropoutEinsumDense
from keras_lora_dropout.layers.convolution import LoRADropoutConv1D
from keras_lora_dropout.layers.convolution import LoRADropoutConv2D
from keras_lora_dropout.layers.convolution import LoRADropoutConv3D
from keras_lora_dropout.layers.convolution import LoRADropoutDepthwiseConv1D
from keras_lora_dropout.layers.convolution import LoRADropoutDepthwiseConv2D
from keras_lora_dropout.layers.embedding import LoRADropoutEmbedding
from keras_lora_dropout.layers.embedding import LoRADropoutReversibleEmbedding
from keras_lora_dropout.layers.lora_dropout import LoRADropoutDense
from keras_lora_dropout.layers.lora_dropout import LoRADropoutEinsumDense
from keras_lora_dropout.layers.transformer_dropout import DropAttention
from keras_lora_dropout.layers.transformer_dropout import DropKey
from keras_lora_dropout.layers.transformer_dropout import HiddenCut
from keras_lora_dropout.lora_plus import lora_plus
from keras_lora_dropout.metrics import BrierScore
from keras_lora_dropout.metrics import ExpectedCalibrationError
from keras_lora_dropout.question_answering.extractive_qa import ExtractiveQA
from keras_lora_dropout.training.consistency import Consistency

__version__ = "0.1.0"

__all__ = [
    "AdaLoRADropoutDense",
    "AdaLoRADropoutEinsumDense",
    "BrierScore",
    "Consistency",
    "DropAttention",
    "DropKey",
    "EnsembleEvaluation",
    "ExpectedCalibrationError",
    "ExtractiveQA",
    "HiddenCut",
    "LoRADropoutConv1D",
    "LoRADropoutConv2D",
    "LoRADropoutConv3D",
    "LoRADropoutDense",
    "LoRADropoutDepthwiseConv1D",
    "LoRADropoutDepthwiseConv2D",
    "LoRADropoutEinsumDense",
    "LoRADropoutEmbedding",
    "LoRADropoutModel",
    "LoRADropoutReversibleEmbedding",
    "RankBudget",
    "TerminateOnNonFinite",
    "enable_lora_dropout",
    "enable_transformer_dropout",
    "hidden_key",
    "import_peft",
    "lora_plus",
    "unmerge_adapters",
]
