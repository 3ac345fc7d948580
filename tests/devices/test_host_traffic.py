"""How often the engine makes a device wait for the host: exact counts, so that one more is noticed.

Host decisions of today, on the dense path:

=====================  =====  =======================================================================
forward                1      certificate: is every sample within its tolerance?
... a sample failed    + 1    implicit: is any sample to be given up?
each backward          1      adjoints: does the pullback of the solution give the cotangent back, and is no
                              solution so large that its Jacobian may be singular?
... if not             + 3    linear: which of them is so large? is its Jacobian really singular?
                              adjoints: does the pullback hold now?
... a sample failed    + 3    adjoints: is any sample good? does an arg belong to the failed ones alone?
                              (the latter for each arg that has the batch dims) linear: as above
jvp                    2      jacobians: do the samples mix? linear: as above
=====================  =====  =======================================================================

``singular="raise"`` cannot do without a decision of the host in the backward, since only the host can raise.
The other policies could; today they take the same one. (One is one too many by the contract that the dense
backward does no host sync. A lower number here is progress: write it down.)

The counts are of the stream of ops, on the CPU; ``test_fake_device.py`` shows that nothing is copied between
devices, and ``test_cuda.py`` counts again where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.devices.op_counter import HostTraffic
from tests.devices.scenarios import Parametrised, conditions, jacobian, problem, rand
from torch import Tensor
from torch.autograd import forward_ad

import invlayer_core as inv
from invlayer_core.adjoints import Implicit

POLICIES = ("raise", "lstsq", "damped", "nan", "zero")
CERTIFY = {"certificate": 1}
PULL_BACK = {"adjoints": 1}
STAGES = ("forward", "backward", "backward with create_graph", "double backward")


def cubic(y: Tensor, x: Tensor) -> Tensor:
    return y + y**3 - x


def cubic_root(x: Tensor) -> Tensor:
    """Cardano's formula: a ready solution, without a look at values."""
    root = torch.sqrt(x**2 / 4 + 1 / 27)
    return (x / 2 + root) ** (1 / 3) - (root - x / 2) ** (1 / 3)


def reads_by_stage(layer: Callable[[], Tensor], *theta: Tensor) -> dict[str, dict[str, int]]:
    """The host's looks at values in a forward, two backwards and a double backward."""
    first: list[Tensor] = []
    y = theta[0]

    def forward() -> None:
        nonlocal y
        y = layer()

    def backward(create_graph: bool) -> None:
        first[:] = torch.autograd.grad(y.sin().sum(), theta, retain_graph=True, create_graph=create_graph)

    def double_backward() -> None:
        torch.autograd.grad(sum(gradient.square().sum() for gradient in first), theta)

    steps: Sequence[Callable[[], None]] = (
        forward,
        lambda: backward(False),
        lambda: backward(True),
        double_backward,
    )
    return {stage: _reads(step) for stage, step in zip(STAGES, steps, strict=True)}


def _reads(step: Callable[[], Any]) -> dict[str, int]:
    with HostTraffic() as traffic:
        step()
    assert traffic.copies == []
    return dict(traffic.reads)


def expected(forward: dict[str, int], backward: dict[str, int]) -> dict[str, dict[str, int]]:
    return dict.fromkeys(STAGES, backward) | {"forward": forward}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy: str) -> None:
    solve = inv.implicit_function(cubic, adjoint=Implicit(policy))(cubic_root)
    x = rand("cpu", 3, 2)
    assert reads_by_stage(lambda: solve(x), x) == expected(CERTIFY, PULL_BACK)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_singular_sample(policy: str) -> None:
    """Sample 1 sits on a double root: one more decision, whether it is one."""
    power = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
    x = rand("cpu", 3, 2)
    solve = inv.implicit_function(
        lambda y, x: (y - x) * ((y - x) * (power - 1) + (2 - power)), adjoint=Implicit(policy)
    )(torch.clone)
    reads = reads_by_stage(lambda: solve(x), x)
    assert reads == expected(CERTIFY, {"linear": 2, "adjoints": 3})


@pytest.mark.parametrize("on_failure", ["nan", "zero_grad"])
def test_a_failed_sample(on_failure: str) -> None:
    """The forward decides once more, each backward twice: is any sample good, is x the failed one's own?"""
    lies = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    solve = inv.implicit_function(cubic, on_failure=on_failure)(lambda x: cubic_root(x) + lies)
    x = rand("cpu", 3, 2)
    reads = reads_by_stage(lambda: solve(x), x)
    assert reads == expected(CERTIFY | {"implicit": 1}, {"linear": 1, "adjoints": 4})


def test_captured_parameters() -> None:
    """To find what f captures costs no look at values."""
    _, _, b = problem("cpu", 3)
    module = Parametrised("cpu")
    with torch.no_grad():
        solution = inv.root(module, torch.zeros_like(b), b)
    solve = inv.implicit_function(module)(lambda b: solution.clone())
    assert reads_by_stage(lambda: solve(b), b, module.weight) == expected(CERTIFY, PULL_BACK)


def test_analytic_jacobian() -> None:
    y0, a, b = problem("cpu", 3)
    with torch.no_grad():
        solution = inv.root(conditions, y0, (a, b))
    solve = inv.implicit_function(conditions, jacobian=jacobian)(lambda a, b: solution.clone())
    assert reads_by_stage(lambda: solve(a, b), a, b) == expected(CERTIFY, PULL_BACK)


def test_forward_mode() -> None:
    solve = inv.implicit_function(cubic)(cubic_root)
    x = rand("cpu", 3, 2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert _reads(lambda: solve(dual)) == CERTIFY | {"jacobians": 1, "linear": 1}


@pytest.mark.parametrize("method", [inv.linear.GMRES(), inv.linear.BiCGStab(), inv.linear.CG()], ids=str)
def test_matrix_free(method: inv.linear.LinearSolver) -> None:
    """Has every sample converged (asked every few iterations), did any not? Twice in a double backward."""
    solve = inv.implicit_function(cubic, adjoint=Implicit(linear_solver=method))(cubic_root)
    x = rand("cpu", 3, 2)
    reads = reads_by_stage(lambda: solve(x), x)
    assert reads == expected(CERTIFY, {"linear": 2, "adjoints": 1}) | {
        "double backward": {"linear": 4, "adjoints": 1}
    }


def test_newton_looks_at_most_three_times_an_iteration_on_the_cpu() -> None:
    """Was every Jacobian regular, has any sample finished, and if so is any still active?"""
    x = rand("cpu", 3, 2)
    info = inv.root(cubic, x.detach(), x, return_info=True)[1]
    reads, iterations = _reads(lambda: inv.root(cubic, x.detach(), x)), int(info.iterations.max())
    solver = reads.pop("solvers")
    assert reads == CERTIFY
    assert 2 * iterations < solver <= 3 * iterations + 1


# --- what the stream of ops does not show -------------------------------------------------------------


@pytest.fixture
def no_way_to_the_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns a function that makes ``.numpy()``, ``.tolist()`` and ``.cpu()`` raise from then on."""

    def refuse(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tensor went to the host")

    def close() -> None:
        for name in ("numpy", "tolist", "cpu"):
            monkeypatch.setattr(Tensor, name, refuse)

    return close


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_takes_nothing_to_the_host(policy: str, no_way_to_the_host: Callable[[], None]) -> None:
    """Neither does the forward of a torch-native solver, nor the double backward."""
    y0, a, b = problem("cpu", 3)
    no_way_to_the_host()
    y = inv.root(conditions, y0, (a, b), adjoint=Implicit(policy))
    first = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
    torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (a, b))


def test_the_closed_way_is_closed(no_way_to_the_host: Callable[[], None]) -> None:
    x = rand("cpu", 3, 2)
    y = inv.implicit_function(lambda y, x: cubic(y, x.detach().cpu() + x - x.detach()))(cubic_root)
    no_way_to_the_host()
    with pytest.raises(AssertionError, match="went to the host"):
        y(x)


@pytest.mark.parametrize(
    "look",
    [
        lambda t: bool(t.sum()),
        lambda t: float(t[0]),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.index_put((t > 0,), torch.zeros(())),
        lambda t: t.masked_select(t > 0),
        lambda t: torch.equal(t, t + 1),
        lambda t: t.unique(),
    ],
)
def test_counter_sees_every_look(look: Callable[[Tensor], Any]) -> None:
    tensor = torch.tensor([1.0, 2.0])
    with HostTraffic() as traffic:
        look(tensor)
    assert traffic.reads == {"outside": 1}


def test_counter_sees_copies_between_devices() -> None:
    with HostTraffic() as traffic:
        torch.zeros(2, 3).to("meta")
        torch.empty(4, device="meta").copy_(torch.zeros(4))
        torch.zeros(2).to(torch.float64)
    assert traffic.copies == [("outside", "cpu", "meta", (2, 3)), ("outside", "cpu", "meta", (4,))]


def test_counter_sees_an_additional_look_in_the_backward() -> None:
    """One ``bool(...)`` in f, which runs at the certificate and in the backward."""

    def looks(y: Tensor, x: Tensor) -> Tensor:
        assert bool(y.detach().isfinite().all())
        return cubic(y, x)

    x = rand("cpu", 3, 2)
    solve = inv.implicit_function(looks)(cubic_root)
    reads = reads_by_stage(lambda: solve(x), x)
    assert reads["backward"] != PULL_BACK
    assert sum(reads["backward"].values()) == sum(PULL_BACK.values()) + 1
