"""Finding a solver by name, and registering one in the process."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from invlayer_core.errors import SolverConflictError, SolverLoadError, SolverNotFoundError
from invlayer_core.solvers import (
    API_VERSION,
    Registry,
    Solver,
    SolverResult,
    SolverSpec,
    get_registry,
    get_solver,
    get_spec,
    register_solver,
    solvers,
)


class Echo(Solver):
    """A solver of this module, for factories that name it."""

    def solve(self, problem, y0, options):
        return SolverResult(y=y0)


class Abstract(Solver):
    """Lacks solve."""


class Batch(Echo):
    """Takes batches, whatever its spec says."""

    batched = True


class Needy(Echo):
    """Cannot be made without arguments."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance


def spec(factory: str = "Echo", name: str = "acme.echo", **fields: object) -> SolverSpec:
    where = factory if ":" in factory else f"{__name__}:{factory}"
    return SolverSpec(name=name, factory=where, kinds=("root",), **fields)  # type: ignore[arg-type]


def test_a_plugins_solver_is_found_and_kept(distributions, load) -> None:
    distributions.write("good")
    registry = load()
    assert "good.adapter" not in sys.modules, "the adapter was imported before it was asked for"
    solver = registry.get_solver("acme.echo")
    assert isinstance(solver, Solver)
    assert registry.get_solver("acme.echo") is solver


def test_unknown_name_lists_what_there_is_near_and_broken(distributions, load) -> None:
    distributions.write("good", solver="acme.echo")
    distributions.write("bad", code="1 / 0")
    with pytest.raises(SolverNotFoundError) as raised:
        load().get_solver("acme.ecko")
    message = str(raised.value)
    assert "get_solver('acme.ecko'): no solver of that name" in message
    assert "Did you mean 'acme.echo'?" in message
    assert "Registered are: acme.echo, " in message
    assert "Plugin 'bad:main' failed to load: importing 'bad' raised ZeroDivisionError" in message


@pytest.mark.parametrize("name", ["echo", "other.echo"])
def test_the_right_name_in_no_or_another_library_is_near(name: str, distributions, load) -> None:
    distributions.write("good", solver="acme.echo")
    with pytest.raises(SolverNotFoundError, match=r"Did you mean 'acme\.echo'\?"):
        load().get_solver(name)


def test_unknown_name_in_an_empty_registry() -> None:
    with pytest.raises(SolverNotFoundError, match=r"Registered are: none\.") as raised:
        Registry().get_spec("acme.echo")
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize("name", [None, 3, ["acme.echo"]])
def test_a_name_is_a_string(name: object) -> None:
    with pytest.raises(TypeError, match=r"a solver's name is a string"):
        Registry().get_solver(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ("no-such-library>=1.2", r"needs no-such-library>=1\.2, which is not installed"),
        ("torch>=999", r"needs torch>=999, found torch \d+\.\d+"),
    ],
)
def test_unmet_requirement_is_named_before_anything_is_imported(
    distributions, load, requires: str, reason: str
) -> None:
    distributions.write(
        "lacking",
        version="0.7",
        adapter="1 / 0",
        more=f"requires=({requires!r},), install='pip install lacking'",
    )
    registry = load()
    with pytest.raises(
        SolverLoadError, match=rf"'acme\.echo'\), registered by 'lacking' 0\.7: {reason}.*pip install"
    ):
        registry.get_solver("acme.echo")
    (row,) = [row for row in registry.solvers() if row.name == "acme.echo"]
    assert (row.status, row.install) == ("missing dependency", "pip install lacking")
    assert row.reason.startswith(f"needs {requires}")


def test_import_error_names_solver_plugin_requirement_and_remedy(distributions, load) -> None:
    distributions.write(
        "lacking",
        adapter="import no_such_library",
        more="requires=('torch>=1',), install='pip install lacking[all]'",
    )
    with pytest.raises(
        SolverLoadError, match=r"'acme\.echo'.*'lacking' 1\.0: importing 'lacking\.adapter'"
    ) as raised:
        load().get_solver("acme.echo")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)
    for part in ("(missing: no_such_library)", "It requires torch>=1.", "pip install lacking[all]"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ("raise OSError('libfoo.so: cannot open')", r"importing 'odd\.adapter' raised OSError: libfoo\.so"),
        ("", r"factory 'odd\.adapter:Echo' does not exist: 'odd\.adapter' has no 'Echo'"),
        ("def Echo(): pass", r"'odd\.adapter:Echo' is <function Echo .*>, not a subclass of Solver"),
        ("class Echo: pass", r"not a subclass of Solver"),
    ],
)
def test_an_unusable_factory(distributions, load, adapter: str, reason: str) -> None:
    distributions.write("odd", adapter=adapter)
    with pytest.raises(SolverLoadError, match=reason) as raised:
        load().get_solver("acme.echo")
    assert "registered by 'odd' 1.0" in str(raised.value)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("Abstract", r"class '.*:Abstract' does not define solve"),
        ("Needy", r"'.*:Needy'\(\) raised TypeError: .*'tolerance'; a factory is called without arguments"),
        ("invlayer_core.solvers:Solver", r"does not define solve"),
        ("Batch", r"class '.*:Batch' has batched=True, its spec batched=False; they must agree"),
        ("Echo.inner", r"has no 'Echo\.inner'"),
        ("no_such_module:Echo", r"registered by 'register_solver\(\) call': importing 'no_such_module'"),
    ],
)
def test_an_unusable_class(factory: str, reason: str) -> None:
    registry = Registry()
    registry.register_solver(spec(factory))
    with pytest.raises(SolverLoadError, match=reason):
        registry.get_solver("acme.echo")


def test_register_in_the_process() -> None:
    registry = Registry()
    registry.register_solver(spec())
    assert isinstance(registry.get_solver("acme.echo"), Echo)
    (row,) = registry.solvers()
    assert (row.plugin, row.version, row.status) == ("register_solver() call", "", "ok")


def test_second_claim_in_the_process_conflicts_at_once(distributions, load) -> None:
    distributions.write("good")
    registry = load()
    with pytest.raises(SolverConflictError, match=r"already claimed by 'good' 1\.0\. .*replace=True"):
        registry.register_solver(spec())
    assert type(registry.get_solver("acme.echo")).__module__ == "good.adapter"
    registry.register_solver(spec(), replace=True)
    assert type(registry.get_solver("acme.echo")) is Echo, "the replaced solver was returned"


def test_replace_settles_a_conflict_of_plugins(distributions, load) -> None:
    distributions.write("rival-a")
    distributions.write("rival-b")
    registry = load()
    registry.register_solver(spec(), replace=True)
    assert type(registry.get_solver("acme.echo")) is Echo


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ("acme.echo", TypeError, r"gave 'acme\.echo'; accepted are a SolverSpec"),
        (Echo, TypeError, r"accepted are a SolverSpec"),
        (spec(api=API_VERSION + 1), ValueError, r"is built for api \d+, this invlayer speaks \d+"),
        (spec(requires=("x~=1",)), ValueError, r"'x~=1' is not understood"),
        (spec(requires="scipy"), TypeError, r"give a tuple of strings"),
    ],
)
def test_register_refuses_what_a_plugin_may_not_return_either(
    wrong: object, error: type[Exception], reason: str
) -> None:
    registry = Registry()
    with pytest.raises(error, match=reason):
        registry.register_solver(wrong)  # type: ignore[arg-type]
    assert registry.solvers() == ()


def test_solvers_of_one_kind_and_failed_plugins(distributions, load) -> None:
    distributions.write("bad", code="1 / 0")
    registry = load()
    registry.register_solver(SolverSpec("acme.iterate", "acme:Iterate", ("fixed_point",)))
    registry.register_solver(spec())
    names = [row.name for row in registry.solvers("fixed_point")]
    assert "acme.iterate" in names
    assert "acme.echo" not in names
    assert "bad:main" in names
    assert names == sorted(names)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind='ode'\): accepted are \['cone', 'fixed_point', .*'root'\]"):
        Registry().solvers("ode")


@pytest.mark.usefixtures("fresh_process_registry")
def test_public_functions_use_the_process_registry() -> None:
    register_solver(spec(name="acme.here"))
    assert get_spec("acme.here").kinds == ("root",)
    assert isinstance(get_solver("acme.here"), Echo)
    assert "acme.here" in [row.name for row in solvers("root")]
    assert get_spec("torch.newton").batched


@pytest.mark.usefixtures("fresh_process_registry")
def test_registry_is_created_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    start = threading.Barrier(8)
    original = Registry.load_plugins

    def counted(registry: Registry) -> None:
        loads.append(registry)
        time.sleep(0.05)  # long enough for the others to come upon an empty registry
        original(registry)

    def first_use(_: int) -> Registry:
        start.wait()
        registry = get_registry()
        registry.get_spec("torch.newton")  # never a registry that is still being filled
        return registry

    monkeypatch.setattr(Registry, "load_plugins", counted)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(first_use, range(8)))
    assert len(found) == len(loads) == 1


@pytest.mark.usefixtures("fresh_process_registry")
def test_registry_is_made_anew_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:

    def interrupted(registry: Registry) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "load_plugins", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get_registry()
    assert get_registry().get_spec("torch.newton").name == "torch.newton"


@pytest.mark.usefixtures("fresh_process_registry")
def test_a_plugin_may_register_at_import(distributions) -> None:
    distributions.write(
        "eager",
        code="from invlayer_core.solvers import SolverSpec, hookimpl, register_solver as register\n"
        "register(SolverSpec('a.early', 'a:B', ('root',)))\n\n"
        "@hookimpl\ndef register_solver():\n    return SolverSpec('a.late', 'a:B', ('root',))",
    )
    assert {get_spec(name).name for name in ("a.early", "a.late")} == {"a.early", "a.late"}


SCRIPT = """
from invlayer_core.solvers import Solver, SolverResult, SolverSpec, get_solver, register_solver

class Mine(Solver):
    def solve(self, problem, y0, options):
        return SolverResult(y=y0)

register_solver(SolverSpec(name="my.own", factory="__main__:Mine", kinds=("root",)))
first = get_solver("my.own")
assert type(first) is Mine

class Mine(Mine):  # the cell is run again
    pass

assert type(get_solver("my.own")) is Mine, "the old class of the notebook was returned"
print("done")
"""


def test_a_class_of_a_script_can_be_registered() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "done", ran.stderr


def test_concurrent_first_use_gives_one_instance(distributions, load) -> None:
    distributions.write("good")
    registry = load()
    start = threading.Barrier(8)

    def first_use(_: int) -> Solver:
        start.wait()
        return registry.get_solver("acme.echo")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(first_use, range(8))))) == 1
