"""The arguments of a quadratic program, checked: what is there, of which shape, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from invlayer_core.conditions.quadratic import ARGUMENTS, MATRICES, QuadraticLayout
from invlayer_core.errors import ConditionsError
from invlayer_core.inputs import outside_inference_mode
from invlayer_core.matrices import DenseForm, MatrixForm, SparseForm

__all__ = ["read_program"]

_PAIRS = (("G", "h"), ("A", "b"))


def read_program(
    given: Mapping[str, Any],
) -> tuple[QuadraticLayout, tuple[Tensor, ...], Callable[[Tensor], Tensor]]:
    """The layout, θ in working precision, and the way of a result back to the caller's dtype.

    Everything is solved in float64: a KKT system squares the condition number of its rows.

    Raises
    ------
    ConditionsError
        Naming the argument, what came and what is accepted.
    """
    present = {name: value for name, value in given.items() if value is not None}
    _check_kinds(present)
    forms, tensors = {}, {}
    for name, value in present.items():
        if name in MATRICES:
            forms[name], tensors[name] = _read_matrix(name, value)
        else:
            tensors[name] = value
    size = int(present["q"].shape[-1])
    _check_shapes(size, forms, tensors)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)
    names = tuple(name for name in ARGUMENTS if name in tensors)
    layout = QuadraticLayout(size, names, forms)
    theta = tuple(_working(tensors[name]) for name in names)
    _check_batch(layout, tensors)
    return layout, theta, lambda z: z if z.dtype == dtype else z.to(dtype)


def _working(tensor: Tensor) -> Tensor:
    if tensor.is_inference():
        with outside_inference_mode():
            tensor = tensor.clone()
    return tensor if tensor.dtype == torch.float64 or tensor.device.type == "mps" else tensor.double()


def _check_kinds(present: Mapping[str, Any]) -> None:
    if "q" not in present:
        raise ConditionsError(
            "qp: q is None; accepted is a floating-point torch.Tensor of shape (*batch, n)."
        )
    for name, value in present.items():
        if not isinstance(value, Tensor):
            raise ConditionsError(
                f"qp: {name} is a {type(value).__name__}; accepted is a floating-point torch.Tensor or None. "
                f"Use torch.as_tensor({name}, dtype=torch.float64)."
            )
        if not value.is_floating_point():
            raise ConditionsError(
                f"qp: {name} has dtype {value.dtype}; accepted are real floating-point dtypes. Use "
                f"{name}.double()."
            )
        least = 2 if name in MATRICES else 1
        if value.ndim < least:
            accepted = "(*batch, m, n)" if least == 2 else "(*batch, n)"
            raise ConditionsError(f"qp: {name} has shape {tuple(value.shape)}; accepted is {accepted}.")
    device = present["q"].device
    for name, value in present.items():
        if value.device != device:
            raise ConditionsError(
                f"qp: q is on {device} but {name} is on {value.device}; accepted is one device. Use "
                f".to({str(device)!r})."
            )
    for matrix, limit in _PAIRS:
        if (matrix in present) != (limit in present):
            there, missing = (matrix, limit) if matrix in present else (limit, matrix)
            raise ConditionsError(
                f"qp: {there} was given without {missing}; accepted are both of {matrix} and {limit}, or "
                "neither."
            )


def _read_matrix(name: str, value: Tensor) -> tuple[MatrixForm, Tensor]:
    if value.layout is torch.strided:
        return DenseForm(int(value.shape[-2]), int(value.shape[-1])), value
    if value.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise ConditionsError(
            f"qp: {name} has layout {value.layout}; accepted are dense, torch.sparse_coo and "
            "torch.sparse_csr."
        )
    thick = value.dense_dim() if value.layout is torch.sparse_coo else 0
    if value.ndim not in (2, 3) or thick:
        raise ConditionsError(
            f"qp: {name} is sparse and has shape {tuple(value.shape)}, with {thick} dense dims; accepted are "
            "(m, n) and (B, m, n), sparse in every dim."
        )
    return _read_csr(value) if value.layout is torch.sparse_csr else _read_coo(value)


def _read_coo(value: Tensor) -> tuple[MatrixForm, Tensor]:
    value = value.coalesce()
    *sample, row, column = value.indices()
    rows, columns = int(value.shape[-2]), int(value.shape[-1])
    if sample:
        return _on_common_pattern(value.values(), sample[0], row, column, tuple(value.shape))
    return SparseForm(rows, columns, row, column), value.values()


def _read_csr(value: Tensor) -> tuple[MatrixForm, Tensor]:
    pointers, column = value.crow_indices().long(), value.col_indices().long()
    lines = torch.arange(value.shape[-2], device=value.device)
    if value.ndim == 2:
        row = torch.repeat_interleave(lines, pointers.diff(), output_size=column.shape[-1])
        return SparseForm(int(value.shape[0]), int(value.shape[1]), row, column), value.values()
    count, entries = column.shape
    row = torch.repeat_interleave(
        lines.repeat(count), pointers.diff().reshape(-1), output_size=column.numel()
    )
    sample = torch.arange(count, device=value.device).repeat_interleave(entries)
    return _on_common_pattern(value.values().reshape(-1), sample, row, column.reshape(-1), tuple(value.shape))


def _on_common_pattern(
    values: Tensor, sample: Tensor, row: Tensor, column: Tensor, shape: tuple[int, ...]
) -> tuple[MatrixForm, Tensor]:
    """A batch of sparse matrices on the pattern that has the entries of all: values ``(B, nnz)``."""
    count, rows, columns = shape
    places, slot = (row * columns + column).unique(return_inverse=True)
    held = values.new_zeros(count, len(places)).index_put((sample, slot), values)
    return SparseForm(rows, columns, places // columns, places % columns), held


def _check_shapes(n: int, forms: Mapping[str, MatrixForm], tensors: Mapping[str, Tensor]) -> None:
    for name, form in forms.items():
        wanted = (n, n) if name == "P" else (form.rows, n)
        if (form.rows, form.columns) != wanted:
            raise ConditionsError(
                f"qp: {name} is {form.rows} x {form.columns} and q has {n} entries; accepted is "
                f"{'n x n' if name == 'P' else 'm x n'} with n = {n}."
            )
    for matrix, limit in _PAIRS:
        if matrix in forms and tensors[limit].shape[-1] != forms[matrix].rows:
            raise ConditionsError(
                f"qp: {matrix} has {forms[matrix].rows} rows and {limit} has shape "
                f"{tuple(tensors[limit].shape)}; accepted is (*batch, {forms[matrix].rows})."
            )
    for name in ("lb", "ub"):
        if name in tensors and tensors[name].shape[-1] != n:
            raise ConditionsError(
                f"qp: {name} has shape {tuple(tensors[name].shape)} and q has {n} entries; accepted is "
                f"(*batch, {n})."
            )


def _check_batch(layout: QuadraticLayout, tensors: Mapping[str, Tensor]) -> None:
    try:
        layout.program([tensors[name] for name in layout.names]).batch()
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in layout.names)
        raise ConditionsError(
            f"qp: the batch dims of {shapes} do not fit together; accepted are those that broadcast."
        ) from None
