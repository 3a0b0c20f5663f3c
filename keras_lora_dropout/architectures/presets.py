"""KerasHub presets of adapted models.

`from_preset` finds classes by the name that a preset gives them, among those
that Keras has registered. So the adapted class of each of KerasHub's tasks and
backbones is registered when the package is imported.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

import keras
import keras_hub

from keras_lora_dropout.storage.atomic import force_to_disk

_BASES = keras_hub.models.Task, keras_hub.models.Backbone


def register(adapted_class):
    """Register the adapted class of every KerasHub task and backbone.

    Args:
        adapted_class: Function of a model class that returns its adapted one.
    """
    objects = keras.saving.get_custom_objects()
    for cls in list(objects.values()):
        if isinstance(cls, type) and is_known(cls):
            objects[_registered_name(cls)] = adapted_class(cls)


def is_known(cls):
    """Whether `from_preset` finds the adapted class of a model class."""
    return issubclass(cls, _BASES) and cls.__module__.startswith("keras_hub.")


def has_presets(cls):
    """Whether a model class has presets at all."""
    return issubclass(cls, _BASES)


@contextlib.contextmanager
def written_preset(preset_dir):
    """Yield a folder that becomes the preset once all its files are written."""
    target = pathlib.Path(preset_dir).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        yield folder
        for path in _files(folder):
            force_to_disk(path)
        if not target.is_dir():
            os.chmod(folder, 0o777 & ~_umask())
            os.replace(folder, target)
            return
        # Other files of the user stay where they are.
        for path in _files(folder):
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def name_adapted_class(folder, cls, config):
    """Let the files of a preset name the adapted class.

    Args:
        folder: Path of a preset that KerasHub wrote.
        cls: The plain class of the saved model.
        config: The configuration that the adapted class is built from.
    """
    is_task = issubclass(cls, keras_hub.models.Task)
    path = pathlib.Path(folder) / ("task.json" if is_task else "config.json")
    adapted = {
        "module": "keras_lora_dropout",
        "class_name": f"LoRADropout{cls.__name__}",
        "config": config,
        "registered_name": _registered_name(cls),
    }
    path.write_text(json.dumps(adapted, indent=4))


def _files(folder):
    return [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()]


def _registered_name(cls):
    return f"keras_lora_dropout>LoRADropout{cls.__name__}"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
