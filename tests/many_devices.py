"""Trains on 8 simulated devices and on one; writes what came out.

It runs as processes of its own, since JAX counts its devices once:

    python many_devices.py FOLDER
    python many_devices.py FOLDER PORT PROCESS

with 8 devices, or as one of two processes with 4 each, that meet at a port of
this host. Who starts it says how many there are.
"""

import json
import pathlib
import sys

import jax
import keras
import keras_hub
import numpy as np

sys.path.insert(
    0, str(pathlib.Path(__file__).parents[1] / "examples" / "benchmarks")
)

from collectives import collectives

import keras_lora_dropout as kld
from keras_lora_dropout.core.sharding import to_numpy

STEPS, BATCH, FEATURES, LENGTH, VOCABULARY = 20, 16, 8, 8, 48
BUDGET = kld.RankBudget(
    target_rank=1, initial_rank=2, warmup_steps=3, final_steps=5,
    mask_interval=2, total_steps=STEPS,
)  # fmt: skip
HIDDEN_KEY = kld.hidden_key(0.2, 0.2, kl_weight=0.5)
SAMPLINGS = {
    f"{n}-{sharing}-{sampling}-{kind}": {
        "num_samples": n,
        "mask_sharing": sharing,
        "sampling": sampling,
        "rank_budget": BUDGET if kind == "adalora" else None,
    }
    for n, sampling in ((1, "parallel"), (4, "parallel"), (4, "sequential"))
    for sharing in ("batch", "example")
    for kind in ("lora", "adalora")
}
LLAMAS = {
    "llama-lora": {},
    "llama-adalora": SAMPLINGS["4-example-sequential-adalora"],
    "llama-pissa": {"init_lora_weights": "pissa", "dropout_rate": 0.1},
    "llama-dora": {"use_dora": True},
}
TITLES_OF_PROCESSES = "4-batch-parallel-lora", "4-example-sequential-adalora"


def dense():
    """A residual model of `Dense` and `EinsumDense`, small and quick."""
    x = inputs = keras.Input((LENGTH, FEATURES))
    for n in range(2):
        heads = keras.layers.EinsumDense(
            "abc,cde->abde", (LENGTH, 4, 4), bias_axes="de", name=f"heads_{n}"
        )(x)
        merged = keras.layers.EinsumDense(
            "abde,dec->abc", (LENGTH, FEATURES), name=f"merge_{n}"
        )(keras.ops.tanh(heads))
        x = keras.layers.Add()([x, merged])
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    return model, {"target_layers": ".*(heads|merge).*"}


def deberta():
    backbone = keras_hub.models.DebertaV3Backbone(
        vocabulary_size=VOCABULARY, num_layers=1, num_heads=4, hidden_dim=16,
        intermediate_dim=32, max_sequence_length=LENGTH, bucket_size=8,
        dropout=0.0,
    )  # fmt: skip
    return keras_hub.models.DebertaV3TextClassifier(
        backbone, num_classes=3, dropout=0.0
    ), {}


def llama():
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY, num_layers=1, num_query_heads=4,
        num_key_value_heads=4, hidden_dim=16, intermediate_dim=32,
    )  # fmt: skip
    return keras_hub.models.LlamaCausalLM(backbone), {}


MODELS = {"dense": dense, "deberta": deberta, "llama": llama}


def build(name, **options):
    keras.utils.set_random_seed(3)
    model, own = MODELS[name]()
    kld.enable_lora_dropout(model, rank=2, seed=1, **own, **options)
    rng = np.random.default_rng(7)
    for _, layer in model.adapted_layers:  # As if it had been trained.
        for factor in layer.factors:
            factor.assign(rng.normal(0, 0.3, factor.shape))
    model.compile(
        keras.optimizers.Adam(1e-2, epsilon=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def batches(name, steps=STEPS):
    """Rows for a number of steps."""
    rng = np.random.default_rng(0)
    rows = steps * BATCH
    if name == "dense":
        x = rng.normal(size=(rows, LENGTH, FEATURES)).astype("float32")
        return x, rng.integers(0, 3, rows)
    tokens = rng.integers(1, VOCABULARY, (rows, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, (rows, 1))
    padding = (np.arange(LENGTH) < lengths).astype("int32")
    x = {"token_ids": tokens * padding, "padding_mask": padding}
    shape = (rows, LENGTH) if name == "llama" else rows
    return x, rng.integers(0, 3, shape)


def data_parallel(devices=8):
    names = keras.distribution.list_devices()[:devices]
    return keras.distribution.DataParallel(
        devices=names, auto_shard_dataset=False
    )


def model_parallel(shape=(2, 4)):
    """KerasHub's layout of Llama, unchanged."""
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"))
    layout = keras_hub.models.LlamaBackbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(
        layout_map=layout, auto_shard_dataset=False
    )


class Losses(keras.callbacks.Callback):
    """Keeps the loss of each step, which is the mean since the epoch began."""

    def __init__(self):
        super().__init__()
        self.means = []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(float(logs["loss"]))


def train(name, distribution, hidden_key=False, **options):
    """Train from the start; return everything that there is to compare."""
    keras.distribution.set_distribution(distribution)
    model = build(name, **options)
    if hidden_key:
        kld.enable_transformer_dropout(model, **HIDDEN_KEY)
    return run(model, *batches(name))


def run(model, x, y):
    losses = Losses()
    x, y = jax.tree.map(own_rows, (x, y))
    model.fit(
        x,
        y,
        batch_size=BATCH // jax.process_count(),
        shuffle=False,
        verbose=0,
        callbacks=[losses],
    )
    return {"losses": np.array(losses.means), **state_of(model)}


def own_rows(array):
    """The rows of each batch that this process feeds: a run of them."""
    count = jax.process_count()
    blocks = array.reshape(-1, count, BATCH // count, *array.shape[1:])
    own = blocks[:, jax.process_index()]
    return own.reshape(-1, *array.shape[1:])


def state_of(model):
    # Keras numbers the names of models and optimizers in a process.
    metrics = {id(variable) for variable in model.metrics_variables}
    variables = enumerate([*model.variables, *model.optimizer.variables])
    return {
        f"{place}:{variable.name}": to_numpy(variable)
        for place, variable in variables
        if id(variable) not in metrics
    }


def compiled_step(model, distribution, x, y):
    """Compile a training step, run nothing; return its text."""
    model.optimizer.build(model.trainable_variables)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)

    def like(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = (
        jax.tree.map(lambda leaf: like(leaf, leaf.sharding), state),
        jax.tree.map(
            lambda leaf: like(
                leaf, distribution.get_data_layout(leaf.shape).backend_layout
            ),
            (x, y),
        ),
    )
    step = jax.jit(lambda *args: model.train_step(*args))
    return step.lower(*shapes).compile().as_text()


def traffic(name, **options):
    """What a step sends between 8 devices that share the batch."""
    distribution = data_parallel()
    keras.distribution.set_distribution(distribution)
    model = build(name, **options)
    text = compiled_step(model, distribution, *batches(name, 1))
    # Their gradients are computed from those of the other factors.
    lambdas = [v for v in model.trainable_variables if v.name == "lora_lambda"]
    twice = [
        factor.value.nbytes
        for path, layer in model.adapted_layers
        for factor in layer.factors
        if name == "deberta" and path.endswith(("query", "key"))
    ]
    return {
        "sent": collectives(text),
        "trained": sum(v.value.nbytes for v in model.trainable_variables),
        "called_twice": sum(twice),
        "derived": sum(v.value.nbytes for v in lambdas),
    }


def ensembles(distribution):
    """What the mean network and the ensembles of a model put out."""
    keras.distribution.set_distribution(distribution)
    model = build("deberta")
    kld.enable_transformer_dropout(model, **HIDDEN_KEY)
    x, y = batches("deberta", 2)
    common = {"batch_size": BATCH, "verbose": 0}
    keys = {"seed": 5, **common}
    drops = {"include_transformer_dropout": True, **keys}
    found = {
        "mean": model.predict(x, **common),
        "ensemble": model.ensemble_predict(x, **keys),
        "samples": model.ensemble_predict(x, return_samples=True, **keys),
        "probability": model.ensemble_predict(x, average="probability", **keys),
        "drops": model.ensemble_predict(x, **drops),
        "evaluated": model.ensemble_evaluate(x, y, **keys),
    }
    return {name: np.asarray(value) for name, value in found.items()}


def resumed(folder):
    """Half a run on 8 devices, the rest on fewer: states at the end."""
    half = BATCH * STEPS // 2
    x, y = batches("dense")
    keras.distribution.set_distribution(data_parallel())
    model = build("dense", rank_budget=BUDGET)
    run(model, x[:half], y[:half])
    model.save(folder / "half.keras")
    model.save_adapters(folder / "half")
    found = {}
    for devices in (None, 4, 8):
        keras.distribution.set_distribution(devices and data_parallel(devices))
        model = keras.saving.load_model(folder / "half.keras")
        title = f"{devices or 1} devices"
        found[title] = run(model, x[half:], y[half:])
        fresh = build("dense", rank_budget=BUDGET)
        fresh.load_adapters(folder / "half")
        outputs = fresh.predict(x[:BATCH], batch_size=BATCH, verbose=0)
        found[title]["adapters"] = outputs
    return found


def layouts():
    """How the weights of Llama's adapters are split, and the optimizer's."""
    keras.distribution.set_distribution(model_parallel())
    model = build("llama", init_lora_weights="pissa")
    model.optimizer.build(model.trainable_variables)
    optimizer = {
        id(variable): slot
        for variable, slot in zip(
            model.trainable_variables, model.optimizer._momentums, strict=True
        )
    }
    found = {}
    for path, layer in model.adapted_layers:
        weights = layer.adapter_weights
        found[path] = {
            "kernel": spec(layer._kernel),
            **{name: spec(weight) for name, weight in weights.items()},
            "momentum_a": spec(optimizer[id(layer.lora_kernel_a)]),
        }
    return found


def refused():
    """What is said of models that were built elsewhere."""
    keras.distribution.set_distribution(None)
    model, _ = dense()
    with data_parallel().scope():
        messages = [error_of(model)]
        model, _ = dense()
    return [*messages, error_of(model)]


def error_of(model):
    try:
        kld.enable_lora_dropout(model, rank=2)
    except ValueError as error:
        return str(error)
    return "none"


def spec(variable):
    axes = variable.value.sharding.spec
    return [*axes, *[None] * (len(variable.shape) - len(axes))]


def save(path, results):
    """Write `{run: {name: array}}` as one file."""
    np.savez(
        path,
        **{
            f"{title}|{name}": value
            for title, values in results.items()
            for name, value in values.items()
        },
    )


def one_process(folder):
    results, sent = {}, {}
    for title, options in SAMPLINGS.items():
        results[f"{title}|one"] = train("dense", None, **options)
        results[f"{title}|data"] = train("dense", data_parallel(), **options)
        sent[f"dense-{title}"] = traffic("dense", **options)
    for title, distribution in (("one", None), ("data", data_parallel())):
        results[f"deberta|{title}"] = train("deberta", distribution)
        results[f"hidden-key|{title}"] = train(
            "deberta", distribution, hidden_key=True
        )
        results[f"ensembles|{title}"] = ensembles(distribution)
        for name, options in LLAMAS.items():
            results[f"{name}|{title}"] = train("llama", distribution, **options)
    for name, options in LLAMAS.items():
        results[f"{name}|model"] = train("llama", model_parallel(), **options)
    for name in ("deberta", "llama"):
        for n in (1, 4):
            sent[f"{name}-{n}"] = traffic(name, num_samples=n)
    for title, values in resumed(folder).items():
        results[f"resumed|{title}"] = values
    save(folder / "results.npz", results)
    facts = {"sent": sent, "layouts": layouts(), "refused": refused()}
    (folder / "facts.json").write_text(json.dumps(facts))


def one_of_two_processes(folder, port, process):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    results = {
        f"{title}|processes": train(
            "dense", data_parallel(), **SAMPLINGS[title]
        )
        for title in TITLES_OF_PROCESSES
    }
    keras.distribution.set_distribution(model_parallel())
    model = build("llama")
    results["llama-lora|processes"] = run(model, *batches("llama"))
    model.save_adapters(folder / "shared")
    model.save_adapters(folder / f"adapters-{process}")
    save(folder / f"process-{process}.npz", results)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    if len(sys.argv) == 2:
        one_process(folder)
    else:
        one_of_two_processes(folder, *map(int, sys.argv[2:]))
