"""What a training step costs, as XLA counts it: no clock, no noise.

Compiles the training step of each contender on JAX, runs nothing, and reads the
floating-point operations, the bytes that its instructions read and write, and
the memory that it needs besides weights and batch.

    KERAS_BACKEND=jax python examples/benchmarks/compiled_cost.py
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contenders
import jax
import keras_side
from workloads import make_workload

# Model, scale, length of the batch; the first contender is the baseline.
TABLES = {
    "Two blocks of DeBERTaV3-base": (
        make_workload("deberta", "blocks"),
        ["kerashub", "n1", "n1-stock", "plain", "n1-example", "n4", "adalora"],
    ),
    "DeBERTaV3-base": (
        make_workload("deberta", "base"),
        ["n1", "n4", "n4-sequential", "n1-top", "n4-top"],
    ),
    "Two blocks of Llama2-7B": (
        make_workload("llama", "blocks"),
        ["kerashub", "n1", "n4"],
    ),
}
COLUMNS = {
    "gflop": "GFLOP",
    "gigabytes": "GB read and written",
    "temporary_megabytes": "MB of temporaries",
}


def training_cost(model, x, y, device=None):
    """Compile the training step of a Keras model on JAX, and count.

    Args:
        model: A compiled `keras.Model` without metrics.
        x, y: One batch, of NumPy arrays.
        device: Device to compile for, which need not be there. By default
            JAX's own.

    Returns:
        Dict with the keys of `COLUMNS`.
    """
    model.optimizer.build(model.trainable_variables)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    place = device and jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        (state, (x, y)),
    )
    # A function of its own: JAX would take up what it traced for another model.
    step = jax.jit(lambda *args: model.train_step(*args), donate_argnums=0)
    compiled = step.lower(*shapes).compile()
    counts = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    return {
        "gflop": counts["flops"] / 1e9,
        "gigabytes": counts["bytes accessed"] / 1e9,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def cost_of(workload, key):
    """Return the `training_cost` of a contender, by its key."""
    entry = contenders.KERAS[key]
    model = keras_side.compiled_model(workload, entry.options)
    return training_cost(model, *keras_side.make_batch(workload))


def main():
    options = parse_arguments()
    results = {
        "question": __doc__.splitlines()[0],
        "versions": {
            "jax": jax.__version__,
            **keras_side.versions(),
        },
        "device": jax.devices()[0].device_kind,
        "tables": {},
    }
    for title, (workload, keys) in TABLES.items():
        rows = results["tables"][title] = {}
        print(f"\n{title}, {workload.batch} x {workload.length} tokens")
        for key in keys:
            rows[key] = cost_of(workload, key)
            counts = (f"{rows[key][c]:12.1f} {COLUMNS[c]}" for c in COLUMNS)
            print(f"{contenders.KERAS[key].label:44}", *counts, flush=True)
    path = pathlib.Path(options.output) / "compiled_cost.json"
    write(path, results, markdown(results))


def write(path, results, lines):
    """Write results as JSON, and the lines of their page beside them.

    Args:
        path: Path of the JSON file.
        results: Dict.
        lines: Iterable of strings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    page = path.with_suffix(".md")
    page.write_text("\n".join(lines) + "\n")
    print(f"Written: {path}, {page}")


def markdown(results):
    """Yield the lines of the tables, each with its ratios to its baseline."""
    yield "# The training step, as XLA counts it"
    yield ""
    yield (
        "XLA counts the body of a loop once: of instances one after another, "
        "only the memory is that of the whole step."
    )
    for title, (workload, keys) in TABLES.items():
        rows = results["tables"][title]
        yield from ["", f"## {title}", ""]
        yield (
            f"{workload.batch} x {workload.length} tokens, rank "
            f"{workload.rank}; in brackets, divided by the first row."
        )
        yield ""
        yield "| contender | " + " | ".join(COLUMNS.values()) + " |"
        yield "|---" * (1 + len(COLUMNS)) + "|"
        for key in keys:
            cells = [
                f"{rows[key][c]:,.1f} ({rows[key][c] / rows[keys[0]][c]:.3f})"
                for c in COLUMNS
            ]
            label = contenders.KERAS[key].label
            yield f"| {label} | " + " | ".join(cells) + " |"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demo-output/benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
