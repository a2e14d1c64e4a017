"""Questions about tensors that torch answers in more than one word."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revlib._torch import is_traceable_wrapper_subclass, saved_by, view_base

__all__ = [
    "LEAF",
    "SavedPlace",
    "dense",
    "has_dense_memory",
    "is_dtensor",
    "is_integral",
    "is_parameter",
    "last_activation",
    "leaves_of",
    "like_strided",
    "local_part",
    "operations",
    "saved_at",
    "sum_dtype",
]


LEAF = "torch::autograd::AccumulateGrad"  # how autograd calls the node of a leaf


def is_dtensor(t: Tensor | None) -> bool:
    """Whether a tensor is spread over processes. Without the module that makes such tensors there are none."""
    if t is None or type(t) is Tensor or type(t) is nn.Parameter:
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(t, distributed.DTensor)


def local_part(t: Tensor) -> Tensor:
    """A plain tensor to measure: this process's part of a distributed one, the first part of a wrapper subclass."""
    if type(t) is Tensor or type(t) is nn.Parameter:
        return t
    if is_dtensor(t):
        return t.detach().to_local()  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(t):  # such as a jagged tensor
        return local_part(getattr(t, t.__tensor_flatten__()[0][0])).detach()
    return t


def is_parameter(t: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    # The type is asked first, since isinstance is slow for a plain tensor.
    if type(t) is not Tensor and isinstance(t, nn.Parameter):
        return True
    base = view_base(t)
    return base is not t and type(base) is not Tensor and isinstance(base, nn.Parameter)


def dense(t: Tensor) -> Tensor:
    """The same values without sparsity. A sparse tensor can be added to a dense one, but not always subtracted."""
    if torch.compiler.is_compiling():  # which traces no sparse tensors, and no question about them
        return t
    return t if t.layout in (torch.strided, torch.jagged) else t.to_dense()


def is_integral(t: Tensor) -> bool:
    """Whether a tensor holds whole numbers, which have no gradient: seeds and indices."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def has_dense_memory(t: Tensor) -> bool:
    """Whether a tensor is dense and its memory is there; FSDP frees that of weights between their uses."""
    if t.layout is not torch.strided:
        return False
    try:
        return t.untyped_storage().nbytes() > 0 or not t.numel()
    except (RuntimeError, NotImplementedError):
        return True


def sum_dtype(t: Tensor) -> torch.dtype:
    """A dtype of at least single precision, for sums over a tensor."""
    return torch.promote_types(t.dtype, torch.float32)


def like_strided(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``t`` with these strides, as far as a fresh tensor can have them.

    The kernels that run on a stream, and what they save, depend on its strides, so a recovered stream gets those of
    the original. Expanded dimensions are expanded again. A tensor whose elements overlap in another way, or lie far
    apart, stays as it is.
    """
    if t.stride() == stride:
        return t
    reach = count = 1
    for d, n in sorted((d, n) for d, n in zip(stride, t.shape, strict=True) if d and n > 1):
        if d < reach:
            return t
        reach, count = reach + d * (n - 1), count * n
    if reach > 8 * count:
        return t
    once = t[tuple(slice(None) if d else slice(1) for d in stride)]
    return (
        torch.empty_strided(once.shape, stride, dtype=t.dtype, device=t.device)
        .copy_(once)
        .expand(t.shape)
    )


def leaves_of(tensors: Sequence[Tensor], stop: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors at the end of the graphs of these: all that a gradient of them would reach.

    The graphs are not followed further than to the tensors at which to ``stop``.
    """
    seen = {t.grad_fn for t in stop}
    found = [t for t in tensors if t.grad_fn is None]
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None and t.grad_fn not in seen]
    seen.update(nodes)
    while nodes:
        node = nodes.pop()
        above = node.next_functions
        for n, _ in above:
            if n is not None and n not in seen:
                seen.add(n)
                nodes.append(n)
        if not above and (t := getattr(node, "variable", None)) is not None:
            found.append(t)
    return found


def operations(results: Sequence[Any], most: int = 64) -> Iterator[Any]:
    """Autograd's nodes of the last operations of a function, nearest to its results first."""
    nodes = [t.grad_fn for t in results if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # which grows
        yield node
        for n, _ in node.next_functions:
            if n is not None and n not in seen and len(seen) < most and n.name() != LEAF:
                seen.add(n)
                nodes.append(n)


class SavedPlace(NamedTuple):
    """Where in the graph of a function something is saved, so that it can be found in another graph of the function."""

    result: int  # the number of the result that leads there
    edges: tuple[int, ...]  # for each operation on the way, the number of its input that leads on
    names: tuple[str, ...]  # of these operations and of the one that saves
    number: int  # among what that saves


def last_activation(results: Sequence[Any], most: int = 16) -> tuple[SavedPlace, Tensor] | None:
    """What one of the last operations of a function saves, and where: a tensor that depends on what the function
    differentiates, and is no parameter. Operations nearest to the results come first."""
    nodes: list[tuple[int, tuple[int, ...], tuple[str, ...], Any]] = [
        (i, (), (t.grad_fn.name(),), t.grad_fn)
        for i, t in enumerate(results)
        if isinstance(t, Tensor) and t.grad_fn is not None
    ]
    for result, edges, names, node in nodes:  # which grows
        for number, t in enumerate(saved_by(node)):
            if isinstance(t, Tensor) and t.requires_grad and not is_parameter(t):
                return SavedPlace(result, edges, names, number), t
        above = node.next_functions if len(nodes) < most else ()
        for edge, (n, _) in enumerate(above):
            if n is not None and n.name() != LEAF:
                nodes.append((result, (*edges, edge), (*names, n.name()), n))
    return None


def saved_at(results: Sequence[Any], place: SavedPlace) -> Tensor | None:
    """The same tensor of another run of the function, if its graph leads to one in the same way."""
    node = getattr(results[place.result], "grad_fn", None) if place.result < len(results) else None
    for edge, name in zip((*place.edges, 0), place.names, strict=True):
        if node is None or node.name() != name:
            return None
        here, above = node, node.next_functions
        node = above[edge][0] if edge < len(above) else None
    t = next(islice(saved_by(here), place.number, None), None)
    return t if isinstance(t, Tensor) else None
