"""Libraries that only a report needs: imported when asked for, and named when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["import_optional"]


def import_optional(module: str, called: str) -> ModuleType:
    """Import ``module``, or say how to get it.

    Raises
    ------
    ImportError
        Naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise ImportError(
            f"{called} needs {library}, which cannot be imported ({error}); accepted is any recent version. "
            'Install it with pip install "invlayer-core[diagnostics]". print(report) needs nothing.',
            name=library,
        ) from error
