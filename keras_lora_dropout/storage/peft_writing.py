"""Write a PEFT adapter folder, over nothing but an earlier one of ours."""

import collections
import json
import pathlib
import re

import numpy as np
from safetensors.numpy import save

from keras_lora_dropout.storage.atomic import write_atomically
from keras_lora_dropout.storage.peft import CONFIG
from keras_lora_dropout.storage.peft import PREFIX
from keras_lora_dropout.storage.peft import TENSORS
from keras_lora_dropout.storage.peft_config import ADALORA_EPSILON
from keras_lora_dropout.storage.tensor_files import metadata_of

_WRITER = "keras_lora_dropout"
_TEMPORARY = re.compile(r"\.adapter_.*\.tmp")  # Left by a killed process.


def write_peft(directory, adapter):
    """Write an adapter folder: each file in full or not at all.

    Args:
        directory: Folder; it is made if it is not there.
        adapter: `PeftAdapter`.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, tensors = (_adalora if adapter.is_adaptive else _lora)(adapter)
    tensors |= adapter.saved
    data = save(
        {
            f"{PREFIX}{name}": np.ascontiguousarray(value, "float32")
            for name, value in tensors.items()
        },
        metadata={"format": "pt", "written_by": _WRITER},
    )
    config = {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        **adapter.settings,
        **config,
    }
    # A kill between the two files leaves no configuration rather than one of
    # other tensors.
    (directory / CONFIG).unlink(missing_ok=True)
    write_atomically(directory / TENSORS, data)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / CONFIG, text.encode("utf-8"))


def _lora(adapter):
    """Configuration and tensors of LoRA; what most modules have is default."""
    plain = {
        name: module.without_singular_values()
        for name, module in adapter.modules.items()
        if module.rank
    }
    ranks = {name: module.rank for name, module in plain.items()}
    alphas = {name: _number(m.scaling * m.rank) for name, m in plain.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    tensors = {}
    for name, module in plain.items():
        a, b = "lora_A.weight", "lora_B.weight"
        if module.is_embedding:
            a, b = "lora_embedding_A", "lora_embedding_B"
        tensors[f"{name}.{a}"], tensors[f"{name}.{b}"] = module.a, module.b
        if module.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude
    return {
        "peft_type": "LORA",
        "target_modules": list(plain),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "use_dora": any(m.magnitude is not None for m in plain.values()),
    }, tensors


def _adalora(adapter):
    """Configuration and tensors of AdaLoRA.

    PEFT has one `lora_alpha` for all modules and divides it by the initial
    rank plus 1e-5; what that leaves of a module's scaling goes into `lora_E`.
    """
    modules = adapter.modules
    initial = max(module.initial_rank for module in modules.values())
    scaling = _most_common({n: m.scaling for n, m in modules.items()})
    alpha = _number(scaling * initial)
    unit = alpha / (initial + ADALORA_EPSILON)
    tensors, pattern = {}, {}
    for name, module in modules.items():
        e = module.e.astype("float64") * (module.scaling / unit)
        tensors[f"{name}.lora_A"] = module.a
        tensors[f"{name}.lora_B"] = module.b
        tensors[f"{name}.lora_E"] = e[:, None]
        pattern[f"{name}.lora_E"] = [i < module.rank for i in range(initial)]
    return {
        "peft_type": "ADALORA",
        "target_modules": list(modules),
        "init_r": initial,
        "target_r": max(1, round(np.mean([m.rank for m in modules.values()]))),
        "lora_alpha": alpha,
        "rank_pattern": pattern,
        "total_step": 1,  # PEFT insists on one; nothing is allocated here.
    }, tensors


def _most_common(values):
    return collections.Counter(values.values()).most_common(1)[0][0]


def _number(value):
    """The value, as an integer where it is one: some runtimes insist."""
    value = float(value)
    return int(value) if value.is_integer() else value


def earlier_exports(directory, folder_prefix):
    """Return what an export to a folder replaces.

    Args:
        directory: Folder, which need not be there.
        folder_prefix: How the names of the adapter folders inside it start.

    Returns:
        List of the adapter folders inside it, all of them written here.

    Raises:
        ValueError: If it holds anything that was not written here.
    """
    directory = pathlib.Path(directory)
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise ValueError(f'"{directory}" is a file. Pass a folder instead.')
    inside = [
        path
        for path in directory.iterdir()
        if path.is_dir() and path.name.startswith(folder_prefix)
    ]
    foreign = _foreign(directory, {path.name for path in inside})
    for path in inside:
        foreign += _foreign(path)
    if foreign:
        raise ValueError(
            f'"{directory}" holds files that no export wrote: '
            f"{sorted(map(str, foreign))}. They are left alone and nothing is "
            "written; pass a new or an empty folder."
        )
    return inside


def _foreign(directory, known=()):
    """Return the paths in a folder that `write_peft` did not write."""
    paths = [
        path
        for path in directory.iterdir()
        if path.name not in known and not _TEMPORARY.fullmatch(path.name)
    ]
    ours = {CONFIG, TENSORS}
    tensors = directory / TENSORS
    if tensors.exists():
        if metadata_of(tensors).get("written_by") != _WRITER:
            ours = set()
    elif (directory / CONFIG).exists():
        ours = set()
    return [path for path in paths if path.name not in ours]


def remove_peft(directory):
    """Remove a folder that `write_peft` wrote."""
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
