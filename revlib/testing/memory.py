"""Counting activation bytes on a CPU, exactly and repeatably: every live storage once, from birth to death."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revlib._torch import TorchDispatchMode, tree_leaves

__all__ = ["Footprint", "LiveBytes", "footprint"]


class LiveBytes(TorchDispatchMode):
    """Within this context, ``now`` is the sum of bytes of the live storages that operations made, ``peak`` its maximum.

    Storages of ``known`` tensors count nothing. Memory that an operation takes and returns inside itself is not seen.

    Args:
        known: tensors that exist before, such as inputs and parameters, and their gradients if they have some.

    Cost: a call of Python for every operation. It is for measuring, not for training.

    Raises:
        TypeError: ``known`` holds something other than tensors.

    Example:
        >>> x = torch.zeros(10)
        >>> with LiveBytes([x]) as live:
        ...     y = x + 1
        ...     z = torch.cat([y, y])
        ...     del y
        >>> live.now, live.peak
        (80, 120)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = _tensors("LiveBytes(known=...)", known)
        self._bytes = {t.untyped_storage()._cdata: 0 for t in tensors}

    def _born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._bytes:
            self._bytes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self._bytes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._born(t)
        return result


def _tensors(argument: str, given: Iterable[Tensor]) -> list[Tensor]:
    found = list(given) if isinstance(given, Iterable) else [given]
    for t in found:
        if not isinstance(t, Tensor):
            kind = type(t if isinstance(given, (list, tuple)) else given).__name__
            raise TypeError(f"{argument} takes tensors, such as model.parameters(), got {kind}")
    return found


class Footprint(NamedTuple):
    """Activation bytes of a training step, as :func:`footprint` counts them.

    Attributes:
        held: between forward and backward.
        peak: the most that are alive at once in backward.

    Example:
        >>> found = footprint(lambda t: (t.exp(),), [torch.randn(25, requires_grad=True)])
        >>> found.held, found.peak > found.held
        (104, True)
    """

    held: int
    peak: int


def footprint(
    run: Callable[..., Sequence[Tensor]],
    streams: Sequence[Tensor],
    parameters: Iterable[Tensor] = (),
) -> Footprint:
    """Activation bytes of ``run(*streams)`` and of the backward pass of the sum of its outputs' mean squares.

    Gradients are allocated beforehand, so that they do not mix with the activations that backward frees.

    Args:
        run: a stack, a model, or any function of the streams that returns a sequence of tensors.
        parameters: those that ``run`` uses; their gradients are set to zeros.

    Shapes: streams as ``run`` takes them. Cost: a forward and a backward, with a call of Python for every operation.

    Raises:
        TypeError: ``parameters`` holds something other than tensors.

    Example:
        >>> footprint(lambda t: (t.exp(),), [torch.randn(25, requires_grad=True)]).held  # what exp saves, and the loss
        104
    """
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in streams]
    known = [*leaves, *_tensors("footprint(parameters=...)", parameters)]
    for t in known:
        if t.requires_grad:
            t.grad = torch.zeros_like(t)
    gc.collect()
    with LiveBytes([*known, *(t.grad for t in known if t.grad is not None)]) as live:
        outputs = run(*leaves)
        loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
        del outputs
        held = live.peak = live.now
        loss.backward()
    return Footprint(held, live.peak)
