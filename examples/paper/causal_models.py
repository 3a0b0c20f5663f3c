"""The language models of the commands: presets, and stories260K."""

import pathlib

import keras
import keras_hub
import stories
from reproduce import count
from reproduce import natural
from reproduce import number
from reproduce import positive

from keras_lora_dropout import enable_lora_dropout


def add_model_arguments(parser):
    """Let a command choose data, a model and its adapters."""
    add = parser.add_argument
    add("--data-dir", help="folder of JSON Lines")
    add("--output", default="demo-output/paper", help="folder of all results")
    add("--smoke", action="store_true", help="for tests: few rows")
    add(
        "--preset",
        default="llama2_7b_en",
        help="of a KerasHub causal language model, or its folder, or the "
        f"folder of {stories.WEIGHTS} and {stories.VOCABULARY}",
    )
    add("--dtype-policy", choices=["float32", "bfloat16", "mixed_bfloat16"])
    add("--quantize", choices=["int8", "int4"], help="the frozen weights")
    add("--adapters", help="file of `save_adapters`; default: untrained ones")
    add(
        "--target-layers",
        nargs="+",
        default=["query", "key", "value", "attention_output"],
    )
    add("--rank", type=count, default=16)
    add("--alpha", type=positive, help="default: the rank")
    add(
        "--dropout-rate",
        type=number(float, 0, 1, "a number in [0, 1)"),
        default=0.5,
    )
    add("--num-samples", type=count, default=4)
    add("--sampling", choices=["parallel", "sequential"], default="parallel")
    add("--seed", type=natural, default=0)


def adapted_model(options):
    """Load, quantize and adapt the model that the arguments ask for."""
    keras.utils.set_random_seed(options.seed)
    model = plain_model(options)
    if options.quantize:
        # Keras quantizes what has been used.
        model.preprocessor.tokenizer("a")
        model.quantize(options.quantize)
    model = enable_lora_dropout(
        model,
        rank=options.rank,
        alpha=options.alpha,
        dropout_rate=options.dropout_rate,
        num_samples=options.num_samples,
        sampling=options.sampling,
        target_layers=options.target_layers,
        seed=options.seed,
    )
    if options.adapters:
        model.load_adapters(options.adapters)
    return model


def plain_model(options):
    folder = pathlib.Path(options.preset)
    if (folder / stories.WEIGHTS).is_file():
        return stories.load_stories(folder, dtype=options.dtype_policy)
    try:
        return keras_hub.models.CausalLM.from_preset(
            options.preset, dtype=options.dtype_policy
        )
    except Exception as error:
        raise SystemExit(
            f"Cannot load the preset {options.preset!r}: {error}. Where there "
            "is no network, pass a folder that `save_to_preset` wrote."
        ) from error
