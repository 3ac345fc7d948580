"""``python -m invlayer_core``."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from invlayer_core.__main__ import main


@pytest.fixture
def _three_plugins(distributions, monkeypatch: pytest.MonkeyPatch, fresh_process_registry) -> None:
    """One that works, one that lacks something, one that is broken; and none of those installed here."""
    installed = {d.name for d in metadata.distributions() if d.name.startswith("invlayer")}
    monkeypatch.setenv("INVLAYER_DISABLE_PLUGINS", ",".join(installed))
    distributions.write("good", solver="acme.echo")
    distributions.write(
        "lacking", solver="zeta.x", more="requires=('nothing>=1',), install='pip install nothing'"
    )
    distributions.write("bad", code="1 / 0", version="0.0.1")


@pytest.mark.usefixtures("_three_plugins")
def test_table_is_aligned_and_gives_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers"]) == 0
    assert capsys.readouterr().out == (
        "name       kinds  plugin   version  status\n"
        "acme.echo  root   good     1.0      ok\n"
        "bad:main   -      bad      0.0.1    failed: importing 'bad' raised ZeroDivisionError:"
        " division by zero\n"
        "zeta.x     root   lacking  1.0      missing dependency: needs nothing>=1, which is not installed"
        " (pip install nothing)\n"
    )


@pytest.mark.usefixtures("_three_plugins")
def test_table_of_one_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers", "--kind", "fixed_point"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "bad:main"]


@pytest.mark.usefixtures("fresh_process_registry")
def test_table_without_plugins_is_its_header(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INVLAYER_PLUGIN_AUTOLOAD", "0")
    assert main(["solvers"]) == 0
    assert capsys.readouterr().out == "name  kinds  plugin  version  status\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "the following arguments are required: command"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["solvers", "--kind", "game"], "invalid choice: 'game'"),
    ],
)
def test_usage_errors(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "usage: python -m invlayer_core" in output.err
    assert error in output.err


def test_module_runs_and_tells_its_version() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "invlayer_core", "--version"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, f"invlayer-core {metadata.version('invlayer-core')}\n"), (
        ran.stderr
    )


def test_module_lists_plugins_of_the_path(distributions) -> None:
    distributions.write("good")
    ran = subprocess.run(
        [sys.executable, "-m", "invlayer_core", "solvers", "--kind", "root"],
        env={**os.environ, "PYTHONPATH": str(distributions.directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (row,) = [line for line in ran.stdout.splitlines() if line.startswith("acme.echo")]
    assert row.split() == ["acme.echo", "root", "good", "1.0", "ok"]
