"""The root layer y + A y³ = θ: ``torch.newton`` beside Newton by hand, and backward beside its floor."""

from __future__ import annotations

import torch
from harness import compare, options
from torch import Tensor

import invlayer_core as inv


def workload(n: int, batch: int, quick: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.rand(n, n, generator=generator) < 0.3
    a = 0.5 * torch.eye(n) + 0.5 * sparse * torch.rand(n, n, generator=generator) / max(1.0, 0.3 * n)
    theta = (1.5 * torch.randn(batch, n, generator=generator)).requires_grad_()
    cotangent = torch.randn(batch, n, generator=generator)

    def conditions(y: Tensor, theta: Tensor) -> Tensor:
        return y + (y**3) @ a.T - theta

    def jacobian(y: Tensor, _theta: Tensor) -> Tensor:
        return torch.eye(n) + 3 * a * (y * y).unsqueeze(-2)

    def newton_by_hand() -> Tensor:
        y, target = torch.zeros(batch, n), theta.detach()
        for _ in range(50):
            residual = conditions(y, target)
            if residual.abs().max() < 1e-10:
                break
            y = y - torch.linalg.solve(jacobian(y, target), residual.unsqueeze(-1)).squeeze(-1)
        return y

    solution = inv.root(conditions, torch.zeros(batch, n), theta)
    point = solution.detach()
    transposed = jacobian(point, theta.detach()).mT.contiguous()

    def floor() -> None:
        torch.linalg.solve(transposed, cotangent.unsqueeze(-1))
        fresh = theta.detach().requires_grad_()
        torch.autograd.grad(conditions(point, fresh), fresh, cotangent)

    def by_hand() -> Tensor:
        y, fresh = point.detach().requires_grad_(), theta.detach().requires_grad_()
        value = conditions(y, fresh)
        basis = torch.eye(n).unsqueeze(1).expand(n, batch, n)
        (rows,) = torch.autograd.grad(value, y, basis, is_grads_batched=True, retain_graph=True)
        weights = torch.linalg.solve(rows.transpose(0, 1).mT, cotangent.unsqueeze(-1)).squeeze(-1)
        return torch.autograd.grad(value, fresh, -weights)[0]

    given = inv.root(conditions, torch.zeros(batch, n), theta, jacobian=jacobian)
    backward = {
        "floor: solve with J given + one vjp": floor,
        "is_grads_batched + LU by hand, uncertified": by_hand,
        "root": lambda: torch.autograd.grad(solution, theta, cotangent, retain_graph=True),
        "root, jacobian given": lambda: torch.autograd.grad(given, theta, cotangent, retain_graph=True),
    }
    compare(f"Root layer, n = {n}, B = {batch}, backward", backward, quick=quick)
    with torch.no_grad():
        start = torch.zeros(batch, n)
        forward = {
            "batched Newton by hand, J given": newton_by_hand,
            "torch.newton, J given": lambda: inv.root(conditions, start, theta, jacobian=jacobian),
            "torch.newton, J by autograd": lambda: inv.root(conditions, start, theta),
        }
        compare(f"Root layer, n = {n}, B = {batch}, forward", forward, quick=quick)


if __name__ == "__main__":
    quick = options().quick
    for n, batch in ((2, 1), (10, 100), (10, 1000), (50, 100), (2, 1000)):
        workload(n, batch, quick)
