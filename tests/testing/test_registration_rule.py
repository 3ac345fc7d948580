"""The rule about registration, on small distributions that are really installed."""

import importlib
import sys
import textwrap

import pytest
from toy_adapters import NumpyNewton, spec_of

import invlayer_core as inv
from invlayer_core.solvers import registry
from invlayer_core.testing.rules.registration import registration
from invlayer_core.testing.subject import Subject

LIGHT = """
from invlayer_core.solvers import SolverSpec, hookimpl

@hookimpl
def register_solver():
    return SolverSpec(
        name="acme.newton", factory="acme.adapter:Newton", kinds=("root",), requires=("Heavy-Library>=1",)
    )
"""


def write(directory, path, text):
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(textwrap.dedent(text), encoding="utf-8")


def write_distribution(directory, name, package, entry_points=""):
    info = f"{package}-1.0.dist-info"
    write(directory, f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(directory, f"{info}/RECORD", f"{package}/__init__.py,,\n{info}/METADATA,,\n")
    if entry_points:
        write(directory, f"{info}/entry_points.txt", entry_points)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install acme, with this registration module, and Heavy-Library, which it requires."""
    path, modules = list(sys.path), set(sys.modules)

    def installed(registration_module):
        write(tmp_path, "heavy/__init__.py", "weight = 1")
        write_distribution(tmp_path, "Heavy-Library", "heavy")
        write(tmp_path, "acme/__init__.py", registration_module)
        write(tmp_path, "acme/adapter.py", "import heavy\nfrom toy_adapters import NumpyNewton as Newton")
        write_distribution(tmp_path, "acme", "acme", "[invlayer.solvers]\nmain = acme\n")
        sys.path.insert(0, str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.setattr(registry, "_process_registry", None)
        return Subject.of("acme.newton", None, None, 1e-6)

    yield installed
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_light_registration_module_passes(install):
    result = registration.apply(install(LIGHT))
    assert result.passed is True
    assert result.detail == "a new process that imports acme has none of heavy, heavy_library"


@pytest.mark.parametrize("heavy", ["import heavy", "import acme.adapter"])
def test_a_heavy_registration_module_breaks_the_rule(install, heavy):
    result = registration.apply(install(f"{heavy}\n{LIGHT}"))
    assert result.passed is False
    assert "expected acme to be light; came an import of heavy." in result.detail


def test_a_module_that_only_imports_where_plugins_are_loaded_breaks_the_rule(install):
    result = registration.apply(install(f"import sys\nassert 'pytest' in sys.modules\n{LIGHT}"))
    assert result.passed is False
    assert "importable in a new process; came AssertionError" in result.detail


@pytest.mark.parametrize(
    ("register", "reason"),
    [(False, "not registered by an installed distribution"), (True, "registered by a call")],
)
def test_a_spec_of_no_distribution_is_not_applicable(monkeypatch, register, reason):
    monkeypatch.setattr(registry, "_process_registry", None)
    spec = spec_of(NumpyNewton, requires=("torch",))
    if register:
        inv.register_solver(spec)
    result = registration.apply(Subject.of(spec, None, None, 1e-6))
    assert result.passed is None
    assert reason in result.detail
