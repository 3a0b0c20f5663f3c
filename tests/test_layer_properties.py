"""Properties that hold for any shape, rate, rank and mask."""

import numpy as np
import reference
from helpers import array
from helpers import assert_close
from helpers import draws_of
from helpers import set_random
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_lora_dropout import AdaLoRADropoutDense
from keras_lora_dropout import AdaLoRADropoutEinsumDense
from keras_lora_dropout import LoRADropoutDense
from keras_lora_dropout import LoRADropoutEinsumDense
from keras_lora_dropout.core import factors
from keras_lora_dropout.core import products

settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile("ours")

# Few sizes, so that compiled operations are used again.
SIZES = st.sampled_from([1, 2, 3, 5])
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.9])
EINSUM_LAYERS = [LoRADropoutEinsumDense, AdaLoRADropoutEinsumDense]
LAYERS = st.sampled_from(
    [LoRADropoutDense, AdaLoRADropoutDense, *EINSUM_LAYERS]
)


@st.composite
def equations(draw):
    """An einsum equation with one batch axis in front, and all its sizes."""
    letters = iter("bcdefghijk")

    def some(least, most):
        count = draw(st.integers(least, most))
        return [next(letters) for _ in range(count)]

    free, contracted, kept = some(0, 2), some(1, 2), some(1, 2)
    summed = some(0, 1)
    inputs = draw(st.permutations(free + contracted + summed))
    kernel = draw(st.permutations(contracted + kept))
    outputs = draw(st.permutations(free + kept))
    size = {c: draw(st.integers(1, 3)) for c in [*inputs, *kept]}
    equation = f"a{''.join(inputs)},{''.join(kernel)}->a{''.join(outputs)}"
    return equation, [size[c] for c in inputs], [size[c] for c in kernel]


def random_factors(generator, axes, groups, rank):
    factor_a = generator.normal(size=(groups, axes.input_dim, rank))
    factor_b = generator.normal(size=(groups, rank, axes.output_dim))
    return factor_a.astype("float32"), factor_b.astype("float32")


@given(
    equations(),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_factored_product_is_that_of_the_full_matrix(
    equation_and_sizes, groups, rank, in_groups, seed
):
    equation, shape, kernel_shape = equation_and_sizes
    axes = factors.einsum_axes(equation, tuple(kernel_shape), 1 + len(shape))
    assert axes.batch_leads
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(2 * groups, *shape)).astype("float32")
    factor_a, factor_b = random_factors(generator, axes, groups, rank)
    frozen = generator.normal(size=kernel_shape).astype("float32")
    tensors = map(ops.convert_to_tensor, (x, frozen, factor_a, factor_b))
    product = products.adapted_product(*tensors, axes, in_groups=in_groups)
    ones = np.ones(axes.input_dim), np.ones(axes.output_dim)
    kernels = [
        reference.einsum_delta_matrix(equation, kernel_shape, a, b, *ones, 1)
        for a, b in zip(factor_a, factor_b, strict=True)
    ]
    blocks = zip(np.split(x, groups), kernels, strict=True)
    expected = [
        np.einsum(equation, block, frozen + kernel) for block, kernel in blocks
    ]
    assert_close(product, np.concatenate(expected))
    # The axes also say where the entries of a delta matrix go in the kernel.
    matrix = factor_a[0] @ factor_b[0]
    folded = matrix.reshape(axes.contracted + axes.kept)
    assert_close(folded.transpose(axes.kernel_permutation), kernels[0])


@given(SIZES, SIZES, st.floats(-3, 3), st.integers(0, 99))
@settings(max_examples=20)
def test_delta_is_linear_in_each_factor(inputs, outputs, weight, seed):
    axes = factors.dense_axes((inputs, outputs))
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4, inputs)).astype("float32")
    a1, b1 = random_factors(generator, axes, 2, 2)
    a2, b2 = random_factors(generator, axes, 2, 2)

    def delta(a, b):
        return array(
            products.adapted_product(
                ops.convert_to_tensor(x),
                ops.zeros((inputs, outputs)),
                ops.convert_to_tensor(a, "float32"),
                ops.convert_to_tensor(b, "float32"),
                axes,
            )
        )

    in_a = delta(a1, b1) + weight * delta(a2, b1)
    assert_close(delta(a1 + weight * a2, b1), in_a, 1e-4)
    in_b = delta(a1, b1) + weight * delta(a1, b2)
    assert_close(delta(a1, b1 + weight * b2), in_b, 1e-4)


def build_layer(kind, inputs, outputs, rank, rate, rescale=False):
    options = {
        "rank": min(rank, inputs, outputs),
        "alpha": 3,
        "dropout_rate": rate,
        "rescale": rescale,
    }
    if kind in EINSUM_LAYERS:
        layer = kind("abc,dc->abd", (None, outputs), **options)
    else:
        layer = kind(outputs, use_bias=False, **options)
    layer.build((None, 3, inputs))
    set_random([layer.kernel, *layer.factors], scale=1)
    return layer


@given(
    LAYERS,
    SIZES,
    SIZES,
    st.integers(1, 3),
    RATES,
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_masked_layer_is_the_dense_reference(
    kind, inputs, outputs, rank, rate, rescale, seed
):
    layer = build_layer(kind, inputs, outputs, rank, rate, rescale)
    generator = np.random.default_rng(seed)
    draws = generator.random((1, inputs + outputs), "float32")
    keep = reference.inverted(
        reference.bernoulli(draws[0], rate), rate, rescale
    )
    kernel = array(layer.kernel)
    with draws_of([layer], draws):
        # The output for the unit vectors is the whole matrix.
        matrix = array(layer(np.eye(inputs)[None], training=True))[0]
    matrix -= kernel.T if kind in EINSUM_LAYERS else kernel
    expected = reference.delta_matrix(
        *reference.two_factors(*map(array, layer.factors)),
        keep[:inputs],
        keep[inputs:],
        scaling=3 / layer.lora_rank,
    )
    assert_close(matrix, expected, 1e-4)
    # A dropped input takes its whole row, a dropped output its column.
    assert_close(matrix[keep[:inputs] == 0], 0)
    assert_close(matrix[:, keep[inputs:] == 0], 0)


@given(
    LAYERS,
    st.integers(2, 4),
    st.sampled_from([1, 2]),
    RATES,
    st.integers(0, 99),
)
@settings(max_examples=20)
def test_several_groups_are_several_calls(kind, groups, rows, rate, seed):
    layer = build_layer(kind, 5, 3, 2, rate)
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(groups * rows, 3, 5)).astype("float32")
    draws = generator.random((groups, 8), "float32")
    with draws_of([layer], draws, len(x)):
        together = layer(x, training=True)
    apart = []
    for n in range(groups):
        with draws_of([layer], draws[n : n + 1]):
            block = x[n * rows : (n + 1) * rows]
            apart.append(array(layer(block, training=True)))
    assert_close(together, np.concatenate(apart))
