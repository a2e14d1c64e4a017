"""Closing the loop: what backward recovered must be what forward had.

No version counter sees a private random generator, a function that counts its calls, or a stream that does not invert
accurately. All of them leave a trace: a stream recovered in backward differs from the stream that forward merged away.
Forward keeps a sample of up to 128 elements of each such stream; backward compares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from revlib import streams
from revlib.tensors import local

__all__ = ["Extent", "Sampler", "Witness", "close", "default_tolerance", "deliver", "raise_pending"]

_SAMPLES, _FEWEST, _ALL = 128, 8, 2**13  # elements of a stream: at most, at least, and of a whole stack
_serial = itertools.count()


class Sampler:
    """Picks a grid of up to 128 elements of a tensor, at an offset that moves from one forward to the next.

    Stacks of more than 64 steps take fewer of each, down to 8: what is kept to compare must not grow with depth.
    """

    def __init__(self, steps: int = 1) -> None:
        self.samples = min(_SAMPLES, max(_FEWEST, _ALL // max(1, steps)))
        self.offset = next(_serial)
        self.grids: dict[torch.Size, tuple[slice, ...]] = {}

    def __call__(self, t: Tensor) -> Tensor:
        t = local(t)
        grid = self.grids.get(t.shape)
        if grid is None:
            per_dim = max(1, int(self.samples ** (1 / max(1, t.ndim)) + 1e-9))
            grid = self.grids[t.shape] = tuple(self._places(n, min(n, per_dim)) for n in t.shape)
        return t.detach()[grid].clone()

    def _places(self, n: int, count: int) -> slice:
        """So many of n, evenly spaced; every one of the n at some offset."""
        if count == 0:
            return slice(0)
        stride = n // count
        first = self.offset % (n - stride * (count - 1))
        return slice(first, first + stride * (count - 1) + 1, stride)


class Witness(NamedTuple):
    """One recovered tensor, a stream or an activation: which step gave it back, both samples, and one to measure
    against, unless the original."""

    name: str
    original: Tensor
    recovered: Tensor
    reference: Tensor | None = None


class Extent(NamedTuple):
    """The least and the largest element of a merged stream, and the magnitude that its coupling allows."""

    name: str
    least: Tensor
    largest: Tensor
    limit: float


def extents(name: str, merged: Tensor, limit: float) -> list[Extent]:
    """Of a stream that must stay below a limit; none of any other."""
    merged = local(merged)
    if limit == math.inf or not merged.numel():
        return []
    return [Extent(name, *torch.aminmax(merged.detach()), limit)]  # many times as fast as a norm, on a CPU


def default_tolerance(dtypes: set[torch.dtype], on_accelerator: bool) -> float:
    r"""$4\sqrt{\epsilon}$ of the coarsest arithmetic that took part: half of the digits, and two bits.

    float64 6e-8, float32 1.4e-3, float16 0.13, bfloat16 0.35. Accelerators may multiply float32 with TF32's 10-bit
    mantissa, so float32 counts as float16 there.
    """
    eps = max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float64).eps)
    if on_accelerator and torch.float32 in dtypes:
        eps = max(eps, 2.0**-10)
    return 4 * math.sqrt(eps)


def wide(t: Tensor) -> torch.dtype:
    """A dtype of at least single precision for sums over a tensor."""
    return torch.promote_types(t.dtype, torch.float32)


def _flat(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    """All of them in one, in at least single precision."""
    flat = torch.cat([t.flatten() if t.device == device else t.flatten().to(device) for t in samples])
    return flat.to(wide(flat))


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double()


def _errors(witnesses: Sequence[Witness], tolerance: float, finite: Tensor | None) -> Tensor:
    """Relative error of each recovered sample, in the norm; a stream of zeros is measured against the largest one.

    A stream that no function sees may lose digits to what was merged into it, but must come back to one digit.
    Infinite where a stream came back as NaN; zero throughout where forward itself overflowed: naive autograd has NaN
    gradients then too, and GradScaler skips them.
    """
    device = witnesses[0].original.device  # streams may live on several
    counts = [w.original.numel() for w in witnesses]
    with torch.no_grad():
        originals = _flat([w.original for w in witnesses], device)
        gap = _flat([w.recovered for w in witnesses], device)
        same = gap == originals  # infinities too, which attention may save
        gap.sub_(originals).masked_fill_(same, 0.0)
        originals.masked_fill_(~originals.isfinite(), 0.0)
        gaps, norms = _norms([*gap.split(counts), *originals.split(counts)]).view(2, -1)
        sizes = norms.clone()
        for i, w in enumerate(witnesses):
            if w.reference is not None:
                sizes[i] = torch.maximum(norms[i], _norms([_flat([w.reference], device)])[0])
        sizes = torch.minimum(sizes, norms * max(1.0, 0.1 / tolerance if tolerance else 1.0))
        sizes = torch.where(sizes > 0, sizes, sizes.max().clamp_min(torch.finfo(torch.float64).tiny))
        errors = (gaps / sizes).nan_to_num(nan=math.inf, posinf=math.inf)
        return errors if finite is None else torch.where(finite, errors, 0.0)


def _judge(values: Tensor, witnesses: Sequence[str], extents: Sequence[Extent], tolerance: float, when: str) -> None:
    """Raise for the first of the errors, then sizes, that is too large."""
    errors, sizes = values[: len(witnesses)].tolist(), values[len(witnesses) :].tolist()
    for size, (name, _, _, limit) in zip(sizes, extents, strict=True):
        if not size < limit:
            raise RuntimeError(
                f"{name} took its stream to a magnitude of {size:.6g}, beyond the limit of {limit:g} below which its "
                "coupling is exact. Give the coupling a larger limit, at a coarser resolution, or normalise the branch."
            )
    for error, name in zip(errors, witnesses, strict=True):
        if error > tolerance:
            raise RuntimeError(
                f"{when} recovered what enters {name} with a relative error of {error:.2g}, "
                f"where {tolerance:.2g} is tolerated, so its gradients are wrong. Either that function does not repeat "
                "(a random generator of its own, a call counter, a tensor edited or replaced since forward), or its "
                "stream does not invert accurately (its coupling's unmerge does not undo merge: "
                "revlib.testing.assert_unmerges tells; its result is far larger than the stream, or computed in a "
                "lower precision: use the ExactAdditive coupling, keep the streams in float32, or normalise the "
                "branches). Compare with scheduler=Naive(); if the error is acceptable, raise the tolerance."
            )


_pending: list[tuple[streams.Arriving, list[str], Sequence[Extent], float]] = []


def close(
    witnesses: Sequence[Witness],
    extents: Sequence[Extent],
    exact: bool,
    tolerance: float | None,
    dtypes: set[torch.dtype],
    finite: Tensor | None,
) -> None:
    """Compare, and raise where a stream came back wrong or left its range: at once on a CPU.

    On CUDA the verdict is copied without a synchronisation and raised by the first forward or backward of any stack
    that finds it ready, or by :func:`raise_pending`. Inside a CUDA-graph capture nothing can be raised or compared.
    """
    found = [w.original for w in witnesses] + [e.largest for e in extents]
    if not found or _unreadable(found[0]):
        return
    device = found[0].device
    if tolerance is None:  # where every step is exact, equality, wherever kernels repeat their bits
        tolerance = 0.0 if exact and device.type == "cpu" else default_tolerance(dtypes, device.type != "cpu")
    with torch.autocast(device.type, enabled=False):  # which would have a say in how samples are put together
        values = torch.empty(0, dtype=torch.float64, device=device)
        if witnesses:
            values = _errors(witnesses, tolerance, finite)
        if extents:
            ends = _flat([e.least for e in extents] + [e.largest for e in extents], device)
            sizes = ends.abs().view(2, -1).amax(0)
            values = torch.cat([values, sizes if finite is None else torch.where(finite, sizes, 0.0)])
    deliver(values, [w.name for w in witnesses], extents, tolerance)


def _unreadable(values: Tensor) -> bool:
    return values.is_meta or isinstance(values, FakeTensor) or streams.driver.capturing()


def deliver(values: Tensor, names: list[str], extents: Sequence[Extent], tolerance: float) -> None:
    """Raise where one of the errors, then sizes, is too large: at once, or on CUDA once they have arrived."""
    if _unreadable(values):
        return
    if values.is_cuda:
        _pending.append((streams.Arriving(values), names, extents, tolerance))
    else:
        _judge(values, names, extents, tolerance, "backward")


def raise_pending(*, wait: bool = True) -> None:
    """Raise if an earlier backward on a GPU recovered a stream wrongly.

    Such verdicts arrive without a host synchronisation, so the last one of a run may still be under way when the run
    ends; call this once there. ``wait=False`` looks only at those that have arrived, as every stack does by itself.
    """
    while _pending and not streams.driver.capturing() and (wait or _pending[0][0].here()):
        verdict, names, extents, tolerance = _pending.pop(0)
        _judge(verdict.get(), names, extents, tolerance, "an earlier backward")
