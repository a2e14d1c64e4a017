"""What the tape keeps of one step: how to run its function again, and what autograd wanted to save of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revlib.modules import ModuleState
from revlib.step import Branch, State

__all__ = ["FOR_GOOD", "Holder", "Record", "Saved"]

FOR_GOOD: Any = None  # the key of what was recovered in a graph task that releases its graph, as autograd goes


class _Save(torch.autograd.Function):
    """A node outside of every graph, holding a tensor as autograd does: version-checked, under the ambient hooks."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("a node that only holds a tensor was differentiated")


class Saved:
    """One stream, kept as a saved tensor."""

    def __init__(self, stream: Tensor) -> None:
        with torch.enable_grad():
            key = torch.empty(0, requires_grad=True, device="cpu")
            # Detached, since the graph of the stream leads to holders, they to the tape, and the tape to here.
            self.token: Tensor = _Save.apply(key, stream.detach())  # type: ignore[no-untyped-call]
        self.opened: tuple[Callable[[], Tensor | None], int] = (lambda: None, 0)

    def get(self) -> Tensor:
        # Neighbouring states share streams, and the ambient hooks may allow to open each only once.
        stream, version = self.opened[0](), self.opened[1]
        if stream is not None and stream._version == version:
            return stream
        try:
            stream = self.token.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
            self.opened = weakref.ref(stream), stream._version
            return stream
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "an output of a reversible sequence, or a stream it checkpoints, was modified by an inplace operation "
                "between forward and backward; backward starts from it, so edit a clone of it instead."
            ) from error


class Versioned(NamedTuple):
    """A tensor with the version that it must still have when autograd uses it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, t: Tensor) -> Versioned:
        return cls(t, -1 if t.is_inference() else t._version)

    def get(self) -> Tensor:
        if self.version >= 0 and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(self.tensor.shape)}, saved inside a reversible sequence, is at version "
                f"{self.tensor._version}; expected version {self.version}. Edit a clone of it instead."
            )
        return self.tensor


class Holder:
    """Stands in the graph for one saved tensor; dies when autograd releases its node."""

    __slots__ = ("__weakref__", "fresh", "step", "values")

    def __init__(self, step: int, tensor: Tensor) -> None:
        self.step = step
        self.fresh: Versioned | None = Versioned.of(
            tensor
        )  # while forward runs, for functions that differentiate inside
        self.values: dict[Any, Versioned] = {}  # by graph task

    def get(self, task: int) -> Tensor | None:
        value = self.values.get(FOR_GOOD) or self.values.get(task)
        return None if value is None else value.get()


@dataclass
class Record:
    """One step of one forward: how to run its function again, and what autograd wanted to save of it."""

    branch: Branch
    context: dict[str, Any]
    modules: list[nn.Module]  # whose state the function reads
    dropped: bool  # its saved tensors are not kept
    repeated: bool  # it is repeated from its own input, not inverted from its output
    guarded: bool  # something may need it to be evaluated in backward
    module: ModuleState = field(init=False)
    needs: tuple[bool, ...] = ()  # requires_grad of its m streams
    dtype: torch.dtype = torch.float32  # of the stream it merges away, with its stride
    stride: tuple[int, ...] = ()
    dense: bool = True  # in memory
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)  # of context tensors
    drawn: dict[torch.device, Tensor] = field(default_factory=dict)
    holders: list[weakref.ref[Holder]] = field(default_factory=list)
    kinds: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    split: int = 0  # the function made so many holders, the coupling the rest
    sample: Tensor | None = None  # of the stream that backward will recover
    reference: Tensor | None = None  # what its error is measured against, where that is not the stream itself

    def living(self) -> Iterator[Holder]:
        return (h for h in (ref() for ref in self.holders) if h is not None)

    def check(self) -> None:
        """Raise unless the function would run now as it ran in forward."""
        self.module.check(self.branch.name)
        for key, t, version in self.versions:
            if t._version != version:
                raise RuntimeError(
                    f"context tensor {key!r} of {self.branch.name} was modified by an inplace operation between "
                    "forward and backward; edit a clone of it instead."
                )

    def observe(self, state: State) -> None:
        """Before the first run: what the step is about to see."""
        self.module = ModuleState(self.modules)
        self.needs = tuple(t.requires_grad for t in state)
        self.dtype, self.stride = state[0].dtype, state[0].stride()
        span = sum((n - 1) * d for n, d in zip(state[0].shape, self.stride, strict=True))
        self.dense = 0 not in self.stride and span < 2 * state[0].numel()
        self.versions = [
            (key, t, t._version)
            for key, value in self.context.items()
            for t in tree_leaves(value)
            if isinstance(t, Tensor) and not t.is_inference()
        ]

    def packer(self, step: int) -> Callable[[Tensor], Holder]:
        """What puts a holder in place of each tensor that autograd saves. The graph keeps it, so it knows no module."""
        holders, kinds = self.holders, self.kinds

        def pack(t: Tensor) -> Holder:
            holder = Holder(step, t)
            holders.append(weakref.ref(holder))
            kinds.append((t.shape, t.dtype))
            return holder

        return pack

    def refill(self, key: Any, part: slice, run: Callable[[], Any], *, fill: bool) -> Any:
        """Run a part of the step with gradients, as forward did; its holders get what autograd saves this time."""
        holders, kinds, saved = self.holders[part], self.kinds[part], list[Versioned]()
        name, dropped = self.branch.name, self.dropped

        def pack(t: Tensor) -> int:
            i = len(saved)
            if dropped and (i == len(kinds) or (t.shape, t.dtype) != kinds[i]):
                _mismatch(name, i, kinds, f"{tuple(t.shape)} {t.dtype}")
            saved.append(Versioned.of(t.detach()))
            return i

        def unpack(i: int) -> Tensor:
            if not saved:
                raise RuntimeError(
                    f"a tensor that {name} put into a list or a dict belongs to its repetition in backward, and cannot "
                    "be differentiated; use what forward captured, or assign it to an attribute of the module."
                )
            return saved[i].get()

        try:
            with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
                result = run()
            if dropped and len(saved) != len(kinds):
                _mismatch(name, len(saved), kinds, "nothing more")
            for ref, value in zip(holders, saved, strict=False):
                holder = ref()
                if holder is not None and fill:
                    holder.values[key] = value
        finally:
            saved.clear()  # the function may have captured some of this graph, which nobody differentiates
        return result


def _mismatch(name: str, i: int, kinds: list[tuple[torch.Size, torch.dtype]], came: str) -> NoReturn:
    expected = f"{tuple(kinds[i][0])} {kinds[i][1]}" if i < len(kinds) else "nothing more"
    raise RuntimeError(
        f"{name} does not repeat: as saved tensor {i} autograd kept {expected} in forward, and {came} "
        "when it ran again in backward. Its result must depend only on its streams, its context, its parameters "
        "and the default random generators. Something it reads has changed since forward, or it chooses at random."
    )
