"""What the tape keeps of one step: how to run its function again, and what autograd wanted to save of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from revlib.held import ModuleState
from revlib.loop import Sampler
from revlib.modules import refuse_scripted
from revlib.replay import Randomness
from revlib.saved import Holder, Read, Versioned
from revlib.step import Branch, State, evaluate, merge
from revlib.tensors import counts, laid_out, learned, row, storage, there

__all__ = ["Record", "Weight", "intercept"]


class Weight(NamedTuple):
    """What keeping the activations of a step would take: bytes of its own, and streams, which others may share."""

    own: int
    saved: frozenset[int]  # by number
    streams: tuple[int, ...]  # bytes of the m streams before the step, and of the new one


class _Enough(BaseException):
    """Raised inside a function that is repeated for its activations alone, once it has saved the last of them."""


@dataclass
class Record:
    """One step of one forward: how to run its function again, and what autograd wanted to save of it."""

    branch: Branch
    context: dict[str, Any]
    modules: list[nn.Module]  # whose state the function reads
    dropped: bool  # its saved tensors are not kept
    known: bool  # the stream it merges away is kept, so backward repeats it and need not invert it
    guarded: bool  # something may need it to be evaluated in backward
    module: ModuleState = field(init=False)
    needs: tuple[bool, ...] = ()  # requires_grad of its m streams
    dtype: torch.dtype = torch.float32  # of the stream it merges away, with its stride
    stride: tuple[int, ...] = ()
    read: Read = field(init=False)  # what the function read of the user's
    drawn: dict[torch.device, Tensor] = field(default_factory=dict)
    holders: list[weakref.ref[Holder]] = field(default_factory=list)
    kinds: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    split: int = 0  # the function made so many holders, the coupling the rest
    samples: dict[int, Tensor] = field(default_factory=dict)  # of saved tensors, by position; -1: of the stream
    weight: int = -1  # which of them is a weight: of one that is not edited by halves, a row is enough
    reference: Tensor | None = None  # what the stream's error is measured against, where that is not itself

    def living(self) -> Iterator[tuple[int, Holder]]:
        return ((i, h) for i, h in ((i, ref()) for i, ref in enumerate(self.holders)) if h is not None)

    def check(self) -> None:
        """Raise unless the function would run now as it ran in forward."""
        self.module.check(self.branch.name)
        self.read.check(self.branch.name)

    def observe(self, state: State) -> None:
        """Before the first run: what the step is about to see."""
        self.read = Read(state, self.context)
        refuse_scripted(self.modules, self.branch.name)
        self.module = ModuleState(self.modules, self.branch.fn)
        self.needs = tuple(t.requires_grad for t in state)
        self.dtype, self.stride = state[0].dtype, state[0].stride()

    def packer(self, step: int) -> Callable[[Tensor], Holder]:
        """What puts a holder in place of each tensor that autograd saves. The graph keeps it, so it knows no module."""
        holders, kinds, read = self.holders, self.kinds, self.read

        def pack(t: Tensor) -> Holder:
            holder = Holder(step, t)
            read.add(len(holders), t)
            holders.append(weakref.ref(holder))
            kinds.append((t.shape, t.dtype))
            return holder

        return torch.compiler.disable(pack)

    def close(self) -> None:
        """After the first run."""
        for _, holder in self.living():
            holder.fresh = None
        self.read.close(self.modules, self.split)

    def saved(self) -> Iterator[tuple[int, Tensor]]:
        """During the first run: the saved tensors, last first."""
        for i in reversed(range(len(self.holders))):
            holder = self.holders[i]()
            if holder is not None and holder.fresh is not None:
                yield i, holder.fresh.tensor

    def activations(self) -> Iterator[tuple[int, Tensor]]:
        """During the first run: those of them that are not parameters."""
        return ((i, t) for i, t in self.saved() if not learned(t))

    def sample(self, sampler: Sampler, s: Tensor, merged: Tensor, *, unseen: bool) -> None:
        """During the first run: of what backward will recover, the stream or, if that is known, the last activations.

        A stream ``unseen`` by any function may be tiny beside what is merged into it.
        """
        if self.known:
            # Not integers: attention kernels save seeds that they leave uninitialised where they draw nothing.
            telling = [(i, t) for i, t in self.saved() if i < self.split and there(t)]
            activations = [(i, t) for i, t in telling if not counts(t) and not learned(t)][:2]
            # No activation depends on the last weight, whose data somebody may replace unseen.
            self.weight, part = next(((i, row(t)) for i, t in telling if learned(t)), (-1, None))
            self.samples = {i: sampler(t) for i, t in [*activations, (self.weight, part)] if t is not None}
        else:
            self.samples, self.reference = {-1: sampler(s)}, sampler(merged) if unseen else None

    def weigh(self, index: int, state: State) -> Weight:
        """During the first run, from state ``index``: the bytes of what autograd saves."""
        kept = [t for m in self.modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        kept += [t for t in tree_leaves(self.context) if isinstance(t, Tensor)]
        paid = {storage(t): None for t in kept}
        places = {storage(t): i for i, t in enumerate(state, index)}
        own, saved = 0, set()
        for _, t in self.activations():
            place = storage(t)
            if place in places:
                saved.add(places[place])
            elif place not in paid:
                own += t.untyped_storage().nbytes() if place > 0 else t.nbytes
                paid[place] = None
        return Weight(own, frozenset(saved), tuple(t.nbytes for t in state))

    # ------------------------------------------------------------------------------------------ again
    def again(
        self, inputs: State, s: Tensor | None, merged: Tensor | None, key: Any, randomness: Randomness, *, fill: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the step again on its inputs, to fill its holders, and to invert it unless ``s`` is known.

        -> the stream it merges away, and what has been recovered of the tensors in ``samples``.
        """
        remerges, found = len(self.holders) > self.split, dict[int, Tensor]()
        f = None
        if s is None or (fill and (self.dropped or remerges)):
            self.check()
            inputs = tuple(t.detach().requires_grad_(n) for t, n in zip(inputs, self.needs[1:], strict=True))
            with randomness.replaying(self.drawn), self.module.bound():
                context = tree_map(lambda leaf: leaf, self.context) if self.context else {}
                run = partial(evaluate, self.branch, inputs, context)
                f, saved = self._refill(key, slice(0, self.split), run, fill=fill, whole=s is None or remerges)
                recovered = ((i, saved[i].tensor) for i in self.samples if 0 <= i < len(saved))
                found = {i: row(t) if i == self.weight else t for i, t in recovered if there(t)}
        if s is None:
            assert merged is not None
            with torch.no_grad():
                result = f.detach() if isinstance(f, Tensor) else tree_map(Tensor.detach, f)
                s = laid_out(self.branch.coupling.unmerge(merged, result).to(self.dtype), self.stride)
            found = {-1: s}
        if remerges and fill:
            remerge = partial(merge, self.branch, s.detach().requires_grad_(self.needs[0]), f)
            self._refill(key, slice(self.split, None), remerge, fill=fill, whole=False)
        return s, found

    def _refill(
        self, key: Any, part: slice, run: Callable[[], Any], *, fill: bool, whole: bool
    ) -> tuple[Any, list[Versioned]]:
        """Run a part of the step with gradients, as forward did; its holders get what autograd saves this time.

        Unless the result is needed as a ``whole``, it goes only as far as to save the last tensor: the second linear
        layer of an MLP, for one, is needed to invert the step, and not for its gradient.
        """
        holders, kinds, saved = self.holders[part], self.kinds[part], list[Versioned]()
        name, dropped, result = self.branch.name, self.dropped, None
        whole = whole or not dropped
        constants = self.known and part.start == 0 and self.read.constants  # else the stream tells

        @torch.compiler.disable
        def pack(t: Tensor) -> int:
            i = len(saved)
            if constants:
                self.read.again(i, t)
            if dropped and (i == len(kinds) or (t.shape, t.dtype) != kinds[i]):
                _mismatch(name, i, kinds, f"{tuple(t.shape)} {t.dtype}")
            saved.append(Versioned.of(t.detach()))
            if not whole and len(saved) == len(kinds):
                raise _Enough
            return i

        def unpack(i: int) -> Tensor:
            if not saved:
                raise RuntimeError(
                    f"a tensor that {name} put into a list or a dict belongs to its repetition in backward, and cannot "
                    "be differentiated; use what forward captured, or assign it to an attribute of the module."
                )
            return saved[i].get()

        try:
            if whole or kinds:
                with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
                    result = run()
        except _Enough:
            pass
        except BaseException:
            saved.clear()
            raise
        values = saved.copy()
        saved.clear()  # the function may have captured some of this graph, which nobody differentiates
        if dropped and len(values) != len(kinds):
            _mismatch(name, len(values), kinds, "nothing more")
        for ref, value in zip(holders, values, strict=False):
            holder = ref()
            if holder is not None and fill:
                holder.values[key] = value
        return result, values


def _mismatch(name: str, i: int, kinds: list[tuple[torch.Size, torch.dtype]], came: str) -> NoReturn:
    expected = f"{tuple(kinds[i][0])} {kinds[i][1]}" if i < len(kinds) else "nothing more"
    raise RuntimeError(
        f"{name} does not repeat: as saved tensor {i} autograd kept {expected} in forward, and {came} "
        "when it ran again in backward. Its result must depend only on its streams, its context, its parameters "
        "and the default random generators. Something it reads has changed since forward, or it chooses at random."
    )


def intercept(before_gradient: Callable[[], Callable[[int], None] | None], k: int, merged: Tensor) -> None:
    """Has the gradient of a merged stream reach the tape before it reaches the coupling, and so the function.

    The hook sits on the node itself. A view of the result would give its two users the same gradient in two tensors
    that share memory, and autograd would take both of them for ``.grad`` of leaves without a copy.
    """
    if merged.grad_fn is None:
        return

    def hook(_: Any) -> None:
        alive = before_gradient()
        if alive is not None:
            alive(k)

    merged.grad_fn.register_prehook(torch.compiler.disable(hook))
