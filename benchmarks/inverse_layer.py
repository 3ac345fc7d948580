"""The inverse layer f(y) = y + ½ tanh(W y) with g given: forward + backward beside the floor."""

from __future__ import annotations

import torch
from harness import compare, options
from torch import Tensor

import invlayer_core as inv


def workload(batch: int, n: int, quick: bool) -> None:
    torch.manual_seed(0)
    weight, y = torch.randn(n, n) / (2 * n**0.5), torch.randn(batch, n)
    cotangent = torch.randn(batch, n)

    def f(y: Tensor) -> Tensor:
        return y + 0.5 * torch.tanh(y @ weight.T)

    def jacobian(y: Tensor) -> Tensor:
        slope = 1 - torch.tanh(y @ weight.T) ** 2
        return 0.5 * slope.unsqueeze(-1) * weight + torch.eye(n)

    x = f(y).requires_grad_()
    transposed = jacobian(y).mT.contiguous()

    def floor() -> None:
        torch.linalg.solve(transposed, cotangent.unsqueeze(-1))
        point = y.detach().requires_grad_()
        torch.autograd.grad(f(point), point, cotangent)

    def by_hand() -> Tensor:
        point = y.detach().requires_grad_()
        basis = torch.eye(n).unsqueeze(1).expand(n, batch, n)
        (rows,) = torch.autograd.grad(f(point), point, basis, is_grads_batched=True)
        return torch.linalg.solve(rows.transpose(0, 1).mT, cotangent.unsqueeze(-1))

    exact = torch.linalg.solve(transposed, cotangent.unsqueeze(-1)).squeeze(-1)

    def layer(**known: object) -> Tensor:
        solution = inv.inverse(x, lambda _x: y.clone(), **known)  # type: ignore[arg-type]
        return torch.autograd.grad(solution, x, cotangent)[0]

    rows = {} if quick else {"inverse(f=f, compile=True)": lambda: layer(f=f, compile=True)}
    error = float((layer(f=f) - exact).norm() / exact.norm())
    compare(
        f"Inverse layer, B = {batch}, n = {n}, forward + backward (error {error:.0e})",
        {
            "floor: solve with J given + one vjp": floor,
            "is_grads_batched + LU by hand, uncertified": by_hand,
            "inverse(f=f)": lambda: layer(f=f),
            **rows,
            "inverse(jacobian=J(y))": lambda: layer(jacobian=jacobian),
        },
        quick=quick,
    )


if __name__ == "__main__":
    quick = options().quick
    for batch in (64, 1024):
        for n in (2, 16, 64):
            workload(batch, n, quick)
