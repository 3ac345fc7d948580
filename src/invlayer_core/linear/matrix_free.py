"""Solve with J through products alone, and describe the solution by conditions of its own.

The products come from the recorded graph of F: Jᵀv is one backward pass, J v two. The solution x of
A x = b, with A = J or Jᵀ at (y, θ), is a root of A(y, θ) x − b. Given that residual, the implicit adjoint
differentiates x by (y, θ, b) to every order, again without forming a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invlayer_core import _functorch
from invlayer_core.conditions.system import System
from invlayer_core.errors import SingularJacobianError
from invlayer_core.jacobians.linearize import Linearization, push_by_forward_mode
from invlayer_core.linear.iterative import Krylov

__all__ = ["LinearResidual", "solve_matrix_free"]

_SLACK = 10.0  # a method stops by its running residual; the measured one may be a little larger


@torch.no_grad()
def solve_matrix_free(
    linearization: Linearization,
    method: Krylov,
    rhs: Tensor,
    exempt: Tensor | None,
    transpose: bool,
    singular: str,
) -> Tensor:
    """x with J x = rhs or Jᵀ x = rhs, ``(B, n)``, without gradient.

    Parameters
    ----------
    linearization : Linearization
    method : Krylov
    rhs : Tensor of shape ``(B, n)``
    exempt : Tensor of bool, shape ``(B,)``, or None
        Samples that get their rhs back: their answer has been decided.
    transpose : bool
    singular : {"raise", "nan", "zero"}
        What a sample gives on which the method does not converge.

    Raises
    ------
    SingularJacobianError
        If the measured residual of a sample is too large, and ``singular`` is ``"raise"``.
    """
    product = linearization.pull_y if transpose else linearization.push_y
    mask = None if exempt is None else exempt.unsqueeze(-1)
    regular = rhs if mask is None else torch.where(mask, torch.zeros_like(rhs), rhs)
    solution = method.solve(product, regular, method.prepare(linearization, transpose=transpose))
    allowed = _SLACK * method.tolerance(rhs.dtype)
    failed = ~(solution.residual <= allowed)  # catches NaN
    if mask is not None:
        failed = failed & ~mask.squeeze(-1)
    x = solution.x if mask is None else torch.where(mask, rhs, solution.x)
    if not bool(_functorch.plain(failed).any()):
        return x
    if singular == "raise":
        raise _not_converged(
            _functorch.plain(solution.residual), _functorch.plain(failed), method, solution.products
        )
    return torch.where(failed.unsqueeze(-1), torch.nan if singular == "nan" else 0.0, x)


def _not_converged(residual: Tensor, failed: Tensor, method: Krylov, products: int) -> SingularJacobianError:
    bad = failed.reshape(-1).nonzero().reshape(-1).tolist()
    shown = ", ".join(f"sample {i} (relative residual {float(residual.reshape(-1)[i]):.1e})" for i in bad[:5])
    return SingularJacobianError(
        f"{method} did not solve the linear system of the derivative for {shown}"
        f"{' and more' if len(bad) > 5 else ''} within {products} products: the Jacobian is singular there, "
        "ill-conditioned, or too hard for the method. Accepted are residuals within rtol. Give it more room "
        "(maxiter=, restart=) or a preconditioner=, take linear_solver=LU(), or choose what such a sample "
        "should give: adjoint=Implicit(singular='nan' | 'zero')."
    )


@final
@dataclass(frozen=True)
class LinearResidual:
    """``R(x, b, y, *θ) = A(y, θ) x − b`` with A = ∂F/∂y or its transpose, differentiable in all of them."""

    system: System
    transpose: bool
    exempt: Tensor | None

    def __call__(self, x: Tensor, rhs: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
        product = self._pull(x, y, theta) if self.transpose else self._push(x, y, theta)
        if self.exempt is not None:  # whose answer is b itself
            product = torch.where(self.exempt.unsqueeze(-1), x, product)
        return product - rhs

    def _pull(self, x: Tensor, y: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
        if _functorch.is_active():
            value, pull = torch.func.vjp(lambda point: self.system.residual(point, theta), y)[:2]
            return pull(x.reshape(value.shape))[0].reshape(x.shape)
        with torch.enable_grad():
            point = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
            value = self.system.residual(point, theta)
            (pulled,) = torch.autograd.grad(
                value, point, x.reshape(value.shape), create_graph=True, materialize_grads=True
            )
        return pulled.reshape(x.shape)

    def _push(self, x: Tensor, y: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
        # The transpose of the linear map c ↦ (∂F/∂y)ᵀ c, applied to x.
        if _functorch.is_active():
            return push_by_forward_mode(
                lambda point: self.system.residual(point, theta), y, x.reshape(y.shape)
            ).reshape(x.shape)
        with torch.enable_grad():
            point = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
            value = self.system.residual(point, theta)
            cotangent = torch.zeros_like(value, requires_grad=True)
            (pulled,) = torch.autograd.grad(value, point, cotangent, create_graph=True)
            (pushed,) = torch.autograd.grad(pulled, cotangent, x.reshape(y.shape), create_graph=True)
        return pushed.reshape(x.shape)
