"""What schedulers keep: bytes counted, evaluations counted, and gradients equal to the oracle's."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from common import ByHand, Counter, error, examples, grads, leaves, loss, mlp, net, vit_block
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Anchored, Budget, Checkpoint, KeepLast, Naive, PaReprop, Reversible, ReversibleSequence, Step
from revlib.schedulers import Plan, Scheduler
from revlib.testing import LiveBytes, assert_memory_flat, assert_same_gradients, footprint, strategies


def vits(depth, scheduler=None, width=64):
    torch.manual_seed(0)
    return ReversibleSequence([vit_block(width, 2) for _ in range(depth)], scheduler=scheduler)


def stream(width=64):
    return torch.randn(2, 33, width)


def units(stack, x, scheduler, passes=1):
    """(held, peak) in stream tensors, once what the scheduler measures is known."""
    stack.scheduler = scheduler

    def run(x):
        return stack(x * 1, x * 1)  # made anew, so that they count where the stack keeps them

    for _ in range(passes):
        loss(run(x)).backward()
    found = footprint(run, [x], stack.parameters())
    return found.held / x.nbytes, found.peak / x.nbytes


# ---------------------------------------------------------------------------------------------- plans
def test_plans():
    assert Checkpoint().plan(4) == Plan(states=(3,), streams=range(3, -1, -1))
    assert list(Checkpoint(2).plan(6).streams) == [5, 3, 1]
    assert Anchored(4).plan(10).states == [4, 8, 10]
    assert KeepLast(2).plan(6) == Plan(activations=[4, 5], states=(4,))
    assert KeepLast(9).plan(6) == Plan(activations=range(6))
    assert KeepLast(2, Anchored(2)).plan(6) == Plan(activations=[4, 5], states=[2, 4])


@given(strategies.schedulers(), st.integers(0, 12))
def test_every_plan_can_be_carried_out(scheduler, length):
    plan = scheduler.plan(length)
    plan.check(length)


@examples(60)
@given(strategies.cases(max_depth=6), strategies.schedulers(), strategies.seeds())
def test_a_second_pass_has_the_gradients_of_naive_too(case, scheduler, seed):
    """By then a budget knows what fits."""
    stack, leaf = copy.deepcopy(case.stack), lambda t: t.detach().requires_grad_(t.requires_grad)
    stack.scheduler = scheduler
    with torch.random.fork_rng():
        outputs = stack(*map(leaf, case.streams), **case.context)
        if any(y.requires_grad for y in outputs):
            loss(outputs).backward()
    assert_same_gradients(case.stack, *case.streams, context=case.context, schedulers=[scheduler], seed=seed)


@pytest.mark.parametrize(
    "scheduler", [Checkpoint(2), Checkpoint(3), Anchored(3), KeepLast(3), KeepLast(3, Checkpoint(2))]
)
@pytest.mark.parametrize("order", [(0, 3, 5), (5, 0, 3), (3, 5, 0), (5, 3, 0)])
@pytest.mark.parametrize("retain", [False, True])
def test_auxiliary_losses_in_any_order(scheduler, order, retain):
    """Each step tells of what it saw; the losses on it go backward one by one."""

    class Telling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp()

        def forward(self, x):
            y = self.layer(x)
            self.told = y.tanh().square().sum()
            return y

    found = []
    for s in (ByHand(), scheduler):
        torch.manual_seed(0)
        stack, xs = ReversibleSequence([Step(Telling()) for _ in range(6)], scheduler=s).double(), leaves()
        outputs = stack(*xs)
        for k in order:
            # The losses share a graph below, so by hand it must be kept; so it must here.
            stack[k].fn.told.backward(retain_graph=True)
        loss(outputs).backward(retain_graph=retain)
        found.append(grads(*xs, stack))
    assert error(found[1], found[0]) < 1e-10


# ---------------------------------------------------------------------------------------------- evaluations
def counted(stack):
    """Put counters of whole evaluations into the functions of a stack."""
    ends = []
    for k, branch in enumerate(stack.bound_steps):
        branch.fn.register_forward_hook(lambda *_, k=k, note=ends.append: note(k))
    return ends


@pytest.mark.parametrize(
    ("scheduler", "again"),
    [
        (Naive(), []),
        (Reversible(), [5, 4, 3, 2, 1, 0]),
        (Checkpoint(), []),
        (Checkpoint(2), [4, 2, 0]),
        (Anchored(4), [3, 2, 1, 0]),  # streams 4 and 5 are those of state 4
        (KeepLast(2), [3, 2, 1, 0]),
        (KeepLast(2, Checkpoint(2)), [2, 0]),
    ],
)
def test_functions_are_evaluated_to_their_end_only_to_invert(scheduler, again):
    stack = net(scheduler)
    ends, outputs = counted(stack), stack(*leaves())
    ends.clear()
    loss(outputs).backward()
    assert ends == again


def test_a_step_stops_where_its_activations_are_complete():
    """The second linear layer of an MLP saves its input; its result is needed only to invert."""
    runs = []
    note = runs.append  # out of sight of the guards, which put lists back

    class Last(nn.Linear):
        def forward(self, x):
            note("started")
            y = super().forward(x)
            note("ended")
            return y

    stack = net(Checkpoint(), lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), Last(8, 4)))
    outputs = stack(*leaves())
    runs.clear()
    loss(outputs).backward()
    assert runs == ["started"] * 6


def normalised():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5))


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_stops_early_leaves_no_trace(every):
    """Random numbers, batch norm's statistics and attributes are as if it had not run."""
    found = []
    for s in (ByHand(), Checkpoint(every)):
        torch.manual_seed(0)
        stack, xs = net(s, normalised), leaves()
        loss(stack(*xs)).backward()
        found.append([*grads(*xs, stack), *stack.buffers(), torch.rand(3)])
    assert error(found[1], found[0]) < 1e-10


# ---------------------------------------------------------------------------------------------- bytes
def test_bytes_kept():
    stack, x = vits(8), stream()
    held = {s: units(stack, x, s)[0] for s in (Reversible(), Checkpoint(), Checkpoint(2), Anchored(4), KeepLast(1))}
    slack = 0.7  # samples of the streams, and statistics of layer norms
    assert held[Reversible()] == pytest.approx(2, abs=slack)  # the outputs
    assert held[Checkpoint(2)] == pytest.approx(2 + 8, abs=slack)  # and what each G is added to
    assert held[Checkpoint()] == pytest.approx(2 + 16, abs=slack)  # and what each F is added to
    assert held[Anchored(4)] == pytest.approx(2 + 6, abs=slack)
    assert held[KeepLast(1)] == pytest.approx(2 + 1 + 9, abs=slack)


def test_keeping_the_last_step_costs_no_peak():
    stack, x = vits(6), stream()
    assert units(stack, x, KeepLast(1))[1] <= units(stack, x, Reversible())[1] + 0.1  # samples


@pytest.mark.parametrize("scheduler", [Checkpoint(2), Anchored(4)])
def test_kept_streams_are_released_on_the_way(scheduler):
    """The peak is at the start of backward, not later: gradients of streams never meet more kept streams than held."""
    stack, x = vits(8), stream()
    reversible, (held, peak) = units(stack, x, Reversible()), units(stack, x, scheduler)
    assert peak - held <= reversible[1] - reversible[0] + 0.1


def test_memory_is_flat_with_the_last_steps_kept():
    assert_memory_flat(lambda depth: vits(depth, KeepLast(2)), stream(), stream(), depths=(3, 12))


@pytest.mark.some(3)
@pytest.mark.parametrize("fraction", [0.15, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("below", [Reversible(), Checkpoint(2)])
def test_a_fraction_of_what_naive_keeps(fraction, below):
    stack, x = vits(12), stream()
    naive, (held, peak) = units(stack, x, Naive()), units(stack, x, Budget(fraction=fraction, below=below))
    outputs = 2  # the loss keeps them, under every scheduler
    assert (held - outputs) / (naive[0] - outputs) == pytest.approx(fraction, rel=0.05)
    assert peak - held <= max(naive[1] - naive[0], units(stack, x, Reversible())[1] - held) + 0.1


@examples(8)  # each measures a stack of ViT blocks
@given(st.integers(14, 150))
def test_a_number_of_bytes(share):
    stack, x = vits(9), stream()
    naive, (held, _) = units(stack, x, Naive()), units(stack, x, Budget(bytes=share * x.nbytes))
    outputs, step = 2, 9  # one output is what the last G has saved, and counts in both
    # Where hardly any step is left to keep the stream of, a whole one may be missing.
    slack = step if share > 110 else 2
    assert min(share, naive[0] - outputs) * 0.95 - slack <= held - outputs <= share * 1.02


def test_everything_fits():
    stack, x = vits(3), stream()
    assert units(stack, x, Budget(bytes=2**40)) == units(stack, x, Naive())
    assert units(stack, x, Budget(fraction=1.0)) == units(stack, x, Naive())


def test_nothing_fits_but_the_last_step_is_kept_all_the_same():
    stack, x = vits(3), stream()
    assert units(stack, x, Budget(bytes=0)) == units(stack, x, KeepLast(1))


def kept_steps(stack, *streams):
    """Runs forward, backward; -> which steps were not evaluated again."""
    again, handles = set(), []
    for k, branch in enumerate(stack.bound_steps):
        handles.append(branch.fn.register_forward_pre_hook(lambda *_, k=k, note=again.add: note(k)))
    outputs = stack(*streams)
    again.clear()
    loss(outputs).backward()
    for handle in handles:
        handle.remove()
    return sorted(set(range(len(stack.bound_steps))) - again)


def test_a_budget_adapts_to_shapes():
    stack, x = vits(4), stream()
    stack.scheduler = Budget(bytes=40 * x.nbytes)
    assert kept_steps(stack, x, x) == []  # measures
    first = kept_steps(stack, x, x)
    assert 0 < len(first) < 8
    wide = torch.cat([x, x])
    assert kept_steps(stack, wide, wide) == []  # measures
    assert 0 < len(kept_steps(stack, wide, wide)) < len(first)
    assert kept_steps(stack, x, x) == first  # still knows
    assert len(kept_steps(stack, x[:1], x[:1])) == 0
    assert len(kept_steps(stack, x[:1], x[:1])) > len(first)


def test_a_budget_reports_what_it_keeps():
    scheduler = Budget(fraction=0.5)
    first, second = (ReversibleSequence([(nn.Tanh(), nn.Tanh())] * n, scheduler=scheduler) for n in (4, 2))
    x = torch.randn(250, 1000, requires_grad=True)  # 1 MB, and as much as a step saves
    assert "nothing has been measured yet" in scheduler.report()
    for _ in range(2):
        y1, y2 = first(x, x)
        sum(y.sum() for y in second(y1[:, :500], y2[:, :500])).backward()
        # Of 8 steps of 1 MB and 4 of 0.5 MB, half. The outputs of the first stack are kept, since it is not all kept.
        assert scheduler.report().splitlines() == [
            "first stream         steps  kept  streams     MB  MB of Naive()  time",
            "(250, 1000) float32      8     1        2    3.0            8.0   3.9",
            "(250, 500) float32       4     4        0    2.0            2.0   3.0",
            "together                12     5        2    5.0           10.0   3.6",
        ]
    stack, x = vits(6), stream()
    held, _ = units(stack, x, Budget(fraction=0.5), passes=2)
    row = stack.scheduler.report().splitlines()[1].split()
    assert float(row[7]) * 1e6 == pytest.approx(held * x.nbytes - 2 * x.nbytes, abs=60_000 + x.nbytes)


class Stages(nn.Module):
    """Two stages at different widths."""

    def __init__(self, scheduler):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = vits(3, scheduler), vits(4, scheduler, 32)
        self.between = nn.Linear(64, 32)

    def forward(self, x):
        return self.second(*(self.between(y) for y in self.first(x, x)))


@pytest.mark.parametrize("calls", [1, 2])
def test_stages_share_a_budget_and_the_last_come_first(calls):
    """Also where a model runs twice before backward."""
    x = stream().requires_grad_()

    def held(scheduler):
        model = Stages(scheduler)
        for _ in range(3):
            with LiveBytes([x, *model.parameters()]) as live:
                outputs = [y for _ in range(calls) for y in model(x)]
                found = live.now - sum(y.nbytes for y in outputs)
                loss(outputs).backward()
            del outputs
        return found

    naive = held(Naive())
    between = calls * (2 * 2 * x.nbytes)  # what the layer between the stages keeps, and its inputs
    for fraction in (0.25, 0.5, 0.75):
        assert held(Budget(fraction=fraction)) == pytest.approx(fraction * naive, abs=0.05 * naive + between)
    model = Stages(Budget(fraction=0.4))
    for _ in range(2):
        loss(model(x)).backward()
    assert model.second.scheduler is model.first.scheduler
    again = set()
    for name, module in (("first", model.first), ("second", model.second)):
        for k, branch in enumerate(module.bound_steps):
            branch.fn.register_forward_pre_hook(lambda *_, name=name, k=k, note=again.add: note((name, k)))
    outputs = model(x)
    again.clear()
    loss(outputs).backward()
    assert ("second", 7) not in again and {("first", k) for k in range(3)} <= again


def test_a_budget_does_not_count_passes_without_gradients():
    stack, x = vits(4), stream()
    stack.scheduler = Budget(fraction=0.5)
    kept_steps(stack, x, x)
    want = kept_steps(stack, x, x)
    for _ in range(3):
        with torch.no_grad():
            stack(x, x)
        assert kept_steps(stack, x, x) == want
    stack(x, x)  # forward without backward, under gradients: as long as this may come again, two must fit
    kept_steps(stack, x, x)
    kept_steps(stack, x, x)
    assert kept_steps(stack, x, x) == want


def test_gradients_with_a_budget_shared_by_stages():
    x, found = stream().double(), []
    for scheduler in (Naive(), Budget(fraction=0.4)):
        model = Stages(scheduler).double()
        for _ in range(3):
            model.zero_grad()
            loss(model(x)).backward()
        found.append(grads(model))
    assert error(found[1], found[0]) < 1e-10


def test_a_failing_forward_does_not_confuse_a_budget():
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(4)]).double()
    stack.scheduler = Budget(fraction=0.5)
    bad = Counter(stack[2].F.forward, raise_at=1)
    stack[2].F.forward = bad
    with pytest.raises(ArithmeticError):
        stack(*leaves())
    assert_same_gradients(ReversibleSequence(list(stack)), *leaves(), schedulers=[stack.scheduler])
    for _ in range(3):
        kept = kept_steps(stack, *leaves())
    assert 0 < len(kept) < 8


# ---------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    "scheduler",
    [
        Checkpoint(2),
        Anchored(3),
        KeepLast(2, Anchored(3)),
        Budget(fraction=0.5),
        PaReprop(Budget(bytes=1000), trials=2),
    ],
    ids=str,
)
def test_new_ones_are_values_too(scheduler):
    stack = net(scheduler)
    loss(stack(*leaves())).backward()  # what it has measured is not part of the value
    for same in (
        copy.copy(scheduler),
        copy.deepcopy(stack).scheduler,
        pickle.loads(pickle.dumps(scheduler)),
        replace(scheduler),
    ):
        assert same == scheduler and hash(same) == hash(scheduler) and repr(same) == repr(scheduler)
    assert scheduler != Reversible()
    with pytest.raises(AttributeError):
        scheduler.every = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Checkpoint(0), r"Checkpoint\(every=...\) takes a whole number from 1 up, got 0"),
        (lambda: Anchored(0.5), r"Anchored\(every=...\) takes a whole number from 1 up, got 0.5"),
        (lambda: KeepLast(-1), r"KeepLast\(steps=...\) takes a whole number from 0 up, got -1"),
        (lambda: Budget(), "either bytes=..., or fraction=..."),
        (lambda: Budget(bytes=1, fraction=0.5), "either bytes=..., or fraction=..."),
        (lambda: Budget(bytes=1.5), r"a whole number of bytes from 0 up, got 1.5; 2 \* 2\*\*30 is"),
        (lambda: Budget(fraction=50), "a number from 0 to 1, got 50"),
        (lambda: Budget(fraction=0.5, below=Naive()), "keeps no activations itself, got Naive"),
        (
            lambda: PaReprop(trials=-1),
            r"PaReprop\(trials=...\) takes a whole number of backward passes from 0 up, got -1",
        ),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [KeepLast, lambda s, below: Budget(fraction=0.5, below=below), lambda s, below: PaReprop(below)]
)
def test_wrong_schedulers_of_schedulers(make):
    with pytest.raises(
        TypeError, match=r"must be a value from revlib.schedulers such as Reversible\(\).*call it to make"
    ):
        make(1, below=Reversible)


def test_a_plan_of_ones_own_may_keep_single_streams():
    class Own(Scheduler):
        def plan(self, length):
            return Plan(streams=[0, 3], states=[length])

    assert_same_gradients(net(Reversible()), *leaves(), schedulers=[Own()])
