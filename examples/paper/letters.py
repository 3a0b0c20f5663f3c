"""How likely a language model takes each of a few tokens to come next."""

import keras
import numpy as np
from keras import ops

from keras_lora_dropout import LoRADropoutModel

# Lengths of batches are multiples of it, so that few shapes are compiled.
STEP = 64


def letter_model(model, letters):
    """Make a model of what follows a prompt, on the layers of another one.

    Only the last token's state meets the vocabulary, so that no logits of the
    whole text are ever there.

    Args:
        model: A KerasHub `CausalLM` with an adapter.
        letters: List of token ids.

    Returns:
        `LoRADropoutModel` of `token_ids` and `padding_mask` that gives logits
        of shape `(batch, len(letters))`.
    """
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask")
    }
    states = model.backbone(inputs)
    count = ops.sum(inputs["padding_mask"], axis=1)
    last = ops.take_along_axis(
        states, ops.reshape(count - 1, (-1, 1, 1)), axis=1
    )
    logits = model.backbone.token_embedding(last, reverse=True)
    chosen = ops.take(logits[:, 0], np.array(letters), axis=-1)
    settings = model.lora_dropout
    return LoRADropoutModel(
        inputs,
        ops.cast(chosen, "float32"),
        num_samples=settings.num_samples,
        sampling=settings.sampling,
    )


def letter_probabilities(predict, prompts, batch_size):
    """Ask for the letters after many prompts, those of like length together.

    Args:
        predict: Function of a batch of inputs that gives logits or, if they
            are averaged, log-probabilities.
        prompts: List of lists of token ids.
        batch_size: Integer.

    Returns:
        Array of shape `(len(prompts), letters)`.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    found = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = max(len(prompts[n]) for n in batch)
        length = -(-length // STEP) * STEP
        # A last batch of another size would be compiled, too.
        rows = batch + batch[-1:] * (batch_size - len(batch))
        x = {
            name: np.zeros((batch_size, length), "int32")
            for name in ("token_ids", "padding_mask")
        }
        for row, n in enumerate(rows):
            x["token_ids"][row, : len(prompts[n])] = prompts[n]
            x["padding_mask"][row, : len(prompts[n])] = 1
        found.update(zip(batch, predict(x), strict=False))
    return np.stack([found[n] for n in range(len(prompts))])
