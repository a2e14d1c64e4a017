"""Faults that a review found once, each by its smallest case."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from common import Lambda, every_recomputing_scheduler, leaves, loss, mlp, net
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from revlib import (
    Additive,
    Anchored,
    Budget,
    Checkpoint,
    Coupling,
    ExactAdditive,
    Functional,
    Naive,
    Reversible,
    ReversibleSequence,
    Step,
    reversible,
)
from revlib.testing import LiveBytes


class Auxiliary(nn.Module):
    """Leaves a loss of its own behind, as an attribute."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = mlp(), nn.Linear(4, 1)

    def forward(self, x):
        self.aux = self.head(x).square().mean()
        return self.inner(x)


def test_a_function_that_calls_its_own_bound_method():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.fn = self.implementation

        def implementation(self, x):
            return self.linear(x).sin()

        def forward(self, x):
            return self.fn(x)

    loss(net(Reversible(), Recursive)(*leaves())).backward()


@every_recomputing_scheduler
def test_an_optimizer_step_between_an_auxiliary_and_the_main_loss(scheduler):
    stack = net(scheduler, Auxiliary)
    outputs = stack(*leaves())
    stack[0].F.aux.backward()
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(outputs).backward()


def test_a_stream_edited_after_an_auxiliary_loss_opened_it():
    stack, xs = net(Checkpoint(), Auxiliary), leaves()
    xs = [x + 0 for x in xs]
    outputs = stack(*xs)
    stack[0].F.aux.backward(retain_graph=True)
    with torch.no_grad():
        xs[1].add_(1e-9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(outputs).backward()


def test_a_model_whose_attribute_holds_its_graph_dies_with_it():
    def model():
        stack = net(Reversible(), Auxiliary)
        loss(stack(*leaves())).backward()
        return weakref.ref(stack[0].F.inner)

    found = model()
    gc.collect()
    assert found() is None


def test_a_stream_that_comes_back_as_nan_is_an_error():
    class Underflowing(Coupling):
        def merge(self, s, f):
            return s * torch.exp(f - 800) + f

        def unmerge(self, merged, f):
            return (merged - f) / torch.exp(f - 800)

    stack = ReversibleSequence([Step(mlp(), Underflowing()) for _ in range(3)]).double()
    with pytest.raises(RuntimeError, match="recovered what enters"):
        loss(stack(*leaves())).backward()


def test_a_first_stream_that_no_function_sees_may_be_tiny():
    stack = net(Reversible(), dtype=torch.float32)
    x1, x2 = leaves(16, 4, dtype=torch.float32)
    loss(stack((1e-5 * x1).detach().requires_grad_(), x2)).backward()


def test_asking_for_a_low_step_first_does_not_store_those_above_it():
    x = torch.randn(16, 512, 4, requires_grad=True)
    peaks = []
    for depth in (4, 16):
        stack = net(Reversible(), mlp, depth, torch.float32)
        stack[0].F = Auxiliary()
        with LiveBytes([x, *stack.parameters()]) as live:
            outputs = stack(x, x)
            stack[0].F.aux.backward(retain_graph=True)
            del outputs
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


@every_recomputing_scheduler
def test_a_coupling_that_saves_tensors_on_a_first_stream_without_gradient(scheduler):
    class Scaling(Coupling):
        def merge(self, s, f):
            return s * f.exp()

        def unmerge(self, merged, f):
            return merged * (-f).exp()

    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        stack = ReversibleSequence([Step(mlp(), Scaling()) for _ in range(2)], scheduler=s).double()
        x1, x2 = leaves()
        loss(stack(x1.detach(), x2)).backward()
        found.append([x2.grad, *(p.grad for p in stack.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


class SavesRubbish(torch.autograd.Function):
    """As attention kernels do: a seed that nobody has written where nothing is drawn, and infinities as padding."""

    seeds = itertools.count()

    @staticmethod
    def forward(ctx, x):
        seed = torch.tensor(next(SavesRubbish.seeds) * 2**40)
        ctx.save_for_backward(x, x.new_full((3,), torch.inf), seed)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Checkpoint(2), Anchored(2)], ids=str)
def test_saved_seeds_and_infinities_are_no_error(scheduler):
    """On a GPU the loop check once compared attention's seed."""
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        xs = leaves()
        loss(reversible([(SavesRubbish.apply, torch.cos)] * 3, *xs, scheduler=s)).backward()
        found.append([x.grad for x in xs])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


def test_a_saved_infinity_that_does_not_come_back_is_an_error():
    signs = itertools.cycle([1, -1])

    class Flipping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_full((3,), next(signs) * torch.inf))
            return x.sin()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    with pytest.raises(RuntimeError, match="recovered what enters"):
        loss(reversible([(Flipping.apply, torch.cos)], *leaves(), scheduler=Checkpoint())).backward()


def test_what_does_not_come_back_beside_an_infinity_is_an_error():
    calls = itertools.count(1.0)

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_tensor([torch.inf, next(calls)]))
            return x.sin()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    with pytest.raises(RuntimeError, match="recovered what enters"):
        loss(reversible([(Counting.apply, torch.cos)], *leaves(), scheduler=Checkpoint())).backward()


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("when", ["added", "removed"])
@pytest.mark.parametrize("coupling", [Additive(), ExactAdditive()], ids=str)
@every_recomputing_scheduler
def test_forward_hooks_that_come_or_go_before_backward(scheduler, coupling, when, kind):
    """Layer norm hides a scaled stream from its step's result, and so from the loop check."""
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        f, xs = mlp(), leaves(dtype=torch.float32)
        stack = ReversibleSequence([Step(f, coupling), Step(mlp(), coupling)], scheduler=s)
        scaled = (lambda m, a: 0.75 * a[0]) if "pre" in kind else (lambda m, a, y: 0.75 * y)
        if when == "removed":
            handle = getattr(f, kind)(scaled)
            total = loss(stack(*xs))
            handle.remove()
        else:
            total = loss(stack(*xs))
            handle = getattr(f, kind)(scaled)
        total.backward()
        assert len(f._forward_pre_hooks) + len(f._forward_hooks) == (when == "added")
        found.append([*(x.grad for x in xs), *(p.grad for p in stack.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


@every_recomputing_scheduler
def test_an_exception_in_a_users_hook_leaves_no_activation_in_a_retained_graph(scheduler):
    def refuse(g):
        raise ArithmeticError

    stack = net(scheduler)
    x = torch.randn(64, 4, dtype=torch.float64)
    with LiveBytes([x, *stack.parameters()]) as live:
        outputs = stack(x, x)
        total, held = loss(outputs), live.now
        handle = stack[1].F[1].weight.register_hook(refuse)
        for _ in range(3):
            with pytest.raises(ArithmeticError):
                total.backward(retain_graph=True)
            stack.zero_grad()
            torch.ones((), requires_grad=True).square().backward()  # autograd lets go of what it had queued
        handle.remove()
        assert live.now <= held + 1024
        total.backward()


@pytest.mark.parametrize("place", ["step", "everywhere"])
@every_recomputing_scheduler
def test_forward_hooks_of_a_step_and_of_all_modules_that_go_before_backward(scheduler, place):
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        f, xs = mlp(), leaves(dtype=torch.float32)
        stack = ReversibleSequence([Step(f), Step(mlp())], scheduler=s)
        if place == "step":
            handle = stack[0].register_forward_pre_hook(lambda m, a: 0.75 * a[0])
        else:
            handle = register_module_forward_pre_hook(lambda m, a, f=f: 0.75 * a[0] if m is f else None)
        total = loss(stack(*xs))
        handle.remove()
        total.backward()
        assert not nn.modules.module._global_forward_pre_hooks and not stack[0]._forward_pre_hooks
        found.append([*(x.grad for x in xs), *(p.grad for p in stack.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


VIEWS = {
    "expanded": lambda x: (x[:1].expand(4, -1, -1),) * 2,
    "every other": lambda x: (x[:, ::2, ::2],) * 2,
    "a third": lambda x: x.repeat(1, 1, 3).chunk(3, dim=-1)[:2],
    "transposed": lambda x: (x.transpose(1, 2), x.transpose(1, 2)),
    "expanded and sliced": lambda x: (x[:, :1, ::2].expand(-1, 6, -1), x[:, :, ::2]),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("coupling", [Additive(), ExactAdditive()], ids=str)
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Checkpoint(2), Anchored(2)], ids=str)
def test_streams_that_are_views_of_any_layout(scheduler, coupling, view):
    """Linear layers save other tensors for an expanded or a sliced input than for one in a piece."""
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        x = torch.randn(4, 6, 6, dtype=torch.float64, requires_grad=True)
        streams = VIEWS[view](x)
        width = streams[0].shape[-1]
        pairs = [(nn.Linear(width, width), nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)))] * 2
        stack = ReversibleSequence(pairs, coupling, s).double()
        loss(stack(*streams)).backward()
        found.append([x.grad, *(p.grad for p in stack.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))


def test_streams_that_overlap_or_lie_far_apart():
    """They come back in a piece; functions here do not mind."""
    found = []
    for s in (Naive(), Reversible()):
        torch.manual_seed(0)
        x = torch.randn(4, 300, dtype=torch.float64, requires_grad=True)
        streams = x[:, :12].unfold(1, 6, 2), x[:, ::60].unsqueeze(1).transpose(1, 2)[:, :4].expand(-1, -1, 6)
        loss(reversible([(torch.sin, torch.cos)] * 2, *streams, scheduler=s)).backward()
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- the situation matrix
def by_naive(scheduler, play):
    """What it returns, under both."""
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        found.append(play(s))
    return found


def same(got, want):
    return all(torch.allclose(g, w, rtol=1e-10, atol=1e-13) for g, w in zip(got, want, strict=True))


@every_recomputing_scheduler
def test_the_function_of_a_step_replaced_before_backward(scheduler):
    def play(s):
        stack, xs = ReversibleSequence([Step(mlp()), Step(mlp())], scheduler=s).double(), leaves()
        total = loss(stack(*xs))
        stack[0].fn, old = mlp().double(), stack[0].fn
        total.backward()
        return [old[1].weight.grad, *(x.grad for x in xs)]

    assert same(*by_naive(scheduler, play))


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Checkpoint(every=2)], ids=repr)
def test_constants_that_a_function_makes_and_keeps(scheduler):
    """A repetition makes others, which are no captured tensors that somebody has replaced."""
    kept: list[torch.Tensor] = []

    def gated(m, x):
        kept.extend([(torch.rand(4) < 0.7).double(), x.detach().mean(-1, keepdim=True)])
        kept.append(1e-9 * (1e11 * x.detach()).sin())  # the last digits of a stream, which may come back as others
        return 1e-3 * (m(x) * kept[-1]) + (m(x) * kept[-3] * kept[-2] * torch.arange(4)).sin()

    def play(scheduler):
        pairs = [(Lambda(gated, mlp()), Lambda(gated, mlp())) for _ in range(2)]
        stack, xs = ReversibleSequence(pairs, scheduler=scheduler).double(), leaves()
        loss(stack(*xs)).backward()
        return [*(x.grad for x in xs), *(p.grad for p in stack.parameters())]

    assert same(*by_naive(scheduler, play))


def test_a_captured_table_of_indices_replaced():
    """Whole numbers, of which one in a thousand differs. The repetition gets the table of forward."""

    def play(scheduler):
        table = {"of": torch.arange(1000) % 4}
        functions = [(lambda x: x[:, table["of"]].sum(-1, keepdim=True), torch.sin)]
        xs = leaves()
        total = loss(reversible(functions, *xs, scheduler=scheduler))
        table["of"] = table["of"].index_fill(0, torch.tensor(517), 3)
        total.backward()
        assert table["of"][517] == 3
        return [x.grad for x in xs]

    assert same(*by_naive(Checkpoint(), play))


def test_a_captured_table_replaced_where_nobody_can_put_it_back():
    """It comes out of a cache of functools. The last activations are those of other tables."""
    tables = {i: torch.ones(4, dtype=torch.float64) for i in range(5)}
    look_up = functools.lru_cache(lambda i: tables[i])
    linear, xs = nn.Linear(4, 4).double(), leaves()
    functions = [(lambda x: sum(linear(x) * look_up(i) for i in range(5)), torch.sin)]
    total = loss(reversible(functions, *xs, scheduler=Checkpoint()))
    tables[0] = 2 * tables[0]
    look_up.cache_clear()
    with pytest.raises(RuntimeError, match="recovered what enters"):
        total.backward()


@pytest.mark.parametrize("shift", [0.0, 1e-5])
def test_a_captured_table_that_grew(shift):
    """Of which a part is used, the same as before or another. The repetition gets the table of forward."""

    def play(scheduler):
        table = {"of": torch.arange(8.0, dtype=torch.float64)}
        functions = [(lambda x: x * table["of"][2:6] + x.sin() * x.cos(), torch.sin)] * 2
        xs = leaves()
        total = loss(reversible(functions, *xs, scheduler=scheduler))
        table["of"] = torch.arange(9.0, dtype=torch.float64) + shift
        total.backward()
        return [x.grad for x in xs]

    assert same(*by_naive(Checkpoint(), play))


@pytest.mark.parametrize("coupling", [Additive(), ExactAdditive()], ids=repr)
def test_an_exact_stack_within_a_stack(coupling):
    """It starts from what the other recovers, which is exact if the other is."""

    def play(scheduler):
        inner = [ReversibleSequence([(mlp(), mlp())], coupling=ExactAdditive(), scheduler=scheduler) for _ in range(24)]
        nested = [Lambda(lambda m, x: m(x, x.cos())[1], m) for m in inner]
        stack = ReversibleSequence(
            [*zip(nested[::2], nested[1::2], strict=True)], coupling=coupling, scheduler=scheduler
        )
        xs = [torch.randn(64, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        loss(stack.double()(*xs)).backward()
        return [*(x.grad for x in xs), *(p.grad for p in stack.parameters())]

    want, got = by_naive(Reversible(), play)
    if isinstance(coupling, ExactAdditive):
        assert all(map(torch.equal, got, want))
    assert same(got, want)


def test_an_exact_stack_within_an_exact_stack_has_no_tolerance():
    """The third call is that of the inner stack's backward."""
    calls = itertools.count().__next__
    drifting = Lambda(lambda m, x: m(x) + 1e-12 * (calls() == 2), mlp())
    inner = ReversibleSequence([(drifting, mlp())], coupling=ExactAdditive())
    nested = Lambda(lambda m, x: m(x, x.cos())[1], inner)
    stack = ReversibleSequence([(nested, mlp())], coupling=ExactAdditive()).double()
    with pytest.raises(RuntimeError, match="where 0 is tolerated"):
        loss(stack(*leaves())).backward()


def test_an_attribute_holds_no_graph_of_an_earlier_pass():
    stack = ReversibleSequence([(Keeping(), mlp())], scheduler=Reversible())
    loss(stack(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4))).backward()
    first = weakref.ref(stack[0].F.last)
    ys = stack(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4))
    assert first() is None
    del ys


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), torch.zeros(())

    def forward(self, x):
        self.last = self.linear(x).sin()
        return self.last


@pytest.mark.parametrize("around", ["a stack", "a checkpoint"])
def test_a_budget_that_is_run_again_by_somebody_else(around):
    """Its second run had another plan than its first, which it had measured."""

    def play(s):
        budget, xs = (Budget(fraction=0.5) if s != Naive() else s), leaves(3, 8)
        inner = net(budget, depth=2)

        def split(x):
            return torch.cat(inner(*x.chunk(2, -1)), -1)

        for _ in range(3):
            if around == "a stack":
                y = sum(reversible([(split, split)], *xs, scheduler=budget))
            else:
                y = checkpoint(split, xs[0] + xs[1], use_reentrant=False)
            y.sin().sum().backward()
        return [x.grad for x in xs]

    assert same(*by_naive(Budget(fraction=0.5), play))


class Offset(nn.Module):
    """Learns nothing but an offset of its stream's own shape, as prompt and position tuning do."""

    def __init__(self):
        super().__init__()
        self.layer, self.offset = nn.Linear(4, 4).requires_grad_(False), nn.Parameter(torch.zeros(1, 3, 4))

    def forward(self, x):
        return self.layer(x) + self.offset


@pytest.mark.parametrize("streams", ["sums", "leaves"])
@pytest.mark.parametrize(
    "scheduler",
    [Naive(), Reversible(), Checkpoint(), Anchored(2), Budget(fraction=0.5), Functional()],
    ids=lambda s: type(s).__name__,
)
def test_no_two_leaves_share_the_memory_of_their_gradients(scheduler, streams):
    torch.manual_seed(0)
    stack = ReversibleSequence([(Offset(), Offset()) for _ in range(2)], scheduler=scheduler)
    table, x = nn.Parameter(torch.randn(1, 3, 4)), torch.randn(1, 3, 4)
    all_leaves = [table, *(p for p in stack.parameters() if p.requires_grad)]
    after = []
    for _ in range(2):
        y = stack(table, x) if streams == "leaves" else stack(x + table, x)
        (y[0] * y[1]).sum().backward()
        after.append([p.grad.clone() for p in all_leaves])
        memory = [p.grad.untyped_storage().data_ptr() for p in all_leaves]
        assert len(set(memory)) == len(memory)
    for once, twice in zip(*after, strict=True):
        torch.testing.assert_close(twice, 2 * once)
