"""The tensors in a pytree of unknowns: what is none, what does not fit together, and how to say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Size, Tensor
from torch.utils import _pytree

from invlayer_core.errors import ConditionsError

__all__ = [
    "EventDims",
    "batch_of",
    "check_event_dims",
    "check_leaf",
    "check_tensors",
    "check_together",
    "event_counts",
    "flatten_up_to",
    "named_tensors",
    "structure_message",
]

EventDims = int | tuple[Any, ...] | list[Any] | dict[Any, Any]


def check_tensors(called: str, name: str, tree: Any) -> None:
    """Refuse what is not a tensor of floating-point or complex dtype, or a pytree of them.

    Raises
    ------
    ConditionsError
        Naming the leaf and what it is.
    """
    named_tensors(called, name, tree)


def check_event_dims(event_dims: Any) -> None:
    """Refuse what is neither an integer >= 0 nor a pytree of them.

    Raises
    ------
    ConditionsError
        Naming what came.
    """
    counts = _pytree.tree_leaves(event_dims)
    if not counts or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ConditionsError(
            f"event_dims={event_dims!r}: accepted is an integer >= 0, or integers >= 0 in the structure of y."
        )


def named_tensors(called: str, name: str, tree: Any) -> tuple[list[str], list[Tensor], Any]:
    """The leaves of ``tree``, checked one by one, with what the user would call them, and the structure."""
    paths, spec = _pytree.tree_flatten_with_path(tree)
    names = [name + _pytree.keystr(path) for path, _ in paths]
    if not names:
        raise ConditionsError(
            f"{called}: {name} is {tree!r}, which holds no tensor; accepted is one or more."
        )
    for leaf_name, (_, leaf) in zip(names, paths, strict=True):
        check_leaf(called, leaf_name, leaf)
    return names, [leaf for _, leaf in paths], spec


def check_leaf(called: str, name: str, leaf: Any) -> None:
    """Refuse one leaf that is not a tensor of floating-point or complex dtype."""
    if not isinstance(leaf, Tensor):
        raise ConditionsError(
            f"{called}: {name} is a {type(leaf).__name__}; accepted is a floating-point or complex "
            f"torch.Tensor, or a pytree of them. Use torch.as_tensor({name}, dtype=torch.float64), or "
            "inv.from_numpy(fn) for a NumPy solver function fn."
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise ConditionsError(
            f"{called}: {name} has dtype {leaf.dtype}; accepted are floating-point and complex dtypes. "
            f"Use {name}.double()."
        )


def event_counts(called: str, name: str, spec: Any, event_dims: EventDims) -> list[int]:
    """The number of event dims of every leaf."""
    if isinstance(event_dims, int):
        return [event_dims] * spec.num_leaves
    try:
        counts: list[int] = spec.flatten_up_to(event_dims)
    except ValueError:
        counts = []
    if counts and all(isinstance(count, int) and count >= 0 for count in counts):
        return counts
    like = _pytree.tree_unflatten([1] * spec.num_leaves, spec)
    raise ConditionsError(
        f"{called}: event_dims={event_dims!r} does not fit {name}; accepted is an integer >= 0 for all "
        f"leaves, or one for each in the structure of {name}, such as event_dims={like!r}."
    )


def check_together(
    called: str, names: Sequence[str], tensors: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """Refuse leaves without their event dims, of several batch shapes, or on several devices."""
    for name, tensor, count in zip(names, tensors, counts, strict=True):
        if tensor.ndim < count:
            raise ConditionsError(
                f"{called}: {name} has shape {tuple(tensor.shape)}, with fewer dims than event_dims={count}. "
                "The last event_dims dims of a leaf are one system's unknowns; give each leaf its own "
                "number by event_dims= in the structure of y."
            )
        if tensor.device != tensors[0].device:
            raise ConditionsError(
                f"{called}: {names[0]} is on {tensors[0].device} but {name} is on {tensor.device}; accepted "
                f"is one device. Use .to({str(tensors[0].device)!r})."
            )
        batch, first = batch_of(tensor, count), batch_of(tensors[0], counts[0])
        if batch != first:
            raise ConditionsError(
                f"{called}: {names[0]} has batch dims {tuple(first)} (shape {tuple(tensors[0].shape)}, "
                f"event_dims={counts[0]}), but {name} has {tuple(batch)} (shape {tuple(tensor.shape)}, "
                f"event_dims={count}); accepted are the same batch dims for every leaf. Use expand, or give "
                "each leaf its number of event dims by event_dims= in the structure of y."
            )


def batch_of(tensor: Tensor, event_dims: int) -> Size:
    """The leading dims of ``tensor``."""
    return tensor.shape[: tensor.ndim - event_dims]


def flatten_up_to(spec: Any, called: str, tree: Any, like: str = "y") -> list[Any]:
    """What stands in ``tree`` where ``spec`` has leaves; an error if the structure is another."""
    try:
        leaves: list[Any] = spec.flatten_up_to(tree)
    except ValueError as error:
        raise ConditionsError(structure_message(called, tree, spec, like)) from error
    return leaves


def structure_message(called: str, tree: Any, spec: Any, like: str) -> str:
    """What came and what is accepted, with a star for each tensor."""
    came, one = _pytree.tree_structure(tree), "one tensor"
    outline = _outline(came, one if isinstance(tree, Tensor) else type(tree).__name__)
    return f"{called} returned {outline}; accepted is the structure of {like}, {_outline(spec, one)}."


def _outline(spec: Any, leaf: str) -> str:
    """A structure with a star for each leaf; ``leaf``, if it is but one."""
    return leaf if spec.is_leaf() else repr(_pytree.tree_unflatten([_Star()] * spec.num_leaves, spec))


@final
class _Star:
    def __repr__(self) -> str:
        return "*"
