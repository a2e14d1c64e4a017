"""One step of one pass: its first run, and running it again to refill its placeholders and to invert it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revlib._torch import (
    bypass_compiler,
    tree_leaves,
    tree_map,
    version_of,
)
from revlib.core.guard import FirstRun, StepGuard, StepView
from revlib.core.saved_tensors import Key, Placeholder, unedited
from revlib.refusals import (
    Metadata,
    refuse_after_rounding,
    refuse_forbidden_hooks,
    refuse_mismatch,
    refuse_without_hooks,
)
from revlib.step import State, apart
from revlib.tensors import dense, like_strided

__all__ = ["StepRecord"]


_Kind = tuple[bool, torch.dtype, tuple[int, ...]]  # requires a gradient, dtype, stride


class _StopRecomputation(BaseException):
    """Raised inside a function that runs again for its activations alone, once it has saved the last of them."""


class StepRecord:
    """What is needed to run one step again, and what autograd wanted to save of it."""

    def __init__(self, view: StepView, repeated: bool, guard: StepGuard) -> None:
        self.step, self.context, self.layout, self.guard = (
            view.step,
            view.context,
            view.layout,
            guard,
        )
        self.dropped, self.streams_kept = view.dropped, view.streams_kept
        # In backward: for its own activations, or to reach the steps below.
        self.repeated = repeated
        self.numbers = apart(view.numbers, view.layout.taken)[0]  # of the streams that it takes
        self.others_require_grad: tuple[bool, ...] = ()  # the streams that stay
        self.taken: list[_Kind] = []  # what kind of tensors the streams are that it takes away
        # Of each tensor that autograd wanted to save, in this order. The graph owns the placeholders.
        self.placeholders: list[weakref.ref[Placeholder]] = []
        self.metadata: list[Metadata] = []
        self.function_saves = 0  # the function saved so many of them, and then merge the others
        self.differentiable = False  # whether a gradient may enter the function, or the bijection
        self.rounded = False  # whether it runs again on inputs that have rounding errors
        self.may_stop = False  # whether a repetition may stop at the last tensor that is saved

    def living(self) -> list[tuple[int, Placeholder]]:
        """The placeholders whose nodes are still in the graph, by position."""
        return [(i, p) for i, ref in enumerate(self.placeholders) if (p := ref()) is not None]

    # ------------------------------------------------------------------------------------------ forward
    def pack_hook(self, index: int) -> Callable[[Tensor], Placeholder]:
        """What autograd calls for each tensor that it wants to save. The graph keeps this hook, so it knows neither
        the record nor the modules."""
        return partial(_pack, index, self.placeholders, self.metadata)

    def first_run(
        self, state: State, context: dict[str, Any], hooks: AbstractContextManager[Any]
    ) -> State:
        """Run the step on ``state``, under the hooks that drop what autograd saves. -> the new streams."""
        step, guard = self.step, self.guard
        taken, others = apart(state, self.layout.taken)
        self.others_require_grad = tuple(s.requires_grad for s in others)
        self.taken = [(s.requires_grad, s.dtype, s.stride()) for s in taken]
        try:
            guard.enter_first_run()
            with hooks:
                f = step.evaluate(others, context)
                self.function_saves = len(self.placeholders)
                leaves = (f,) if isinstance(f, Tensor) else tree_leaves(f)
                results = [t for t in leaves if isinstance(t, Tensor)]
                made = step.merge(taken, f)
            self.differentiable = step.merge_reads or any(t.requires_grad for t in results)
            saved = self.living()
            guard.first_run_done(FirstRun(state, taken, results, made, saved, self.function_saves))
            del saved
        except RuntimeError as error:
            refuse_forbidden_hooks(step.name, error)
            raise
        finally:
            guard.exit_first_run()
            self._forget_values()
        del f, leaves, results  # what nobody but this call holds is gone now
        guard.saved_tensors_dropped()
        self.may_stop = self.streams_kept and not guard.needs_end()
        return made

    def _forget_values(self) -> None:
        for _, placeholder in self.living():
            placeholder.tensor = None

    # ------------------------------------------------------------------------------------------ again
    def repeat(
        self,
        others: State,
        taken: State | None,
        made: State | None,
        key: Key,
        *,
        fill: bool,
        rounded: bool,
    ) -> State:
        """Run the step again on its inputs.

        Args:
            others: the streams that stay.
            taken: the streams that the step takes away, if they are known. Otherwise they are recovered from those that
                it has ``made``.
            fill: whether to refill the placeholders, for the backward pass ``key``.
            rounded: whether the inputs have passed through an inversion that rounds; for messages.

        -> the streams that the step takes away.
        """
        merge_saves = len(self.placeholders) > self.function_saves
        if taken is not None and not (fill and (self.dropped or merge_saves)):
            return taken
        step, guard, self.rounded = self.step, self.guard, rounded
        recovered: State = ()
        refuse_without_hooks(step.name)
        guard.check()
        try:
            guard.enter_repetition()
            others = _leaves(others, self.others_require_grad)
            context = tree_map(lambda leaf: leaf, self.context) if self.context else {}
            whole = taken is None or merge_saves or not self.dropped or not self.may_stop
            part = slice(0, self.function_saves)
            f, saved = self._recompute(partial(step.evaluate, others, context), part, whole=whole)
            if fill:
                self._refill(part, saved, key)
            if taken is None:
                assert made is not None
                taken = recovered = self._like_forward(step.unmerge(made, _detached(f)))
            inputs = others or taken
            if merge_saves and fill:
                part = slice(self.function_saves, None)
                run = partial(step.merge, _leaves(taken, [kind[0] for kind in self.taken]), f)
                again = self._recompute(run, part, whole=step.merge_reads)[1]
                self._refill(part, again, key)
                saved.tensors += again.tensors
        finally:
            guard.exit_repetition()
        guard.repeated(key, inputs, saved.tensors, recovered)
        return taken

    def _like_forward(self, streams: State) -> State:
        """Recovered streams, in the dtypes and strides that they had."""
        return tuple(
            like_strided(s.detach().to(dtype), stride)
            for s, (_, dtype, stride) in zip(streams, self.taken, strict=True)
        )

    def _recompute(self, run: Callable[[], Any], part: slice, *, whole: bool) -> tuple[Any, _Saved]:
        """Run a part of the step with gradients, as forward did. -> its result, and what autograd saved this time.

        Unless the result is needed as a ``whole``, the run goes only as far as to save the last tensor: the second
        linear layer of an MLP, for one, is needed to invert the step, and not for the step's gradient.
        """
        expected = self.metadata[part]
        saved = _Saved(None if whole else len(expected))
        if not whole and not expected:
            return None, saved
        result, unpack = None, partial(_unpack_again, saved, self.step.name)
        try:
            with torch.enable_grad(), saved_tensors_hooks(partial(_pack_again, saved), unpack):
                result = run()
        except _StopRecomputation:
            pass
        except Exception as error:
            # Where all has been saved, the function has caught what stopped it, and gone on.
            if len(saved.tensors) != saved.enough:
                if self.dropped and saved.metadata() != expected[: len(saved.tensors)]:
                    refuse_mismatch(self.step.name, saved.metadata(), expected, self.rounded)
                if self.rounded:
                    refuse_after_rounding(self.step.name, error)
                raise
        finally:
            saved.over = True  # the function may have captured some of this graph, which nobody can differentiate
        if self.dropped and saved.metadata() != expected:
            refuse_mismatch(self.step.name, saved.metadata(), expected, self.rounded)
        return result, saved

    def _refill(self, part: slice, saved: _Saved, key: Key) -> None:
        again = zip(self.placeholders[part], saved.tensors, saved.versions, strict=False)
        for ref, tensor, version in again:
            placeholder = ref()
            if placeholder is not None:
                placeholder.fill(key, tensor, version)

    @property
    def inverts_exactly(self) -> bool:
        """Whether inversion gives back every bit of the streams that the step takes away."""
        return all(self.step.inverts_exactly(dtype) for _, dtype, _ in self.taken)


class _Saved:
    """What autograd saves while a step runs again, in this order."""

    __slots__ = ("enough", "over", "tensors", "versions")

    def __init__(self, enough: int | None) -> None:
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        # Number of tensors after which the run may stop; None if its result is needed.
        self.enough = enough
        self.over = False

    def metadata(self) -> list[Metadata]:
        return [(t.shape, t.dtype) for t in self.tensors]


# Autograd calls these, possibly from compiled code.
@bypass_compiler
def _pack(
    step: int, placeholders: list[weakref.ref[Placeholder]], metadata: list[Metadata], t: Tensor
) -> Placeholder:
    placeholder = Placeholder(step, t, version_of(t))
    placeholders.append(weakref.ref(placeholder))
    metadata.append((t.shape, t.dtype))
    return placeholder


@bypass_compiler
def _pack_again(saved: _Saved, t: Tensor) -> int:
    place = len(saved.tensors)
    if place != saved.enough:  # a function may catch the exception below, and go on
        saved.tensors.append(t.detach() if t.requires_grad else t)
        saved.versions.append(version_of(t))
    if place + 1 == saved.enough or place == saved.enough:
        raise _StopRecomputation
    return place


@bypass_compiler
def _unpack_again(saved: _Saved, name: str, place: int) -> Tensor:
    if saved.over:
        raise RuntimeError(
            f"a tensor that {name} put into a list or a dict belongs to its repetition in backward, and cannot "
            "be differentiated; use what forward captured, or assign it to an attribute of the module."
        )
    return unedited(saved.tensors[place], saved.versions[place])


def _detached(f: Any) -> Any:
    if isinstance(f, Tensor):
        return dense(f.detach())
    return tree_map(lambda t: dense(t.detach()) if isinstance(t, Tensor) else t, f)


def _leaves(state: State, requires_grad: Sequence[bool]) -> State:
    return tuple(t.detach().requires_grad_(r) for t, r in zip(state, requires_grad, strict=True))
