"""Every Python code block of the READMEs and of the documentation runs, with warnings as errors.

The blocks of one page run in their order, in one namespace and in a process of their own, as a reader would
type them; the power-flow example can be imported, as from its own folder. A block is left out only where its
info string says so (``python notest``), and ``NOTEST`` counts those, so that none is left out by accident. A
traceback names the line of the page. A comment after a ``print(...)`` is what it prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
PAGES = [ROOT / "README.md", *DOCS, *sorted(ROOT.glob("plugins/*/README.md"))]
EXAMPLE = ROOT / "examples" / "power_flow"
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))

# How many blocks of a page may be marked `notest`, by the page's path; pages that are not named have none.
NOTEST: dict[str, int] = {
    "docs/backward-modes.md": 1,  # a plugin
    "docs/choose.md": 1,  # a cluster
    "docs/compile.md": 1,  # it needs a C++ compiler, and seconds
    "docs/scale.md": 2,  # a pool of processes, a cluster
}

OPENING = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<info>[^`]*?)\s*$")
PYTHON = re.compile(r"^\W*(code(-block|-cell)?\W+)?(python|py|pycon|ipython)\d*\b", re.IGNORECASE)
SEARCHED = [str(EXAMPLE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
PRINTED = re.compile(r"^ *print\(.*\)  # (?P<output>.+)$", re.MULTILINE)
TIMEOUT = 240  # seconds for one page


@dataclass(frozen=True)
class Block:
    """One fenced block: its info string, the index of its first line, and its lines without indent."""

    info: str
    start: int
    lines: tuple[str, ...]


def fenced_blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown page, in their order."""
    blocks = []
    lines = iter(enumerate(text.splitlines()))
    for number, line in lines:
        if (opening := OPENING.match(line)) is None:
            continue
        indent = len(opening["indent"])
        closing = re.compile(rf"^ *{opening['fence'][0]}{{{len(opening['fence'])},}}\s*$")
        body: list[str] = []
        for _, inner in lines:
            if closing.match(inner):
                break
            body.append(inner[indent:] if not inner[:indent].strip() else inner)
        else:
            raise ValueError(f"line {number + 1}: the block is never closed")
        blocks.append(Block(opening["info"], number + 1, tuple(body)))
    return blocks


def script(text: str) -> str:
    """The page as a Python file: what is not in an executed block is blank, so line numbers stay the same."""
    lines = [""] * len(text.splitlines())
    for block in fenced_blocks(text):
        if block.info == "python":
            lines[block.start : block.start + len(block.lines)] = block.lines
    return "\n".join(lines) + "\n"


def first_wrong_print(code: str, output: str) -> str | None:
    """The first comment after a ``print(...)`` that the output does not have, in their order."""
    lines = iter(output.splitlines())
    return next((text for text in PRINTED.findall(code) if text not in lines), None)


def name_of(page: Path) -> str:
    """The page's path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def page_parameter(page: Path) -> object:
    """The page as a test parameter, marked with the plugins whose library its code names."""
    code = script(page.read_text(encoding="utf-8"))
    needed = [name for name in PLUGINS if re.search(rf"\b{name.removeprefix('invlayer-')}\b", code)]
    return pytest.param(page, id=name_of(page), marks=[pytest.mark.plugin(name) for name in needed])


@pytest.mark.parametrize("page", [page_parameter(page) for page in PAGES])
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path):
    program = tmp_path / f"{page.stem}_page.py"  # not scipy.py, which would hide SciPy
    code = script(page.read_text(encoding="utf-8"))
    program.write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(SEARCHED)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == 0, f"{name_of(page)}: line numbers are those of the page\n{run.stderr}"
    wrong = first_wrong_print(code, run.stdout)
    assert wrong is None, f"{name_of(page)}: no print gives {wrong!r} in its turn\n{run.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_left_out_only_on_purpose(page: Path):
    infos = [block.info for block in fenced_blocks(page.read_text(encoding="utf-8"))]
    assert infos.count("python notest") == NOTEST.get(name_of(page), 0)
    odd = [info for info in infos if PYTHON.match(info) and info not in ("python", "python notest")]
    assert not odd, f"{name_of(page)}: write ```python or ```python notest, not {odd}"


PAGE = """\
Text, and `code`.

```python
total = 1
```

1. An item:

   ```python
   total += 1
   ```

````python notest
total = "never"
````

```console
$ python
```

~~~python
assert total == 2
~~~
"""


def test_blocks_of_any_fence_and_indent_are_found():
    infos = [block.info for block in fenced_blocks(PAGE)]
    assert infos == ["python", "python", "python notest", "console", "python"]


def test_a_script_runs_the_python_blocks_and_keeps_the_line_numbers():
    namespace: dict[str, object] = {}
    exec(script(PAGE), namespace)
    assert namespace["total"] == 2
    assert script(PAGE).splitlines()[3] == "total = 1"
    assert len(script(PAGE).splitlines()) == len(PAGE.splitlines())


def test_comments_after_prints_are_compared_with_the_output():
    code = "print(1)  # 1\nfor i in (2, 3):\n    print(i)  # 3\n"
    assert first_wrong_print(code, "1\n2\n3\n") is None
    assert first_wrong_print(code, "1\n2\n4\n") == "3"
    assert first_wrong_print(code, "3\n1\n") == "3", "the order counts"


def test_an_unclosed_block_is_an_error():
    with pytest.raises(ValueError, match=r"line 1: the block is never closed"):
        fenced_blocks("```python\ntotal = 1\n")


SPELLINGS = [
    "py",
    "Python",
    "python3",
    "pycon",
    "{code-block} python",
    "{code-cell} ipython3",
    "python no-test",
]


@pytest.mark.parametrize("info", SPELLINGS)
def test_other_spellings_of_python_are_noticed(info: str):
    assert PYTHON.match(info)
