"""Quadratic programs, all six gradients: beside the raw solver with a backward pass by hand, and peers.

The floor is what cannot be avoided: the library's own solve by ``qpsolvers.solve_problem``, which is what the
adapter calls, too, on matrices already in the form that it wants; and one factorisation of the active
constraints' KKT matrix, by NumPy or SuperLU, with no check of either. Peers (dqp, qpth, proxsuite,
cvxpylayers) are rows where they are installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import qpsolvers
import scipy.sparse as sp
import torch
from harness import compare, options
from scipy.sparse.linalg import splu
from torch import Tensor

import invlayer_core as inv

warnings.simplefilter("ignore")  # of the peers
NAMES = ("P", "q", "G", "h", "A", "b")
AT_1E6 = {
    "clarabel": {"tol_gap_abs": 1e-6, "tol_gap_rel": 1e-6, "tol_feas": 1e-6},
    "daqp": {},
    "piqp": {"eps_abs": 1e-6, "eps_rel": 1e-6},
    "proxqp": {"eps_abs": 1e-6, "eps_rel": 0.0},
}


def peer(module: str) -> Any:
    """A peer, or None with a line that says so."""
    try:
        return import_module(module)
    except ImportError as error:
        print(f"  ({module} is not installed: {error})")
        return None


def dense(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    m, k = n, n // 5
    root = torch.randn(n, n, generator=draws) / n**0.5
    G, A = torch.randn(m, n, generator=draws), torch.randn(k, n, generator=draws)
    inside = torch.randn(*batch, n, generator=draws)
    h = inside @ G.T + torch.rand(*batch, m, generator=draws)
    q = 3 * torch.randn(*batch, n, generator=draws)
    return [root @ root.T + 0.1 * torch.eye(n), q, G, h, A, inside @ A.T]


def chain(n: int) -> dict[str, Any]:
    """min ½‖z − c‖² with neighbours no more than 1 apart."""
    c = 3 * np.random.default_rng(0).normal(size=n)
    steps = sp.diags([np.ones(n - 1), -np.ones(n - 1)], [0, 1], shape=(n - 1, n))
    return {
        "P": sp.eye(n, format="csc"), "q": -c, "G": sp.vstack([steps, -steps], format="csc"),
        "h": np.ones(2 * (n - 1)),
    }  # fmt: skip


def simplex(n: int) -> dict[str, Any]:
    """The projection onto the simplex, z ≥ 0 as rows."""
    c = np.random.default_rng(0).normal(size=n)
    return {
        "P": sp.eye(n, format="csc"), "q": -c, "G": -sp.eye(n, format="csc"), "h": np.zeros(n),
        "A": sp.csc_matrix(np.ones((1, n))), "b": np.ones(1),
    }  # fmt: skip


def by_hand(given: dict[str, Any], solver: str, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The raw solve, and the six gradients from one factorisation: no certificate, no second order."""
    found = qpsolvers.solve_problem(qpsolvers.Problem(**given), solver=solver, **AT_1E6[solver])
    x, n = found.x, len(weights)
    nu = np.zeros(0) if given.get("A") is None else np.asarray(found.y)
    lam = np.asarray(found.z)
    active = lam > given["h"] - given["G"] @ x
    sparse = sp.issparse(given["P"])
    if sparse:
        kept = given["G"].tocsr()[active]
        C = kept if not len(nu) else sp.vstack([given["A"], kept])
        K = sp.bmat([[given["P"], C.T], [C, None]], format="csc")
        dense_row = len(nu) > 0  # which minimum degree on Kᵀ + K does not go well with
        solve = splu(K, permc_spec="COLAMD" if dense_row else "MMD_AT_PLUS_A").solve
    else:
        C = np.vstack([given["A"], given["G"][active]]) if len(nu) else given["G"][active]
        K = np.block([[given["P"], C.T], [C, np.zeros((len(C), len(C)))]])
        solve = lambda rhs: np.linalg.solve(K, rhs)  # noqa: E731
    w = solve(np.concatenate([weights, np.zeros(C.shape[0])]))
    wx, wa, wg = w[:n], w[n : n + len(nu)], np.zeros(len(lam))
    wg[active] = w[n + len(nu) :]
    outer = _on_pattern if sparse else _full
    grads = {
        "P": -0.5 * outer(given["P"], wx, x, x, wx),
        "q": -wx,
        "G": -outer(given["G"], wg, x, lam, wx),
        "h": wg,
    }
    if len(nu):
        grads |= {"A": -outer(given["A"], wa, x, nu, wx), "b": wa}
    return grads


def _full(_: Any, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.outer(a, b) + np.outer(c, d)


def _on_pattern(matrix: Any, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    places = matrix.tocoo()
    return a[places.row] * b[places.col] + c[places.row] * d[places.col]


def as_tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    def tensor(value: Any) -> Tensor:
        if not sp.issparse(value):
            return torch.as_tensor(value)
        places = value.tocoo()
        indices = np.stack([places.row, places.col])
        return torch.sparse_coo_tensor(indices, places.data, places.shape, check_invariants=False).coalesce()

    return {name: tensor(value).requires_grad_() for name, value in given.items()}


def total(title: str, given: dict[str, Any], solver: str, quick: bool) -> None:
    """Forward and backward of one program."""
    n = len(given["q"])
    weights = np.cos(np.arange(n))
    inputs, cotangent = as_tensors(given), torch.as_tensor(weights)

    def ours() -> Any:
        x = inv.qp(**inputs, solver=f"qpsolvers.{solver}", options=AT_1E6[solver])
        return torch.autograd.grad(x, list(inputs.values()), cotangent)

    cases: dict[str, Callable[[], Any]] = {
        "floor: raw solver + backward by hand": lambda: by_hand(given, solver, weights),
        "inv.qp": ours,
    }
    if (dqp := peer("dqp.dQP")) is not None:
        cases["dqp"] = _dqp(dqp, given, solver, cotangent)
    compare(f"{title}, {solver} at 1e-6, forward + backward", cases, quick=quick)


def _dqp(dqp: Any, given: dict[str, Any], solver: str, cotangent: Tensor) -> Callable[[], Any]:
    sparse = sp.issparse(given["P"])
    settings = dqp.build_settings(solve_type="sparse" if sparse else "dense", qp_solver=solver)
    layer = dqp.dQP_layer(settings=settings)

    def tensor(value: Any) -> Tensor:
        if not sp.issparse(value):
            return torch.as_tensor(value).clone().requires_grad_()
        return torch.sparse_csc_tensor(
            value.indptr, value.indices, value.data, value.shape, requires_grad=True
        )

    inputs = {name: tensor(given[name]) for name in NAMES if name in given}

    def run() -> Any:
        x = layer(*(inputs.get(name) for name in NAMES))[0]
        return torch.autograd.grad(x.reshape(-1), list(inputs.values()), cotangent, allow_unused=True)

    return run


def many(batch: int, n: int, quick: bool) -> None:
    """A batch, every argument batched and shared alike: beside a Python loop of the peer."""
    shared = dense(n, batch=(batch,))
    whole = [
        t if t.ndim == (3 if i % 2 == 0 else 2) else t.expand(batch, *t.shape) for i, t in enumerate(shared)
    ]
    whole = [t.clone().requires_grad_() for t in whole]
    cotangent = torch.randn(batch, n, generator=torch.Generator().manual_seed(1))

    def run(solver: str) -> Any:
        x = inv.qp(*whole, solver=solver)
        return torch.autograd.grad(x, whole, cotangent)

    cases: dict[str, Callable[[], Any]] = {
        "floor: loop of raw daqp": lambda: [
            qpsolvers.solve_problem(qpsolvers.Problem(*(t[i].detach().numpy() for t in whole)), solver="daqp")
            for i in range(batch)
        ],
        "inv.qp, qpsolvers.daqp": lambda: run("qpsolvers.daqp"),
        "inv.qp, torch.qp": lambda: run("torch.qp"),
    }
    if (dqp := peer("dqp.dQP")) is not None:
        layer = dqp.dQP_layer(settings=dqp.build_settings(solve_type="dense", qp_solver="daqp"))

        def theirs() -> Any:
            return torch.autograd.grad(layer(*whole)[0].reshape(batch, n), whole, cotangent)

        cases["dqp, daqp"] = theirs
    compare(f"B = {batch}, n = {n}, every argument batched, forward + backward", cases, quick=quick)


def shared_matrices(n: int, batch: int, quick: bool) -> None:
    """P, G and A shared, gradients for q, h and b: forward and backward apart."""
    P, q, G, h, A, b = dense(n, batch=(batch,))
    inputs = [t.requires_grad_() for t in (q, h, b)]
    cotangent = torch.randn(batch, n, generator=torch.Generator().manual_seed(1))
    prox = import_module("proxsuite").proxqp.dense
    arrays = {name: t.detach().numpy() for name, t in zip(NAMES, (P, q, G, h, A, b), strict=True)}
    nothing = np.full(h.shape, -1e20)

    def raw() -> list[Any]:
        results = []
        for i in range(batch):
            qp = prox.QP(n, b.shape[-1], h.shape[-1])
            qp.settings.eps_abs = 1e-9
            qp.init(
                arrays["P"],
                arrays["q"][i],
                arrays["A"],
                arrays["b"][i],
                arrays["G"],
                nothing[i],
                arrays["h"][i],
            )
            qp.solve()
            results.append((qp.results.x.copy(), qp.results.z.copy()))
        return results

    layers = {
        "inv.qp, qpsolvers.proxqp": lambda: inv.qp(
            P, q, G, h, A, b, solver="qpsolvers.proxqp", options={"eps_abs": 1e-9, "eps_rel": 0.0}
        ),
        "inv.qp, torch.qp": lambda: inv.qp(P, q, G, h, A, b, solver="torch.qp"),
        **_peer_layers(P, q, G, h, A, b),
    }
    solutions = {name: layer() for name, layer in layers.items()}
    z = torch.tensor(np.array([lam for _, lam in raw()]))
    forward: dict[str, Callable[[], Any]] = {"floor: loop of raw ProxQP": raw, **layers}
    backward: dict[str, Callable[[], Any]] = {
        "batched LU of the full KKT matrix": _full_kkt(
            P, G, A, q, h, solutions["inv.qp, torch.qp"], z, cotangent
        ),
        "floor: masked Schur complement": _masked_schur(P, G, A, z, cotangent),
        **{
            name: lambda x=x: torch.autograd.grad(x, inputs, cotangent, retain_graph=True)
            for name, x in solutions.items()
        },
    }
    compare(f"Shared matrices, n = {n}, B = {batch}, forward", forward, quick=quick)
    compare(f"Shared matrices, n = {n}, B = {batch}, backward", backward, quick=quick)


def _peer_layers(
    P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
) -> dict[str, Callable[[], Any]]:
    layers: dict[str, Callable[[], Any]] = {}
    expanded = [t.expand(len(q), *t.shape).contiguous() for t in (P, G, A)]
    if (qpth := peer("qpth.qp")) is not None:
        solve = qpth.QPFunction(eps=1e-12, verbose=-1, maxIter=30, check_Q_spd=False)
        layers["qpth"] = lambda: solve(P, q, G, h, A, b)
    if (theirs := peer("proxsuite.torch.qplayer")) is not None:
        low = torch.full_like(h.detach(), -1e20)
        layers["proxsuite"] = lambda: theirs.QPFunction(omp_parallel=False)(
            expanded[0], q, expanded[2], b, expanded[1], low, h
        )[0]
    if len(q) <= 128 and q.shape[-1] <= 10 and (cvx := peer("cvxpylayers.torch")) is not None:
        layers["cvxpylayers"] = _cvxpylayer(cvx, P, q, G, h, A, b)
    return layers


def _cvxpylayer(
    cvx: Any, P: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
) -> Callable[[], Any]:
    import cvxpy as cp

    x, pq, ph, pb = (cp.Variable(q.shape[-1]), *(cp.Parameter(t.shape[-1]) for t in (q, h, b)))
    root = torch.linalg.cholesky(P).mT.numpy()
    objective = cp.Minimize(0.5 * cp.sum_squares(root @ x) + pq @ x)
    problem = cp.Problem(objective, [G.numpy() @ x <= ph, A.numpy() @ x == pb])
    layer = cvx.CvxpyLayer(problem, parameters=[pq, ph, pb], variables=[x])
    return lambda: layer(q, h, b)[0]


def _full_kkt(
    P: Tensor, G: Tensor, A: Tensor, q: Tensor, h: Tensor, x: Tensor, lam: Tensor, v: Tensor
) -> Callable[[], Any]:
    batch, n = q.shape
    m, k = len(G), len(A)
    slack = (x @ G.T - h).detach()
    active = lam > 1e-7
    K = torch.zeros(batch, n + m + k, n + m + k)
    K[:, :n, :n], K[:, :n, n : n + m], K[:, :n, n + m :] = P, G.T, A.T
    K[:, n : n + m, :n] = (lam * active).unsqueeze(-1) * G
    K[:, n : n + m, n : n + m] = torch.diag_embed(torch.where(active, 0.0, slack))
    K[:, n + m :, :n] = A
    transposed, rhs = K.mT.contiguous(), torch.cat([v, torch.zeros(batch, m + k)], 1).unsqueeze(-1)
    return lambda: torch.linalg.solve(transposed, rhs)


def _masked_schur(P: Tensor, G: Tensor, A: Tensor, lam: Tensor, v: Tensor) -> Callable[[], Any]:
    C = torch.cat([G, A])
    mask = torch.cat([(lam > 1e-7).double(), torch.ones(len(lam), len(A))], 1)

    def run() -> Any:
        lower = torch.linalg.cholesky(P)
        pulled = torch.cholesky_solve(C.T, lower)
        schur = mask.unsqueeze(2) * (C @ pulled) * mask.unsqueeze(1) + torch.diag_embed(1 - mask)
        free = torch.cholesky_solve(v.T, lower).T
        w = torch.cholesky_solve((mask * (v @ pulled)).unsqueeze(-1), torch.linalg.cholesky(schur)).squeeze(
            -1
        )
        return w @ pulled.T - free, w

    return run


if __name__ == "__main__":
    quick = options().quick
    for n, solver in ((2, "daqp"), (2, "piqp"), (10, "daqp"), (100, "daqp"), (100, "piqp")):
        arrays = {
            name: t.numpy() for name, t in zip(NAMES, dense(n), strict=True) if n >= 5 or name not in "Ab"
        }
        total(f"Dense, n = {n}", arrays, solver, quick)
    for size in (1000,) if quick else (1000, 10_000):
        for solver in ("clarabel", "piqp"):
            total(f"Chain, n = {size}", chain(size), solver, quick)
    if not quick:
        arrays = {name: t.numpy() for name, t in zip(NAMES, dense(1000), strict=True)}
        total("Dense, n = 1000", arrays, "piqp", quick)
        for solver in ("clarabel", "piqp"):
            total("Simplex, n = 100000", simplex(100_000), solver, quick)
    many(32 if quick else 256, 10, quick)
    for n, batch in ((10, 1), (10, 128), (100, 1), (100, 128)):
        if not quick or n == 10:
            shared_matrices(n, batch, quick)
