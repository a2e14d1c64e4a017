"""Tensors as autograd saves them: kept with their version, or replaced by a holder that is filled later."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revlib.loop import Witness
from revlib.step import State
from revlib.tensors import learned, origin, version_of

__all__ = [
    "FOR_GOOD",
    "Cursor",
    "Holder",
    "Read",
    "Saved",
    "Shelf",
    "Versioned",
    "graph_task",
    "surrounding",
]

FOR_GOOD: Any = None  # the key of what was recovered in a graph task that releases its graph, as autograd goes


def graph_task() -> tuple[int, bool]:
    """The running graph task (-1: none), and whether it keeps its graph for another pass."""
    task = torch._C._current_graph_task_id()
    return task, task == -1 or torch._C._autograd._get_current_graph_task_keep_graph()


_T = TypeVar("_T")


def surrounding(kind: type[_T]) -> weakref.ref[_T] | None:
    """What owns the saved-tensor hooks in force here, if of this kind; in a stack within a stack, the other's tape."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    owner = getattr(hooks[1], "__self__", None) if hooks else None
    return weakref.ref(owner) if isinstance(owner, kind) else None


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


@dataclass
class Cursor:
    """How far a graph task has come: the lowest state it knows, and the steps it has recovered."""

    index: int = -1
    state: State = ()
    done: set[int] = field(default_factory=set)
    witnesses: list[Witness] = field(default_factory=list)


class Shelf:
    """The streams that forward keeps: whole states, from which backward can start, and single ones.

    Neighbouring states share streams: each is stored once, until nothing needs it.
    """

    def __init__(self, m: int) -> None:
        self.m = m
        self.states: set[int] = set()
        self.singles: set[int] = set()
        self.streams: dict[int, Saved] = {}
        self.uses: Counter[int] = Counter()

    def __contains__(self, stream: int) -> bool:
        return stream in self.streams

    def put(self, index: int, state: State) -> None:
        """Keep state ``index`` or, given one stream, that stream."""
        (self.states if len(state) == self.m else self.singles).add(index)
        for i, stream in enumerate(state, index):
            self.uses[i] += 1
            if i not in self.streams:
                self.streams[i] = Saved(stream)

    def nearest(self, index: int) -> int | None:
        """The lowest kept state from ``index`` upwards."""
        return min((j for j in self.states if j >= index), default=None)

    def state(self, index: int) -> State:
        return tuple(self.streams[i].get() for i in range(index, index + self.m))

    def stream(self, index: int) -> Tensor | None:
        return self.streams[index].get() if index in self.streams else None

    def drop(self, index: int) -> None:
        """Keep state ``index`` and stream ``index`` no longer."""
        for group, count in ((self.states, self.m), (self.singles, 1)):
            if index in group:
                group.remove(index)
                for i in range(index, index + count):
                    self.uses[i] -= 1
                    if not self.uses[i]:
                        del self.streams[i]


class Versioned(NamedTuple):
    """A tensor with the version that it must still have when autograd uses it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, t: Tensor) -> Versioned:
        return cls(t, version_of(t))

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
        # While forward runs, for functions that differentiate inside.
        self.fresh: Versioned | None = Versioned.of(tensor)
        self.values: dict[Any, Versioned] = {}  # by graph task

    def get(self, task: int) -> Tensor | None:
        value = self.values.get(FOR_GOOD) or self.values.get(task)
        return None if value is None else value.get()


_View = tuple[Any, Any, Any] | None  # size, stride and offset


class Read:
    """What a function reads of the user's: its context, and what saved tensors are, or are views of.

    Of the latter most are gone soon, and what remains is the user's. All with their versions. Not the streams, which
    come back as they were, whatever is edited.
    """

    def __init__(self, streams: State, context: dict[str, Any]) -> None:
        leaves = [(key, t) for key, value in context.items() for t in tree_leaves(value) if isinstance(t, Tensor)]
        self.context = [(key, t, version_of(t)) for key, t in leaves]
        self.streams = {id(origin(s)) for s in streams}
        self.origins: list[tuple[int, weakref.ref[Tensor], int, _View]] = []
        self.constants: dict[int, tuple[Tensor, _View]] = {}  # the user's besides weights and buffers, as autograd does
        self.replaced: list[tuple[Tensor, Tensor]] = []  # of these, and by what in the repetition

    def add(self, place: int, t: Tensor) -> None:
        source = origin(t)
        if id(source) not in self.streams:
            view = (t.shape, t.stride(), t.storage_offset()) if source is not t and type(t) is Tensor else None
            self.origins.append((place, weakref.ref(source), version_of(source), view))

    def close(self, modules: Sequence[nn.Module], count: int) -> None:
        """After the run, of whose saved tensors so many are the function's, when nothing else holds those."""
        self.origins = [entry for entry in self.origins if entry[1]() is not None]
        held = [(place, t, view) for place, ref, _, view in self.origins if place < count and (t := ref()) is not None]
        held = [entry for entry in held if not entry[1].requires_grad and not learned(entry[1])]
        if held:
            buffers = {id(origin(b)) for m in modules for b in m._buffers.values() if b is not None}
            self.constants = {place: (t, view) for place, t, view in held if id(t) not in buffers}

    def again(self, place: int, t: Tensor) -> None:
        """What a repetition saves."""
        constant, view = self.constants.get(place, (None, None))
        if constant is not None and origin(t) is not constant:
            before = constant if view is None else constant.as_strided(*view)
            if before.shape == t.shape and before.dtype == t.dtype:  # not where it was seen as another dtype
                self.replaced.append((before, t.detach()))

    def compared(self, name: str, stream: Tensor) -> list[Witness]:
        """Constants with what came in their place, which may be a small difference of streams that was computed."""
        pairs, self.replaced = self.replaced, []
        return [Witness(name, a, b, stream.detach() if a.is_floating_point() else None) for a, b in pairs]

    def check(self, name: str) -> None:
        """Raise where one was edited in place, as autograd would."""
        for key, t, version in self.context:
            if version_of(t) != version:
                raise RuntimeError(
                    f"context tensor {key!r} of {name} was modified by an inplace operation between forward and "
                    "backward; edit a clone of it instead."
                )
        for _, ref, version, _ in self.origins:
            source = ref()
            if source is not None:
                source._fix_weakref()  # type: ignore[attr-defined]
                if version_of(source) != version:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(source.shape)} that {name} reads was modified by an inplace "
                        "operation between forward and backward; edit a clone of it instead."
                    )
