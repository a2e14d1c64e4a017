"""What lives how long: nothing outlives its graph, and memory does not grow with depth or time."""

import gc
import weakref

import pytest
import torch
from common import Counter, every_recomputing_scheduler, every_scheduler, examples, leaves, loss, mlp, net, vit_block
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Checkpoint, Naive, Reversible, ReversibleSequence, engine, reversible
from revlib.core import tape
from revlib.testing import LiveBytes, assert_memory_flat, footprint

# ---------------------------------------------------------------------------------------------- reference counts
REFS = []  # A global, which no repetition puts back.


@pytest.fixture
def alive(monkeypatch):
    """Names of what is still alive of the tapes, records and activations that a test made, by reference count alone."""
    REFS.clear()

    def watch(name, thing):
        # Of a tensor its storage, which outlives it in every detached or saved copy.
        REFS.append((name, weakref.ref(thing.untyped_storage() if isinstance(thing, torch.Tensor) else thing)))
        return thing

    for module, kind in ((engine, "Tape"), (tape, "StepRecord")):
        make = getattr(module, kind)
        monkeypatch.setattr(module, kind, lambda *args, make=make, kind=kind, **kw: watch(kind, make(*args, **kw)))
    gc.collect()
    gc.disable()
    found = lambda: sorted({name for name, ref in REFS if ref() is not None})  # noqa: E731
    found.watch = watch
    found.names = lambda: {name for name, _ in REFS}
    yield found
    gc.enable()


def watched_net(alive, scheduler, dropout=0.2):
    """A stack whose activations are watched, in forward and in backward; and watched streams."""

    def watch(module, args, output):
        alive.watch(f"an activation of {type(module).__name__}", output)
        for t in args:
            alive.watch("a stream", t)

    stack = net(scheduler, lambda: mlp(dropout=dropout))
    for module in stack.modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.GELU)):
            module.register_forward_hook(watch)
    return stack


def everything_died(alive):
    assert alive.names() >= {"a stream", "an activation of Linear"}, "nothing was watched"
    assert alive() == []


@every_scheduler
def test_everything_dies_with_the_outputs_after_backward(alive, scheduler):
    stack, xs = watched_net(alive, scheduler), leaves()
    outputs = stack(*xs)
    loss(outputs).backward()
    del outputs
    del xs
    everything_died(alive)


@every_recomputing_scheduler
def test_backward_releases_activations_while_the_outputs_live(alive, scheduler):
    stack, xs = watched_net(alive, scheduler), leaves()
    outputs = stack(*xs)
    loss(outputs).backward()
    assert "an activation of Linear" in alive.names(), "nothing was watched"
    assert {name for name in alive() if "activation" in name} == set()


@every_recomputing_scheduler
def test_forward_keeps_no_activation(alive, scheduler):
    stack = watched_net(alive, scheduler)
    outputs = stack(*leaves())
    assert {name for name in alive() if "activation" in name} == set()
    assert outputs[0].requires_grad


@every_scheduler
def test_everything_dies_with_the_outputs_when_there_is_no_backward(alive, scheduler):
    stack = watched_net(alive, scheduler)
    stack(*leaves())
    everything_died(alive)


@every_scheduler
def test_everything_dies_when_a_part_of_the_outputs_is_never_used(alive, scheduler):
    stack = watched_net(alive, scheduler)
    first, second = stack(*leaves())
    first.sum().backward()
    del first, second
    everything_died(alive)


@every_scheduler
def test_everything_dies_after_passes_over_a_retained_graph(alive, scheduler):
    stack, xs = watched_net(alive, scheduler), leaves()
    total = loss(stack(*xs))
    for _ in range(2):
        torch.autograd.grad(total, xs, retain_graph=True)
        total.backward(retain_graph=True)
    del total, xs
    everything_died(alive)


@every_recomputing_scheduler
def test_a_retained_graph_keeps_no_activation_between_its_passes(alive, scheduler):
    stack, xs = watched_net(alive, scheduler), leaves()
    total = loss(stack(*xs))
    total.backward(retain_graph=True)
    assert {name for name in alive() if "activation" in name} == set()
    total.backward()


@every_recomputing_scheduler
def test_looking_at_a_saved_tensor_leaves_no_activation(alive, scheduler):
    stack = watched_net(alive, scheduler)
    node = stack(*leaves())[0].grad_fn
    while not hasattr(node, "_saved_mat1"):
        node = next(n for n, _ in reversed(node.next_functions) if n is not None)
    assert node._saved_mat1.shape == (3, 8)
    assert {name for name in alive() if "activation" in name} == set()


@every_scheduler
def test_everything_dies_after_double_backward(alive, scheduler):
    stack, xs = watched_net(alive, scheduler), leaves()
    first = torch.autograd.grad(loss(stack(*xs)), xs, create_graph=True)
    grads = torch.autograd.grad(sum(g.square().sum() for g in first), xs)
    del first, grads, xs
    everything_died(alive)


class Watched(nn.Module):
    """Raises at the calls it is told to; its activations are watched."""

    def __init__(self, alive, raise_at):
        super().__init__()
        self.linear, self.alive = nn.Linear(4, 4), alive
        self.counter = Counter(lambda x: x, raise_at)

    def forward(self, x):
        self.alive.watch("a stream", x)
        h = self.alive.watch("an activation of Linear", self.linear(x))
        return self.counter(h).tanh()


class Telling(nn.Module):
    """Keeps a loss as an attribute, which nobody need differentiate: its graph leads back to the module."""

    def __init__(self, alive):
        super().__init__()
        self.linear, self.head, self.alive = nn.Linear(4, 4), nn.Linear(4, 1), alive

    def forward(self, x):
        self.alive.watch("a stream", x)
        self.told = self.head(x).square().sum()
        return self.alive.watch("an activation of Linear", self.linear(x)).tanh()


@every_scheduler
def test_a_module_that_keeps_a_part_of_the_graph_dies_after_backward(alive, scheduler):
    stack, xs = ReversibleSequence([(Telling(alive), Telling(alive))] * 2, scheduler=scheduler).double(), leaves()
    loss(stack(*xs)).backward()
    assert stack[0].F.told.requires_grad
    del stack, xs
    everything_died(alive)


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("raise_at", [1, 2], ids=["in forward", "in backward"])
@every_recomputing_scheduler
def test_everything_dies_after_an_exception_in_a_function(alive, scheduler, raise_at, retain_graph):
    def play():
        stack = ReversibleSequence(
            [(Watched(alive, 0), Watched(alive, raise_at)), (Watched(alive, 0), Watched(alive, 0))],
            scheduler=scheduler,
        ).double()
        loss(stack(*leaves())).backward(retain_graph=retain_graph)

    raised = False
    try:
        play()
    except ArithmeticError:
        raised = True
    assert raised
    everything_died(alive)


@every_recomputing_scheduler
def test_an_exception_in_a_retained_pass_leaves_no_activation(alive, scheduler):
    stack = ReversibleSequence(
        [(Watched(alive, 0), Watched(alive, 2)), (Watched(alive, 0), Watched(alive, 0))], scheduler=scheduler
    ).double()
    total = loss(stack(*leaves()))
    raised = False
    try:
        total.backward(retain_graph=True)
    except ArithmeticError:
        raised = True
    torch.ones((), requires_grad=True).square().backward()
    assert raised
    assert {name for name in alive() if "activation" in name} == set()


@every_scheduler
def test_everything_dies_after_an_exception_in_a_hook(alive, scheduler):
    def refuse(g):
        raise ArithmeticError

    def play():
        stack, xs = watched_net(alive, scheduler), leaves()
        stack[1].F[1].weight.register_hook(refuse)
        loss(stack(*xs)).backward()

    raised = False
    try:
        play()
    except ArithmeticError:
        raised = True
    assert raised
    # The engine of autograd itself holds what it had queued, until its next backward.
    torch.ones((), requires_grad=True).square().backward()
    everything_died(alive)


@every_recomputing_scheduler
def test_a_stack_works_again_after_an_exception_in_backward(scheduler):
    failing = Watched(type("", (), {"watch": staticmethod(lambda name, t: t)}), 2)
    stack = ReversibleSequence([(mlp(), failing), (mlp(), mlp())], scheduler=scheduler).double()
    xs = leaves()
    total = loss(stack(*xs))
    with pytest.raises(ArithmeticError):
        total.backward(retain_graph=True)
    got = torch.autograd.grad(total, xs)
    want = torch.autograd.grad(loss(stack(*xs)), xs)
    assert all(torch.allclose(g, w, rtol=1e-10) for g, w in zip(got, want, strict=True))


@every_recomputing_scheduler
def test_an_optimizers_step_frees_nothing_late(scheduler):
    """No reference cycle is made by training: the garbage collector finds nothing."""
    stack = net(scheduler, lambda: mlp(dropout=0.2))
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss(stack(*leaves())).backward()
        optimizer.step()

    step()
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        step()
        gc.collect()
        assert not [t for t in gc.garbage if "revlib" in type(t).__module__ or isinstance(t, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@examples(12)  # each collects the garbage of the whole process
@given(st.integers(1, 6), st.booleans(), st.sampled_from([Reversible(), Checkpoint(), Naive()]))
def test_training_leaves_as_many_bytes_as_it_found(depth, retain_graph, scheduler):
    stack, xs = net(scheduler, lambda: mlp(dropout=0.2), depth=depth), leaves(16, 4)
    for t in (*xs, *stack.parameters()):
        t.grad = torch.zeros_like(t)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes([*xs, *stack.parameters(), *(t.grad for t in (*xs, *stack.parameters()))]) as live:
            loss(stack(*xs)).backward(retain_graph=retain_graph)
            assert live.peak > 0 and live.now == 0
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------- memory
BATCH, TOKENS, WIDTH = 8, 197, 192
UNIT = BATCH * TOKENS * WIDTH * 4


def vit(depth, scheduler=None):
    return ReversibleSequence([vit_block(WIDTH) for _ in range(depth)], scheduler=scheduler or Reversible())


def vit_streams():
    return [torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True) for _ in range(2)]


def in_units(stack, streams):
    found = footprint(stack, streams, stack.parameters())
    return found.held / UNIT, found.peak / UNIT


@pytest.mark.parametrize("depth", [4, 12])
def test_a_vit_trains_in_two_streams_and_the_activations_of_one_function(depth):
    held, peak = in_units(vit(depth), vit_streams())
    assert held <= 2.1
    assert peak <= 17.6


def test_the_measure_sees_what_naive_and_checkpoint_keep():
    """16 stream tensors a block, and one a step: measures that see less prove nothing."""
    streams = vit_streams()
    naive, checkpoint = [[in_units(vit(d, s), streams)[0] for d in (2, 4)] for s in (Naive(), Checkpoint())]
    assert 15 < (naive[1] - naive[0]) / 2 < 17
    assert 1.9 < (checkpoint[1] - checkpoint[0]) / 2 < 2.1


@pytest.mark.slow
def test_memory_is_flat_from_4_to_64_blocks():
    streams = vit_streams()
    assert_memory_flat(vit, *streams, depths=(4, 12, 24, 48, 64))
    assert max(in_units(vit(64), streams)) <= 17.6


@pytest.mark.slow
def test_a_thousand_blocks_peak_within_three_percent_of_twelve():
    x = torch.randn(8, 197, 96)
    peaks = []
    for depth in (12, 1000):
        stack = ReversibleSequence(vit_block(96, 3) for _ in range(depth))
        peaks.append(footprint(lambda a, stack=stack: stack(a, a), [x], stack.parameters()).peak)
        assert all(p.grad.isfinite().all() for p in stack.parameters())
    assert peaks[1] < 1.03 * peaks[0]


def peak_of(scheduler, depth, differentiate):
    """Bytes at the peak of ``differentiate(loss, streams)``, gradients not counted where they are allocated before."""
    stack = ReversibleSequence([(mlp(16), mlp(16)) for _ in range(depth)], scheduler=scheduler)
    xs = [torch.randn(512, 16, requires_grad=True) for _ in range(2)]
    for t in (*xs, *stack.parameters()):
        t.grad = torch.zeros_like(t)
    known = [*xs, *stack.parameters()]
    gc.collect()
    with LiveBytes([*known, *(t.grad for t in known)]) as live:
        total = loss(stack(*xs))
        live.peak = live.now
        differentiate(total, xs)
    return live.peak


def test_kept_states_are_released_on_the_way_down():
    stack = ReversibleSequence([(mlp(16), mlp(16)) for _ in range(16)], scheduler=Checkpoint())
    xs = [torch.randn(512, 16, requires_grad=True) for _ in range(2)]
    with LiveBytes([*xs, *stack.parameters()]) as live:
        total = sum(y.sum() for y in stack(*xs))
        held, at_the_end = live.now, []
        xs[1].register_hook(lambda g: at_the_end.append(live.now))
        total.backward()
    assert held > 30 * xs[0].nbytes
    assert at_the_end[0] < held / 2


PASSES = {
    "retain_graph": lambda total, xs: [total.backward(retain_graph=True) for _ in range(2)],
    "backward": lambda total, xs: total.backward(),
    "then a last pass": lambda total, xs: [total.backward(retain_graph=r) for r in (True, False)],
    "grad of the streams": lambda total, xs: torch.autograd.grad(total, xs),
    "inputs=": lambda total, xs: total.backward(inputs=xs),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("differentiate", PASSES.values(), ids=PASSES)
def test_memory_is_flat_in_depth_however_one_differentiates(differentiate):
    shallow, deep = (peak_of(Reversible(), depth, differentiate) for depth in (4, 32))
    naive = [peak_of(Naive(), depth, differentiate) for depth in (4, 32)]
    assert naive[1] > 6 * naive[0], "the measure does not see what naive autograd keeps"
    # 28 more blocks may cost their samples, before and after: 128 elements of each stream, and 16 of an activation.
    assert deep - shallow < 28 * 2 * 4 * (128 + 16) * 2
    assert deep < 0.2 * naive[1]


def test_memory_is_flat_with_frozen_functions():
    def make(depth):
        stack = ReversibleSequence([(mlp(16), mlp(16)) for _ in range(depth)])
        for pair in list(stack)[::2]:
            pair.requires_grad_(False)
        return stack

    assert_memory_flat(make, *[torch.randn(16384, 16, requires_grad=True) for _ in range(2)], depths=(4, 32))


@every_recomputing_scheduler
def test_nothing_grows_over_80_steps_of_training(scheduler):
    stack = net(scheduler, lambda: mlp(dropout=0.2), depth=2)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.01)
    objects, bytes_ = [], []
    gc.collect()
    with LiveBytes(stack.parameters()) as live:
        for i in range(80):
            loss(stack(*(x.detach() for x in leaves()))).backward()
            optimizer.step()
            optimizer.zero_grad()
            bytes_.append(live.now)
            if i in (20, 79):
                gc.collect()
                objects.append(len(gc.get_objects()))
    assert set(bytes_[1:]) == {bytes_[1]}
    # This list itself, and what pytest and the interpreter do meanwhile.
    assert objects[1] - objects[0] < 50


def test_functions_are_not_kept_alive_by_the_graph_of_others():
    """A stack of plain functions captures what they capture only as long as its graph lives."""
    captured = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    ref = weakref.ref(captured)
    xs = leaves()
    total = loss(reversible([(lambda x, w=captured: x @ w, torch.sin)], *xs))
    total.backward()
    del captured, total
    gc.collect()
    assert ref() is None
