"""Functional: the reversible backward as a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from revlib import functional
from revlib.engine import Plan
from revlib.schedulers.base import Scheduler
from revlib.step import BoundStep, State

__all__ = ["Functional"]


@dataclass(frozen=True)
class Functional(Scheduler):
    r"""Keep the last state only, as ``Reversible`` does, in one ``autograd.Function``, without hooks.

    Of a step $t = s \oplus f(x; w)$, backward knows $t$ and $x$. It computes $f$ again, $s = t \ominus f$, and with the
    gradient $\bar t$ of the loss

    $$\bar s = \bar t\, \partial t / \partial s, \quad \bar f = \bar t\, \partial t / \partial f, \quad
    \bar x \mathrel{+}= \bar f\, \partial f / \partial x, \quad \bar w \mathrel{+}= \bar f\, \partial f / \partial w.$$

    The other schedulers save memory by saved-tensor hooks, which ``torch.func`` refuses (they keep everything there),
    and the compiler breaks its graph at. This one also saves it under ``grad``, ``vjp``, ``jacrev``, ``vmap``, and the
    vmap of a grad; and ``torch.compile(model, fullgraph=True)`` takes forward and backward as a graph each. Second
    derivatives are right, at the cost of stored activations. Forward-mode derivatives keep nothing in any case.

    Cost in units of one forward: time 4; memory the last state and the input, the activations of the last step, of
    another one in forward and in backward, the gradients of the state at both ends, and those of all weights until
    backward is done. ``grad`` of a ``vmap`` computes the gradients of what is not mapped for each sample, and adds them
    up then.

    Not where ``Reversible`` serves, since functions must be pure here. Gradients reach streams, parameters, however a
    function comes to them, and tensors in the context. Hooks of streams and parameters that do not matter are called
    with None. What was frozen in forward gets no second derivative either, if it is not any more in backward, where
    plain autograd decides by operation. Threads must not share modules.

    In a whole compiled graph, which takes torch 2.14, functions must also be modules, and draw no random numbers. The
    recovered inputs are compared with the original ones inside the graph, where a difference ends the process on CUDA.
    Random numbers such as those of ``torch.rand_like`` stay unnoticed if low precision makes the tolerance wide.

    Backward compares the streams that enter the stack as a whole, and a sample of the last activation of each function,
    as ``Reversible`` does. Under ``torch.func`` and in whole graphs it compares streams only. So a function
    that does not repeat stays unnoticed there while its results are zero, as where its last layer starts at zero.

    Shapes: as of :class:`~revlib.ReversibleSequence`; streams keep their dtypes.

    Args:
        tolerance: the relative error of the recovered inputs of the whole stack up to which backward goes on.

    Raises:
        RuntimeError: a function uses another tensor that needs a gradient (by closure, as a plain attribute); leaves a
            result behind (in a list, by a forward hook) without ``detach()``; registers a parameter or a hook while it
            runs, or freezes or thaws a parameter; reaches a parameter otherwise than through its module where that has
            hooks or second derivatives are asked for; edits its parameters where these are asked for; draws random
            numbers in a whole graph; batch norm in train mode under a transform, or dropout under ``jacrev``; something
            edited between forward and backward; inputs that were not recovered.
        TypeError: a function's result that turns its stream into another dtype.

    Source: the backward is that of Gomez et al. 2017, algorithm 1, step by step.

    Example:
        >>> import torch
        >>> from revlib import ReversibleSequence
        >>> from torch.func import functional_call, grad
        >>> stack = ReversibleSequence([(torch.nn.Linear(4, 4), torch.nn.Tanh())] * 3, scheduler=Functional())
        >>> weights, x = {k: p.detach() for k, p in stack.named_parameters()}, torch.randn(2, 4)
        >>> found = grad(lambda w: functional_call(stack, w, (x, x))[1].sum())(weights)
        >>> found["0.F.weight"].shape
        torch.Size([4, 4])
    """

    tolerance: float | None = None

    def plan(self, length: int) -> Plan:
        return Plan(states=(length,))

    def run(self, steps: Sequence[BoundStep], state: State, context: Mapping[str, Any]) -> State:
        return functional.run(steps, state, context, self.tolerance)
