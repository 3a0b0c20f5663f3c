"""The product of mask groups that has a gradient of its own, on PyTorch."""

import pytest
from helpers import BACKEND

from keras_lora_dropout.core import grouped_product as product

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
@pytest.mark.parametrize("bias", [True, False, None])
def test_value_and_gradient(rows, bias):
    """Against one product after another, and finite differences."""
    given = tensors(rows=rows, bias=bool(bias))
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


def test_it_serves_where_it_is_right_and_saves_time(monkeypatch):
    def is_cheaper(**changed):
        given = {**tensors(torch.float32), **changed}
        del given["factor_b"]
        return product.is_cheaper(**given)

    assert not is_cheaper()
    monkeypatch.setattr(product, "LARGE_INPUT", GROUPS * ROWS * INPUTS)
    assert is_cheaper() and is_cheaper(bias=None)
    assert not is_cheaper(rows=torch.ones(1, INPUTS))
    for name in ("rows", "kernel", "factor_a", "bias"):
        double = tensors()[name]
        assert not is_cheaper(**{name: double}), name
    trains = tensors(torch.float32, kernel=True, factor_a=False)
    assert not is_cheaper(kernel=trains["kernel"])
    assert not is_cheaper(factor_a=trains["factor_a"])
