"""The table of the adapters of a model."""

import re

import keras
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data
from helpers import tiny_mlp

import keras_lora_dropout as kld


def printed(model, **options):
    """Rows `{path: cells}` of the table, and the lines of the totals."""
    texts = []
    model.adapter_summary(print_fn=texts.append, **options)
    (text,) = texts
    lines = text.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│")
    ]
    totals = [line for line in lines if re.match("[A-Z].*: ", line)]
    return {row[0]: row[1:] for row in rows}, totals


def test_counts_are_those_of_the_weights():
    model = kld.enable_lora_dropout(
        tiny_mlp(), rank=4, alpha=2, dropout_rate=0.3, rank_pattern={"first": 2}
    )
    rows, totals = printed(model)
    assert list(rows) == [path for path, _ in model.adapted_layers]
    trainable = sum(np.prod(w.shape) for w in model.trainable_weights)
    adapters = 0
    for path, layer in model.adapted_layers:
        inputs, outputs = layer.kernel.shape
        rank = 2 if path == "first" else 4
        count = rank * (inputs + outputs)
        adapters += count
        assert rows[path] == [
            f"{inputs} -> {outputs}",
            str(rank),
            f"{2 / rank:.4g}",
            f"{count:,}",
            f"{100 * count / trainable:.2f}%",
        ]
    total = sum(np.prod(w.shape) for w in model.weights)
    assert totals == [
        "Adapter: LoRA, dropout rate 0.3, N = 4",
        f"Adapter params: {adapters:,} in {len(rows)} layers",
        f"Other trainable params: {trainable - adapters:,}",
        f"Non-trainable params: {total - trainable:,}",
        f"Trainable: {100 * trainable / total:.2f}% of {total:,}",
    ]


def test_kept_ranks_of_a_budget():
    x, y = classification_data(8)
    budget = kld.RankBudget(
        1, warmup_steps=0, final_steps=1, mask_interval=1, total_steps=3
    )
    model = adapted_mlp({}, rank=3, rank_budget=budget, num_samples=1)
    rows, totals = printed(model)
    assert {row[1] for row in rows.values()} == {"3"}
    assert totals[0].startswith("Adapter: AdaLoRA")
    model.fit(x, y, batch_size=2, epochs=1, verbose=0)
    kept = model.rank_pattern()
    rows, _ = printed(model)
    for path, row in rows.items():
        assert row[1] == ("3" if kept[path] == 3 else f"{kept[path]} of 3")
    assert sum(kept.values()) == len(kept)


def test_frozen_adapters_have_no_share():
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2, trainable_layers=None)
    model.trainable = False
    rows, totals = printed(model)
    assert {row[-1] for row in rows.values()} == {"0.00%"}
    assert totals[-1].startswith("Trainable: 0.00%")


def test_lines_are_as_long_as_wanted(capsys):
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    model.adapter_summary(line_length=50)
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if line and line[0] in "┏┃│└"]
    assert len(table) > 4 and {len(line) for line in table} == {50}


def test_names_with_brackets_are_shown_as_they_are():
    hidden = keras.layers.Dense(4, name="[bold]")
    head = keras.layers.Dense(2, name="head")
    model = keras.Sequential([keras.Input((4,)), hidden, head])
    rows, _ = printed(kld.enable_lora_dropout(model, rank=2))
    assert list(rows) == ["[bold]"]


def test_bad_input():
    model = kld.enable_lora_dropout(tiny_mlp(), rank=2)
    with pytest.raises(ValueError, match=r"line_length.*-3"):
        model.adapter_summary(line_length=-3)
    with pytest.raises(ValueError, match="no adapted layer that is built"):
        kld.LoRADropoutModel().adapter_summary()
