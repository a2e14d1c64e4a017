"""Watching a real run: how accurately its stacks invert, while it trains."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from revlib import cuda_streams
from revlib._numbers import whole
from revlib._torch import in_transform, is_fake, tree_leaves, tree_map
from revlib.core import StepGuard, StepView
from revlib.guards import Guards, ModuleStates, Randomness, Settings, first_run, repetition
from revlib.guards.containers import same_contents
from revlib.guards.modules import ModuleTree, module_tree
from revlib.guards.randomness import devices_of
from revlib.guards.recovery_check import Comparison, default_tolerance, relative_errors
from revlib.schedulers import Scheduler
from revlib.sequence import ReversibleSequence, checked_streams, entered
from revlib.step import BoundStep, State, advance, apart, layouts, numbered, route, together

__all__ = ["Drift", "DriftMonitor"]

_SAMPLES = 4096  # elements of a stream
_ADVICE = (
    "in forward {}, inversion gives back what step {} merged away ({}) with a relative error of {:.2g}, above {:.2g}; "
    "gradients err likewise. Use coupling=ExactAdditive() and float32 streams, with autocast for the functions; or "
    "Anchored(k) or Checkpoint(), which invert less; or normalise what the functions return. See monitor.report()."
)


class Drift(NamedTuple):
    r"""The error of the stream that a step merged away, as inverted from the states above it.

    $$\mathrm{error} = \lVert \hat{s} - s \rVert / \lVert s \rVert$$

    for the stream $s$ in forward and $\hat{s}$ as inverted, of a sample of its elements.

    Attributes:
        forward: the number of the forward pass in training, from 0.
        step: the number of the step, from 0. name: what it is called in its stack.
        error: of the stream, or the largest where the step merges several away.

    Example:
        >>> from torch import nn
        >>> stack = ReversibleSequence([(nn.Tanh(), nn.Tanh())])
        >>> monitor = DriftMonitor(stack)
        >>> ys = stack(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4))
        >>> worst = max(monitor.history, key=lambda drift: drift.error)
        >>> worst.forward, worst.error < 1e-5
        (0, True)
    """

    forward: int
    step: int
    name: str
    error: float


class DriftMonitor:
    """Measures the inversion error of every ``every``-th training forward of a stack, from the first on, by steps.

    It runs that forward beforehand, without a graph and with the same random numbers, and inverts it as the scheduler's
    plan would in backward: the errors of the streams that the plan does not keep, built up from the nearest state above
    that it keeps. Results, gradients, buffers, attributes, containers and random generators are as without a monitor.
    What else functions do (hooks, prints, a generator of their own) happens two times more, and a function that edits
    its own parameters edits them once more. Cost where it measures: the time of two forwards, memory for what the plan
    keeps, and 4096 elements a step. None at other forwards, in eval mode or without gradients, nor where the plan
    inverts nothing (``Naive``, ``Checkpoint``).

    Args:
        warn_above: warn where the error rises above it; a tenth of what backward tolerates, unless given.
        scheduler: whose plan to follow, unless the stack's own: ``Reversible()`` on a stack that trains under
            ``Naive()`` tells beforehand.

    ``history`` holds every :class:`Drift` measured, of each forward from the last step to the first. Clear it freely.

    Raises:
        TypeError: ``stack`` is no ReversibleSequence.
        ValueError: ``every`` is no whole number from 1 up.

    Example:
        >>> from torch import nn
        >>> stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()) for _ in range(4)])
        >>> monitor = DriftMonitor(stack, every=100)
        >>> ys = stack(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4))
        >>> [d.step for d in monitor.history], all(d.error < 1e-5 for d in monitor.history)
        ([7, 6, 5, 4, 3, 2, 1, 0], True)
        >>> monitor.remove()
    """

    def __init__(
        self,
        stack: ReversibleSequence,
        every: int = 100,
        warn_above: float | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        whole("DriftMonitor(every=...)", every, 1)
        if not (isinstance(stack, ReversibleSequence) or hasattr(stack, "bound_steps")):
            raise TypeError(
                f"DriftMonitor(stack=...) takes a ReversibleSequence, got {type(stack).__name__}, {_held(stack)}"
            )
        self.every, self.warn_above, self.scheduler = every, warn_above, scheduler
        self.history: list[Drift] = []
        self._forwards, self._above = 0, False
        # The stack refers to the monitor, and the monitor does not refer to the stack, so that both can be freed.
        self._handle = stack.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Stop watching; the history stays."""
        self._handle.remove()

    def report(self) -> str:
        """A table of the steps that are inverted, from the last: the error last measured, and the largest."""
        latest = {d.step: d for d in self.history}
        largest = {d.step: d for d in sorted(self.history, key=lambda d: d.error)}
        lines = ["step   latest  largest  in forward  function"]
        for k, (forward, _, name, error) in sorted(largest.items(), reverse=True):
            lines.append(f"{k:>4}  {latest[k].error:>7.1e}  {error:>7.1e}  {forward:>10}  {name}")
        return "\n".join(lines if latest else [*lines, "nothing has been inverted yet"])

    def _before(self, stack: ReversibleSequence, args: State, context: dict[str, Any]) -> None:
        transformed = in_transform()
        if (
            not (stack.training and torch.is_grad_enabled())
            or transformed
            or cuda_streams.driver.capturing()
        ):
            return
        forward, self._forwards = self._forwards, self._forwards + 1
        if forward % self.every or any(is_lazy(p) or is_fake(p) for p in stack.parameters()):
            return
        scheduler = self.scheduler or stack.scheduler
        found, tolerated = _measure(stack.bound_steps, checked_streams(args, 1), context, scheduler)
        self.history += (Drift(forward, *f) for f in found)
        threshold = tolerated / 10 if self.warn_above is None else self.warn_above
        worst = max(found, key=lambda f: f[2], default=(0, "", 0.0))
        was, self._above = self._above, worst[2] > threshold
        if self._above and not was:
            # So many frames up, the user's code calls the stack.
            warnings.warn(_ADVICE.format(forward, *worst, threshold), stacklevel=6)


def _held(module: object) -> str:
    """What a module holds that could be watched in its place."""
    modules = module.named_modules() if isinstance(module, torch.nn.Module) else ()
    names = [name for name, held in modules if isinstance(held, ReversibleSequence)]
    return f"which holds one as {names[0]!r}; pass that" if names else "which holds none"


@torch.no_grad()
def _measure(
    steps: list[BoundStep], given: State, context: Mapping[str, Any], scheduler: Scheduler
) -> tuple[list[tuple[int, str, float]], float]:
    """Returns step, name and error of each stream that backward would invert, and the error that it would tolerate."""
    m, plan = len(given), scheduler.plan(len(steps))
    laid_out = layouts(steps, m)
    numbers = numbered(laid_out, m)
    takes = [apart(before, a.taken)[0] for before, a in zip(numbers, laid_out, strict=False)]
    kept = {i for j in plan.states for i in numbers[j]} | {
        i for k in plan.streams for i in takes[k]
    }
    top = max(plan.states, default=0)
    lowest = min((k for k in range(top) if k not in plan.activations), default=top)
    inverted = [k for k in reversed(range(lowest, top)) if not kept.issuperset(takes[k])]
    if not inverted:
        return [], math.inf
    steps, state = entered(steps, given)
    contexts = route(steps, m, context)
    trees = [module_tree(step) for step in steps]
    tensors = [t for t in tree_leaves((given, context)) if isinstance(t, Tensor)]
    tensors += [p for tree in trees for p in tree.parameters if p is not None]
    devices = devices_of(tensors)
    guards = Guards([Randomness(devices), Settings(devices), ModuleStates()])
    devices = [d for d in devices if d.type != "cpu"]
    streams, samples = dict[int, State](), dict[int, list[Tensor]]()
    runs, dtypes, errors = list[StepGuard](), set[torch.dtype](), list[Tensor]()
    fork = torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")
    with fork, _untouched(trees):
        for k, (step, layout) in enumerate(zip(steps[:top], laid_out, strict=False)):
            taken, others = apart(state, layout.taken)
            if k in inverted:
                samples[k] = [_sample(s) for s in taken[step.sums :]]
            else:
                streams[k] = taken
            runs.append(guards.step(StepView(k, step, {}, True, False, layout, (), ()), state))
            with first_run(runs[k]):
                f = step.evaluate(others, tree_map(lambda leaf: leaf, contexts[k]))
                made = step.merge(taken, f)
            state = together(made, layout.made, others)
            dtypes.update(t.dtype for t in (*taken, *made))
            dtypes.update(t.dtype for t in tree_leaves(f) if isinstance(t, Tensor))
        for k in reversed(range(inverted[-1], top)):
            before = streams.get(k, ())
            if k in inverted:
                with repetition(runs[k]):
                    back = [steps[k].inverse()], state, [tree_map(lambda leaf: leaf, contexts[k])]
                    before = apart(advance(*back), laid_out[k].taken)[0]
                pairs = zip(samples[k], before[steps[k].sums :], strict=True)
                found = [Comparison(steps[k].name, a, _sample(b.to(a.dtype))) for a, b in pairs]
                errors.append(relative_errors(found, 1.0).amax().to(given[0].device))
            state = together(before, laid_out[k].taken, apart(state, laid_out[k].made)[1])
    tolerated = scheduler.tolerance
    if tolerated is None or tolerated == math.inf:
        tolerated = default_tolerance(dtypes, given[0].device.type != "cpu")
    values = torch.stack(errors).tolist()
    return [(k, steps[k].name, error) for k, error in zip(inverted, values, strict=True)], tolerated


def _sample(t: Tensor) -> Tensor:
    """Evenly spaced elements, an odd number apart: at an even distance they might come from few channels only."""
    return t.reshape(-1)[:: t.numel() // _SAMPLES | 1].clone()


@contextlib.contextmanager
def _untouched(trees: Sequence[ModuleTree]) -> Iterator[None]:
    """Modules run on copies of their buffers. What they assign meanwhile, and put into containers, is taken back."""
    modules = (f for tree in trees for f in tree.modules)
    before = [(f, f.__dict__.copy(), f._buffers.copy()) for f in modules]
    containers = [(holder, holder.read()) for tree in trees for holder in tree.holders]
    copies: dict[int, Tensor] = {}  # modules may share a buffer
    try:
        for f, _, buffers in before:
            f._buffers.update(
                {
                    k: copies.setdefault(id(b), b.clone())
                    for k, b in buffers.items()
                    if b is not None
                }
            )
        yield
    finally:
        for f, attributes, buffers in before:
            f._buffers.update(buffers)
            for key in f.__dict__.keys() - attributes.keys():
                delattr(f, key)
            f.__dict__.update(attributes)
        for holder, contents in containers:
            if not same_contents(holder.read(), contents):
                holder.write(contents)
