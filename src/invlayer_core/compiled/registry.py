"""Keys by which the operators of a traced graph find their layer again.

A graph holds tensors and constants, so a layer, its solver and its conditions stand in it as a string. Every
layer draws a random key of its own: Dynamo guards on it, and a graph that was saved by another process finds
no layer instead of a wrong one. The registry holds layers weakly, so that it keeps none alive.
"""

from __future__ import annotations

import uuid
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from invlayer_core.compiled.problem import TracedProblem
from invlayer_core.errors import UnsupportedTransformError

__all__ = ["Traceable", "find", "register"]


class Traceable(Protocol):
    """A layer that can stand in a traced graph."""

    trace_key: str

    def traced_problem(self) -> TracedProblem:
        """The layer's problem, as it is now."""

    def fake_solution(self, *args: object) -> Tensor:
        """A tensor of y's shape, dtype and device, made without solving."""


_LAYERS: WeakValueDictionary[str, Traceable] = WeakValueDictionary()


def register(layer: Traceable) -> str:
    """A new key, under which ``layer`` is found as long as it lives."""
    key = f"{type(layer).__name__}-{uuid.uuid4().hex}"
    _LAYERS[key] = layer
    return key


def find(key: str) -> Traceable:
    """The layer of ``key``.

    Raises
    ------
    UnsupportedTransformError
        If it is gone, or never was in this process.
    """
    layer = _LAYERS.get(key)
    if layer is None:
        raise UnsupportedTransformError(
            f"a compiled or exported graph calls the layer {key!r}, which does not exist in this process. Such "
            "a graph holds a reference to its layer, not the layer. Accepted is to keep the layer alive as long "
            "as the graph is used, in the process that traced it; trace again after loading."
        )
    return layer
