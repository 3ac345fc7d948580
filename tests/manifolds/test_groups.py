"""The Lie groups against the matrix exponential, with derivatives, at and around the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from invlayer_core.manifolds import SE2, SE3, SO2, SO3, Euclidean, LieGroup

pytestmark = pytest.mark.usefixtures("float64")

GROUPS = [SO2(), SE2(), SO3(), SE3()]
NAMES = ["SO2", "SE2", "SO3", "SE3"]
ANGLES = [0.0, 1e-9, 1e-2, 0.7, 0.8, 3.0]  # the series ends at √½ = 0.707


def _skew(omega: Tensor) -> Tensor:
    x, y, z = omega.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def generator(group: LieGroup, delta: Tensor) -> Tensor:
    """δ as a matrix whose exponential is the point."""
    if isinstance(group, (SO2, SE2)):
        angle = delta[..., -1:]
        zero = torch.zeros_like(angle)
        block = torch.cat([zero, -angle, angle, zero], -1).unflatten(-1, (2, 2))
    else:
        block = _skew(delta[..., -3:])
    if isinstance(group, (SO2, SO3)):
        return block
    top = torch.cat([block, delta[..., : block.shape[-1]].unsqueeze(-1)], -1)
    return torch.cat([top, torch.zeros_like(top[..., :1, :])], -2)


def reference(group: LieGroup, delta: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(generator(group, delta))


def coordinates(group: LieGroup, angle: float) -> Tensor:
    """Random coordinates that turn by ``angle``."""
    delta = torch.randn(group.tangent_size)
    turning = 1 if isinstance(group, (SO2, SE2)) else 3
    delta[-turning:] *= angle / delta[-turning:].norm()
    return delta


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_exp_is_the_matrix_exponential_to_second_order(group: LieGroup, angle: float) -> None:
    delta = coordinates(group, angle)
    ours, other = (lambda d: group.matrix(group.exp(d))), (lambda d: reference(group, d))
    close = {"rtol": 0, "atol": 2e-13}  # torch's own error at small angles is 1e-13
    torch.testing.assert_close(ours(delta), other(delta), **close)
    first = torch.autograd.functional.jacobian(other, delta, create_graph=True)
    torch.testing.assert_close(jacrev(ours)(delta), first, **close)
    second = torch.autograd.functional.jacobian(jacrev(other), delta)
    torch.testing.assert_close(jacrev(jacrev(ours))(delta), second, **close)
    torch.testing.assert_close(jacfwd(jacrev(ours))(delta), second, **close)


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_log_is_the_inverse_to_third_order(group: LieGroup, angle: float) -> None:
    delta, back = coordinates(group, angle), lambda d: group.log(group.exp(d))
    torch.testing.assert_close(back(delta), delta, rtol=0, atol=2e-15)
    torch.testing.assert_close(jacrev(back)(delta), torch.eye(group.tangent_size), rtol=0, atol=2e-15)
    assert jacrev(jacrev(back))(delta).abs().max() < 5e-15
    assert jacrev(jacrev(jacrev(back)))(delta).abs().max() < 5e-13


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_group_laws(group: LieGroup) -> None:
    a, b, c = group.exp(torch.randn(3, 5, group.tangent_size)).unbind(0)
    close = {"rtol": 0, "atol": 1e-13}
    identity = group.identity(a).expand_as(a)
    torch.testing.assert_close(group.compose(a, group.inverse(a)), identity, **close)
    left, right = group.compose(group.compose(a, b), c), group.compose(a, group.compose(b, c))
    torch.testing.assert_close(left, right, **close)
    torch.testing.assert_close(group.matrix(group.compose(a, b)), group.matrix(a) @ group.matrix(b), **close)
    assert torch.equal(group.retract(a, torch.zeros(5, group.tangent_size)), a)
    near = group.retract(a, 0.1 * torch.randn(5, group.tangent_size))
    torch.testing.assert_close(group.retract(a, group.local(a, near)), near, **close)
    torch.testing.assert_close(group.compose(a, group.between(a, b)), b, **close)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_action_is_that_of_the_matrix(group: LieGroup) -> None:
    y = group.exp(torch.randn(5, group.tangent_size))
    d = 2 if isinstance(group, (SO2, SE2)) else 3
    points, matrix = torch.randn(5, d), group.matrix(y)
    expected = (matrix[..., :d, :d] @ points.unsqueeze(-1)).squeeze(-1)
    if matrix.shape[-1] > d:
        expected = expected + matrix[..., :d, d]
    torch.testing.assert_close(group.act(y, points), expected, rtol=0, atol=1e-14)


def test_both_quaternions_of_a_rotation_are_one() -> None:
    delta = torch.tensor([0.3, -1.0, 2.0])
    torch.testing.assert_close(SO3().log(-SO3().exp(delta)), delta, rtol=0, atol=2e-15)


def test_half_a_turn_has_a_log() -> None:
    turn = torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(SO3().log(turn), torch.tensor([0.0, torch.pi, 0.0]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
def test_points_are_projected_and_measured(group: LieGroup) -> None:
    y = group.exp(torch.randn(4, group.tangent_size))
    torch.testing.assert_close(group.project(y), y, rtol=0, atol=1e-15)
    torch.testing.assert_close(group.project(y * 1.0001), y, rtol=0, atol=1e-3)
    assert group.scale(y).shape == (4, group.tangent_size)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_transforms(group: LieGroup, dtype: torch.dtype) -> None:
    y, delta = group.identity().to(dtype), torch.zeros(6, group.tangent_size, dtype=dtype)
    mapped = vmap(lambda d: group.retract(y, d))(delta)
    assert mapped.dtype == dtype
    assert torch.equal(mapped, group.retract(y.expand(6, -1), delta))
    value, tangent = jvp(lambda d: group.log(group.retract(y, d)), (delta,), (torch.ones_like(delta),))
    assert torch.equal(value, delta)
    torch.testing.assert_close(tangent, torch.ones_like(delta))


def test_euclidean_charts_are_global() -> None:
    y, other = torch.randn(2, 5)
    assert torch.equal(Euclidean().retract(y, Euclidean().local(y, other)), y + (other - y))
    assert Euclidean().is_flat


@pytest.mark.peer
@pytest.mark.parametrize("angle", [1e-2, 0.3, 1.5, 3.0])
def test_se3_is_that_of_pypose(angle: float) -> None:
    pypose = pytest.importorskip("pypose")
    delta = coordinates(SE3(), angle)
    theirs = pypose.se3(delta).Exp()
    torch.testing.assert_close(SE3().exp(delta), theirs.tensor(), rtol=0, atol=1e-14)
    torch.testing.assert_close(SE3().log(theirs.tensor()), theirs.Log().tensor(), rtol=0, atol=1e-13)
    a, b = SE3().exp(torch.randn(2, 6))
    both = (pypose.SE3(a) @ pypose.SE3(b)).tensor()
    torch.testing.assert_close(SE3().compose(a, b), both, rtol=0, atol=1e-14)
