"""Draw `rank_history.png`: the ranks of a tiny transformer while it trains.

    KERAS_BACKEND=jax python docs/figures/draw_ranks.py

The model learns to tell whether a sequence holds more of one token than of
another. Weights, data and masks come from seeds; another backend or processor
may round differently and keep other ranks.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import keras_hub
import numpy as np

import keras_lora_dropout as kld
from keras_lora_dropout.plots import plot_rank_history

TOKENS, LENGTH, EXAMPLES = 12, 16, 512


def build(layers):
    """A BERT classifier of random weights, with ranks that adapt."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=TOKENS,
        num_layers=layers,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=LENGTH,
    )
    return kld.enable_lora_dropout(
        keras_hub.models.BertTextClassifier(backbone, num_classes=2),
        rank_budget=kld.RankBudget(target_rank=4, initial_rank=6),
        dropout_rate=0.1,
        num_samples=2,
        seed=0,
    )


def make_data():
    """Random sequences; label 1 if token 1 is more frequent than token 2."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, TOKENS, (EXAMPLES, LENGTH))
    tokens = np.where(tokens > 5, tokens % 2 + 1, tokens)
    counts = [(tokens == token).sum(axis=1) for token in (1, 2)]
    inputs = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens, bool),
    }
    return inputs, (counts[0] > counts[1]).astype("int32")


def train(layers, epochs):
    """Return the trained model."""
    model = build(layers)
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    x, y = make_data()
    model.fit(x, y, batch_size=32, epochs=epochs, shuffle=False, verbose=2)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_name("rank_history.png"),
    )
    options = parser.parse_args()
    ax = plot_rank_history(train(options.layers, options.epochs))
    ax.figure.savefig(options.output, dpi=120, metadata={"Software": None})
