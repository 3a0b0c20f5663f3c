"""Is one training step slower than under KerasHub's own LoRA?

The same small model, target layers, rank, data and optimizer: KerasHub's
`Backbone.enable_lora` against `enable_lora_dropout` with one instance, with
fixed ranks and with AdaLoRA's, which are scored and pruned in each step.
Contenders take turns, step by step, in one process; compilation and warm-up
come first. Prints medians, writes every sample.

    KERAS_BACKEND=torch python examples/benchmarks/step_time.py --model deberta
"""

import argparse
import datetime
import importlib
import json
import os
import pathlib
import platform
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

import keras_lora_dropout as kld

TARGETS = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]
SHAPE = {
    "vocabulary_size": 1000,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 256,
    "intermediate_dim": 1024,
    "max_sequence_length": 512,
}
RANK = 8
BASELINES = ["KerasHub enable_lora", "LoRA Dropout, N = 1"]


def build(model):
    if model == "deberta":
        backbone = keras_hub.models.DebertaV3Backbone(bucket_size=256, **SHAPE)
        task = keras_hub.models.DebertaV3TextClassifier
    else:
        backbone = keras_hub.models.BertBackbone(**SHAPE)
        task = keras_hub.models.BertTextClassifier
    return task(backbone=backbone, num_classes=2)


def keras_hub_lora(model):
    model.backbone.enable_lora(RANK, target_layer_names=TARGETS)


def lora_dropout(model, **options):
    kld.enable_lora_dropout(model, rank=RANK, target_layers=TARGETS, **options)


CONTENDERS = {
    "KerasHub enable_lora": keras_hub_lora,
    "LoRA Dropout, N = 1": lambda m: lora_dropout(m, num_samples=1),
    "LoRA Dropout, N = 1, per example": lambda m: lora_dropout(
        m, num_samples=1, mask_sharing="example"
    ),
    "AdaLoRA Dropout, N = 1": lambda m: lora_dropout(
        m,
        num_samples=1,
        rank_budget=kld.RankBudget(RANK // 2, warmup_steps=0, total_steps=1000),
    ),
}


def main():
    options = parse_arguments()
    x, y = make_batch(options)
    steps = {}
    for name, adapt in CONTENDERS.items():
        keras.utils.set_random_seed(0)
        model = build(options.model)
        adapt(model)
        model.compile(
            keras.optimizers.Adam(1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        # `train_on_batch` returns the loss as a number: it waits for the step.
        steps[name] = lambda model=model: model.train_on_batch(x, y)
        for _ in range(options.warm_up):
            steps[name]()
    samples = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            samples[name].append(1000 * (time.perf_counter() - started))
    report(options, samples)


def make_batch(options):
    generator = np.random.default_rng(0)
    shape = (options.batch, options.length)
    x = {
        "token_ids": generator.integers(0, SHAPE["vocabulary_size"], shape),
        "padding_mask": np.ones(shape, bool),
    }
    if options.model == "bert":
        x["segment_ids"] = np.zeros(shape, int)
    return x, generator.integers(0, 2, options.batch)


def report(options, samples):
    rows = []
    print(f"\n{'contender':34}{'median ms':>10}{'quartiles':>18}", end="")
    print("".join(f"{'/ ' + baseline:>24}" for baseline in BASELINES))
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        # Pairs of neighbouring steps: the machine's drift cancels out.
        ratios = {
            baseline: statistics.median(
                ours / theirs
                for ours, theirs in zip(times, samples[baseline], strict=True)
            )
            for baseline in BASELINES
        }
        rows.append(
            {"name": name, "median_ms": median, "ratios": ratios, "ms": times}
        )
        spread = f"{low:.1f} - {high:.1f}"
        print(f"{name:34}{median:10.1f}{spread:>18}", end="")
        print("".join(f"{ratio:24.3f}" for ratio in ratios.values()))
    backend = importlib.import_module(keras.config.backend())
    modules = (backend, keras, keras_hub, kld, np)
    content = {
        "question": __doc__.splitlines()[0],
        "settings": {**vars(options), "shape": SHAPE, "rank": RANK},
        "versions": {m.__name__: m.__version__ for m in modules},
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "results": rows,
    }
    path = pathlib.Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Written: {path}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["deberta", "bert"], default="bert")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", default="demo-output/step_time.json")
    parser.add_argument("--smoke", action="store_true", help="for CI: tiny")
    options = parser.parse_args()
    if options.smoke:
        SHAPE.update(
            num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32
        )
        options.length, options.batch, options.repeats = 8, 2, 3
    return options


if __name__ == "__main__":
    main()
