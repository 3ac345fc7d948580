"""Convex layers: ``CvxpyLayer`` beside cvxpylayers (diffcp, Clarabel) and, for a QP, qpth.

For each family the table has forward and backward, and beside it the largest relative error of each layer's
gradients, measured against the same layer polished to rounding. Peers that are not installed are left out,
and named.
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
    return problem, [p, h, b], [x], values, tuple(map(torch.tensor, (Q, G, A)))


def qp(n: int, batch: int):
    m = 3 * n // 2
    x, q, G, h = cp.Variable(n), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), [G @ x <= h])
    return problem, [q, G, h], [x], [draw(batch, n), draw(m, n), torch.ones(m)]


def nnls(n: int, batch: int):
    m = 3 * n // 2
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0])
    return problem, [A, b], [x], [draw(m, n), draw(batch, m)]


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
    return (
        cp.Problem(cp.Maximize(mu @ x - risk), [cp.sum(x) == 1, x >= 0]),
        [mu, F],
        [x],
        [draw(batch, n), draw(k, n)],
    )


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


def timed(layer: Callable, values: list[Tensor], rounds: int) -> tuple[float, float, list[Tensor]]:
    """Median CPU seconds of forward and backward, and the gradients."""
    forward, backward, leaves = [], [], []
    for _ in range(rounds):
        leaves = [value.clone().requires_grad_() for value in values]
        began = time.process_time()
        found = layer(*leaves)[0]
        middle = time.process_time()
        (found * torch.linspace(-1, 1, found.shape[-1])).sum().backward()
        forward.append(middle - began)
        backward.append(time.process_time() - middle)
    return statistics.median(forward), statistics.median(backward), [leaf.grad for leaf in leaves]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    sizes = [max(float(b.abs().max()), 1e-12) for b in exact]
    return max(float((a - b).abs().max()) / s for a, b, s in zip(found, exact, sizes, strict=True))


def peers(problem, parameters, variables, matrices) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if find_spec("cvxpylayers") and find_spec("diffcp"):
        from cvxpylayers.torch import CvxpyLayer as Peer

        peer = Peer(problem, parameters=parameters, variables=variables)
        found["cvxpylayers (diffcp, Clarabel)"] = lambda *values: peer(
            *values, solver_args={"solve_method": "Clarabel"}
        )
    if matrices and find_spec("qpth"):
        from qpth.qp import QPFunction

        Q, G, A = matrices
        found["qpth"] = lambda p, h, b: [QPFunction(verbose=-1, eps=1e-12, maxIter=30)(Q, p, G, h, A, b)]
    return found


def workload(name: str, posed: tuple, n: int, batch: int, *, quick: bool) -> None:
    problem, parameters, variables, values, *matrices = posed
    layers: dict[str, Callable] = {"CvxpyLayer": CvxpyLayer(problem, parameters, variables)}
    layers |= peers(problem, parameters, variables, matrices[0] if matrices else None)
    polished = CvxpyLayer(
        problem, parameters, variables, polish="auto", adjoint=inv.adjoints.Implicit(singular="consistent")
    )
    exact = timed(polished, values, 1)[2]
    rounds = 1 if quick or n * batch > 2000 else 5
    print(f"\n{name}, n = {n}, B = {batch}: forward, backward, gradient error")
    first = None
    for label, layer in layers.items():
        try:
            forward, backward, gradients = timed(layer, values, rounds)
        except Exception as failure:  # a peer's
            print(f"  {label:32s} failed: {type(failure).__name__}")
            continue
        first = first or (forward, backward)
        print(
            f"  {label:32s} {forward * 1e3:10.2f} ms  x {forward / first[0]:8.2f} {backward * 1e3:10.2f} ms  "
            f"x {backward / first[1]:8.2f}   {error(gradients, exact):.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", default="10,100")
    parser.add_argument("--batches", default="1,128")
    parser.add_argument("--families", default="")
    arguments = parser.parse_args()
    for peer in ("cvxpylayers", "diffcp", "qpth"):
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
                workload(family.__name__, family(n, batch), n, batch, quick=arguments.quick)


if __name__ == "__main__":
    assert harness  # sets one thread and float64
    warnings.simplefilter("ignore")  # peers'
    main()
