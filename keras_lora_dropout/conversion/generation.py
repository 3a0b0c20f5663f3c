"""`ensemble_generate`: text from the average of N mask instances."""

import contextlib
import functools

import keras_hub
from keras import ops

from keras_lora_dropout.architectures.caches import cache_size
from keras_lora_dropout.core import validation
from keras_lora_dropout.core.out_of_memory import memory_advice
from keras_lora_dropout.core.turns import in_turn
from keras_lora_dropout.inference.generation import GenerationRequest
from keras_lora_dropout.inference.generation import check_rows
from keras_lora_dropout.inference.generation import check_sampler
from keras_lora_dropout.inference.generation import generate_step
from keras_lora_dropout.inference.generation import text_names
from keras_lora_dropout.inference.generation import uncertainty_of
from keras_lora_dropout.training.backend import free_memory


class Generation:
    """Mixin of `AdaptedModel`: generate with N mask instances."""

    _generation = None  # GenerationRequest while an ensemble generates.

    @in_turn
    def ensemble_generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        *,
        num_samples=None,
        seed=None,
        average="probability",
        return_uncertainty=False,
    ):
        """Generate text with the average of N mask instances.

        At each step, the N instances' distributions of the next token are
        averaged, the compiled sampler chooses one token, and all instances go
        on with it. The instances are drawn once for the call and stay the same
        through the whole text; each has its own cache of keys and values, and
        its own output of an encoder, so that memory grows with N. With
        `sampling="sequential"`, the instances compute each token one after
        another.

        Reference: [Lin et al., 2024](https://arxiv.org/abs/2404.09610), Eq. 8,
        for each token.

        Args:
            inputs: Prompts, whatever `generate` accepts: a string or a list of
                strings for a KerasHub task with a preprocessor. An encoder
                and a decoder take these for the encoder, or a dictionary of
                `"encoder_text"` and `"decoder_text"`.
            max_length, stop_token_ids, strip_prompt: As in `generate`, which
                strips no prompt of a decoder that has an encoder.
            num_samples: Positive integer or `None` for the model's own N.
            seed: Integer or `None`. The same seed gives the same instances;
                `None` draws new ones at each call. The sampler has a seed of
                its own.
            average: `"probability"` averages the distributions, `"output"` the
                logits.
            return_uncertainty: Boolean. Whether to return each token's
                uncertainty, too.

        Returns:
            As `generate`. With `return_uncertainty`, a pair of that and a
            `TokenUncertainty`.

        Raises:
            ValueError: If the model does not generate, if a prompt (the
                decoder's if there is an encoder) is empty or leaves no room
                below `max_length`, if the caches of the N instances do not fit
                in memory, if the sampler searches over several texts at once
                (beam and contrastive search), or if an argument is out of
                range.
            LayoutError: If the layout of the model rules out instances in one
                batch, as that of mixtures of experts does. With
                `sampling="sequential"` they generate.
        """
        if not hasattr(self, "generate_step"):
            raise ValueError(
                f'Model "{self.name}" ({self.plain_class().__name__}) does not '
                "generate text; a `keras_hub.models.CausalLM` does. Use "
                "`ensemble_predict` for its outputs."
            )
        if strip_prompt and isinstance(self, keras_hub.models.Seq2SeqLM):
            raise ValueError(
                "`generate` of a model with an encoder and a decoder strips no "
                "prompt: what it returns is the decoder's text, without the "
                "encoder's. Received: strip_prompt=True. Leave it out."
            )
        validation.not_empty("inputs", inputs)
        check_sampler(self.sampler)
        request = self._generation_request(
            num_samples, average, return_uncertainty
        )
        if isinstance(inputs, dict):
            inputs = dict(inputs)  # `generate` makes lists of its strings.
        batches = []
        with self._seeded(seed), self._generating(request, batches):
            # The `generate` of some models, such as Phi-3, lacks the last one.
            more = {"strip_prompt": True} if strip_prompt else {}
            outputs = self.generate(inputs, max_length, stop_token_ids, **more)
        if return_uncertainty:
            return outputs, uncertainty_of(batches)
        return outputs

    def _generation_request(self, num_samples, average, return_uncertainty):
        if num_samples is None:
            num_samples = self.lora_dropout.num_samples
        return GenerationRequest(
            # How many there may be is for the memory of their caches to say.
            validation.positive_integer(
                "num_samples", num_samples, at_most=2**63 - 1
            ),
            validation.word("average", average, validation.AVERAGES),
            validation.boolean("return_uncertainty", return_uncertainty),
        )

    @contextlib.contextmanager
    def _generating(self, request, batches):
        """Let `generate` compute the ensemble's text.

        Args:
            request: A `GenerationRequest`.
            batches: List that gains the inputs and outputs of each batch.
        """
        advice = memory_advice(
            "ensemble_generate",
            self.lora_dropout.sampling,
            request.num_samples,
        )
        with advice, self._functions_of((request, self._adapters_disabled)):
            compiled = self.make_generate_function()

            def function(inputs, *args, **kwargs):
                self._check_prompts(inputs, request)
                outputs = compiled(inputs, *args, **kwargs)
                batches.append((inputs, outputs))
                return {name: outputs[name] for name in text_names(outputs)}

            self._generation = request
            self.generate_function = function
            try:
                yield
            finally:
                self._generation = None
                self.generate_function = compiled

    def _check_prompts(self, inputs, request):
        _, mask = text_names(inputs)
        rows, limit = inputs[mask].shape
        check_rows(inputs)
        subject = "Prompt" if mask == "padding_mask" else "Decoder prompt"
        lengths = ops.convert_to_numpy(inputs[mask]).astype(bool).sum(axis=1)
        for row, length in enumerate(lengths):
            if 0 < length < limit:
                continue
            problem = "is empty"
            advice = "Give each prompt at least one token, such as the start"
            if length:
                problem = f"fills all {limit} positions, or was cut to them"
                advice = "Pass a larger `max_length`, or shorten the prompt"
            raise ValueError(
                f"{subject} {row} {problem}, so nothing can be generated after "
                f"it. {advice}."
            )
        self._check_positions(inputs, limit)
        self._check_cache(inputs, rows, limit, request.num_samples)

    def _check_positions(self, inputs, limit):
        reach = getattr(self.backbone, "max_sequence_length", None)
        if reach is None:
            return
        has = f'Model "{self.name}" has positions for {reach} tokens.'
        if limit > reach:
            raise ValueError(
                f"{has} Received: max_length={limit}. Pass at most {reach}."
            )
        if "encoder_token_ids" not in inputs:
            return
        encoder_length = inputs["encoder_token_ids"].shape[1]
        if encoder_length > reach:
            raise ValueError(
                f"{has} Received: {encoder_length} tokens for the encoder, "
                f"padding included. Pass at most {reach}, with a preprocessor "
                "by its `encoder_sequence_length`."
            )

    def _check_cache(self, inputs, rows, length, count):
        """Raise `ValueError` if the caches of all instances cannot fit."""
        state = self._ensemble_state
        if state.cache_size is None:
            state.cache_size = cache_size(self, inputs)
        one = rows * state.cache_size.of_row(inputs)
        free = free_memory()
        if free is None or count * one <= free:
            return
        raise ValueError(
            f"The caches of num_samples={count} instances need {count * one:,} "
            f"bytes ({one:,} for each, of {rows} prompts and {length} tokens), "
            f"but {free:,} are free. Pass `num_samples` of at most "
            f"{free // one}, fewer prompts at once, or a smaller `max_length`."
        )


def with_generation(step):
    """Wrap a model's `generate_step` so that an ensemble in progress runs."""

    @functools.wraps(step)
    def wrapped(self, inputs, *args, **kwargs):
        if self._generation is None:
            return step(self, inputs, *args, **kwargs)
        return generate_step(
            self, step, self._generation, inputs, *args, **kwargs
        )

    return wrapped
