"""Find the tensors that a function uses without being given them, and swap them for others.

``f`` may be a closure, a bound method or an ``nn.Module``: then it reads tensors that are not among its
arguments. An implicit derivative that does not know of them silently drops their gradients. Here a
``TorchFunctionMode`` watches one evaluation of f and notes every tensor that carries a gradient and that
f did not make itself; a second mode later replaces each of them by a given stand-in.

What no mode can see is what a ``torch.jit`` module reads inside C++. The graph of the result still
shows it, so such a tensor is reported instead of forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from invlayer_core import _functorch
from invlayer_core.errors import ConditionsError

__all__ = ["Place", "Substitution", "evaluate_and_capture", "graph_leaves", "places_of"]


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with ``change`` applied to every tensor in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (list, tuple):
        return type(tree)(_map_tensors(leaf, change) for leaf in tree)
    if type(tree) is dict:
        return {key: _map_tensors(leaf, change) for key, leaf in tree.items()}
    return tree


@final
class Substitution(TorchFunctionMode):
    """While active, torch functions see ``replacements[i]`` wherever they are given ``originals[i]``.

    Parameters
    ----------
    originals, replacements : sequences of Tensor
        Equal lengths; originals are recognised by identity.
    places : sequence of (Place, Tensor)
        What stood where in the modules of f when the solution was certified. Whatever stands there now gives
        way to it: after the forward, ``torch.func.functional_call`` puts a module's own tensors back.

    Examples
    --------
    >>> weight = torch.ones(2, requires_grad=True)
    >>> with Substitution([weight], [torch.full((2,), 3.0)]):
    ...     torch.sum(weight)
    tensor(6.)
    """

    def __init__(
        self,
        originals: Sequence[Tensor],
        replacements: Sequence[Tensor],
        places: Sequence[tuple[Place, Tensor]] = (),
    ) -> None:
        super().__init__()
        self._replacement = {id(old): new for old, new in zip(originals, replacements, strict=True)}
        for place, tensor in places:
            current = place.read()
            if current is not tensor and isinstance(current, Tensor):
                self._replacement.setdefault(id(current), self._replacement.get(id(tensor), tensor))
        # Under torch.func what f makes itself is wrapped, too, and passes for captured: made anew each time.
        pairs = zip(originals, replacements, strict=True)
        self._unread = {id(new) for old, new in pairs if not _functorch.is_wrapped(old)}

    def replace(self, tensor: Tensor) -> Tensor:
        """What stands in for ``tensor``: itself, if nothing does."""
        found = self._replacement.get(id(tensor))
        if found is None:
            return tensor
        self._unread.discard(id(found))
        return found

    @property
    def all_read(self) -> bool:
        """Whether every replacement has been asked for: if not, its gradient would be a silent zero."""
        return not self._unread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = _map_tensors(tuple(args), self.replace)
        return func(*args, **_map_tensors(dict(kwargs or {}), self.replace))


@final
class Place(NamedTuple):
    """Where a tensor belongs: one entry of the parameters or buffers of a module."""

    table: Mapping[str, Any]
    name: str

    def read(self) -> Tensor | None:
        """What stands there now."""
        return self.table.get(self.name)


def places_of(function: Any) -> tuple[tuple[Place, Tensor], ...]:
    """Every parameter and buffer of the modules that ``function`` is, is bound to, or closes over."""
    return tuple(
        (Place(table, name), tensor)
        for outer in _modules_of(function)
        for module in outer.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # reads its own in C++, whatever is done here
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    )


def _modules_of(function: Any) -> Iterator[torch.nn.Module]:
    seen: set[int] = set()
    stack = [function]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            yield value
            continue
        if type(value) is FunctionType:
            inside = [_contents(cell) for cell in value.__closure__ or ()]
        else:
            # Conditions keep the user's function as .function (.conditions), bound methods their object.
            inside = [getattr(value, name, None) for name in ("function", "conditions", "__self__", "func")]
            inside += getattr(value, "functions", ())  # of a problem with constraints
        stack += [thing for thing in inside if callable(thing)]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


@final
class _Capture(TorchFunctionMode):
    """Note every foreign tensor that carries a gradient, and let f see it without one."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = _functorch.current_level()
        self.outer = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Substitution)]
        # Keeps what f makes alive, so that an id is never reused while the mode runs.
        self.own: dict[int, Tensor] = {id(tensor): tensor for tensor in known}
        self.captured: dict[int, Tensor] = {}
        self.stand_in: dict[int, Tensor] = {}

    def _is_foreign(self, tensor: Tensor) -> bool:
        if id(tensor) in self.own:
            return False
        if _functorch.is_wrapped(tensor):
            # A level above ours was opened inside f (f itself calls torch.func): the tensor is f's own.
            return _functorch.level_of(tensor) <= self.level
        return tensor.requires_grad or _functorch.has_tangent(tensor)

    def _look(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.stand_in:
            return self.stand_in[id(tensor)]
        seen = tensor
        for mode in reversed(self.outer):  # what the conditions of an outer layer have swapped already
            seen = mode.replace(seen)
        if not self._is_foreign(seen):
            return tensor
        self.captured[id(tensor)] = tensor
        with torch._C.DisableTorchFunction():
            stand_in = seen.detach()
        self.stand_in[id(tensor)] = self.own[id(stand_in)] = stand_in
        return stand_in

    def _own(self, tensor: Tensor) -> Tensor:
        self.own[id(tensor)] = tensor
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = _map_tensors(tuple(args), self._look)
        return _map_tensors(func(*args, **_map_tensors(dict(kwargs or {}), self._look)), self._own)


def graph_leaves(result: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that the recorded graph of ``result`` ends in."""
    stack, seen = [result.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions)


def _name_of(tensor: Tensor, function: Any) -> str:
    """How the user would call ``tensor``: a parameter's name, else its shape."""
    function = getattr(function, "function", function)  # conditions that wrap the user's own function
    for owner in (function, getattr(function, "__self__", None)):
        if isinstance(owner, torch.nn.Module):
            for name, parameter in owner.named_parameters():
                if parameter is tensor:
                    return f"parameter {name!r} of {type(owner).__name__}"
    return f"a tensor of shape {tuple(tensor.shape)}"


def evaluate_and_capture(
    evaluate: Callable[[], Tensor], known: Sequence[Tensor], function: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Evaluate f once, and again under a recording mode only if it carries gradients of its own.

    Parameters
    ----------
    evaluate : callable
        Calls f on ``known``, which must not carry gradients.
    known : sequence of Tensor
        What f is given openly; never reported.
    function : callable
        f itself, for error messages.

    Returns
    -------
    result : Tensor
        f's value, detached.
    captured : tuple of Tensor
        The tensors with gradients that f reads from elsewhere, each once, in order of use.

    Raises
    ------
    ConditionsError
        If the value depends on a tensor that requires grad and that cannot be swapped, as happens
        inside ``torch.jit`` modules. The message names it.
    """
    with torch.enable_grad():
        result = evaluate()
        if not (_functorch.is_active() or _functorch.in_forward_mode() or _carries_gradient(result)):
            return result, ()
        start = _graph_clock()
        with _Capture(known) as capture:
            result = evaluate()
    _refuse_hidden(result, capture, start, function)
    return result.detach(), tuple(capture.captured.values())


def _carries_gradient(result: Any) -> bool:
    return isinstance(result, Tensor) and result.requires_grad


def _graph_clock() -> int:
    """The sequence number that torch gives to the next node of the graph."""
    node = (torch.zeros((), requires_grad=True) * 1.0).grad_fn
    return int(node._sequence_nr())  # type: ignore[union-attr]


def _refuse_hidden(result: Any, capture: _Capture, start: int, function: Any) -> None:
    """Raise if a gradient reaches the result by a way that substitution cannot cut.

    Either the result still has a graph of its own, or a "captured" tensor was made during the evaluation
    (by code that no mode sees), so that another evaluation would make another one.
    """
    hidden: list[Tensor] = []
    if _carries_gradient(result) and not _functorch.is_wrapped(result):
        hidden += [leaf for leaf in graph_leaves(result) if id(leaf) not in capture.own]
    for tensor in capture.captured.values():
        if tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= start:
            hidden += graph_leaves(tensor)
    if hidden:
        names = ", ".join(dict.fromkeys(_name_of(leaf, function) for leaf in hidden))
        raise ConditionsError(
            f"{_called(function)} depends on {names}, which requires grad but is out of invlayer's reach "
            "(torch.jit modules read their tensors inside C++): its gradient would be lost. "
            "Accepted are tensors passed through args=(...), plain nn.Modules and Python closures. "
            "Pass the original nn.Module instead of its scripted or traced form, or freeze it with "
            "requires_grad_(False)."
        )


def _called(function: Any) -> str:
    return f"conditions {getattr(function, '__qualname__', type(function).__name__)!r}"
