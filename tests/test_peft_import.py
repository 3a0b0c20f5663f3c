"""PEFT's folders: what is read, what is written, and what is refused."""

import json
import struct

import numpy as np
import peft_models
import peft_twins
import pytest
from helpers import assert_close
from helpers import randomize
from helpers import set_random
from helpers import tiny_mlp
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
from keras import ops
from keras_hub import models
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_lora_dropout as kld
from keras_lora_dropout.storage.peft_reading import read_peft
from keras_lora_dropout.storage.tensor_files import read_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
DEBERTA = next(t for t in peft_twins.TWINS if t.name == "deberta_v3")
QUERY = "disentangled_attention_encoder_layer_{}/self_attention_layer/query"
QUERY_PROJ = "deberta.encoder.layer.{}.attention.self.query_proj"


def plain():
    """A tiny DeBERTaV3 classifier, always with the same weights."""
    return peft_models.plain(DEBERTA, None)


def adapted(seed=0, **options):
    options = {"rank": 2, "dropout_rate": 0.5, "seed": seed, **options}
    model = kld.enable_lora_dropout(plain(), **options)
    randomize(model, seed)
    set_random(model.trainable_weights, seed, 0.3)
    return model


def of_queries(**options):
    return adapted(target_layers=["query"], **options)


def predictions(model):
    """The mean network's logits, and those of an ensemble."""
    return (
        peft_models.logits(model, DEBERTA),
        peft_models.logits(model, DEBERTA, seed=3, num_samples=2),
    )


@pytest.fixture
def exported(tmp_path):
    """A folder with an adapter of the queries."""
    of_queries(seed=1).export_peft(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def assert_refused(model, folder, *parts):
    """The import fails, says why, and changes nothing."""
    before = [(v.path, ops.convert_to_numpy(v).copy()) for v in model.variables]
    alphas = [layer.lora_alpha for _, layer in model.adapted_layers]
    with pytest.raises(ValueError) as failure:
        model.import_peft(folder)
    for part in parts:
        assert part in str(failure.value)
    for (path, value), variable in zip(before, model.variables, strict=True):
        assert variable.path == path
        assert np.array_equal(ops.convert_to_numpy(variable), value), path
    assert alphas == [layer.lora_alpha for _, layer in model.adapted_layers]


# Round trips.


@pytest.mark.parametrize("rescale", [False, True])
def test_a_lora_comes_back_as_it_was(tmp_path, rescale):
    source = of_queries(seed=1, alpha=3, rescale=rescale)
    source.export_peft(tmp_path)
    # Compiled for other factors, strengths and head.
    model = of_queries(rank=3, rescale=rescale)
    before = predictions(model)
    model.import_peft(tmp_path)
    for ours, theirs, old in zip(
        predictions(model), predictions(source), before, strict=True
    ):
        assert_close(ours, theirs, 1e-5)
        assert np.abs(ours - old).max() > 1e-2
    assert [layer.lora_alpha for _, layer in model.adapted_layers] == [3, 3]


def test_only_the_strength_changes_and_is_compiled_anew(exported):
    model = of_queries(seed=1)
    model.compile("sgd", "mse", metrics=[])
    x = peft_models.inputs(model, DEBERTA)
    y = np.zeros((len(peft_twins.LENGTHS), peft_twins.NUM_CLASSES))
    before = predictions(model), model.evaluate(x, y, verbose=0)
    change_config(exported, lora_alpha=4)
    model.import_peft(exported)
    fresh = kld.import_peft(plain(), exported, dropout_rate=0.5)
    fresh.compile("sgd", "mse", metrics=[])
    after = predictions(model), model.evaluate(x, y, verbose=0)
    expected = predictions(fresh)
    for ours, theirs in zip(after[0], expected, strict=True):
        assert_close(ours, theirs, 1e-6)
    assert np.abs(after[0][1] - before[0][1]).max() > 1e-2
    assert_close(after[1], fresh.evaluate(x, y, verbose=0), 1e-5)
    history = model.fit(x, y, shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_an_adalora_comes_back_as_it_was(tmp_path):
    source = adapted(rank=4, rank_budget=kld.RankBudget(2), seed=1)
    peft_models._prune(source)
    source.export_peft(tmp_path)
    pattern = source.rank_pattern()
    model = adapted(rank=4, rank_budget=kld.RankBudget(2))
    model.compact_ranks()
    model.import_peft(tmp_path)
    assert model.rank_pattern() == pattern
    assert min(pattern.values()) == 0
    assert_close(predictions(model)[0], predictions(source)[0], 1e-5)


def test_singular_values_stay_apart_only_where_the_layers_have_them(tmp_path):
    source = of_queries(rank=3, rank_budget=kld.RankBudget(2), seed=1)
    source.export_peft(tmp_path / "adalora")
    expected = predictions(source)[0]
    plain_lora = of_queries(rank=2)
    plain_lora.import_peft(tmp_path / "adalora")
    assert_close(predictions(plain_lora)[0], expected, 1e-5)
    plain_lora.export_peft(tmp_path / "lora")
    adaptive = of_queries(rank=3, rank_budget=kld.RankBudget(2), seed=2)
    adaptive.import_peft(tmp_path / "lora")
    assert_close(predictions(adaptive)[0], expected, 1e-5)
    for _, layer in adaptive.adapted_layers:
        assert_close(layer.lora_lambda, np.ones(3))


def test_a_backbone_exports_what_a_task_reads(tmp_path):
    source = kld.enable_lora_dropout(
        plain().backbone, rank=2, target_layers=["query"], seed=0
    )
    randomize(source)
    source.export_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert config["modules_to_save"] is None
    assert all(name.startswith("encoder.") for name in config["target_modules"])
    model = kld.import_peft(plain(), tmp_path)
    for (_, theirs), (_, ours) in zip(
        source.adapted_layers, model.adapted_layers, strict=True
    ):
        for ours_factor, factor in zip(
            ours.factors, theirs.factors, strict=True
        ):
            assert_close(ours_factor, factor)


def test_other_trained_weights_are_saved_too(tmp_path):
    layer = "rel_embeddings_layer_norm"
    source = of_queries(trainable_layers=[layer, "logits"])
    source.export_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["modules_to_save"] == [
        "classifier",
        "deberta.encoder.LayerNorm",
        "pooler.dense",
    ]
    model = kld.import_peft(plain(), tmp_path)
    assert_close(predictions(model)[0], predictions(source)[0], 1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_other_widths_of_floats_are_read(exported, dtype):
    expected = read_tensors(exported / TENSORS)
    header, data, start = {}, b"", 0
    for name, value in expected.items():
        if dtype == "BF16":
            raw = (value.view("uint32") >> 16).astype("<u2").tobytes()
        else:
            raw = value.astype({"F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [start, start + len(raw)],
        }
        data, start = data + raw, start + len(raw)
    text = json.dumps(header).encode()
    (exported / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    model = of_queries()
    model.import_peft(exported)
    actual = read_tensors(exported / TENSORS)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-2, atol=1e-3)


def test_patterns_fit_the_end_of_names_in_their_order(tmp_path):
    folder = tmp_path / "adapter"
    of_queries(seed=1, rank=4).export_peft(folder)
    change_config(
        folder,
        r=2,
        rank_pattern={"query_proj": 4},
        alpha_pattern={
            r"layer\.1\.attention.self.query_proj": 1,
            "query_proj": 8,
            "proj": 5,
        },
    )
    adapter, problems = read_peft(folder)
    assert not problems
    scalings = {name: m.scaling for name, m in adapter.modules.items()}
    assert scalings == {QUERY_PROJ.format(0): 2, QUERY_PROJ.format(1): 0.25}


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
        ({"peft_type": None}, '"LORA" and "ADALORA" are read'),
        ({"use_qalora": True}, "QALoRA cannot be read"),
        ({"bias": "all"}, 'only bias="none"'),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
        ({"init_lora_weights": "pissa"}, "which changes the base model"),
        ({"lora_alpha": 0}, "only positive ones"),
        ({"r": "2"}, "`r` is '2', not a positive integer"),
        ({"r": 3}, "the configuration says rank 3"),
        ({"rank_pattern": {"(": 2}}, "`rank_pattern` has the entry '('"),
        ({"rank_pattern": {"query_proj": 7}}, "says rank 7"),
        ({"alpha_pattern": {"q": -1}}, "`alpha_pattern` has the entry 'q'"),
        ({"alpha_pattern": [2]}, "`alpha_pattern` is [2], not a dictionary"),
        ({"peft_type": "ADALORA"}, "is no factor of a linear layer"),
    ],
)
def test_unsupported_settings_are_refused(exported, changes, message):
    change_config(exported, **changes)
    assert_refused(of_queries(), exported, message)


def test_all_differences_are_named_at_once(exported):
    def change(tensors):
        first = f"base_model.model.{QUERY_PROJ.format(0)}"
        second = f"base_model.model.{QUERY_PROJ.format(1)}"
        del tensors[f"{first}.lora_B.weight"]
        tensors[f"{second}.lora_A.weight"] = np.zeros((2, 5), "float32")
        stranger = "base_model.model.deberta.encoder.layer.9.output.dense"
        tensors[f"{stranger}.lora_A.weight"] = np.zeros((2, 16), "float32")
        tensors[f"{stranger}.lora_B.weight"] = np.zeros((16, 2), "float32")
        tensors["base_model.model.score.weight"] = np.zeros((2, 2), "float32")
        tensors["base_model.model.classifier.bias"] = np.zeros(7, "float32")
        tensors["base_model.model.pooler.dense.bias"] = np.zeros(16, "int32")

    change_tensors(exported, change)
    change_config(exported, use_qalora=True)
    assert_refused(
        of_queries(),
        exported,
        "QALoRA cannot be read",
        f'"{QUERY_PROJ.format(0)}" lacks lora_B',
        f'"{QUERY_PROJ.format(1)}" maps 5 features to 16',
        '"deberta.encoder.layer.9.output.dense" is no linear layer',
        'the weight "score.weight" has no counterpart',
        'the weight "classifier.bias" has shape (7,), not (3,)',
        'pooler.dense.bias" holds no floating-point numbers',
        "which is unchanged",
    )


def test_layers_that_only_one_side_adapts_are_named(exported):
    model = adapted(target_layers=["value", QUERY.format(0)])
    value = QUERY.format(1).replace("query", "value")
    assert_refused(
        model,
        exported,
        f"'{value}'], which the adapter lacks",
        f"the adapter has ['{QUERY.format(1)}'], which the model does not",
        "keras_lora_dropout.import_peft(model, directory)",
        "target_layers=[...]",
    )


def test_a_plain_model_stays_plain_when_an_import_fails(exported):
    change_config(exported, use_qalora=True)
    model = plain()
    with pytest.raises(ValueError, match="QALoRA"):
        kld.import_peft(model, exported)
    assert type(model) is models.DebertaV3TextClassifier
    change_config(exported, use_qalora=False)
    with pytest.raises(ValueError, match="dropout_rate"):
        kld.import_peft(model, exported, dropout_rate=2)
    assert type(model) is models.DebertaV3TextClassifier


def test_a_rank_above_the_layer_is_refused(tmp_path, exported):
    def change(tensors):
        for name, value in tensors.items():
            if "lora_A" in name:
                tensors[name] = np.zeros((17, 16), "float32")
            if "lora_B" in name:
                tensors[name] = np.zeros((value.shape[0], 17), "float32")

    change_tensors(exported, change)
    change_config(exported, r=17)
    assert_refused(of_queries(), exported, "has rank 17", "holds 16 at most")


def test_running_rank_schedules_keep_their_ranks(tmp_path):
    of_queries(rank=3).export_peft(tmp_path)
    model = of_queries(rank=4, rank_budget=kld.RankBudget(2))
    assert_refused(model, tmp_path, "`compact_ranks` first", "schedule")
    model.compact_ranks()
    model.import_peft(tmp_path)
    assert set(model.rank_pattern().values()) == {3}


def test_options_that_come_too_late_are_refused(exported):
    with pytest.raises(ValueError, match="too late"):
        kld.import_peft(of_queries(), exported, num_samples=2)
    with pytest.raises(ValueError, match="`import_peft` takes no"):
        kld.import_peft(plain(), exported, rank=4)
    with pytest.raises(TypeError, match="dropout"):
        kld.import_peft(plain(), exported, dropout=0.5)


def test_unknown_models_are_refused(tmp_path, exported):
    known = "BERT, RoBERTa, DeBERTaV3, Llama, Mistral, Gemma, Qwen2"
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    with pytest.raises(ValueError, match=f"no KerasHub backbone.*{known}"):
        model.export_peft(tmp_path / "new")
    with pytest.raises(ValueError, match=known):
        kld.import_peft(tiny_mlp(), exported)
    vit = models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
    )
    with pytest.raises(ValueError, match=f"ViTBackbone.*{known}"):
        kld.import_peft(vit, exported)
    assert not (tmp_path / "new").exists()


def test_weights_without_a_name_are_not_dropped_from_an_export(tmp_path):
    model = models.DebertaV3MaskedLM(plain().backbone)
    kld.enable_lora_dropout(model, rank=2)
    with pytest.raises(ValueError, match=r"no name at Hugging Face.*mlm_head"):
        model.export_peft(tmp_path)


def test_an_adapted_head_is_not_exported(tmp_path):
    model = adapted(target_layers=["query", "pooled_dense"])
    with pytest.raises(ValueError, match=r"\['pooled_dense'\] belong to the"):
        model.export_peft(tmp_path)


# Damaged files.


def test_pickles_are_refused(exported):
    (exported / TENSORS).rename(exported / "adapter_model.bin")
    assert_refused(of_queries(), exported, "a pickle", "safe_serialization")


def test_missing_files_are_named(exported):
    (exported / TENSORS).unlink()
    assert_refused(of_queries(), exported, f"no {TENSORS}")
    assert_refused(of_queries(), exported / "nowhere", f"no {CONFIG}")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 7, struct.pack("<Q", 2**62) + b"{}", b"\xff" * 400],
    ids=["empty", "short", "oversized header", "noise"],
)
def test_damaged_tensors_are_refused(exported, data):
    (exported / TENSORS).write_bytes(data)
    assert_refused(of_queries(), exported, "no whole safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peft_type": "LO'])
def test_damaged_settings_are_refused(exported, text):
    (exported / CONFIG).write_text(text)
    assert_refused(of_queries(), exported, CONFIG)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=strategies.data())
def test_changed_bytes_are_read_or_refused(exported, name, data):
    original = (exported / name).read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(strategies.integers(1, 3))):
        place = data.draw(strategies.integers(0, len(changed) - 1))
        changed[place] = data.draw(strategies.integers(0, 255))
    stop = data.draw(strategies.integers(0, len(changed)))
    if data.draw(strategies.booleans()):
        changed = changed[:stop]
    (exported / name).write_bytes(bytes(changed))
    try:
        read_peft(exported)
    except ValueError as error:
        assert str(exported) in str(error)
    finally:
        (exported / name).write_bytes(original)


# Folders.


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    model = of_queries()
    model.export_peft(tmp_path, instances=3, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CONFIG,
        TENSORS,
        "instance_0",
        "instance_1",
        "instance_2",
    ]
    model.export_peft(tmp_path, instances=1, seed=0)
    assert not (tmp_path / "instance_1").exists()
    (tmp_path / "instance_0" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no export wrote.*notes.txt"):
        model.export_peft(tmp_path)
    assert (tmp_path / "instance_0" / TENSORS).exists()


def test_adapters_of_others_are_not_overwritten(exported):
    change_tensors(exported, lambda tensors: None)  # Loses our mark.
    before = (exported / TENSORS).read_bytes()
    with pytest.raises(ValueError, match="new or an empty folder"):
        of_queries().export_peft(exported)
    assert (exported / TENSORS).read_bytes() == before
    with pytest.raises(ValueError, match="is a file"):
        of_queries().export_peft(exported / CONFIG)


def test_no_ranks_are_no_export(tmp_path):
    model = of_queries(rank=2, rank_budget=kld.RankBudget(1))
    allocator = model.rank_allocator
    allocator.rank_mask.assign(np.zeros(allocator.rank_mask.shape))
    with pytest.raises(ValueError, match="no rank left"):
        model.export_peft(tmp_path / "new")
    with pytest.raises(ValueError, match="`instances`"):
        of_queries().export_peft(tmp_path / "new", instances=-1)
    assert not (tmp_path / "new").exists()
