"""Every transform with every linear solver and every problem kind; ``docs/transforms.md`` shows the outcome.

A cell of the table is one of two: the derivative equals that of Newton's method unrolled ("✓"), or the call
raises ``UnsupportedTransformError`` ("raises"). Anything else fails here, and so does a table that says other
than what happens. ``python -m tests.test_transform_table`` prints the table anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.opaque import numpy_newton, unrolled
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.adjoints import Implicit

PAGE = Path(__file__).parents[1] / "docs" / "transforms.md"
SIZE, BATCH = 3, 2
FLOAT = torch.float64
Layer = Callable[[Tensor], Tensor]

# Symmetric positive definite, for Cholesky and CG; with the other sign y + F(y) contracts, for Neumann.
MATRIX = torch.tensor([[1.0, 0.2, 0.1], [0.2, 0.9, -0.1], [0.1, -0.1, 1.1]], dtype=FLOAT)


def conditions(y: Tensor, t: Tensor, sign: float) -> Tensor:
    return sign * (0.5 * y @ MATRIX + 0.1 * y**3 - t)


def jacobian(y: Tensor, t: Tensor, sign: float) -> Tensor:
    return sign * (0.5 * MATRIX + 0.3 * torch.diag_embed(y**2))


def oracle(t: Tensor) -> Tensor:
    return unrolled(
        lambda y, t: conditions(y, t, 1.0), lambda y, t: jacobian(y, t, 1.0), torch.zeros_like(t).detach(), t
    )


@inv.from_numpy
def opaque(t: np.ndarray) -> np.ndarray:
    matrix = MATRIX.numpy()
    return numpy_newton(
        lambda y: 0.5 * y @ matrix + 0.1 * y**3 - t,
        lambda y: 0.5 * matrix + 0.3 * (y**2)[..., None] * np.eye(SIZE),
        np.zeros_like(t),
    )


def root(adjoint: Implicit, sign: float) -> Layer:
    return lambda t: inv.root(conditions, torch.zeros_like(t).detach(), (t, sign), adjoint=adjoint)


def fixed_point(adjoint: Implicit, sign: float) -> Layer:
    def step(y: Tensor, t: Tensor) -> Tensor:
        return y + conditions(y, t, sign)

    return lambda t: inv.fixed_point(step, torch.zeros_like(t).detach(), t, adjoint=adjoint)


def inverse(adjoint: Implicit, sign: float) -> Layer:
    def f(y: Tensor) -> Tensor:
        return sign * (0.5 * y @ MATRIX + 0.1 * y**3)

    return lambda t: inv.inverse(sign * t, lambda x: opaque(sign * x), f=f, adjoint=adjoint)


def implicit_function(adjoint: Implicit, sign: float) -> Layer:
    return inv.implicit_function(lambda y, t: conditions(y, t, sign), adjoint=adjoint)(opaque)


KINDS = (root, fixed_point, inverse, implicit_function)
TIGHT = 1e-14
SOLVERS: dict[str, Callable[[], Any]] = {
    "LU": inv.linear.LU,
    "Cholesky": inv.linear.Cholesky,
    "Lstsq": inv.linear.Lstsq,
    "SparseLU": lambda: inv.linear.SparseLU(torch.ones(SIZE, SIZE, dtype=torch.bool)),
    "GMRES": lambda: inv.linear.GMRES(rtol=TIGHT, check_every=1),
    "BiCGStab": lambda: inv.linear.BiCGStab(rtol=TIGHT, check_every=1),
    "CG": lambda: inv.linear.CG(rtol=TIGHT, check_every=1),
    "Neumann": lambda: inv.linear.Neumann(rtol=TIGHT),
}


def loss(layer: Layer) -> Callable[[Tensor], Tensor]:
    return lambda t: (layer(t).sin() * torch.linspace(0.5, 1.5, SIZE, dtype=FLOAT)).sum()


def by_backward(order: int) -> Callable[[Layer], Callable[[Tensor], Tensor]]:
    def derivative(layer: Layer) -> Callable[[Tensor], Tensor]:
        def of(t: Tensor) -> Tensor:
            t = t.clone().requires_grad_()
            value = loss(layer)(t)
            for k in range(1, order + 1):
                (first,) = torch.autograd.grad(value, t, create_graph=k < order)
                value = (first * torch.linspace(1.0, 2.0, t.numel(), dtype=FLOAT).reshape(t.shape)).sum()
            return first

        return of

    return derivative


def by_dual_numbers(layer: Layer) -> Callable[[Tensor], Tensor]:
    def of(t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(t, torch.linspace(1.0, 2.0, t.numel(), dtype=FLOAT).reshape(t.shape))
            return forward_ad.unpack_dual(layer(dual)).tangent

    return of


TRANSFORMS: dict[str, Callable[[Layer], Callable[[Tensor], Any]]] = {
    "backward": by_backward(1),
    "double backward": by_backward(2),
    "third order by backward": by_backward(3),
    "dual numbers (`forward_ad`)": by_dual_numbers,
    "`grad`": lambda layer: grad(loss(layer)),
    "`jacrev`": jacrev,
    "`jacfwd`": jacfwd,
    "`vmap`": vmap,
    "`vmap(grad)`": lambda layer: vmap(grad(loss(layer))),
    "`grad` of `vmap`": lambda layer: grad(loss(vmap(layer))),
    "`hessian`": lambda layer: hessian(loss(layer)),
    "`vmap(hessian)`": lambda layer: vmap(hessian(loss(layer))),
    "`jacrev(jacrev)`": lambda layer: jacrev(jacrev(loss(layer))),
    "`jacrev(jacfwd)`": lambda layer: jacrev(jacfwd(loss(layer))),
    "`jacfwd(jacfwd)`": lambda layer: jacfwd(jacfwd(loss(layer))),
    "`jacrev(hessian)`": lambda layer: jacrev(hessian(loss(layer))),
}


def point() -> Tensor:
    return torch.linspace(-0.6, 0.9, BATCH * SIZE, dtype=FLOAT).reshape(BATCH, SIZE)


def outcome(transform: str, solver: str, kind: Callable[..., Layer]) -> str:
    """What becomes of one cell for one kind; raises where it is neither exact nor refused."""
    layer = kind(Implicit(linear_solver=SOLVERS[solver]()), -1.0 if solver == "Neumann" else 1.0)
    try:
        ours = TRANSFORMS[transform](layer)(point())
    except inv.UnsupportedTransformError:
        return "raises"
    torch.testing.assert_close(ours, TRANSFORMS[transform](oracle)(point()), rtol=1e-9, atol=1e-10)
    return "✓"


def documented() -> dict[tuple[str, str], str]:
    """The table of the page, by transform and solver."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    names = [name.strip("`").removesuffix("()") for name in header[1:]]
    return {(row[0], name): cell for row in rows for name, cell in zip(names, row[1:], strict=True)}


NEEDS_SCIPY = pytest.mark.plugin("invlayer-scipy")


@pytest.mark.parametrize(
    "kind",
    [root, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize(
    "solver",
    [pytest.param(name, marks=NEEDS_SCIPY) if name == "SparseLU" else name for name in SOLVERS],
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_table_says_what_happens(transform: str, solver: str, kind: Callable[..., Layer]) -> None:
    assert outcome(transform, solver, kind) == documented()[transform, solver]


def test_the_table_is_whole() -> None:
    assert set(documented()) == {(transform, solver) for transform in TRANSFORMS for solver in SOLVERS}


def test_a_wrong_derivative_is_neither_exact_nor_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: here the oracle's derivative is that of another function."""
    monkeypatch.setitem(globals(), "oracle", lambda t: 1.001 * opaque(t) + 0 * t)
    with pytest.raises(AssertionError):
        outcome("backward", "LU", implicit_function)


def table() -> str:
    """The table as Markdown, from trying every cell with every kind."""
    lines = ["| | " + " | ".join(f"`{name}()`" for name in SOLVERS) + " |", "|---" * (len(SOLVERS) + 1) + "|"]
    for transform in TRANSFORMS:
        cells = []
        for solver in SOLVERS:
            (cell,) = {outcome(transform, solver, kind) for kind in KINDS}
            cells.append(cell)
        lines.append(f"| {transform} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
