"""Minima among rotations and poses, against closed forms of their own and finite differences."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

import invlayer_core as inv
from invlayer_core.conditions.charted import Charted, ChartedJacobian
from invlayer_core.manifolds import SE2, SE3, SO2, SO3, Euclidean, LieGroup, Manifold
from invlayer_core.manifolds.atlas import Atlas

pytestmark = pytest.mark.usefixtures("float64")

GROUPS = [SO2(), SE2(), SO3(), SE3()]
NAMES = ["SO2", "SE2", "SO3", "SE3"]


MODEL = torch.randn(7, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def points(group: LieGroup) -> Tensor:
    """Seven points to be matched."""
    return MODEL[:, :2] if isinstance(group, (SO2, SE2)) else MODEL


def mismatch(group: LieGroup) -> Callable[..., Tensor]:
    """The residuals of a match: y moves ``points`` onto those observed."""

    def residuals(y: Tensor, observed: Tensor) -> Tensor:
        return group.act(y.unsqueeze(-2), points(group).to(y.dtype)) - observed

    return residuals


def observations(group: LieGroup, batch: int = 3, noise: float = 0.1, spread: float = 0.5) -> Tensor:
    truth = group.exp(spread * torch.randn(batch, group.tangent_size))
    clean = group.act(truth.unsqueeze(-2), points(group))
    return clean + noise * torch.randn(clean.shape)


def match(group: LieGroup, observed: Tensor, **keywords: Any) -> Any:
    y0 = group.identity(observed).expand(*observed.shape[:-2], *group.shape)
    keywords = {"atol": 1e-9, **keywords}
    return inv.least_squares(mismatch(group), y0, observed, manifold=group, **keywords)


def closed_form(group: LieGroup, observed: Tensor) -> Tensor:
    """The matrix of the best match, by the SVD of the covariance (Kabsch 1976), differentiable."""
    model, moves = points(group), isinstance(group, (SE2, SE3))
    centre = model.mean(0) if moves else torch.zeros(model.shape[-1])
    target = observed.mean(-2) if moves else torch.zeros_like(observed[..., 0, :])
    covariance = (observed - target.unsqueeze(-2)).mT @ (model - centre)
    u, _, vh = torch.linalg.svd(covariance)
    last = torch.ones_like(target)
    last[..., -1] = torch.det(u.detach() @ vh.detach())
    rotation = u @ torch.diag_embed(last) @ vh
    if not moves:
        return rotation
    return torch.cat([rotation, (target - rotation @ centre).unsqueeze(-1)], -1)


def as_matrix(group: LieGroup, y: Tensor) -> Tensor:
    d = 2 if isinstance(group, (SO2, SE2)) else 3
    return group.matrix(y)[..., :d, :]


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_value_and_gradient_are_those_of_the_closed_form(group: LieGroup) -> None:
    observed = observations(group).requires_grad_()
    found, expected = as_matrix(group, match(group, observed)), closed_form(group, observed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weights = torch.randn(expected.shape)
    (ours,) = torch.autograd.grad((found * weights).sum(), observed)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), observed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_polished_gradient_is_exact(group: LieGroup) -> None:
    observed = observations(group).requires_grad_()
    found = as_matrix(group, match(group, observed, polish="auto"))
    expected = closed_form(group, observed)
    weights = torch.randn(expected.shape)
    (ours,) = torch.autograd.grad((found * weights).sum(), observed)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), observed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("group", [SE2(), SO3()], ids=["SE2", "SO3"])
def test_second_order_is_that_of_the_closed_form(group: LieGroup) -> None:
    observed = observations(group, batch=1)[0]
    weights = torch.randn(closed_form(group, observed).shape)
    ours = hessian(lambda o: (as_matrix(group, match(group, o, polish="auto")) * weights).sum())(observed)
    theirs = hessian(lambda o: (closed_form(group, o) * weights).sum())(observed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("group", [SO2(), SE3()], ids=["SO2", "SE3"])
def test_finite_differences(group: LieGroup) -> None:
    observed = observations(group, batch=1)
    directions = torch.randn(2, *observed.shape)
    parameters = torch.zeros(2, requires_grad=True)

    def solve(parameters: Tensor) -> Tensor:
        moved = observed + torch.einsum("i,i...->...", parameters, directions)
        return match(group, moved, polish="auto")

    assert torch.autograd.gradcheck(solve, parameters, atol=1e-8)
    assert torch.autograd.gradgradcheck(solve, parameters, atol=1e-7)


ADJOINTS = {
    "dlm": (inv.adjoints.DLM(1e-4, central=True), 1e-7),
    "dlm-resolve": (inv.adjoints.DLM(1e-3, central=True, resolve=True), 1e-4),
    "unrolled": (inv.adjoints.Unrolled(), 1e-6),
    "truncated": (inv.adjoints.Truncated(20), 1e-9),
}


@pytest.mark.parametrize("name", ADJOINTS)
@pytest.mark.parametrize("group", [SE2(), SE3()], ids=["SE2", "SE3"])
def test_every_adjoint(group: LieGroup, name: str) -> None:
    adjoint, tolerance = ADJOINTS[name]
    observed = observations(group).requires_grad_()
    layer = inv.LeastSquaresLayer(mismatch(group), manifold=group, atol=1e-7)
    y0 = group.identity(observed).expand(3, -1)
    found = as_matrix(group, layer(observed, y0=y0, adjoint=adjoint))
    weights = torch.randn(found.shape)
    (ours,) = torch.autograd.grad((found * weights).sum(), observed)
    (theirs,) = torch.autograd.grad((closed_form(group, observed) * weights).sum(), observed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_transforms_and_vmap(transform: Any) -> None:
    group = SE3()
    observed = observations(group)
    solve = lambda o: as_matrix(group, match(group, o, polish="auto"))  # noqa: E731
    expected = torch.stack([jacrev(lambda o: closed_form(group, o))(one) for one in observed])
    torch.testing.assert_close(vmap(transform(solve))(observed), expected, rtol=0, atol=1e-11)
    together = transform(solve)(observed)
    each = torch.stack([together[i, :, :, i] for i in range(3)])
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-11)


# --- charts ---------------------------------------------------------------------------------------------


def test_a_long_way_takes_several_charts() -> None:
    group, turn = SO3(), torch.tensor([[0.1, 0.0, 0.0], [2.0, 1.8, -1.0], [0.0, 0.2, 0.1]])
    observed = group.act(group.exp(turn).unsqueeze(-2), points(group)).requires_grad_()
    y, info = match(group, observed, options={"maxiter": 5}, return_info=True)  # in each chart
    assert info.ok.all()
    torch.testing.assert_close(group.matrix(y), group.matrix(group.exp(turn)), rtol=0, atol=1e-9)
    alone, alone_info = match(group, observed[[0]], options={"maxiter": 5}, return_info=True)
    assert torch.equal(alone[0], y[0]), "what one sample needs changes no other"
    assert info.iterations[1] > 5 >= info.iterations[0] == alone_info.iterations[0]


def test_the_derivative_does_not_depend_on_where_the_solve_began() -> None:
    group, observed = SE3(), observations(SE3()).requires_grad_()
    gradients = []
    for y0 in (group.identity(observed).expand(3, -1), group.exp(torch.randn(3, 6))):
        y = inv.least_squares(mismatch(group), y0, observed, manifold=group, polish="auto")
        gradients.append(torch.autograd.grad(as_matrix(group, y).sum(), observed)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_a_solver_function_returns_points() -> None:
    """An opaque solver: the closed form in NumPy, whose quaternion may have either sign."""
    group = SO3()

    @inv.from_numpy
    def wahba(y0: np.ndarray, observed: np.ndarray) -> np.ndarray:
        covariance = np.swapaxes(observed, -1, -2) @ points(group).numpy()
        u, _, vh = np.linalg.svd(covariance)
        sign = np.linalg.det(u @ vh)
        matrix = u @ (np.stack([np.ones_like(sign), np.ones_like(sign), sign], -1)[..., None] * vh)
        w = 0.5 * np.sqrt(1 + np.trace(matrix, axis1=-2, axis2=-1))
        odd = [matrix[..., i, j] - matrix[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))]
        return -np.stack([*(part / (4 * w) for part in odd), w], -1)

    observed = observations(group).requires_grad_()
    y, info = match(group, observed, solver=wahba, return_info=True)
    assert info.residual.max() < 1e-12
    left = mismatch(group)(y, observed).square().sum((-2, -1)).detach()
    torch.testing.assert_close(info.objective, left / 2, rtol=1e-12, atol=0)
    assert info.solver.endswith("wahba")
    found, expected = group.matrix(y), closed_form(group, observed)
    weights = torch.randn(expected.shape)
    (ours,) = torch.autograd.grad((found * weights).sum(), observed)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), observed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    mapped = vmap(jacrev(lambda o: group.matrix(match(group, o, solver=wahba))))(observed.detach())
    expected = torch.stack([jacrev(lambda o: closed_form(group, o))(one) for one in observed.detach()])
    torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-11)


@pytest.mark.plugin("invlayer-scipy")
@pytest.mark.parametrize("batch", ["serial", "lockstep"])
def test_scipy_solves_in_charts(batch: Any) -> None:
    group, observed = SE3(), observations(SE3()).requires_grad_()
    y = match(group, observed, solver="scipy.least_squares", polish="auto", batch=batch)
    torch.testing.assert_close(as_matrix(group, y), closed_form(group, observed), rtol=0, atol=1e-10)


def given(y: Tensor, observed: Tensor) -> Tensor:
    """The Jacobian of the mismatch by δ at y: R [1, −[p]×] for a point p."""
    turn, p = SO3().matrix(y[..., 3:]), MODEL
    o = torch.zeros_like(p[:, 0])
    skew = torch.stack([o, -p[:, 2], p[:, 1], p[:, 2], o, -p[:, 0], -p[:, 1], p[:, 0], o], -1).unflatten(
        -1, (3, 3)
    )
    both = torch.cat([torch.eye(3).expand(7, 3, 3), -skew], -1)
    return (turn.unsqueeze(-3) @ both).flatten(-3, -2)


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0])
def test_a_jacobian_at_each_point_makes_one_of_any_chart(distance: float) -> None:
    group, observed = SE3(), observations(SE3())
    base = group.exp(torch.randn(3, 6))
    atlas = Atlas.of("test", base, group, 1)
    flat = lambda y, observed: mismatch(group)(y, observed).flatten(-2)  # noqa: E731
    z = atlas.start(base) + distance * torch.randn(3, 6)
    taken = vmap(jacrev(Charted(flat, atlas)))(z, base, observed)
    torch.testing.assert_close(ChartedJacobian(given, atlas)(z, base, observed), taken, rtol=0, atol=1e-13)


def test_the_users_jacobian_is_that_of_the_chart_at_each_point() -> None:
    group, observed = SE3(), observations(SE3(), spread=1.0)
    flat = lambda y, observed: mismatch(group)(y, observed).flatten(-2)  # noqa: E731
    y = group.exp(torch.randn(3, 6))
    assert inv.check_jacobian(flat, given, y, observed, manifold=group) < 1e-14
    calls = []

    def counted(y: Tensor, observed: Tensor) -> Tensor:
        calls.append(1)
        return given(y, observed)

    solve = lambda **extra: inv.least_squares(  # noqa: E731
        flat, group.identity().expand(3, 7), observed, manifold=group, **extra
    )
    ours, theirs = solve(jacobian=counted), solve()
    assert calls
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    wrong = lambda y, observed: given(y, observed) * torch.tensor([1.0, 1, 1, 1, -1, 1])  # noqa: E731
    with pytest.raises(inv.ConditionsError, match=r"is not the derivative of residuals .* by unknown 4 in"):
        inv.check_jacobian(flat, wrong, y, observed, manifold=group)


# --- structures -----------------------------------------------------------------------------------------


def scaled(y: dict[str, Tensor], observed: Tensor) -> Tensor:
    """Two poses of a sample, named, and one scale for both."""
    moved = SE2().act(y["poses"].unsqueeze(-2), points(SE2())) * y["scale"][..., None, None, None]
    return moved - observed


def test_poses_and_numbers_together() -> None:
    poses = SE2().exp(0.4 * torch.randn(3, 2, 3))
    clean = scaled({"poses": poses, "scale": torch.tensor([1.0, 1.2, 0.7])}, torch.zeros(3, 2, 7, 2))
    observed = (clean + 0.05 * torch.randn(clean.shape)).requires_grad_()
    y0 = {"poses": SE2().identity().expand(3, 2, 4), "scale": torch.ones(3)}

    def solve(observed: Tensor, **keywords: Any) -> Any:
        y = inv.least_squares(
            scaled, y0, observed, manifold={"poses": SE2(), "scale": Euclidean()},
            event_dims={"poses": 2, "scale": 0}, polish="auto", **keywords,
        )  # fmt: skip
        return y["poses"], y["scale"]

    poses, scale = solve(observed)
    assert (poses.shape, scale.shape) == ((3, 2, 4), (3,))
    direction = torch.randn(observed.shape)
    along = lambda step: solve(observed.detach() + step * direction)  # noqa: E731
    assert torch.autograd.gradcheck(along, torch.zeros((), requires_grad=True), atol=1e-8)
    both = ((poses, scale), solve(observed, adjoint=inv.adjoints.Truncated(40)))
    losses = [(y * torch.arange(4.0)).sum() + factor.square().sum() for y, factor in both]
    gradients = [torch.autograd.grad(loss, observed)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_euclidean_unknowns_are_those_without_a_manifold() -> None:
    a = torch.rand(4, 3).requires_grad_()
    objective = lambda y, a: (y.exp() - a * y).sum(-1) + y.square().sum(-1)  # noqa: E731
    both = [
        inv.minimize(objective, torch.zeros(4, 3), a, **extra) for extra in ({}, {"manifold": Euclidean()})
    ]
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.sum(), a)[0] for y in both]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


class Sphere(Manifold):
    """Unit vectors of space: a manifold that is no group, whose chart is a plane."""

    shape = torch.Size([3])
    tangent_size = 2

    def _frame(self, y: Tensor) -> Tensor:
        least = y.abs().argmin(-1, keepdim=True)
        away = torch.zeros_like(y).scatter(-1, least, 1.0)
        first = torch.linalg.cross(y, away)
        first = first / first.norm(dim=-1, keepdim=True)
        return torch.stack([first, torch.linalg.cross(y, first)], -1)

    def retract(self, y: Tensor, delta: Tensor) -> Tensor:
        return self.project(y + (self._frame(y) @ delta.unsqueeze(-1)).squeeze(-1))

    def local(self, y: Tensor, other: Tensor) -> Tensor:
        other = other / (y * other).sum(-1, keepdim=True)
        return (self._frame(y).mT @ (other - y).unsqueeze(-1)).squeeze(-1)

    def project(self, y: Tensor) -> Tensor:
        return y / y.norm(dim=-1, keepdim=True)


def test_a_manifold_of_the_user() -> None:
    """The leading eigenvector: the minimum of −yᵀAy on the sphere."""
    a = torch.randn(2, 3, 3)
    a = (a + a.mT).requires_grad_()
    y0 = Sphere().project(torch.tensor([[0.5, 0.6, 0.7]]).expand(2, 3))
    objective = lambda y, a: -torch.einsum("...i,...ij,...j", y, a, y)  # noqa: E731
    y = inv.minimize(objective, y0, a, manifold=Sphere(), polish="auto")
    vector = torch.linalg.eigh(a)[1][..., -1]
    found, expected = (v.unsqueeze(-1) * v.unsqueeze(-2) for v in (y, vector))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.randn(2, 3, 3)
    (ours,) = torch.autograd.grad((found * weights).sum(), a)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), a)
    torch.testing.assert_close(ours + ours.mT, theirs + theirs.mT, rtol=0, atol=1e-9)


class Offset(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, y: Tensor, observed: Tensor) -> Tensor:
        return mismatch(SE3())(y, observed) - self.offset


def test_parameters_of_the_residuals() -> None:
    layer = inv.LeastSquaresLayer(Offset(), manifold=SE3(), polish="auto")
    observed = observations(SE3())
    y0 = SE3().identity().expand(3, 7)
    as_matrix(SE3(), layer(observed, y0=y0)).square().sum().backward()
    offset = layer.residuals.offset.detach().clone().requires_grad_()
    expected = closed_form(SE3(), observed + offset).square().sum()
    (theirs,) = torch.autograd.grad(expected, offset)
    torch.testing.assert_close(layer.residuals.offset.grad, theirs, rtol=0, atol=1e-11)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(observed, y0=y0), layer(observed, y0=y0), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    group, observed = SO2(), observations(SO2()).to(dtype).requires_grad_()
    y = match(group, observed, atol=None)
    assert y.dtype == dtype
    expected = closed_form(group, observed.double())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(group.matrix(y.double()), expected, rtol=0, atol=tolerance)
    (ours,) = torch.autograd.grad(y.sum(), observed)
    assert ours.dtype == dtype


def test_autocast_is_off_inside() -> None:
    group, observed = SO3(), observations(SO3())
    y0, plain = group.identity(observed).expand(3, 4), None
    for enabled in (False, True):
        leaf = observed.clone().float().requires_grad_()
        with torch.autocast("cpu", enabled=enabled):
            y = inv.least_squares(
                lambda y, o: (group.matrix(y) @ MODEL.mT.to(y.dtype)).mT - o, y0.float(), leaf, manifold=group
            )
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        if plain is not None:
            assert torch.equal(y, plain[0])
            assert torch.equal(gradient, plain[1])
        plain = (y, gradient)


def test_starts_and_warm_starts() -> None:
    group, observed = SO2(), observations(SO2(), spread=2.0)
    y0 = group.exp(torch.linspace(0, 5, 4).reshape(4, 1, 1)).expand(4, 3, 2)
    y, info = inv.least_squares(mismatch(group), y0, observed, manifold=group, n_starts=4, return_info=True)
    assert info.start.shape == (3,)
    torch.testing.assert_close(group.matrix(y), closed_form(group, observed), rtol=0, atol=1e-6)
    again, info = inv.least_squares(
        mismatch(group), y0[0], observed, manifold=group, warm_start=(y, info), return_info=True
    )
    assert info.start.tolist() == [-1, -1, -1]
    torch.testing.assert_close(again, y, rtol=0, atol=1e-7)


def test_failed_sample_stays_alone() -> None:
    group, observed = SE3(), observations(SE3())
    clean = match(group, observed)  # of the same size: rounding in a batched product may depend on that
    observed[1] = torch.nan
    observed.requires_grad_()
    y, info = match(group, observed, on_failure="nan", return_info=True)
    assert info.ok.tolist() == [True, False, True]
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    with pytest.raises(inv.ConvergenceError, match="1 of 3 samples do not satisfy"):
        match(group, observed)


# --- what is wrong is told ------------------------------------------------------------------------------


def wrong(y0: Any, manifold: Any, match: str, **keywords: Any) -> None:
    objective = lambda y: y.square().sum(-1)  # noqa: E731
    with pytest.raises(inv.ConditionsError, match=match):
        inv.minimize(objective, y0, manifold=manifold, **keywords)


def test_wrong_points() -> None:
    wrong(torch.ones(4), SO3(), r"minimize: y0 is not on its manifold \(y: SO3\).*project")
    wrong(torch.zeros(4), SO3(), "y0 is not on its manifold")
    wrong(torch.ones(2, 3), SO3(), r"y0 has event shape \(3,\).*SO3\(\) are real tensors \(\*batch, 4\)")
    wrong(torch.ones(2, 4, dtype=torch.complex128), SO3(), r"dtype torch\.complex128; accepted for SO3")
    wrong(torch.ones(4), SO3(), r"y0 has event shape \(\)", event_dims=0)
    wrong({"a": torch.ones(3)}, {"a": SE3()}, r"y0\['a'\] has event shape \(3,\)")


def test_wrong_manifolds() -> None:
    wrong(torch.ones(4), SO3, "manifold= has the class SO3 for y0; accepted is an instance")
    wrong(
        {"a": torch.ones(4)}, {"b": SO3()}, r"minimize\(manifold=\.\.\.\) returned|accepted is the structure"
    )
    wrong(torch.ones(4), "SO3", "manifold= has 'SO3'")


def test_wrong_solver_functions() -> None:
    y0 = SO3().identity()
    wrong(y0, SO3(), "returned y is not on its manifold", solver=lambda y0: 2 * y0)
    wrong(y0, SO3(), "accepted is", solver=lambda y0: torch.zeros(3))
    wrong(y0, SO3(), "options=.* a plain callable", solver=lambda y0: y0, options={"maxiter": 3})


def test_several_starts_are_never_dropped() -> None:
    y0 = SO2().exp(torch.linspace(0, 2, 3).unsqueeze(-1))
    wrong(y0, SO2(), r"n_starts=3, manifold=.*function of your own", solver=lambda y0: y0, n_starts=3)
    wrong(y0, SO2(), "cannot record", adjoint=inv.adjoints.Unrolled(), n_starts=3)


def test_a_hessian_by_y_is_refused() -> None:
    wrong(SO3().identity(), SO3(), r"minimize\(hessian=.*Leave hessian out", hessian=lambda y: y)


def test_adjoints_that_need_iterations_say_so_before_the_solve() -> None:
    calls = []

    def solver(y0: Tensor) -> Tensor:
        calls.append(1)
        return y0

    wrong(SO2().identity(), SO2(), "cannot record", solver=solver, adjoint=inv.adjoints.Truncated(3))
    wrong(
        SO2().identity(), SO2(), "function of your own", solver=solver, adjoint=inv.adjoints.DLM(resolve=True)
    )
    assert not calls
