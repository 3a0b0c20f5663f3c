"""What a training step costs on PyTorch, as its own counter sees it.

Counts the floating-point operations of the matrix products that a step of each
contender runs, PEFT's on the same shapes in transformers among them: what is
comparable of two libraries without a clock.

    KERAS_BACKEND=torch python examples/benchmarks/counted_flops.py
"""

import argparse
import json
import math
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contenders
import keras_side
import peft_side
import torch
from torch.utils.flop_counter import FlopCounterMode
from workloads import make_workload

# The first contender is the baseline.
KEYS = ["peft-lora", "kerashub", "plain", "n1", "n1-example", "n4"]
WORKLOADS = {
    "DeBERTaV3, small": make_workload("deberta", "small"),
    "Two blocks of DeBERTaV3-base": make_workload("deberta", "blocks"),
    "BERT, small": make_workload("bert", "small"),
    "Llama, small": make_workload("llama", "small"),
}
SMOKE = {model: make_workload(model, "smoke") for model in ("deberta", "bert")}


def flops_of(workload, key):
    """Return the operations of one training step of a contender."""
    side, entries = keras_side, contenders.KERAS
    if key in contenders.PEFT:
        side, entries = peft_side, contenders.PEFT
    actions, _ = side.build(workload, entries[key].options)
    actions["train"]()
    # The counter knows these products only where they make new tensors.
    aten = torch.ops.aten
    in_place = dict.fromkeys((aten.addmm_, aten.baddbmm_), flops_in_place)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        actions["train"]()
    return counter.get_total_flops()


def flops_in_place(total, left, right, **kwargs):
    """Return the operations of `total += left @ right`, given their shapes."""
    return 2 * math.prod(left) * right[-1]


def main():
    options = parse_arguments()
    results = {
        "question": __doc__.splitlines()[0],
        "versions": {**keras_side.versions(), **peft_side.versions()},
        "flops": {},
    }
    workloads = SMOKE if options.smoke else WORKLOADS
    for title, workload in workloads.items():
        counts = results["flops"][title] = {}
        for key in KEYS:
            counts[key] = flops_of(workload, key)
            label = f"{title}: {label_of(key)}"
            print(f"{label:70} {counts[key] / 1e9:10.2f} GFLOP", flush=True)
    folder = pathlib.Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "counted_flops.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    table = folder / "counted_flops.md"
    table.write_text("\n".join(markdown(results["flops"])) + "\n")
    print(f"Written: {path}, {table}")


def markdown(flops):
    """Yield the lines of the table, with ratios to PEFT's."""
    yield "# The training step, as PyTorch counts it"
    yield ""
    yield (
        "GFLOP of the matrix products of one step, rank 8; in brackets, "
        "divided by the first row."
    )
    yield ""
    yield "| contender | " + " | ".join(flops) + " |"
    yield "|---" * (1 + len(flops)) + "|"
    for key in KEYS:
        cells = [
            f"{counts[key] / 1e9:.2f} ({counts[key] / counts[KEYS[0]]:.2f})"
            for counts in flops.values()
        ]
        yield f"| {label_of(key)} | " + " | ".join(cells) + " |"


def label_of(key):
    return {**contenders.KERAS, **contenders.PEFT}[key].label


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demo-output/benchmarks")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
