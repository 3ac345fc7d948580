"""What comes in from the user's world: checks at the door, working precision, NumPy functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from invlayer_core.errors import ConditionsError

__all__ = ["check_devices", "check_unknown", "from_numpy", "outside_inference_mode", "working_precision"]


def check_unknown(called: str, name: str, tensor: Any) -> None:
    """Refuse what cannot be an unknown: not a tensor, integer, or complex.

    Raises
    ------
    ConditionsError
        Naming what came.
    """
    if not isinstance(tensor, Tensor):
        raise ConditionsError(
            f"{called}: {name} is a {type(tensor).__name__}; accepted is a real floating-point torch.Tensor. "
            f"Use torch.as_tensor({name}, dtype=torch.float64)."
        )
    if tensor.is_complex():
        raise ConditionsError(
            f"{called}: {name} has dtype {tensor.dtype}; accepted are real dtypes. Split complex unknowns "
            "into real and imaginary parts with torch.view_as_real, and join them inside f with "
            "torch.view_as_complex."
        )
    if not tensor.is_floating_point():
        raise ConditionsError(
            f"{called}: {name} has dtype {tensor.dtype}; accepted are floating-point dtypes. "
            f"Use {name}.double()."
        )


def check_devices(called: str, y0: Tensor, tensors: Sequence[Tensor]) -> None:
    """Refuse args on another device than y0 (scalars on the CPU go with every device).

    Raises
    ------
    ConditionsError
        Naming both devices.
    """
    for position, tensor in enumerate(tensors):
        scalar_on_host = tensor.ndim == 0 and tensor.device.type == "cpu"
        if tensor.device != y0.device and not scalar_on_host:
            raise ConditionsError(
                f"{called}: y0 is on {y0.device} but tensor {position} of args (shape {tuple(tensor.shape)}) "
                f"is on {tensor.device}; accepted is one device. Use .to({str(y0.device)!r})."
            )


def working_precision(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32 (differentiably), everything else as it is.

    Half precision cannot carry a solve: LU does not exist for it, and 1e-3 is its rounding error.
    """
    if tensor.is_inference():  # such a tensor cannot take part in any derivative, not even of the solver's
        with outside_inference_mode():
            tensor = tensor.clone()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Where inference mode is on, plain ``no_grad``: inside inference mode no Jacobian can be taken."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@final
@dataclass(frozen=True)
class _NumpyFunction:
    """A NumPy function as a function of tensors, without gradient."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        like = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        result = self.function(*(_to_numpy(arg) for arg in args))
        if isinstance(result, tuple) and len(result) == 2:
            return _to_tensor(result[0], like), result[1]
        return _to_tensor(result, like)


def _to_numpy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float64 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True).numpy()


def _to_tensor(value: Any, like: Tensor | None) -> Tensor:
    tensor = torch.as_tensor(value)
    if like is not None and not tensor.is_complex():
        return tensor.to(like)
    return tensor


def from_numpy(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a NumPy function stand where a torch solver function is expected.

    Parameters
    ----------
    fn : callable
        Takes float64 arrays (private copies) for tensors, other arguments as they are, and returns y, or
        ``(y, aux)``.

    Returns
    -------
    callable
        Takes tensors; returns y in the dtype and on the device of the first floating-point one.

    Examples
    --------
    >>> import numpy, torch
    >>> from_numpy(numpy.arcsin)(torch.tensor([0.5]))
    tensor([0.5236])
    """
    return _NumpyFunction(fn)
