"""Bijections as steps: laws, every scheduler, shapes and numbers of streams that change, sums as streams, refusals."""

import copy
import itertools
import pickle

import pytest
import torch
from common import Lambda, error, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from revlib import (
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
    reversible,
)
from revlib.bijections import (
    ActNorm,
    Bijection,
    Concat,
    Convolution1x1,
    Inverse,
    Permute,
    Rearrange,
    Split,
    with_log_det,
    with_losses,
)
from revlib.couplings import Additive, Affine, Scaled
from revlib.diagnostics import DriftMonitor
from revlib.step import advance
from revlib.testing import (
    LiveBytes,
    assert_bijects,
    assert_inverts,
    assert_memory_flat,
    assert_same_gradients,
    strategies,
)

SCHEDULERS = [
    *(Reversible(), PaReprop(), Checkpoint(), Checkpoint(every=2), Anchored(2), Anchored(3), KeepLast(2)),
    *(Budget(fraction=0.5), Functional()),
]
DEEPER = "b c (h p) (w q) -> b (c p q) h w"


def conv(width, out=None):
    return nn.Sequential(
        nn.GroupNorm(1, width), nn.Conv2d(width, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, out or width, 3, padding=1)
    )


def network(drop=0.1):
    """From an image to features: one stream, two, two of another shape, three, and one again."""
    return ReversibleSequence(
        [
            *(Rearrange(DEEPER, p=2, q=2), Convolution1x1(8), Split(2), (conv(4), conv(4)), Step(conv(4))),
            *(Rearrange(DEEPER, p=2, q=2), (nn.Sequential(conv(16), nn.Dropout(drop)), conv(16)), Permute(1, 0)),
            *(ActNorm(16), Split(2), Step(conv(8), streams=2), Permute(0, 2, 1), Convolution1x1(8)),
            *(Step(conv(8), streams=2), Concat(2), Concat(2), Rearrange("b c h w -> b (h w) c", w=2)),
        ]
    )


def image(dtype=torch.float64, batch=3):
    return torch.randn(batch, 2, 8, 8, dtype=dtype, requires_grad=True)


# ---------------------------------------------------------------------------------------------- laws
SHAPES = st.lists(st.sampled_from([(1, 4), (2, 4), (4, 2), (6, 2)]), min_size=1, max_size=3)


@given(SHAPES, st.data(), st.sampled_from([torch.float64, torch.float32]))
def test_every_bijection_bijects(shapes, data, dtype):
    bijection = data.draw(strategies.bijections(shapes)).to(dtype)
    generator = torch.Generator().manual_seed(data.draw(strategies.seeds()))
    assert_bijects(bijection, *(torch.randn(3, *shape, generator=generator, dtype=dtype) for shape in shapes))


@given(strategies.mixed_cases())
def test_inverse_undoes_forward(case):
    assert_inverts(case.stack, *case.streams)


@settings(max_examples=150)
@given(strategies.mixed_cases(), st.one_of(strategies.schedulers(), st.just(Functional())), strategies.seeds())
def test_every_scheduler_has_the_gradients_of_naive(case, scheduler, seed):
    assert_same_gradients(case.stack, *case.streams, schedulers=[scheduler], seed=seed)


@given(strategies.mixed_cases(dtype=torch.float32))
def test_and_in_single_precision(case):
    assert_same_gradients(case.stack, *case.streams)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_a_network_from_image_to_features(scheduler):
    torch.manual_seed(0)
    net, x = network().double(), image()
    assert [y.shape for y in net(x)] == [(3, 4, 32)]
    assert_same_gradients(net, x, schedulers=[scheduler] * 2)  # the second time with what Budget has measured


def outputs_and_gradients(net, scheduler, run, *streams):
    net.scheduler = scheduler
    net.zero_grad()
    streams = [s.detach().requires_grad_() for s in streams]
    outputs = run(*streams)
    sum((y.sin() * y).sum() for y in outputs).backward()
    return [*outputs, *(s.grad for s in streams), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_gradients_through_the_inverse(scheduler):
    torch.manual_seed(0)
    net = network(drop=0.0).double()
    ys = [y.detach() for y in net(image())]
    want = outputs_and_gradients(net, Naive(), net.inverse, *ys)
    assert error(outputs_and_gradients(net, scheduler, net.inverse, *ys), want) < 1e-10


def test_the_inverse_of_the_inverse_is_forward():
    torch.manual_seed(0)
    net, x = network(drop=0.0).double(), image()
    (y,) = net(x)
    steps = [step.inverse().inverse() for step in net.bound_steps]
    assert torch.equal(advance(steps, (x,), [{}] * len(steps))[0], y)
    counts = [1] + [len(step.layout(m).made) for m, step in zip((1, 1, 1), net.bound_steps, strict=False)]
    assert counts == [1, 1, 1, 2] and net.bound_steps[2].streams_before(2) == 1


def test_memory_of_the_inverse_is_flat():
    def make(depth):
        return Backwards([(nn.Tanh(), nn.Tanh()) for _ in range(depth)])

    x = torch.randn(4096, 16, requires_grad=True)
    assert_memory_flat(make, x, x, depths=(2, 8))


class Backwards(ReversibleSequence):
    """A stack that runs its inverse, and inverts by running forwards."""

    def forward(self, *streams, **context):
        return super().inverse(*streams, **context)


def test_second_derivatives_and_partial_gradients():
    torch.manual_seed(0)
    net, x = network(drop=0.0).double(), image(batch=2)
    net(x)
    found = []
    for scheduler in (Naive(), Reversible(), Checkpoint(), Functional()):
        net.scheduler = scheduler
        (y,) = net(x)
        weights = [net[1].weight, net[3].F[1].weight]
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(g.square().sum(), [x, *weights])
        found.append([g.detach(), *second])
        (y,) = net(x)
        found[-1] += torch.autograd.grad(y[:, 0].sum(), weights, retain_graph=True)
        found[-1] += torch.autograd.grad(y[:, 1].sum(), weights)
    for got in found[1:]:
        assert error(got, found[0]) < 1e-10


def test_transforms():
    torch.manual_seed(0)
    net, x = network(drop=0.0).double(), image().detach()
    net(x)

    def total(x):
        return net(x[None])[0].sin().square().sum()

    net.scheduler = Naive()
    want = torch.func.vmap(torch.func.grad(total))(x)
    net.scheduler = Functional()
    assert error([torch.func.vmap(torch.func.grad(total))(x)], [want]) < 1e-10
    torch.func.jvp(total, (x[0],), (x[0],))


def test_functions_as_plain_callables():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    items = [Split(2), (torch.tanh, torch.sin), Step(torch.cos), Concat(2)]
    for scheduler in (Naive(), Reversible()):
        (y,) = reversible(items, x, scheduler=scheduler)
        (g,) = torch.autograd.grad(y.square().sum(), x)
        want = g if scheduler == Naive() else want  # noqa: F821
        assert torch.allclose(g, want) and torch.allclose(invert(items, y)[0], x)


# ---------------------------------------------------------------------------------------------- what backward runs
class Counted(Bijection):
    """Counts its calls, out of sight of the guards."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, saves):
        super().__init__()
        self.saves, self.gain = saves, nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, *streams):
        NOTE("forward")
        return tuple(s * self.gain if self.saves else -s for s in streams)

    def inverse(self, *streams):
        NOTE("inverse")
        return tuple(s / self.gain if self.saves else -s for s in streams)


CALLS: list[str] = []
NOTE = CALLS.append


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize(
    ("scheduler", "inverts"), [(Reversible(), True), (Checkpoint(), False), (Anchored(1), False), (KeepLast(2), True)]
)
def test_backward_inverts_once_and_repeats_what_saves(scheduler, inverts, saves):
    stack = ReversibleSequence([Step(nn.Tanh()), Counted(saves), Step(nn.Tanh()), Step(nn.Tanh())], scheduler=scheduler)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ys = stack(x, x)
    CALLS.clear()
    sum(y.sum() for y in ys).backward()
    assert ["inverse"] * inverts + ["forward"] * saves == CALLS


def test_a_step_is_evaluated_once_forward_and_once_backward():
    def noted(x):
        NOTE("f")
        return x.tanh()

    stack = ReversibleSequence([Split(2), Step(Lambda(noted)), Concat(2)])
    x = torch.randn(2, 4, requires_grad=True)
    CALLS.clear()
    stack(x)[0].sum().backward()
    assert CALLS == ["f", "f"]


# ---------------------------------------------------------------------------------------------- memory
def test_memory_is_flat_in_depth_and_at_the_borders_of_stages():
    def make(depth):
        items = [Rearrange(DEEPER, p=2, q=2), Split(2), *((conv(2), conv(2)) for _ in range(depth))]
        return ReversibleSequence([*items, Rearrange(DEEPER, p=2, q=2), *((conv(8), conv(8)) for _ in range(depth))])

    x = torch.randn(4, 1, 128, 128, requires_grad=True)
    assert_memory_flat(make, x, depths=(1, 6))


def test_a_split_stream_does_not_keep_the_others_alive():
    a, b = Split(2)(torch.zeros(1, 4, 5))
    assert a.untyped_storage().nbytes() == a.nbytes and b._base is None


# ---------------------------------------------------------------------------------------------- exactness and precision
@pytest.mark.some(6)
@pytest.mark.parametrize("scheduler", SCHEDULERS[:-1], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_exact_bijections_leave_exact_couplings_exact(scheduler, autocast):
    torch.manual_seed(0)
    items = [Rearrange(DEEPER, p=2, q=2), Split(2), *((conv(4), conv(4)) for _ in range(6)), Permute(1, 0)]
    items += [Rearrange(DEEPER, p=2, q=2), *((conv(16), conv(16)) for _ in range(6)), Concat(2)]
    net = ReversibleSequence(items, coupling=ExactAdditive())
    x = image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        want = outputs_and_gradients(net, Naive(), net, x)
        for _ in range(2):
            got = outputs_and_gradients(net, scheduler, net, x)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        (back,) = net.inverse(*net(x))
    assert torch.equal(back, ExactAdditive().enter(x))


def test_an_exact_stack_is_held_to_equality():
    class Rounds(Bijection):
        exact = True

        def forward(self, *streams):
            return tuple(s * 3 for s in streams)

        def inverse(self, *streams):
            return tuple(s / 3 + 1e-6 for s in streams)

    stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()), Rounds()], coupling=ExactAdditive())
    x = torch.randn(8, 3, requires_grad=True)
    y = stack(x, x)
    with pytest.raises(RuntimeError, match=r"enters bijection 1 \(Rounds\) with a relative error .* where 0 is tol"):
        sum(t.sum() for t in y).backward()
    Rounds.exact = False
    sum(t.sum() for t in stack(x, x)).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    torch.manual_seed(0)
    net, x = network(drop=0.0).to(dtype), image(dtype)
    (y,) = net(x)
    assert y.dtype is dtype
    assert_same_gradients(net, x, schedulers=SCHEDULERS[:-1], rtol=2e-2)
    assert torch.allclose(net.eval().inverse(y)[0].float(), x.float(), atol=1e-2)


def test_under_autocast_bijections_run_in_the_precision_of_the_streams():
    torch.manual_seed(0)
    net, x = network(drop=0.0), image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ReversibleSequence([Convolution1x1(2)])(x)[0]
        assert mixed.dtype is torch.float32
        assert_same_gradients(net, x, schedulers=SCHEDULERS, rtol=1e-2)


# ---------------------------------------------------------------------------------------------- ActNorm
@pytest.mark.parametrize("scheduler", [Naive(), *SCHEDULERS], ids=str)
def test_the_first_forward_initialises_every_act_norm(scheduler):
    torch.manual_seed(0)
    net, x = network(drop=0.0).double(), image()
    net.scheduler = scheduler
    seen = []
    net[8].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    (y,) = net(x)
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-10 and (seen[0].var((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    before = net[8].log_scale.detach().clone()
    y.sum().backward()
    assert torch.equal(net[8].log_scale, before) and before.abs().max() > 1e-3
    net(2 * x)
    assert torch.equal(net[8].log_scale, before)  # only once


def test_act_norm_is_saved_with_its_being_initialised():
    norm, x = ActNorm(2), 5 + torch.randn(4, 2, 3)
    ReversibleSequence([norm])(x)
    again = ActNorm(2)
    again.load_state_dict(norm.state_dict())
    assert again.initialised and torch.equal(ReversibleSequence([again])(x)[0], ReversibleSequence([norm])(x)[0])
    assert copy.deepcopy(norm).initialised


def test_act_norm_is_not_initialised_in_eval_mode_nor_by_the_inverse_nor_within_a_transform():
    norm, x = ActNorm(2).eval(), 5 + torch.randn(4, 2, 3)
    stack = ReversibleSequence([norm])
    assert torch.equal(stack(x)[0], x) and not norm.initialised
    norm.train()
    assert torch.equal(stack.inverse(x)[0], x) and not norm.initialised
    stack.scheduler = Functional()
    with pytest.raises(RuntimeError, match="let one batch through before"):
        torch.func.grad(lambda x: stack(x)[0].sum())(x)


# ---------------------------------------------------------------------------------------------- context
class Shifted(Bijection):
    def forward(self, *streams, by):
        return tuple(s + by for s in streams)

    def inverse(self, *streams, by):
        return tuple(s - by for s in streams)


def test_context_reaches_bijections_and_gradients_reach_context():
    class Named(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    torch.manual_seed(0)
    stack = ReversibleSequence([Split(2), Shifted(), (Named(2, 2), Named(2, 2)), Shifted(), Concat(2)]).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    context = {
        "by": torch.randn(2, dtype=torch.float64, requires_grad=True),
        "scale": torch.randn((), dtype=torch.float64, requires_grad=True),
    }
    assert_same_gradients(stack, x, context=context, schedulers=SCHEDULERS)
    assert_inverts(stack, x, context=context)
    with pytest.raises(TypeError, match=r"'wrong' is taken by none .* the names they take are \['by', 'scale'\]"):
        stack(x, wrong=1, **context)


# ---------------------------------------------------------------------------------------------- sums as streams
class ScaleAndShift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = conv(width, 2 * width)

    def forward(self, x):
        return self.net(x).chunk(2, dim=1)


def flow_items():
    level = lambda c, law: [ActNorm(c), Convolution1x1(c), Split(2), Step(ScaleAndShift(c // 2), law, 2), Concat(2)]  # noqa: E731
    return [
        *(Rearrange(DEEPER, p=2, q=2).on_last(1), *level(4, Affine()), *level(4, Affine(0.5)), Split(2)),
        *(Rearrange(DEEPER, p=2, q=2).on_last(1), *level(8, Affine()), Split(2), (conv(4), conv(4)))[:-1],
        *(Step(conv(4), Scaled(keep=0.7), 2), Step(conv(4), ExactAdditive(), 2), Step(conv(4), Additive(), 2)),
        *(Concat(2), Inverse(Convolution1x1(8)), Inverse(ActNorm(8))),
    ]


def flow_inputs(batch=3):
    return torch.zeros(batch, dtype=torch.float64), torch.randn(batch, 1, 8, 8, dtype=torch.float64, requires_grad=True)


def test_the_sum_of_log_determinants_is_that_of_the_jacobian():
    torch.manual_seed(0)
    flow = ReversibleSequence(with_log_det(flow_items())).double()
    for p in flow.parameters():
        p.data += 0.2 * torch.randn_like(p)
    start, x = flow_inputs()
    log_det, *z = flow(start, x)
    assert [t.shape for t in z] == [(3, 2, 4, 4), (3, 8, 2, 2)]
    for i in range(3):

        def flat(x):
            return torch.cat([t.flatten() for t in flow(start[:1], x)[1:]])

        jacobian = torch.autograd.functional.jacobian(flat, x[i : i + 1].detach()).reshape(64, 64)
        assert torch.isclose(torch.linalg.slogdet(jacobian)[1], log_det[i])
    back = flow.inverse(log_det, *z)
    assert back[0].abs().max() < 1e-9 and torch.allclose(back[1], x)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_likelihoods_have_the_gradients_of_naive(scheduler):
    torch.manual_seed(0)
    flow = ReversibleSequence(with_log_det(flow_items())).double()
    nll = lambda out: sum(t.square().sum() for t in out[1:]) / 2 - out[0].sum()  # noqa: E731
    assert_same_gradients(flow, *flow_inputs(), schedulers=[scheduler] * 2, loss=nll)


def test_a_flow_is_as_before_beside_its_log_determinant():
    torch.manual_seed(0)
    items, (start, x) = flow_items(), flow_inputs()
    plain, flow = ReversibleSequence(items).double(), ReversibleSequence(with_log_det(items)).double()
    assert all(torch.equal(a, b) for a, b in zip(plain(x), flow(start, x)[1:], strict=True))
    pairs = ReversibleSequence(with_log_det([(nn.Tanh(), nn.Tanh())], Scaled(keep=2.0)))
    assert torch.allclose(pairs(torch.zeros(2), *torch.ones(2, 2, 3))[0], torch.tensor(2.0).log() * 6)


def test_what_has_no_log_determinant_says_so():
    stack = ReversibleSequence(with_log_det([Shifted()]))
    with pytest.raises(NotImplementedError, match="Shifted does not say what its log-determinant is"):
        stack(torch.zeros(2), torch.ones(2, 3), by=1.0)


def test_memory_of_a_likelihood_is_flat():
    def make(depth):
        steps = [Step(ScaleAndShift(2), Affine(0.1), 2) for _ in range(depth)]
        mixing = [Convolution1x1(2) for _ in range(depth)]
        items = [i for pair in zip(steps, mixing, strict=True) for i in pair]
        return ReversibleSequence(with_log_det([Split(2), *items]))

    assert_memory_flat(make, torch.zeros(4, dtype=torch.float64), torch.randn(4, 4, 64, 64, requires_grad=True))


class Balanced(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = mlp(width, dropout=0.1)

    def forward(self, x):
        y = self.net(x)
        return y, y.square().mean() + x.tanh().sum()


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_losses_from_inside_functions(scheduler):
    torch.manual_seed(0)
    stack = ReversibleSequence(with_losses(Step(Balanced(4)) for _ in range(4))).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    start = torch.zeros((), dtype=torch.float64)
    assert_same_gradients(stack, start, x, x, schedulers=[scheduler] * 2)
    by_hand, s = torch.zeros((), dtype=torch.float64), [x, x]
    torch.manual_seed(1)
    for step in stack:
        f, loss = step.fn(s[1])
        by_hand, s = by_hand + loss, [s[1], s[0] + f]
    torch.manual_seed(1)
    assert error(stack(start, x, x), [by_hand, *s]) < 1e-12


def test_losses_keep_no_graph():
    def make(depth):
        return ReversibleSequence(with_losses(Step(Balanced(16)) for _ in range(depth)))

    x = torch.randn(4096, 16, requires_grad=True)
    assert_memory_flat(make, torch.zeros(()), x, x, depths=(2, 8))


def test_a_function_without_a_loss_is_refused():
    stack = ReversibleSequence(with_losses([Step(nn.Tanh())]))
    with pytest.raises(TypeError, match=r"step 0 \(Tanh\) must return a pair \(f, loss\), got Tensor"):
        stack(torch.zeros(()), torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="adds to a first stream, and so runs on at least 3, got 2"):
        stack(torch.ones(2), torch.ones(2))


# ---------------------------------------------------------------------------------------------- refusals
class Lying(Bijection):
    def forward(self, *streams):
        return tuple(2 * s for s in streams)

    def inverse(self, *streams):
        return tuple(0.4 * s for s in streams)


@pytest.mark.parametrize("scheduler", [Reversible(), Anchored(3), KeepLast(1), Functional()], ids=str)
def test_a_wrong_inverse_is_refused(scheduler):
    stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()), Lying(), (nn.Tanh(), nn.Tanh())], scheduler=scheduler)
    x = torch.randn(4, 3, requires_grad=True)
    ys = stack(x, x)
    with pytest.raises(RuntimeError, match=r"recovered what enters .*relative error"):
        sum(y.sum() for y in ys).backward()
    with pytest.raises(AssertionError, match="does not biject"):
        assert_bijects(Lying(), x)


def test_a_wrong_log_determinant_is_noticed_by_assert_bijects():
    class Wrong(ActNorm):
        def log_det(self, x):
            return 2 * super().log_det(x)

    assert_bijects(ActNorm(2), torch.randn(4, 2, 3))
    with pytest.raises(AssertionError, match=r"log_det is .*, and of its Jacobian"):
        assert_bijects(Wrong(2), torch.randn(4, 2, 3))


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint()], ids=str)
def test_a_bijection_that_does_not_repeat_is_refused(scheduler):
    numbers = itertools.count().__next__  # as a clock, which nobody turns back

    def noise(x):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(numbers())).exp()

    class Noisy(Bijection):
        def forward(self, x):
            return (x * noise(x)).tanh()

        def inverse(self, y):
            return y.atanh() / noise(y)

    stack = ReversibleSequence([Noisy(), Split(2), (nn.Tanh(), nn.Tanh())], scheduler=scheduler)
    ys = stack(torch.randn(4, 6, requires_grad=True))
    with pytest.raises(RuntimeError, match="recovered what enters bijection 0"):
        sum(y.sum() for y in ys).backward()


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), Functional()], ids=str)
def test_a_parameter_edited_before_backward_is_refused(scheduler):
    stack = ReversibleSequence([Convolution1x1(2), Split(2), (nn.Tanh(), nn.Tanh())], scheduler=scheduler)
    ys = stack(torch.randn(4, 2, requires_grad=True))
    with torch.no_grad():
        stack[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in ys).backward()


@pytest.mark.parametrize("scheduler", [Naive(), Reversible(), Functional()], ids=str)
def test_a_bijection_that_edits_its_stream_is_refused(scheduler):
    class Edits(Bijection):
        def forward(self, x):
            return x.mul_(2)

        def inverse(self, x):
            return x / 2

    stack = ReversibleSequence([Edits()], scheduler=scheduler)
    with pytest.raises(RuntimeError, match="in place"):
        stack((torch.randn(4, 2, requires_grad=True) * 1,)[0])


class Returns(Bijection):
    def __init__(self, result, makes=None):
        super().__init__()
        self.result, self.takes, self.makes = result, makes and 1, makes

    def forward(self, *streams):
        return self.result

    def inverse(self, *streams):
        return streams


@pytest.mark.parametrize(
    ("items", "streams", "message"),
    [
        (
            [Returns((torch.ones(1),) * 2)],
            1,
            r"bijection 0 \(Returns\) must return 1 streams, got 2; set",
        ),
        ([Returns(torch.ones(1), makes=2)], 1, r"must return 2 streams, got 1"),
        ([Returns(torch.ones(1, dtype=torch.int64))], 1, "must return floating-point streams, got torch.int64"),
        ([Returns(["a"])], 1, "must return floating-point streams, got str"),
        ([Concat(3)], 2, r"bijection 0 \(Concat\) takes 3 streams, got 2"),
        ([Concat(2), (nn.Tanh(), nn.Tanh())], 2, r"F of block 1 \(Tanh\) runs on at least 2 streams, got 1"),
        ([(nn.Tanh(), nn.Tanh())], 1, "runs on at least two streams, got 1"),
        ([Split(2), Step(nn.Tanh(), streams=3)], 1, "runs on at least 3 streams, got 2"),
        ([Shifted()], 1, r"missing a required (keyword-only )?argument: 'by'"),
    ],
)
def test_what_does_not_fit_is_named(items, streams, message):
    with pytest.raises(TypeError, match=message):
        ReversibleSequence(items)(*torch.randn(streams, 2, 4, requires_grad=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rearrange("b c h w -> b c h"), "has no inverse: both sides"),
        (lambda: Rearrange("b c -> b c 2"), "has no inverse: both sides"),
        (lambda: Rearrange("b c h w -> b (h w) c"), r"could not go back: .* each of \['h', 'w'\].*w=8"),
        (lambda: Split(1), r"Split\(streams=...\) takes a whole number from 2 up, got 1"),
        (lambda: Split(2)(torch.ones(1, 3)), "cannot divide a stream of shape"),
        (lambda: Concat(2)(torch.ones(1, 3), torch.ones(1, 4)), "streams of one shape"),
        (lambda: Permute(0, 2), "each of 0, ..., m - 1 once"),
        (lambda: Convolution1x1(0), "whole number of channels"),
        (lambda: Split(2).on_last(2), "takes 1 streams, the last of the state"),
        (lambda: Rearrange("b c -> c b").on_last(0), "whole number from 1 up, got 0"),
        (lambda: Step(nn.Tanh(), streams=1), "whole number from 2 up, got 1"),
    ],
)
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_inverse_that_gives_another_number_of_streams_is_refused():
    class Loses(Bijection):
        takes, makes = 2, 2

        def forward(self, a, b):
            return a, b

        def inverse(self, a, b):
            return a

    stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()), Loses()])
    x = torch.randn(2, 3, requires_grad=True)
    ys = stack(x, x)
    with pytest.raises(TypeError, match=r"inverse of bijection 1 \(Loses\) must return the 2 streams .*, got 1"):
        sum(y.sum() for y in ys).backward()


# ---------------------------------------------------------------------------------------------- surroundings
def test_the_drift_monitor_measures_bijections():
    torch.manual_seed(0)
    net, x = network(drop=0.0), image(torch.float32)
    net(x)
    for scheduler, inverted in ((Reversible(), 19), (Checkpoint(), 0), (Checkpoint(every=2), 9)):
        monitor = DriftMonitor(net, every=1, scheduler=scheduler)
        net(x)
        monitor.remove()
        assert len(monitor.history) == inverted and all(d.error < 1e-5 for d in monitor.history)
    assert "bijection 1 (Convolution1x1)" in {d.name for d in _measured(net, x)}


def _measured(net, x):
    monitor = DriftMonitor(net, every=1, scheduler=Reversible())
    net(x)
    monitor.remove()
    return monitor.history


def test_copies_and_pickles_are_equal():
    torch.manual_seed(0)
    net, x = network(drop=0.0), image(torch.float32)
    y = net(x)
    net.inverse(*y)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x)[0], y[0]) and repr(again) == repr(net)


def test_a_budget_tells_what_it_keeps_of_states_that_change():
    torch.manual_seed(0)
    net, x = network(drop=0.0), image(torch.float32)
    net.scheduler = Budget(fraction=0.6, below=Anchored(4))
    for _ in range(3):
        net(x)[0].sum().backward()
    steps, kept = map(int, net.scheduler.report().splitlines()[-1].split("float32")[1].split()[:2])
    assert steps == len(net.bound_steps) and 0 < kept < steps


@pytest.mark.slow
def test_it_compiles_with_a_break():
    torch.manual_seed(0)
    net, x = network(drop=0.0).double(), image()
    want = outputs_and_gradients(net, Naive(), net, x)
    for scheduler in (Naive(), Reversible(), Functional()):
        run = torch.compile(net, backend="eager")
        assert error(outputs_and_gradients(net, scheduler, run, x), want) < 1e-10
        torch.compiler.reset()


def test_forward_mode_keeps_nothing():
    """So there is nothing to save. Over reverse, autograd keeps tangents where hooks do not see them: see the guide."""
    peaks = []
    for depth in (2, 16):
        stack = ReversibleSequence([(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)]).requires_grad_(False)
        x, v = torch.randn(2, 4096, 16)
        with LiveBytes([x, v, *stack.parameters()]) as live:
            torch.func.jvp(lambda x, stack=stack: stack(x, x)[0].sum(), (x,), (v,))
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


def test_terms_that_cancel_are_no_false_alarm():
    """The sum is the rounding error of the determinant of a rotation at first, and has nothing left at last."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, requires_grad=True)
    mixing = Convolution1x1(6)
    items = [mixing, *(Step(mlp_pair(3), Affine()) for _ in range(2)), ActNorm(6), Inverse(mixing)]
    flow = ReversibleSequence(with_log_det([items[0], Split(2), *items[1:3], Concat(2), *items[3:]]))
    for start in (torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e-20)):
        assert_same_gradients(flow, start, x, schedulers=SCHEDULERS)


def mlp_pair(width):
    net = nn.Conv1d(width, 2 * width, 1)
    return Lambda(lambda net, x: net(x).tanh().chunk(2, 1), net)


# ---------------------------------------------------------------------------------------------- what mutants showed
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(), KeepLast(2)], ids=str)
def test_an_optimizer_in_backward_steps_after_a_bijection_has_been_recovered(scheduler):
    """Nothing is saved for the shift, so its gradient may be there before anything is asked for."""

    @torch.no_grad()
    def stepped(p):
        p.sub_(0.1 * p.grad)

    class Shift(Bijection):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, *streams):
            return tuple(s + self.by for s in streams)

        def inverse(self, *streams):
            return tuple(s - self.by for s in streams)

    found = []
    for used in (Naive(), scheduler):
        torch.manual_seed(0)
        stack = ReversibleSequence([(mlp(3), mlp(3)), Shift(), Shift(), (mlp(3), mlp(3)), Shift()], scheduler=used)
        stack.double()
        for p in stack.parameters():
            p.register_post_accumulate_grad_hook(stepped)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        sum(y.square().sum() for y in stack(x, x)).backward()
        found.append([x.grad, *(p.detach().clone() for p in stack.parameters())])
    assert error(found[1], found[0]) < 1e-10


def test_a_bijection_runs_to_its_end_again():
    class Noted(Counted):
        def forward(self, *streams):
            made = super().forward(*streams)
            NOTE("end")
            return made

    stack = ReversibleSequence([Noted(True)], scheduler=Checkpoint())
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (y,) = stack(x)
    CALLS.clear()
    y.sum().backward()
    assert CALLS == ["forward", "end"]


def test_recovered_streams_have_the_strides_and_dtypes_that_they_had():
    seen = []
    note = seen.append

    def strides(x):
        note((x.stride(), x.dtype))
        return x.tanh()

    stack = ReversibleSequence([Step(strides), Step(strides), Rearrange("b c (n p) -> b (c p) n", p=5)])
    x = torch.randn(2, 5, 6).mT.requires_grad_()
    ys = stack(x, x)
    forward, seen[:] = list(seen), []
    sum(y.sum() for y in ys).backward()
    assert seen == forward[::-1]


def test_a_rearrangement_that_is_a_view_may_come_last():
    stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()), Concat(2), Rearrange("b c n -> b (c n)", n=3)])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(stack, x, x, schedulers=SCHEDULERS)


@pytest.mark.parametrize("scheduler", [Reversible(), Functional()], ids=str)
def test_gradients_with_respect_to_an_output_that_a_later_step_reads(scheduler):
    torch.manual_seed(0)
    stack = ReversibleSequence([Permute(1, 0), Step(nn.Tanh()), Split(2), Step(nn.Tanh(), streams=2)])
    xs = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for used in (Naive(), scheduler):
        stack.scheduler = used
        ys = stack(*xs)
        found.append(list(torch.autograd.grad(ys[-1].sum(), ys[:-1], allow_unused=True)))
    assert error(found[1], found[0]) < 1e-12 and found[0][1] is not None


def test_every_stream_of_a_bijection_is_compared():
    class Second(Bijection):
        def forward(self, a, b):
            return a * 2, b * 2

        def inverse(self, a, b):
            return a / 2, b * 0.6

    stack = ReversibleSequence([(nn.Tanh(), nn.Tanh()), Second()])
    with pytest.raises(RuntimeError, match="recovered what enters bijection 1"):
        sum(y.sum() for y in stack(*torch.randn(2, 4, 3, requires_grad=True))).backward()
