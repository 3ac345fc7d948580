"""What is checked: a layer with its inputs, as a function of a list of tensors that can be moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils import _pytree

from invlayer_core.call import name_of
from invlayer_core.certificate import SolveInfo
from invlayer_core.diagnostics.modules import modules_of
from invlayer_core.errors import ConditionsError
from invlayer_core.layers import LAYERS_WITH_GUESS

__all__ = ["Input", "Outputs", "Subject"]

Result = TypeVar("Result")


@final
@dataclass(frozen=True)
class Input:
    """One tensor that the layer is differentiated with respect to: its name, and its value."""

    name: str
    value: Tensor


@final
@dataclass(frozen=True)
class Outputs:
    """The floating-point tensors that a call returned, and its info if there was one."""

    tensors: tuple[Tensor, ...]
    info: SolveInfo | None

    def flat(self, which: Sequence[int]) -> Tensor:
        """The tensors numbered ``which`` as one vector, in float64 on the host, without gradient."""
        return flatten(self.tensors[i] for i in which)


def flatten(tensors: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, in float64 on the host, without gradient."""
    parts = [tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


class _Host(torch.nn.Module):
    """Holds modules, so that ``functional_call`` swaps their tensors for as long as a computation runs."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        for position, module in enumerate(modules):
            self.add_module(str(position), module)

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


@final
class Subject:
    """A layer with its arguments.

    Inputs are the floating-point tensors among the arguments that require grad, or all of them if none
    does; and the parameters of the modules that the layer is, or holds. The caller's own tensors are never
    touched: every call works on copies, buffers included.

    Parameters
    ----------
    layer : callable
    args, kwargs
        What it is called with.

    Raises
    ------
    ConditionsError
        If the layer cannot be called, or has nothing to differentiate with respect to.
    """

    def __init__(self, layer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not callable(layer):
            raise ConditionsError(
                f"check_layer: layer is a {type(layer).__name__}; accepted is a layer, a function decorated "
                "with inv.implicit_function, or any callable of tensors. Pass the layer itself, and its "
                "arguments after it."
            )
        self.layer = layer
        paths, self._spec = _pytree.tree_flatten_with_path((args, kwargs))
        self._leaves = [leaf for _, leaf in paths]
        self._positions = _differentiable(layer, paths)
        self._host = _Host(modules_of(layer))
        self._parameters = [
            name for name, p in self._host.named_parameters() if p.is_floating_point() and p.requires_grad
        ]
        parameters = dict(self._host.named_parameters())
        self.inputs = (
            *(Input(_name(paths[i][0]), as_real(paths[i][1].detach())) for i in self._positions),
            *(
                Input(f"parameter {name.split('.', 1)[1]}", parameters[name].detach())
                for name in self._parameters
            ),
        )
        if not self.inputs:
            raise ConditionsError(
                f"check_layer: none of the {len(paths)} arguments is a floating-point tensor, and the "
                "layer has no parameters: there is nothing to differentiate by. Accepted are tensors that "
                "the layer depends on, as in inv.check_layer(layer, a, b)."
            )

    @property
    def argument_count(self) -> int:
        """How many of the inputs are arguments; the others are parameters."""
        return len(self._positions)

    @property
    def values(self) -> list[Tensor]:
        """The inputs as they came."""
        return [item.value for item in self.inputs]

    def call(self, tensors: Sequence[Tensor], then: Callable[[Outputs], Result]) -> Result:
        """Call the layer with ``tensors`` for its inputs, and ``then`` work on what it returns.

        Parameters are swapped until ``then`` has returned: a backward pass that evaluates conditions anew
        still finds them in their modules.
        """
        split = self.argument_count
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        for position, tensor in zip(self._positions, tensors[:split], strict=True):
            leaves[position] = (
                torch.view_as_complex(tensor) if self._leaves[position].is_complex() else tensor
            )
        args, kwargs = _pytree.tree_unflatten(leaves, self._spec)
        swapped = {name: buffer.detach().clone() for name, buffer in self._host.named_buffers()}
        swapped |= dict(zip(self._parameters, tensors[split:], strict=True))
        compute = lambda: then(read_outputs(self.layer, self.layer(*args, **kwargs)))  # noqa: E731
        result: Result = torch.func.functional_call(self._host, swapped, (compute,))
        return result

    def record(self, tensors: Sequence[Tensor], then: Callable[[Outputs, list[Tensor]], Result]) -> Result:
        """As :meth:`call`, on the autograd tape; ``then`` also gets the leaves to differentiate by."""
        with torch.enable_grad():
            leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
            return self.call(leaves, lambda outputs: then(outputs, leaves))

    def forward(self, tensors: Sequence[Tensor], which: Sequence[int]) -> Tensor:
        """The values alone, as one vector."""
        with torch.no_grad():
            copies = [tensor.detach().clone() for tensor in tensors]
            return self.call(copies, lambda outputs: outputs.flat(which))

    def moved(self, direction: Sequence[Tensor], step: float) -> list[Tensor]:
        """The inputs, ``step`` along ``direction``."""
        return [value + step * tangent for value, tangent in zip(self.values, direction, strict=True)]


def read_outputs(layer: Callable[..., Any], result: Any) -> Outputs:
    """Take apart what a layer returned.

    Raises
    ------
    ConditionsError
        If there is no floating-point tensor in it.
    """
    leaves = _pytree.tree_leaves(result)
    tensors = tuple(as_real(leaf) for leaf in leaves if _carries_derivatives(leaf))
    if not tensors:
        raise ConditionsError(
            f"check_layer: {name_of(layer)} returned {type(result).__name__} without a "
            "floating-point tensor in it; accepted are a tensor, a pytree of tensors, or (tensor, info)."
        )
    if not sum(tensor.numel() for tensor in tensors):
        raise ConditionsError(
            f"check_layer: {name_of(layer)} returned tensors without entries, of shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]}; accepted is at least one sample."
        )
    return Outputs(tensors, next((leaf for leaf in leaves if isinstance(leaf, SolveInfo)), None))


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as real and imaginary parts, in a last dim; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _carries_derivatives(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _differentiable(layer: Callable[..., Any], paths: Sequence[tuple[tuple[Any, ...], Any]]) -> list[int]:
    """Positions of the arguments to differentiate by; no gradient flows to the guess ``y0`` of our layers."""
    guess = isinstance(layer, LAYERS_WITH_GUESS)
    real = [
        i
        for i, (path, leaf) in enumerate(paths)
        if _carries_derivatives(leaf) and not (guess and _name(path).startswith("y0"))
    ]
    asked = [i for i in real if paths[i][1].requires_grad]
    return asked or real


def _name(path: tuple[Any, ...]) -> str:
    """``args[0]``, ``args[1]['x']``, or a keyword's name."""
    if path[0].idx == 0:
        return f"args{_pytree.keystr(path[1:])}"
    return f"{path[1].key}{_pytree.keystr(path[2:])}"
