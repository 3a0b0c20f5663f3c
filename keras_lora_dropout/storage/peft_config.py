"""`adapter_config.json`: what PEFT's settings say about each module."""

import dataclasses
import math
import numbers
import re
import sys

# Settings that make the adapter compute something else than `scaling * B A`,
# or change weights that are not in the file. Absent or false: no matter.
_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "a router of adapters",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "a bias of the adapter",
    "fan_in_fan_out": "transposed kernels",
    "layer_replication": "repeated layers",
    "target_parameters": "adapters of single parameters",
    "trainable_token_indices": "trained tokens",
    "megatron_config": "Megatron's layers",
}
# These do not touch the weights of the base model.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftSettings:
    """The part of a LoRA or AdaLoRA configuration that bears on values.

    Attributes:
        is_adaptive: Whether it is AdaLoRA.
        rank: LoRA's `r`, AdaLoRA's `init_r`.
        alpha: `lora_alpha`.
        rank_pattern: LoRA: pattern -> rank. AdaLoRA: module -> booleans.
        alpha_pattern: Pattern -> alpha.
        rank_stabilized: Whether LoRA divides by the square root of the rank.
        is_dora: Whether it is DoRA: each output feature has a magnitude.
    """

    is_adaptive: bool
    rank: int
    alpha: float
    rank_pattern: dict
    alpha_pattern: dict
    rank_stabilized: bool
    is_dora: bool = False

    def rank_of(self, module):
        """Return the rank of a module's factors in the file."""
        if self.is_adaptive:
            kept = self.rank_pattern.get(module)
            return self.rank if kept is None else sum(kept)
        return _matching(self.rank_pattern, module, self.rank)

    def scaling_of(self, module):
        """Return what PEFT multiplies the product of a module's factors by."""
        if self.is_adaptive:
            alpha = self.alpha if self.alpha > 0 else self.rank
            # The initial rank, whatever was pruned since.
            return alpha / (self.rank + ADALORA_EPSILON)
        rank = self.rank_of(module)
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


# PEFT divides by `ranknum + 1e-5`.
ADALORA_EPSILON = 1e-5


def parse(config):
    """Read the settings of a LoRA or AdaLoRA configuration.

    Args:
        config: Dictionary, the content of `adapter_config.json`.

    Returns:
        Tuple of `PeftSettings`, or `None` if they make no sense, and the list
        of what is not supported, one sentence each.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        return None, [f'`peft_type` is {kind!r}; "LORA" and "ADALORA" are read']
    problems = [
        f"`{name}` is {config[name]!r}: {what} cannot be read"
        for name, what in _UNSUPPORTED.items()
        if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        problems.append(
            f"`bias` is {config['bias']!r}: trained biases cannot be read, "
            'only bias="none"'
        )
    start = config.get("init_lora_weights", True)
    if start not in _INITIALIZATIONS or isinstance(start, (dict, list)):
        problems.append(
            f"`init_lora_weights` is {start!r}, which changes the base model; "
            "convert the adapter to plain LoRA with PEFT's "
            "`path_initial_model_for_weight_conversion`"
        )
    is_adaptive = kind == "ADALORA"
    if is_adaptive and config.get("use_dora"):
        problems.append("`use_dora` is True: AdaLoRA with DoRA cannot be read")
    name, default = ("init_r", 12) if is_adaptive else ("r", 8)
    settings = PeftSettings(
        is_adaptive=is_adaptive,
        rank=config.get(name, default),
        alpha=config.get("lora_alpha", 8),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern={} if is_adaptive else config.get("alpha_pattern") or {},
        rank_stabilized=bool(config.get("use_rslora")) and not is_adaptive,
        is_dora=bool(config.get("use_dora")) and not is_adaptive,
    )
    wrong = [*_wrong_values(settings, name)]
    if wrong:
        return None, problems + wrong
    if is_adaptive:
        by_module = {
            _module_of(key): kept for key, kept in settings.rank_pattern.items()
        }
        settings = dataclasses.replace(settings, rank_pattern=by_module)
    return settings, problems


def _wrong_values(settings, rank_name):
    """Yield what makes no sense in the settings."""
    if not _is_rank(settings.rank):
        yield f"`{rank_name}` is {settings.rank!r}, not a positive integer"
    if not _is_number(settings.alpha):
        yield f"`lora_alpha` is {settings.alpha!r}, not a number"
    elif settings.alpha <= 0 and not settings.is_adaptive:
        yield f"`lora_alpha` is {settings.alpha}; only positive ones are read"
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(settings, name)
        if not isinstance(pattern, dict):
            yield f"`{name}` is {pattern!r}, not a dictionary"
            continue
        for key, value in pattern.items():
            if not _fits(settings, name, key, value):
                yield f"`{name}` has the entry {key!r}: {value!r}"


def _fits(settings, name, key, value):
    if settings.is_adaptive:
        return isinstance(value, list) and all(v in (0, 1) for v in value)
    try:
        re.compile(_ending(key))
    except re.error:
        return False
    if name == "rank_pattern":
        return _is_rank(value)
    return _is_number(value) and value > 0


def _is_rank(value):
    is_integer = isinstance(value, numbers.Integral)
    return is_integer and not isinstance(value, bool) and value > 0


def _is_number(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return abs(value) <= sys.float_info.max


def _matching(pattern, module, default):
    """Look a module up as PEFT does: the first key that fits its end."""
    for key, value in pattern.items():
        if re.match(_ending(key), module):
            return value
    return default


def _ending(key):
    """The regular expression that PEFT makes of a pattern's key."""
    return rf"(.*\.)?({key})$"


def _module_of(key):
    """The module of an AdaLoRA pattern's key, which names its `lora_E`."""
    module, _, _ = key.rpartition(".lora_E")
    return (module or key).removeprefix("base_model.model.")
