"""What torch does not say about tensors in one word."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["DTensor", "counts", "laid_out", "learned", "local", "origin", "row", "storage", "there", "version_of"]

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch built without distributed

    class DTensor(Tensor): ...  # type: ignore[no-redef]


def version_of(t: Tensor) -> int:
    """How often a tensor has been edited in place; -1 for an inference tensor, which does not count."""
    return -1 if t.is_inference() else t._version  # where compiled code made it, torch 2.11 has a version nonetheless


def local(t: Tensor) -> Tensor:
    """A plain tensor to measure: what this process holds of one that is spread, the first part of one that wraps."""
    if type(t) is Tensor or type(t) is nn.Parameter:
        return t
    if isinstance(t, DTensor):
        return t.detach().to_local()  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(t):  # jagged tensors, for one
        return local(getattr(t, t.__tensor_flatten__()[0][0])).detach()
    return t


def origin(t: Tensor) -> Tensor:
    """What it is a view of, or itself."""
    return t if t._base is None else t._base


def learned(t: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return _is_parameter(t) or _is_parameter(t._base)


def _is_parameter(t: Tensor | None) -> bool:
    return type(t) is not Tensor and isinstance(t, nn.Parameter)  # asking that of a tensor is slow


def row(t: Tensor) -> Tensor:
    """The first."""
    return t[:1] if t.ndim else t


def there(t: Tensor) -> bool:
    """Whether it is dense, and its memory not freed, as FSDP's is of weights between uses."""
    if t.layout is not torch.strided:
        return False
    try:
        return t.untyped_storage().nbytes() > 0 or not t.numel()
    except (RuntimeError, NotImplementedError):
        return True


def counts(t: Tensor) -> bool:
    """Whether it holds whole numbers, which nobody differentiates: seeds, indices."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def storage(t: Tensor) -> int:
    """What tensors share that share memory; negative for those that have none."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(t)


def laid_out(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """With these strides, as far as a fresh tensor can have them: kernels, and what they save, depend on the layout.

    Expanded dimensions are expanded again. Not where elements overlap otherwise, nor where they lie far apart.
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
    return torch.empty_strided(once.shape, stride, dtype=t.dtype, device=t.device).copy_(once).expand(t.shape)
