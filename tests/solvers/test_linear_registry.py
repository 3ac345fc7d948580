"""Sparse direct solvers by name: from plugins by their hook, and by a call."""

import subprocess
import sys

import pytest

from invlayer_core.__main__ import main
from invlayer_core.errors import SolverConflictError, SolverLoadError, SolverNotFoundError
from invlayer_core.solvers import API_VERSION, LinearSolverSpec, Registry, SparseDirectSolver

REGISTRATION = """
from invlayer_core.solvers import LinearSolverSpec, hookimpl

@hookimpl
def register_linear_solver():
    return LinearSolverSpec(name={name!r}, factory="{package}.adapter:{cls}", {more})
"""

ADAPTER = """
import invlayer_core as inv

class Lu(inv.linear.SparseDirectSolver):
    def factorise(self, matrix, options):
        return inv.linear.Factor(lambda b: b, lambda b: b)

class Abstract(inv.linear.SparseDirectSolver):
    pass

class Needy(Lu):
    def __init__(self, size):
        pass

NotAClass = 3
"""


@pytest.fixture
def plugin(distributions):
    """Write a distribution that registers one linear solver."""

    def write(package: str, name: str = "acme.lu", cls: str = "Lu", more: str = "", adapter: str = ADAPTER):
        code = REGISTRATION.format(name=name, package=package, cls=cls, more=more)
        distributions.write(package, code=code, adapter=adapter)

    return write


def get(registry: Registry, name: str = "acme.lu") -> SparseDirectSolver:
    return registry.get_linear_solver(name, f"SparseLU(solver={name!r})")


def test_a_plugins_linear_solver_is_found_and_kept(plugin, load) -> None:
    plugin("good")
    registry = load()
    assert "good.adapter" not in sys.modules, "the adapter was imported before it was asked for"
    solver = get(registry)
    assert isinstance(solver, SparseDirectSolver)
    assert get(registry) is solver


def test_it_is_listed_apart_from_the_solvers(plugin, load) -> None:
    plugin("good")
    registry = load()
    (row,) = [row for row in registry.linear_solvers() if row.name == "acme.lu"]
    assert (row.kinds, row.plugin, row.version, row.status) == (("linear",), "good", "1.0", "ok")
    assert "acme.lu" not in [row.name for row in registry.solvers()]
    with pytest.raises(SolverNotFoundError):
        registry.get_spec("acme.lu")


def test_one_module_may_register_both(distributions, load) -> None:
    code = REGISTRATION.format(name="acme.lu", package="both", cls="Lu", more="") + (
        "from invlayer_core.solvers import SolverSpec\n"
        "@hookimpl\n"
        "def register_solver():\n"
        "    return SolverSpec(name='acme.lu', factory='both.adapter:Echo', kinds=('root',))\n"
    )
    distributions.write("both", code=code)
    registry = load()
    assert registry.get_spec("acme.lu").kinds == ("root",)
    assert registry.get_linear_spec("acme.lu", "").factory == "both.adapter:Lu"


def test_an_unknown_name_lists_what_there_is(plugin, distributions, load) -> None:
    plugin("good")
    distributions.write("bad", code="1 / 0")
    with pytest.raises(SolverNotFoundError) as raised:
        get(load(), "acme.lo")
    message = str(raised.value)
    assert "SparseLU(solver='acme.lo'): no linear solver of that name is registered." in message
    assert "Did you mean 'acme.lu'?" in message
    assert "Plugin 'bad:main' failed to load" in message
    assert "call register_linear_solver()" in message


def test_a_missing_plugin_of_this_project_is_named_with_its_install_line() -> None:
    with pytest.raises(SolverNotFoundError, match=r"\(pip install invlayer-scipy\)"):
        get(Registry(), "scipy.splu")
    with pytest.raises(TypeError, match=r"a linear solver's name is a string, such as 'scipy.splu'"):
        get(Registry(), None)  # type: ignore[arg-type]


def test_two_plugins_with_one_name_are_a_conflict(plugin, load) -> None:
    plugin("one")
    plugin("two")
    registry = load()
    with pytest.raises(SolverConflictError, match=r"claimed by 'one' 1.0 and 'two' 1.0.*DISABLE_PLUGINS=one"):
        get(registry)
    assert {row.status for row in registry.linear_solvers() if row.name == "acme.lu"} == {"conflict"}


@pytest.mark.parametrize(
    ("cls", "more", "reason"),
    [
        (
            "Lu",
            "requires=('nothing>=1',), install='pip install nothing'",
            r"needs nothing>=1.*pip install noth",
        ),
        ("Missing", "", r"has no 'Missing'"),
        ("NotAClass", "", r"is 3, not a subclass of SparseDirectSolver"),
        ("Abstract", "", r"does not define factorise"),
        ("Needy", "", r"raised TypeError.*called without arguments"),
    ],
)
def test_one_that_cannot_be_loaded_says_why(plugin, load, cls: str, more: str, reason: str) -> None:
    plugin("lacking", cls=cls, more=more)
    with pytest.raises(
        SolverLoadError, match=rf"get_linear_solver\('acme.lu'\), registered by 'lacking' 1.0: .*{reason}"
    ):
        get(load())


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (
            "3",
            r"register_linear_solver gave 3; accepted are a LinearSolverSpec or a list of LinearSolverSpec",
        ),
        ("None", r"register_linear_solver gave None"),
        ("1 / 0", r"its hook register_linear_solver\(\) raised ZeroDivisionError"),
        ("[spec, spec]", r"register_linear_solver gave \['acme.lu'\] more than once"),
        (f"LinearSolverSpec(name='a.b', factory='c:d', api={API_VERSION + 1})", r"built for api \d+"),
        ("LinearSolverSpec(name='a.b', factory='c:d', requires=('x ~= 1',))", r"'x ~= 1' is not understood"),
    ],
)
def test_a_broken_hook_fails_alone(distributions, plugin, load, returned: str, reason: str) -> None:
    code = (
        "from invlayer_core.solvers import LinearSolverSpec, hookimpl\n"
        "spec = LinearSolverSpec(name='acme.lu', factory='c:d')\n"
        f"@hookimpl\ndef register_linear_solver():\n    return {returned}\n"
    )
    distributions.write("bad", code=code)
    plugin("good", name="acme.good")
    registry = load()
    assert isinstance(get(registry, "acme.good"), SparseDirectSolver)
    with pytest.raises(SolverNotFoundError, match=reason):
        get(registry)


def test_a_hook_of_another_form_is_told_by_its_name(distributions, load) -> None:
    code = (
        "from invlayer_core.solvers import hookimpl\n"
        "@hookimpl\ndef register_linear_solver(what):\n    return []\n"
    )
    distributions.write("bad", code=code)
    (failure,) = [f for f in load().failures if f.plugin.distribution == "bad"]
    assert "its register_linear_solver does not fit the hook" in failure.reason


def test_registering_by_a_call() -> None:
    registry, spec = Registry(), LinearSolverSpec(name="acme.lu", factory="c:d")
    registry.register_linear_solver(spec)
    with pytest.raises(
        SolverConflictError, match=r"register_linear_solver\('acme.lu'\): the name is already"
    ):
        registry.register_linear_solver(spec)
    other = LinearSolverSpec(name="acme.lu", factory="e:f")
    registry.register_linear_solver(other, replace=True)
    assert registry.get_linear_spec("acme.lu", "") is other
    with pytest.raises(TypeError, match=r"accepted are a LinearSolverSpec"):
        registry.register_linear_solver("acme.lu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lu"}, r"LinearSolverSpec\(name='lu'\).*'<library>.<method>'.*'scipy.splu'"),
        ({"factory": "acme"}, r"factory='acme'.*'package.module:Class'"),
        ({"device": "cuda"}, r"device='cuda'\): accepted is 'cpu'"),
    ],
)
def test_a_spec_of_another_form_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSolverSpec(**{"name": "acme.lu", "factory": "a:b", **fields})  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_process_registry")
def test_the_command_line_lists_it_with_all_and_by_its_own_kind(
    plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin("good")
    rows = {}
    for arguments in ([], ["--kind", "linear"], ["--kind", "root"]):
        assert main(["solvers", *arguments]) == 0
        rows[tuple(arguments)] = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["acme.lu", "linear"] in rows[()]
    assert ["acme.lu", "linear"] in rows["--kind", "linear"]
    assert ["torch.newton", "root,"] not in rows["--kind", "linear"]
    assert ["acme.lu", "linear"] not in rows["--kind", "root"]


def test_the_core_lists_and_refuses_without_importing_a_library() -> None:
    code = (
        "import sys, invlayer_core as inv; inv.linear_solvers()\n"
        "try: inv.linear.SparseLU(solver='acme.lu')\n"
        "except inv.SolverNotFoundError: pass\n"
        "assert 'scipy' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
