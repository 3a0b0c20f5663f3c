"""Generation with N mask instances: one token stream, N caches.

In parallel, all rows of the batch, and with them the caches, are there once for
each instance. In sequence, the model's own `generate_step` prepares the caches
of one instance after another, and at each token every instance takes its turn.
The sampler sees the averaged distribution alone, and each instance goes on with
the token that it chose. So no model family is treated apart.
"""

import contextlib
import dataclasses

import keras_hub
import numpy as np
from keras import ops

from keras_lora_dropout.core import instances
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import probabilities
from keras_lora_dropout.inference.ensemble import ensemble_draws

_MEASURES = ("predictive_entropy", "mutual_information")
_SAMPLERS = '"greedy", "random", "top_k" or "top_p"'


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """What one `ensemble_generate` call asks for.

    Attributes:
        num_samples: Number of mask instances N.
        average: `"probability"` or `"output"`.
        return_uncertainty: Whether each token's uncertainty is kept.
    """

    num_samples: int
    average: str = "probability"
    return_uncertainty: bool = False


@dataclasses.dataclass(frozen=True)
class TokenUncertainty:
    """How unsure an ensemble was of each token that it generated.

    Both measures are in nats, float32 arrays of shape `(prompts, max_length)`,
    and of the averaged distribution before the sampler's temperature and
    cut-offs. They are NaN where no token was generated: in the prompt, and
    after the stop token.

    Attributes:
        token_ids: Integer array `(prompts, max_length)`, prompt and answer.
        generated: Boolean array. Where the ensemble chose the token.
        predictive_entropy: Entropy of the averaged distribution.
        mutual_information: What of it the instances disagree on: the entropy
            of the average less the average entropy.
    """

    token_ids: np.ndarray
    generated: np.ndarray
    predictive_entropy: np.ndarray
    mutual_information: np.ndarray


def generate_step(model, plain_step, request, inputs, *args, **kwargs):
    """Run a model's own generation of one batch under N mask instances.

    Args:
        model: The adapted model.
        plain_step: The `generate_step` of its class, a function of
            `(model, inputs, *args, **kwargs)`.
        request: A `GenerationRequest`.
        inputs: Dictionary of the preprocessed prompts.
        *args: Further positional arguments of the step.
        **kwargs: Keyword arguments of the step.

    Returns:
        What the step returns; with `return_uncertainty`, also an entry for
        each measure of `TokenUncertainty`, of shape `(B, max_length)`.
    """
    turns = _turns(model, request.num_samples, instances.batch_size(inputs))
    sampler = EnsembleSampler(model.sampler, request, len(turns))
    tiled = instances.tile(inputs, sampler.copies)
    with _sampler_of(model, sampler):
        for draws in turns:
            with masks.use_draws(draws):
                outputs = plain_step(model, tiled, *args, **kwargs)
    first = {
        # Gemma 3 hands on the images that a text has not.
        name: None
        if tensor is None
        else instances.split(tensor, sampler.copies, turns[-1].rows)[0]
        for name, tensor in outputs.items()
    }
    return {**first, **sampler.measures}


def _turns(model, count, rows):
    """Draw the instances: all for one turn in parallel, or one for each."""
    plan, values = model.mask_plan, ensemble_draws(model, count)
    if model.lora_dropout.sampling == "parallel":
        values = instances.lay_out(ops.expand_dims(values, 1), rows)
        return [masks.Draws(plan, values, rows * count)]
    return [masks.Draws(plan, values[n : n + 1], rows) for n in range(count)]


@contextlib.contextmanager
def _sampler_of(model, sampler):
    plain, model.sampler = model.sampler, sampler
    try:
        yield
    finally:
        model.sampler = plain


class EnsembleSampler(keras_hub.samplers.Sampler):
    """Lets a sampler choose from the average over the mask instances.

    A model calls it once in each turn. It remembers how the instances of that
    turn go on, and generates when the last turn has called.

    Args:
        sampler: A `keras_hub.samplers.Sampler`, whose choice it is.
        request: A `GenerationRequest`.
        num_turns: Positive integer. Over how many calls the N instances are
            spread: 1 or N.
    """

    def __init__(self, sampler, request, num_turns):
        super().__init__()
        self._sampler = sampler
        self._request = request
        self._num_turns = num_turns
        self._turns = []
        self.measures = {}

    @property
    def variables(self):
        return self._sampler.variables

    def __call__(self, next, prompt, cache=None, **kwargs):
        own_next = masks.with_draws(masks.current_draws(), next)
        self._turns.append((own_next, () if cache is None else cache))
        if len(self._turns) < self._num_turns:
            return prompt  # What the model makes of it is not used.
        functions, caches = zip(*self._turns, strict=True)
        measures = {}
        if self._request.return_uncertainty:
            rows, length = ops.shape(prompt)[:2]
            nothing = ops.full(
                (rows // self.copies, length), float("nan"), "float32"
            )
            measures = dict.fromkeys(_MEASURES, nothing)
        # The loop of the base class carries the cache, whatever that is.
        return super().__call__(
            self._next_of_all(functions),
            prompt,
            cache=(caches, measures),
            **kwargs,
        )

    @property
    def copies(self):
        """How often each row is there in the prompt of one turn."""
        return self._request.num_samples // self._num_turns

    def _next_of_all(self, functions):
        """Join the turns' own functions of the next token."""

        def next_of_all(prompt, cache, index):
            caches, measures = cache
            steps = [
                own_next(prompt, own_cache, index)
                for own_next, own_cache in zip(functions, caches, strict=True)
            ]
            logits = self._join([step[0] for step in steps])
            caches = tuple(step[2] for step in steps)
            if measures:
                step = measure(self._blocks(logits))
                measures = {
                    name: ops.slice_update(
                        measures[name], (0, index), ops.expand_dims(value, 1)
                    )
                    for name, value in step.items()
                }
            return logits, None, (caches, measures)

        return next_of_all

    def run_loop(self, cond, body, model=None, loop_vars=None, **kwargs):
        loop_vars = super().run_loop(cond, body, model, loop_vars, **kwargs)
        self.measures = loop_vars[1][1]
        return loop_vars

    def compute_probabilities(self, logits):
        blocks = self._blocks(logits)
        if self._request.average == "probability" and blocks.shape[0] > 1:
            mean = ops.mean(
                probabilities.to_probabilities(blocks, "softmax"), 0
            )
            averaged = probabilities.to_outputs(mean, "softmax")
        else:
            averaged = ops.mean(blocks, axis=0)
        return self._sampler.compute_probabilities(averaged)

    def get_next_token(self, probabilities):
        token = self._sampler.get_next_token(probabilities)
        return instances.tile(token, self.copies)

    def _join(self, logits):
        """Put the logits of all turns together, `(N * B, vocabulary_size)`."""
        turns = [instances.blocks(turn, self.copies) for turn in logits]
        return ops.reshape(ops.concatenate(turns), (-1, logits[0].shape[-1]))

    def _blocks(self, logits):
        """Logits in float32, `(N, B, vocabulary_size)`."""
        shape = self._request.num_samples, -1, ops.shape(logits)[-1]
        return ops.reshape(ops.cast(logits, "float32"), shape)


def measure(logits):
    """Measure the uncertainty of one token.

    Args:
        logits: Float tensor `(N, B, vocabulary_size)`.

    Returns:
        Dictionary of tensors `(B,)` in nats. With one instance, the mutual
        information is zero.
    """
    log_probabilities = ops.log_softmax(logits, axis=-1)
    likely = ops.exp(log_probabilities)
    mean = ops.mean(likely, axis=0)
    # Where nothing is likely, `log` must not be asked.
    log_mean = ops.log(ops.where(mean > 0, mean, 1.0))
    total = -ops.sum(mean * log_mean, axis=-1)
    each = -ops.sum(
        likely * ops.where(likely > 0, log_probabilities, 0.0), axis=-1
    )
    information = total - ops.mean(each, axis=0)
    return {
        "predictive_entropy": total,
        "mutual_information": ops.maximum(information, 0.0),
    }


def check_sampler(sampler):
    """Raise `ValueError` unless a sampler chooses one token from one list."""
    is_sampler = isinstance(sampler, keras_hub.samplers.Sampler)
    own_search = keras_hub.samplers.Sampler.__call__
    if is_sampler and type(sampler).__call__ is own_search:
        return
    advice = (
        f"Compile the model with sampler={_SAMPLERS} or a "
        "`keras_hub.samplers.Sampler` that overrides `get_next_token` alone."
    )
    if is_sampler:
        raise ValueError(
            f"`ensemble_generate` cannot use {type(sampler).__name__}: it "
            "searches over several texts at once, or uses more of the model "
            "than the distribution of the next token, which is what the "
            f"ensemble averages. {advice}"
        )
    raise ValueError(
        "`ensemble_generate` needs a sampler of KerasHub. Received: sampler="
        f"{sampler!r} (of type {type(sampler).__name__}). {advice}"
    )


def text_names(inputs):
    """Say which entries of a batch hold the text that is written.

    Args:
        inputs: Dictionary of preprocessed prompts, or of what was generated.

    Returns:
        Pair of the names of the token ids and of their padding mask: those of
        the decoder if the model has an encoder, too.

    Raises:
        ValueError: If the batch has not both.
    """
    pairs = [
        (f"{side}token_ids", f"{side}padding_mask") for side in ("decoder_", "")
    ]
    for pair in pairs:
        if isinstance(inputs, dict) and set(pair) <= set(inputs):
            return pair
    given = type(inputs).__name__
    if isinstance(inputs, dict):
        given = f"a dictionary of {', '.join(map(repr, inputs)) or 'nothing'}"
    raise ValueError(
        "Without a preprocessor, prompts are a dictionary of 'token_ids' and "
        "'padding_mask'; of a model with an encoder, of these with 'encoder_' "
        f"and with 'decoder_' before them. Received: {given}."
    )


def check_rows(inputs):
    """Raise `ValueError` unless all texts have the same number of rows."""
    rows = {
        name: tensor.shape[0]
        for name, tensor in inputs.items()
        if name.endswith(("token_ids", "padding_mask"))
    }
    if len(set(rows.values())) > 1:
        each = ", ".join(f"{name}: {count}" for name, count in rows.items())
        raise ValueError(
            "All entries of the prompts must have as many rows. Received rows: "
            f"{each}. Give each prompt one row in every entry."
        )


def uncertainty_of(batches):
    """Join what several batches gave.

    Args:
        batches: List of pairs `(inputs, outputs)` of `generate_step`.

    Returns:
        `TokenUncertainty`.
    """
    columns = {"token_ids": [], "generated": []}
    columns.update({name: [] for name in _MEASURES})
    for inputs, outputs in batches:
        tokens, mask = text_names(inputs)
        prompt, written = (
            ops.convert_to_numpy(entry[mask]).astype(bool)
            for entry in (inputs, outputs)
        )
        # RWKV7 reads a prompt apart, and puts it before what it writes.
        before = (0, 0), (written.shape[1] - prompt.shape[1], 0)
        generated = written & ~np.pad(prompt, before, constant_values=True)
        columns["token_ids"].append(ops.convert_to_numpy(outputs[tokens]))
        columns["generated"].append(generated)
        nothing = np.float32("nan")
        for name in _MEASURES:
            values = ops.convert_to_numpy(outputs[name])
            values = np.pad(values, before, constant_values=nothing)
            columns[name].append(np.where(generated, values, nothing))
    return TokenUncertainty(
        **{name: np.concatenate(parts) for name, parts in columns.items()}
    )
