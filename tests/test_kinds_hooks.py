"""Hooks on tensors: the user's on parameters, and those that a function registers while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import Lambda, grads, leaves, loss
from scenes import Stage, scene
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from revlib import ReversibleSequence
from revlib.functional.purity import _is_a_trackers
from revlib.schedulers import Functional

COPIES = "calls register_hook.*Functional"
ANOTHER_WAY = "reaches a parameter in another way|reaches its parameter"


def passes(stack: Any, *xs: Tensor, times: int = 2, **context: Any) -> list[Any]:
    """Hooks that pile up show in the second pass. Gradients are not added up, so that each is compared."""
    found: list[Any] = []
    for _ in range(times):
        for t in (*xs, *stack.parameters(), *(c for c in context.values() if isinstance(c, Tensor))):
            t.grad = None
        outputs = stack(*xs, **context)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
        found += [c.grad for c in context.values() if isinstance(c, Tensor)]
    return found


class Hooking(nn.Module):
    """Registers a hook on its weight whenever it runs, or only the first time, as somebody who scales gradients may."""

    def __init__(self, once: bool, after: bool = False) -> None:
        super().__init__()
        self.layer, self.once, self.after, self.hooked = nn.Linear(4, 4), once, after, False

    def forward(self, x):
        if not (self.once and self.hooked):
            w = self.layer.weight
            if self.after:
                w.register_post_accumulate_grad_hook(scale_gradient)
            else:
                w.register_hook(lambda g: 2 * g)
            self.hooked = True
        return self.layer(x).tanh()


def scale_gradient(p: Tensor) -> None:
    p.grad.mul_(2)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("once", [False, True])
@scene("hooks", refusal=COPIES, refusing="Functional")
def test_a_hook_that_a_function_registers_on_its_weight(stage: Stage, once: bool, after: bool):
    return passes(stage.stack(lambda: Hooking(once, after)), *leaves(3, 4))


@pytest.mark.parametrize("after", [False, True])
@scene("hooks")
def test_a_hook_that_a_function_takes_away_at_its_end(stage: Stage, after: bool):
    """It has no effect. A repetition may stop before it is taken away."""

    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            w = self.layer.weight
            handle = w.register_post_accumulate_grad_hook(scale_gradient) if after else w.register_hook(double)
            y = self.layer(x)
            handle.remove()
            return y

    return passes(stage.stack(Passing), *leaves(3, 4))


def double(g: Tensor) -> Tensor:
    return 2 * g


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, c):
        c.register_hook(lambda g: 2 * g)
        return (self.layer(x) * c).tanh()


@scene("hooks", refusal=COPIES, refusing="Functional")
def test_a_hook_that_a_function_registers_on_its_context(stage: Stage):
    return passes(stage.stack(Conditioned), *leaves(3, 4), c=leaves(3, 4)[0])


@pytest.mark.parametrize("merge", [torch.mul, torch.add, lambda y, captured: y + captured[0]])
@scene("hooks", refusal="Functional", refusing="Functional")
def test_a_hook_that_a_function_registers_on_what_it_captures(stage: Stage, merge: Any):
    """A sum saves neither operand, so only the graph leads to the tensor."""
    captured = leaves(3, 4)[0]

    def hooked(m, x):
        captured.register_hook(lambda g: 2 * g)
        return merge(m(x).tanh(), captured)

    found = passes(stage.stack(lambda: Lambda(hooked, nn.Linear(4, 4))), *leaves(3, 4), times=1)
    return [*found, captured.grad]


@pytest.mark.parametrize("hook", [F.relu, torch.sign, torch.Tensor.abs, lambda g: g.clamp(min=0)])
@scene("hooks", refusal=COPIES, refusing="Functional")
def test_a_hook_that_a_function_registers_on_its_stream(stage: Stage, hook: Any):
    """Guided backpropagation, with a function of torch's as the hook."""

    def guided(m, x):
        x.register_hook(hook)
        return m(x).tanh()

    xs = [x * 1.0 for x in leaves(3, 4)]
    stack = stage.stack(lambda: Lambda(guided, nn.Linear(4, 4)))
    outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(stack)]


class Aliased(nn.Module):
    """Reads its weight from a list beside the registration."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.weights = [self.layer.weight]

    def forward(self, x):
        return F.linear(x, self.weights[0], self.layer.bias).tanh()


@pytest.mark.parametrize("when", ["before", "between"])
@scene("hooks", refusal=ANOTHER_WAY, refusing="Functional")
def test_a_hook_of_the_users_on_a_weight_read_from_a_list(stage: Stage, when: str):
    stack, xs = stage.stack(Aliased), leaves(3, 4)
    weights = [p for p in stack.parameters() if p.ndim == 2]

    def clamp() -> None:
        for p in weights:
            p.register_hook(lambda g: g.clamp(-0.05, 0.05))

    if when == "before":
        clamp()
    outputs = stack(*xs)
    if when == "between":
        clamp()
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


class WeightLoss(nn.Module):
    """Keeps the loss of its first run, of its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.penalty = nn.Linear(4, 4), None

    def forward(self, x):
        self.penalty = self.layer.weight.square().sum()
        return self.layer(x).tanh()


@pytest.mark.parametrize("hooked", [False, True])
@scene("hooks", refusal="keeps a tensor", refusing="Functional")
def test_a_kept_loss_of_weights_with_hooks(stage: Stage, hooked: bool):
    """The streams need no gradient, so that what is kept leads to the weights alone."""
    stack, xs = stage.stack(WeightLoss), torch.randn(2, 3, 4)
    if hooked:
        for p in stack.parameters():
            p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    outputs = stack(*xs)
    penalties = [m.penalty for m in stack.modules() if isinstance(m, WeightLoss)]
    (loss(outputs) + sum(penalties)).backward()
    return [*outputs, *grads(stack)]


@scene("hooks", refusal="keeps a tensor", refusing="Functional")
def test_a_kept_loss_of_weights_that_are_computed(stage: Stage):
    """The stack is called with weights that are part of a graph."""
    stack, xs = stage.stack(WeightLoss), torch.randn(2, 3, 4)
    scales = {name: torch.ones_like(p, requires_grad=True) for name, p in stack.named_parameters()}
    given = {name: p.detach() * scales[name] for name, p in stack.named_parameters()}
    outputs = torch.func.functional_call(stack, given, tuple(xs))
    penalties = [m.penalty for m in stack.modules() if isinstance(m, WeightLoss)]
    (loss(outputs) + sum(penalties)).backward()
    return [*outputs, *(s.grad for s in scales.values())]


@pytest.mark.filterwarnings("ignore")
def test_the_hooks_of_a_flop_counter_are_known():
    seen: list[Any] = []

    class Look(nn.Linear):
        def forward(self, x):
            seen.extend((x._backward_hooks or {}).values())
            return super().forward(x)

    stack = ReversibleSequence([(Look(4, 4), Look(4, 4))], scheduler=Functional())
    with FlopCounterMode(stack, display=False) as counter:
        stack(*leaves(3, 4, dtype=torch.float32))
    assert counter.get_total_flops() > 0
    assert seen and all(map(_is_a_trackers, seen))
    assert not _is_a_trackers(F.relu) and not _is_a_trackers(lambda g: g)


@scene("5", without="Functional")
def test_a_backward_hook_that_comes_after_a_forward_whose_parameter_is_then_frozen(stage: Stage):
    """The repetition puts the parameter back as it was, and must not take the hook for a part of that."""
    stack, xs, seen = stage.stack(lambda: Lambda(lambda m, x: m(x).tanh(), nn.Linear(4, 4))), leaves(3, 4), []
    note = seen.append
    outputs = stack(*xs)
    for m in [m for m in stack.modules() if isinstance(m, Lambda)]:
        m.register_full_backward_hook(lambda m, before, after: note(len(after)))
        next(m.parameters()).requires_grad_(False)
    loss(outputs).backward()
    loss(stack(*xs)).backward()
    return [len(seen), *grads(*xs, stack)]
