"""The ground floor: masks, factor axes, instances in a batch, argument checks.

`test_layer_properties.py` holds `core/factors.py` and `core/products.py`
against the reference.
"""

import threading
import weakref

import keras
import numpy as np
import pytest
from helpers import array
from helpers import assert_close
from helpers import draws_after
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_lora_dropout import LoRADropoutDense
from keras_lora_dropout.core import factors
from keras_lora_dropout.core import instances
from keras_lora_dropout.core import masks
from keras_lora_dropout.core import products
from keras_lora_dropout.core import validation

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


# Masks


def test_draws_are_uniform_float32_numbers():
    draws = masks.draw_uniform((50, 200), keras.random.SeedGenerator(0))
    assert dtype_of(draws) == "float32"
    values = array(draws)
    assert values.shape == (50, 200)
    assert values.min() >= 0 and values.max() < 1
    # The mean of 10,000 uniform numbers has standard error 0.0029.
    assert abs(values.mean() - 0.5) < 4 * 0.0029
    # No two instances are alike, nor two columns.
    assert len(np.unique(values.round(6), axis=0)) == 50
    assert len(np.unique(values.round(6), axis=1).T) == 200


def test_draws_follow_the_seed_generator():
    generator = keras.random.SeedGenerator(3)
    first = array(masks.draw_uniform((2, 4), generator))
    second = array(masks.draw_uniform((2, 4), generator))
    assert np.any(first != second)
    np.testing.assert_array_equal(first, draws_after([3, 0], (2, 4)))
    np.testing.assert_array_equal(second, draws_after([3, 1], (2, 4)))


def test_keep_mask_by_hand():
    draws = ops.convert_to_tensor([[0.0, 0.24, 0.25, 0.26, 0.999]])
    for dtype in ("float32", "bfloat16"):
        keep = masks.keep_mask(draws, 0.25, dtype)
        assert dtype_of(keep) == dtype
        keep = ops.cast(keep, "float32")
        np.testing.assert_array_equal(array(keep), [[0, 0, 1, 1, 1]])
    keep = masks.keep_mask(draws, 0.0, "float32")
    np.testing.assert_array_equal(array(keep), np.ones((1, 5)))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_keep_mask_has_mean_one_minus_rate(rate):
    draws = masks.draw_uniform((20_000,), keras.random.SeedGenerator(1))
    keep = array(masks.keep_mask(draws, rate, "float32"))
    assert set(np.unique(keep)) <= {0.0, 1.0}
    error = np.sqrt(rate * (1 - rate) / 20_000)
    assert abs(keep.mean() - (1 - rate)) <= 4 * error


@pytest.mark.parametrize(
    "rescale, masked, expected",
    [
        (False, True, 3),
        (False, False, 0.75),
        (True, True, 12),
        (True, False, 3),
    ],
)
def test_delta_scale_by_hand(rescale, masked, expected):
    assert masks.delta_scale(3.0, 0.5, rescale, masked) == expected


@given(st.floats(0, 0.99), st.booleans(), st.floats(0.1, 10))
def test_unmasked_delta_is_the_expectation_of_the_masked_one(
    rate, rescale, scaling
):
    masked = masks.delta_scale(scaling, rate, rescale, True)
    mean = masks.delta_scale(scaling, rate, rescale, False)
    both_kept = (1 - rate) ** 2
    np.testing.assert_allclose(mean, both_kept * masked)


def built_layers():
    layers = [LoRADropoutDense(units, rank=1) for units in (4, 2)]
    for layer in layers:
        layer.build((None, 3))
    return layers


def test_plan_gives_every_layer_columns_of_its_own():
    first, second = built_layers()
    plan = masks.MaskPlan([first, second])
    assert plan.width == (3 + 4) + (3 + 2)
    values = np.random.default_rng(0).random((2, 12), "float32")
    draws = masks.Draws(plan, ops.convert_to_tensor(values))
    second.dropout_rate = 0.7
    for layer, columns, rate in (
        (first, values[:, :7], 0.5),
        (second, values[:, 7:], 0.7),
    ):
        for dtype in ("float32", "bfloat16"):
            kept = draws.keep(layer, dtype)
            assert {dtype_of(mask) for mask in kept} == {dtype}
            kept = [array(ops.cast(mask, "float32")) for mask in kept]
            assert [mask.shape[1] for mask in kept] == list(layer.mask_sizes)
            np.testing.assert_array_equal(
                np.concatenate(kept, axis=1), columns >= np.float32(rate)
            )
    alone = masks.Draws(masks.MaskPlan([second]), values[:, :5])
    assert alone.covers(second) and not alone.covers(first)


def test_masks_of_one_instance():
    """Those of all instances, asked for before, are not those of one."""
    layers = built_layers()
    values = np.random.default_rng(0).random((4, 12), "float32")
    draws = masks.Draws(
        masks.MaskPlan(layers), ops.convert_to_tensor(values), rows=8
    )
    for layer in layers:
        whole = draws.masks_of(layer)
        for n in range(2):
            one = draws.only(n, 2)
            assert one.groups == 2 and one.rows == 4
            for part, mask in zip(one.masks_of(layer), whole, strict=True):
                np.testing.assert_array_equal(part, mask[2 * n : 2 * n + 2])


def test_draws_without_values_are_the_mean_network():
    first, _ = built_layers()
    draws = masks.Draws(masks.MaskPlan([first]))
    assert draws.covers(first)
    assert draws.keep(first, "float32") is None


def test_draws_are_in_use_inside_the_block_and_thread_only():
    plan = masks.MaskPlan(built_layers())
    outer, inner = masks.Draws(plan), masks.Draws(plan)
    seen = []
    assert masks.current_draws() is None
    with masks.use_draws(outer):
        with pytest.raises(KeyError), masks.use_draws(inner):
            assert masks.current_draws() is inner
            raise KeyError
        assert masks.current_draws() is outer
        thread = threading.Thread(
            target=lambda: seen.append(masks.current_draws())
        )
        thread.start()
        thread.join()
        with masks.use_draws(None):
            assert masks.current_draws() is None
    assert seen == [None]
    assert masks.current_draws() is None


def test_fixed_seed_generator_repeats_until_it_is_set():
    generator = masks.FixedSeedGenerator(5)
    draws = [array(masks.draw_uniform((3,), generator)) for _ in range(2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    generator.set(6)
    assert np.any(array(masks.draw_uniform((3,), generator)) != draws[0])
    generator.set(5)
    again = array(masks.draw_uniform((3,), generator))
    np.testing.assert_array_equal(again, draws[0])
    np.testing.assert_array_equal(again, draws_after([5, 0], (3,)))
    generator.set(validation.MAX_SEED)
    assert array(masks.draw_uniform((3,), generator)).max() < 1


# Factors


@pytest.mark.parametrize(
    "equation, kernel_shape, input_ndim, contracted, kept, batch_leads",
    [
        ("abc,cde->abde", (768, 12, 64), 3, (768,), (12, 64), True),
        ("abcd,cde->abe", (12, 64, 768), 4, (12, 64), (768,), True),
        ("btd,ndh->btnh", (8, 256, 32), 3, (256,), (8, 32), True),
        ("...x,xy->...y", (5, 7), 4, (5,), (7,), True),
        ("ab...,bc->ac...", (5, 7), 3, (5,), (7,), True),
        ("th,ehm->etm", (4, 6, 8), 2, (6,), (4, 8), False),
        ("bquh,uhm->bqm", (4, 6, 8), 4, (4, 6), (8,), True),
        ("abc, cd -> ad", (5, 7), 3, (5,), (7,), True),
    ],
)
def test_einsum_axes(
    equation, kernel_shape, input_ndim, contracted, kept, batch_leads
):
    axes = factors.einsum_axes(equation, kernel_shape, input_ndim)
    assert axes.contracted == contracted
    assert axes.kept == kept
    assert axes.input_dim == np.prod(contracted)
    assert axes.output_dim == np.prod(kept)
    assert axes.batch_leads is batch_leads


@pytest.mark.parametrize("equation", ["abc,bcd->abd", "aac,cd->ad", "ab,b->ab"])
def test_equations_that_are_no_single_matrix(equation):
    shape = (2,) * len(equation.split(",")[1].split("->")[0])
    with pytest.raises(ValueError, match=f"one matrix.*{equation}"):
        factors.einsum_axes(equation, shape, equation.index(","))


@pytest.mark.parametrize("bias", [None, [1000.0, 2000.0]])
@pytest.mark.parametrize("in_groups", [False, True])
def test_adapted_product_by_hand(in_groups, bias):
    product = products.adapted_product(
        ops.convert_to_tensor([[1.0, 1.0], [1.0, 2.0]]),
        ops.convert_to_tensor([[100.0, 0.0], [0.0, 100.0]]),
        ops.convert_to_tensor([[[1.0], [2.0]], [[3.0], [0.0]]]),
        ops.convert_to_tensor([[[1.0, 10.0]], [[2.0, 0.0]]]),
        factors.dense_axes((2, 2)),
        in_groups=in_groups,
        bias=None if bias is None else ops.convert_to_tensor(bias),
    )
    # Row 0: (1 + 2) * (1, 10); row 1, of the second group: 3 * (2, 0).
    expected = np.add(
        [[103, 130], [106, 200]], [0, 0] if bias is None else bias
    )
    np.testing.assert_array_equal(array(product), expected)


@pytest.mark.parametrize(
    ("equation", "bias_shape", "belongs"),
    [
        ("abc,cde->abde", (2, 3), True),
        ("abc,cde->abde", (3,), False),
        ("abc,cde->abde", (1, 3), False),
        ("abc,cde->adbe", (2, 3), False),
        ("abc,cde->abed", (2, 3), False),
    ],
)
def test_whether_a_bias_belongs_to_rows(equation, bias_shape, belongs):
    axes = factors.einsum_axes(equation, (4, 2, 3), 3)
    assert axes.belongs_to_rows(bias_shape) is belongs


# Instances

ROWS = st.sampled_from([1, 2, 5])
COUNTS = st.integers(1, 4)


def batch_of(rows, seed=0):
    """A nested batch with tensors of several shapes and dtypes."""
    generator = np.random.default_rng(seed)
    return {
        "ids": ops.convert_to_tensor(generator.integers(0, 9, (rows, 3))),
        "pair": (
            ops.convert_to_tensor(generator.normal(size=(rows,)), "float32"),
            ops.convert_to_tensor(
                generator.normal(size=(rows, 2, 2)), "float32"
            ),
        ),
    }


def assert_same(actual, expected):
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(
        keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True
    ):
        assert dtype_of(one) == dtype_of(other)
        assert_close(one, other, 1e-6)


@given(ROWS, COUNTS)
@settings(max_examples=12)
def test_split_undoes_tile(rows, count):
    batch = batch_of(rows)
    tiled = instances.tile(batch, count)
    assert instances.batch_size(tiled) == rows * count
    pieces = instances.split(tiled, count, rows * count)
    assert len(pieces) == count
    for piece in pieces:
        assert_same(piece, batch)


@given(ROWS, COUNTS)
@settings(max_examples=12)
def test_mean_of_instances(rows, count):
    batches = [batch_of(rows, seed) for seed in range(count)]
    merged = instances.mean(iter(batches))
    expected = np.mean([array(b["pair"][1]) for b in batches], axis=0)
    assert_close(merged["pair"][1], expected, 1e-6)
    if count > 1:  # Integers are averaged as floats.
        assert dtype_of(merged["ids"]) == "float32"
        expected = np.mean([array(b["ids"]) for b in batches], axis=0)
        assert_close(merged["ids"], expected, 1e-6)
    same = instances.mean([batches[0]["pair"]] * count)
    assert_same(same, batches[0]["pair"])


def test_arrays_are_tiled_and_scalars_are_not():
    array_in = np.arange(6.0).reshape(2, 3)
    tiled = instances.tile([array_in, np.float32(2), None, "text", 3], 2)
    expected = np.concatenate([array_in, array_in])
    np.testing.assert_array_equal(array(tiled[0]), expected)
    assert tiled[1:] == [2, None, "text", 3]


def test_symbolic_tensors_are_tiled():
    tiled = instances.tile(keras.KerasTensor((5, 3)), 4)
    assert tuple(tiled.shape) == (20, 3)


def test_mean_keeps_none_and_small_floats_exact():
    # 300 is no bfloat16 sum of ones: 256 + 1 is 256 there.
    one = ops.cast(ops.ones((1,)), "bfloat16")
    merged = instances.mean([one, None] for _ in range(300))
    assert merged[1] is None
    assert dtype_of(merged[0]) == "bfloat16"
    np.testing.assert_array_equal(array(ops.cast(merged[0], "float32")), [1])


def test_mean_holds_no_structure_but_the_sum():
    """So that, one after another, N outputs take no more memory than two."""
    alive = []

    def outputs():
        for n in range(4):
            assert sum(output() is not None for output in alive) == (n == 1)
            tensor = ops.ones((3,)) * n
            alive.append(weakref.ref(tensor))
            yield tensor
            del tensor

    assert_close(instances.mean(outputs()), np.full(3, 1.5))


def test_padding_masks_travel_along():
    ids = np.array([[1, 2, 0], [3, 0, 0]], "float32")[:, :, None]
    masked = keras.layers.Masking()(ids)
    expected = array(masked._keras_mask)
    assert expected.sum() == 3
    tiled = instances.tile(masked, 2)
    assert_close(tiled._keras_mask, np.concatenate([expected] * 2))
    pieces = instances.split(tiled, 2, 4)
    assert all(np.all(array(p._keras_mask) == expected) for p in pieces)
    assert_close(instances.mean(pieces)._keras_mask, expected)


def test_outputs_without_the_batch_axis_are_refused():
    message = r'(?s)shape \(3, 5\).*12 rows.*sampling="sequential"'
    with pytest.raises(instances.LayoutError, match=message):
        instances.split(ops.ones((3, 5)), 4, 12)
    with pytest.raises(instances.LayoutError, match=r"shape \(\)"):
        instances.split({"loss": ops.ones(())}, 2, 4)
    single = ops.ones((3, 5))
    assert instances.split(single, 1, 12)[0] is single
    assert len(instances.split(ops.ones((4, 5)), 2)) == 2


def test_batch_size():
    assert instances.batch_size([None, {"a": ops.ones((7, 2))}]) == 7
    assert instances.batch_size(np.ones((3,))) == 3
    with pytest.raises(ValueError, match="no inputs"):
        instances.batch_size([None])


# Validation; `test_layer_arguments.py` goes through the layers' arguments.


def test_words():
    assert validation.word("sampling", "parallel", ("parallel", "x")) == (
        "parallel"
    )
    message = '`sampling` must be "parallel" or "x".*Received: sampling=\'y\''
    with pytest.raises(ValueError, match=message):
        validation.word("sampling", "y", ("parallel", "x"))


@pytest.mark.parametrize(
    "data",
    [
        np.ones((0, 3)),
        [],
        {"ids": np.ones((0, 3)), "types": np.ones((0, 3))},
        (np.ones((0, 3)), np.ones((0, 3))),
        [np.ones((0, 3))],
    ],
)
def test_empty_data_is_refused(data):
    with pytest.raises(ValueError, match="`x` holds no examples"):
        validation.not_empty("x", data)


@pytest.mark.parametrize(
    "data",
    [
        np.ones((1, 3)),
        ["a sentence"],
        {"ids": np.ones((2, 3))},
        (np.ones((2, 3)), np.ones((2, 1))),
        (None for _ in range(2)),
        None,
    ],
)
def test_data_with_examples_passes(data):
    validation.not_empty("x", data)


def test_settings_are_returned_as_plain_python_numbers():
    assert type(validation.positive_integer("rank", np.int64(3))) is int
    assert type(validation.dropout_rate(np.float32(0.5))) is float
    assert type(validation.alpha(2, 4)) is float
    assert type(validation.seed(np.int64(3))) is int
    assert validation.alpha(None, 4) == 4.0
    assert validation.seed(None) is None
    assert validation.boolean("rescale", False) is False
    assert validation.rank_fits(3, 3, 5, "it") is None
