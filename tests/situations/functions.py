"""What functions do."""

import functools
import itertools
import random

import numpy as np
import torch
from common import Lambda, grads, leaves, loss, mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from situations.base import Setting, everything, situation, train


# ---------------------------------------------------------------------------------------------- random numbers
class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1), 0.7)) / 0.7


@situation("dropout of every kind, stochastic depth, random leaks")
def dropout(setting: Setting):
    def make():
        first, second = nn.Linear(4, 6), nn.Linear(6, 4)
        return nn.Sequential(nn.Dropout(0.3), first, nn.RReLU(), nn.AlphaDropout(0.2), second, DropPath())

    return train(setting.stack(make))


@situation("attention with dropout")
def attention(setting: Setting):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attend = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)

        def forward(self, x):
            x = self.norm(x)
            return self.attend(x, x, x, need_weights=False)[0]

    return train(setting.stack(Attention), 2, 3, 4)


@situation("random numbers drawn between forward and backward, and seeds set")
def drawn_between(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.4)), leaves()
    total = loss(stack(*xs))
    torch.manual_seed(3)
    noise = torch.rand(2)
    total.backward()
    return [noise, torch.rand(2), *grads(*xs, stack)]


@situation("a function that seeds the generator, or forks it")
def seeds(setting: Setting):
    def seeded(m, x):
        torch.manual_seed(1)
        return F.dropout(m(x), 0.5)

    def forked(m, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return F.dropout(m(x), 0.5).tanh()

    return train(setting.sequence(*((Lambda(seeded, mlp()), Lambda(forked, mlp())) for _ in range(2))))


@situation("a generator of the function's own")
def own_generator(setting: Setting):
    generator = torch.Generator().manual_seed(0)

    def noisy(m, x):
        return m(x).sin() * torch.rand(x.shape, generator=generator)

    return train(setting.stack(lambda: Lambda(noisy, nn.Linear(4, 4))))


@situation("Python's random numbers")
def python_random(setting: Setting):
    return train(setting.stack(lambda: Lambda(lambda m, x: m(x * random.random()).tanh(), nn.Linear(4, 4))))


@situation("NumPy's random numbers")
def numpy_random(setting: Setting):
    np.random.seed(0)
    draws = np.random.default_rng(0)

    def noisy(m, x):
        return m(x * draws.uniform()).tanh() * torch.from_numpy(np.random.random_sample(x.shape))

    return train(setting.stack(lambda: Lambda(noisy, nn.Linear(4, 4))))


@situation("random numbers seeded by what no check finds, such as a clock")
def hidden_random(setting: Setting):
    clock = itertools.count().__next__

    def noisy(m, x):
        return m(x).sin() * torch.rand(x.shape, generator=torch.Generator().manual_seed(clock()))

    return train(setting.stack(lambda: Lambda(noisy, nn.Linear(4, 4))))


@situation("a function that counts its calls, and computes with the count")
def counting(setting: Setting):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            return (self.linear(x) * self.calls).tanh()

    return train(setting.stack(Counting))


# ---------------------------------------------------------------------------------------------- modules with a state
@situation("batch norm: momentum, cumulative, without statistics")
def batch_norm(setting: Setting):
    def make():
        return nn.Sequential(
            nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.ReLU(), nn.Linear(6, 4),
            nn.BatchNorm1d(4, track_running_stats=False),
        )  # fmt: skip

    return train(setting.stack(make), 6, 4)


@situation("batch norm in eval mode inside a model that trains")
def frozen_batch_norm(setting: Setting):
    stack = setting.stack(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))
    for pair in stack:
        pair.F[0].eval()
    stack[1].eval()
    return train(stack, 6, 4)


@situation("convolutions with group and instance norm")
def convolutions(setting: Setting):
    def make():
        return nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 4, 1),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        )  # fmt: skip

    return train(setting.stack(make), 2, 4, 5, 5)


@situation("recurrent layers: LSTM and GRU")
def recurrent_layers(setting: Setting):
    def make(kind):
        return Lambda(lambda m, x: m(x)[0], kind(4, 4, batch_first=True))

    return train(setting.sequence((make(nn.LSTM), make(nn.GRU))), 2, 3, 4)


@situation("an LSTM whose weights come by functional_call")
def functional_lstm(setting: Setting):
    stack = setting.stack(lambda: Lambda(lambda m, x: m(x)[0], nn.LSTM(4, 4, batch_first=True)), depth=1)
    weights, xs = {k: (2 * p).detach().requires_grad_() for k, p in stack.named_parameters()}, leaves(2, 3, 4)
    loss(torch.func.functional_call(stack, weights, tuple(xs))).backward()
    return grads(*xs, *weights.values())


@situation("fake quantization with a moving observer")
def fake_quantization(setting: Setting):
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    def make():  # its kernels are float32
        quantize = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        return Lambda(lambda m, q, x: q(m(x.float())).to(x.dtype), nn.Linear(4, 4).float(), quantize.float())

    return train(setting.stack(make))


@situation("buffers that a function updates, replaces, or creates")
def buffers(setting: Setting):
    class Tracking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))
            self.register_buffer("last", None, persistent=False)

        def forward(self, x):
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.count = self.count + 1
            y = self.linear(x - self.mean).tanh() * self.count
            if self.last is not None:
                y = y + 0.1 * self.last
            self.last = y.detach()
            return y

    return train(setting.stack(Tracking))


@situation("running statistics behind a function that calls a function")
def statistics_behind_functions(setting: Setting):
    norm, linear, xs = nn.BatchNorm1d(4), nn.Linear(4, 4), leaves(6, 4)
    inner = lambda x: norm(x)  # noqa: E731
    loss(setting.run([(lambda x: linear(inner(x)), torch.sin)] * 2, *xs)).backward()
    return [*grads(*xs, norm, linear), *everything(norm)]


global_norm: nn.Module


@situation("running statistics of a module in a global variable")
def global_statistics(setting: Setting):
    global global_norm
    global_norm, xs = nn.BatchNorm1d(4), leaves(6, 4)
    loss(setting.run([(lambda x: global_norm(x).sin(), torch.sin)] * 2, *xs)).backward()
    return [*grads(*xs, global_norm), *everything(global_norm)]


@situation("a method of a module, and a partial of one")
def methods(setting: Setting):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def mix(self, x, power=1):
            return self.linear(self.norm(x)).tanh() ** power

    model, xs = Model(), leaves(6, 4)
    loss(setting.run([(model.mix, functools.partial(model.mix, power=2))], *xs)).backward()
    return [*grads(*xs, model), *everything(model)]


# ---------------------------------------------------------------------------------------------- caches
class Cached(nn.Module):
    """Fills a cache when it first runs."""

    def __init__(self, make) -> None:
        super().__init__()
        self.linear, self.make, self.cache = nn.Linear(4, 4), make, None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.make(self, x)
        return (self.linear(x) * self.cache).tanh()


@situation("a cached table, such as rotary angles")
def cached_table(setting: Setting):
    return train(setting.stack(lambda: Cached(lambda m, x: torch.arange(4.0).cos())))


@situation("a cached table that is learned")
def cached_graph(setting: Setting):
    stack, xs = setting.stack(lambda: Cached(lambda m, x: m.linear.weight.sum(0).sin())), leaves()
    loss(stack(*xs)).backward()
    return grads(*xs, stack)


@situation("memoised results, by functools.lru_cache")
def memoised(setting: Setting):
    @functools.lru_cache
    def angles(n):
        return torch.linspace(0, 1, n).sin()

    return train(setting.stack(lambda: Lambda(lambda m, x: (m(x) * angles(x.shape[-1])).tanh(), nn.Linear(4, 4))))


@situation("a key-value cache kept as an attribute, that grows")
def key_value_cache(setting: Setting):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.past = nn.Linear(4, 4), None

        def forward(self, x):
            k = self.key(x)
            self.past = k if self.past is None else torch.cat([self.past.detach(), k])
            return F.scaled_dot_product_attention(x, self.past, self.past)

    stack, found = setting.stack(Attending), []
    for _ in range(2):
        xs = leaves()
        loss(stack(*xs)).backward()
        found += grads(*xs, stack)
    return found


@situation("a state carried from call to call as an attribute")
def carried_state(setting: Setting):
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.state = nn.Linear(8, 4), torch.zeros(3, 4)

        def forward(self, x):
            h = self.cell(torch.cat([x, self.state], -1)).tanh()
            self.state = h.detach()
            return h

    return train(setting.stack(Carrying))


# ---------------------------------------------------------------------------------------------- what they return
@situation("a function that returns its stream, a parameter, a view, or a detached tensor")
def returns(setting: Setting):
    p, xs = nn.Parameter(torch.randn(3, 4)), leaves()
    functions = [lambda x: x, lambda x: p, lambda x: x.t().t(), lambda x: p[:1].expand(3, 4)]
    functions += [lambda x: x.detach().sin(), lambda x: torch.zeros(()), lambda x: (p * x).sin()]
    outputs = setting.run([setting.fit_step(f) for f in functions * 2], *xs)
    loss(outputs).backward()
    assert not any(t._backward_hooks for t in (p, *xs)), "the user's own tensors were hooked"
    return [*outputs, *grads(*xs, p)]


@situation("no_grad and detach inside")
def gradients_off_inside(setting: Setting):
    def gated(first, second, x):
        with torch.no_grad():
            gate = first(x).sigmoid()
        return second(x.detach() + x).tanh() * gate

    return train(setting.stack(lambda: Lambda(gated, nn.Linear(4, 4), nn.Linear(4, 4))))


@situation("control flow that depends on data")
def control_flow(setting: Setting):
    def branching(a, b, x):
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = a(x).sin() if x.mean() > 0 else b(x).tanh()
        return x

    return train(setting.stack(lambda: Lambda(branching, nn.Linear(4, 4), nn.Linear(4, 4))), steps=3)


@situation("a mixture of experts: top-k, index_add and empty experts")
def experts(setting: Setting):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 5), nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x):
            weight, chosen = self.gate(x).softmax(-1).max(-1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                (rows,) = torch.where(chosen == i)
                y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
            return y

    return train(setting.stack(Mixture))


@situation("in-place operations on a function's own tensors")
def in_place(setting: Setting):
    def edits(m, x):
        h = m(x)
        h.add_(1).relu_()
        h = h.clone()
        h[:, 0] *= 2
        return h.mul_(3).sigmoid_()

    return train(setting.stack(lambda: Lambda(edits, nn.Linear(4, 4))))


@situation("einsum, sorting, cumulative sums and scatter")
def index_operations(setting: Setting):
    def mix(m, x):
        x = torch.einsum("bi,bj->bij", m(x), x).cumsum(1).amax(1)
        values, order = x.sort(-1)
        return torch.zeros_like(x).scatter(1, order, values.cos())

    return train(setting.stack(lambda: Lambda(mix, nn.Linear(4, 4))))


@situation("linear algebra: inverses and eigenvalues")
def linear_algebra(setting: Setting):
    def solve(m, x):
        a = m.weight @ m.weight.t() + torch.eye(4)
        return torch.linalg.solve(a, x, left=False) * torch.linalg.eigvalsh(a).log()

    return train(setting.stack(lambda: Lambda(solve, nn.Linear(4, 4))))


# ---------------------------------------------------------------------------------------------- autograd inside
class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,), (again,) = ctx.saved_tensors, ctx.saved_tensors
        return g * (x + again)


class Halved(torch.autograd.Function):
    """Puts a tensor on ctx, edits its input, and is differentiable once only."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.cos()
        ctx.mark_dirty(x)
        return x.div_(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g / 2 + 0 * ctx.kept


@situation("custom autograd.Functions: saved tensors, attributes of ctx, dirty inputs")
def custom_functions(setting: Setting):
    return train(setting.stack(lambda: Lambda(lambda m, x: Halved.apply(Squared.apply(m(x)).sin()), nn.Linear(4, 4))))


@situation("a function that is the gradient of an energy")
def energy(setting: Setting):
    def force(potential, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (f,) = torch.autograd.grad(potential(x).sin().sum(), x, create_graph=True)
        return -f

    return train(setting.stack(lambda: Lambda(force, nn.Linear(4, 3))))


@situation("checkpoints inside a function: reentrant, and not")
def checkpoint_inside(setting: Setting):
    found = []
    for reentrant in (True, False):
        make = functools.partial(Lambda, lambda m, x, r=reentrant: checkpoint(m, x, use_reentrant=r), mlp(dropout=0.3))
        found += train(setting.stack(make))
    return found


@situation("selective checkpoints inside a function")
def selective_checkpoint_inside(setting: Setting):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def run(m, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(m, x, use_reentrant=False, context_fn=contexts)

    return train(setting.stack(lambda: Lambda(run, mlp(dropout=0.3)), depth=1))


@situation("stacks inside functions of a stack")
def nested(setting: Setting):
    def split(inner, x):
        return torch.cat(inner(*x.chunk(2, -1)), -1)

    def make():
        return nn.Sequential(nn.LayerNorm(8), Lambda(split, setting.stack(lambda: mlp(dropout=0.2), depth=1)))

    return train(setting.stack(make), 3, 8)


@situation("functions compiled by torch.compile", only="Additive()")
def compiled(setting: Setting):
    stack = setting.stack(depth=1)
    for f in stack[0]:
        f.compile(backend="aot_eager")
    try:
        return train(stack)
    finally:
        torch._dynamo.reset()


@situation("functions traced by torch.jit", only="Additive()")
def traced(setting: Setting):
    make = lambda: torch.jit.trace(mlp(), torch.randn(3, 4))  # noqa: E731
    return train(setting.stack(make, depth=1))


@situation("a function that raises in forward; then training goes on")
def raises_in_forward(setting: Setting):
    told = []

    def fails_once(m, x):
        if not told:
            told.append(1)
            raise ValueError("not today")
        return m(x)

    stack = setting.stack(lambda: Lambda(fails_once, mlp(dropout=0.2)))
    try:
        stack(*leaves())
    except ValueError:
        return [told, train(stack)]


# ---------------------------------------------------------------------------------------------- issue 15, until fixed
class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.offset = nn.Linear(4, 4).requires_grad_(False), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.body(x) + self.offset


@situation("a learned offset on a frozen body: accumulated, clipped, no memory shared")
def offset(setting: Setting):
    stack, table, x = setting.stack(Offset), nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    learned, found = [table, *(p for p in stack.parameters() if p.requires_grad)], []
    for _ in range(2):
        loss(stack(x + table, x)).backward()
        found += grads(*learned)
    places = {p.grad.untyped_storage().data_ptr() for p in learned}
    return [*found, nn.utils.clip_grad_norm_(learned, 1.0), *grads(*learned), len(places)]


@situation("a layer that the first forward builds")
def built(setting: Setting):
    class Built(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = None

        def forward(self, x):
            if self.proj is None:
                self.proj = nn.Linear(4, 4)
            return self.proj(x)

    stack, found = setting.stack(Built), []
    for _ in range(2):
        xs = leaves()
        loss(stack(*xs)).backward()
        found += grads(*xs, stack)
    return found


@situation("a state in a list, a dict, a plain object")
def containers(setting: Setting):
    class Box:
        calls = 0

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.kept, self.state, self.box = nn.Linear(4, 4), [0], {"calls": 0}, Box()

        def forward(self, x):
            self.kept[0] += 1
            self.state["calls"] += 1
            self.box.calls += 1
            return self.linear(x) * 0.9 ** (self.kept[0] + self.state["calls"] + self.box.calls)

    stack = setting.stack(Holding)
    return [*train(stack), *(f.kept[0] + f.box.calls for pair in stack for f in pair)]


@situation("batch norm in a plain object, and in the context")
def hidden_norm(setting: Setting):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.box = nn.Linear(4, 4), type("Box", (), {})()
            self.box.norm = nn.BatchNorm1d(4)

        def forward(self, x, norm):
            return norm(self.box.norm(self.linear(x)))

    stack, norm, xs = setting.stack(Hiding, depth=1), nn.BatchNorm1d(4), leaves(6, 4)
    loss(stack(*xs, norm=norm)).backward()
    return [*grads(*xs, stack, norm), *everything(norm), *(b for f in stack[0] for b in everything(f.box.norm))]


@situation("a codebook that moves by averages, through .data")
def codebook(setting: Setting):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("center", torch.zeros(4))

        def forward(self, x):
            y = self.linear(x) - self.center
            self.center.data.lerp_(y.detach().mean(0), 1e-3)
            return y.tanh()

    return train(setting.stack(Centred), 6, 4)


@situation("a random leaky ReLU as the last operation")
def written_late(setting: Setting):
    return train(setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU())), 16, 4)


@situation("torch.func.grad inside a function", refusable=True)
def func_inside(setting: Setting):
    def force(m, x):
        return -torch.func.grad(lambda x: m(x).sin().sum())(x)

    return train(setting.stack(lambda: Lambda(force, nn.Linear(4, 3))))


@situation("an embedding with max_norm, and weights kept at unit length")
def own_weights(setting: Setting):
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.table = nn.Parameter(torch.randn(4, 4)), nn.Embedding(3, 4, max_norm=1.0)

        def forward(self, x):
            with torch.no_grad():
                self.weight.copy_(F.normalize(self.weight, dim=1))
            return (x * self.table(torch.arange(3))) @ self.weight

    return train(setting.stack(Unit))


@situation("a bare except around a fast path")
def catches_everything(setting: Setting):
    def run(a, b, x):
        try:
            return b(a(x).relu())
        except:  # noqa: E722
            return a(x) + b(x)

    return train(setting.stack(lambda: Lambda(run, nn.Linear(4, 4), nn.Linear(4, 4))))


@situation("integers, masks and values without gradient that are kept")
def harmless(setting: Setting):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x)
            self.chosen, self.mask = h.argmax(-1), h > 0
            with torch.no_grad():
                self.mean = h.mean()
            return h.tanh()

    return train(setting.stack(Keeping))


@situation("set_grad_enabled(False) and (True), bare")
def bare_switch(setting: Setting):
    def gated(first, second, x):
        torch.set_grad_enabled(False)
        gate = first(x).sigmoid()
        torch.set_grad_enabled(True)
        return second(x).tanh() * gate

    return train(setting.stack(lambda: Lambda(gated, nn.Linear(4, 4), nn.Linear(4, 4))))
