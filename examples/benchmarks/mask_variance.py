"""How much do gradients and ensembles vary with the masks that are drawn?

MiniLM-L6 with adapters that were trained for two epochs on the demo's text
(fresh ones have no effect, whatever their masks), and one fixed batch. The
model's own dropout is off, so that nothing but the masks changes from one
repeat to the next. Measured are the total variance of the adapters' gradient,
as the training step itself computes it, and the variance of the logits of
`ensemble_predict`. Cells that a file holds already are not run again.

    KERAS_BACKEND=jax python examples/benchmarks/mask_variance.py
"""

import argparse
import importlib
import itertools
import json
import logging
import os
import pathlib
import platform
import sys
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.append(str(pathlib.Path(__file__).parents[1]))

import demo
import docstrings
import keras
import keras_hub
import mask_variance_report as report
import numpy as np
from gradient_sums import GradientSums
from minilm import minilm_folder

import keras_lora_dropout as kld
from keras_lora_dropout.storage.atomic import write_atomically

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CLASSES = len(docstrings.PACKAGES)
BLOCKS = 8  # Their spread gives the standard errors.
TINY = {
    "vocabulary_size": 50,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 8,
}


def main():
    options = parse_arguments()
    # KerasHub reads the examples in the order given; its reader's threads.
    warnings.filterwarnings("ignore", "`shuffle=True` was passed")
    logging.getLogger("absl").setLevel(logging.ERROR)
    path = pathlib.Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = start(path, options)
    fill(content, path, options)
    print(f"\n{report.table(content)}")
    report.plot(content).savefig(path.with_suffix(".png"), dpi=120)
    print(f"Written: {path}, {path.with_suffix('.png')}")


def fill(content, path, options):
    """Measure the cells that are missing, and write the file after each."""
    cells = {"/".join(map(str, cell)): cell for cell in all_cells(options)}
    if content["cells"].keys() == cells.keys():
        return
    x, y = data(options)
    batch = {name: values[: options.batch] for name, values in x.items()}
    with tempfile.TemporaryDirectory() as adapter:
        train(options, x, y).save_adapters(adapter)
        for index, (name, cell) in enumerate(cells.items()):
            if name in content["cells"]:
                continue
            print(f"{index + 1} of {len(cells)}: {name}", flush=True)
            started = time.perf_counter()
            model = build(options, *cell[1:], seed=options.seed + index)
            model.load_adapters(adapter)
            found = measure(cell, model, batch, y[: options.batch], options)
            found["seconds"] = time.perf_counter() - started
            found = {**content["cells"], name: found}
            content["cells"] = {n: found[n] for n in cells if n in found}
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(path, text.encode())


def all_cells(options):
    """`(quantity, mask_sampling, mask_sharing, num_samples)` of each cell.

    The cheap ones come first. With N = 1 there is nothing to balance, and
    ensembles know one sharing.
    """
    quantities = [("gradient", "batch"), ("ensemble", "batch")]
    if not options.smoke:
        quantities.insert(1, ("gradient", "example"))
    return [
        (quantity, sampling, sharing, count)
        for count, (quantity, sharing), sampling in itertools.product(
            options.counts, quantities, report.SAMPLINGS
        )
        if count > 1 or sampling == "bernoulli"
    ]


def start(path, options):
    """Return the content of the file, or that of a new one."""
    backend = importlib.import_module(keras.config.backend())
    modules = (backend, keras, keras_hub, kld, np)
    head = {
        "question": __doc__.splitlines()[0],
        "settings": {**vars(options), "lora": demo.LORA},
        "versions": {
            "python": platform.python_version(),  # Whose text it is.
            **{m.__name__: m.__version__ for m in modules},
        },
    }
    del head["settings"]["output"]
    if not path.exists():
        return {**head, "cells": {}}
    content = json.loads(path.read_text())
    if any(content[name] != head[name] for name in head):
        raise SystemExit(
            f"{path} holds cells of other settings or versions: "
            f"{content['settings']}, {content['versions']}. Received: "
            f"{head['settings']}, {head['versions']}. Pass another --output, "
            "or delete the file to start anew."
        )
    return content


def data(options):
    """Token ids and labels of the demo's training text, in a fixed order."""
    if options.smoke:
        generator = np.random.default_rng(options.seed)
        ids = generator.integers(0, TINY["vocabulary_size"], (16, 8))
        x = {
            "token_ids": ids,
            "segment_ids": np.zeros_like(ids),
            "padding_mask": np.ones_like(ids, bool),
        }
        return x, generator.integers(0, CLASSES, 16)
    sizes = {"train": 20, "validation": 20, "held-out": 60}
    texts, labels = docstrings.load(sizes)["train"]
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor.from_preset(
        minilm_folder(), sequence_length=24
    )
    x = preprocessor(np.array(texts))
    x = {name: keras.ops.convert_to_numpy(part) for name, part in x.items()}
    return x, np.array(labels)


def build(options, mask_sampling, mask_sharing, num_samples, seed):
    """The demo's model without dropout of its own, adapted."""
    keras.utils.set_random_seed(options.seed)  # The same head for every cell.
    if options.smoke:
        backbone = keras_hub.models.BertBackbone(**TINY, dropout=0.0)
    else:
        backbone = keras_hub.models.BertBackbone.from_preset(
            minilm_folder(), dropout=0.0
        )
    model = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=CLASSES, dropout=0.0
    )
    return kld.enable_lora_dropout(
        model,
        dropout_rate=options.dropout_rate,
        mask_sampling=mask_sampling,
        mask_sharing=mask_sharing,
        num_samples=num_samples,
        seed=seed,
        **demo.LORA,
    )


def train(options, x, y):
    model = build(options, "bernoulli", "batch", 4, options.seed)
    rate = demo.LEARNING_RATES["LoRA"]
    model.compile(keras.optimizers.Adam(rate), LOSS)
    model.fit(
        x,
        y,
        batch_size=demo.BATCH_SIZE,
        epochs=options.epochs,
        shuffle=False,
        verbose=2,
    )
    return model


def measure(cell, model, x, y, options):
    """Return variance, standard error and squared mean of a quantity."""
    quantity, _, mask_sharing, _ = cell
    repeats = options.repeats[f"{quantity}/{mask_sharing}"]
    size = repeats // BLOCKS
    bar = keras.utils.Progbar(repeats)
    blocks = []
    if quantity == "gradient":
        optimizer = GradientSums()
        model.compile(optimizer, LOSS)
        for _ in range(BLOCKS):
            for _ in range(size):
                model.train_on_batch(x, y)
                bar.add(1)
            blocks.append(optimizer.take("lora_kernel"))
        return summary(blocks, size, np.sum)
    for block in range(BLOCKS):
        outputs = []
        for n in range(size):
            seed = options.seed + block * size + n
            outputs.append(
                model.ensemble_predict(
                    x, seed=seed, batch_size=len(y), verbose=0
                ).astype("float64")
            )
            bar.add(1)
        blocks.append([np.sum(outputs, 0), np.sum(np.square(outputs), 0)])
    return summary(blocks, size, np.mean)


def summary(blocks, size, over):
    """Variances of all coordinates, added up or averaged.

    Args:
        blocks: List of `(sums, sums of squares)` of `size` repeats each.
        size: Integer. Repeats of a block.
        over: `np.sum` or `np.mean`, over the coordinates.
    """

    def variance(sums, squares, count):
        return over(squares - sums**2 / count) / (count - 1)

    each = [variance(*block, size) for block in blocks]
    repeats = size * len(blocks)
    sums, squares = (sum(parts) for parts in zip(*blocks, strict=True))
    total = variance(sums, squares, repeats)
    # The square of an estimated mean is too large by its variance.
    squared_mean = over((sums / repeats) ** 2) - total / repeats
    return {
        "variance": total,
        "standard_error": np.std(each, ddof=1) / len(blocks) ** 0.5,
        "squared_mean": squared_mean,
        "repeats": repeats,
        "blocks": len(blocks),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dropout-rate", type=float, default=0.5)
    parser.add_argument("--scale", type=int, default=1, help="of repeats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo-output/mask_variance.json")
    parser.add_argument("--smoke", action="store_true", help="for CI: tiny")
    options = parser.parse_args()
    options.batch, options.counts = 32, [1, 2, 4, 8]
    # Means over masks of 32 examples vary less from one estimate to the next.
    options.repeats = {
        "gradient/batch": 4 * BLOCKS * options.scale,
        "gradient/example": 2 * BLOCKS * options.scale,
        "ensemble/batch": 8 * BLOCKS * options.scale,
    }
    if options.smoke:
        options.batch, options.counts, options.epochs = 4, [2], 1
        options.repeats = dict.fromkeys(options.repeats, 4 * BLOCKS)
    return options


if __name__ == "__main__":
    main()
