"""One step of one pass: its first run, and running it again to refill its placeholders and to invert it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revlib._torch import (
    bypass_compiler,
    raised_by_forbidding_hooks,
    saved_tensor_hooks_allowed,
    tree_leaves,
    tree_map,
    version_of,
)
from revlib.core.guard import FirstRun, StepGuard
from revlib.core.plan import Treatment
from revlib.core.saved_tensors import Key, Placeholder, unedited
from revlib.step import BoundStep, State, evaluate, merge
from revlib.tensors import dense, is_parameter, like_strided

__all__ = ["StepRecord", "last_operation", "refuse_after_rounding"]


_Metadata = tuple[torch.Size, torch.dtype]


class _StopRecomputation(BaseException):
    """Raised inside a function that runs again for its activations alone, once it has saved the last of them."""


class StepRecord:
    """What is needed to run one step again, and what autograd wanted to save of it."""

    def __init__(
        self, step: BoundStep, context: dict[str, Any], treatment: Treatment, guard: StepGuard
    ) -> None:
        self.step, self.context, self.guard = step, context, guard
        self.dropped, self.stream_kept, self.repeated = treatment
        self.requires_grad: tuple[bool, ...] = ()  # of the m streams before the step
        self.dtype = torch.float32  # of the stream that is merged away, with its stride
        self.stride: tuple[int, ...] = ()
        # Of each tensor that autograd wanted to save, in this order. The graph owns the placeholders.
        self.placeholders: list[weakref.ref[Placeholder]] = []
        self.metadata: list[_Metadata] = []
        self.function_saves = (
            0  # the function saved so many of them, and then the coupling the others
        )
        self.differentiable = False  # whether a gradient may enter the function through its result
        self.rounded = False  # whether it runs again on inputs that have rounding errors
        self.may_stop = False  # whether a repetition may stop at the last tensor that is saved

    def living(self) -> Iterator[tuple[int, Placeholder]]:
        """The placeholders whose nodes are still in the graph, by position."""
        for i, ref in enumerate(self.placeholders):
            placeholder = ref()
            if placeholder is not None:
                yield i, placeholder

    # ------------------------------------------------------------------------------------------ forward
    def pack_hook(self, index: int) -> Callable[[Tensor], Placeholder]:
        """What autograd calls for each tensor that it wants to save. The graph keeps this hook, so it knows neither
        the record nor the modules."""
        return partial(_pack, index, self.placeholders, self.metadata)

    def first_run(
        self, state: State, context: dict[str, Any], hooks: AbstractContextManager[Any]
    ) -> Tensor:
        """Run the step on ``state``, under the hooks that drop what autograd saves. -> the new stream."""
        step, guard = self.step, self.guard
        self.requires_grad = tuple(s.requires_grad for s in state)
        self.dtype, self.stride = state[0].dtype, state[0].stride()
        try:
            guard.enter_first_run()
            with hooks:
                f = self._evaluated(state[1:], context)
                self.function_saves = len(self.placeholders)
                leaves = (f,) if isinstance(f, Tensor) else tree_leaves(f)
                self.differentiable = any(t.requires_grad for t in leaves if isinstance(t, Tensor))
                merged = merge(step, state[0], f)
            self.may_stop = self.stream_kept and self._ends_in_reading(f)
            guard.first_run_done(
                FirstRun(state, leaves, merged, list(self.living()), self.function_saves)
            )
        finally:
            guard.exit_first_run()
            self._forget_values()
        del f, leaves  # what nobody but this call holds is gone now
        guard.saved_tensors_dropped()
        return merged

    def _evaluated(self, inputs: State, context: dict[str, Any]) -> Any:
        try:
            return evaluate(self.step, inputs, context)
        except RuntimeError as error:
            if not raised_by_forbidding_hooks(error):
                raise
            raise RuntimeError(
                f"{self.step.name} uses a torch.func transform (grad, vjp, jacrev, hessian), or enters "
                "disable_saved_tensors_hooks. Neither can run under saved-tensor hooks, by which this scheduler saves "
                "memory. Use scheduler=Functional(), which needs none, or torch.autograd.grad(create_graph=True) in "
                "place of the transform."
            ) from error

    def _ends_in_reading(self, f: Any) -> bool:
        """Whether a repetition may stop at the last tensor that it saves.

        An operation saves its inputs before its kernel runs, so the last one need not run at all, unless somebody
        writes to what was saved, as the kernel of RReLU does to its noise. Nobody does to a parameter, nor to a tensor
        that requires a gradient.
        """
        last = self.placeholders[-1]() if self.placeholders else None
        t = None if last is None else last.tensor
        if t is None or not (t.requires_grad or is_parameter(t)):
            return False
        return last_operation(f) in _READING

    def _forget_values(self) -> None:
        for ref in self.placeholders:
            placeholder = ref()
            if placeholder is not None:
                placeholder.tensor = None

    # ------------------------------------------------------------------------------------------ again
    def repeat(
        self,
        inputs: State,
        stream: Tensor | None,
        merged: Tensor | None,
        key: Key,
        *,
        fill: bool,
        rounded: bool,
    ) -> Tensor:
        """Run the step again on its inputs.

        Args:
            inputs: the streams that the function reads.
            stream: the stream that the step merges away, if it is known. Otherwise it is recovered from ``merged``.
            fill: whether to refill the placeholders, for the backward pass ``key``.
            rounded: whether the inputs have passed through an inversion that rounds; for messages.

        -> the stream that the step merges away.
        """
        merge_saves = len(self.placeholders) > self.function_saves
        if stream is not None and not (fill and (self.dropped or merge_saves)):
            return stream
        step, guard, recovered, self.rounded = self.step, self.guard, None, rounded
        if not saved_tensor_hooks_allowed():
            raise RuntimeError(
                f"backward through a reversible sequence runs {step.name} again under saved-tensor hooks, which "
                "torch.autograd.graph.disable_saved_tensors_hooks forbids here; call backward outside of it, or use "
                "scheduler=Naive() or Functional(), which need none."
            )
        guard.check()
        try:
            guard.enter_repetition()
            inputs = tuple(
                t.detach().requires_grad_(r)
                for t, r in zip(inputs, self.requires_grad[1:], strict=True)
            )
            context = tree_map(lambda leaf: leaf, self.context) if self.context else {}
            whole = stream is None or merge_saves or not self.dropped or not self.may_stop
            part = slice(0, self.function_saves)
            f, saved = self._recompute(partial(evaluate, step, inputs, context), part, whole=whole)
            if fill:
                self._refill(part, saved, key)
            if stream is None:
                assert merged is not None
                stream = step.coupling.unmerge(merged, _detached(f)).detach()
                stream = recovered = like_strided(stream.to(self.dtype), self.stride)
            if merge_saves and fill:
                s = stream.detach().requires_grad_(self.requires_grad[0])
                part = slice(self.function_saves, None)
                self._refill(
                    part, self._recompute(partial(merge, step, s, f), part, whole=False)[1], key
                )
        finally:
            guard.exit_repetition()
        guard.repeated(key, inputs, saved.tensors, recovered)
        return stream

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
            if (
                len(saved.tensors) != saved.enough
            ):  # else it has caught what stopped it, and gone on
                came = [(t.shape, t.dtype) for t in saved.tensors]
                if self.dropped and came != expected[: len(came)]:
                    self._refuse_mismatch(came, expected)
                if self.rounded:
                    refuse_after_rounding(self.step, error)
                raise
        finally:
            saved.over = True  # the function may have captured some of this graph, which nobody can differentiate
        if self.dropped and [(t.shape, t.dtype) for t in saved.tensors] != expected:
            self._refuse_mismatch([(t.shape, t.dtype) for t in saved.tensors], expected)
        return result, saved

    def _refill(self, part: slice, saved: _Saved, key: Key) -> None:
        for ref, tensor, version in zip(
            self.placeholders[part], saved.tensors, saved.versions, strict=False
        ):
            placeholder = ref()
            if placeholder is not None:
                placeholder.fill(key, tensor, version)

    def _refuse_mismatch(self, came: list[_Metadata], expected: list[_Metadata]) -> NoReturn:
        i = next((i for i, (a, b) in enumerate(zip(came, expected, strict=False)) if a != b), None)
        i = min(len(came), len(expected)) if i is None else i
        kept, now = (
            f"{tuple(m[i][0])} {m[i][1]}" if i < len(m) else "nothing more"
            for m in (expected, came)
        )
        raise RuntimeError(
            f"{self.step.name} does not repeat: as saved tensor {i} autograd kept {kept} in forward, and {now} "
            f"when it ran again in backward. {_ROUNDED if self.rounded else ''}Its result must depend only on its "
            "streams, its context, its parameters and the default random generators. Something it reads has changed "
            "since forward, or it chooses at random."
        )

    @property
    def inverts_exactly(self) -> bool:
        """Whether inversion gives back every bit of the stream that the step merged away."""
        return self.step.coupling.limit_of(self.dtype) < math.inf


_ROUNDED = (
    "Its streams were recovered by inversion, which rounds. That is enough to change what a function decides by value "
    "(routing to experts, argmax, top-k, sorting, thresholds): use coupling=ExactAdditive(), which gives back every "
    "bit, or scheduler=Checkpoint(), which keeps the streams. If it does not decide by value: "
)


def refuse_after_rounding(step: BoundStep, error: Exception) -> None:
    """Raises with the likely cause where a function fails on streams that have rounding errors."""
    if type(error) in (RuntimeError, ValueError, IndexError):
        raise RuntimeError(
            f"{step.name} raised {type(error).__name__} when it ran again in backward, and not in forward: {error}. "
            f"{_ROUNDED}something it reads has changed since forward."
        ) from error


class _Saved:
    """What autograd saves while a step runs again, in this order."""

    __slots__ = ("enough", "over", "tensors", "versions")

    def __init__(self, enough: int | None) -> None:
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self.enough = (
            enough  # number of tensors after which the run may stop; None if its result is needed
        )
        self.over = False


# Autograd calls these, possibly from compiled code.
@bypass_compiler
def _pack(
    step: int, placeholders: list[weakref.ref[Placeholder]], metadata: list[_Metadata], t: Tensor
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


# Operations whose kernels only read what is saved for them, and such as save nothing.
_READING = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "Mul", "Div")
_SAVING_NOTHING = (
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Unsqueeze", "Squeeze"),
    *("Clone", "ToCopy", "Slice", "Add", "Sub"),
)
_LEAF = "torch::autograd::AccumulateGrad"


def last_operation(f: Any) -> str:
    """The name of the last operation of a function that may have saved something, if there is but one."""
    node = f.grad_fn if isinstance(f, Tensor) else None
    while node is not None:
        name = node.name().removesuffix("0").removesuffix("1").removesuffix("Backward")
        if name not in _SAVING_NOTHING:
            return name
        above = [n for n, _ in node.next_functions if n is not None and n.name() != _LEAF]
        node = above[0] if len(above) == 1 else None
    return ""


def _detached(f: Any) -> Any:
    return dense(f.detach()) if isinstance(f, Tensor) else tree_map(lambda t: dense(t.detach()), f)
