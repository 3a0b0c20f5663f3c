"""The product of mask groups that has a gradient of its own, on PyTorch."""

import pytest
from helpers import BACKEND

from keras_lora_dropout.core import factors
from keras_lora_dropout.core import grouped_product as product
from keras_lora_dropout.core import products

if BACKEND != "torch":
    pytest.skip("the others have no such gradient", allow_module_level=True)

import torch

GROUPS, ROWS, INPUTS, OUTPUTS, RANK = 3, 4, 5, 6, 2


def tensors(dtype=torch.float64, **trains):
    """Random tensors by name; all but the kernel train unless told not to."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "rows": (GROUPS * ROWS, INPUTS),
        "kernel": (INPUTS, OUTPUTS),
        "factor_a": (GROUPS, INPUTS, RANK),
        "factor_b": (GROUPS, RANK, OUTPUTS),
        "bias": (OUTPUTS,),
    }
    return {
        name: torch.randn(
            shape, generator=generator, dtype=dtype
        ).requires_grad_(trains.get(name, name != "kernel"))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("bias", [True, False, None])
def test_value_and_gradient(rows, kernel, bias):
    """Against one product after another, and finite differences."""
    given = tensors(rows=rows, kernel=kernel, bias=bool(bias))
    if bias is None:
        given["bias"] = None
    expected = torch.cat(
        [
            block @ (given["kernel"] + a @ b)
            for block, a, b in zip(
                given["rows"].split(ROWS),
                given["factor_a"],
                given["factor_b"],
                strict=True,
            )
        ]
    )
    if bias is not None:
        expected = expected + given["bias"]
    result = product.grouped_product(**given)
    torch.testing.assert_close(result, expected)
    assert torch.autograd.gradcheck(
        product.grouped_product, tuple(given.values())
    )


@pytest.mark.parametrize("rows", [True, False])
def test_value_and_gradient_of_what_is_added(rows):
    given = tensors(rows=rows)
    given["rows"] = given["rows"].reshape(GROUPS, ROWS, INPUTS)
    total = torch.ones(GROUPS, ROWS, OUTPUTS, dtype=torch.float64)
    total.requires_grad_()
    arguments = total, given["rows"], given["factor_a"], given["factor_b"]
    result = product.add_grouped_product(*arguments)
    expected = [
        1 + block @ a @ b for block, a, b in zip(*arguments[1:], strict=True)
    ]
    torch.testing.assert_close(result, torch.stack(expected))
    torch.testing.assert_close(total, torch.ones_like(total))
    assert torch.autograd.gradcheck(product.add_grouped_product, arguments)


@pytest.mark.parametrize("add", [False, True])
def test_gradient_under_autocast(add):
    """Of the dtype of the tensors, though that of the product is another."""
    given = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if add:
            rows = given["rows"].reshape(GROUPS, ROWS, INPUTS)
            result = product.add_grouped_product(
                torch.ones(GROUPS, ROWS, OUTPUTS),
                rows,
                given["factor_a"],
                given["factor_b"],
            )
        else:
            result = product.grouped_product(**given)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    exact = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in given.items()
    }
    blocks = exact["rows"].reshape(GROUPS, ROWS, INPUTS)
    total = (blocks @ exact["factor_a"] @ exact["factor_b"]).sum()
    if not add:
        total = total + (exact["rows"] @ exact["kernel"]).sum()
    total.backward()
    for name in ("rows", "factor_a", "factor_b"):
        assert given[name].grad.dtype == torch.float32
        torch.testing.assert_close(
            given[name].grad.double(), exact[name].grad, rtol=0.05, atol=0.1
        )


def test_it_serves_where_it_is_right_and_saves_time(monkeypatch):
    def is_cheaper(**changed):
        given = {**tensors(torch.float32), **changed}
        names = "rows", "factor_a", "kernel", "bias"
        return product.is_cheaper(*(given[name] for name in names))

    assert not is_cheaper()
    monkeypatch.setattr(product, "LARGE_INPUT", GROUPS * ROWS * INPUTS)
    assert is_cheaper() and is_cheaper(bias=None)
    assert not is_cheaper(rows=torch.ones(1, INPUTS))
    for name in ("rows", "kernel", "factor_a", "bias"):
        double = tensors()[name]
        assert not is_cheaper(**{name: double}), name
    frozen = tensors(torch.float32, factor_a=False)
    assert not is_cheaper(factor_a=frozen["factor_a"])


def test_a_kernel_that_trains_has_its_gradient(monkeypatch):
    """The product with a gradient of its own computes it, too."""
    monkeypatch.setattr(product, "LARGE_INPUT", 1)
    given = tensors(kernel=True)
    axes = factors.dense_axes((INPUTS, OUTPUTS))
    inputs = given["rows"]
    result = products.adapted_product(
        inputs, *(given[n] for n in ("kernel", "factor_a", "factor_b")), axes
    )
    (expected,) = torch.autograd.grad(
        (inputs @ given["kernel"]).sum(), given["kernel"]
    )
    result = result.sum()
    (actual,) = torch.autograd.grad(result, given["kernel"])
    torch.testing.assert_close(actual, expected)
