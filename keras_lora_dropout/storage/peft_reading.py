"""Read a PEFT adapter folder: settings, factors and whole weights."""

import collections
import dataclasses
import json
import pathlib

from keras_lora_dropout.storage import peft_config
from keras_lora_dropout.storage.peft import CONFIG
from keras_lora_dropout.storage.peft import PREFIX
from keras_lora_dropout.storage.peft import TENSORS
from keras_lora_dropout.storage.peft import LowRank
from keras_lora_dropout.storage.peft import PeftAdapter
from keras_lora_dropout.storage.tensor_files import read_tensors

_PICKLE = "adapter_model.bin"
_MAGNITUDE = "magnitude_vector"
# How the names of LoRA's and of AdaLoRA's tensors end.
_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": _MAGNITUDE,
}
_ADAPTIVE_FACTORS = {".lora_A": "A", ".lora_E": "E", ".lora_B": "B"}


def read_peft(directory):
    """Read an adapter folder.

    Returns:
        Tuple of a `PeftAdapter` and a list of what is wrong with it, one
        sentence each. Modules that something is wrong with are left out.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    directory = pathlib.Path(directory)
    settings, problems = peft_config.parse(_read_config(directory))
    tensors = read_tensors(_tensors_path(directory))
    if settings is None:
        return PeftAdapter({}, {}), problems
    endings = _ADAPTIVE_FACTORS if settings.is_adaptive else _FACTORS
    factors, saved, embeddings = collections.defaultdict(dict), {}, set()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if value is None:
            problems.append(f'"{key}" holds no floating-point numbers')
            continue
        ending = next((e for e in endings if name.endswith(e)), None)
        if ending is not None:
            module = name.removesuffix(ending)
            factors[module][endings[ending]] = value
            if "embedding" in ending:
                embeddings.add(module)
        elif ".lora_" in name:
            problems.append(f'"{key}" is no factor of a linear layer')
        else:
            saved[name] = value
    modules = {}
    for module, found in factors.items():
        wrong = _wrong_factors(module, found, settings)
        problems.extend(wrong)
        if not wrong:
            modules[module] = dataclasses.replace(
                _low_rank(module, found, settings),
                is_embedding=module in embeddings,
            )
    for module in settings.rank_pattern if settings.is_adaptive else ():
        if module not in factors:
            problems.append(f'`rank_pattern` names "{module}" without factors')
    return PeftAdapter(modules, saved), problems


def _read_config(directory):
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(
            f'"{directory}" holds no PEFT adapter: there is no {CONFIG} in it. '
            "Pass the folder that `save_pretrained` or `export_peft` wrote."
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'"{path}" is not valid JSON: {error}. It may be truncated or '
            "damaged; copy it again from where it was written."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f'"{path}" holds {type(config).__name__}, no object.')
    return config


def _tensors_path(directory):
    path = directory / TENSORS
    if path.is_file():
        return path
    if (directory / _PICKLE).is_file():
        raise ValueError(
            f'"{directory}" holds its weights in {_PICKLE}, a pickle, which '
            "can run any code when it is read and is refused. Convert it where "
            "you trust it: `PeftModel.from_pretrained(base, directory)"
            ".save_pretrained(directory, safe_serialization=True)`."
        )
    raise ValueError(
        f'"{directory}" holds no whole PEFT adapter: there is no {TENSORS} in '
        "it."
    )


def _wrong_factors(module, found, settings):
    """Return what is wrong with the factors of a module."""
    needed = list("ABE" if settings.is_adaptive else "AB")
    if settings.is_dora:
        needed.append(_MAGNITUDE)
    elif _MAGNITUDE in found:
        return [f'"{module}" has magnitudes, but `use_dora` is not true']
    missing = [f"lora_{c}" for c in needed if c not in found]
    if missing:
        return [f'"{module}" lacks {", ".join(missing)}']
    rank = settings.rank_of(module)
    a, b = found["A"].shape, found["B"].shape
    fits = len(a) == len(b) == 2 and a[0] == b[1] == rank
    if settings.is_adaptive:
        fits = fits and found["E"].shape == (rank, 1)
    if settings.is_dora:
        fits = fits and found[_MAGNITUDE].shape == b[:1]
    if fits:
        return []
    shapes = ", ".join(f"lora_{c} {found[c].shape}" for c in needed)
    return [
        f'"{module}" has factors of shapes {shapes}, but the configuration '
        f"says rank {rank}"
    ]


def _low_rank(module, found, settings):
    more = {}
    if settings.is_dora:
        more = {"magnitude": found[_MAGNITUDE]}
    if settings.is_adaptive:
        more = {"e": found["E"][:, 0], "initial_rank": settings.rank}
    return LowRank(
        a=found["A"],
        b=found["B"],
        scaling=settings.scaling_of(module),
        **more,
    )
