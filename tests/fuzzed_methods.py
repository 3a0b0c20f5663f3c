"""What to drive the public names with that act on models."""

import functools

import fuzzed_models
import keras
import numpy as np
from fuzzed_calls import ADAPTER
from fuzzed_calls import ALPHA
from fuzzed_calls import BOOLEAN
from fuzzed_calls import RANK
from fuzzed_calls import RATE
from fuzzed_calls import SEED
from fuzzed_calls import array
from fuzzed_models import TOKENS
from fuzzed_models import X
from fuzzed_models import Y
from fuzzing import ODD_PATHS
from fuzzing import Call
from fuzzing import one_of
from helpers import adapted_mlp
from helpers import tiny_mlp
from hypothesis import strategies as st

import keras_lora_dropout as kld
from keras_lora_dropout import baselines
from keras_lora_dropout import theory
from keras_lora_dropout.instruction_tuning import packing

COUNT = one_of(None, 1, 2, 3, np.int64(2))
BUDGET = one_of(None, kld.RankBudget(1), kld.RankBudget(2, total_steps=50))
BLOCKS = one_of("all", "first 1", "last 2", [0], [-1], range(2), (np.int64(1),))
LAYERS = one_of(
    "head", None, ["head"], "^head$", lambda path, layer: path == "head"
)

# What holds.


def same_outputs(model, before, inputs):
    after = array(model(inputs))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def called(build):
    """Build a model that remembers what it made of its first inputs."""
    model = build()
    model.first_inputs = np.ones((2, *model.input_shape[1:]), "float32")
    model.first_outputs = array(model(model.first_inputs))
    return model


def check_enabled(result, model, arguments):
    assert result is model
    inputs, before = model.first_inputs, model.first_outputs
    settings = model.lora_dropout
    assert settings.num_samples == arguments["num_samples"]
    if arguments["init_lora_weights"] != "olora" or arguments["alpha"] is None:
        same_outputs(model, before, inputs)  # Else large numbers cancel.
    assert np.isfinite(array(model(inputs, training=True))).all()
    budget = arguments["rank_budget"]
    for _, layer in model.adapted_layers:
        if not arguments["rank_pattern"] and budget is None:
            assert layer.lora_rank == arguments["rank"]
        assert layer.dropout_rate == float(arguments["dropout_rate"])
    model.save_adapters("saved")  # What it holds is what JSON can hold.


def made(**arguments):
    x = inputs = keras.Input((6,))
    layer = kld.AdaLoRADropoutDense
    if arguments["rank_budget"] is None:
        layer = kld.LoRADropoutDense
    x = layer(8, rank=2)(x)
    return kld.LoRADropoutModel(inputs, keras.layers.Dense(3)(x), **arguments)


def check_made(model, arguments):
    assert model.lora_dropout.num_samples == arguments["num_samples"]
    assert np.isfinite(array(model(X, training=True))).all()
    model.save_adapters("saved")


def check_predicted(result, model, arguments):
    rows = len(arguments["x"])
    if arguments["steps"] not in (None, 1):
        return  # Keras has its own idea of it.
    if arguments["steps"] is not None:
        rows = min(rows, arguments["steps"] * (arguments["batch_size"] or 32))
    shape = (rows, 3)
    if arguments["return_samples"]:
        shape = (arguments["num_samples"] or 4, *shape)
    assert result.shape == shape
    assert np.isfinite(result).all()
    if arguments["average"] == "probability":
        assert (result >= 0).all()
        np.testing.assert_allclose(result.sum(-1), 1, rtol=1e-5)
    if arguments["seed"] is not None:
        again = model.ensemble_predict(**arguments)
        np.testing.assert_array_equal(result, again)


def check_evaluated(result, model, arguments):
    values = result.values() if arguments["return_dict"] else result
    assert np.isfinite(list(values)).all()


def check_added(result, model, arguments):
    name = arguments["name"]
    assert model.adapter_names == ["default", name]
    before = array(model(X))
    model.set_adapter(name)
    model.save_adapters("saved")
    assert np.isfinite(array(model(X, training=True))).all()
    model.set_adapter("default")
    np.testing.assert_array_equal(array(model(X)), before)


def check_set(result, model, arguments):
    assert model.active_adapter == arguments["name"]


def check_deleted(result, model, arguments):
    assert arguments["name"] not in model.adapter_names


def check_merged(result, model, arguments):
    assert result is model
    assert not isinstance(model, kld.LoRADropoutModel)
    assert not hasattr(model, "adapted_layers")


def check_ensemble(result, model, arguments):
    assert np.isfinite(array(result(X))).all()
    if arguments["seed"] is not None:
        expected = model.ensemble_predict(X, verbose=0, **arguments)
        same_outputs(result, expected, X)


def check_instances(result, model, arguments):
    result = list(result)
    assert len(result) == (arguments["num_samples"] or 4)


def check_dropping(result, model, arguments):
    assert result is model
    dropped = model.transformer_dropout
    for name in ("attention", "hidden", "consistency"):
        assert getattr(dropped, name) is arguments[name]


def check_generated(result, model, arguments):
    assert result["token_ids"].shape == TOKENS["token_ids"].shape


def check_gain(result, model, arguments):
    if np.all(array(given(arguments["sample_weight"], 1)) >= 0):
        assert result.gain >= -1e-5


def check_same(result, model, arguments):
    assert result is model


def evaluated(model, validation_data, **arguments):
    """What the callback adds to the logs of an epoch."""
    callback = kld.EnsembleEvaluation(validation_data, **arguments)
    logs = {}
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, logs)
    return logs


def check_logs(logs, model, arguments):
    assert set(logs) == {"ensemble_val_accuracy", "ensemble_val_loss"}
    assert np.isfinite(list(logs.values())).all()


def given(value, otherwise):
    return otherwise if value is None else value


SAMPLING = {
    "num_samples": one_of(1, 2, 4, np.int64(3)),
    "mask_sharing": one_of("batch", "example"),
    "mask_sampling": one_of("bernoulli", "balanced"),
    "sampling": one_of("parallel", "sequential"),
    "seed": SEED,
}
ENABLING = {
    **ADAPTER,
    **SAMPLING,
    "rank_budget": BUDGET,
    "target_layers": one_of(
        "all-linear",
        "first|one",
        lambda path, layer: "head" not in path and not path.endswith("head"),
    ),
    "exclude_layers": one_of(None, "nothing", ("head",)),
    "blocks": st.just("all"),
    "rank_pattern": one_of(None, {"first|one/.*": 1}),
    "alpha_pattern": one_of(None, {"first|one/.*": np.float32(3)}),
    "use_rslora": BOOLEAN,
    "use_dora": BOOLEAN,
    "init_lora_weights": one_of(
        *("he_uniform", "he_uniform", "gaussian", "orthogonal"),
        *("pissa", "olora", "pissa_niter_2", "pissa_niter_0"),
    ),
    "trainable_layers": LAYERS,
    "optimize": BOOLEAN,
}
DATA = {
    "x": one_of(X, X[:1], X.astype("float16")),
    "batch_size": one_of(None, 1, 3, np.int64(2)),
    "num_samples": COUNT,
    "seed": SEED,
    "average": one_of("output", "probability"),
    "include_transformer_dropout": st.just(False),
    "verbose": one_of(0),
    "steps": one_of(None, 1),
    "callbacks": one_of(None, []),
}
KERAS_DATA = "x", "verbose", "steps", "callbacks"
PATH = {"odd": {"path": ODD_PATHS, "directory": ODD_PATHS}}

CALLS = {
    "enable_lora_dropout": Call(
        kld.enable_lora_dropout,
        ENABLING,
        check_enabled,
        subject=functools.partial(called, tiny_mlp),
        count=200,
    ),
    "enable_lora_dropout of blocks": Call(
        kld.enable_lora_dropout,
        ENABLING | {"blocks": BLOCKS, "rank": one_of(1, 2)},
        check_enabled,
        subject=functools.partial(called, fuzzed_models.attention),
        count=50,
    ),
    "LoRADropoutModel": Call(
        made, SAMPLING | {"rank_budget": BUDGET}, check_made
    ),
    "ensemble_predict": Call(
        kld.LoRADropoutModel.ensemble_predict,
        DATA | {"return_samples": BOOLEAN},
        check_predicted,
        subject=fuzzed_models.eager,
        keras=KERAS_DATA,
    ),
    "ensemble_evaluate": Call(
        kld.LoRADropoutModel.ensemble_evaluate,
        DATA
        | {
            "x": one_of(X),
            "y": one_of(Y),
            "sample_weight": one_of(None, np.ones(4)),
            "return_dict": BOOLEAN,
        },
        check_evaluated,
        subject=fuzzed_models.eager,
        keras=(*KERAS_DATA, "y", "sample_weight", "return_dict"),
        count=40,
    ),
    "ensemble_gain": Call(
        theory.ensemble_gain,
        {
            "x": one_of(X),
            "y": one_of(Y),
            "sample_weight": one_of(None, np.ones(4)),
            "num_samples": COUNT,
            "batch_size": one_of(None, 1, 3),
            "seed": SEED,
            "verbose": one_of(0),
        },
        check_gain,
        subject=fuzzed_models.eager,
        keras=("x", "y", "sample_weight", "verbose"),
        count=30,
    ),
    "EnsembleEvaluation": Call(
        evaluated,
        {
            "validation_data": one_of((X, Y), (X, Y, np.ones(4))),
            "num_samples": COUNT,
            "batch_size": one_of(None, 3),
            "seed": SEED,
            "average": one_of("output", "probability"),
        },
        check_logs,
        subject=fuzzed_models.eager,
        keras=("validation_data",),
        count=40,
    ),
    "ensemble_generate": Call(
        kld.LoRADropoutModel.ensemble_generate,
        {
            "inputs": st.just(TOKENS),
            "max_length": one_of(None, 4),
            "stop_token_ids": one_of(None, [9]),
            "strip_prompt": st.just(False),
            "num_samples": one_of(None, 1, np.int64(2)),
            "seed": SEED,
            "average": one_of("output", "probability"),
            "return_uncertainty": st.just(False),
        },
        check_generated,
        subject=fuzzed_models.adapted_llama,
        keras=("inputs", "max_length", "stop_token_ids", "strip_prompt"),
        count=20,
    ),
    "save_adapters": Call(
        kld.LoRADropoutModel.save_adapters,
        {"path": one_of("saved", b"saved".decode())},
        subject=fuzzed_models.eager,
        errors=(OSError,),
        count=30,
        **PATH,
    ),
    "load_adapters": Call(
        kld.LoRADropoutModel.load_adapters,
        {"path": one_of("nowhere", "saved"), "check_fingerprint": BOOLEAN},
        subject=fuzzed_models.saved,
        errors=(OSError,),
        **PATH,
    ),
    "add_adapter": Call(
        kld.LoRADropoutModel.add_adapter,
        {
            "name": one_of("other", "ü", "a/b"),
            "path": one_of(None),
            "rank": st.one_of(st.none(), RANK),
            "alpha": ALPHA,
            "dropout_rate": st.one_of(st.none(), RATE),
            "rescale": one_of(None, True, False),
            "rank_budget": BUDGET,
            "seed": SEED,
        },
        check_added,
        subject=fuzzed_models.eager,
        errors=(OSError,),
        **PATH,
    ),
    "set_adapter": Call(
        kld.LoRADropoutModel.set_adapter,
        {"name": one_of("other", "default")},
        check_set,
        subject=fuzzed_models.with_two,
    ),
    "delete_adapter": Call(
        kld.LoRADropoutModel.delete_adapter,
        {"name": one_of("other")},
        check_deleted,
        subject=fuzzed_models.with_two,
    ),
    "merge_adapters": Call(
        kld.LoRADropoutModel.merge_adapters,
        {"keep_kernels": BOOLEAN},
        check_merged,
        subject=adapted_mlp,
    ),
    "unmerge_adapters": Call(
        lambda model, other: kld.unmerge_adapters(given(other, model)),
        {"other": one_of(None)},
        check_same,
        subject=fuzzed_models.merged,
        count=30,
    ),
    "merge_instances": Call(
        kld.LoRADropoutModel.merge_instances,
        {"num_samples": COUNT, "seed": SEED},
        check_instances,
        subject=fuzzed_models.eager,
        count=30,
    ),
    "as_ensemble": Call(
        kld.LoRADropoutModel.as_ensemble,
        {
            "num_samples": COUNT,
            "seed": SEED,
            "average": one_of("output", "probability"),
        },
        check_ensemble,
        subject=fuzzed_models.eager,
        count=30,
    ),
    "export_peft": Call(
        kld.LoRADropoutModel.export_peft,
        {
            "directory": one_of("peft"),
            "instances": one_of(0, 1, np.int64(2)),
            "seed": SEED,
            "base_model_name_or_path": one_of(None, "bert-base", "ü"),
        },
        subject=fuzzed_models.adapted_bert,
        errors=(OSError,),
        count=30,
        **PATH,
    ),
    "import_peft": Call(
        fuzzed_models.imported,
        {
            "directory": one_of("exported"),
            "num_samples": SAMPLING["num_samples"],
            "dropout_rate": RATE,
            "seed": SEED,
        },
        subject=fuzzed_models.bert,
        errors=(OSError,),
        count=30,
        **PATH,
    ),
    "adapter_summary": Call(
        kld.LoRADropoutModel.adapter_summary,
        {
            "line_length": one_of(None, 40, 1, np.int64(80)),
            "print_fn": st.just(len),
        },
        subject=fuzzed_models.eager,
        count=30,
    ),
    "enable_transformer_dropout": Call(
        kld.enable_transformer_dropout,
        {
            "attention": one_of(None, kld.DropKey(0.5), kld.DropAttention()),
            "hidden": one_of(None),
            "consistency": one_of(None, kld.Consistency()),
            "blocks": st.one_of(st.just("auto"), BLOCKS),
        },
        check_dropping,
        subject=fuzzed_models.adapted_attention,
        count=100,
    ),
    "enable_bitfit": Call(
        baselines.enable_bitfit,
        {"trainable_layers": LAYERS},
        check_same,
        subject=tiny_mlp,
    ),
    "enable_bottleneck_adapters": Call(
        baselines.enable_bottleneck_adapters,
        {
            "bottleneck_size": one_of(1, 2, np.int64(3)),
            "placement": one_of("houlsby", "pfeiffer"),
            "activation": one_of("gelu", "relu", keras.ops.tanh),
            "use_bias": BOOLEAN,
            "trainable_layers": one_of("head", None),
            "seed": SEED,
        },
        check_same,
        subject=fuzzed_models.bert,
        keras=("activation",),
    ),
    "ExtractiveQA": Call(
        lambda model, backbone: kld.ExtractiveQA(given(backbone, model)),
        {"backbone": one_of(None)},
        subject=fuzzed_models.bert,
        count=30,
    ),
    "isolate_packed_examples": Call(
        lambda model, other: packing.isolate_packed_examples(
            given(other, model)
        ),
        {"other": one_of(None)},
        check_same,
        subject=fuzzed_models.llama,
        count=30,
    ),
}
