"""Convex layers: ``CvxpyLayer`` beside cvxpylayers (diffcp, Clarabel) and, for QPs, qpth and proxsuite.

For each family the table has forward and backward, and beside it the largest relative error of each layer's
gradients on up to four samples. They are measured against the residual map of the cone program with dense
LU, polished to rounding, which for QPs is another way than the layer's own. Peers that are not installed are
left out, and named.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import cvxpy as cp
import harness
import numpy as np
import torch
from torch import Tensor

import invlayer_core as inv
from invlayer_cvxpy import CvxpyLayer

RNG = np.random.default_rng(0)
Quadratic = Callable[..., tuple[Tensor | None, ...]]
"""P, q, G, h, A and b of the same program as a QP, from the parameters; None for what it has not."""


def draw(*shape: int) -> Tensor:
    return torch.tensor(RNG.standard_normal(shape))


def dense_qp(n: int, batch: int):
    """min ½ xᵀQ x + pᵀx s.t. G x ≤ h, A x = b with Q, G, A constant: the problem that qpth takes."""
    m, q = n, max(1, n // 5)
    root = RNG.standard_normal((n, n)) / n**0.5
    Q = root @ root.T + 0.1 * np.eye(n)
    G, A = RNG.standard_normal((m, n)), RNG.standard_normal((q, n))
    inside = RNG.standard_normal((batch, n))
    x, p, h, b = cp.Variable(n), cp.Parameter(n), cp.Parameter(m), cp.Parameter(q)
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, Q) + p @ x), [G @ x <= h, A @ x == b])
    slack = RNG.random((batch, m))
    values = [3 * draw(batch, n), torch.tensor(inside @ G.T + slack), torch.tensor(inside @ A.T)]
    fixed, rows, equations = map(torch.tensor, (Q, G, A))
    return problem, [p, h, b], [x], values, lambda p, h, b: (fixed, p, rows, h, equations, b)


def qp(n: int, batch: int):
    m = 3 * n // 2
    x, q, G, h = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), [G @ x <= h])
    values = [draw(batch, n), draw(m, n), torch.ones(m)]
    return problem, [q, G, h], [x], values, lambda q, G, h: (torch.eye(n), q, G, h, None, None)


def nnls(n: int, batch: int):
    m = 3 * n // 2
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])

    def quadratic(A: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        return 2 * A.mT @ A, -2 * b @ A, -torch.eye(n), torch.zeros(n), None, None

    return problem, [A, b], [x], [draw(m, n), draw(batch, m)], quadratic


def socp(n: int, batch: int):
    m = n // 2
    x, c, A, b = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    ball = cp.norm(A @ x + b) <= 2
    problem = cp.Problem(cp.Minimize(c @ x + 0.1 * cp.sum_squares(x)), [ball, x >= -1])
    return problem, [c, A, b], [x], [draw(batch, n), draw(m, n), 0.01 * draw(m)]


def portfolio(n: int, batch: int):
    k = max(2, n // 10)
    x, mu, F, d = cp.Variable(n), cp.Parameter(n), cp.Parameter((k, n)), 0.1 + np.abs(RNG.standard_normal(n))
    risk = cp.sum_squares(F @ x) + cp.sum_squares(cp.multiply(d, x))
    problem = cp.Problem(cp.Maximize(mu @ x - risk), [cp.sum(x) == 1, x >= 0])

    def quadratic(mu: Tensor, F: Tensor) -> tuple[Tensor | None, ...]:
        P = 2 * (F.mT @ F + torch.diag(torch.tensor(d**2)))
        return P, -mu, -torch.eye(n), torch.zeros(n), torch.ones(1, n), torch.ones(1)

    return problem, [mu, F], [x], [draw(batch, n), draw(k, n)], quadratic


def entropy(n: int, batch: int):
    k = max(1, n // 5)
    x, a, F, g, matrix = cp.Variable(n), cp.Parameter(n), cp.Parameter((k, n)), cp.Parameter(k), draw(k, n)
    problem = cp.Problem(cp.Minimize(-cp.sum(cp.entr(x)) + a @ x), [F @ x == g, cp.sum(x) == 1])
    return problem, [a, F, g], [x], [draw(batch, n), matrix, matrix.mean(1)]


def logistic(n: int, batch: int):
    k = 2 * n
    w, X, lam, y = (
        cp.Variable(n),
        cp.Parameter((k, n)),
        cp.Parameter(nonneg=True),
        np.sign(RNG.standard_normal(k)),
    )
    loss = cp.sum(cp.logistic(cp.multiply(-y, X @ w))) / k + lam * cp.sum_squares(w)
    return cp.Problem(cp.Minimize(loss)), [X, lam], [w], [draw(batch, k, n), torch.tensor(0.1)]


def sdp(n: int, batch: int):
    """n counts the entries of the matrix."""
    k = max(2, round(n**0.5))
    X, C = cp.Variable((k, k), symmetric=True), cp.Parameter((k, k))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0, cp.diag(X) == 1])
    half = draw(batch, k, k)
    return problem, [C], [X], [half + half.mT]


FAMILIES = [qp, nnls, socp, portfolio, entropy, logistic, sdp]


def timed(layer: Callable, values: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """CPU seconds of forward and backward, and the gradients."""
    leaves = [value.clone().requires_grad_() for value in values]
    began = time.process_time()
    found = layer(*leaves)[0]
    middle = time.process_time()
    (found * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
    return middle - began, time.process_time() - middle, [leaf.grad for leaf in leaves]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    sizes = [max(float(b.abs().max()), 1e-12) for b in exact]
    return max(float((a - b).abs().max()) / s for a, b, s in zip(found, exact, sizes, strict=True))


def peers(problem, parameters, variables, quadratic: Quadratic | None) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if find_spec("cvxpylayers") and find_spec("diffcp"):
        from cvxpylayers.torch import CvxpyLayer as Peer

        peer = Peer(problem, parameters=parameters, variables=variables)
        found["cvxpylayers (diffcp, Clarabel)"] = lambda *values: peer(
            *values, solver_args={"solve_method": "Clarabel"}
        )
    if quadratic and find_spec("qpth"):
        from qpth.qp import QPFunction

        def by_qpth(*values: Tensor) -> list[Tensor]:
            parts = quadratic(*values)
            count = len(parts[1])  # of what a batch shares it returns the mean of the gradients, not the sum
            given = [
                torch.tensor([]) if part is None
                else part.expand(count, *part.shape) if part.requires_grad and part.ndim == k
                else part
                for part, k in zip(parts, (2, 1, 2, 1, 2, 1), strict=True)
            ]  # fmt: skip
            return [QPFunction(verbose=-1, eps=1e-12, maxIter=30)(*given)]

        found["qpth"] = by_qpth
    if quadratic and find_spec("proxsuite"):
        from proxsuite.torch.qplayer import QPFunction as ProxQP

        def by_proxsuite(*values: Tensor) -> list[Tensor]:
            P, q, G, h, A, b = quadratic(*values)
            A, b = (P.new_zeros(0, len(P)), P.new_zeros(0)) if A is None else (A, b)
            count = len(q)
            given = (P, q, A, b, G, torch.full_like(h, -1e20), h)
            batched = [
                (part if part.ndim == k else part.expand(count, *part.shape)).contiguous()
                for part, k in zip(given, (3, 2, 3, 2, 3, 2, 2), strict=True)
            ]
            return [ProxQP(omp_parallel=False)(*batched)[0]]

        found["proxsuite"] = by_proxsuite
    return found


def workload(name: str, posed: tuple, n: int, batch: int, *, quick: bool) -> None:
    problem, parameters, variables, values, *quadratic = posed
    layers: dict[str, Callable] = {"CvxpyLayer": CvxpyLayer(problem, parameters, variables)}
    layers |= peers(problem, parameters, variables, quadratic[0] if quadratic else None)
    residual_map = inv.adjoints.Implicit(singular="consistent", linear_solver=inv.linear.LU())
    few = [
        value[:4] if value.ndim > len(p.shape) else value for value, p in zip(values, parameters, strict=True)
    ]
    exact = timed(CvxpyLayer(problem, parameters, variables, adjoint=residual_map), few)[2]
    print(f"\n{name}, n = {n}, B = {batch}: forward, backward, gradient error")
    rounds = 1 if quick else 3 if n * batch > 2000 else 15
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in layers}
    errors, failed = {}, {}
    for label, layer in layers.items():
        try:
            errors[label] = error(timed(layer, few)[2], exact)
        except Exception as failure:  # a peer's
            failed[label] = type(failure).__name__
    for _ in range(rounds):
        for label, layer in layers.items():
            if label not in failed:
                times[label].append(timed(layer, values)[:2])
    first: list[float] = []
    for label in layers:
        if label in failed:
            print(f"  {label:32s} failed: {failed[label]}")
            continue
        forward, backward = (statistics.median(part) for part in zip(*times[label], strict=True))
        first = first or [forward, backward]
        print(
            f"  {label:32s} {forward * 1e3:10.2f} ms  x {forward / first[0]:8.2f} {backward * 1e3:10.2f} ms  "
            f"x {backward / first[1]:8.2f}   {errors[label]:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", default="10,100")
    parser.add_argument("--batches", default="1,128")
    parser.add_argument("--families", default="")
    arguments = parser.parse_args()
    for peer in ("cvxpylayers", "diffcp", "qpth", "proxsuite"):
        if find_spec(peer) is None:
            print(f"{peer} is not installed: its rows are left out")
    sizes = [4] if arguments.quick else [int(n) for n in arguments.sizes.split(",")]
    batches = [2] if arguments.quick else [int(b) for b in arguments.batches.split(",")]
    chosen = [dense_qp, *FAMILIES]
    if arguments.families:
        chosen = [family for family in chosen if family.__name__ in arguments.families.split(",")]
    for n in sizes:
        for batch in batches:
            for family in chosen:
                RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state  # the same each time
                workload(family.__name__, family(n, batch), n, batch, quick=arguments.quick)


if __name__ == "__main__":
    assert harness  # sets one thread and float64
    warnings.simplefilter("ignore")  # peers'
    main()
