"""Fake distributions: real metadata and real modules in a temporary directory on ``sys.path``."""

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from invlayer_core.solvers import Registry, registry

REGISTRATION = """
from invlayer_core.solvers import SolverSpec, hookimpl

@hookimpl
def register_solver():
    return SolverSpec(name={solver!r}, factory={factory!r}, kinds=("root",), {more})
"""

ADAPTER = """
from invlayer_core.solvers import Solver, SolverResult

class Echo(Solver):
    def solve(self, problem, y0, options):
        return SolverResult(y=y0)
"""


class Distributions:
    """Writes distributions into one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(
        self,
        name: str,
        *,
        code: str | None = None,
        solver: str = "acme.echo",
        more: str = "",
        adapter: str | None = ADAPTER,
        version: str = "1.0",
        entries: str | None = None,
    ) -> None:
        """Write one distribution.

        Its registration module is ``code``, or one that registers ``solver`` with the further fields
        ``more``; the factory is class Echo in ``adapter``.
        """
        package = name.lower().replace("-", "_").replace(".", "_")
        if code is None:
            code = REGISTRATION.format(solver=solver, factory=f"{package}.adapter:Echo", more=more)
        self._file(f"{package}/__init__.py", code)
        if adapter is not None:
            self._file(f"{package}/adapter.py", adapter)
        metadata = f"{package}-{version}.dist-info"
        self._file(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self._file(
            f"{metadata}/entry_points.txt", "[invlayer.solvers]\n" + (entries or f"main = {package}") + "\n"
        )
        importlib.invalidate_caches()

    def _file(self, path: str, text: str) -> None:
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.fixture
def new_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Distributions]]:
    """Return a function that makes a directory and puts it first on ``sys.path``."""
    monkeypatch.delenv("INVLAYER_PLUGIN_AUTOLOAD", raising=False)
    monkeypatch.delenv("INVLAYER_DISABLE_PLUGINS", raising=False)
    # monkeypatch.syspath_prepend would do, but it also looks for pkg_resources.
    path, modules = list(sys.path), set(sys.modules)

    def new(directory: str) -> Distributions:
        sys.path.insert(0, str(tmp_path / directory))
        (tmp_path / directory).mkdir()
        return Distributions(tmp_path / directory)

    yield new
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def distributions(new_distributions: Callable[[str], Distributions]) -> Distributions:
    """One directory of distributions on ``sys.path``."""
    return new_distributions("site")


@pytest.fixture
def load() -> Callable[[], Registry]:
    """Return a function that gives a fresh registry with all plugins loaded."""

    def loaded() -> Registry:
        registry = Registry()
        registry.load_plugins()
        return registry

    return loaded


@pytest.fixture
def fresh_process_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test's first use of this process's registry be the first of all."""
    monkeypatch.setattr(registry, "_process_registry", None)
