"""What to drive the public names with that need no model."""

import functools
import json
import math

import keras
import numpy as np
from fuzzing import Call
from fuzzing import one_of
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import keras_lora_dropout as kld
from keras_lora_dropout import theory

RANK = one_of(1, 2, 3, np.int64(2), np.uint8(3))
ALPHA = one_of(None, 1, 16, 0.5, 1e-20, np.float32(2), 1e20)
RATE = one_of(0, 0.0, 0.25, 0.5, 0.9, np.float32(0.1), np.float16(0.5))
BOOLEAN = st.booleans()
SEED = one_of(None, 0, 7, 2**31 - 1, np.int32(3))
POSITIVE = one_of(1, 2, 0.5, 1e-3, 100.0, np.float32(0.5), 1e-99, 1e99)
NAME = one_of("metric", "ü")


# Layers.

ADAPTER = {
    "rank": RANK,
    "alpha": ALPHA,
    "dropout_rate": RATE,
    "rescale": BOOLEAN,
    "seed": SEED,
}
# Positional arguments of the Keras layer, and the shape of an input.
LAYERS = {
    "Dense": ((5,), (2, 4)),
    "EinsumDense": (("ab,bc->ac", 5), (2, 4)),
    "Conv1D": ((4, 2), (2, 3, 4)),
    "Conv2D": ((4, 2), (1, 3, 3, 4)),
    "Conv3D": ((4, 2), (1, 3, 3, 3, 4)),
    "DepthwiseConv1D": ((2,), (2, 3, 4)),
    "DepthwiseConv2D": ((2,), (1, 3, 3, 4)),
    "Embedding": ((6, 4), (2, 3)),
    "ReversibleEmbedding": ((6, 4), (2, 3)),
}


def make_and_build(cls, **arguments):
    positional, shape = LAYERS[cls.__name__.partition("LoRADropout")[2]]
    layer = cls(*positional, **arguments)
    inputs = np.ones(shape, "float32")
    return layer, layer(inputs), layer(inputs, training=True), inputs


def check_layer(result, arguments):
    layer, mean, masked, inputs = result
    assert layer.lora_rank == arguments["rank"]
    assert type(layer.lora_rank) is int
    assert layer.dropout_rate == float(arguments["dropout_rate"]) < 1
    alpha = arguments["alpha"]
    wanted = arguments["rank"] if alpha is None else alpha
    assert layer.lora_alpha == float(wanted)
    assert layer.rescale is arguments["rescale"]
    assert layer.seed == arguments["seed"]
    layer.adapter_enabled = False
    for outputs in (mean, masked):  # Fresh adapters change nothing.
        np.testing.assert_array_equal(array(outputs), array(layer(inputs)))
    config = json.dumps(layer.get_config())
    copy = type(layer).from_config(json.loads(config))
    assert json.dumps(copy.get_config()) == config


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def layer_calls():
    for name, cls in vars(kld).items():
        if "LoRADropout" in name and issubclass(cls, keras.Layer):
            if not issubclass(cls, keras.Model):
                make = functools.partial(make_and_build, cls)
                yield name, Call(make, ADAPTER, check_layer)


# Settings.


def check_settings(result, arguments):
    """What was given is what is kept, as numbers that JSON knows."""
    for name, given in arguments.items():
        kept = getattr(result, name)
        assert type(kept) in (int, float, str, bool, type(None)), name
        kind = type(kept)  # `1/3` is kept as the nearest float.
        assert kept == (kind(given) if kind in (int, float) else given)
    hash(result)


def check_budget(budget, arguments):
    check_settings(budget, arguments)
    assert kld.RankBudget.from_config(budget.get_config()) == budget
    json.dumps(budget.get_config())


def check_schedule(schedule, arguments):
    """The budget falls from the first to the last, within the run."""
    total = arguments["total_steps"]
    steps = {1, total // 3, total // 2, total - 1, total} - {0}
    budgets = [schedule.budget(step) for step in sorted(steps)]
    assert budgets == sorted(budgets, reverse=True)
    assert all(0 <= b <= sum(arguments["ranks"]) for b in budgets)
    assert 0 <= schedule.warmup_steps < schedule.freeze_step <= total
    assert 1 <= schedule.mask_interval <= 2**31 - 1


BUDGET = kld.RankBudget(2, warmup_steps=0.1, final_steps=0.2)
STEPS = one_of(0, 1, 5, np.int64(3), 0.1, 0.0, 0.5, np.float32(0.25))
PATTERN = one_of("element", "column", "span")


def check_bound(bound, arguments):
    check_settings(bound, arguments)
    for value in (bound.stability([0, 0.3, 1]), bound.gap([0, 0.3, 1])):
        assert value.shape == (3,)
        assert not np.isnan(value).any()
        assert (value >= 0).all()
        assert (np.diff(value[np.isfinite(value)]) <= 0).all()


RATES = st.one_of(
    st.floats(0, 1),
    st.integers(0, 1),
    st.lists(st.floats(0, 1), max_size=3),
    st_numpy.arrays("float32", (2, 2), elements=st.floats(0, 1, width=32)),
)


def check_sparsity(result, arguments):
    result = np.asarray(result)
    assert result.shape == np.shape(arguments["dropout_rate"])
    assert ((result >= 0) & (result <= 1)).all()


def check_bound_at(result, arguments):
    result = np.asarray(result)
    assert result.shape == np.shape(arguments["dropout_rate"])
    assert (result >= 0).all()


BOUND = theory.GeneralizationBound(100)


def check_hidden_key(result, arguments):
    assert result["attention"].rate == float(arguments["attention_rate"])
    assert result["hidden"].rate == float(arguments["hidden_rate"])
    weight = arguments["kl_weight"]
    assert (result["consistency"] is None) == (weight is None)


def scaled(optimizer, learning_rate_ratio):
    kinds = keras.optimizers.SGD, keras.optimizers.Adam
    if any(optimizer is kind for kind in kinds):
        optimizer = optimizer(1e-3)
    return kld.lora_plus(optimizer, learning_rate_ratio)


def check_terminates(callback, arguments):
    assert callback.every == arguments["every"]
    assert callback.restore is arguments["restore"]


def check_lora_plus(result, arguments):
    second, first = (float(array(o.learning_rate)) for o in result.optimizers)
    assert 0 < first < math.inf
    ratio = float(arguments["learning_rate_ratio"])
    assert math.isclose(second, first * ratio, rel_tol=1e-6)
    assert math.isfinite(second)


SETTINGS = {
    "RankBudget": Call(
        kld.RankBudget,
        {
            "target_rank": one_of(0, 1, 2, np.int64(2)),
            "initial_rank": one_of(None, 2, 3, np.int32(3)),
            "warmup_steps": STEPS,
            "final_steps": STEPS,
            "mask_interval": one_of(1, 4, 0.1, np.int64(3)),
            "total_steps": one_of(None, 20, np.int64(50), 2**31 - 1),
            "beta_1": one_of(0.5, 0.85, np.float32(0.5)),
            "beta_2": one_of(0.5, 0.85),
            "orthogonal_penalty": one_of(0, 0.5, 3, np.float32(0.5)),
            "orthogonal_form": one_of("squared_norms", "mean_norm"),
        },
        check_budget,
        count=150,
    ),
    "RankBudget.phases": Call(
        BUDGET.phases, {"total_steps": one_of(1, 10, 99, np.int64(50))}
    ),
    "RankBudget.schedule": Call(
        BUDGET.schedule,
        {
            "total_steps": one_of(1, 10, 99, np.int64(50), 10**9),
            "ranks": one_of([3], [2, 2], (4, 3, np.int64(2))),
        },
        check_schedule,
    ),
    "Consistency": Call(
        kld.Consistency,
        {
            "weight": POSITIVE,
            "kind": one_of("kl", "js"),
            "compares": one_of("auto", "outputs", "representations"),
        },
        check_settings,
    ),
    "DropKey": Call(
        kld.DropKey, {"rate": RATE, "pattern": PATTERN}, check_settings
    ),
    "DropAttention": Call(
        kld.DropAttention, {"rate": RATE, "pattern": PATTERN}, check_settings
    ),
    "HiddenCut": Call(
        kld.HiddenCut,
        {"rate": RATE, "pattern": PATTERN, "rescale": BOOLEAN},
        check_settings,
    ),
    "hidden_key": Call(
        kld.hidden_key,
        {
            "attention_rate": RATE,
            "hidden_rate": RATE,
            "kl_weight": one_of(None, 1, 0.5),
        },
        check_hidden_key,
    ),
    "TerminateOnNonFinite": Call(
        kld.TerminateOnNonFinite,
        {"every": one_of(1, 100, np.int64(2)), "restore": BOOLEAN},
        check_terminates,
    ),
    "lora_plus": Call(
        scaled,
        {
            "optimizer": one_of(keras.optimizers.SGD, keras.optimizers.Adam),
            "learning_rate_ratio": one_of(1, 16, 0.5, np.float32(2)),
        },
        check_lora_plus,
    ),
    "sparsity": Call(theory.sparsity, {"dropout_rate": RATES}, check_sparsity),
    "GeneralizationBound": Call(
        theory.GeneralizationBound,
        {
            "num_examples": one_of(1, 512, np.int64(9), 10**12),
            "lipschitz": POSITIVE,
            "smallest_eigenvalue": one_of(0, 0.1, 1e-300, 1e99),
            "regularization": one_of(0, 1, 1e-300, 1e99),
            "loss_range": POSITIVE,
            "failure_probability": one_of(0.05, 5e-324, 0.999),
        },
        check_bound,
        count=150,
    ),
    "GeneralizationBound.stability": Call(
        BOUND.stability, {"dropout_rate": RATES}, check_bound_at
    ),
    "GeneralizationBound.gap": Call(
        BOUND.gap, {"dropout_rate": RATES}, check_bound_at
    ),
}


# Metrics.

LABELS = one_of(
    [0, 1], [[1], [0]], [[1, 0], [0, 1]], np.array([0.0, 1.0]), [0, 1, 1], 1
)
PREDICTIONS = one_of(
    [[0.75, 0.25], [0.5, 0.5]],
    [[0.1], [0.9]],
    [0.2, 1.0],
    np.float16([[1.0, 0.0], [0.0, 1.0]]),
)
WEIGHTS = one_of(None, [1, 2], [[0.5], [0.5]], [0.0, 0.0], 2.0)


def measured(cls, num_bins=None, *, from_logits, name, dtype, **data):
    options = {} if num_bins is None else {"num_bins": num_bins}
    metric = cls(from_logits=from_logits, name=name, dtype=dtype, **options)
    return updated(metric, **data)


def updated(metric, **data):
    before = [array(variable) for variable in metric.variables]
    try:
        metric.update_state(**data)
    except Exception:
        for old, variable in zip(before, metric.variables, strict=True):
            np.testing.assert_array_equal(array(variable), old)
        raise
    return metric


def check_metric(metric, arguments):
    names = "y_pred", "sample_weight"
    given = [
        array(arguments[name]) for name in names if arguments[name] is not None
    ]
    if all((np.abs(values) <= 1e6).all() for values in given):
        assert math.isfinite(metric.result())
    config = json.loads(json.dumps(metric.get_config()))
    assert type(metric).from_config(config).get_config() == config


METRIC = {
    "from_logits": BOOLEAN,
    "name": NAME,
    "dtype": one_of(None, "float32"),
    "y_true": LABELS,
    "y_pred": PREDICTIONS,
    "sample_weight": WEIGHTS,
}
METRICS = {
    "ExpectedCalibrationError": Call(
        functools.partial(measured, kld.ExpectedCalibrationError),
        {"num_bins": one_of(1, 15, np.int64(3)), **METRIC},
        check_metric,
        keras=("name", "dtype"),
        count=150,
    ),
    "BrierScore": Call(
        functools.partial(measured, kld.BrierScore),
        METRIC,
        check_metric,
        keras=("name", "dtype"),
        count=150,
    ),
}


CALLS = {**dict(layer_calls()), **SETTINGS, **METRICS}
