"""Published quadratic programs (Maros & Mészáros 1999): objective and gradient of every solver, at 1e-6.

    python benchmarks/maros_meszaros.py FOLDER

The folder holds a ``manifest.json`` with a ``published_objective`` for each problem, and one ``NAME.npz``
with

    min ½ xᵀPx + qᵀx + r   such that   l ≤ A x ≤ u

(P and A in CSC form) and a reference gradient ``dq_ref`` of w · x with respect to q. Of l = u an equation is
made, of a row with one entry a bound.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import invlayer_core as inv

TOLERANCES = {
    "qpsolvers.clarabel": {"tol_gap_abs": 1e-6, "tol_gap_rel": 1e-6, "tol_feas": 1e-6},
    "qpsolvers.piqp": {"eps_abs": 1e-6, "eps_rel": 1e-6},
    "qpsolvers.proxqp": {"eps_abs": 1e-6, "eps_rel": 0.0},
    "qpsolvers.osqp": {"eps_abs": 1e-6, "eps_rel": 1e-6, "max_iter": 200_000},
    "qpsolvers.highs": {},
    "torch.qp": {},
}


def load(folder: Path, name: str) -> tuple[dict[str, Any], np.lib.npyio.NpzFile]:
    """The arguments of ``inv.qp`` as SciPy and NumPy, and all else that the file holds."""
    data = np.load(folder / f"{name}.npz")
    n, m = int(data["n"]), int(data["m"])
    P = sp.csc_matrix((data["P_data"], data["P_indices"], data["P_indptr"]), shape=(n, n))
    if not (sp.tril(P, -1).nnz and sp.triu(P, 1).nnz):  # one triangle stands for both
        P = P + P.T - sp.diags(P.diagonal())
    A = sp.csc_matrix((data["A_data"], data["A_indices"], data["A_indptr"]), shape=(m, n)).tocsr()
    rows, bounds = A[:-n], slice(m - n, m)  # the last n rows are the identity
    low, high = data["l"], data["u"]
    l_rows, u_rows = low[:-n], high[:-n]
    equal = l_rows == u_rows
    below, above = np.isfinite(l_rows) & ~equal, np.isfinite(u_rows) & ~equal
    given: dict[str, Any] = {"P": P, "q": data["q"]}
    if below.any() or above.any():
        given["G"] = sp.vstack([rows[above], -rows[below]])
        given["h"] = np.concatenate([u_rows[above], -l_rows[below]])
    if equal.any():
        given["A"], given["b"] = rows[equal], l_rows[equal]
    if np.isfinite(low[bounds]).any():
        given["lb"] = low[bounds]
    if np.isfinite(high[bounds]).any():
        given["ub"] = high[bounds]
    return given, data


def tensors(given: dict[str, Any], *, sparse: bool) -> dict[str, Tensor]:
    def tensor(value: Any) -> Tensor:
        if not sp.issparse(value):
            return torch.as_tensor(value, dtype=torch.float64)
        dense = torch.as_tensor(value.toarray(), dtype=torch.float64)
        return dense.to_sparse() if sparse else dense

    return {name: tensor(value) for name, value in given.items()}


def judge(folder: Path, name: str, published: float, solver: str, *, sparse: bool) -> str:
    given, data = load(folder, name)
    inputs = tensors(given, sparse=sparse)
    q = inputs["q"].requires_grad_()
    try:
        x, info = inv.qp(**inputs, solver=solver, options=TOLERANCES[solver], return_info=True)
        (dq,) = torch.autograd.grad(x @ torch.as_tensor(data["w"]), q)
    except inv.InvlayerError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    at = x.detach().numpy()
    objective = 0.5 * at @ (given["P"] @ at) + data["q"] @ at + float(data["r"])
    far = abs(objective - published) / max(1.0, abs(published))
    gap = float(np.abs(dq.numpy() - data["dq_ref"]).max() / max(1.0, np.abs(data["dq_ref"]).max()))
    verdict = "ok" if far <= 1e-6 and gap <= 1e-6 else "AMBIGUOUS" if info.aux[0]["ambiguous"] else "WRONG"
    return f"objective {far:.0e}  dq {gap:.0e}  systems {info.aux[0]['systems']:2d}  {verdict}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--solver", action="append", choices=list(TOLERANCES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    problems = json.loads((arguments.folder / "manifest.json").read_text())["problems"]
    for problem, about in problems.items():
        for name in arguments.solver or TOLERANCES:
            for sparse in (False, True):
                row = judge(
                    arguments.folder, problem, float(about["published_objective"]), name, sparse=sparse
                )
                form = "sparse" if sparse else "dense"
                print(f"{problem:12s} n = {about['n']:5d}  {name:20s} {form:7s} {row}")
