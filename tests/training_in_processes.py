"""Training runs that one process, or several together, do in the same way.

Each gives arrays by name: what `fit` logs, weights, and ranks.
"""

import sys

import dropping_models
import keras
import numpy as np
import torch
from helpers import adapted_mlp
from helpers import classification_data
from torch import distributed

import keras_lora_dropout as kld

EXAMPLES, BATCH, EPOCHS = 24, 12, 10
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def process():
    """Which of how many processes this one is."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def own(array):
    rank, count = process()
    return array[rank::count]


def batch_size():
    return BATCH // process()[1]


def model_of(adaptive=False, optimizer=None, compile_options=None, **options):
    if adaptive:
        options["rank_budget"] = kld.RankBudget(1)
    return adapted_mlp(
        {
            "optimizer": optimizer or keras.optimizers.Adam(0.02),
            "metrics": [keras.metrics.MeanIoU(3, "iou", sparse_y_pred=False)],
            "weighted_metrics": ["accuracy"],
            **(compile_options or {}),
        },
        **options,
    )


def fit(model, data=None, **options):
    """Train on this process's rows; return what `fit` logs."""
    x, y = data or classification_data(EXAMPLES)
    options = {"epochs": EPOCHS, "shuffle": False, "verbose": 0, **options}
    if y is not None:
        options = {"batch_size": batch_size(), **options}
        x, y = own(x), own(y)
    return model.fit(x, y, **options).history


def state(model, history=None):
    """Weights and logs of a run, by name."""
    arrays = {f"logs/{name}": value for name, value in (history or {}).items()}
    variables = model.weights + model.optimizer.variables
    for index, variable in enumerate(variables):
        key = f"weights/{index}/{variable.name}"
        arrays[key] = keras.ops.convert_to_numpy(variable)
    ranks = list(model.rank_pattern().values())
    return {**arrays, "ranks": ranks}


def trained(data=None, fit_options=None, **options):
    model = model_of(**options)
    return state(model, fit(model, data, **(fit_options or {})))


# Runs that are the same in one process and in several


def settings():
    """The settings of Algorithm 1 and of AdaLoRA, by name of the run."""
    return {
        f"{'adalora' if adaptive else 'lora'}-{n}-{sharing}-{sampling}": {
            "adaptive": adaptive,
            "num_samples": n,
            "mask_sharing": sharing,
            "sampling": sampling,
            "rank": 2,
        }
        for adaptive in (False, True)
        for n in (1, 4)
        for sharing in ("batch", "example")
        for sampling in ("parallel", "sequential")
    }


def balanced_masks():
    return trained(
        num_samples=4, mask_sharing="example", mask_sampling="balanced"
    )


def unequal_batches():
    """The last batch has seven rows, so that some processes have more."""
    return trained(
        classification_data(31), adaptive=True, mask_sharing="example"
    )


def weighted_examples():
    weights = np.linspace(0, 2, EXAMPLES).astype("float32")
    return trained(fit_options={"sample_weight": own(weights)})


def accumulated_gradients():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    return trained(adaptive=True, optimizer=optimizer)


def scaled_loss():
    """The first scales are too large for float32: steps are left out."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**127
    )
    return trained(adaptive=True, optimizer=optimizer)


def stopped_early():
    """Each process validates on its rows, in batches of its own number."""
    x, y = classification_data(13, seed=5)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.01)
    slower = keras.callbacks.ReduceLROnPlateau("val_accuracy", patience=1)
    ensemble = kld.EnsembleEvaluation((own(x), own(y)), batch_size=2)
    return trained(
        fit_options={
            "validation_data": (own(x), own(y)),
            "validation_batch_size": 2,
            "callbacks": [ensemble, stop, slower],
            "epochs": 40,
        },
    )


class Rows(keras.utils.PyDataset):
    """The rows of this process in each batch."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // BATCH

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return own(self.x[rows]), own(self.y[rows])


def py_dataset():
    rows = Rows(*classification_data(EXAMPLES))
    return trained((rows, None), mask_sharing="example")


def distributed_sampler():
    """Shuffled anew in each epoch, by `set_epoch`."""
    rank, count = process()
    data = torch.utils.data.TensorDataset(
        *map(torch.from_numpy, classification_data(EXAMPLES))
    )
    sampler = torch.utils.data.DistributedSampler(data, count, rank, seed=1)
    loader = torch.utils.data.DataLoader(data, batch_size(), sampler=sampler)
    anew = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: sampler.set_epoch(epoch)
    )
    return trained(
        (loader, None), {"callbacks": [anew]}, mask_sharing="example"
    )


def consistent(kind, **options):
    """Passes are compared, and nothing but the adapters' masks is drawn."""
    model = dropping_models.adapted(dropout_rate=0.3, **options)
    consistency = kld.Consistency(0.7, kind)
    kld.enable_transformer_dropout(model, consistency=consistency)
    dropping_models.compiled(model, optimizer=keras.optimizers.SGD(0.01))
    data = dropping_models.batch(31)  # The last batch has seven rows.
    return state(model, fit(model, data, epochs=2))


def consistent_instances():
    return consistent("kl", num_samples=3)


def consistent_passes():
    options = {"num_samples": 2, "sampling": "sequential"}
    return consistent("kl", mask_sharing="example", **options)


def consistent_mean():
    return consistent("js", num_samples=2)


def train_on_batch():
    """Outside of `fit`, steps are averaged, too."""
    model = model_of(mask_sharing="example")
    x, y = classification_data(BATCH)
    logs = [
        model.train_on_batch(own(x), own(y), return_dict=True) for _ in range(3)
    ]
    history = {name: [log[name] for log in logs] for name in logs[0]}
    return state(model, history)


SAME = {
    **{
        name: (lambda options=options: trained(**options))
        for name, options in settings().items()
    },
    **{
        run.__name__: run
        for run in (
            balanced_masks,
            unequal_batches,
            weighted_examples,
            accumulated_gradients,
            scaled_loss,
            stopped_early,
            py_dataset,
            distributed_sampler,
            consistent_instances,
            consistent_passes,
            consistent_mean,
            train_on_batch,
        )
    },
}


# Runs that go on elsewhere

HALF = EPOCHS // 2


def first_half(folder):
    """Train for half of the epochs, with a backup that process 0 writes."""
    writes = process()[0] == 0
    backup = keras.callbacks.BackupAndRestore(
        folder,
        save_freq="epoch" if writes else sys.maxsize,
        delete_checkpoint=False,
    )
    model = model_of(adaptive=True, mask_sharing="example")
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(
            model, "stop_training", epoch + 1 == HALF
        )
    )
    return state(model, fit(model, callbacks=[backup, stop]))


def second_half(folder):
    """Go on with the backup, in however many processes."""
    backup = keras.callbacks.BackupAndRestore(
        folder, save_freq=sys.maxsize, delete_checkpoint=False
    )
    # Nothing of it is left once the backup is restored.
    model = model_of(adaptive=True, mask_sharing="example", rank=2, seed=9)
    history = fit(model, callbacks=[backup])
    assert len(history["loss"]) == EPOCHS - HALF
    return state(model, history)


def whole():
    return trained(adaptive=True, mask_sharing="example")
