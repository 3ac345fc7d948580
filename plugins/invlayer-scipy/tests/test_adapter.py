"""The adapters alone, on hand-made systems in NumPy."""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from invlayer_core.solvers import SampleProblem, SolverResult
from invlayer_scipy.options import FSOLVE_OPTIONS, JACOBIAN_OPTIONS, ROOT_OPTIONS
from invlayer_scipy.root import Fsolve, Root

RNG = np.random.default_rng(20)
COUPLING = RNG.normal(size=(3, 3)) / 3
SHIFT = RNG.normal(size=3)
FSOLVE_TYPE_ERROR = r"scipy\.fsolve: unknown options \['{}'\]; accepted are \['band', 'diag', .*'xtol'\]"


@dataclass
class Counted:
    """A system with its calls counted."""

    residual: Callable[[np.ndarray], np.ndarray]
    jacobian: Callable[[np.ndarray], np.ndarray]
    size: int = 3
    calls: dict[str, int] = field(default_factory=lambda: {"residual": 0, "jacobian": 0})

    @property
    def problem(self) -> SampleProblem:
        return SampleProblem("root", self.size, 0, self._counted("residual"), self._counted("jacobian"))

    def _counted(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        def call(y: np.ndarray) -> np.ndarray:
            self.calls[name] += 1
            return getattr(self, name)(y)

        return call


def contraction() -> Counted:
    """T(y) − y with T(y) = tanh(C y)/2 + s, so that even plain mixing gets there."""
    return Counted(
        residual=lambda y: np.tanh(COUPLING @ y) / 2 + SHIFT - y,
        jacobian=lambda y: (1 - np.tanh(COUPLING @ y) ** 2)[:, None] * COUPLING / 2 - np.eye(3),
    )


def parabola() -> Counted:
    """y² − 2y, whose derivative is zero at y = 1."""
    return Counted(residual=lambda y: y**2 - 2 * y, jacobian=lambda y: np.diag(2 * y - 2), size=1)


def rootless() -> Counted:
    """y² + 1."""
    return Counted(residual=lambda y: y**2 + 1, jacobian=lambda y: np.diag(2 * y))


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """Every test fails on a warning, whatever the options of the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_root(result: SolverResult, system: Counted, atol: float) -> None:
    assert result.success is True
    assert isinstance(result.iterations, int)
    assert result.iterations > 0
    np.testing.assert_allclose(system.residual(result.y), 0, atol=atol)


def test_fsolve_finds_a_root() -> None:
    system = contraction()
    result = Fsolve().solve(system.problem, np.zeros(3), {})
    assert_root(result, system, atol=1e-9)
    assert result.message == "The solution converged."
    assert result.aux["status"] == 1
    assert result.iterations == result.aux["nfev"]
    assert result.aux["njev"] == 1


@pytest.mark.parametrize("method", ROOT_OPTIONS)
def test_root_finds_a_root_with_every_method(method: str) -> None:
    system = contraction()
    result = Root().solve(system.problem, np.zeros(3), {"method": method})
    assert_root(result, system, atol=1e-5)
    assert (system.calls["jacobian"] > 0) == (method in ("hybr", "lm"))
    expected = optimize.root(system.residual, np.zeros(3), method=method, jac=_jac(system, method))
    np.testing.assert_array_equal(result.y, expected.x)
    assert result.message == expected.message
    assert result.iterations == expected.get("nit", expected.get("nfev"))


def _jac(system: Counted, method: str) -> Callable[[np.ndarray], np.ndarray] | None:
    return system.jacobian if method in ("hybr", "lm") else None


def test_the_table_of_methods_is_scipys() -> None:
    lines = optimize.show_options("root", disp=False).splitlines()
    headings = [line for line, below in itertools.pairwise(lines) if below and set(below) == {"="}]
    assert sorted(headings) == sorted(ROOT_OPTIONS)


@pytest.mark.parametrize("method", ROOT_OPTIONS)
def test_the_table_of_options_is_complete(method: str) -> None:
    described = optimize.show_options("root", method, disp=False)
    names = {line.split(":")[0].strip() for line in described.splitlines() if " : " in line}
    inner = {name for name in names if name.startswith("inner_")}
    known = {*ROOT_OPTIONS[method], *JACOBIAN_OPTIONS.get(method, ())}
    # col_deriv is left out on purpose; SciPy 1.11 describes the eps of lm as epsfcn.
    assert names - inner - known <= {"col_deriv", "epsfcn"}


@pytest.mark.parametrize("method", ROOT_OPTIONS)
def test_scipy_knows_every_option_of_the_table(method: str) -> None:
    # SciPy warns of a name it does not know, and _no_warning makes that an error.
    numbers = {"xtol": 1e-6, "ftol": 1e-6, "fatol": 1e-6, "xatol": 1.0, "gtol": 0.0, "eps": 1e-12}
    numbers |= {"maxfev": 500, "maxiter": 500, "factor": 50, "M": 5, "sigma_eps": 1e-9, "sigma_0": 0.5}
    choices = {"disp": False, "line_search": "cheng" if method == "df-sane" else "wolfe", "jac_options": {}}
    options = {name: (numbers | choices).get(name) for name in ROOT_OPTIONS[method]}
    system = contraction()
    result = Root().solve(
        system.problem, np.zeros(3), options | {"method": method, "jac": False, "tol": 1e-6}
    )
    assert_root(result, system, atol=1e-4)


def test_the_default_method_is_hybr() -> None:
    system = contraction()
    default, hybr = (Root().solve(system.problem, np.zeros(3), o) for o in ({}, {"method": "HYBR"}))
    np.testing.assert_array_equal(default.y, hybr.y)
    assert default.iterations == hybr.iterations


@pytest.mark.parametrize(
    ("solver", "options", "differences"),
    [
        (Fsolve(), {}, {"fprime": None}),
        (Root(), {"method": "hybr"}, {"method": "hybr", "jac": False}),
        (Root(), {"method": "lm"}, {"method": "lm", "jac": False}),
    ],
    ids=["fsolve", "hybr", "lm"],
)
def test_the_analytic_jacobian_saves_calls_of_f(
    solver: Fsolve | Root, options: dict[str, Any], differences: dict[str, Any]
) -> None:
    analytic, differenced = contraction(), contraction()
    assert_root(solver.solve(analytic.problem, np.zeros(3), options), analytic, atol=1e-8)
    assert_root(solver.solve(differenced.problem, np.zeros(3), differences), differenced, atol=1e-6)
    assert analytic.calls["jacobian"] > 0
    assert differenced.calls["jacobian"] == 0
    assert analytic.calls["residual"] <= differenced.calls["residual"] - 3


def test_a_singular_start_reports_what_scipy_claims() -> None:
    system = parabola()
    y, _, status, message = optimize.fsolve(system.residual, [1.0], fprime=system.jacobian, full_output=True)
    result = Fsolve().solve(system.problem, np.ones(1), {})
    np.testing.assert_array_equal(result.y, y)
    assert (result.success, result.message) == (status == 1, message)


@pytest.mark.parametrize("method", ["fsolve", *sorted({*ROOT_OPTIONS} - {"anderson"})])
def test_failure_is_a_result_and_no_warning(method: str) -> None:
    solver, options = (Fsolve(), {}) if method == "fsolve" else (Root(), {"method": method})
    result = solver.solve(rootless().problem, np.full(3, 0.5), options)
    # lm minimises the sum of squares, and takes a minimum that is not zero for a success.
    assert result.success is (method == "lm")
    assert result.message


def test_ill_conditioning_in_anderson_is_scipys_own_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"(?i)ill-conditioned"):
        Root().solve(rootless().problem, np.full(3, 0.5), {"method": "anderson"})


@pytest.mark.parametrize("method", ["broyden1", "broyden2", "df-sane"])
def test_floating_point_warnings_within_scipy_stay_there(method: str) -> None:
    constant = Counted(residual=lambda y: np.ones(3), jacobian=lambda y: np.zeros((3, 3)))
    with pytest.warns(RuntimeWarning, match=r"divide"):  # SciPy alone, so that the next line can fail
        optimize.root(constant.residual, np.zeros(3), method=method)
    assert not Root().solve(constant.problem, np.zeros(3), {"method": method}).success


def test_an_error_in_f_comes_through() -> None:
    def broken(y: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("in f")

    for solver in (Fsolve(), Root()):
        with pytest.raises(ZeroDivisionError, match="in f"):
            solver.solve(SampleProblem("root", 3, 0, broken, broken), np.zeros(3), {})


@pytest.mark.parametrize(
    ("solver", "options", "evaluations"),
    [
        (Fsolve(), {"maxfev": 4}, 4),
        (Root(), {"maxfev": 4}, 4),
        (Root(), {"method": "df-sane", "maxfev": 2}, 2),
    ],
)
def test_a_limit_on_evaluations_is_passed_on(
    solver: Fsolve | Root, options: dict[str, Any], evaluations: int
) -> None:
    system = contraction()
    result = solver.solve(system.problem, np.zeros(3), options)
    assert not result.success
    assert system.calls["residual"] <= evaluations + 2  # SciPy also calls f to see its shape


@pytest.mark.parametrize("method", ["broyden1", "krylov"])
def test_a_limit_on_iterations_is_passed_on(method: str) -> None:
    result = Root().solve(contraction().problem, np.zeros(3), {"method": method, "maxiter": 2})
    assert (result.success, result.iterations) == (False, 2)


@pytest.mark.parametrize(
    ("loose", "tight"),
    [
        ({"method": "broyden1", "fatol": 1e-1}, {"method": "broyden1", "fatol": 1e-11}),
        ({"method": "df-sane", "tol": 1e-1}, {"method": "df-sane", "tol": 1e-12}),
        ({"method": "krylov", "tol": 1e-1}, {"method": "krylov", "tol": 1e-12}),
        ({"method": "hybr", "tol": 1e-1}, {"method": "hybr", "tol": 1e-12}),
    ],
)
def test_tolerances_are_passed_on(loose: dict[str, Any], tight: dict[str, Any]) -> None:
    system = contraction()
    errors = [
        abs(system.residual(Root().solve(system.problem, np.zeros(3), o).y)).max() for o in (loose, tight)
    ]
    assert errors[0] > 1e-8
    assert errors[1] < 1e-9


def test_options_of_the_jacobian_approximation_are_passed_on() -> None:
    def first_step(alpha: float) -> np.ndarray:
        options = {"method": "linearmixing", "nit": 1, "line_search": None, "jac_options": {"alpha": alpha}}
        return Root().solve(contraction().problem, np.zeros(3), options).y

    # Two steps along F for nit=1; the first is alpha F(0), the second F has changed little.
    assert np.linalg.norm(first_step(0.02)) == pytest.approx(2 * np.linalg.norm(first_step(0.01)), rel=0.05)


def test_options_of_differencing_are_passed_on() -> None:
    seen: list[np.ndarray] = []
    system = Counted(residual=lambda y: seen.append(y.copy()) or 1 - y, jacobian=np.diag)
    Fsolve().solve(system.problem, np.zeros(3), {"fprime": None, "epsfcn": 1e-4})
    steps = [y.max() for y in seen if np.count_nonzero(y) == 1]
    assert steps == pytest.approx([1e-2] * 3), "differences at zero take the step sqrt(epsfcn)"


def test_options_are_not_changed() -> None:
    options = {"method": "hybr", "jac": False, "tol": 1e-8, "factor": 10}
    Root().solve(contraction().problem, np.zeros(3), options)
    assert options == {"method": "hybr", "jac": False, "tol": 1e-8, "factor": 10}


@pytest.mark.parametrize("name", ["col_deriv", "full_output", "args", "tol", "maxiter", "method"])
def test_fsolve_refuses_unknown_options(name: str) -> None:
    with pytest.raises(TypeError, match=FSOLVE_TYPE_ERROR.format(name)):
        Fsolve().solve(contraction().problem, np.zeros(3), {name: 1})


@pytest.mark.parametrize("method", ROOT_OPTIONS)
@pytest.mark.parametrize("name", ["col_deriv", "xtool", "callback", "options", "args"])
def test_root_refuses_unknown_options(method: str, name: str) -> None:
    accepted = r"accepted are \[.*'jac', .*'tol'.*\]"
    with pytest.raises(TypeError, match=rf"method='{method}': unknown options \['{name}'\]; {accepted}"):
        Root().solve(contraction().problem, np.zeros(3), {"method": method, name: 1})


@pytest.mark.parametrize("method", JACOBIAN_OPTIONS)
def test_root_refuses_unknown_jac_options(method: str) -> None:
    options = {"method": method, "jac_options": {"alfa": 1}}
    with pytest.raises(TypeError, match=rf"method='{method}', jac_options: unknown options \['alfa'\]"):
        Root().solve(contraction().problem, np.zeros(3), options)


@pytest.mark.parametrize("method", ["newton", "hybrd", None, ["hybr"]])
def test_unknown_method_lists_the_methods(method: object) -> None:
    with pytest.raises(ValueError, match=r"unknown method .*; accepted are \['hybr', 'lm', .*'df-sane'\]"):
        Root().solve(contraction().problem, np.zeros(3), {"method": method})


@pytest.mark.parametrize(
    ("solver", "options", "error", "reason"),
    [
        (Fsolve(), {"fprime": np.eye}, TypeError, r"fprime=<function eye.*accepted is None"),
        (Fsolve(), {"band": (1, 1)}, ValueError, r"\['band'\] concern .*add 'fprime': None"),
        (Fsolve(), {"epsfcn": 1e-8}, ValueError, r"\['epsfcn'\] concern .*add 'fprime': None"),
        (Root(), {"eps": 1e-8}, ValueError, r"\['eps'\] concern .*add 'jac': False"),
        (Root(), {"method": "lm", "eps": 1e-8}, ValueError, r"method='lm': \['eps'\] concern"),
        (Root(), {"jac": np.eye}, TypeError, r"jac=<function eye.*accepted are True"),
        (
            Root(),
            {"method": "krylov", "jac": True},
            ValueError,
            r"takes no Jacobian.*one of \['hybr', 'lm'\]",
        ),
    ],
)
def test_options_without_effect_are_refused(
    solver: Fsolve | Root, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        solver.solve(contraction().problem, np.zeros(3), options)


def test_every_option_of_fsolve_is_scipys() -> None:
    assert (
        Fsolve().solve(contraction().problem, np.zeros(3), dict.fromkeys(("band", "epsfcn", "diag"))).success
    )
    options = dict.fromkeys(FSOLVE_OPTIONS) | {"xtol": 1e-10, "maxfev": 100, "factor": 50, "diag": np.ones(3)}
    options |= {"band": (2, 2), "epsfcn": 1e-12, "fprime": None}
    system = contraction()
    assert_root(Fsolve().solve(system.problem, np.zeros(3), options), system, atol=1e-8)


def test_adapters_are_values() -> None:
    assert Fsolve() == Fsolve()
    assert repr(Root()) == "Root()"


@pytest.fixture
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("method", ["fsolve", *ROOT_OPTIONS])
def test_threads_do_not_disturb_each_other(method: str) -> None:
    solver, options = (Fsolve(), {}) if method == "fsolve" else (Root(), {"method": method})

    def solve(seed: int) -> np.ndarray:
        shift = np.random.default_rng(seed).normal(size=1 + seed % 4)

        def residual(y: np.ndarray) -> np.ndarray:
            return np.array([np.cos(a) / 2 + b - a for a, b in zip(y.tolist(), shift, strict=True)])

        problem = SampleProblem("root", len(shift), seed, residual, lambda y: np.diag(-np.sin(y) / 2 - 1))
        return solver.solve(problem, np.zeros(len(shift)), options).y

    alone = [solve(seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(solve, range(60)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
