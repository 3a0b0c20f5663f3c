"""The heat map of kept ranks holds the history, and its rows their names."""

import json
import pathlib
import runpy

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import adapted_mlp
from helpers import classification_data
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import keras_lora_dropout as kld
from keras_lora_dropout.plots import plot_rank_history
from keras_lora_dropout.rank_plot import row_names

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = [
    "self_attention_layer/query",
    "self_attention_layer/key",
    "self_attention_layer/value",
    "self_attention_layer/attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
]
NAMES = [path.rpartition("/")[2] for path in BLOCK]

pytestmark = pytest.mark.usefixtures("closed_figures")


def ranks_of(paths, steps=(10, 20, 30)):
    """A history of random ranks from 0 to 4, the last layer's all 4."""
    generator = np.random.default_rng(0)
    ranks = {path: generator.integers(0, 5, len(steps)) for path in paths}
    ranks[paths[-1]][:] = 4
    return {"step": np.array(steps), "ranks": ranks}


def transformer(blocks):
    return [
        f"layer_{block}/{path}" for block in range(blocks) for path in BLOCK
    ]


def mesh_of(ax):
    """Colour mesh, its columns' edges and its rows' edges."""
    (mesh,) = (
        mesh
        for mesh in ax.collections
        if isinstance(mesh, mpl.collections.QuadMesh)
    )
    corners = mesh.get_coordinates()
    return mesh, corners[0, :, 0].tolist(), corners[:, 0, 1].tolist()


def labels_of(ax):
    """Row of each label -> its text."""
    labels = zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    return {row: label.get_text() for row, label in labels}


def texts_at(ax, side):
    """Row -> text of what stands left (0) or right (1) of the axes."""
    return {t.xy[1]: t.get_text() for t in ax.texts if t.xy[0] == side}


def assert_drawn(ax, history):
    mesh, columns, rows = mesh_of(ax)
    ranks = history["ranks"]
    np.testing.assert_array_equal(mesh.get_array(), list(ranks.values()))
    assert columns[1:] == list(history["step"])
    assert rows == list(np.arange(len(ranks) + 1) - 0.5)
    assert ax.get_xlim() == (columns[0], columns[-1])


def test_rank_history_draws_the_ranks_of_each_layer():
    ranks = {
        "model/first": [3, 3, 2, 0],
        "model/second": [3, 2, 3, 1],
        "model/third": [3, 3, 3, 3],
    }
    history = {"step": [3, 5, 6, 10], "ranks": ranks}
    ax = plot_rank_history(history)
    assert_drawn(ax, history)
    bottom, top = ax.get_ylim()
    assert top < bottom, "The first layer is at the top."
    assert labels_of(ax) == {0: "first", 1: "second", 2: "third"}
    assert texts_at(ax, 1) == {0: "0", 1: "1", 2: "3"}
    assert texts_at(ax, 0) == {}
    assert ax.get_xlabel() == "optimizer step"


@pytest.mark.parametrize(
    ("steps", "edges"),
    [
        ([1, 2, 3], [0, 1, 2, 3]),
        ([25], [0, 25]),
        ([100, 110, 400], [90, 100, 110, 400]),
        ([5, 25], [0, 5, 25]),
    ],
)
def test_columns_end_with_their_steps(steps, edges):
    ax = plot_rank_history({"step": steps, "ranks": {"a": [1] * len(steps)}})
    assert mesh_of(ax)[1] == edges


@pytest.mark.parametrize("most", [0, 1, 4, 64])
def test_more_ranks_are_darker_and_none_are_grey(most):
    ranks = {"a": list(range(most + 1))}
    ax = plot_rank_history({"step": range_from_one(most + 1), "ranks": ranks})
    ax.figure.canvas.draw()
    mesh = mesh_of(ax)[0]
    none, *shades = mesh.to_rgba(range(most + 1))[:, :3]
    assert len(set(none)) == 1, "Grey."
    assert all(len(set(shade)) > 1 for shade in shades)
    lightness = [shade @ (0.21, 0.72, 0.07) for shade in shades]
    assert sorted(set(lightness), reverse=True) == lightness
    ticks = mesh.colorbar.get_ticks()
    distance = ticks[1] - ticks[0] if most else 1
    assert distance == 1 or most > 12
    assert list(ticks) == list(range(0, most + 1, distance))
    assert_apart(mesh.colorbar.ax.get_yticklabels())
    assert mesh.colorbar.ax.get_ylabel() == "kept ranks"


def range_from_one(count):
    return list(range(1, count + 1))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["first", "second"], [(None, "first"), (None, "second")]),
        (["only"], [(None, "only")]),
        (["net/only"], [(None, "only")]),
        (
            ["net/layer_0/attention/query", "net/layer_1/attention/query"],
            [(None, "layer_0"), (None, "layer_1")],
        ),
        (
            [f"net/long_name_of_layer_{i}/{p}" for i in (0, 1) for p in BLOCK],
            [(f"layer_{i}", name) for i in (0, 1) for name in NAMES],
        ),
        (
            [f"{c}/layer_0/{p}" for c in ("encoder", "decoder") for p in BLOCK],
            [
                (f"{c}/layer_0", name)
                for c in ("encoder", "decoder")
                for name in NAMES
            ],
        ),
        (
            ["embedding", "layer_0/a/x", "layer_0/b/x", "layer_0/b/y"],
            [
                (None, "embedding"),
                ("layer_0", "a/x"),
                ("layer_0", "b/x"),
                ("layer_0", "y"),
            ],
        ),
        (
            ["s_0/block_0/a", "s_0/block_0/b", "s_0/block_1/a", "s_1/a"],
            [
                ("s_0/block_0", "a"),
                ("s_0/block_0", "b"),
                (None, "s_0/block_1/a"),
                (None, "s_1/a"),
            ],
        ),
        (
            ["left/up", "left/down", "right/up", "right/down"],
            [
                ("left", "up"),
                ("left", "down"),
                ("right", "up"),
                ("right", "down"),
            ],
        ),
    ],
)
def test_row_names(paths, names):
    assert row_names(paths) == names


parts = st.sampled_from(["a", "b", "layer_0", "layer_1", "a_b_0", "a_b_1"])
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)


@settings(deadline=None, derandomize=True)
@given(st.lists(paths, min_size=1, max_size=12, unique=True))
def test_row_names_tell_layers_apart(paths):
    names = row_names(paths)
    grouped = [name for name in names if name[0]]
    alone = [name for group, name in names if group is None]
    assert len(set(grouped)) + len(set(alone)) == len(paths)
    for path, (_, name) in zip(paths, names, strict=True):
        assert f"/{name}/" in f"/{path}/"


@pytest.mark.parametrize("blocks", [2, 12])
def test_rows_of_a_transformer_are_grouped_by_block(blocks):
    history = ranks_of(transformer(blocks))
    ax = plot_rank_history(history)
    assert_drawn(ax, history)
    assert labels_of(ax) == dict(enumerate(NAMES * blocks))
    assert texts_at(ax, 0) == {
        6 * block + 2.5: f"layer_{block}" for block in range(blocks)
    }
    assert texts_at(ax, 1) == {
        row: str(ranks[-1])
        for row, ranks in enumerate(history["ranks"].values())
    }
    assert_apart([*ax.get_yticklabels(), *ax.texts])


def test_blocks_are_named_if_layers_are_too_many():
    history = ranks_of(transformer(33))
    ax = plot_rank_history(history)
    assert_drawn(ax, history)
    assert labels_of(ax) == {
        6 * block + 2.5: f"layer_{block}" for block in range(33)
    }
    assert not ax.texts
    assert_apart(ax.get_yticklabels())


def test_some_layers_are_named_if_they_are_too_many_and_have_no_blocks():
    names = [f"dense_{i}" for i in range(200)]
    ax = plot_rank_history(ranks_of(names))
    labels = labels_of(ax)
    assert all(names[int(row)] == label for row, label in labels.items())
    assert 0 in labels and 40 <= len(labels) < 200
    assert_apart(ax.get_yticklabels())


def test_names_fit_into_the_axes_given():
    _, (above, below) = plt.subplots(2, layout="constrained")
    history = ranks_of(transformer(8))
    assert plot_rank_history(history, ax=below) is below
    assert_drawn(below, history)
    assert not above.collections
    assert_apart(below.get_yticklabels())


def assert_apart(texts):
    """Assert that no text stands on another one in the finished figure."""
    texts[0].figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    assert not any(
        box.overlaps(other)
        for index, box in enumerate(boxes)
        for other in boxes[:index]
    )


def test_rank_history_of_a_model():
    budget = kld.RankBudget(1, warmup_steps=2, final_steps=3)
    model = adapted_mlp(rank_budget=budget)
    with pytest.raises(ValueError, match="Train the model with `fit` first"):
        plot_rank_history(model)
    assert not plt.get_fignums()

    model.fit(*classification_data(), batch_size=2, epochs=2, verbose=0)
    recorded = model.rank_history()
    ax = plot_rank_history(model)
    assert_drawn(ax, recorded)
    assert mesh_of(ax)[1] == list(range(11))
    assert labels_of(ax) == {0: "first", 1: "second"}
    pattern = model.rank_pattern()
    assert list(texts_at(ax, 1).values()) == list(map(str, pattern.values()))

    listed = {
        "step": recorded["step"].tolist(),
        "ranks": {k: v.tolist() for k, v in recorded["ranks"].items()},
    }
    assert_drawn(plot_rank_history(json.loads(json.dumps(listed))), recorded)
    model.compact_ranks()
    assert_drawn(plot_rank_history(model), recorded)


def test_rank_history_of_the_guide_and_of_a_keras_hub_task():
    script = runpy.run_path(str(ROOT / "docs/figures/draw_ranks.py"))
    model = script["train"](layers=2, epochs=1)
    ax = plot_rank_history(model)
    assert_drawn(ax, model.rank_history())
    assert mesh_of(ax)[0].get_array().shape == (12, 16)
    assert labels_of(ax) == dict(enumerate(NAMES * 2))
    assert texts_at(ax, 0) == {2.5: "layer_0", 8.5: "layer_1"}


def test_a_model_without_a_rank_budget_has_no_rank_history():
    with pytest.raises(ValueError, match="Pass `rank_budget=RankBudget"):
        plot_rank_history(adapted_mlp())
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        (None, TypeError, "an object of type NoneType"),
        ([1, 2], TypeError, "what its `rank_history"),
        ({"loss": [1.0]}, TypeError, r"keys \['loss'\]"),
        ({"step": [1], "ranks": [1]}, TypeError, "layer path: ranks"),
        ({"step": [1], "ranks": {"a": 1}}, TypeError, "layer path: ranks"),
        ({"step": [], "ranks": {"a": []}}, ValueError, "with `fit` first"),
        ({"step": [1], "ranks": {}}, ValueError, "of 0 layers and 1 steps"),
        (
            {"step": [1, 2], "ranks": {"a": [1, 1], "b": [1]}},
            ValueError,
            '2 steps, and 1 entries of "b"',
        ),
        (
            {"step": [1, 2, 2], "ranks": {"a": [1, 1, 1]}},
            ValueError,
            r"step=\[1, 2, 2\]",
        ),
        ({"step": [0], "ranks": {"a": [1]}}, ValueError, "positive and grow"),
        ({"step": [1], "ranks": {"a": [-1]}}, ValueError, r'`ranks\["a"\]`'),
        ({"step": [1], "ranks": {"a": [0.5]}}, ValueError, "whole numbers"),
        ({"step": [1], "ranks": {"a": [np.nan]}}, ValueError, "whole numbers"),
        ({"step": ["1"], "ranks": {"a": [1]}}, ValueError, "`step`.*whole"),
    ],
)
def test_rank_history_refuses(history, error, message):
    with pytest.raises(error, match=message):
        plot_rank_history(history)
    assert not plt.get_fignums()
