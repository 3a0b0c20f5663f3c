"""Generation as it is defined: all of the text again for each token."""

import numpy as np


def softmax(logits):
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def entropy(probabilities):
    return -np.sum(probabilities * np.log(probabilities), axis=-1)


class Uncached:
    """The masked model without a cache, asked for one token after another.

    Args:
        model: An adapted language model.
        count: Number of mask instances.
        seed: Seed of the instances.
        encoder: Dictionary of what the encoder reads, if there is one.
        first_token: Integer. Tokens below are never written.
    """

    def __init__(self, model, count, seed, encoder=None, first_token=0):
        self._model = model
        self._options = {"num_samples": count, "seed": seed}
        self._encoder = encoder or {}
        self._first_token = first_token

    def distributions(self, ids):
        """Each instance's distribution after each token, `(N, B, T, V)`."""
        side = "decoder_" if self._encoder else ""
        text = {
            f"{side}token_ids": ids,
            f"{side}padding_mask": np.ones_like(ids),
        }
        kept, self._model.preprocessor = self._model.preprocessor, None
        try:
            logits = self._model.ensemble_predict(
                {**self._encoder, **text},
                return_samples=True,
                verbose=0,
                **self._options,
            )
        finally:
            self._model.preprocessor = kept
        return softmax(logits)

    def write(self, ids, prompt):
        """Write greedily what follows the prompts."""
        ids = ids.copy()
        for place in range(prompt.sum(1).min(), ids.shape[1]):
            mean = self.distributions(ids).mean(0)[:, place - 1]
            best = mean[:, self._first_token :].argmax(-1) + self._first_token
            ids[:, place] = np.where(prompt[:, place], ids[:, place], best)
        return ids
