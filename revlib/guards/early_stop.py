"""Early stop: a repetition may end once the function has saved its last tensor, where nothing after that matters.

The second linear layer of an MLP is needed to invert a step, and not for the gradient of a step whose stream is kept.
Autograd saves the inputs of an operation before its kernel runs, so the last operation need not run at all, unless
somebody writes to what was saved, as the kernel of RReLU does to its noise. Nobody does to a parameter, nor to a tensor
that requires a gradient.
Catches: functions that do not end in an operation that is known to read only; their repetitions go on to the end.
Cannot see: what a function does in Python after its last operation. The guard of module state asks for the end there.
Cost: for a step whose stream is kept, a look at the last nodes of its graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.step import State
from revlib.tensors import LEAF, is_parameter

__all__ = ["EarlyStop", "last_operation"]

# Operations whose kernels only read what is saved for them, and such as save nothing.
_READING = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Convolution", "Mul", "Div")
_SAVING_NOTHING = (
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Unsqueeze", "Squeeze"),
    *("Clone", "ToCopy", "Slice", "Add", "Sub"),
)


class EarlyStop(Guard):
    """Whether the functions of a stack may stop at the last tensor that they save."""

    def step(self, view: StepView, state: State) -> StepGuard | None:
        return _StepEnd() if view.streams_kept else None


class _StepEnd(StepGuard):
    def __init__(self) -> None:
        self.ends_in_reading = False

    def first_run_done(self, run: FirstRun) -> None:
        last = [p for place, p in run.saved if place == run.function_saves - 1]
        t = last[0].tensor if last else None
        if t is not None and (t.requires_grad or is_parameter(t)) and len(run.result) == 1:
            self.ends_in_reading = last_operation(run.result[0]) in _READING

    def needs_end(self) -> bool:
        return not self.ends_in_reading


def last_operation(t: Tensor) -> str:
    """The name of the last operation of a graph that may have saved something, if there is but one."""
    node = t.grad_fn
    while node is not None:
        name = _named(node)
        if name not in _SAVING_NOTHING:
            return name
        above = [n for n, _ in node.next_functions if n is not None and n.name() != LEAF]
        node = above[0] if len(above) == 1 else None
    return ""


def _named(node: Any) -> str:
    name: str = node.name()
    return name.removesuffix("0").removesuffix("1").removesuffix("Backward")
