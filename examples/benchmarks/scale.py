"""What a training step sends, and what a device holds, on 8 to 512 devices.

Compiles one and two blocks of each model for that many devices and runs
nothing. Blocks are alike, so the line through both leads to the whole model.
With `--tpu v5p` it compiles for TPUs, which need not be there; `libtpu` is the
compiler. Without it, for the devices that JAX has. A model takes minutes; those
that the same command wrote before it was stopped are not compiled again.

    pip install libtpu
    KERAS_BACKEND=jax python examples/benchmarks/scale.py --tpu v5p
"""

import argparse
import dataclasses
import json
import os
import pathlib

# Without a TPU, its library asks the network, or warns that it cannot.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import keras_hub
import keras_side
import numpy as np
from collectives import collectives
from compiled_cost import write
from jax.experimental import topologies
from llama_memory import Blocks
from workloads import SHAPES

from keras_lora_dropout.core.sharding import weight_axes

# Shapes of a TPU v5p with that many chips.
TOPOLOGIES = {8: "2x2x2", 64: "4x4x4", 512: "8x8x8"}
BLOCKS = 1, 2
LAYOUTS = {
    "data": "data parallel",
    "model": "model parallel",
    "kerashub": "KerasHub's layout map",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how much of a batch each replica of it takes."""

    title: str
    model: str
    scale: str
    rows: int
    length: int
    rank: int
    layouts: tuple


CASES = (
    Case("DeBERTaV3-large", "deberta", "large", 8, 128, 8, ("data",)),
    Case("Llama2-7B", "llama", "7b", 1, 512, 16, tuple(LAYOUTS)),
    Case("Llama2-70B", "llama", "70b", 1, 512, 16, ("model", "kerashub")),
)
SMOKE = Case("smoke", "llama", "smoke", 2, 8, 2, tuple(LAYOUTS))


def devices_of(tpu, count):
    """Return that many devices, of a TPU that need not be there."""
    if not tpu:
        return jax.devices()[:count]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{tpu}:{TOPOLOGIES[count]}"
    ).devices


def distribution_of(layout, devices, model_axis):
    """Return the Keras distribution of a layout.

    Args:
        layout: One of `LAYOUTS`.
        devices: List of JAX devices.
        model_axis: Integer. How many of them share a model, if they do.
    """
    shape, names = (len(devices),), ("batch",)
    if layout != "data":
        shape = len(devices) // model_axis, model_axis
        names = "batch", "model"
    mesh = keras.distribution.DeviceMesh(shape, names, np.arange(len(devices)))
    # Keras looks its devices up among those of this machine.
    mesh._backend_mesh = jax.sharding.Mesh(
        np.array(devices).reshape(shape), names
    )
    if layout == "data":
        return keras.distribution.DataParallel(mesh, auto_shard_dataset=False)
    known = keras_hub.models.LlamaBackbone.get_layout_map(mesh)
    layout_map = keras.distribution.LayoutMap(mesh)
    for path, tensor_layout in known.items():
        axes = tensor_layout.axes
        if layout == "model":  # Nothing is split over the batch axis.
            axes = tuple(None if axis == "batch" else axis for axis in axes)
        layout_map[path] = axes
    return keras.distribution.ModelParallel(
        layout_map=layout_map, auto_shard_dataset=False
    )


def build(case, blocks):
    """Build and adapt the first blocks of a model, on this machine."""
    workload = Blocks(
        case.model, case.scale, case.rows, case.length, case.rank, blocks
    )
    return workload, keras_side.compiled_model(workload, {"num_samples": 4})


def measure(workload, model, distribution):
    """Compile a training step; return what it sends and holds.

    Returns:
        Dict of bytes of each kind of collective operation, and, under
        "held", of what a device holds during the step.
    """
    axes_of = _axes_of_variables(model, distribution)
    mesh = distribution.device_mesh.backend_mesh

    def like(shape, dtype, axes):
        place = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*axes)
        )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple(
        [like(v.shape, v.dtype, axes_of.get(id(v), ())) for v in group]
        for group in groups
    )
    replicas = distribution.device_mesh.shape[0]
    batch = jax.tree.map(
        lambda leaf: like(
            (len(leaf) * replicas, *leaf.shape[1:]),
            jax.dtypes.canonicalize_dtype(leaf.dtype),
            ("batch",),
        ),
        keras_side.make_batch(workload),
    )
    step = jax.jit(lambda *args: model.train_step(*args), donate_argnums=0)
    with distribution.scope():
        compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    found = {
        "held": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    }
    for kind, size in collectives(compiled.as_text()):
        found[kind] = found.get(kind, 0) + size
    return found


def _axes_of_variables(model, distribution):
    """Say how each variable is split, as if the model were built there."""
    axes_of = {
        id(v): distribution.get_variable_layout(v).axes for v in model.variables
    }
    for _, layer in model.adapted_layers:
        kernel_axes = axes_of[id(layer._kernel)]
        for name, weight in layer.adapter_weights.items():
            axes = weight_axes(name, kernel_axes, layer._axes)
            axes_of[id(weight)] = axes
    model.optimizer.build(model.trainable_variables)
    slots = model.optimizer._momentums, model.optimizer._velocities
    for slot in slots:
        for variable, own in zip(model.trainable_variables, slot, strict=True):
            axes_of[id(own)] = axes_of[id(variable)]
    return axes_of


def extrapolate(measured, blocks):
    """Follow the line through two points to another number of blocks."""
    (first, one), (second, two) = sorted(measured.items())
    step = {
        key: (two.get(key, 0) - one.get(key, 0)) / (second - first)
        for key in {*one, *two}
    }
    return {
        key: one.get(key, 0) + slope * (blocks - first)
        for key, slope in step.items()
    }


def measure_case(case, options):
    """Return `{layout: {devices: result}}`; a string where there is none."""
    rows = {}
    for blocks in BLOCKS:
        workload, model = build(case, blocks)
        for layout in case.layouts:
            for count in options.devices:
                cell = rows.setdefault(layout, {}).setdefault(count, {})
                distribution = distribution_of(
                    layout, devices_of(options.tpu, count), options.model_axis
                )
                try:
                    cell[blocks] = measure(workload, model, distribution)
                except ValueError as error:  # An axis that cannot be split.
                    cell[blocks] = str(error).splitlines()[0]
                print(case.title, layout, count, blocks, cell[blocks])
    whole = SHAPES[case.model, case.scale]["num_layers"]
    return {
        layout: {
            count: cell[BLOCKS[0]]
            if isinstance(cell[BLOCKS[0]], str)
            else extrapolate(cell, whole)
            for count, cell in cells.items()
        }
        for layout, cells in rows.items()
    }


def main():
    options = parse_arguments()
    results = {
        "question": __doc__.splitlines()[0],
        "versions": {"jax": jax.__version__, **keras_side.versions()},
        "device": devices_of(options.tpu, options.devices[0])[0].device_kind,
        "devices": options.devices,
        "model_axis": options.model_axis,
    }
    path = pathlib.Path(options.output) / "scale.json"
    results["cases"] = earlier_cases(path, results)
    wanted = [case for case in CASES if case.title in options.models]
    for case in [SMOKE] if options.smoke else wanted:
        entry = dataclasses.asdict(case)
        entry["layouts"] = list(case.layouts)  # As JSON has it.
        known = results["cases"].get(case.title, {})
        if entry.items() <= known.items():
            continue
        entry["found"] = measure_case(case, options)
        results["cases"][case.title] = entry
        write(path, results, markdown(results))


def earlier_cases(path, header):
    """Return the cases of a file that has the same header, if there is one."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    cases = found.pop("cases", {})
    return cases if found == header else {}


def markdown(results):
    """Yield the lines of the page."""
    yield "# A step on 8, 64 and 512 devices"
    yield ""
    yield (
        f"Compiled for {results['device']}, N = 4 in parallel, Adam; GB of "
        "10^9 bytes for each device, extrapolated from one and two blocks. A "
        f"replica is a device, or {results['model_axis']} devices that share a "
        "model."
    )
    for title, case in results["cases"].items():
        yield from ["", f"## {title}", ""]
        yield (
            f"{case['rows']} x {case['length']} tokens for each replica, rank "
            f"{case['rank']}."
        )
        yield ""
        yield "| layout | devices | held | sent in a step | of these |"
        yield "|---|---|---|---|---|"
        for layout, cells in case["found"].items():
            for devices, found in cells.items():
                cells = " | ".join(_cells(found))
                yield f"| {LAYOUTS[layout]} | {devices} | {cells} |"


def _cells(found):
    if isinstance(found, str):
        return ["-", "-", found.replace("|", "/")]
    kinds = {k: v for k, v in sorted(found.items()) if k != "held"}
    return [
        f"{found['held'] / 1e9:.2f}",
        f"{sum(kinds.values()) / 1e9:.4f}",
        ", ".join(f"{kind} {size / 1e9:.4f}" for kind, size in kinds.items()),
    ]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    titles = [case.title for case in CASES]
    add("--models", nargs="+", choices=titles, default=titles)
    add("--devices", type=int, nargs="+", default=list(TOPOLOGIES))
    add("--model-axis", type=int, default=8, help="devices of one model")
    add("--tpu", help="compile for this TPU: v5p")
    add("--smoke", action="store_true", help="a tiny model instead")
    add("--output", default="demo-output/benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
