"""Random programs in two worlds that differ in their scheduler alone: under Naive(), and under any other.

After every action both worlds must look the same: outputs, gradients, parameters, buffers, what hooks saw, and the next
random number. Where an action edits something between forward and backward, the other scheduler may also refuse; what
it may say then is listed in ``REFUSALS``, and belongs to the forward passes that were edited.

The short profile runs by default. ``REVLIB_FUZZ_EXAMPLES=2000 pytest --thorough tests/test_fuzz.py`` runs more of them,
at random; a failure prints its program and a ``@reproduce_failure`` line.
"""

import contextlib
import copy
import os
import pickle
import random
import re
import types
import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from einops import rearrange
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from revlib import Additive, Coupling, ExactAdditive, Functional, Naive, ReversibleSequence, Step, engine
from revlib.bijections import ActNorm, Bijection, Convolution1x1, Inverse, Permute
from revlib.core import SHARED
from revlib.couplings import Affine, Scaled
from revlib.schedulers import Scheduler
from revlib.testing import strategies

WIDTH, SHAPE, DEEPEST, MOST_PENDING = 4, (3, 2, 4), 6, 4
REFUSALS = {  # what may be said in place of a right answer, by what was done between forward and backward
    "edit": "modified by an inplace operation|has been modified inplace",
    "mode": r"was in (train|eval)\(\) mode",
    "spent": "backward through the graph a second time",
}


# ---------------------------------------------------------------------------------------------- functions
class UsersError(Exception):
    """The user's own error."""


class Function(nn.Module):
    """A function of one or two streams, as :meth:`call` of one tensor; it raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False

    def forward(self, *streams: Tensor) -> Any:
        if self.armed:
            raise UsersError
        return self.call(streams[0] if len(streams) == 1 else streams[0] + 0.5 * streams[1].sin())


class Mlp(Function):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        parts = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.GELU(), nn.Dropout(dropout), nn.Linear(6, WIDTH)
        self.call = nn.Sequential(*parts)


class Dropping(Mlp):
    def __init__(self) -> None:
        super().__init__(dropout=0.4)


class Normalised(Function):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)  # the gradient of a bias is zero here, and computed as noise
        self.norm = nn.BatchNorm1d(WIDTH)

    def call(self, x):
        return self.norm(self.linear(x).flatten(0, 1)).view(x.shape).relu_()


class Attention(Function):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def call(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.mT).softmax(-1) @ v


class Shared(Function):
    """Returns the very stream that it was given, or a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def call(self, x):
        self.steps += 1
        return x if x.shape[0] % 2 else x.flip(0).view_as(x)


class Gained(Function):
    """Names a context tensor, and saves many tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, *streams: Tensor, gain: Tensor | None = None) -> Tensor:
        f = super().forward(*streams)
        return f if gain is None else f * gain.tanh()

    def call(self, x):
        return (x * self.weight).sin() * x.tanh() + (x.roll(1, -1) * self.weight).sigmoid()


class Checkpointed(Function):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Dropping()

    def call(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Nested(Function):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ReversibleSequence([(Dropping(), Mlp())], coupling=ExactAdditive())

    def call(self, x):
        y1, y2 = self.stack(x, x.cos())
        return 0.5 * y1 * y2.sigmoid()


class WithoutGradient(Function):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    @torch.no_grad()
    def call(self, x):
        return self.linear(x).tanh()


class StochasticDepth(Mlp):
    def forward(self, *streams: Tensor) -> Tensor:
        f = super().forward(*streams)
        return f * (torch.rand(f.shape[0], 1, 1) < 0.6) if self.training else f


class Differentiating(Function):
    """A gradient step of its own, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def call(self, x):
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            found = torch.autograd.grad(self.linear(z).sin().sum(), z, create_graph=True)[0]
        # Under Functional() a result that leads to nobody's leaf needs no gradient, where plain autograd says it does.
        leads = x.requires_grad or any(p.requires_grad for p in self.parameters())
        return found if leads else found.detach()


class Auxiliary(Mlp):
    """Leaves a loss of its own behind, as an attribute."""

    def forward(self, *streams: Tensor) -> Tensor:
        f = super().forward(*streams)
        self.aux = f.square().mean(-1)
        return f


class Counting(Mlp):
    """Counts its calls in a dict, and scales by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": [0]}

    def forward(self, *streams: Tensor) -> Tensor:
        self.state["calls"][0] += 1
        return super().forward(*streams) * 0.9 ** (self.state["calls"][0] % 8)


class Remembering(Mlp):
    """Mixes in what it computed last time, which it keeps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, *streams: Tensor) -> Tensor:
        f = super().forward(*streams)
        old = self.memory.pop().to(f.dtype) if self.memory else torch.zeros((), dtype=f.dtype)
        self.memory.append(f.detach().mean(0))
        return f + 0.3 * old


class Unit(Function):
    """Scales its own weight to unit length when it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def call(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight, dim=1))
        return x @ self.weight


class Building(Function):
    """Builds its layer when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Linear | None = None

    def call(self, x):
        if self.layer is None:
            with torch.inference_mode(False):  # else it could never be trained
                self.layer = nn.Linear(WIDTH, WIDTH, dtype=x.dtype)
        return self.layer(x).tanh()


class Averaging(Function):
    """Moves a buffer through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def call(self, x):
        y = (x - self.mean.to(x.dtype)).sin()
        if self.training:
            self.mean.data.lerp_(x.detach().mean((0, 1)).to(self.mean.dtype), 0.1)
        return y


class Hidden(Function):
    """Its norm is in a plain object, which no registration shows."""

    def __init__(self) -> None:
        super().__init__()
        self.box = types.SimpleNamespace(norm=nn.BatchNorm1d(WIDTH, affine=False).double())

    def call(self, x):
        self.box.norm.train(self.training)
        return self.box.norm(x.flatten(0, 1).double()).to(x.dtype).view(x.shape)


class Routed(Function):
    """As many rows as the data say, each through one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def call(self, x):
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > rows[:, 1]).long()
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            (places,) = torch.where(chosen == i)
            y = y.index_add(0, places, expert(rows[places]).tanh().to(y.dtype))
        return y.view(x.shape)


class Hooking(Mlp):
    """Registers hooks on its own weights: one when it first runs, and one in every forward, which it takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked = False

    def forward(self, *streams: Tensor) -> Tensor:
        weight, bias = self.call[1].weight, self.call[4].bias
        if weight.requires_grad and not self.hooked:
            weight.register_hook(halved)
            self.hooked = True
        if bias.requires_grad:
            bias.register_hook(halved).remove()
        return super().forward(*streams)


class Drawing(Mlp):
    """Draws from a generator of its own, in front of a last layer that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = random.Random(0)
        nn.init.zeros_(self.call[4].weight)

    def forward(self, *streams: Tensor) -> Tensor:
        first, last = self.call[:4], self.call[4]
        if self.armed:
            raise UsersError
        x = streams[0] if len(streams) == 1 else streams[0] + streams[1].sin()
        return last(first(x) * self.draws.random())


def halved(gradient: Tensor | None) -> Tensor | None:
    """An autograd.Function calls the hooks of what does not matter with None."""
    return None if gradient is None else 0.5 * gradient


class Folded(Bijection):
    """Moves rows about, and back."""

    exact = True
    takes = makes = 1

    def forward(self, x):
        return rearrange(x, "(p a) b c -> (a p) b c", p=3)

    def inverse(self, y):
        return rearrange(y, "(a p) b c -> (p a) b c", p=3)


# Of streams, in the order in which they come; each keeps all shapes, so that any functions may follow.
BIJECTIONS: list[Callable[[], Bijection]] = [
    Folded,
    lambda: Permute(1, 0),
    lambda: ActNorm(SHAPE[1]),
    lambda: Convolution1x1(SHAPE[1]),
    lambda: Inverse(Convolution1x1(SHAPE[1])),
]
EXACT_BIJECTIONS = BIJECTIONS[:2]


class Twice(nn.Module):
    """What Affine takes: a log-scale and a shift."""

    def __init__(self, fn: Function) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *streams: Tensor) -> tuple[Tensor, Tensor]:
        f = self.fn(*streams)
        return 0.5 * f, f


@dataclass(frozen=True)
class Gated(Coupling):
    """A user's own, which saves tensors."""

    def merge(self, s, f):
        return s * (0.3 * f.tanh()).exp() + f

    def unmerge(self, merged, f):
        return (merged - f) * (-0.3 * f.tanh()).exp()


FUNCTIONS = [
    *(Mlp, Dropping, Normalised, Attention, Shared, Gained, Checkpointed, Nested, WithoutGradient, StochasticDepth),
    *(Differentiating, Auxiliary, Counting, Remembering, Unit, Building, Averaging, Hidden, Routed, Hooking, Drawing),
]
_asked = os.environ.get("REVLIB_FUZZ_KINDS", "").split(",")
FUNCTIONS += [kind for kind in FUNCTIONS if kind.__name__ in _asked] * 9  # mostly these
COUPLINGS = [Additive(), Scaled(0.9, 0.5), Gated(), ExactAdditive(), Affine(0.5)]
EXACT = [ExactAdditive(), Scaled(-1.0, 0.5, ExactAdditive())]


# ---------------------------------------------------------------------------------------------- programs, as values
numbers = st.integers(0, 2**10)


@dataclass(frozen=True)
class Item:
    """One Step, one pair, or one bijection, which has no functions; or once more an earlier one, by ``again``."""

    functions: tuple[type[Function], ...]
    coupling: int
    again: int

    def build(self, before: list[Any], exact: bool) -> Any:
        alike = [item for item in before if len(list(item.children())) == len(self.functions)]
        if alike and self.again % 4 == 3:
            return alike[self.again % len(alike)]
        if not self.functions:
            makers = EXACT_BIJECTIONS if exact else BIJECTIONS
            return makers[self.coupling % len(makers)]()
        if len(self.functions) == 2:
            return tuple(fn() for fn in self.functions)
        couplings = EXACT if exact else COUPLINGS
        coupling = couplings[self.coupling % len(couplings)]
        fn = self.functions[0]()
        return Step(Twice(fn) if isinstance(coupling, Affine) else fn, coupling)


@dataclass(frozen=True)
class Call:
    """How a stack is called: the streams, as leaves or not, their layout, and around it autocast."""

    kinds: tuple[str, ...]
    same: bool
    gain: bool
    autocast: bool
    hooked: bool


singles = st.builds(Item, st.tuples(st.sampled_from(FUNCTIONS)), numbers, numbers)
pairs = st.builds(Item, st.tuples(st.sampled_from(FUNCTIONS), st.sampled_from(FUNCTIONS)), numbers, numbers)
bijections = st.builds(Item, st.just(()), numbers, numbers)
calls = st.builds(
    Call,
    st.tuples(*[st.sampled_from(["leaf", "made", "transposed", "expanded", "detached"])] * 3),
    *[st.booleans()] * 4,
)
PLAIN = Call(("leaf",) * 3, same=False, gain=False, autocast=False, hooked=False)


# ---------------------------------------------------------------------------------------------- a world
@dataclass
class Pending:
    """Outputs whose graph is alive, what went in, and why a scheduler may refuse to differentiate them."""

    ys: list[Tensor]
    edges: list[Tensor]  # streams and context that somebody may edit
    evaluated: bool
    excuses: set[str] = field(default_factory=set)
    spent: bool = False  # gone through without retain_graph
    second: bool = False  # gradients themselves


class World:
    """A model, its inputs, and everything that a program has done to them."""

    def __init__(self, stack: ReversibleSequence, streams: list[Tensor], gain: Tensor, seed: int) -> None:
        self.stack, self.stacks = stack, [stack]
        self.inputs = {f"input {i}": x for i, x in enumerate(streams)} | {"gain": gain}
        self.pending: list[Pending] = []
        self.log: dict[str, list[Tensor]] = {}
        self.handles: list[Any] = []
        self.saved = copy.deepcopy(stack.state_dict())
        self.rng = torch.Generator().manual_seed(seed).get_state()

    def functions(self) -> list[Function]:
        return [m for m in self.stack.modules() if isinstance(m, Function)]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.stack.parameters())

    def leaves(self) -> dict[str, Tensor]:
        named = {f"{i}.{k}": p for i, stack in enumerate(self.stacks) for k, p in stack.named_parameters()}
        return self.inputs | named

    def record(self, name: str, t: Tensor | None) -> None:
        if t is None:  # as the only gradient of what does not matter may come out of an autograd.Function
            return
        self.log.setdefault(name, []).append(t.detach().clone())

    def observe(self) -> dict[str, Any]:
        leaves = self.leaves()
        return {
            "gradient": {k: t.grad for k, t in leaves.items()},
            "value": {k: t.detach() for k, t in leaves.items()},
            "buffer": {f"{i}.{k}": b for i, s in enumerate(self.stacks) for k, b in s.named_buffers()},
            "hook": self.log,
        }

    def remember(self) -> Callable[[], None]:
        """-> what undoes a backward: after an exception there are gradients of some part of the graph."""
        leaves = [*self.leaves().values()]
        before = [(t.detach().clone(), None if t.grad is None else t.grad.clone()) for t in leaves]
        log = {k: list(v) for k, v in self.log.items()}

        def undo() -> None:
            self.log = log
            for t, (value, gradient) in zip(leaves, before, strict=True):
                t.grad = gradient
                if not torch.equal(t, value):
                    t.detach().copy_(value)

        return undo

    def excuse(self, why: str) -> None:
        for p in self.pending:
            p.excuses.add(why)

    # ------------------------------------------------------------------------------------------ actions
    def streams(self, call: Call) -> list[Tensor]:
        xs = [x for k, x in self.inputs.items() if k != "gain"]
        xs = [xs[0]] * len(xs) if call.same else xs
        kinds = {
            "leaf": lambda x: x,
            "made": lambda x: x * 1,
            "transposed": lambda x: x.mT.contiguous().mT,
            "expanded": lambda x: x[:1].expand_as(x),
            "detached": lambda x: x.detach().clone(),
        }
        return [kinds[kind](x) for kind, x in zip(call.kinds, xs, strict=False)]

    def call(self, call: Call) -> tuple[list[Tensor], list[Tensor]]:
        """-> the outputs, and the tensors that went in."""
        streams = self.streams(call)
        takes = any(isinstance(b.owner, Gained) for b in self.stack.bound_steps)
        context = {"gain": self.inputs["gain"] * 1} if call.gain and takes else {}
        around = (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if call.autocast else contextlib.nullcontext()
        )
        with around:
            ys = [*self.stack(*streams, **context)]
        ys += [f.__dict__.pop("aux") for f in self.functions() if "aux" in f.__dict__]
        return ys, [*streams, *context.values()]

    def forward(self, call: Call) -> list[Tensor]:
        """With gradients; the outputs stay pending."""
        ys, edges = self.call(call)
        tensors = {f"{what} {i}": t for what, ts in (("y", ys), ("x", edges)) for i, t in enumerate(ts)}
        for name, t in tensors.items():
            if call.hooked and t.requires_grad and not t.is_leaf:
                t.register_hook(lambda g, name=name: self.record(name, g))
        if self.stack.training:  # native batch norm writes its statistics, which graphs of eval mode read
            for p in self.pending:
                p.excuses |= {"edit"} if p.evaluated else set()
        evaluated = not all(m.training for m in self.stack.modules())
        self.pending.append(Pending(ys, [x for x in edges if not x.is_leaf], evaluated))
        return ys

    def loss(self, p: Pending, which: int, curved: bool) -> Tensor | None:
        """Of some of the outputs, in a direction that is the same in both worlds."""
        chosen = [y for i, y in enumerate(p.ys) if y.requires_grad and (which >> i) % 2 == 0]
        made = torch.Generator().manual_seed(which)
        terms = [(y * torch.randn(y.shape, generator=made).to(y.dtype)).sum().double() for y in chosen]
        terms += [(y.sin() * y).sum().double() for y in chosen if curved]
        return torch.stack(terms).sum() if terms else None

    def backward(self, p: Pending, which: int, curved: bool, retain: bool, stepping: bool) -> None:
        total = self.loss(p, which, curved and "edit" not in p.excuses)
        if total is None:
            return
        handles = []
        if stepping:
            handles = [
                t.register_post_accumulate_grad_hook(self.step_one) for t in self.parameters() if t.requires_grad
            ]
            self.excuse("edit")
        p.spent |= not retain
        try:
            total.backward(retain_graph=retain)
        finally:
            for handle in handles:
                handle.remove()

    def grad(self, p: Pending, which: int, among: int, create: bool, retain: bool) -> list[Tensor | None]:
        """With respect to some of the leaves; under create_graph, what it finds is pending too."""
        total = self.loss(p, which, "edit" not in p.excuses)
        some = [t for i, t in enumerate(self.leaves().values()) if t.requires_grad and (among >> (i % 7)) % 2 == 0]
        if total is None or not some:
            return []
        p.spent |= not (retain or create)
        found = torch.autograd.grad(total, some, retain_graph=retain or create, create_graph=create, allow_unused=True)
        again = [g for g in found if g is not None and g.requires_grad]
        if create and again:
            self.pending.append(Pending(again, [], p.evaluated, p.excuses, p.spent, second=True))
        return [*found]

    def penalty(self, p: Pending) -> None:
        """The loss and the square of its gradient together."""
        total = self.loss(p, 0, "edit" not in p.excuses)
        some = [x for x in self.inputs.values() if x.requires_grad]
        if total is None or not some:
            return
        p.spent = True
        found = torch.autograd.grad(total, some, create_graph=True, allow_unused=True)
        (total + sum(g.square().sum() for g in found if g is not None)).backward()

    def step_one(self, t: Tensor) -> None:
        with torch.no_grad():
            if t.grad is not None:
                t.sub_(0.05 * t.grad.tanh())

    def step(self) -> None:
        for t in self.parameters():
            self.step_one(t)
        self.excuse("edit")

    def fail(self, p: Pending, arm: Callable[[], Any]) -> None:
        """A backward in which something raises, and which leaves no trace."""
        total = self.loss(p, 0, False)
        if total is None:
            return
        disarm, undo = arm(), self.remember()
        with contextlib.suppress(Exception):  # an excused refusal may come first
            total.backward(retain_graph=True)
        disarm()
        undo()

    def hook_parameter(self, i: int, kind: str) -> None:
        t = self.parameters()[i % len(self.parameters())]
        name = f"parameter {i % len(self.parameters())}"
        if kind == "scaling":
            self.handles += [t.register_hook(halved)] if t.requires_grad else []
        elif kind == "recording":
            wanted = lambda g: self.record(name, g) if t.requires_grad else None  # noqa: E731
            self.handles += [t.register_hook(wanted)] if t.requires_grad else []
        elif t.requires_grad:
            self.handles.append(t.register_post_accumulate_grad_hook(partial(self.record_after, name)))

    def record_after(self, name: str, t: Tensor) -> None:
        if t.grad is not None:  # it may be frozen since forward
            self.record(f"{name}, after", t.grad)

    def hook_function(self, i: int, kind: str) -> None:
        f = self.functions()[i % len(self.functions())]
        if kind == "forward":
            self.handles.append(f.register_forward_hook(lambda m, a, y: y * 1.25))
        elif kind == "before":
            self.handles.append(f.register_forward_pre_hook(lambda m, a: tuple(0.75 * x for x in a)))
        else:
            record = lambda m, gi, go: [self.record(f"{kind} {j}", g) for j, g in enumerate(go) if g is not None]  # noqa: E731
            self.handles.append(
                f.register_full_backward_hook(record and (lambda m, gi, go: record(m, gi, go) and None))
            )

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def switch(self, i: int, train: bool) -> None:
        modules: list[nn.Module] = [self.stack, *self.functions()]
        modules[i % len(modules)].train(train)
        self.excuse("mode")

    def become(self, stack: ReversibleSequence) -> None:
        self.stack = stack
        self.stacks.append(stack)


# ---------------------------------------------------------------------------------------------- comparing
def gap(got: Any, want: Any) -> float:
    """The largest error of any tensor of a nest, relative to its norm, or to a thousandth of the largest norm."""
    got, want = tree_leaves(got), tree_leaves(want)
    kind = lambda t: (t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else t  # noqa: E731
    assert [kind(t) for t in got] == [kind(t) for t in want]
    pairs = [(g.detach().double(), w.detach().double()) for g, w in zip(got, want, strict=True) if w is not None]
    pairs = [(g, w) for g, w in pairs if not torch.equal(g, w)]
    assert all(torch.equal(g.isfinite(), w.isfinite()) for g, w in pairs)
    floor = 1e-3 * max((t.detach().double().norm().item() for t in want if t is not None), default=0.0)
    errors = [(g - w).nan_to_num(0.0).norm().item() / max(w.nan_to_num(0.0).norm().item(), floor) for g, w in pairs]
    return max(errors, default=0.0)


BETWEEN: dict[str, Callable[["Machine", int, int, bool], Any]] = {
    "a step": lambda self, i, j, flag: self.optimizer_step(),
    "an edit": lambda self, i, j, flag: self.edit(i=i, j=j),
    "freezing": lambda self, i, j, flag: self.freeze(i=j, wanted=False),
    "another forward": lambda self, i, j, flag: self.forward_without_gradients(call=PLAIN, inference=flag),
    "a hook": lambda self, i, j, flag: self.subject.functions() and self.hook_function(i=j, kind="before"),
    "no hooks": lambda self, i, j, flag: self.remove_hooks(),
    "a failure in a hook": lambda self, i, j, flag: self.raise_in_backward(i=i, j=j, where="a hook"),
    "a failure in a repetition": lambda self, i, j, flag: self.raise_in_backward(i=i, j=j, where="the repetition"),
}


def kept(tape: Any) -> set[Any]:
    """The passes for which a tape still holds something."""
    placeholders = [placeholder for record in tape.records for _, placeholder in record.living()]
    held = {key for placeholder in placeholders for key in placeholder.by_pass or ()}
    return held | {SHARED for placeholder in placeholders if placeholder.tensor is not None} | set(tape.progress)


class Machine(RuleBasedStateMachine):
    """Does everything twice."""

    creates = True  # graphs of gradients
    thaws = True  # what was frozen in a forward that is pending
    kinds: ClassVar = {True: (torch.float32, 0.0), False: (torch.float64, 1e-9)}  # exact or not; how far apart

    def __init__(self) -> None:
        super().__init__()
        self.tapes: weakref.WeakSet[Any] = weakref.WeakSet()
        self.leaks = False  # torch's full backward hooks may keep a graph that was differentiated twice, also Naive's
        self.make = engine.Tape
        engine.Tape = self.tape  # type: ignore

    def tape(self, *args: Any, **kwargs: Any) -> Any:
        tape = self.make(*args, **kwargs)
        self.tapes.add(tape)
        return tape

    def teardown(self) -> None:
        engine.Tape = self.make  # type: ignore

    @initialize(
        items=st.lists(st.one_of(singles, pairs, bijections), min_size=1, max_size=4),
        more=st.sampled_from([0, 0, 1]),
        exact=st.booleans(),
        wanted=numbers,
        scheduler=strategies.schedulers(),
        seed=strategies.seeds(),
    )
    def begin(self, items, more, exact, wanted, scheduler, seed):
        torch.manual_seed(seed)
        self.exact, self.m = exact, 2 + more
        self.dtype, self.limit = self.kinds[exact]
        stack = ReversibleSequence(coupling=(EXACT if exact else COUPLINGS)[seed % 2], scheduler=Naive())
        for item in items:
            self.append_to(stack, item)
        stack.to(self.dtype)
        streams = [torch.randn(SHAPE, dtype=self.dtype).requires_grad_((wanted >> i) % 4 != 3) for i in range(self.m)]
        gain = torch.rand(WIDTH, dtype=self.dtype).requires_grad_(wanted % 3 != 2)
        self.worlds = [World(*copy.deepcopy((stack, streams, gain)), seed) for _ in range(2)]
        self.oracle, self.subject = self.worlds
        for m in self.oracle.stack.modules():
            if isinstance(m, ReversibleSequence):
                m.scheduler = Naive()
        self.subject.stack.scheduler = self.choose(scheduler)

    def choose(self, scheduler: Scheduler) -> Scheduler:
        return scheduler

    def excuses(self, p: Pending) -> set[str]:
        return set()

    def append_to(self, stack: ReversibleSequence, item: Item) -> None:
        if len(stack) < DEEPEST and (self.m == 2 or len(item.functions) < 2):
            stack.append(item.build(list(stack), self.exact))

    def both(self, act: Callable[[World], Any], excuses: Collection[str] = ()) -> bool:
        """Act in both worlds, under the same random numbers, and compare. -> whether it worked in both."""
        (want, naive), (got, other) = (self.attempt(world, act) for world in self.worlds)
        try:
            if other is not None and naive is None:
                if not any(re.search(REFUSALS[e], str(other)) for e in excuses):
                    raise other
            elif naive is not None:
                # What a function edits itself is repeated from copies, so that nobody else's edits matter there.
                edits = any(isinstance(f, Unit) for world in self.worlds for f in world.functions())
                if other is None and edits and re.search(REFUSALS["edit"], str(naive)):
                    return False
                assert other is not None, f"Naive raised, the other did not: {naive!r}"
                assert isinstance(other, UsersError) == isinstance(naive, UsersError), (
                    f"{other!r} in place of {naive!r}"
                )
                if not isinstance(naive, (UsersError, RuntimeError)):
                    raise naive
            else:
                self.compare("result", want, got)
            return naive is None and other is None
        finally:
            del naive, other  # their frames lead back to here

    @staticmethod
    def attempt(world: World, act: Callable[[World], Any]) -> tuple[Any, Exception | None]:
        torch.set_rng_state(world.rng)
        try:
            return act(world), None
        except Exception as error:
            return None, error
        finally:
            world.rng = torch.get_rng_state()

    def compare(self, what: str, want: Any, got: Any) -> None:
        assert gap(got, want) <= self.limit, f"{what}: {gap(got, want):.2g}\nunder Naive {want}\nunder another {got}"

    def differentiate(self, i: int, act: Callable[[World, Pending], Any]) -> None:
        """Pending outputs, in some way. Where one world refuses, neither has done it, nor will again."""
        i %= len(self.subject.pending)
        excuses = self.subject.pending[i].excuses | self.excuses(self.subject.pending[i])
        if act is World.penalty or self.subject.pending[i].second:
            self.limit = 1e-3 if self.dtype == torch.float32 else 1e-9  # second derivatives are summed in another order
        undos = [world.remember() for world in self.worlds]
        family = self.subject.pending[i].excuses  # the same for what was made of its graph, freed in one world alone
        if not self.both(lambda world: act(world, world.pending[i]), excuses):
            others = [j for j, p in enumerate(self.subject.pending) if p.excuses is not family]
            for world, undo in zip(self.worlds, undos, strict=True):
                undo()
                world.pending[:] = [world.pending[j] for j in others]

    # ------------------------------------------------------------------------------------------ forward
    @precondition(lambda self: len(self.subject.pending) < MOST_PENDING)
    @rule(call=calls)
    def forward(self, call):
        self.both(lambda world: world.forward(call))

    @rule(call=calls, inference=st.booleans())
    def forward_without_gradients(self, call, inference):
        def act(world):
            with torch.inference_mode() if inference else torch.no_grad():
                return world.call(call)[0]

        self.both(act)
        for world in self.worlds:
            for p in world.pending:
                p.excuses |= {"edit"} if p.evaluated else set()

    @rule(call=calls, i=numbers)
    def raise_in_forward(self, call, i):
        def act(world):
            f = world.functions()[i % len(world.functions())] if world.functions() else Function()
            f.armed = True
            try:
                return world.call(call)[0]
            finally:
                f.armed = False

        self.both(act)
        for world in self.worlds:
            for f in world.functions():
                f.__dict__.pop("aux", None)

    @rule()
    def trace(self):
        """By torch.jit, in eval mode, with gradients on; what was traced computes what the stack does.

        It takes no module with a backward hook.
        """
        self.both(World.unhook)

        def act(world):
            modes = [(m, m.training) for m in world.stack.modules()]
            try:
                world.stack.eval()
                streams = [x.detach().clone() for k, x in world.inputs.items() if k != "gain"]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = torch.jit.trace(world.stack, tuple(streams), check_trace=False)
                return [y.detach() for y in made(*streams)]
            finally:
                for m, training in modes:
                    m.training = training
                for f in world.functions():
                    f.__dict__.pop("aux", None)

        self.both(act)

    @rule()
    def invert(self):
        def act(world):
            modes = [(m, m.training) for m in world.stack.modules()]
            try:
                with torch.no_grad():
                    world.stack.eval()
                    return world.stack.inverse(*[x.detach() for k, x in world.inputs.items() if k != "gain"])
            finally:
                for m, training in modes:
                    m.training = training
                for f in world.functions():
                    f.__dict__.pop("aux", None)

        self.both(act)

    # ------------------------------------------------------------------------------------------ backward
    @precondition(lambda self: self.subject.pending)
    @rule(
        i=numbers,
        which=numbers,
        curved=st.booleans(),
        retain=st.booleans(),
        stepping=st.sampled_from([False] * 3 + [True]),
    )
    def backward(self, i, which, curved, retain, stepping):
        p = self.subject.pending[i % len(self.subject.pending)]
        stepping &= not (p.second or p.spent or p.excuses)
        self.differentiate(i, lambda world, p: world.backward(p, which, curved, retain, stepping))

    @precondition(lambda self: self.subject.pending)
    @rule(i=numbers, which=numbers, among=numbers, create=st.booleans(), retain=st.booleans())
    def grad(self, i, which, among, create, retain):
        create &= self.creates and len(self.subject.pending) < MOST_PENDING
        self.differentiate(i, lambda world, p: world.grad(p, which, among, create, retain))

    @precondition(lambda self: self.subject.pending)
    @rule(i=numbers)
    def gradient_penalty(self, i):
        self.differentiate(i, World.penalty)

    @precondition(lambda self: any(not p.spent for p in self.subject.pending))
    @rule(i=numbers, j=numbers, where=st.sampled_from(["a hook", "the repetition"]))
    def raise_in_backward(self, i, j, where):
        """A retained graph must be as good as before."""
        i %= len(self.subject.pending)

        def arm(world):
            functions, parameters = world.functions(), [p for p in world.parameters() if p.requires_grad]
            if where == "a hook" and parameters:
                return parameters[j % len(parameters)].register_hook(self.raise_boom).remove
            if where == "the repetition" and functions:
                functions[j % len(functions)].armed = world is self.subject
                return lambda: setattr(functions[j % len(functions)], "armed", False)
            return lambda: None

        self.both(lambda world: world.fail(world.pending[i], lambda: arm(world)))

    @staticmethod
    def raise_boom(_: Tensor) -> None:
        raise UsersError

    @precondition(lambda self: self.subject.pending)
    @rule(i=numbers, everything=st.booleans())
    def drop(self, i, everything):
        """Outputs that nobody differentiates, or not any more."""
        for world in self.worlds:
            world.pending[:] = (
                [] if everything else [p for j, p in enumerate(world.pending) if j != i % len(world.pending)]
            )

    # ------------------------------------------------------------------------------------------ edits
    @rule()
    def optimizer_step(self):
        self.both(World.step)

    @rule()
    def load_state(self):
        def act(world):
            if world.stack.state_dict().keys() == world.saved.keys():
                world.stack.load_state_dict(world.saved)
                world.excuse("edit")

        self.both(act)

    @precondition(lambda self: any(p.edges or p.ys for p in self.subject.pending))
    @rule(i=numbers, j=numbers)
    def edit(self, i, j):
        """A stream, a context tensor or an output, in one world alone: refused, or right as if not edited."""
        i %= len(self.subject.pending)
        p = self.subject.pending[i]
        inputs = {x.untyped_storage().data_ptr() for x in self.subject.inputs.values()}
        tensors = [t for t in [*p.edges, *p.ys] if t.untyped_storage().data_ptr() not in inputs]
        # Autograd would forget the hooks of a view, in this world alone, if the view or its base was edited.
        bases = {id(t._base) for t in [*p.edges, *p.ys] if t._is_view()}
        tensors = [t for t in tensors if not t._is_view() and id(t) not in bases]
        if not p.second and tensors:
            for world in self.worlds:
                world.pending[i].excuses.add("edit")
            with torch.no_grad():
                tensors[j % len(tensors)].add_(0.5)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        for world in self.worlds:
            for t in world.leaves().values():
                if t.grad is not None:
                    t.grad = None if to_none else torch.zeros_like(t)

    @rule(i=numbers, wanted=st.booleans())
    def freeze(self, i, wanted):
        for world in self.worlds:
            may = self.thaws or not world.pending
            # The one node of Functional() calls the hooks of every output, also where it leads to a frozen input only.
            leaves = [*world.parameters(), *(world.inputs.values() if may else ())]
            if leaves:
                leaves[i % len(leaves)].requires_grad_(wanted and may)

    @rule(i=numbers, train=st.booleans())
    def switch_mode(self, i, train):
        for world in self.worlds:
            world.switch(i, train)

    @rule(scheduler=strategies.schedulers(), inside=st.booleans())
    def swap_scheduler(self, scheduler, inside):
        for m in self.subject.stack.modules():
            if isinstance(m, ReversibleSequence) and inside == (m is not self.subject.stack):
                m.scheduler = self.choose(scheduler)

    # ------------------------------------------------------------------------------------------ in between
    @precondition(lambda self: len(self.subject.pending) < MOST_PENDING)
    @rule(call=calls, what=st.sampled_from(["nothing", "eval", *BETWEEN]), i=numbers, j=numbers, flag=st.booleans())
    def between_forward_and_backward(self, call, what, i, j, flag):
        """Programs drawn rule by rule seldom do something to a graph that is then differentiated."""
        self.forward(call=call)
        last = len(self.subject.pending) - 1
        if what == "eval":
            self.switch_mode(i=0, train=False)
            self.switch_mode(i=0, train=True)
            self.switch_mode(i=j, train=flag)
        elif what in BETWEEN:
            BETWEEN[what](self, last, j, flag)
        self.backward(i=last, which=i, curved=flag, retain=True, stepping=False)
        if len(self.subject.pending) > last:
            self.backward(i=last, which=j, curved=not flag, retain=False, stepping=j % 3 == 0)

    # ------------------------------------------------------------------------------------------ hooks
    @precondition(lambda self: self.subject.parameters())
    @rule(i=numbers, kind=st.sampled_from(["recording", "scaling", "after"]))
    def hook_parameter(self, i, kind):
        self.both(lambda world: world.hook_parameter(i, kind))

    @precondition(lambda self: self.subject.functions())
    @rule(i=numbers, kind=st.sampled_from(["forward", "before", "backward"]))
    def hook_function(self, i, kind):
        self.leaks |= kind == "backward"
        self.both(lambda world: world.hook_function(i, kind))

    @rule()
    def remove_hooks(self):
        self.both(World.unhook)

    # ------------------------------------------------------------------------------------------ containers
    @rule(pickled=st.booleans())
    def copy_stack(self, pickled):
        self.both(World.unhook)
        make = (lambda stack: pickle.loads(pickle.dumps(stack))) if pickled else copy.deepcopy
        self.both(lambda world: world.become(make(world.stack)))

    @rule(item=st.one_of(singles, pairs, bijections), seed=strategies.seeds())
    def append(self, item, seed):
        """Built once for each world, from the same seed; an earlier one again where the item says so."""

        def act(world):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.append_to(world.stack, item)
                world.stack.to(self.dtype)

        self.both(act)
        for m in self.oracle.stack.modules():
            if isinstance(m, ReversibleSequence):
                m.scheduler = Naive()

    @rule(start=st.integers(0, 3), stop=st.integers(1, 6))
    def cut(self, start, stop):
        self.both(lambda world: world.become(world.stack[start:stop]))

    # ------------------------------------------------------------------------------------------ always
    @invariant()
    def both_worlds_are_alike(self):
        want, got = self.oracle.observe(), self.subject.observe()
        for what in want:
            self.compare(what, want[what], got[what])
        assert torch.equal(self.oracle.rng, self.subject.rng), "the caller's random numbers differ"

    @invariant()
    def nothing_recovered_is_kept(self):
        # Another backward pass makes autograd let go of what it had queued when something raised.
        torch.ones((), requires_grad=True).square().backward()
        assert all(keys <= {SHARED} for keys in map(kept, self.tapes)), "recovered for a pass that is over"
        assert self.subject.pending or not self.tapes or self.leaks, "a tape outlives its outputs"


class Pure(Machine):
    """The same under Functional(), with what it takes; where it differs from plain autograd is said here."""

    # Refused, of Unit second derivatives; and hooks of what does not matter are called, if with None.
    impure = (Auxiliary, Building, Hooking, Unit, WithoutGradient)
    creates = False  # gradients require gradients, also those that depend on nothing
    thaws = False  # plain autograd gives that a second derivative, or none, by operation
    kinds: ClassVar = dict.fromkeys((True, False), (torch.float64, 1e-9))  # it adds up in another order

    def choose(self, scheduler: Scheduler) -> Scheduler:
        return scheduler if scheduler == Naive() else Functional()

    def append_to(self, stack: ReversibleSequence, item: Item) -> None:
        pure = tuple(Mlp if fn in self.impure else fn for fn in item.functions)
        item = replace(item, functions=pure)
        # A stream that a permutation hands on comes out as another tensor, with hooks of its own.
        makers = EXACT_BIJECTIONS if self.exact else BIJECTIONS
        if not pure and isinstance(makers[item.coupling % len(makers)](), Permute):
            item = replace(item, coupling=0)
        super().append_to(stack, item)

    def excuses(self, p: Pending) -> set[str]:
        return {"spent"} if p.spent else set()

    def compare(self, what: str, want: Any, got: Any) -> None:
        if what == "hook":  # gradients of weights come when backward is done; second ones run backward's hooks again
            want, got = ({k: v for k, v in sorted(log.items()) if "backward" not in k} for log in (want, got))
        super().compare(what, want, got)


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
SHORT = settings(max_examples=80, stateful_step_count=15, deadline=None, derandomize=True, suppress_health_check=QUIET)
LONG = settings(
    SHORT,
    max_examples=int(os.environ.get("REVLIB_FUZZ_EXAMPLES", "500")),
    stateful_step_count=30,
    derandomize=False,
    print_blob=True,
)


@pytest.mark.parametrize("machine", [Machine, Pure])
def test_random_programs(machine):
    run_state_machine_as_test(machine, settings=SHORT)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("machine", [Machine, Pure])
def test_many_random_programs(machine):
    """Two minutes; REVLIB_FUZZ_EXAMPLES=15000 for an hour or so each."""
    run_state_machine_as_test(machine, settings=LONG)
