"""Which layers are adapted, and with which rank and strength each."""

import json
import os
import pathlib
import subprocess
import sys

import families
import keras
import keras_hub
import numpy as np
import pytest
from dropping_models import small_transformer
from helpers import assert_close
from helpers import tiny_mlp

import keras_lora_dropout as kld

ORACLE = pathlib.Path(__file__).parent / "peft_patterns_oracle.py"


def bert(layers=4):
    return keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=layers,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=8,
    )


def paths_of(model):
    return [path for path, _ in model.adapted_layers]


# Against PEFT

_MODULES = {
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
}
_PEFT = {
    "r": 4,
    "lora_alpha": 8,
    # Not "dense" alone, which is the pooler's name, too.
    "target_modules": [
        *("query", "key", "value"),
        *("output.dense", "intermediate.dense"),
    ],
}
_OURS = {"rank": 4, "alpha": 8}
CASES = [
    (_OURS, _PEFT),
    (
        {"exclude_layers": ["key", "attention_output"], "blocks": "last 2"},
        {
            "exclude_modules": ["key", "attention.output.dense"],
            "layers_to_transform": [2, 3],
        },
    ),
    (
        {
            "blocks": range(1, 3),
            "rank_pattern": {
                "transformer_layer_1/.*/query": 2,
                "query": 3,
                r"feedforward_\w+_dense": 6,
            },
            "alpha_pattern": {"query|key": 3},
        },
        {
            "layers_to_transform": [1, 2],
            "rank_pattern": {
                r"layer\.1\..*\.query": 2,
                "query": 3,
                r"\d\.intermediate\.dense": 6,
                r"\d\.output\.dense": 6,
            },
            "alpha_pattern": {"query|key": 3},
        },
    ),
    (
        {
            "use_rslora": True,
            "rank_pattern": {"query": 16},
            "alpha_pattern": {"value": 1},
        },
        {
            "use_rslora": True,
            "rank_pattern": {"query": 16},
            "alpha_pattern": {"value": 1},
        },
    ),
]


def peft_module(path):
    block, _, rest = path.partition("/")
    return f"encoder.layer.{block.rpartition('_')[2]}.{_MODULES[rest]}"


def test_ranks_and_scalings_are_those_of_peft():
    process = subprocess.run(
        [sys.executable, str(ORACLE)],
        input=json.dumps([{**_PEFT, **theirs} for _, theirs in CASES]),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    for (ours, _), expected in zip(
        CASES, json.loads(process.stdout), strict=True
    ):
        model = kld.enable_lora_dropout(bert(), **{**_OURS, **ours})
        found = {
            peft_module(path): [layer.lora_rank, layer.scaling]
            for path, layer in model.adapted_layers
        }
        assert found.keys() == expected.keys()
        for module, values in expected.items():
            assert_close(np.array(found[module]), np.array(values))


# Which layers


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ("all", [0, 1, 2, 3]),
        ("first 1", [0]),
        ("last 3", [1, 2, 3]),
        ("last 4", [0, 1, 2, 3]),
        ([-1, 0], [0, 3]),
        (range(1, 3), [1, 2]),
        ((2,), [2]),
    ],
)
def test_blocks(blocks, chosen):
    model = kld.enable_lora_dropout(bert(), rank=2, blocks=blocks)
    found = {path.split("/")[0] for path in paths_of(model)}
    assert found == {f"transformer_layer_{n}" for n in chosen}
    assert len(paths_of(model)) == 6 * len(chosen)


def test_blocks_inside_an_encoder_count():
    every = paths_of(kld.enable_lora_dropout(families.vit(), rank=2))
    model = kld.enable_lora_dropout(families.vit(), rank=2, blocks=[-1])
    last = [path for path in every if "block_2" in path]
    assert paths_of(model) == last and 2 * len(last) == len(every)


def test_blocks_of_a_plain_model():
    model = kld.enable_lora_dropout(small_transformer(), rank=2, blocks=[1])
    expected = [
        *(f"second_attention/{name}" for name in ("query", "key", "value")),
        "second_attention/attention_output",
        "second_inner",
        "feedforward_output_dense#2",
    ]
    assert paths_of(model) == expected


def test_a_part_with_attention_is_no_block_of_its_own():
    def block(name):
        x = inputs = keras.Input((4, 8))
        attention = keras.layers.MultiHeadAttention(2, 4, name=f"{name}_heads")
        inner = keras.Model(inputs, attention(x, x), name=f"{name}_inner")
        dense = keras.layers.Dense(8, name=f"{name}_dense")
        return keras.Model(inputs, dense(inner(x)), name=name)

    x = inputs = keras.Input((4, 8))
    x = block("second")(block("first")(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    kld.enable_lora_dropout(model, rank=2, blocks=[0])
    assert {"first_dense", "first_heads/query"} <= set(paths_of(model))
    assert all(path.startswith("first_") for path in paths_of(model))


def test_prefix_of_the_last_blocks_is_shared():
    model = kld.enable_lora_dropout(bert(), rank=2, blocks="last 1")
    tokens = np.ones((2, 8), "int32")
    x = {
        "token_ids": tokens,
        "segment_ids": 0 * tokens,
        "padding_mask": tokens,
    }
    model.ensemble_predict(x, num_samples=2, verbose=0)
    assert model.mask_plan.spreads_prefix


@pytest.mark.parametrize(
    "exclude",
    [
        ["query", "transformer_layer_0/self_attention_layer/key"],
        "query$|layer_0.*key$",
        lambda path, layer: (
            layer.name == "query"
            or (path.startswith("transformer_layer_0") and layer.name == "key")
        ),
    ],
)
def test_excluded_layers(exclude):
    every = paths_of(kld.enable_lora_dropout(bert(2), rank=2))
    model = kld.enable_lora_dropout(bert(2), rank=2, exclude_layers=exclude)
    gone = [path for path in every if path not in paths_of(model)]
    assert gone == [
        "transformer_layer_0/self_attention_layer/query",
        "transformer_layer_0/self_attention_layer/key",
        "transformer_layer_1/self_attention_layer/query",
    ]
    named = kld.enable_lora_dropout(
        bert(2),
        rank=2,
        target_layers=["query", "value"],
        exclude_layers=exclude,
    )
    assert [path.rpartition("/")[2] for path in paths_of(named)] == [
        "value"
    ] * 2


# What each gets


def test_first_of_several_patterns_counts():
    model = kld.enable_lora_dropout(
        bert(1), rank=4, rank_pattern={"que.*": 1, "query": 2, "ke[xy]": 3}
    )
    ranks = {
        path.rpartition("/")[2]: r for path, r in model.rank_pattern().items()
    }
    assert (ranks["query"], ranks["key"], ranks["value"]) == (1, 3, 4)
    strengths = {layer.scaling for _, layer in model.adapted_layers}
    assert strengths == {1.0}  # Without `alpha`, whatever the rank.


def test_ranks_and_strengths_survive_files(tmp_path):
    options = {
        "rank": 4,
        "alpha": 8,
        "rank_pattern": {"first": 2},
        "use_rslora": True,
        "num_samples": 2,
    }
    model = kld.enable_lora_dropout(tiny_mlp(), seed=0, **options)
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.fit(x, np.ones((8, 3), "float32"), verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_adapters(tmp_path / "adapters")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = kld.enable_lora_dropout(tiny_mlp(), **options)
    again.load_adapters(tmp_path / "adapters")
    for other in loaded, again:
        assert_close(other.predict(x, verbose=0), model.predict(x, verbose=0))
        assert other.rank_pattern() == model.rank_pattern()
        for (_, a), (_, b) in zip(
            other.adapted_layers, model.adapted_layers, strict=True
        ):
            assert a.scaling == b.scaling
            assert_close(np.array(a.scaling), 8 / np.sqrt(b.lora_rank))


def test_strengths_with_a_rank_budget():
    model = kld.enable_lora_dropout(
        bert(1),
        rank=4,
        alpha=8,
        alpha_pattern={"query": 2},
        exclude_layers=["key"],
        rank_budget=kld.RankBudget(
            2, warmup_steps=0, final_steps=1, mask_interval=1
        ),
    )
    scalings = {
        p.rpartition("/")[2]: s.scaling for p, s in model.adapted_layers
    }
    assert scalings["query"] == 0.5 and scalings["value"] == 2.0


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rank_pattern": {"quer": 2}},
            ValueError,
            "matches no.*'quer'.*query",
        ),
        ({"rank_pattern": {"uery": 2}}, ValueError, "matches no.*'uery'"),
        ({"rank_pattern": {"que": 2}}, ValueError, "matches no.*'que'"),
        ({"rank_pattern": {"(": 2}}, ValueError, r"no valid regular.*'\('"),
        ({"rank_pattern": ["query"]}, TypeError, "dictionary.*query"),
        ({"rank_pattern": {1: 2}}, TypeError, "dictionary.*1: 2"),
        ({"rank_pattern": {"query": 0}}, ValueError, "positive integer.*=0"),
        ({"rank_pattern": {"query": 2.0}}, ValueError, "integer.*=2.0.*float"),
        ({"rank_pattern": {"query": 17}}, ValueError, "at most 16.*rank=17"),
        (
            {
                "rank_pattern": {"query": 2},
                "rank_budget": kld.RankBudget(
                    2, warmup_steps=0, final_steps=1, mask_interval=1
                ),
            },
            ValueError,
            "rank_budget.*Leave one",
        ),
        ({"alpha_pattern": {"qery": 2}}, ValueError, "alpha_pattern.*'qery'"),
        ({"alpha_pattern": {"query": -1}}, ValueError, "positive finite.*=-1"),
        (
            {"alpha": -1, "alpha_pattern": {".*": 2}},
            ValueError,
            "positive finite.*alpha=-1",
        ),
        ({"use_rslora": True}, ValueError, "alpha=None.*Pass"),
        ({"use_rslora": 1, "alpha": 2}, TypeError, "True or False"),
        (
            {"use_rslora": True, "alpha_pattern": {"query": 2}},
            ValueError,
            "alpha=None.*key",
        ),
        ({"exclude_layers": ["qery"]}, ValueError, "exclude_layers.*qery"),
        ({"exclude_layers": "."}, ValueError, "no layer.*exclude_layers='.'"),
        ({"exclude_layers": 3}, TypeError, "exclude_layers.*3"),
        ({"exclude_layers": "("}, ValueError, "exclude_layers.*regular"),
        ({"blocks": "last"}, ValueError, "last n.*blocks='last'"),
        ({"blocks": "last 3"}, ValueError, "1 to 2.*'last 3'"),
        ({"blocks": "last 0"}, ValueError, "1 to 2.*'last 0'"),
        ({"blocks": "auto"}, ValueError, "'auto'"),
        ({"blocks": []}, ValueError, r"at least one.*\[\]"),
        ({"blocks": [2]}, ValueError, r"2 blocks.*\[2\]"),
        ({"blocks": [0.0]}, ValueError, r"\[0.0\]"),
        ({"blocks": None}, ValueError, "blocks=None"),
        (
            {"blocks": "last 1", "target_layers": "layer_0"},
            ValueError,
            "no lay",
        ),
    ],
)
def test_bad_input_changes_nothing(options, error, message):
    model = bert(2)
    before = [type(layer) for layer in model.layers], len(model.weights)
    with pytest.raises(error, match=message):
        kld.enable_lora_dropout(model, **options)
    assert before == ([type(lyr) for lyr in model.layers], len(model.weights))
    assert all(weight.trainable for weight in model.weights)


def test_blocks_need_a_transformer():
    with pytest.raises(ValueError, match=r"no transformer blocks.*'last 1'"):
        kld.enable_lora_dropout(tiny_mlp(), blocks="last 1")


def test_an_adapter_file_says_which_layers():
    with pytest.raises(ValueError, match=r"takes no.*blocks"):
        kld.import_peft(bert(1), "folder", blocks="last 1")
