"""The page on plugins says what the code says, and the plugin that it builds works."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import invlayer_core as inv
from invlayer_core.solvers.hookspecs import ENTRY_POINT_GROUP, SolverHooks
from invlayer_core.testing.rules import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(SolverHooks) if not name.startswith("_")]
SETTINGS = ["INVLAYER_DISABLE_PLUGINS", "INVLAYER_PLUGIN_AUTOLOAD"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def first_column() -> list[str]:
    """The code in the first cells of the page's tables."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(.*?)`", cell)]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_signature(hook: str):
    signature = inspect.signature(getattr(SolverHooks, hook))
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    returned = signature.return_annotation
    assert f"`{hook}({', '.join(map(str, parameters))}) -> {returned}`" in PAGE


def test_the_entry_point_group_is_documented():
    (toml,) = blocks("toml")
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in toml


@pytest.mark.parametrize("setting", SETTINGS)
def test_environment_variables_are_documented(setting: str):
    assert any(name.startswith(f"{setting}=") for name in first_column())


def test_every_field_of_a_spec_is_documented():
    fields = {field.name for field in dataclasses.fields(inv.SolverSpec)}
    assert fields <= set(first_column())


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(inv.SolverSpec) if f.name != "constraints"])
def test_defaults_of_a_spec_are_documented(field: dataclasses.Field[object]):
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`".replace("''", '""')
    (row,) = re.findall(rf"^\| [^|]*`{field.name}`[^|]*\| *([^|]*?) *\|", PAGE, re.MULTILINE)
    assert row == default


def test_every_status_is_documented():
    assert not [status.name for status in inv.Status if f"`{status.name}`" not in PAGE]


def test_the_rules_of_the_conformance_kit_are_documented_in_their_order():
    names = [rule.name for rule in RULES]
    assert [name for name in first_column() if name in names] == names


USE = """
import invlayer_core as inv
(row,) = [row for row in inv.solvers() if row.name == "acme.newton"]
assert (row.plugin, row.status) == ("invlayer-acme", "ok"), row
print(inv.testing.check_solver("acme.newton").table())
"""


def test_the_plugin_of_the_page_is_found_and_passes_the_conformance_kit(tmp_path: Path):
    registration, adapter = blocks("python")[:2]
    declared = tomllib.loads(blocks("toml")[0])["project"]
    ((entry, value),) = declared["entry-points"][ENTRY_POINT_GROUP].items()
    metadata = f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {declared['version']}\n"
    files = {
        "invlayer_acme/__init__.py": registration,
        "invlayer_acme/newton.py": "import invlayer_core as inv\n" + adapter,
        "invlayer_acme.dist-info/METADATA": metadata,
        "invlayer_acme.dist-info/entry_points.txt": f"[{ENTRY_POINT_GROUP}]\n{entry} = {value}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    searched = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE],
        env=os.environ | {"PYTHONPATH": searched},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert f"acme.newton (root, fixed_point): {len(RULES)} passed" in run.stdout
