"""The saddle-point solves themselves, against the whole matrix: every form, and none by the last resort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import QuadraticLayout, QuadraticProgram
from invlayer_core.linear.saddle_point import spectrum
from invlayer_core.linear.saddle_point.bank import make_saddle_point
from invlayer_core.matrices import DenseForm, SparseForm
from invlayer_core.solvers.registry import get_registry

N, EQUATIONS, ROWS = 6, 2, 4


def made(kind: str, batch: int, *, shared: bool, bounds: bool, rank: int) -> tuple[QuadraticProgram, Tensor]:
    lead = () if shared else (batch,)
    root = torch.randn(*lead, N, rank, dtype=torch.float64)
    matrices = {
        "P": root @ root.mT,
        "A": torch.randn(*lead, EQUATIONS, N, dtype=torch.float64),
        "G": torch.randn(*lead, ROWS, N, dtype=torch.float64) * torch.logspace(-6, 6, ROWS).unsqueeze(-1),
    }
    forms: dict = {name: DenseForm(m.shape[-2], N) for name, m in matrices.items()}
    if kind == "sparse":
        for name, m in list(matrices.items()):
            places = torch.ones(m.shape[-2:]).nonzero().T
            forms[name] = SparseForm(m.shape[-2], N, places[0], places[1])
            matrices[name] = m.flatten(-2)
    names = tuple(n for n in ("P", "q", "G", "h", "A", "b", "lb", "ub") if bounds or n not in ("lb", "ub"))
    tensors = {name: matrices.get(name, torch.zeros(N, dtype=torch.float64)) for name in names}
    tensors["h"], tensors["b"] = torch.zeros(ROWS).double(), torch.zeros(EQUATIONS).double()
    program = QuadraticProgram(QuadraticLayout(N, names, forms), tensors)
    active = torch.zeros(batch, EQUATIONS + ROWS + 2 * N * bounds, dtype=torch.bool)
    active[:, :EQUATIONS] = True
    for i in range(batch):
        active[i, EQUATIONS + i % ROWS] = True
        if bounds:
            active[i, EQUATIONS + ROWS + i % N] = True
            active[i, EQUATIONS + ROWS + N + (i + 1) % N] = True
    return program, active


def whole_matrix(program: QuadraticProgram, active: Tensor, i: int) -> Tensor:
    dense = {name: form.dense(program.tensors[name]) for name, form in program.layout.forms.items()}
    P, A, G = (m if m.ndim == 2 else m[i] for m in (dense["P"], dense["A"], dense["G"]))
    eye = torch.eye(N, dtype=torch.float64)
    bounds = [-eye, eye] if "lb" in program.tensors else []
    C = torch.cat([A, G, *bounds]) * active[i].unsqueeze(-1)
    corner = torch.diag(1.0 - active[i].double())
    return torch.cat([torch.cat([P, C.mT], 1), torch.cat([C, corner], 1)])


@pytest.mark.parametrize(
    "kind", ["dense", pytest.param("sparse", marks=pytest.mark.plugin("invlayer-scipy"))]
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize("rank", [N, N - 2])
def test_solves(kind: str, shared: bool, bounds: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P regular, or singular where the constraints make up for it; rows of very uneven size."""

    def last_resort(*_: object) -> None:
        raise AssertionError("by eigenvectors")

    monkeypatch.setattr(spectrum, "spectral_solution", last_resort)
    program, active = made(kind, 5, shared=shared, bounds=bounds, rank=rank)
    direct = None if kind == "dense" else get_registry().get_linear_solver("scipy.splu", "test")
    factors = make_saddle_point(program, active, None, direct)
    rhs = torch.randn(3, 5, N + active.shape[-1], dtype=torch.float64)
    rhs[..., N:] *= active
    found = factors.solve(rhs)
    assert not found.singular.any()
    for i in range(5):
        K = whole_matrix(program, active, i)
        scale = torch.ones(len(K), dtype=torch.float64)
        scale[N : N + EQUATIONS + ROWS] = K[N : N + EQUATIONS + ROWS, :N].norm(dim=1).clamp(min=1e-300)
        scale[N:][~active[i]] = 1.0
        wanted = torch.linalg.solve(K / scale / scale.unsqueeze(1), (rhs[:, i] / scale).mT).mT / scale
        wanted[:, N:] *= active[i]
        gap = (found.w[:, i] - wanted).abs() * scale
        assert gap.max() <= 1e-9 * (1 + (wanted * scale).abs().max())


def test_exempt_samples_may_hold_anything() -> None:
    program, active = made("dense", 4, shared=False, bounds=True, rank=N)
    spoiled = {**program.tensors, "P": program.tensors["P"].clone(), "G": program.tensors["G"].clone()}
    spoiled["P"][2], spoiled["G"][2] = torch.nan, torch.inf
    exempt = torch.tensor([False, False, True, False])
    rhs = torch.randn(1, 4, N + active.shape[-1], dtype=torch.float64)
    sound = make_saddle_point(program, active).solve(rhs).w
    found = make_saddle_point(QuadraticProgram(program.layout, spoiled), active, exempt).solve(rhs).w
    kept = [0, 1, 3]
    assert torch.allclose(found[:, kept], sound[:, kept], rtol=1e-12, atol=1e-12)
    assert (found[:, 2] == 0).all()
