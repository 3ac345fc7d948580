"""One call, forward and backward, of a layer whose problem costs nothing: n = 2, B = 1."""

from __future__ import annotations

from typing import Any

import torch
from harness import compare, options
from torch import Tensor

import invlayer_core as inv

A = torch.tensor([[0.5, 0.1], [0.2, 0.6]])
THETA = torch.tensor([[0.3, -0.2]], requires_grad=True)
COTANGENT = torch.ones(1, 2)


def conditions(y: Tensor, theta: Tensor) -> Tensor:
    return y + (y**3) @ A.T - theta


def jacobian(y: Tensor, _theta: Tensor) -> Tensor:
    return torch.eye(2) + 3 * A * (y * y).unsqueeze(-2)


SOLUTION = inv.root(conditions, torch.zeros(1, 2), THETA.detach())


class Empty(torch.autograd.Function):
    """The floor: torch's own cost of a custom function."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        return theta.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class ByHand(torch.autograd.Function):
    """What people write today: no certificate, no second derivative, no torch.func."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        return SOLUTION.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (theta,) = ctx.saved_tensors
        with torch.enable_grad():
            y, theta = SOLUTION.detach().requires_grad_(), theta.detach().requires_grad_()
            value = conditions(y, theta)
            basis = torch.eye(2).unsqueeze(1)
            (rows,) = torch.autograd.grad(value, y, basis, is_grads_batched=True, retain_graph=True)
            weights = torch.linalg.solve(rows.transpose(0, 1).mT, cotangent)
            return torch.autograd.grad(value, theta, -weights)[0]


def solve(_theta: Tensor) -> Tensor:
    return SOLUTION.clone()


by_autograd = inv.implicit_function(conditions)(solve)
compiled = inv.implicit_function(conditions, compile=True)(solve)
by_hand_jacobian = inv.implicit_function(conditions, jacobian=jacobian)(solve)


def both(layer: Any) -> Any:
    return lambda: torch.autograd.grad(layer(THETA), THETA, COTANGENT)


if __name__ == "__main__":
    quick = options().quick
    rows = {} if quick else {"implicit_function, compile=True": both(compiled)}  # compiling takes seconds
    compare(
        "Per call, n = 2, B = 1, forward + backward, the solver itself free",
        {
            "floor: empty autograd.Function": both(Empty.apply),
            "autograd.Function by hand, uncertified": both(ByHand.apply),
            "implicit_function": both(by_autograd),
            **rows,
            "implicit_function, jacobian given": both(by_hand_jacobian),
            "implicit_function, forward only": lambda: by_autograd(THETA),
            "root, torch.newton": both(lambda theta: inv.root(conditions, torch.zeros(1, 2), theta)),
        },
        quick=quick,
    )
