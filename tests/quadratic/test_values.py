"""Values: known solutions, any subset of the arguments, batches, dtypes, bad input."""

from __future__ import annotations

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.quadratic.programs import TryAll, kkt_solution, leaves, program, rows_of
from torch import Tensor

import invlayer_core as inv

SOLVERS = [TryAll(), "torch.qp"]
EYE = torch.eye(2, dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_projection_onto_the_simplex(solver: object) -> None:
    """Known in closed form: (c − τ)₊ with τ such that it sums to 1."""
    c = vector(0.9, 0.5, -0.2)
    A, b = torch.ones(1, 3, dtype=torch.float64), vector(1.0)
    x, multipliers = inv.qp(
        torch.eye(3, dtype=torch.float64), -c, A=A, b=b, lb=torch.zeros(3).double(), solver=solver,
        return_multipliers=True,
    )  # fmt: skip
    assert close(x, vector(0.7, 0.3, 0.0))
    assert close(multipliers.equalities, vector(0.2))
    assert close(multipliers.lower, vector(0.0, 0.0, 0.4))
    assert multipliers.inequalities.shape == multipliers.upper.shape == (0,)


@pytest.mark.parametrize(
    "names",
    ["P q", "P q G h", "P q A b", "P q lb", "P q ub", "P q lb ub", "P q G h lb", "P q G h A b lb ub"],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_any_subset_of_the_arguments(names: str, solver: object) -> None:
    given = program(names)
    x, multipliers = inv.qp(**given, solver=solver, return_multipliers=True)
    z = torch.cat([x, *multipliers])
    C, _, equalities = rows_of(given, 3)
    active = torch.cat([torch.ones(equalities, dtype=torch.bool), z[3 + equalities :] > 0])
    assert len(active) == len(C)
    assert close(z, kkt_solution(given, active), 1e-11)


@pytest.mark.parametrize("batched", ["q", "P", "h", "P q G h A b lb ub", "G h ub"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_batched_and_shared_arguments(batched: str, solver: object) -> None:
    given = program(batched=batched)
    x, info = inv.qp(**given, solver=solver, return_info=True)
    assert x.shape == (3, 3)
    assert info.ok.shape == (3,)
    for i in range(3):
        alone = {k: v[i] if k in batched.split() else v for k, v in given.items()}
        assert close(x[i], inv.qp(**alone, solver=solver), 1e-11)


def test_batch_dims_broadcast() -> None:
    given = program(batched="q")
    given["h"] = torch.stack([given["h"], given["h"] + 0.1]).unsqueeze(1)  # (2, 1, m) against (3, n)
    x = inv.qp(**given, solver="torch.qp")
    assert x.shape == (2, 3, 3)
    one = inv.qp(**{**given, "q": given["q"][2], "h": given["h"][1, 0]}, solver="torch.qp")
    assert close(x[1, 2], one)


def test_b_equal_to_n_is_no_matter() -> None:
    given = program(batched="q", batch=3, n=3)
    assert close(
        inv.qp(**given, solver="torch.qp")[1], inv.qp(**{**given, "q": given["q"][1]}, solver="torch.qp")
    )


def test_empty_batch() -> None:
    given = program(batched="q")
    given["q"] = given["q"][:0].requires_grad_()
    x = inv.qp(**given, solver=TryAll())
    assert x.shape == (0, 3)
    x.sum().backward()
    assert given["q"].grad.shape == (0, 3)


def test_a_p_that_is_not_symmetric_means_its_symmetric_part() -> None:
    P = torch.tensor([[1.0, 0.6], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    q = vector(-2.0, 1.0)
    x = inv.qp(P, q, solver="torch.qp")
    assert close(x.detach(), torch.linalg.solve((P + P.mT).detach() / 2, -q))
    (bar,) = torch.autograd.grad(x[0], P)
    assert close(bar, bar.mT)


def test_infinite_limits_bound_nothing() -> None:
    inf = float("inf")
    x, multipliers = inv.qp(
        EYE, vector(2.0, 2.0), EYE, vector(inf, 0.0), lb=vector(-inf, -1.0), solver="torch.qp",
        return_multipliers=True,
    )  # fmt: skip
    assert close(x, vector(-2.0, -1.0))
    assert close(multipliers.inequalities, vector(0.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_and_gradients_have_the_dtype_of_the_arguments(dtype: torch.dtype) -> None:
    q = torch.tensor([-0.5, -3.0], dtype=dtype, requires_grad=True)
    x = inv.qp(torch.eye(2, dtype=dtype), q, ub=torch.ones(2, dtype=dtype), solver="torch.qp")
    x.sum().backward()
    assert x.dtype == q.grad.dtype == dtype
    assert x.tolist() == [0.5, 1.0]
    assert q.grad.tolist() == [-1.0, 0.0]


def test_layer_is_the_function_and_survives_copy_and_pickle() -> None:
    given = program()
    layer = inv.QPLayer(solver="torch.qp", return_multipliers=True)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x, multipliers = each(**given)
        assert close(x, inv.qp(**given, solver="torch.qp"))
        assert multipliers.lower.shape == (3,)


def test_threads_give_the_same() -> None:
    given = program(batched="q", batch=8)
    serial = inv.qp(**given, solver=TryAll(), batch="serial")
    spec = inv.SolverSpec(name="test.tryall", factory="tests.quadratic.programs:TryAll", kinds=("qp",))
    inv.register_solver(spec, replace=True)
    assert torch.equal(serial, inv.qp(**given, solver="test.tryall", batch="threads"))


def test_guess_reaches_the_solver() -> None:
    seen = []

    class Seeing(TryAll):
        def solve(self, problem, y0, options):
            seen.append(y0.copy())
            return super().solve(problem, y0, options)

    given = program(batched="q")
    inv.qp(**given, x0=torch.ones(3).double(), solver=Seeing())
    assert np.array_equal(seen, np.ones((3, 3)))
    inv.qp(**given, solver=Seeing())
    assert np.array_equal(seen[-1], np.zeros(3))


def test_no_grad_and_inference_mode() -> None:
    given = leaves(program())
    with torch.no_grad():
        assert not inv.qp(**given, solver="torch.qp").requires_grad
    with torch.inference_mode():
        assert close(inv.qp(**given, solver="torch.qp"), inv.qp(**given, solver="torch.qp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q is None; accepted is a floating-point"),
        ({"q": [1.0, 2.0, 3.0]}, "q is a list; accepted is a floating-point torch.Tensor"),
        ({"q": torch.ones(3, dtype=torch.int64)}, r"dtype torch.int64; accepted are real .* q.double\(\)"),
        ({"q": torch.tensor(1.0)}, r"q has shape \(\); accepted is \(\*batch, n\)"),
        ({"P": torch.eye(4)}, "P is 4 x 4 and q has 3 entries; accepted is n x n"),
        ({"G": torch.ones(2, 4)}, "G is 2 x 4 and q has 3 entries; accepted is m x n"),
        ({"h": torch.ones(3)}, r"G has 2 rows and h has shape \(3,\)"),
        ({"h": None}, "G was given without h; accepted are both"),
        ({"A": None}, "b was given without A; accepted are both"),
        ({"lb": torch.ones(2)}, r"lb has shape \(2,\) and q has 3 entries"),
        ({"q": torch.ones(2, 3), "h": torch.ones(5, 2)}, "batch dims of .* do not fit together"),
        ({"P": torch.ones(2, 2, 3, 3).to_sparse()}, r"P is sparse and has shape \(2, 2, 3, 3\)"),
        ({"P": torch.ones(3, 3).to_sparse(1)}, r"P is sparse .* with 1 dense dims; accepted are \(m, n\)"),
        ({"n_starts": 2}, r"qp\(n_starts=...\): a convex program has one solution.*Leave n_starts out; x0="),
        ({"warm_start": None}, r"qp\(warm_start=...\): .*x0= is where a solver"),
        ({"compile": True}, r"qp\(compile=...\): .*evaluates no F that could be compiled"),
        ({"event_dims": 2}, "event_dims=2.*leave event_dims out"),
        ({"batch": "lockstep"}, "batch='lockstep'.*torch.qp|torch.qp takes whole batches"),
        ({"solver": "torch.newton"}, "that solver is for root, fixed_point; accepted here: .*torch.qp"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.qp(**{"P": torch.eye(3), **program("q G h A b lb ub"), "solver": "torch.qp", **change})


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_other_sparse_layouts() -> None:
    with pytest.raises(inv.ConditionsError, match=r"layout torch.sparse_csc; accepted are dense"):
        inv.qp(EYE.to_sparse_csc(), vector(1.0, 1.0), solver="torch.qp")


def test_per_sample_solver_refuses_ways_that_call_f() -> None:
    with pytest.raises(inv.ConditionsError, match=r"batch='lockstep'.*goes to its solver as a whole"):
        inv.qp(**program(), solver=TryAll(), batch="lockstep")


def test_ways_that_programs_do_not_go() -> None:
    for change in ({"batch": "stacked"}, {"timeout": 1.0}):
        with pytest.raises(inv.ConditionsError, match=r"goes to its solver as a whole"):
            inv.qp(**program(), solver=TryAll(), **change)


class Echoing(inv.Solver):
    """Gives back where it was to start; its answer is no solution."""

    def solve(self, problem, y0, options):
        if problem.index == 2:
            raise RuntimeError("sample 2")
        return inv.SolverResult(y=problem.answer(y0))


WAYS = ["serial", "threads", pytest.param("processes", marks=pytest.mark.slow), "pool of threads"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_hands_over_the_same(way: str) -> None:
    """Guesses, programs that are not to be solved, and exceptions, whichever way a batch goes."""
    given = program("P q lb", batched="q", batch=6)
    given["q"][4, 0] = torch.nan
    x0 = torch.rand(6, 3).double() + 5
    with ThreadPoolExecutor(2) as pool:
        keywords = {"executor": pool} if way.startswith("pool") else {"batch": way}
        x, info = inv.qp(
            **given,
            x0=x0,
            solver=Echoing(),
            polish=0,
            atol=1e9,
            on_failure="nan",
            return_info=True,
            **keywords,
        )  # fmt: skip
    assert info.batch == ("executor" if way.startswith("pool") else way)
    assert info.ok.tolist() == [True, True, False, True, False, True]
    assert "sample 2" in info.message[2]
    assert info.message[4] == "q holds NaN or infinity; the solver was not called"
    assert torch.equal(x[info.ok], x0[info.ok])


@pytest.mark.slow
def test_a_solver_that_cannot_be_sent() -> None:
    class Local(TryAll):
        pass

    with pytest.raises(inv.ConditionsError, match=r"cannot be sent|cannot load the solver"):
        inv.qp(**program(batched="q"), solver=Local(), batch="processes")


@pytest.mark.parametrize(
    ("adjoint", "message"),
    [
        (inv.adjoints.Unrolled(), r"qp\(adjoint=Unrolled.*accepted is inv.adjoints.Implicit"),
        (inv.adjoints.Implicit(singular="damped"), "singular='damped'.*accepted are 'consistent'"),
    ],
)
def test_adjoints_that_do_not_go_with_programs(adjoint: object, message: str) -> None:
    with pytest.raises(inv.ConditionsError, match=message):
        inv.qp(**program(), solver="torch.qp", adjoint=adjoint)


def test_the_general_rule_agrees() -> None:
    """An explicit dense method differentiates the conditions themselves: a second way to the same numbers."""
    given = leaves(program())
    grads = []
    for adjoint in (
        inv.adjoints.Implicit(singular="consistent"),
        inv.adjoints.Implicit(linear_solver=inv.linear.LU()),
    ):
        x = inv.qp(**given, solver="torch.qp", adjoint=adjoint)
        grads.append(torch.autograd.grad((x**2).sum(), list(given.values())))
    for ours, theirs in zip(*grads, strict=True):
        assert close(ours, theirs, 1e-11)


def test_the_solver_is_called_once() -> None:
    """Also where the short way of one plain program has to give way to the general one."""
    calls = []

    class Counting(TryAll):
        def solve(self, problem, y0, options):
            calls.append(problem.index)
            return super().solve(problem, y0, options)

    for noise in (0.0, 1e-2, 10.0):
        calls.clear()
        with contextlib.suppress(inv.ConvergenceError):
            inv.qp(**program(), solver=Counting(noise))
        assert calls == [0]


def test_unknown_options_and_keywords() -> None:
    with pytest.raises(TypeError, match="unknown options colour; accepted are tol, max_iterations"):
        inv.qp(**program(), solver="torch.qp", options={"colour": 1})
    with pytest.raises(TypeError, match="unknown keyword colour"):
        inv.qp(**program(), solver="torch.qp", colour=1)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("solver", [TryAll(noise=1e-9), "torch.qp"])
def test_a_solution_at_the_origin(solver: object, scale: float) -> None:
    """There x has no size that slacks could be measured by, and P no inverse that would give one."""
    P, q = torch.diag(vector(2.0, 0.0)) * scale, torch.stack([vector(1.0, 1.0), vector(1.0, 0.1)]) * scale
    h = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = inv.qp(P, q, -EYE, h, solver=solver)
    assert close(x, torch.zeros_like(q), 1e-15)
    assert close(torch.autograd.grad(x.sum(), h)[0], vector(-2.0, -2.0))
