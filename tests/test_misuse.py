"""Misuse is an error that names the culprit, never a silently wrong gradient; and healthy stacks raise no alarm."""

import importlib
import itertools
import math
import random
import re
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from common import (
    ByHand,
    Lambda,
    error,
    every_recomputing_scheduler,
    every_scheduler,
    grads,
    leaves,
    loss,
    mlp,
    net,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import revlib.testing
from revlib import (
    Additive,
    Anchored,
    Budget,
    Checkpoint,
    ExactAdditive,
    Functional,
    KeepLast,
    Naive,
    PaReprop,
    Reversible,
    ReversibleSequence,
    Step,
    invert,
    positionwise,
    reversible,
)
from revlib.bijections import ActNorm, Concat, Inverse, Rearrange, Split
from revlib.diagnostics import DriftMonitor
from revlib.schedulers import Plan, Scheduler


# ---------------------------------------------------------------------------------------------- edits since forward
@pytest.mark.parametrize("name", ["F of block 0", "G of block 2"])
@every_recomputing_scheduler
def test_a_parameter_edited_in_place(scheduler, name):
    stack, xs = net(scheduler), leaves()
    total = loss(stack(*xs))
    with torch.no_grad():
        {"F of block 0": stack[0].F, "G of block 2": stack[2].G}[name][1].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=rf"parameter 'weight' of {name} \(Sequential\) was modified"):
        total.backward()


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        return self.linear(x).tanh() * (scale["a"] if isinstance(scale, dict) else scale)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@every_recomputing_scheduler
def test_a_context_tensor_edited_in_place(scheduler, nested, requires_grad):
    scale = torch.ones(4, dtype=torch.float64, requires_grad=requires_grad)
    total = loss(net(scheduler, Conditioned)(*leaves(), scale={"a": scale} if nested else scale))
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match=r"context tensor 'scale' of [FG] of block \d \(Conditioned\) was modified"):
        total.backward()


@pytest.mark.parametrize("trains", [True, False])
@every_recomputing_scheduler
def test_a_mode_switched_between_forward_and_backward(scheduler, trains):
    stack, xs = net(scheduler, lambda: mlp(dropout=0.5)).train(trains), leaves()
    total = loss(stack(*xs))
    stack.train(not trains)
    was, now = ("train", "eval") if trains else ("eval", "train")
    with pytest.raises(RuntimeError, match=rf"in [FG] of block \d .*was in {was}\(\) mode .* in {now}\(\) mode"):
        total.backward()


# ---------------------------------------------------------------------------------------------- edits inside functions
@pytest.mark.parametrize("edit", [torch.Tensor.relu_, lambda x: x.mul_(2), lambda x: x[0].zero_()])
@every_scheduler
def test_a_function_that_edits_its_stream_in_place(scheduler, edit):
    def f(m, x):
        with torch.no_grad():
            edit(x)
        return m(x)

    stack = ReversibleSequence([(mlp(), Lambda(f, nn.Linear(4, 4)))], scheduler=scheduler).double()
    with pytest.raises(RuntimeError, match=r"G of block 0 \(Lambda\) edited a stream or a context tensor in place"):
        stack(*leaves())


@every_scheduler
def test_a_function_that_edits_its_context_in_place(scheduler):
    class Counting(nn.Module):
        def forward(self, x, n):
            return x.sin() * n["calls"].add_(1)

    stack = ReversibleSequence([(nn.Identity(), Counting())], scheduler=scheduler)
    with pytest.raises(RuntimeError, match=r"G of block 0 \(Counting\) edited a stream or a context tensor in place"):
        stack(*leaves(), n={"calls": torch.zeros(())})


@every_recomputing_scheduler
def test_a_parameter_edited_by_the_function_itself(scheduler):
    def f(linear, x):
        y = linear(x).tanh()
        with torch.no_grad():
            linear.weight.mul_(1.1)
        return y

    total = loss(net(scheduler, lambda: Lambda(f, nn.Linear(4, 4)))(*leaves()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# ---------------------------------------------------------------------------------------------- what does not repeat
def hidden_numbers(first=0):
    """Another number at each call, from behind a method in C, where nobody finds the iterator. So a clock would do."""
    return itertools.count(first).__next__


def privately_random(numbers=None):
    numbers = numbers or hidden_numbers()

    def f(m, x):
        generator = torch.Generator().manual_seed(numbers())
        return m(x) * torch.bernoulli(torch.full_like(x, 0.5), generator=generator)

    return f


def pythonically_random():
    numbers = hidden_numbers()
    return lambda m, x: m(x) * random.Random(numbers()).random()


def counting():
    calls = hidden_numbers(1)
    return lambda m, x: m(x) * calls()


unrepeatable = pytest.mark.parametrize("make", [privately_random, pythonically_random, counting])


def unrepeatable_net(scheduler, make, dtype):
    """Only G of block 1 misbehaves."""
    torch.manual_seed(0)
    bad = Lambda(make(), nn.Linear(4, 4))
    return ReversibleSequence([(mlp(), mlp()), (mlp(), bad), (mlp(), mlp())], scheduler=scheduler).to(dtype)


@unrepeatable
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_recomputing_scheduler
def test_a_function_that_does_not_repeat(scheduler, dtype, make):
    stack = unrepeatable_net(scheduler, make, dtype)
    if scheduler == Checkpoint() and make is not privately_random:
        # It stops before the number that differs, which the graph of forward holds.
        found = []
        for s in (ByHand(), scheduler):
            stack, xs = unrepeatable_net(s, make, dtype), leaves(16, 4, dtype=dtype)
            loss(stack(*xs)).backward()
            found.append(grads(*xs, stack))
        assert error(found[1], found[0]) < (1e-10 if dtype == torch.float64 else 1e-5)
        return
    with pytest.raises(RuntimeError, match=r"enters G of block 1 \(Lambda\) with a relative error"):
        loss(stack(*leaves(16, 4, dtype=dtype))).backward()


@pytest.mark.parametrize(
    ("scheduler", "make"), [(Checkpoint, privately_random), *((Reversible, m) for m in (privately_random, counting))]
)
def test_which_without_the_check_is_silently_wrong(scheduler, make):
    """So the check matters. (A repeated step reads no tensor that a number from outside of torch could have spoilt.)"""
    found = []
    for s in (ByHand(), scheduler(tolerance=math.inf)):
        stack, xs = unrepeatable_net(s, make, torch.float64), leaves(16, 4)
        loss(stack(*xs)).backward()
        found.append(grads(*xs, stack))
    assert error(found[1], found[0]) > 0.1


@every_recomputing_scheduler
def test_a_function_that_does_not_repeat_its_operations(scheduler):
    calls = itertools.count().__next__
    stack = net(scheduler, lambda: Lambda(lambda m, x: m(x).tanh() if calls() < 6 else m(x), nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match=r"[FG] of block \d \(Lambda\) does not repeat: as saved tensor"):
        loss(stack(*leaves())).backward()


@every_recomputing_scheduler
def test_a_function_that_does_not_repeat_its_shapes(scheduler):
    calls = itertools.count().__next__

    def f(m, x):
        n = 4 if calls() < 6 else 8
        return m(x).repeat(1, n).tanh()[:, :4]

    stack = net(scheduler, lambda: Lambda(f, nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match=r"as saved tensor \d+ autograd kept \(3, 16\) torch.float64"):
        loss(stack(*leaves())).backward()


@pytest.mark.parametrize("both", [False, True])
def test_a_function_that_does_not_repeat_on_streams_of_zeros(both):
    """Zero has no relative error: it is measured against the other stream, or raises all the same."""
    xs = [torch.zeros(16, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)]
    if both:
        xs[1] = torch.zeros(16, 4, requires_grad=True)
    bad = Lambda(privately_random(), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match=r"enters F of block 0 \(Lambda\)"):
        loss(ReversibleSequence([(bad, nn.Sequential(nn.Tanh()))])(*xs)).backward()


@unrepeatable
def test_a_pass_over_a_retained_graph_is_checked_too(make):
    total = loss(unrepeatable_net(Reversible(), make, torch.float64)(*leaves(16, 4)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="G of block 1"):
            total.backward(retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streams_of_very_uneven_magnitude(dtype):
    """What is added to a small stream swallows its digits: float32 keeps 7, float64 16."""
    huge = {torch.float32: 1e7, torch.float64: 1e16}[dtype]
    functions = [(lambda x: huge * x.sin(), lambda x: x.cos())]
    with pytest.raises(RuntimeError, match=r"enters F of block 0 \(<lambda>\) .* does not\s+invert accurately"):
        loss(reversible(functions, *leaves(16, 4, dtype=dtype))).backward()
    xs = leaves(16, 4, dtype=dtype)
    loss(reversible(functions, *xs, scheduler=Checkpoint())).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_steps_that_lose_a_digit_each(dtype):
    """Each step is harmless, all of them are not: noise grows by a factor a step until the stream is nothing else."""
    functions = [(lambda x: 3 * x.sin(),) * 2] * 30
    with pytest.raises(RuntimeError, match=r"enters [FG] of block \d+ .* relative error"):
        loss(reversible(functions, *leaves(16, 4, dtype=dtype))).backward()


# ---------------------------------------------------------------------------------------------- no false alarm
def test_no_alarm_at_depth_100_in_single_precision():
    torch.manual_seed(0)
    stack = net(Reversible(), lambda: mlp(dropout=0.1), depth=100, dtype=torch.float32)
    train(stack, *leaves(16, 4, dtype=torch.float32))


@pytest.mark.parametrize("zeros", [(0,), (1,), (0, 1)])
@every_recomputing_scheduler
def test_no_alarm_for_streams_of_zeros(scheduler, zeros):
    xs = leaves(16, 4, dtype=torch.float32)
    with torch.no_grad():
        for i in zeros:
            xs[i].zero_()
    train(net(scheduler, dtype=torch.float32), *xs)


@every_recomputing_scheduler
def test_no_alarm_for_a_zero_stream_and_functions_that_return_zero(scheduler):
    """As at the start of training with zero-initialised projections."""
    stack = net(scheduler, dtype=torch.float32)
    for pair in stack:
        for f in pair:
            nn.init.zeros_(f[-1].weight)
            nn.init.zeros_(f[-1].bias)
    train(stack, *(torch.zeros(8, 4, requires_grad=True) for _ in range(2)))


@every_recomputing_scheduler
def test_no_alarm_for_an_overflow_that_grad_scaler_must_see(scheduler):
    """Half precision overflows now and then; the gradients must be inf or NaN, as naive ones, and nothing raised."""
    stack = net(scheduler, dtype=torch.float16)
    xs = [(60000 * x.detach()).requires_grad_() for x in leaves(8, 4, dtype=torch.float16)]
    outputs = stack(*xs)
    assert not all(y.isfinite().all() for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert not all(g.isfinite().all() for g in grads(*xs, stack))


@given(st.integers(0, 2**16), st.integers(1, 12), st.floats(0.25, 1e6), st.floats(0.25, 1e6))
def test_no_alarm_for_streams_no_smaller_than_what_is_added_to_them(seed, depth, first, second):
    torch.manual_seed(seed)
    stack = net(Reversible(), depth=depth, dtype=torch.float32)
    x1, x2 = (x.detach() for x in leaves(8, 4, dtype=torch.float32))
    train(stack, (first * x1).requires_grad_(), (second * x2).requires_grad_())


def test_a_tolerance_is_respected_either_way():
    stack = net(Reversible(tolerance=1e-30), depth=20)
    with pytest.raises(RuntimeError, match=r"1e-30 is tolerated"):
        train(stack, *leaves(16, 4))
    stack.scheduler = Reversible(tolerance=math.inf)
    train(stack, *leaves(16, 4))


# ---------------------------------------------------------------------------------------------- wrong arguments
def returning(value):
    return lambda x: value(x) if callable(value) else value


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (lambda x: x[:, :2], ValueError, r"F of block 0 .* returned shape \[\(3, 2\)\].*stream of shape \(3, 4\)"),
        (lambda x: x.repeat(5, 1, 1), ValueError, r"F of block 0 .* stream of shape \(3, 4\).*\(5, 3, 4\)"),
        (lambda x: x.long(), TypeError, r"F of block 0 .* floating-point tensors, got \[torch.int64\]"),
        (lambda x: x > 0, TypeError, r"F of block 0 .* floating-point tensors, got \[torch.bool\]"),
        (lambda x: x + 1j, TypeError, r"F of block 0 .* torch.float64 stream into torch.complex128"),
        (None, TypeError, r"F of block 0 .* must return a tensor .* got NoneType"),
        (1.0, TypeError, r"F of block 0 .* must return a tensor .* got float"),
        (lambda x: (x, None), TypeError, r"F of block 0 .* must return a tensor .* got tuple"),
        (lambda x: (x, x[:1]), ValueError, r"F of block 0 .*\[\(3, 4\), \(1, 4\)\] in a tuple.* that shape alone"),
        (lambda x: {"out": x}, ValueError, r"F of block 0 .*\[\(3, 4\)\] in a dict.* that shape alone"),
    ],
    ids="width rank integer bool complex none number tuple-with-none tuple dict".split(),
)
@every_scheduler
def test_what_a_function_returns_must_merge(scheduler, value, kind, message):
    with pytest.raises(kind, match=message):
        reversible([(returning(value), torch.sin)], *leaves(), scheduler=scheduler)


@every_scheduler
def test_a_wider_dtype_that_would_promote_the_stream(scheduler):
    """Either the stream keeps its dtype, or it is an error: never an inverse in another precision than forward's."""
    xs = leaves(8, 4, dtype=torch.float32)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for s in (ByHand(), scheduler):
        outputs = reversible([(lambda x: (x.double() @ w).tanh(),) * 2] * 2, *xs, scheduler=s)
        found.append(torch.autograd.grad(loss([y.double() for y in outputs]), [*xs, w]))
    assert error(found[1], found[0]) < 1e-5


@every_recomputing_scheduler
def test_a_second_backward_from_another_output_without_retain_graph(scheduler):
    y1, y2 = net(scheduler)(*leaves())
    y1.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y2.sum().backward()


@every_scheduler
def test_an_unknown_context_name(scheduler):
    with pytest.raises(TypeError, match=r"'scael' is taken by none of the 6 functions .* they take are \['scale'\]"):
        net(scheduler, Conditioned)(*leaves(), scael=1)
    with pytest.raises(TypeError, match=r"'scale' .* they take streams alone"):
        reversible([(lambda x: x, lambda x: x)], *leaves(), scheduler=scheduler, context={"scale": 1})


@pytest.mark.parametrize("other", [None, 3, "text", [torch.ones(2)]])
def test_a_stream_that_is_no_tensor(other):
    for run in (net(Reversible()), net(Reversible()).inverse):
        with pytest.raises(TypeError, match=rf"stream 1 must be a tensor, got {type(other).__name__}"):
            run(leaves()[0], other)


def test_one_stream_only():
    for run in (net(Reversible()), net(Reversible()).inverse):
        with pytest.raises(TypeError, match=r"at least two streams, got 1.*seq\(x, x\)"):
            run(leaves()[0])
        with pytest.raises(TypeError, match="at least two streams, got 0"):
            run()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_stream_that_is_not_floating_point(dtype):
    with pytest.raises(TypeError, match=rf"stream 0 must be floating-point, got {dtype}"):
        net(Reversible())(torch.ones(3, 4).to(dtype), leaves()[0])


@pytest.mark.parametrize("wrong", ["reversible", Reversible, Plan(), 1])
def test_a_scheduler_that_is_none(wrong):
    stack = net(Reversible())
    for attempt in (
        lambda: ReversibleSequence([], scheduler=wrong),
        lambda: setattr(stack, "scheduler", wrong),
        lambda: reversible([], *leaves(), scheduler=wrong),
    ):
        with pytest.raises(TypeError, match=r"scheduler must be a value .* such as Reversible\(\), got"):
            attempt()
    assert stack.scheduler == Reversible()


def test_a_class_in_place_of_a_value_says_to_call_it():
    with pytest.raises(TypeError, match=r"scheduler .*; call it to make one"):
        ReversibleSequence([], scheduler=Naive)
    with pytest.raises(TypeError, match=r"coupling .*; call it to make one"):
        ReversibleSequence([], coupling=Additive)


@pytest.mark.parametrize("wrong", ["additive", Additive, 1, lambda s, f: s + f])
def test_a_coupling_that_is_none(wrong):
    for attempt in (
        lambda: ReversibleSequence([], coupling=wrong),
        lambda: Step(mlp(), coupling=wrong),
        lambda: reversible([], *leaves(), coupling=wrong),
        lambda: invert([], *leaves(), coupling=wrong),
    ):
        with pytest.raises(TypeError, match=r"coupling must be a Coupling value such as Additive\(\), got"):
            attempt()


def test_plain_functions_in_a_module():
    with pytest.raises(TypeError, match=r"F of block 0 must be an nn.Module, got function.*revlib.reversible"):
        ReversibleSequence([(lambda x: x, lambda x: x)])
    stack = net(Reversible(), depth=3)
    for index, block in ((3, 3), (1, 1), (-1, 2)):
        with pytest.raises(TypeError, match=rf"G of block {block} must be an nn.Module, got builtin_function"):
            stack.insert(index, (mlp(), torch.sin))
    assert len(stack) == 3


def test_a_class_in_place_of_a_module_says_to_call_it():
    got = "got the class ReLU; call it to make one"
    for attempt in (
        lambda: ReversibleSequence([(mlp(), mlp()), (mlp(), nn.ReLU)]),
        lambda: reversible([(torch.sin, torch.cos), (torch.sin, nn.ReLU)], *leaves()),
    ):
        with pytest.raises(TypeError, match=f"G of block 1 must be an nn.Module, {got}"):
            attempt()
    with pytest.raises(TypeError, match=rf"as block 0, {got}"):
        ReversibleSequence([nn.ReLU])
    with pytest.raises(TypeError, match=rf"Step\(fn=...\) takes a module or a function, {got}"):
        Step(nn.ReLU)
    with pytest.raises(TypeError, match=r"Inverse\(of=...\) takes a Bijection, .* got the class Split; call it"):
        Inverse(Split)


def test_a_pair_without_a_list_around_it():
    with pytest.raises(TypeError, match=r"as block 0, got Sequential; .* put it into a list: \[\(F, G\)\]"):
        ReversibleSequence((mlp(), mlp()))
    with pytest.raises(TypeError, match=r"list of pairs .* got Sequential; put it into a list"):
        ReversibleSequence(mlp())
    assert len(ReversibleSequence(nn.Sequential(Step(mlp()), Split()))) == 2


def test_bijections_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"Inverse\(of=...\) takes a Bijection, .* got Linear"):
        Inverse(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"Rearrange takes a pattern of einops such as .*, got 3"):
        Rearrange(3)


@pytest.mark.parametrize("items", [nn.Linear(4, 4), 3])
def test_items_that_are_no_list(items):
    with pytest.raises(TypeError, match=r"expected a list of pairs .*Bijections, got .*; put it into a list"):
        ReversibleSequence(items)


def test_a_function_that_does_not_take_what_it_is_given():
    own = r"F of block 0 \(<lambda>\) was called with"
    with pytest.raises(TypeError, match=own + r" 2 of 3 streams.* but takes \(x\) \(too many positional"):
        reversible([(lambda x: x, lambda x: x)], *leaves(), leaves()[0])
    with pytest.raises(TypeError, match=own + r" 1 of 2 streams.* but takes \(x, mask\) \(missing .* 'mask'"):
        reversible([(lambda x, mask: x, lambda x: x)], *leaves())
    with pytest.raises(TypeError, match=r"^cos\(\)"):  # its own mistake is not dressed up as the caller's
        reversible([(lambda x: torch.cos("x"), lambda x: x)], *leaves())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@every_scheduler
def test_an_error_of_torch_has_a_note_of_the_step(scheduler):
    x = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError) as found:
        net(scheduler)(x, x)
    assert str(found.value).startswith("Given normalized_shape=[4], expected input")
    (note,) = found.value.__notes__
    assert re.fullmatch(r"This was raised by F of block 0 \(.*\), called with streams of shapes \[\(3, 2\)\].", note)
    own = RuntimeError("its own")

    def refuse(x):
        raise own

    for _ in range(2):  # the same exception may be raised again
        with pytest.raises(RuntimeError) as found:
            reversible([(refuse, refuse)], *leaves(), scheduler=scheduler)
        assert found.value is own and len(own.__notes__) == 1


def test_context_that_is_passed_by_position():
    mask = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"context such as a mask goes by keyword, seq\(x, x, mask=mask\)"):
        net(Reversible())(*leaves(), mask)
    with pytest.raises(TypeError, match=r"stream 2 must be .* or pass it by keyword, seq\(x, x, mask=mask\)"):
        net(Reversible())(*leaves(), mask.bool())


def test_a_plan_that_is_none():
    @dataclass(frozen=True)
    class Listing(Scheduler):
        def plan(self, length):
            return list(range(length))

    with pytest.raises(TypeError, match=r"Listing.plan\(length\) must return a Plan, got list"):
        reversible([(torch.sin, torch.cos)], *leaves(), scheduler=Listing())


TWO_LAYERS = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))  # which is one function, though it unpacks into two


@pytest.mark.parametrize(
    "item", [mlp(), TWO_LAYERS, 3, None, (mlp(),), (mlp(),) * 3], ids="module layers int none one three".split()
)
def test_an_item_that_is_neither_pair_nor_step(item):
    with pytest.raises(
        TypeError, match=r"expected a pair \(F, G\) or a Step as block 0, got .*, or wrap each as Step\(fn\)"
    ):
        ReversibleSequence([item])


@pytest.mark.parametrize("item", [torch.sin, (torch.sin,), (torch.sin,) * 3, (torch.sin, None)])
def test_an_item_of_the_functional_form_that_is_neither_pair_nor_step(item):
    for run in (reversible, invert):
        with pytest.raises(TypeError, match=r"expected a pair|callable"):
            run([item], *leaves())


def test_a_step_of_something_that_cannot_be_called():
    with pytest.raises(TypeError, match=r"Step\(fn=...\) takes a module or a function, got int"):
        Step(3)


@pytest.mark.parametrize("given", [True, 2.5, "2", -3])
@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda n: Step(torch.sin, streams=n), "Step(streams=...) takes a whole number from 2 up"),
        (lambda n: Split(n), "Split(streams=...) takes a whole number from 2 up"),
        (lambda n: Concat(n), "Concat(streams=...) takes a whole number from 2 up"),
        (lambda n: Rearrange("b c -> c b").on_last(n), "on_last(...) takes a whole number from 1 up"),
        (lambda n: ActNorm(n), "ActNorm takes a whole number of channels from 1 up"),
        (lambda n: positionwise(torch.sin, n), "positionwise(chunks=...) takes a whole number from 1 up"),
        (lambda n: DriftMonitor(ReversibleSequence(), n), "DriftMonitor(every=...) takes a whole number from 1 up"),
        (lambda n: Checkpoint(n), "Checkpoint(every=...) takes a whole number from 1 up"),
        (lambda n: Anchored(n), "Anchored(every=...) takes a whole number from 1 up"),
        (lambda n: KeepLast(n), "KeepLast(steps=...) takes a whole number from 0 up"),
        (lambda n: PaReprop(trials=n), "PaReprop(trials=...) takes a whole number of backward passes from 0 up"),
        (lambda n: Budget(n), "Budget(bytes=...) takes a whole number of bytes from 0 up"),
    ],
)
def test_a_number_that_is_no_whole_number_or_too_small(make, argument, given):
    with pytest.raises(ValueError, match=re.escape(f"{argument}, got {given!r}")):
        make(given)


def test_a_fraction_in_place_of_bytes():
    with pytest.raises(ValueError, match=r"got 0.5; say Budget\(fraction=0.5\) for a part of what Naive would keep"):
        Budget(0.5)


@dataclass(frozen=True)
class Forgetful(Scheduler):
    states: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()

    def plan(self, length):
        return Plan(self.activations, self.states)


@pytest.mark.parametrize(
    ("scheduler", "step"), [(Forgetful(), 0), (Forgetful((4,)), 5), (Forgetful((), (0, 1)), 2), (Forgetful((9,)), 0)]
)
def test_a_plan_that_cannot_recover_a_step(scheduler, step):
    with pytest.raises(ValueError, match=rf"neither the activations of step {step} nor any .* keep state 6, the last"):
        net(scheduler)(*leaves())


@pytest.fixture
def unimported(monkeypatch):
    """As if revlib.testing.strategies had not been imported yet."""
    monkeypatch.delitem(sys.modules, "revlib.testing.strategies", raising=False)
    monkeypatch.delitem(vars(revlib.testing), "strategies", raising=False)
    return monkeypatch


def test_strategies_without_hypothesis_say_how_to_install_it(unimported):
    # As Python's own machinery, which names the module that it did not find.
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "hypothesis":
                raise ModuleNotFoundError("No module named 'hypothesis'", name="hypothesis")

    for name in [n for n in sys.modules if n.split(".")[0] == "hypothesis"]:
        unimported.delitem(sys.modules, name)
    unimported.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=r'needs hypothesis: pip install "revlib-torch\[testing\]"'):
        _ = revlib.testing.strategies
    with pytest.raises(ModuleNotFoundError, match=r'needs hypothesis: pip install "revlib-torch\[testing\]"'):
        importlib.import_module("revlib.testing.strategies")
    with pytest.raises(AttributeError, match="has no attribute 'strategy'"):
        _ = revlib.testing.strategy


def test_another_missing_module_is_not_blamed_on_hypothesis(unimported):
    unimported.setitem(sys.modules, "revlib.step", None)
    with pytest.raises(ModuleNotFoundError, match=r"revlib\.step"):
        _ = revlib.testing.strategies


def test_what_a_repetition_puts_out_of_sight_cannot_be_differentiated():
    """It is a second copy of what forward put there: its gradient would count twice. A list is put back."""
    told = []
    tell = told.append

    def f(m, x):
        y = m(x).tanh()
        tell(y.square().sum())
        return y * 2

    outputs = net(Reversible(), lambda: Lambda(f, nn.Linear(4, 4)))(*leaves())
    in_forward = len(told)
    loss(outputs).backward()
    assert len(told) > in_forward
    with pytest.raises(RuntimeError, match="belongs to its repetition in backward"):
        told[-1].backward()


@pytest.mark.parametrize("tolerance", [-1, math.nan, True, "0.1"], ids=repr)
@pytest.mark.parametrize("make", [Reversible, Checkpoint, partial(Anchored, 2), Functional])
def test_a_tolerance_that_is_none(make, tolerance):
    with pytest.raises(ValueError, match=r"\(tolerance=...\) takes a number from 0 up, or None for the default, got"):
        make(tolerance=tolerance)


@pytest.mark.parametrize("given", ["all", 3, [0.5], [None]], ids=repr)
@pytest.mark.parametrize("argument", ["activations", "states", "streams"])
def test_a_plan_of_no_numbers(argument, given):
    with pytest.raises(TypeError, match=rf"Plan\({argument}=...\) takes a collection of whole numbers"):
        Plan(**{argument: given})


def test_a_pair_that_is_called():
    with pytest.raises(TypeError, match=r"stack\[0:1\]\(x1, x2\) runs the first pair"):
        net(Reversible())[0](*leaves())


def test_under_functional_exact_sums_ask_for_equality_too():
    numbers = hidden_numbers()
    bad = Lambda(lambda f, x: f(x) * (1 + 1e-4 * (numbers() > 0)), nn.Linear(4, 4))
    xs = leaves(16, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="where 0 is tolerated"):
        loss(ReversibleSequence([(bad, mlp()), (mlp(), mlp())], ExactAdditive(), Functional())(*xs)).backward()
