"""``python -m invlayer_core``: which solvers are installed, and do they work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from invlayer_core.solvers import KINDS, SolverListing, linear_solvers, solvers

__all__ = ["main"]

_HEADER = ("name", "kinds", "plugin", "version", "status")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        As typed after ``python -m invlayer_core``; the default is ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit code, 0.

    Raises
    ------
    SystemExit
        After ``--help`` and ``--version``, and on a usage error (exit code 2).
    """
    options = _parser().parse_args(arguments)
    rows = () if options.kind == "linear" else solvers(options.kind)
    # A linear solver belongs to no problem kind: it is listed if all are, or by its own word.
    rows += linear_solvers() if options.kind in (None, "linear") else ()
    print(_table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m invlayer_core", description="Any solver's output as a differentiable tensor."
    )
    version = f"invlayer-core {metadata.version('invlayer-core')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("solvers", help="list the registered solvers and the plugins that failed")
    listing.add_argument("--kind", choices=sorted(KINDS | {"linear"}), help="only solvers of this kind")
    return parser


def _table(rows: Sequence[SolverListing]) -> str:
    cells = [_HEADER, *map(_cells, rows)]
    # The last column is left ragged: a reason may be long.
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:-1]] + [0]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join(lines)


def _cells(row: SolverListing) -> tuple[str, ...]:
    status = f"{row.status}: {row.reason}" if row.reason else row.status
    if row.status == "missing dependency" and row.install:
        status += f" ({row.install})"
    return (row.name, ", ".join(row.kinds) or "-", row.plugin, row.version or "-", status)


if __name__ == "__main__":
    sys.exit(main())
