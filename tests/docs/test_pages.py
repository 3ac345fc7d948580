"""Links lead somewhere, and the reference names everything that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import invlayer_core as inv

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "plugins/*/*.md", "examples/*/*.md")
    for page in ROOT.glob(pattern)
    if "_build" not in page.parts
)
LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    wrong = []
    for link in LINK.finditer(prose(page)):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        if not target.exists() or (link["anchor"] and link["anchor"] not in anchors(target)):
            wrong.append(link[0])
    assert not wrong


def reference() -> str:
    return (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name():
    named = set(re.findall(r"^\.\. (?:auto\w+|data):: (?:[\w.]+\.)?(\w+)$", reference(), re.MULTILINE))
    assert not set(inv.__all__) - named


def test_the_reference_has_every_public_linear_solver():
    (listed,) = re.findall(r"automodule:: invlayer_core\.linear\n +:members: (.*)", reference())
    assert sorted(listed.split(", ")) == sorted(inv.linear.__all__)


def test_the_reference_explains_every_status():
    assert not [status.name for status in inv.Status if f"\n| `{status.name}` |" not in reference()]


def test_the_ten_lines_of_the_readme_are_those_that_are_tested():
    tested = (ROOT / "tests" / "testing" / "test_ten_lines.py").read_text(encoding="utf-8")
    (solver,) = re.findall(r"^class Newton.*?(?=\n\n\n)", tested, re.DOTALL | re.MULTILINE)
    assert solver in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_architecture_names_every_part_of_the_package():
    package = ROOT / "src" / "invlayer_core"
    parts = [path.name for path in package.glob("*.py")]
    parts += [f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [part for part in parts if part not in page and not part.startswith("__")]
