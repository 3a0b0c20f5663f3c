"""What Llama2-7B needs to be trained: bytes of each part, and operations.

Builds one, two and three blocks of Llama2-7B's own width, compiles the training
step on JAX and runs nothing. Blocks are alike, so the line through the three
leads to all 32. Temporaries, activations among them, depend on the device: XLA
wants ten times as many for a processor (bfloat16, N = 1). With `--tpu v5p` it
compiles for an accelerator, which need not be there; `libtpu` is the compiler.

    pip install libtpu
    KERAS_BACKEND=jax python examples/benchmarks/llama_memory.py --tpu v5p
"""

import argparse
import dataclasses
import math
import os
import pathlib
import warnings

# Without a TPU, its library asks the network, or warns that it cannot.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import keras_side
import numpy as np
from compiled_cost import training_cost
from compiled_cost import write
from jax.experimental import topologies
from workloads import SHAPES
from workloads import Workload

from keras_lora_dropout.conversion.model import SamplingSettings

BLOCKS = (1, 2, 3)
WEIGHTS = ("bfloat16", "int8", "int4")
SAMPLING = {
    "N = 1": {"num_samples": 1},
    "N = 4, parallel": {"num_samples": 4},
    "N = 4, sequential": {"num_samples": 4, "sampling": "sequential"},
}
PARTS = {
    "frozen": "frozen weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "temporaries": "temporaries",
}
# Sustained; the rows are three epochs of Alpaca-clean, one example in each.
TFLOP_PER_SECOND = 100, 400
ROWS = 3 * 51_760


@dataclasses.dataclass(frozen=True)
class Blocks(Workload):
    """The first blocks of a model.

    Attributes:
        blocks: Number of blocks.
    """

    blocks: int

    @property
    def shape(self):
        return {**super().shape, "num_layers": self.blocks}


def measure(workload, weights, device):
    """Measure one model, sampled in each way of `SAMPLING`.

    Returns:
        Dictionary of title -> dictionary of bytes with the keys of `PARTS`,
        and of the operations of a step, "gflop".
    """
    keras.backend.clear_session()
    keras.config.set_dtype_policy("bfloat16")
    model = keras_side.build_model(workload)
    if weights != "bfloat16":
        with warnings.catch_warnings():
            # Keras names each layer that it leaves as it is.
            warnings.simplefilter("ignore")
            model.quantize(weights)
    keras_side.enable_ours(model, workload)
    return {
        title: measure_step(model, workload, settings, device)
        for title, settings in SAMPLING.items()
    }


def measure_step(model, workload, settings, device):
    # Quantizing 7B's width takes minutes, so that one model serves for all.
    model.lora_dropout = SamplingSettings(**settings)
    model.compile(
        keras.optimizers.Adam(1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    cost = training_cost(model, *keras_side.make_batch(workload), device)
    trained = bytes_of(model.trainable_variables)
    return {
        "frozen": bytes_of(model.non_trainable_variables),
        "adapters": trained,
        "gradients": trained,
        "optimizer": bytes_of(model.optimizer.variables),
        "temporaries": round(cost["temporary_megabytes"] * 1e6),
        "gflop": gflop(cost, settings),
    }


def gflop(cost, settings):
    """Operations of a step; XLA counts the body of a loop once."""
    sequential = settings.get("sampling") == "sequential"
    return cost["gflop"] * (settings["num_samples"] if sequential else 1)


def tpu(version):
    """A TPU to compile for, which need not be there."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{version}:2x2x1"
    )
    return topology.devices[0]


def bytes_of(variables):
    """Bytes of variables; Keras stores int4 in pairs, as int8."""
    return sum(
        math.prod(variable.shape)
        * int("".join(filter(str.isdigit, variable.dtype)))
        // 8
        for variable in variables
    )


def extrapolate(measured, blocks):
    """Follow the line through what was measured to another number of blocks.

    Args:
        measured: Dictionary of number of blocks -> bytes.
        blocks: Integer.

    Returns:
        Tuple of the bytes there, and the largest distance of a measured point
        from the line, as a part of that point.
    """
    counts, values = map(np.array, zip(*measured.items(), strict=True))
    line = np.polyfit(counts, values, 1)
    off = np.abs(np.polyval(line, counts) - values) / values
    return float(np.polyval(line, blocks)), float(off.max())


def main():
    options = parse_arguments()
    device = tpu(options.tpu) if options.tpu else jax.devices()[0]
    whole = SHAPES["llama", options.scale]["num_layers"]
    results = {
        "question": __doc__.splitlines()[0],
        "versions": {"jax": jax.__version__, **keras_side.versions()},
        "device": device.device_kind,
        "batch": options.batch,
        "length": options.length,
        "rank": options.rank,
        "scale": options.scale,
        "blocks": whole,
        "measured": {},
        "extrapolated": {},
    }
    for weights in options.weights:
        by_blocks = {
            blocks: measure(
                Blocks(
                    "llama",
                    options.scale,
                    options.batch,
                    options.length,
                    options.rank,
                    blocks,
                ),
                weights,
                device,
            )
            for blocks in BLOCKS
        }
        for title in SAMPLING:
            rows = {blocks: by_blocks[blocks][title] for blocks in BLOCKS}
            key = f"{weights}, {title}"
            results["measured"][key] = rows
            results["extrapolated"][key] = {
                part: extrapolate({b: r[part] for b, r in rows.items()}, whole)
                for part in (*PARTS, "gflop")
            }
            print(key, results["extrapolated"][key], flush=True)
    path = pathlib.Path(options.output) / "llama_memory.json"
    write(path, results, markdown(results))


def markdown(results):
    """Yield the lines of the page: what was measured, and where it leads."""
    yield "# Memory and time of Llama2-7B"
    yield ""
    yield (
        f"{results['batch']} x {results['length']} tokens, rank "
        f"{results['rank']} on the four projections of attention, Adam, "
        f"adapters in float32, compiled for {results['device']}; GB of 10^9 "
        "bytes."
    )
    tables = {
        f"All {results['blocks']} blocks, extrapolated": {
            key: {part: value for part, (value, _) in row.items()}
            for key, row in results["extrapolated"].items()
        },
    }
    for blocks in BLOCKS:
        tables[f"{blocks} block{'s' * (blocks > 1)}, measured"] = {
            key: rows[blocks] for key, rows in results["measured"].items()
        }
    for title, rows in tables.items():
        yield from ["", f"## {title}", ""]
        yield f"| weights, instances | {' | '.join(PARTS.values())} | sum |"
        yield "|---" * (len(PARTS) + 2) + "|"
        for key, row in rows.items():
            cells = [f"{row[part] / 1e9:.3f}" for part in PARTS]
            total = sum(row[part] for part in PARTS) / 1e9
            yield f"| {key} | {' | '.join(cells)} | {total:.2f} |"
    yield from ["", "## Operations", ""]
    rates = [f"hours at {rate} TFLOP/s" for rate in TFLOP_PER_SECOND]
    yield f"| weights, instances | TFLOP of a step | {' | '.join(rates)} |"
    yield "|---" * (len(rates) + 2) + "|"
    for key, row in results["extrapolated"].items():
        step = row["gflop"][0] / 1e3
        whole = step * ROWS / results["batch"]
        hours = [f"{whole / rate / 3600:.1f}" for rate in TFLOP_PER_SECOND]
        yield f"| {key} | {step:.1f} | {' | '.join(hours)} |"
    yield ""
    yield (
        f"Hours of {ROWS:,} rows of {results['length']} tokens, three epochs "
        "of Alpaca-clean with one example in a row, if a device sustains that "
        "many operations. XLA counts the body of a loop once: for instances "
        "one after another it is multiplied by their number, what stands "
        "before the loop included."
    )
    off = max(
        off
        for row in results["extrapolated"].values()
        for _, off in row.values()
    )
    yield ""
    yield f"No measured point is off its line by more than {off:.2%}."


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--scale", choices=["smoke", "small", "7b"], default="7b")
    add("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    add("--tpu", help="compile for this TPU: v5e, v5p, v6e, ...")
    add("--batch", type=int, default=1)
    add("--length", type=int, default=512)
    add("--rank", type=int, default=16)
    add("--output", default="demo-output/benchmarks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
