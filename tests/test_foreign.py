"""ForeignFunction: NumPy values and hand-written rules, under everything that torch can do to a function."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import invlayer_core as inv

F64 = torch.float64


class Wave(inv.ForeignFunction):
    """x, a ↦ (dᵏ/dxᵏ a sin x, a): each derivative by x is a Wave again."""

    def __init__(self, order: int = 0) -> None:
        self.name, self.order = f"wave {order}", order

    def evaluate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        x, a = (tensor.numpy() for tensor in inputs)  # fails for anything but plain tensors
        assert x.ndim == 2
        return [torch.from_numpy(a * np.sin(x + self.order * np.pi / 2)), torch.from_numpy(a.copy())]

    def pull(self, wanted, inputs, outputs, cotangents) -> list[Tensor]:
        x, a = inputs
        rules = [
            lambda: Wave(self.order + 1)(x, a)[0] * cotangents[0],
            lambda: Wave(self.order)(x, torch.ones_like(a))[0] * cotangents[0] + cotangents[1],
        ]
        return [rule() for rule, want in zip(rules, wanted, strict=True) if want]

    def push(self, inputs, outputs, tangents) -> list[Tensor]:
        x, a = inputs
        moved = Wave(self.order + 1)(x, a)[0] * tangents[0]
        return [moved + Wave(self.order)(x, torch.ones_like(a))[0] * tangents[1], tangents[1]]


def plain(x: Tensor, a: Tensor) -> Tensor:
    return (a * torch.sin(x)).square() + a


def foreign(x: Tensor, a: Tensor) -> Tensor:
    first, second = Wave()(x, a)
    return first.square() + second


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    x, a = (torch.rand(3, 2, generator=torch.Generator().manual_seed(i), dtype=F64) for i in range(2))
    return x.requires_grad_(), a.requires_grad_()


def test_plain_autograd_to_second_order(inputs: tuple[Tensor, Tensor]) -> None:
    assert torch.autograd.gradcheck(
        foreign, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(foreign, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
        lambda f: torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f))),
        lambda f: torch.vmap(torch.func.jacrev(torch.vmap(f))),
        lambda f: torch.vmap(lambda x, a: f(x, a[0]), in_dims=(1, None)),
    ],
)
def test_torch_func(inputs: tuple[Tensor, Tensor], transform) -> None:
    x, a = (tensor.detach() for tensor in inputs)
    square = x[:2], a[:2]
    torch.testing.assert_close(transform(foreign)(*square), transform(plain)(*square), rtol=1e-12, atol=1e-13)


def test_nested_forward_mode_is_refused(inputs: tuple[Tensor, Tensor]) -> None:
    x, a = (tensor.detach() for tensor in inputs)
    with pytest.raises(
        inv.UnsupportedTransformError, match=r"^wave 0 in nested forward mode.*Accepted is reverse mode"
    ):
        torch.func.jacfwd(torch.func.jacfwd(foreign))(x, a)


def test_batch_dims_that_differ_are_refused() -> None:
    with pytest.raises(
        inv.ConditionsError, match=r"^wave 0 came with inputs of shapes \(3, 2\), \(2,\).*accepted are equal"
    ):
        Wave()(torch.ones(3, 2), torch.ones(2))


def test_a_running_transform_is_known() -> None:
    seen = []
    torch.vmap(lambda x: seen.append(inv.in_transform()) or x)(torch.ones(2))
    assert (seen, inv.in_transform()) == ([True], False)
