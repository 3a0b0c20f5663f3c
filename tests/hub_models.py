"""Tiny KerasHub tasks, built without a preset: text, images and sound."""

import inspect

import keras
import keras_hub
import numpy as np
from hub_composites import COMPOSITES
from hub_composites import inputs_of_composite
from hub_composites import options_of
from hub_configurations import LENGTH
from hub_configurations import TINY
from hub_configurations import TINY_CONVOLUTIONS
from hub_configurations import VOCABULARY
from keras import ops

ROWS = 3
models = keras_hub.models
SMALL_HEADS = {"pre_logits_num_filters": 8, "head_hidden_size": 16}


# Why a task is not among those that are built.
NOT_TRIED = {
    "Gemma4AssistantCausalLM": "drafts tokens for another model, whose states "
    "it takes, and refuses to be called by itself",
}
# Weights that start as zeros, which hide gradients and masks.
HIDING_ZEROS = ("kernel", "query_tokens", "correct_output_scale")
# Their `fit` refuses any call, so that users train by `train_on_batch`.
REFUSE_FIT = ("Flux", "SAM", "StableDiffusion3")


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
    if backbone in (*TINY_CONVOLUTIONS, "BASNetBackbone", "RetinaNetBackbone"):
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
    configs = {**TINY, **TINY_CONVOLUTIONS}
    config = COMPOSITES.get(name) or configs[cls.backbone_cls.__name__]
    config = config() if callable(config) else config
    backbone = cls.backbone_cls(
        **config, **accepted(cls.backbone_cls, no_dropout)
    )
    options = {**no_dropout, **SMALL_HEADS, "num_classes": 3}
    options |= {"preprocessor": None, "depth_estimation_type": "relative"}
    head = accepted(cls, {**options, **options_of(name)})
    task = cls(backbone=backbone, **head)
    task.preprocessor = None  # One task cannot be made without.
    for weight in task.weights:
        may_hide = weight.name in HIDING_ZEROS
        if may_hide and not ops.convert_to_numpy(weight).any():
            weight.assign(0.1 * keras.random.normal(weight.shape, seed=0))
        if weight.path.endswith("box_head/logits_layer/bias"):
            weight.assign(ops.zeros(weight.shape))  # Else no box has a size.
    for layer in task._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # MiT has one that cannot be set.
    return task


def decoding_of(model):
    """What `predict` makes of a task's outputs and inputs, or `None`."""
    if isinstance(model, models.ObjectDetector):
        return model.decode_predictions
    if isinstance(model, models.SAM3PromptableConceptImageSegmenter):
        return lambda outputs, _: model.post_process_prediction(outputs)
    return None


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

    x = keras.tree.map_structure(values, model.input)
    inputs_of_composite(model, x, generator)
    return x


def labels_of(model, outputs):
    """Random labels that the loss of a task takes, and weights or `None`."""
    generator = np.random.default_rng(1)
    rows = len(keras.tree.flatten(outputs)[0])
    if isinstance(model, models.ObjectDetector):
        # D-FINE: centers and sizes. RetinaNet: corners in pixels, and boxes as
        # large as its anchors.
        boxes = generator.uniform(0.4, 0.6, (rows, 2, 4))
        if isinstance(model, models.RetinaNetObjectDetector):
            boxes = 32 * (boxes / 6 + [0, 0, 0.9, 0.9])
        labels = generator.integers(0, 3, (rows, 2)).astype("int32")
        return {"boxes": boxes.astype("float32"), "labels": labels}, None
    if isinstance(model, models.PARSeqCausalLM):
        shape = outputs.shape[:2]
        labels = generator.integers(1, VOCABULARY - 2, shape).astype("int32")
        return labels, np.ones(labels.shape, "float32")
    return keras.tree.map_structure(
        lambda out: generator.normal(size=out.shape).astype("float32"), outputs
    ), None
