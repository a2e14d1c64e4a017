"""The monitor measures what backward recovers, and leaves no trace; research/drift.py writes what it says."""

import copy
import gc
import json
import math
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from common import Lambda, grads, leaves, loss, mlp, net, vit_block
from torch import nn

from revlib import Additive, Anchored, Checkpoint, ExactAdditive, KeepLast, Naive, Reversible, ReversibleSequence
from revlib.diagnostics import DriftMonitor
from revlib.guards import recovery_check
from revlib.schedulers import Plan, Scheduler
from revlib.testing import LiveBytes


@dataclass(frozen=True)
class KeepFirst(Scheduler):
    k: int

    def plan(self, length):
        return Plan(activations=range(self.k), states=[length])


@dataclass(frozen=True)
class Off(Additive):
    """Inverts with a known relative error."""

    by: float

    def unmerge(self, merged, f):
        return (merged - f) * (1 + self.by)


def vit(depth=4, **kwargs):
    torch.manual_seed(0)
    return ReversibleSequence([vit_block(16, 2) for _ in range(depth)], **kwargs)


def narrow(width):
    """Nothing that it saves has the shape of a stream."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5), nn.GELU(), nn.Dropout(0.3), nn.Linear(5, width))


def steps(stack, count=1, autocast=False, width=16):
    """Forwards with their backwards."""
    for _ in range(count):
        streams = leaves(2, 4, width, dtype=next(stack.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = stack(*streams)
        loss(outputs).backward()


class Noisy(nn.Module):
    """All that a monitor may disturb: dropout, batch norm, an integer buffer, spectral norm, attributes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm, self.drop, self.calls = nn.BatchNorm1d(4), nn.Dropout(0.5), 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen.add_(1)
        self.calls += 1
        self.last = self.linear(self.norm(x))
        return self.drop(self.last)


# ---------------------------------------------------------------------------------------------- what it measures
@pytest.mark.parametrize("by", [0.0, 1e-3, 0.25])
def test_a_known_error_of_a_single_step(by):
    stack = ReversibleSequence([(mlp(), mlp())], Off(by)).double()
    monitor = DriftMonitor(stack, warn_above=1.0)
    stack(*leaves())
    assert [(d.forward, d.step, d.name) for d in monitor.history] == [
        (0, 1, "G of block 0 (Sequential)"),
        (0, 0, "F of block 0 (Sequential)"),
    ]
    assert monitor.history[0].error == pytest.approx(by, abs=1e-12)


def test_a_known_error_builds_up():
    """With functions that do not look at their streams, every step multiplies by 1 + by once."""
    stack = ReversibleSequence([(Lambda(torch.zeros_like), Lambda(torch.zeros_like))] * 5, Off(0.01))
    monitor = DriftMonitor(stack, every=1, warn_above=1.0)
    stack(*leaves())
    assert [d.error for d in monitor.history] == pytest.approx([1.01 ** (1 + i // 2) - 1 for i in range(10)])
    monitor.history.clear()
    stack.scheduler = Anchored(4)  # keeps streams 4, 5, 8, 9, and the last two
    stack(*leaves())
    assert {d.step: d.error for d in monitor.history} == pytest.approx(
        {7: 0.01, 6: 0.01, 3: 0.01, 2: 0.01, 1: 1.01**2 - 1, 0: 1.01**2 - 1}
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        Reversible(),
        Anchored(4),
        Anchored(3),
        Checkpoint(every=2),
        Checkpoint(every=3),
        KeepLast(3),
        KeepFirst(3),
        Checkpoint(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_measures_what_backward_recovers(scheduler, autocast, monkeypatch):
    """The streams are small enough for samples to be whole, so both see the same numbers."""
    seen = []
    monkeypatch.setattr(recovery_check, "compare_recovered", lambda witnesses, *_: seen.extend(witnesses))
    torch.manual_seed(0)
    stack = net(scheduler, lambda: narrow(8), depth=6, dtype=torch.float32)
    monitor = DriftMonitor(stack, warn_above=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = stack(*leaves(2, 8, dtype=torch.float32))
    loss(outputs).backward()
    want = {w.name: (w.recovered - w.original).norm() / w.original.norm() for w in seen if w.original.shape == (2, 8)}
    assert {d.name: d.error for d in monitor.history} == pytest.approx({k: e.item() for k, e in want.items()}, rel=1e-5)
    assert bool(want) is (scheduler != Checkpoint())


def test_exact_sums_measure_zero_and_others_do_not_under_autocast():
    for coupling, exact in ((ExactAdditive(), True), (Additive(), False)):
        stack = vit(coupling=coupling)
        monitor = DriftMonitor(stack, warn_above=1.0)
        steps(stack, autocast=True)
        assert len(monitor.history) == 8
        assert all((d.error == 0) is exact for d in monitor.history)


def test_another_plan_than_the_stacks_own():
    stack = vit(scheduler=Naive())
    own, other = DriftMonitor(stack), DriftMonitor(stack, scheduler=Reversible())
    steps(stack)
    assert own.history == [] and len(other.history) == 8


def test_large_streams_are_sampled_over_all_channels():
    """An error in one channel only is seen, in proportion."""
    off = torch.ones(512)
    off[7] = 1.5

    @dataclass(frozen=True)
    class OneChannel(Additive):
        def unmerge(self, merged, f):
            return (merged - f) * off

    stack = ReversibleSequence([(Lambda(torch.zeros_like), Lambda(torch.zeros_like))], OneChannel())
    monitor = DriftMonitor(stack, warn_above=9.0)
    stack(*[torch.ones(64, 64, 512, requires_grad=True) for _ in range(2)])
    assert monitor.history[0].error == pytest.approx(0.5 / math.sqrt(512), rel=0.2)


def test_a_stream_that_comes_back_as_nan_is_infinitely_wrong():
    stack = ReversibleSequence([(mlp(), mlp())], Off(math.nan)).double()
    monitor = DriftMonitor(stack, warn_above=math.inf)
    stack(*leaves())
    assert [d.error for d in monitor.history] == [math.inf, math.inf]


# ---------------------------------------------------------------------------------------------- what it leaves alone
def counted(stack):
    calls = []
    for branch in stack.bound_steps:
        branch.fn.register_forward_hook(lambda *_, note=calls.append: note(1))
    return calls


def test_it_costs_nothing_where_it_does_not_measure():
    stack = vit()
    calls = counted(stack)
    monitor = DriftMonitor(stack, every=3)
    found = []
    for _ in range(7):
        calls.clear()
        stack(*leaves(2, 4, 16, dtype=torch.float32))
        found.append(len(calls))
    assert found == [24, 8, 8, 24, 8, 8, 24]
    assert sorted({d.forward for d in monitor.history}) == [0, 3, 6]

    calls.clear()
    monitor.every = 1
    with torch.no_grad():
        stack(*leaves(2, 4, 16, dtype=torch.float32))
    stack.eval()(*leaves(2, 4, 16, dtype=torch.float32))
    assert len(calls) == 16

    for scheduler in (Naive(), Checkpoint()):
        calls.clear()
        stack = vit(scheduler=scheduler)
        calls = counted(stack)
        DriftMonitor(stack, every=1)
        stack(*leaves(2, 4, 16, dtype=torch.float32))
        assert len(calls) == 8

    calls.clear()
    removed = DriftMonitor(stack, every=1, scheduler=Reversible())
    removed.remove()
    stack(*leaves(2, 4, 16, dtype=torch.float32))
    assert len(calls) == 8 and removed.history == []


def test_what_it_takes_does_not_grow_with_depth():
    peaks = []
    for depth in (4, 32):
        stack = ReversibleSequence([(Lambda(torch.sin), Lambda(torch.sin)) for _ in range(depth)])
        monitor = DriftMonitor(stack, warn_above=math.inf)
        with LiveBytes() as live:
            stack(*leaves(1024, 256, dtype=torch.float32))  # 1 MB each, and 16 kB a step
        assert len(monitor.history) == 2 * depth
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] * 1.3


@pytest.mark.parametrize("autocast", [False, True])
def test_it_leaves_no_trace(autocast):
    def play(monitored):
        torch.manual_seed(0)
        stack = ReversibleSequence([(Noisy(), Noisy()) for _ in range(3)], ExactAdditive())
        monitor = DriftMonitor(stack, every=2) if monitored else None
        optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
        found = []
        for _ in range(4):
            streams = leaves(8, 4, dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = stack(*streams)
            after = [torch.get_rng_state(), *(b.clone() for b in stack.buffers())]
            loss(outputs).backward()
            optimizer.step()
            found += [*after, *outputs, *grads(*streams, stack), *stack.buffers(), torch.get_rng_state()]
            found += [torch.tensor(m.calls) for m in stack.modules() if isinstance(m, Noisy)]
            found += [m.last.detach() for m in stack.modules() if isinstance(m, Noisy)]
            found += [torch.tensor(m.training) for m in stack.modules()]
        assert monitor is None or (len(monitor.history) == 12 and all(d.error == 0 for d in monitor.history))
        return [t.detach().clone() for t in found]

    want, got = play(False), play(True)
    assert len(want) == len(got)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


class Once(nn.Module):
    """Knows its first call by an attribute that it sets."""

    def forward(self, x):
        first, self.called = not hasattr(self, "called"), True
        return x * (2 if first else 1)


def test_it_takes_back_attributes_that_were_not_there():
    stack = ReversibleSequence([(Once(), Once())], scheduler=Naive())
    DriftMonitor(stack, warn_above=math.inf, scheduler=Reversible())
    x1, x2 = leaves()
    assert torch.equal(stack(x1, x2)[0], x1 + 2 * x2)


class Counting(nn.Module):
    """Keeps state in containers, and computes with it."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = {"calls": 0}, []

    def forward(self, x):
        self.calls["calls"] += 1
        self.seen.append(self.calls["calls"])
        return x * self.calls["calls"]


def test_it_takes_back_what_functions_put_into_containers():
    stack = ReversibleSequence([(Counting(), Counting())])
    monitor = DriftMonitor(stack, every=1)
    for call in (1, 2):
        x1, x2 = leaves()
        assert torch.equal(stack(x1, x2)[0], x1 + call * x2)
        assert all(f.calls == {"calls": call} and f.seen == [*range(1, call + 1)] for f in stack[0])
    assert {d.forward for d in monitor.history} == {0, 1}


def test_weights_that_it_casts_are_not_used_by_the_forward():
    stack = vit(scheduler=Naive())
    DriftMonitor(stack, warn_above=math.inf, scheduler=Reversible())
    steps(stack, autocast=True)
    assert all(p.grad is not None for p in stack.parameters())


def test_a_function_that_raises_leaves_no_trace_either():
    noisy = Noisy()

    def fail(m, x):
        raise ArithmeticError("the user's own error")

    stack = ReversibleSequence([(noisy, Lambda(fail, nn.Linear(4, 4)))])
    DriftMonitor(stack)
    torch.manual_seed(0)
    before, buffers = torch.get_rng_state(), {k: (id(b), b.clone()) for k, b in stack.named_buffers()}
    handle = noisy.register_forward_hook(lambda *_: handle.remove() or fail(None, None))  # in the measurement
    streams = leaves(8, 4, dtype=torch.float32)
    torch.set_rng_state(before)
    with pytest.raises(ArithmeticError):
        stack(*streams)
    assert torch.equal(before, torch.get_rng_state())
    assert all(id(b) == buffers[k][0] and torch.equal(b, buffers[k][1]) for k, b in stack.named_buffers())


def test_it_keeps_nothing_alive_and_is_copied_with_its_stack():
    stack = vit(1)
    monitor = DriftMonitor(stack, every=1)
    twin = copy.deepcopy(stack)
    steps(twin)
    assert monitor.history == []
    gone = weakref.ref(stack)
    gc.collect(), gc.disable()
    try:
        del stack
        assert gone() is None
    finally:
        gc.enable()
    assert monitor.report()


# ---------------------------------------------------------------------------------------------- what it says
def test_it_warns_once_each_time_the_error_rises_above():
    stack = ReversibleSequence([(mlp(), mlp())], scheduler=Reversible(tolerance=math.inf)).double()
    DriftMonitor(stack, every=1, warn_above=1e-2)
    warned = []
    for by in (0.0, 0.1, 0.2, 0.0, 0.3, 0.3):
        stack.coupling = Off(by)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stack(*leaves())
        warned.append(len(caught))
    assert warned == [0, 1, 0, 0, 1, 0]


def test_the_warning_names_the_step_and_what_to_do():
    stack = ReversibleSequence([(mlp(), mlp())], Off(0.1)).double()
    DriftMonitor(stack)
    match = r"step . .*of block 0.*ExactAdditive.*float32.*Anchored.*Checkpoint.*norm"
    with pytest.warns(UserWarning, match=match):
        stack(*leaves())


@pytest.mark.parametrize(("by", "count"), [(2e-8, 1), (1e-9, 0)])
def test_unless_told_it_warns_at_a_tenth_of_what_backward_tolerates(by, count):
    stack = ReversibleSequence([(mlp(), mlp())], Off(by)).double()  # tolerated in float64: 6e-8
    DriftMonitor(stack)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stack(*leaves())
    assert len(caught) == count
    stack.scheduler = Reversible(tolerance=1e-4)
    DriftMonitor(stack)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(*leaves())


def test_the_report_has_a_row_for_each_step():
    stack = vit(3)
    monitor = DriftMonitor(stack, every=1)
    assert "nothing" in monitor.report()
    steps(stack, 2)
    header, *rows = monitor.report().splitlines()
    assert header.split()[:3] == ["step", "latest", "largest"]
    assert [int(r.split()[0]) for r in rows] == [5, 4, 3, 2, 1, 0]
    for row in rows:
        errors = [d.error for d in monitor.history if d.step == int(row.split()[0])]
        assert row.split()[1:3] == [f"{errors[-1]:.1e}", f"{max(errors):.1e}"]


def test_a_wrong_interval_is_refused():
    with pytest.raises(ValueError, match="every"):
        DriftMonitor(vit(1), every=0)


def test_what_is_no_stack_cannot_be_monitored():
    with pytest.raises(TypeError, match="takes a ReversibleSequence, got Linear, which holds none"):
        DriftMonitor(nn.Linear(4, 4))
    with pytest.raises(
        TypeError, match="takes a ReversibleSequence, got Sequential, which holds one as '1'; pass that"
    ):
        DriftMonitor(nn.Sequential(nn.Linear(4, 4), vit(1)))
    compiled = DriftMonitor(torch.compile(vit(1), backend="eager"), every=1)
    assert compiled.report().endswith("nothing has been inverted yet")


# ---------------------------------------------------------------------------------------------- research/drift.py
def test_the_study_writes_its_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from research.drift import app

    sizes = "--depths 2 --deep 5 --width 8 --deep-width 4 --tokens 3 --batch 2 --at 1 --scales 1 --train-steps 2"
    result = CliRunner().invoke(app, [*sizes.split(), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"points.json", "table.md", "depth.png", "weights.png"}
    points = json.loads((tmp_path / "points.json").read_text())["points"]
    assert len(points) == 4 * 7 * 4
    assert (tmp_path / "table.md").read_text().count("\n**") + 1 == 6
    for p in points:
        stored = p["scheduler"] in ("Naive", "Checkpoint")
        if stored or p["coupling"] == "ExactAdditive":
            assert p["inversion"] == 0 and p["to_naive"] == 0, p
        if p["precision"] == "float64" and p["coupling"] == "Additive":
            assert p["to_truth"] < 1e-12 and (stored or 0 < p["inversion"] < 1e-12)
        if p["precision"] == "bfloat16":
            assert 1e-4 < p["to_truth"] < 0.5 and (p["inversion"] > 1e-4) is not stored


def test_relative_errors_of_the_study():
    from research.drift import relative

    a, b = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert relative([a, b], [a, b]) == 0
    assert relative([a, b + 1], [a, b]) == pytest.approx(1 / 5)
    assert relative([a, b * math.nan], [a, b]) == math.inf
