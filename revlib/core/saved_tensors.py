"""Tensors as autograd saves them: kept with their version, or replaced by a placeholder that is filled later."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from revlib._torch import version_of
from revlib.step import State

__all__ = ["SHARED", "KeptStates", "Key", "Placeholder", "Progress", "unedited"]

Key = int | Literal["shared"]
SHARED: Literal["shared"] = "shared"
"""Key of what was recovered by a backward pass without ``retain_graph``. It stays until autograd frees the node that
saved it, so that any pass which may still come through that node can use it. Every other key is the number of a pass
that keeps its graph; what was recovered for such a pass goes with it."""


class Placeholder:
    """Stands in the graph for one tensor that autograd wanted to save. It dies when autograd releases its node.

    It has three lives. While its step runs in forward it holds the tensor itself, since functions may differentiate
    inside. Then it holds nothing. In backward it holds what the repetition of the step saved in its place; ``by_pass``
    holds what was recovered for passes that keep their graph.
    """

    __slots__ = ("__weakref__", "by_pass", "step", "tensor", "version")

    def __init__(self, step: int, tensor: Tensor, version: int) -> None:
        self.step = step
        self.tensor: Tensor | None = tensor
        self.version = version  # that the tensor must still have when autograd uses it
        self.by_pass: dict[int, tuple[Tensor, int]] | None = None

    def fill(self, key: Key, tensor: Tensor, version: int) -> None:
        """Hold what was recovered for a pass."""
        if key == SHARED:
            self.tensor, self.version = tensor, version
        else:
            self.by_pass = {**(self.by_pass or {}), key: (tensor, version)}

    def empty(self, key: Key) -> None:
        """Hold what was recovered for a pass no longer."""
        if key == SHARED:
            self.tensor = None
        elif self.by_pass:
            self.by_pass.pop(key, None)

    def get(self, task: int) -> Tensor | None:
        """What the pass ``task`` may use, if anything."""
        if self.tensor is not None:
            return unedited(self.tensor, self.version)
        if self.by_pass and task in self.by_pass:
            return unedited(*self.by_pass[task])
        return None


def unedited(tensor: Tensor, version: int) -> Tensor:
    """The tensor; raises RuntimeError if it was edited in place, as autograd does for the tensors that it saves."""
    if version >= 0 and version_of(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {tuple(tensor.shape)}, saved inside a reversible sequence, is at version "
            f"{version_of(tensor)}; expected version {version}. Edit a clone of it instead."
        )
    return tensor


class Progress:
    """How far a backward pass has come: the lowest state that it knows, and the steps that it has recovered."""

    def __init__(self) -> None:
        self.index = -1
        self.state: State = ()
        self.recovered: set[int] = set()
        self.rounded = False  # whether the state has passed through an inversion that rounds


class _Save(torch.autograd.Function):
    """A node outside of every graph that holds a tensor as autograd does, under the saved-tensor hooks in force."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("a node that only holds a tensor was differentiated")


class _KeptStream:
    """One stream, kept as autograd keeps a saved tensor: with its version, and through the user's own hooks."""

    def __init__(self, stream: Tensor) -> None:
        with torch.enable_grad():
            key = torch.empty(0, requires_grad=True, device="cpu")
            # Detached, since the graph of the stream leads to placeholders, these to the tape, and the tape to here.
            self.holder: Tensor = _Save.apply(key, stream.detach())  # type: ignore[no-untyped-call]
        self.opened: tuple[Callable[[], Tensor | None], int] = (lambda: None, 0)

    def get(self) -> Tensor:
        # Neighbouring states share streams, and the user's hooks may allow to open each only once.
        stream, version = self.opened[0](), self.opened[1]
        if stream is not None and version_of(stream) == version:
            return stream
        try:
            stream = self.holder.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "an output of a reversible sequence, or a stream it checkpoints, was modified by an inplace operation "
                "between forward and backward; backward starts from it, so edit a clone of it instead."
            ) from error
        self.opened = weakref.ref(stream), version_of(stream)
        return stream


class KeptStates:
    """The streams that forward keeps: whole states, from which backward can start, and those that a step takes away.

    Every stream of a pass has a number. Neighbouring states share streams: each is stored once, until nothing needs it.
    """

    def __init__(self) -> None:
        # Numbers of streams, by the number of a state and by that of a step.
        self.states: dict[int, tuple[int, ...]] = {}
        self.taken: dict[int, tuple[int, ...]] = {}
        self.streams: dict[int, _KeptStream] = {}
        self.uses: Counter[int] = Counter()

    def keep(
        self, group: dict[int, tuple[int, ...]], index: int, numbers: tuple[int, ...], state: State
    ) -> None:
        """Keep these streams for one of the two groups."""
        group[index] = numbers
        for i, stream in zip(numbers, state, strict=True):
            self.uses[i] += 1
            if i not in self.streams:
                self.streams[i] = _KeptStream(stream)

    def nearest(self, index: int) -> int | None:
        """The lowest kept state from ``index`` upwards."""
        return min((j for j in self.states if j >= index), default=None)

    def holds(self, numbers: tuple[int, ...]) -> bool:
        return all(i in self.streams for i in numbers)

    def get(self, numbers: tuple[int, ...]) -> State:
        return tuple(self.streams[i].get() for i in numbers)

    def drop(self, index: int) -> None:
        """Keep state ``index``, and what step ``index`` takes away, no longer."""
        for group in (self.states, self.taken):
            for i in group.pop(index, ()):
                self.uses[i] -= 1
                if not self.uses[i]:
                    del self.streams[i]
