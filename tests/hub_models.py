"""Tiny KerasHub tasks, built without a preset: text, images and sound."""

import inspect

import keras
import keras_hub
import numpy as np
from hub_configurations import LENGTH
from hub_configurations import TINY
from hub_configurations import TINY_CONVOLUTIONS
from hub_configurations import VOCABULARY

ROWS = 3
models = keras_hub.models
SMALL_HEADS = {"pre_logits_num_filters": 8, "head_hidden_size": 16}


_SEVERAL = "put together of several models: not tried yet"
# Why a task is not among those that are built.
NOT_TRIED = {
    "BASNetImageSegmenter": "never tiny: 92 million weights at the least",
    "BLIP2CausalLM": _SEVERAL,
    "BLIP2Seq2SeqLM": _SEVERAL,
    "DFineObjectDetector": _SEVERAL,
    "FluxTextToImage": _SEVERAL,
    "Gemma3nCausalLM": _SEVERAL,
    "Gemma4AssistantCausalLM": _SEVERAL,
    "PARSeqCausalLM": _SEVERAL,
    "RetinaNetObjectDetector": "its predictions are boxes: not tried yet",
    "SAM3PromptableConceptImageSegmenter": _SEVERAL,
    "SAMImageSegmenter": _SEVERAL,
    "StableDiffusion3ImageToImage": _SEVERAL,
    "StableDiffusion3Inpaint": _SEVERAL,
    "StableDiffusion3TextToImage": _SEVERAL,
}


def every_task():
    """Return `{name: class}` of all tasks of the installed KerasHub.

    Not those without a backbone, from which others inherit, and not names
    that have been replaced.
    """
    return {
        name: cls
        for name, cls in sorted(vars(models).items())
        if inspect.isclass(cls)
        and issubclass(cls, models.Task)
        and getattr(cls, "backbone_cls", None) is not None
        and cls.__name__ == name
    }


def tried_tasks():
    """Return the names of the tasks that are built here."""
    return [name for name in every_task() if name not in NOT_TRIED]


def target_of(name):
    """What `target_layers` is for all kernels of a task's blocks."""
    backbone = every_task()[name].backbone_cls.__name__
    if backbone in TINY_CONVOLUTIONS:
        return "all-convolutions"
    return "all-linear"


def build(name):
    """Build a task with the same weights each time."""
    keras.utils.set_random_seed(0)
    cls = getattr(models, name)

    def accepted(by, options):
        names = inspect.signature(by.__init__).parameters
        return {k: v for k, v in options.items() if k in names}

    # Ordinary dropout would hide that parallel instances are those in sequence.
    no_dropout = {"dropout": 0.0, "dropout_rate": 0.0}
    config = {**TINY, **TINY_CONVOLUTIONS}[cls.backbone_cls.__name__]
    config = config() if callable(config) else config
    backbone = cls.backbone_cls(
        **config, **accepted(cls.backbone_cls, no_dropout)
    )
    options = {**no_dropout, **SMALL_HEADS, "num_classes": 3}
    head = accepted(cls, {**options, "depth_estimation_type": "relative"})
    task = cls(backbone=backbone, preprocessor=None, **head)
    for layer in task._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # MiT has one that cannot be set.
    return task


def inputs_of(model, rows=ROWS):
    """Random tokens, all valid, or images, and whatever else a task takes."""
    generator = np.random.default_rng(0)
    tensors = keras.tree.flatten(model.input)
    hears = any(tensor.name == "encoder_input_values" for tensor in tensors)

    def values(tensor):
        length = LENGTH
        if hears and tensor.name.startswith("encoder"):
            length = 1600  # The first convolution takes 127 samples.
        shape = (rows, *(size or length for size in tensor.shape[1:]))
        if "mask_positions" in tensor.name:
            return np.tile(np.arange(shape[1], dtype="int32"), (rows, 1))
        if "mask" in tensor.name:
            return np.ones(shape, "int32")
        if "segment" in tensor.name:
            return np.zeros(shape, "int32")
        if keras.backend.is_float_dtype(tensor.dtype):
            return generator.normal(size=shape).astype("float32")
        return generator.integers(1, VOCABULARY, shape).astype("int32")

    return keras.tree.map_structure(values, model.input)
