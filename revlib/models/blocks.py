"""Blocks: the reversible sequence of a model, which a trace notes as one call, and which may take a batch in parts."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revlib._numbers import whole
from revlib._torch import exporting, transforming
from revlib.models.tracing import NotScripted, noted, traced
from revlib.schedulers import Naive
from revlib.sequence import ReversibleSequence
from revlib.step import State

__all__ = ["Blocks", "each_alone", "parts_of", "separable"]


class Blocks(NotScripted, ReversibleSequence):
    r"""The reversible sequence of a model.

    With ``parts`` above 1, each function runs on so many parts of the batch, one after another, while gradients are
    recorded, and is checkpointed part by part unless the scheduler is ``Naive()``: only one part's activations are
    alive in backward. Hooks on functions then run once for each part, and random numbers are drawn part by part.
    Cost: one more evaluation of each function. A batch of one image has no parts.

    ``start`` and ``stop`` run some of the blocks, under the coupling and scheduler of all.
    """

    parts: int = 1
    _apart: tuple[tuple[object, ...], ReversibleSequence] | None = None

    def forward(
        self, *streams: Tensor, start: int | None = None, stop: int | None = None, **context: Any
    ) -> State:
        some = {name: at for name, at in (("start", start), ("stop", stop)) if at is not None}
        if traced(streams[0]):
            return noted(self, streams, {**some, **context})
        if some:
            return self[start:stop](*streams, **context)
        parts = parts_of(self.parts, streams[0])
        return (
            super().forward(*streams, **context)
            if parts == 1
            else self._in(parts)(*streams, **context)
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            *streams: Tensor,
            start: int | None = None,
            stop: int | None = None,
            **context: Any,
        ) -> State: ...

    def part(self, start: int, stop: int, *streams: Tensor) -> State:
        """Some of the blocks; all of them as a call of the module itself, so that its hooks run."""
        if (start, stop) == (0, len(self)):
            return self(*streams)
        if traced(streams[0]):
            return noted(self, streams, {"start": start, "stop": stop})
        return self[start:stop](*streams)

    def _in(self, parts: int) -> ReversibleSequence:
        """The same functions on parts of the batch. They are made once: a ``Budget`` knows steps by their modules."""
        key = (parts, self.coupling, self.scheduler, *(f for pair in self for f in pair))
        if self._apart is None or self._apart[0] != key:
            kept = isinstance(self.scheduler, Naive)
            pairs = [(InParts(F, parts, kept), InParts(G, parts, kept)) for F, G in self]
            self._apart = (key, ReversibleSequence(pairs, self.coupling, self.scheduler))
        return self._apart[1]


# This is called, and no decorator, because type checkers would take what it returns for any module.
register_notrace_module(Blocks)


class InParts(nn.Module):
    """A function of a batch, part by part: checkpointed, unless all that autograd saves is to be kept."""

    def __init__(self, fn: nn.Module, parts: int, kept: bool) -> None:
        super().__init__()
        self.fn, self.parts, self.kept = fn, parts, kept

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept or transforming()  # transforms of torch.func refuse checkpoints
        pieces = x.tensor_split(self.parts)
        with each_alone(x):
            return torch.cat(
                [
                    self.fn(p) if kept else checkpoint(self.fn, p, use_reentrant=False)
                    for p in pieces
                ]
            )


def each_alone(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast casts weights for each part anew, as it does when a part is run again: their
    gradients are then summed in the precision of the weights, whatever is checkpointed."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def parts_of(parts: int, batch: Tensor) -> int:
    """In how many parts to take a batch: in one where no gradients are recorded, and while a program is compiled or
    exported."""
    if parts == 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting():
        return 1
    return min(parts, len(batch))


def separable(parts: int, model: nn.Module) -> int:
    """``parts``, or 1 if a layer looks at the whole batch, as batch norm does. Raises: ValueError for less than one."""
    whole("parts", parts, 1, advice="; 1 runs the whole batch at once")
    looks = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return 1 if looks else parts
