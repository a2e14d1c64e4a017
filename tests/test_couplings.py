"""The family of couplings: each law and its inverse, each published network against a recurrence in plain torch."""

import math
import pickle

import pytest
import torch
from common import error, examples, grads, leaves, loss, mlp, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Anchored, Checkpoint, Naive, Reversible, ReversibleSequence, Step
from revlib.couplings import Additive, Affine, ExactAdditive, Scaled
from revlib.recurrences import columns, grouped, leapfrog, midpoint, momentum
from revlib.testing import assert_inverts, assert_memory_flat, assert_same_gradients, assert_unmerges, strategies

ROUNDING = 2.0**-24


class Halves(nn.Module):
    """A function of twice the channels, as a pair."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *streams, gain=None, shift=0.0):
        return self.fn(*streams, gain=gain, shift=shift).chunk(2, dim=-1)


# ---------------------------------------------------------------------------------------------- laws
numbers = st.sampled_from([-2, -1, -0.5, 0.1, 0.9, 1, 1.5])
shapes = st.lists(st.integers(1, 4), max_size=3)


@given(numbers, numbers, shapes, st.booleans(), strategies.dtypes(), strategies.seeds())
def test_scaled_unmerges_what_it_merged(keep, add, shape, broadcast, dtype, seed):
    torch.manual_seed(seed)
    s, f = torch.randn(shape, dtype=dtype) + 3, torch.randn(shape[1:] if broadcast else shape, dtype=dtype)
    coupling = Scaled(keep, add)
    assert_unmerges(coupling, s, f)
    assert error(coupling.merge(s, f), keep * s + add * f) < 1e-6


@given(st.floats(0.1, 3), shapes, st.booleans(), strategies.dtypes(), strategies.seeds())
def test_affine_unmerges_what_it_merged(bound, shape, broadcast, dtype, seed):
    torch.manual_seed(seed)
    s, shift = torch.randn(shape, dtype=dtype) + 3, torch.randn(shape, dtype=dtype)
    log_scale = 5 * torch.randn(shape[1:] if broadcast else shape, dtype=dtype)
    coupling = Affine(bound)
    assert_unmerges(coupling, s, (log_scale, shift))
    assert error(coupling.merge(s, (log_scale, shift)), s * (bound * log_scale.tanh()).exp() + shift) < 1e-6
    scale = coupling.merge(torch.ones_like(s), (log_scale, 0 * shift))
    assert scale.max() <= math.exp(bound) * (1 + 1e-6) and scale.min() >= math.exp(-bound) * (1 - 1e-6)


@given(st.sampled_from([1, -1]), numbers, shapes, strategies.dtypes(), strategies.seeds())
def test_scaled_on_a_grid_unmerges_every_bit(keep, add, shape, dtype, seed):
    torch.manual_seed(seed)
    coupling = Scaled(keep, add, ExactAdditive(64))
    s, f = coupling.enter(torch.randn(shape, dtype=dtype)), torch.randn(shape, dtype=dtype)
    merged = coupling.merge(s, f)
    assert torch.equal(coupling.unmerge(merged, f), s)
    assert torch.equal(coupling.enter(merged), merged) and coupling.limit_of(dtype) == 64
    # Both differences are exact: of two numbers on the grid, and of a number and the nearest one on the grid.
    grid = 64 * 2.0 ** -{torch.float32: 24, torch.float64: 53}[dtype]
    assert ((merged - keep * s) - add * f).abs().max() <= grid / 2


@pytest.mark.parametrize(
    ("coupling", "count"), [(Scaled(-0.9, 0.1), 0), (Scaled(-1, 0.1, ExactAdditive()), 0), (Affine(), 3)]
)
def test_what_they_save_for_backward(coupling, count):
    saved = {}
    s, a, b = leaves(count=3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.shape}) or t, lambda t: t):
        coupling.merge(s, (a, b) if count else a)
    assert list(saved.values()) == [s.shape] * count


def test_they_are_values():
    for coupling in (Scaled(0.9, 0.1), Scaled(plus=ExactAdditive(64)), Affine(2.0)):
        again = pickle.loads(pickle.dumps(coupling))
        assert again == coupling and hash(again) == hash(coupling) and eval(repr(coupling)) == coupling
        with pytest.raises(AttributeError):
            coupling.keep = coupling.bound = 1.0
    assert Scaled(0.9) != Scaled(0.8) and Affine(1.0) != Affine(2.0) and Scaled() != Additive()


# ---------------------------------------------------------------------------------------------- networks
@st.composite
def networks(draw):
    """A stack of one of the family, with streams and context that fit it."""
    kind = draw(st.sampled_from(["midpoint", "leapfrog", "hamiltonian", "momentum", "columns", "grouped", "affine"]))
    count = draw(st.integers(2, 4)) if kind in ("columns", "grouped", "affine") else 2
    depth, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    h, gamma = draw(st.sampled_from([0.1, 0.5, 1])), draw(st.sampled_from([0.5, 0.9]))
    seen = [width] * (1 if kind == "grouped" else count - 1)
    steps = depth * (2 if kind == "hamiltonian" else 1 if count == 2 and kind != "grouped" else count)
    fns = [draw(strategies.branches(seen, width * (2 if kind == "affine" else 1))) for _ in range(steps)]
    coupling = None
    if kind == "midpoint":
        items = midpoint(fns, h)
    elif kind == "leapfrog":
        items = leapfrog(fns, h)
    elif kind == "hamiltonian":
        items, coupling = zip(fns[::2], fns[1::2], strict=True), Scaled(add=h)
    elif kind == "momentum":
        items = momentum(fns, gamma)
    elif kind == "columns":
        items = columns(fns, draw(st.sampled_from([gamma, -gamma, 1, 1.2])))
    elif kind == "grouped":
        items = grouped(*[fns[i : i + count] for i in range(0, steps, count)])
    else:
        items = [Step(Halves(fn), Affine(draw(st.sampled_from([0.5, 1.0])))) for fn in fns]
    stack = ReversibleSequence(items, coupling=coupling).double()
    return stack, draw(strategies.streams([width] * count)), draw(strategies.contexts())


@examples(150)
@given(networks(), strategies.schedulers(), strategies.seeds())
def test_every_network_under_every_scheduler(network, scheduler, seed):
    stack, streams, context = network
    assert_same_gradients(stack, *streams, context=context, schedulers=[scheduler], seed=seed)
    assert_inverts(stack, *streams, context=context)


def compare(stack, streams, published, modules):
    """Outputs and gradients of a stack, under two schedulers, and of a recurrence written down again."""
    found = []
    for run in (published, stack):
        for scheduler in [None] if run is published else [Reversible(), Checkpoint()]:
            if scheduler:
                stack.scheduler = scheduler
            xs = [s.detach().clone().requires_grad_() for s in streams]
            modules.zero_grad()
            outputs = list(run(*xs))
            loss(outputs).backward()
            found.append([*outputs, *grads(*xs, modules)])
    assert error(found[1], found[0]) < 1e-11 and error(found[2], found[0]) < 1e-11


def functions(count, *widths):
    torch.manual_seed(0)
    widths = widths or (4,)
    return nn.ModuleList(mlp(widths[i % len(widths)]) for i in range(count)).double()


def test_midpoint_is_the_published_network():
    fns, h = functions(5), 0.3

    def published(previous, x):
        for f in fns:
            previous, x = x, previous + 2 * h * f(x)
        return previous, x

    compare(ReversibleSequence(midpoint(fns, h)), leaves(), published, fns)


def test_leapfrog_is_the_published_network():
    """From $v = (x_t - x_{t-1}) / h$ to the same of the last two."""
    fns, h = functions(5), 0.3

    def published(v, x):
        previous = x - h * v
        for f in fns:
            previous, x = x, 2 * x - previous + h**2 * f(x)
        return (x - previous) / h, x

    compare(ReversibleSequence(leapfrog(fns, h)), leaves(), published, fns)


def test_pairs_with_a_step_size_are_the_published_hamiltonian_network():
    fns, h = functions(6), 0.3

    def published(y, z):
        for F, G in zip(fns[::2], fns[1::2], strict=True):
            y = y + h * F(z)
            z = z + h * G(y)
        return y, z

    pairs = zip(fns[::2], fns[1::2], strict=True)
    compare(ReversibleSequence(pairs, coupling=Scaled(add=h)), leaves(), published, fns)


def test_momentum_is_the_published_network():
    fns, gamma = functions(5), 0.8

    def published(v, x):
        for f in fns:
            v = gamma * v + (1 - gamma) * f(x)
            x = x + v
        return v, x

    compare(ReversibleSequence(momentum(fns, gamma)), leaves(), published, fns)
    still = [torch.zeros(3, 4, dtype=torch.float64), *leaves(count=1)]
    compare(ReversibleSequence(momentum(fns, gamma)), still, published, fns)


class Level(nn.Module):
    """Fuses the level below, in its own column, with the level above, in the column before."""

    def __init__(self, above, below, width):
        super().__init__()
        self.up, self.down, self.body = nn.Linear(above, width), nn.Linear(below, width), mlp(width)

    def forward(self, above, *streams):
        return self.body(self.up(above) + self.down(streams[-1]))


def test_columns_are_the_published_network():
    """Three columns of four levels of different widths: x[t] = F(x[t - 1], x[t - m + 1]) + gamma * x[t - m]."""
    torch.manual_seed(0)
    m, widths, gamma = 4, [2, 3, 4, 5], 0.7
    levels = [Level(widths[(t + 1) % m], widths[(t - 1) % m], widths[t % m]) for t in range(3 * m)]
    levels = nn.ModuleList(levels).double()

    def published(*streams):
        x = list(streams)
        for t, level in enumerate(levels, m):
            x.append(level(x[t - m + 1], x[t - 1]) + gamma * x[t - m])
        return x[-m:]

    streams = [torch.randn(3, w, dtype=torch.float64) for w in widths]
    compare(ReversibleSequence(columns(levels, gamma)), streams, published, levels)
    compare(ReversibleSequence(columns(levels, gamma)), [0 * s for s in streams[:3]] + streams[3:], published, levels)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_grouped_is_the_published_network(groups):
    torch.manual_seed(0)
    fns = functions(3 * groups)
    blocks = [list(fns[i : i + groups]) for i in range(0, len(fns), groups)]

    def published(x):
        for block in blocks:
            x = list(x.chunk(groups, dim=-1))
            before = torch.stack(x[1:]).sum(0)
            for i, f in enumerate(block):
                before = x[i] = f(before) + x[i]
            x = torch.cat(x, dim=-1)
        return (x,)

    stack = ReversibleSequence(grouped(*blocks))

    class Whole:
        scheduler = property(None, lambda self, scheduler: setattr(stack, "scheduler", scheduler))

        def __call__(self, x):
            return (torch.cat(stack(*x.chunk(groups, dim=-1)), dim=-1),)

    compare(Whole(), leaves(3, 4 * groups, count=1), published, fns)


def test_affine_pairs_are_real_nvp():
    """Two masked layers of Real NVP: y = mask * x + (1 - mask) * (x * exp(s(mask * x)) + t(mask * x))."""
    torch.manual_seed(0)
    nets = nn.ModuleList(mlp(4, out=8) for _ in range(4)).double()

    def published(x1, x2):
        x, first = torch.cat([x1, x2], dim=-1), torch.arange(8) < 4
        for i, net in enumerate(nets):
            mask = (~first if i % 2 == 0 else first).double()
            a, b = net((mask * x)[:, 4:] if i % 2 == 0 else (mask * x)[:, :4]).chunk(2, dim=-1)
            log_scale, shift = (torch.cat([t, t], dim=-1) for t in (0.7 * torch.tanh(a), b))
            x = mask * x + (1 - mask) * (x * torch.exp(log_scale) + shift)
        return x[:, :4], x[:, 4:]

    class Pair(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).chunk(2, dim=-1)

    compare(ReversibleSequence([Step(Pair(net), Affine(0.7)) for net in nets]), leaves(), published, nets)


def test_nice_is_additive_on_halves():
    nets = functions(2)
    (x,) = leaves(3, 8, count=1)
    a, b = x.chunk(2, dim=-1)
    a = a + nets[0](b)
    want = torch.cat([a, b + nets[1](a)], dim=-1)
    assert error(torch.cat(ReversibleSequence([tuple(nets)])(*x.chunk(2, dim=-1)), dim=-1), want) < 1e-12


class Unbind(nn.Module):
    def forward(self, x):
        return x.unbind(-2)


@pytest.mark.some(1)
@pytest.mark.parametrize("recipe", [midpoint, leapfrog, momentum, columns, "affine"])
def test_memory_is_flat_in_depth(recipe):
    def make(depth):
        if recipe != "affine":
            return ReversibleSequence(recipe([mlp(16) for _ in range(depth)]))
        fns = [nn.Sequential(mlp(16, out=32), nn.Unflatten(-1, (2, 16)), Unbind()) for _ in range(depth)]
        return ReversibleSequence(Step(fn, Affine()) for fn in fns)

    assert_memory_flat(make, *torch.randn(2, 4096, 16).requires_grad_().unbind(), depths=(4, 8))


# ---------------------------------------------------------------------------------------------- exactness and drift
class Coarse(nn.Module):
    """A function in bfloat16: the same bits again, for the same bits."""

    def __init__(self, width=4):
        super().__init__()
        self.fn = mlp(width)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fn(x)


@pytest.mark.parametrize("kind", ["midpoint", "leapfrog", "grouped", "minus"])
def test_on_a_grid_every_bit_comes_back(kind):
    torch.manual_seed(0)
    fns = [Coarse() for _ in range(60)]
    items = {
        "midpoint": lambda: midpoint(fns, 0.3, exact=1024),
        "leapfrog": lambda: leapfrog(fns, 0.3, exact=1024),
        "grouped": lambda: grouped(*[fns[i : i + 3] for i in range(0, 60, 3)], exact=1024),
        "minus": lambda: [Step(fn, Scaled(-1, 0.3, ExactAdditive())) for fn in fns],
    }[kind]()
    stack = ReversibleSequence(items)
    xs = leaves(8, 4, count=3 if kind == "grouped" else 2, dtype=torch.float32)
    entered = [ExactAdditive().enter(x) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(stack.inverse(*stack(*xs)), entered, strict=True))
    results = []
    for stack.scheduler in (Naive(), Reversible(tolerance=0.0)):
        stack.zero_grad()
        results.append(train(stack, *[x.detach().clone().requires_grad_() for x in xs]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def roundings(stack, *streams):
    """The error of inversion, relative to elements of order one, in roundings of float32."""
    with torch.no_grad():
        recovered = stack.inverse(*stack(*streams))
    return [((a - b).square().mean().sqrt() / ROUNDING).item() for a, b in zip(recovered, streams, strict=True)]


def perceptrons(count):
    torch.manual_seed(0)
    return [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(count)]


@pytest.mark.parametrize(("gamma", "depths"), [(0.5, (8, 16)), (0.7, (16, 32)), (0.9, (32, 64, 96))])
def test_the_error_of_momentum_grows_like_the_power_of_gamma(gamma, depths):
    for n in depths:
        fns = perceptrons(n)
        found = roundings(ReversibleSequence(momentum(fns, gamma)), torch.zeros(32, 16), torch.randn(32, 16))[0]
        assert 0.1 < found * gamma**n < 0.5, f"{found * gamma**n} at {n}"


@pytest.mark.parametrize(("gamma", "limit"), [(0.5, 14), (0.9, 72)])
def test_momentum_is_refused_beyond_the_depth_it_tells(gamma, limit):
    def go(n, scheduler):
        stack = ReversibleSequence(momentum(perceptrons(n), gamma), scheduler=scheduler)
        train(stack, torch.zeros(32, 16), torch.randn(32, 16, requires_grad=True))

    go(limit * 3 // 4, Reversible())
    with pytest.raises(RuntimeError, match="recovered what enters step"):
        go(limit * 3 // 2, Reversible())
    go(limit * 3 // 2, Anchored(limit))  # of steps, two a function


def constants(count):
    """Functions that do not look at what they are given amplify nothing: what is left is the law's own factor."""
    torch.manual_seed(0)
    return [lambda *s, shift=shift: shift.expand_as(s[0]) for shift in torch.randn(count, 16)]


def test_the_error_of_columns_grows_by_the_power_of_gamma_a_column():
    found = {}
    for count in (8, 16):
        stack = ReversibleSequence(columns(constants(4 * count), 0.6))
        found[count] = roundings(stack, *torch.randn(4, 64, 16))
    for few, many in zip(found[8], found[16], strict=True):
        assert 0.5 < many / few * 0.6**8 < 2


def test_the_error_of_affine_grows_by_the_scale():
    found = {}
    for n in (8, 16):
        steps = [Step(lambda x, f=f: (torch.full_like(x, -9.0), f(x)), Affine()) for f in constants(2 * n)]
        found[n] = roundings(ReversibleSequence(steps), *torch.randn(2, 64, 16))
    for few, many in zip(found[8], found[16], strict=True):
        assert 0.5 < many / few / math.exp(8) < 2


def test_the_error_of_midpoint_grows_where_functions_decay_and_not_where_they_turn():
    torch.manual_seed(0)
    weight, h, x = torch.randn(16, 16) / 4, 0.1, torch.randn(64, 16)
    turn = weight - weight.T
    turning = ReversibleSequence(midpoint([lambda x: torch.tanh(x @ turn)] * 128, h))
    decaying = ReversibleSequence(midpoint([lambda x: -x] * 128, h))
    assert max(roundings(turning, x, x + h * torch.tanh(x @ turn))) < 40
    assert min(roundings(decaying, x, (1 - h) * x)) > 0.1 * math.exp(h * 128)


def test_leapfrog_with_a_velocity_drifts_less_than_with_two_positions():
    torch.manual_seed(0)
    K, h, x, v = torch.randn(16, 16) / 4, 0.1, torch.randn(64, 16), torch.randn(64, 16)

    def f(x):
        return -torch.tanh(x @ K) @ K.T

    velocity = ReversibleSequence(leapfrog([f] * 256, h))
    positions = ReversibleSequence([Step(lambda x: 2 * x + h**2 * f(x), Scaled(keep=-1)) for _ in range(256)])
    assert 10 * max(roundings(velocity, v, x)) < max(roundings(positions, x - h * v, x))


# ---------------------------------------------------------------------------------------------- misuse
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scaled(keep=0), "would forget the stream, so no step could be inverted"),
        (lambda: Scaled(keep=math.nan), r"Scaled\(keep=...\) takes a finite number, got nan"),
        (lambda: Scaled(add=torch.ones(2)), "what is learned belongs into the function"),
        (lambda: Scaled(add=True), r"Scaled\(add=...\) takes a finite number, got True"),
        (lambda: Scaled(plus=Affine()), r"takes Additive\(\) or ExactAdditive\(limit\), got Affine"),
        (lambda: Scaled(0.9, plus=ExactAdditive()), "is not exact: only keep=1 and keep=-1 stay on the grid"),
        (lambda: Affine(0), r"takes a finite number above 0, got 0: scales lie between .* use Additive\(\)"),
        (lambda: Affine(math.inf), r"Affine\(bound=...\) takes a finite number"),
        (lambda: midpoint([], h=0), r"midpoint\(h=...\) takes a step size"),
        (lambda: leapfrog([], h=math.inf), r"leapfrog\(h=...\) takes a step size"),
        (lambda: momentum([], gamma=0), "at 0 the network is a residual one and does not invert"),
        (lambda: momentum([], gamma=1), "at 1 its functions have no effect"),
        (lambda: columns([mlp()], gamma=0), "would forget the stream"),
        (lambda: grouped([mlp()]), "a function for each group, all with as many, two at least"),
        (lambda: grouped([mlp(), mlp()], [mlp()] * 3), r"got \[2, 3\]"),
        (lambda: grouped([]), r"got \[0\]"),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(2, 4), (3, 8)])
def test_affine_takes_a_pair(shape):
    """A batch of two would unpack, silently."""
    stack = ReversibleSequence([Step(lambda x: torch.zeros(shape), Affine())])
    with pytest.raises(ValueError, match=r"which Affine.* does not merge") as raised:
        stack(torch.zeros(2, 4), torch.zeros(2, 4))
    assert "takes a pair (log-scale, shift), and the function returned one tensor" in str(raised.value.__cause__)
    with pytest.raises(ValueError, match="returned a dict"):
        Affine().merge(torch.zeros(2), {"log_scale": 0, "shift": 0})
