"""What is run on the device: every way through the engine, as functions ``device -> tensors``.

Each returns what it computed, values and derivatives; and each must be deterministic, as its results are
compared with those of the same function on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

import invlayer_core as inv
from invlayer_core.adjoints import Implicit

Scenario = Callable[[str], list[Tensor]]


def rand(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Between 0.5 and 1.5, the same on every device; with gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = 0.5 + torch.rand(shape, generator=generator, dtype=dtype)
    return values.to(device).requires_grad_()


def conditions(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + 0.3 * a * torch.sin(y.flip(-1)) + b * y**3 - b


def jacobian(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mixed = torch.diag_embed(0.3 * a * torch.cos(y.flip(-1))).flip(-1)
    return torch.diag_embed(1 + 3 * b * y**2) + mixed


def problem(device: str, *batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """y0, a shared arg, and one per sample."""
    b = rand(device, *batch, 2)
    return near(b), rand(device, 2), b


def near(b: Tensor) -> Tensor:
    """A guess that Newton's method needs few steps from: every op costs time on the fake device."""
    return torch.full_like(b, 0.4).detach()


def derivatives(y: Tensor, *theta: Tensor) -> list[Tensor]:
    """y, a gradient of it, and a gradient of that."""
    first = torch.autograd.grad(y.sin().sum(), theta, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), theta, allow_unused=True)
    return [y, *first, *(g for g in second if g is not None)]


def _root(**keywords: Any) -> Scenario:
    def run(device: str) -> list[Tensor]:
        y0, a, b = problem(device, 3)
        return derivatives(inv.root(conditions, y0, (a, b), **keywords), a, b)

    return run


def _one_system(device: str) -> list[Tensor]:
    y0, a, b = problem(device)
    return derivatives(inv.root(conditions, y0, (a, b)), a, b)


def _elementwise(device: str) -> list[Tensor]:
    b = rand(device, 4)
    return derivatives(inv.root(lambda y, b: y**3 + y - b, near(b), b, event_dims=0), b)


def _matrices(device: str) -> list[Tensor]:
    b = rand(device, 2, 2, 2)
    y = inv.root(lambda y, b: y + 0.1 * y @ y - b, b.detach(), b, event_dims=2)
    return derivatives(y, b)


def _empty_batch(device: str) -> list[Tensor]:
    y0, a, b = problem(device, 0)
    y = inv.root(conditions, y0, (a, b))
    return [y, *torch.autograd.grad(y.sum(), (a, b))]


def _precision(dtype: torch.dtype) -> Scenario:
    def run(device: str) -> list[Tensor]:
        b = rand(device, 3, 2, dtype=dtype)
        y = inv.root(lambda y, b: y**3 + y - b, near(b), b)
        return [y, *torch.autograd.grad(y.sum(), b)]

    return run


def _fixed_point(device: str) -> list[Tensor]:
    y0, a, b = problem(device, 3)
    y = inv.fixed_point(lambda y, a, b: 0.3 * a * torch.sin(y.flip(-1)) + b, y0, (a, b))
    return derivatives(y, a, b)


def _opaque(x: Tensor) -> Tensor:
    """The solution of y + y³ = x, by Newton's method that leaves no graph."""
    y = torch.zeros_like(x)
    for _ in range(30):
        y = y - (y + y**3 - x) / (1 + 3 * y**2)
    return y


def _inverse(known: Callable[[Tensor], Mapping[str, Any]]) -> Scenario:
    def run(device: str) -> list[Tensor]:
        x = rand(device, 3, 2)
        return derivatives(inv.inverse(x, _opaque, **known(x)), x)

    return run


def _slope(y: Tensor) -> Tensor:
    return torch.diag_embed(1 + 3 * y**2)


def _inverse_constant(device: str) -> list[Tensor]:
    x = rand(device, 3, 2)
    y = inv.inverse(x, _opaque, jacobian=_slope(_opaque(x.detach())))
    return [y, *torch.autograd.grad(y.sum(), x)]


def _implicit_function(device: str) -> list[Tensor]:
    x = rand(device, 3, 2)
    return derivatives(inv.implicit_function(lambda y, x: y + y**3 - x)(_opaque)(x), x)


class Parametrised(torch.nn.Module):
    """Conditions with parameters of their own."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rand(device, 2, 2).detach())

    def forward(self, y: Tensor, b: Tensor) -> Tensor:
        return y + 0.2 * torch.tanh(y @ self.weight) - b


def _captured(device: str) -> list[Tensor]:
    y0, _, b = problem(device, 3)
    module = Parametrised(device)
    return derivatives(inv.root(module, y0, b), b, module.weight)


def _failing(policy: str, **keywords: Any) -> Scenario:
    """Sample 1 has no root."""

    def run(device: str) -> list[Tensor]:
        sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).to(device)
        b = rand(device, 3, 2)
        y = inv.root(
            lambda y, b: y**2 - b * sign.unsqueeze(-1), torch.ones_like(b).detach(), b,
            on_failure=policy, options={"maxiter": 5, "backtracks": 2}, **keywords,
        )  # fmt: skip
        return [torch.nan_to_num(result) for result in derivatives(y, b)]

    return run


def _singular(policy: str) -> Scenario:
    """Sample 1 sits on the double root of (y − b)²."""

    def run(device: str) -> list[Tensor]:
        power = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64).to(device)
        b = rand(device, 3, 2)
        solve = inv.implicit_function(
            lambda y, b: (y - b) * ((y - b) * (power - 1) + (2 - power)), adjoint=Implicit(policy)
        )(lambda b: b.clone())
        y = solve(b)
        return [torch.nan_to_num(result) for result in (y, *torch.autograd.grad(y.sum(), b))]

    return run


def _rectangular(policy: str) -> Scenario:
    """One equation for two unknowns."""

    def run(device: str) -> list[Tensor]:
        b = rand(device, 3, 1)
        solve = inv.implicit_function(
            lambda y, b: y.square().sum(-1, keepdim=True) - b, adjoint=Implicit(policy, damping=1e-3)
        )(lambda b: (b / 2).sqrt().expand(-1, 2).contiguous())
        return derivatives(solve(b), b)

    return run


def _ill_conditioned(device: str) -> list[Tensor]:
    """A Hilbert matrix: the pullback does not hold to the digits that it should, and is refined."""
    steps = torch.arange(9, dtype=torch.float64).to(device)
    matrix = 1 / (steps + steps.unsqueeze(-1) + 1)
    b = rand(device, 2, 9)
    y = inv.implicit_function(lambda y, b: y @ matrix - b)(lambda b: torch.linalg.solve(matrix, b.mT).mT)(b)
    return [y, *torch.autograd.grad(y.sum(), b)]


def _layer(a: Tensor, b: Tensor) -> Tensor:
    return inv.root(conditions, near(b), (a, b))


def _dual_numbers(device: str) -> list[Tensor]:
    _, a, b = problem(device, 3)
    with forward_ad.dual_level():
        y = _layer(a, forward_ad.make_dual(b, torch.ones_like(b)))
        return [*forward_ad.unpack_dual(y)]


def _transform(transform: Callable[..., Any]) -> Scenario:
    def run(device: str) -> list[Tensor]:
        _, a, b = (tensor.detach() for tensor in problem(device, 3))
        return [transform(lambda a: _layer(a, b))(a)]

    return run


def _func_jvp(device: str) -> list[Tensor]:
    _, a, b = (tensor.detach() for tensor in problem(device, 3))
    return list(torch.func.jvp(_layer, (a, b), (torch.ones_like(a), torch.ones_like(b))))


def _vmap(device: str) -> list[Tensor]:
    _, a, b = (tensor.detach() for tensor in problem(device, 4, 3))
    return [torch.vmap(_layer, in_dims=(None, 0))(a, b)]


def _batched_cotangents(device: str) -> list[Tensor]:
    y0, a, b = problem(device, 3)
    y = inv.root(conditions, y0, (a, b))
    cotangents = torch.eye(6, dtype=y.dtype, device=device).reshape(6, 3, 2)
    return list(torch.autograd.grad(y, (a, b), cotangents, is_grads_batched=True))


def _batch_jacobian(method: str) -> Scenario:
    def run(device: str) -> list[Tensor]:
        y, a, b = problem(device, 3)
        y = (y + 0.3).requires_grad_()
        blocks = inv.batch_jacobian(lambda y: conditions(y, a, b), y, method=method, create_graph=True)
        return [blocks, *torch.autograd.grad(blocks.sum(), (y, a, b))]

    return run


class Picard(inv.Solver):
    """A per-sample NumPy solver: y ← y − F(y)/4, and then Newton's steps; always as many of each."""

    residuals, jacobians = 7, 5

    def solve(self, problem: inv.SampleProblem, y0: np.ndarray, options: Any) -> inv.SolverResult:
        y = y0
        for _ in range(self.residuals - self.jacobians):
            y = y - problem.residual(y) / 4
        for _ in range(self.jacobians):
            y = y - np.linalg.solve(problem.jacobian(y), problem.residual(y))
        return inv.SolverResult(y=y)


class Crossing(NamedTuple):
    """A system whose args have shapes that nothing else has: n = 2 unknowns, B = 3 samples."""

    y0: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def on(cls, device: str) -> Crossing:
        return cls(torch.zeros(3, 2, dtype=torch.float64, device=device), rand(device, 5), rand(device, 3, 7))

    @staticmethod
    def conditions(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + 0.1 * a.sum() * torch.sin(y.flip(-1)) + b.mean(-1, keepdim=True) * y**3 - b[:, :2]


def _crossing(how: str) -> Scenario:
    def run(device: str) -> list[Tensor]:
        y0, a, b = Crossing.on(device)
        return derivatives(inv.root(Crossing.conditions, y0, (a, b), solver=Picard(), batch=how), a, b)

    return run


def numpy_function(b: np.ndarray) -> np.ndarray:
    """The solution of y + y³ = b."""
    y = np.zeros_like(b)
    for _ in range(30):
        y = y - (y + y**3 - b) / (1 + 3 * y**2)
    return y


def _from_numpy(device: str) -> list[Tensor]:
    b = rand(device, 3, 2)
    solve = inv.implicit_function(lambda y, b: y + y**3 - b)(inv.from_numpy(numpy_function))
    return derivatives(solve(b), b)


def _info(device: str) -> list[Tensor]:
    y0, a, b = problem(device, 3)
    y, info = inv.root(conditions, y0, (a, b), return_info=True)
    return [*derivatives(y, a, b), info.ok, info.residual, info.tolerance, info.iterations, info.polish]


def _matrix_free(method: Any, **keywords: Any) -> Scenario:
    """Symmetric and positive definite, so that every Krylov method applies."""

    def run(device: str) -> list[Tensor]:
        b = rand(device, 3, 2)
        adjoint = Implicit(linear_solver=method)
        y = inv.root(
            lambda y, b: y + 0.1 * y.sum(-1, keepdim=True) + b * y**3 - b, near(b), b,
            adjoint=adjoint, **keywords,
        )  # fmt: skip
        return derivatives(y, b)

    return run


def energy(y: Tensor, b: Tensor) -> Tensor:
    return (y.exp() - b * y + 0.1 * y.flip(-1) * y).sum(-1)


def _minimize(device: str) -> list[Tensor]:
    b = rand(device, 3, 2)
    y = inv.minimize(energy, torch.zeros_like(b), b, solver=lambda y0, b: _stationary(b), rtol=1e-2)
    return derivatives(y, b)


def _stationary(b: Tensor) -> Tensor:
    y = torch.zeros_like(b)
    for _ in range(20):
        y = y - (y.exp() - b + 0.2 * y.flip(-1)) / (y.exp() + 0.2)
    return y


def _least_squares(device: str) -> list[Tensor]:
    b = rand(device, 2, 3)
    residuals = lambda y, b: torch.cat([y - b[..., :1], y.sin() - b[..., 1:]], -1)  # noqa: E731
    y0 = torch.full_like(b[..., :1], 0.9)
    return derivatives(inv.least_squares(residuals, y0, b, solver="torch.levenberg_marquardt"), b)


def _manifold(device: str) -> list[Tensor]:
    """A rotation beside a number, with a robust loss; first order alone, as each op costs time."""
    SO3, Euclidean = inv.manifolds.SO3(), inv.manifolds.Euclidean()
    points = rand(device, 3, 3).detach()
    b = (points * 1.001).unsqueeze(0).requires_grad_()

    def residuals(y: dict[str, Tensor], b: Tensor) -> Tensor:
        return SO3.act(y["turn"].unsqueeze(-2), points) * y["scale"][..., None, None] - b

    y = inv.least_squares(
        residuals,
        {"turn": SO3.identity(points).expand(1, 4), "scale": torch.ones_like(points[:1, 0])},
        b,
        solver="torch.levenberg_marquardt",
        options={"maxiter": 4},
        manifold={"turn": SO3, "scale": Euclidean},
        event_dims={"turn": 1, "scale": 0},
        loss=inv.losses.SoftL1(1.0, event_dims=1),
    )
    packed = torch.cat([y["turn"], y["scale"].unsqueeze(-1)], -1)
    return [packed, *torch.autograd.grad(packed.sin().sum(), b)]


def _nlp(device: str) -> list[Tensor]:
    """Projection onto a simplex: an equation, and bounds of which some are active."""
    b = rand(device, 3, 3)
    lower = torch.zeros(3, dtype=torch.float64, device=device).requires_grad_()

    def project(y0: Tensor, b: Tensor, lower: Tensor) -> Tensor:
        level = torch.zeros_like(b[..., :1])
        for _ in range(60):
            y = (b - level).clamp_min(0)
            level = level + (y.sum(-1, keepdim=True) - 1) / 3
        return (b - level).clamp_min(0)

    y, multipliers = inv.nlp(
        lambda y, b, _: 0.5 * (y - b).square().sum(-1),
        torch.full_like(b, 1 / 3),
        (b, lower),
        eq=lambda y, b, _: y.sum(-1, keepdim=True) - 1,
        bounds=(lower, None),
        solver=project,
        return_multipliers=True,
    )
    return derivatives(torch.cat([y, *multipliers], -1), b, lower)


def _program(device: str, batch: int = 3) -> dict[str, Tensor]:
    """Bounds on both sides are active, and a row that all samples share."""
    root = rand(device, 3, 3)
    return {
        "P": (root @ root.mT + torch.eye(3, dtype=torch.float64, device=device)).detach().requires_grad_(),
        "q": (rand(device, batch, 3) * 4 - 6).detach().requires_grad_(),
        "G": rand(device, 1, 3),
        "h": rand(device, batch, 1),
        "lb": -rand(device, 3).detach(),
        "ub": rand(device, 3).detach().requires_grad_(),
    }


def _qp(device: str) -> list[Tensor]:
    given = _program(device)
    x, multipliers = inv.qp(**given, solver="torch.qp", return_multipliers=True)
    moving = [tensor for tensor in given.values() if tensor.requires_grad]
    return derivatives(torch.cat([x, *multipliers], -1), *moving)


def _qp_failed(device: str) -> list[Tensor]:
    given = _program(device)
    nan = torch.zeros(3, 1, dtype=torch.float64, device=device)
    nan[1] = torch.nan
    q = (given.pop("q").detach() + nan).requires_grad_()
    x, info = inv.qp(q=q, **given, solver="torch.qp", on_failure="nan", return_info=True)
    grads = torch.autograd.grad(x[[0, 2]].sum(), (q, given["P"]))
    return [x.nan_to_num(9.0), info.ok, info.constraints.active, *grads]


SCENARIOS: dict[str, Scenario] = {
    "qp": _qp,
    "qp_failed": _qp_failed,
    "newton": _root(),
    "analytic_jacobian": _root(jacobian=jacobian),
    "polish": _root(polish=2),
    "polish_auto": _root(polish="auto"),
    "return_info": _info,
    "one_system": _one_system,
    "elementwise": _elementwise,
    "matrices": _matrices,
    "empty_batch": _empty_batch,
    "float32": _precision(torch.float32),
    "float16": _precision(torch.float16),
    "bfloat16": _precision(torch.bfloat16),
    "fixed_point": _fixed_point,
    "inverse_f": _inverse(lambda x: {"f": lambda y: y + y**3}),
    "inverse_jacobian": _inverse(lambda x: {"jacobian": _slope}),
    "inverse_constant": _inverse_constant,
    "implicit_function": _implicit_function,
    "minimize": _minimize,
    "least_squares": _least_squares,
    "manifold": _manifold,
    "nlp": _nlp,
    "captured_module": _captured,
    "failed_nan": _failing("nan"),
    "failed_zero_grad": _failing("zero_grad"),
    "failed_analytic_jacobian": _failing("nan", jacobian=lambda y, b: torch.diag_embed(2 * y)),
    "singular_lstsq": _singular("lstsq"),
    "singular_damped": _singular("damped"),
    "singular_nan": _singular("nan"),
    "singular_zero": _singular("zero"),
    "rectangular_lstsq": _rectangular("lstsq"),
    "rectangular_damped": _rectangular("damped"),
    "ill_conditioned": _ill_conditioned,
    "gmres": _matrix_free(inv.linear.GMRES()),
    "bicgstab": _matrix_free(inv.linear.BiCGStab()),
    "cg": _matrix_free(inv.linear.CG()),
    "dual_numbers": _dual_numbers,
    "func_jvp": _func_jvp,
    "func_jacrev": _transform(torch.func.jacrev),
    "func_jacfwd": _transform(torch.func.jacfwd),
    "func_hessian": _transform(torch.func.hessian),
    "nested_forward": _transform(lambda f: torch.func.jacfwd(torch.func.jacfwd(f))),
    "nested_reverse": _transform(lambda f: torch.func.jacrev(torch.func.jacrev(f))),
    "func_vmap": _vmap,
    "batched_cotangents": _batched_cotangents,
    "batch_jacobian_fast": _batch_jacobian("fast"),
    "batch_jacobian_full": _batch_jacobian("full"),
    "numpy_serial": _crossing("serial"),
    "numpy_lockstep": _crossing("lockstep"),
    "numpy_function": _from_numpy,
}
