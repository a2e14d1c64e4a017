"""Functional: the reversible backward as a pure function, under torch.func and in whole compiled graphs.

The laws of the other schedulers hold for it too, or it refuses: see ``law`` in common.py.
"""

import copy
import gc
import itertools
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from common import ByHand, Lambda, error, examples, grads, leaves, loss, mlp, net, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from revlib import (
    Additive,
    ExactAdditive,
    Functional,
    Naive,
    Reversible,
    ReversibleSequence,
    Step,
    functional,
    reversible,
)
from revlib.couplings import Affine
from revlib.models import RevMViT, RevSwin, RevViT
from revlib.testing import LiveBytes, footprint, strategies


# ---------------------------------------------------------------------------------------------- transforms
def values(case):
    """Parameters, streams and tensors of the context of a case, detached."""
    own = {name: p.detach() for name, p in case.stack.named_parameters()}
    context = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in case.context.items()}
    return own, tuple(s.detach() for s in case.streams), context


def energy(case, context, own, *streams):
    return loss(functional_call(case.stack, own, streams, context))


def mapped(per, own, streams):
    """One sample at a time, each a batch of two."""
    return vmap(per, in_dims=(None, *[0] * len(streams)), randomness="different")(
        own, *(torch.stack([s, s.sin()]) for s in streams)
    )


TRANSFORMS = {
    "grad": lambda f, own, xs: grad(f, argnums=tuple(range(len(xs) + 1)))(own, *xs),
    "grad of streams": lambda f, own, xs: grad(partial(f, own), argnums=1)(*xs),
    "vmap": lambda f, own, xs: mapped(f, own, xs),
    "gradients per sample": lambda f, own, xs: mapped(grad(f), own, xs),
    "jacrev": lambda f, own, xs: jacrev(lambda x: torch.stack([f(own, x, *xs[1:]), f(own, x.cos(), *xs[1:])]))(xs[0]),
    "jacfwd": lambda f, own, xs: jacfwd(lambda t: f(own, t * xs[0], *xs[1:]))(torch.ones((), dtype=torch.float64)),
    "jvp": lambda f, own, xs: jvp(partial(f, own), xs, tuple(x.cos() for x in xs)),
    "gradient of a gradient": lambda f, own, xs: grad(
        lambda o: sum(g.square().sum() for g in grad(f, argnums=tuple(range(1, len(xs) + 1)))(o, *xs))
    )(own),
    "hessian by vector, reverse over reverse": lambda f, own, xs: vjp(grad(partial(f, own)), *xs)[1](xs[0].cos()),
    "hessian by vector, forward over reverse": lambda f, own, xs: jvp(
        grad(partial(f, own)), xs, tuple(x.cos() for x in xs)
    ),
}


@examples(120)
@given(strategies.cases(max_depth=3), st.sampled_from(sorted(TRANSFORMS)), strategies.seeds())
def test_every_transform_of_any_stack(case, name, seed):
    for module in case.stack.modules():
        # A Jacobian maps over forward, or over backward, which draws again here; vmap allows no draws there.
        if isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Dropout) and name.startswith("jac")):
            module.eval()
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch.func has no rule for it under jvp of vjp
    own, streams, context = values(case)
    found = []
    for scheduler in (ByHand(), Functional()):
        case.stack.scheduler = scheduler
        torch.manual_seed(seed)
        found.append(TRANSFORMS[name](partial(energy, case, context), own, streams))
    assert error(found[1], found[0]) < 1e-10


def ensembles(scheduler, dropout=0.0):
    torch.manual_seed(0)
    members = [net(scheduler, lambda: nn.Sequential(mlp(dropout=dropout), nn.BatchNorm1d(4))) for _ in range(3)]
    for norm in (m for member in members for m in member.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.eval().running_mean.normal_()  # buffers are stacked, and mapped over, too
    own, buffers = stack_module_state(members)
    base, streams = copy.deepcopy(members[0]), [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]

    def one(own, buffers):
        return loss(functional_call(base, (own, buffers), tuple(streams)))

    torch.manual_seed(1)
    inside = vmap(grad(one), randomness="different")(own, buffers)
    torch.manual_seed(1)
    vmap(one, randomness="different")(own, buffers).sum().backward()
    return [inside, *(p.grad for p in own.values())]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_ensemble_of_stacks(dropout):
    assert error(ensembles(Functional(), dropout), ensembles(ByHand(), dropout)) < 1e-10


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness):
    def scene(scheduler):
        torch.manual_seed(0)
        stack = net(scheduler, partial(mlp, dropout=0.5))
        streams = [torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2)]
        own = {k: p.detach() for k, p in stack.named_parameters()}
        per = grad(lambda own, *x: loss(functional_call(stack, own, x)))
        return vmap(per, in_dims=(None, 0, 0), randomness=randomness)(own, *streams)

    assert error(scene(Functional()), scene(ByHand())) < 1e-10


def test_a_gradient_by_torch_func_is_differentiable_by_autograd_in_parameters_it_was_not_asked_for():
    def scene(scheduler):
        torch.manual_seed(0)
        stack, (a, b) = net(scheduler), leaves()
        grad(lambda x: loss(stack(x, b)))(a).square().sum().backward()
        return grads(stack, a, b)

    assert error(scene(Functional()), scene(ByHand())) < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_functions_that_checkpoint_and_nest_stacks(order):
    """By plain autograd; torch.func does not take them."""

    def scene(scheduler):
        torch.manual_seed(0)
        checkpointed = Lambda(lambda f, x: checkpoint(f, x, use_reentrant=False), nn.Sequential(mlp(), nn.Dropout(0.3)))
        nested = Lambda(lambda f, x: f(x, x.cos())[1], ReversibleSequence([(mlp(), mlp())]))
        stack = ReversibleSequence([(checkpointed, mlp()), (mlp(), nested)], scheduler=scheduler).double()
        a, b = leaves()
        ts = [a, b, *stack.parameters()]
        total = loss(stack(a, b))
        for _ in range(order - 1):
            total = sum(g.square().sum() for g in torch.autograd.grad(total, ts, create_graph=True))
        return torch.autograd.grad(total, ts)

    assert error(scene(Functional()), scene(Naive())) < 1e-10


def test_a_parameter_unfrozen_since_forward_gets_no_second_derivative():
    def scene(scheduler):
        torch.manual_seed(0)
        stack, (a, b) = net(scheduler), leaves()
        weights = [stack[0].F[1].weight, stack[1].G[4].weight]
        for w in weights:
            w.requires_grad_(False)
        total = loss(stack(a, b))
        for w in weights:
            w.requires_grad_(True)
        (total + torch.autograd.grad(total, a, create_graph=True)[0].square().sum()).backward()
        assert all(w.grad is None for w in weights)
        return [p.grad for p in stack.parameters() if p.grad is not None]

    assert error(scene(Functional()), scene(Naive())) < 1e-10


# ---------------------------------------------------------------------------------------------- memory
def stack_of(depth, scheduler):
    torch.manual_seed(0)
    return ReversibleSequence([(mlp(16), mlp(16)) for _ in range(depth)], scheduler=scheduler)


def peak(transform, depth, scheduler, rows=2048):
    """Of a transform of a stack, in stream tensors."""
    stack, streams = stack_of(depth, scheduler), [torch.randn(rows, 16) for _ in range(2)]
    own = {k: p.detach() for k, p in stack.named_parameters()}
    f = lambda own, *x: loss(functional_call(stack, own, x))  # noqa: E731
    gc.collect()
    with LiveBytes([*streams, *own.values()]) as live:
        transform(f, own, streams)
    return live.peak / streams[0].nbytes


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, own, xs: grad(f)(own, *xs),
        lambda f, own, xs: vjp(f, own, *xs)[1](torch.ones(())),
        lambda f, own, xs: jacrev(lambda x: torch.stack([f(own, x, xs[1])] * 2), chunk_size=1)(xs[0]),
        lambda f, own, xs: vmap(grad(f, argnums=1), in_dims=(None, 0, 0))(own, *(x.view(4, -1, 16) for x in xs)),
    ],
    ids=["grad", "vjp", "jacrev", "vmap of grad"],
)
def test_memory_under_transforms_is_flat_in_depth(transform):
    few, many, stored = (peak(transform, d, s) for d, s in [(3, Functional()), (9, Functional()), (9, Naive())])
    assert many < few + 1 and many < 0.5 * stored


def test_memory_of_plain_autograd_is_flat_in_depth():
    def of(depth, scheduler):
        stack, streams = stack_of(depth, scheduler), [torch.randn(2048, 16, requires_grad=True) for _ in range(2)]
        found = footprint(stack, streams, stack.parameters())
        return found.held / streams[0].nbytes, found.peak / streams[0].nbytes

    (held, few), (_, many) = of(3, Functional()), of(9, Functional())
    # Two streams, and what autograd saves of the last G, whose hidden features are half of a stream's.
    assert held < 2 + 3.2 and many < few + 0.5
    assert many < of(9, Reversible())[1] + 8  # besides, outputs, their gradients and the input stay to the end


# ---------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [2, 3])
def test_gradients_and_hooks_of_outputs_are_those_of_plain_autograd(m, count):
    """The outputs depend on one another: the last stream is made from the others."""

    def scene(scheduler):
        torch.manual_seed(0)
        steps = [Step(Lambda(lambda f, *streams: f(sum(streams)), mlp())) for _ in range(count)]
        stack, xs = ReversibleSequence(steps, scheduler=scheduler).double(), leaves(count=m)
        outputs = stack(*xs)
        found = torch.autograd.grad(loss(outputs), outputs, retain_graph=True)
        for y in outputs[-2:]:
            if not y.is_leaf:
                y.register_hook(lambda g: g / g.norm())
        loss(outputs).backward()
        return [*found, *grads(*xs, stack)]

    assert error(scene(Functional()), scene(ByHand())) < 1e-10


# ---------------------------------------------------------------------------------------------- refusals
def test_what_a_closure_captures_needs_no_gradient_and_is_not_mapped():
    xs, w = leaves(), torch.randn(4, dtype=torch.float64)
    stack = lambda w: loss(reversible([(lambda x: x * w, torch.sin)], *xs, scheduler=Functional()))  # noqa: E731
    stack(w).backward()
    for wrong in (lambda: stack(w.clone().requires_grad_()), lambda: grad(stack)(w), lambda: vmap(stack)(w[:, None])):
        with pytest.raises(RuntimeError, match=r"Pass it as context.* shape"):
            wrong()
    held = nn.Parameter(w.clone())
    with pytest.raises(RuntimeError, match="Pass it as context"):  # and no operation sees it
        reversible([(lambda x: held, torch.sin)], *(x[0] for x in xs), scheduler=Functional())


def test_context_carries_gradients_and_is_mapped():
    def scene(scheduler):
        torch.manual_seed(0)
        xs, w = [x.detach() for x in leaves()], torch.randn(5, 4, dtype=torch.float64)
        pairs = [(lambda x, w: (x * w).sin(), lambda x: x.cos()), (lambda x: x.sin(), lambda x, w: x + w.tanh())]
        f = lambda w: loss(reversible(pairs, *xs, scheduler=scheduler, context={"w": w}))  # noqa: E731
        return [grad(f)(w[0]), vmap(f)(w), vmap(grad(f))(w)]

    assert error(scene(Functional()), scene(ByHand())) < 1e-10


class Remembers(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.linear, self.keep, self.seen = nn.Linear(4, 4).double(), keep, []

    def forward(self, x):
        h = self.linear(x)
        self.seen.append(self.keep(h))
        return h.tanh()


def test_what_functions_leave_behind_carries_no_gradient():
    stack, xs = ReversibleSequence([(Remembers(lambda h: h), mlp().double())], scheduler=Functional()), leaves()
    with pytest.raises(RuntimeError, match=r"keeps a tensor of shape \(3, 4\)"):
        stack(*xs)
    stack = ReversibleSequence([(Remembers(torch.Tensor.detach), mlp().double())], scheduler=Functional())
    loss(stack(*xs)).backward()


def test_what_is_left_behind_in_a_cycle_is_not_kept():
    """Until python collects it, which is any time."""

    def circular(m, x):
        h = m(x)
        cell = [h]
        cell.append(cell)
        return h.sin()

    def scene(scheduler):
        torch.manual_seed(0)
        return train(ReversibleSequence([(Lambda(circular, mlp()), mlp())], scheduler=scheduler).double(), *leaves())

    assert error(scene(Functional()), scene(Naive())) < 1e-10


def test_a_captured_tensor_edited_by_less_than_the_tolerance():
    for edited in (False, True):
        xs, w = leaves(dtype=torch.float32), torch.ones(4)
        pairs = [(lambda x, w=w: (x * w).sin(), lambda x: x.cos())] * 2
        total = loss(reversible(pairs, *xs, scheduler=Functional()))
        if edited:
            w.mul_(1.0005)
            with pytest.raises(RuntimeError, match=r"shape \(4,\) that .* reads was modified by an inplace"):
                total.backward()
        else:
            total.backward()


@pytest.mark.parametrize("how", ["attribute", "context"])
def test_a_captured_tensor_that_a_later_call_first_reads(how):
    class Switched(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.layer, self.on, self.read = nn.Linear(4, 4), False, lambda: mask

        def forward(self, x, on=False):
            return (self.layer(x) * self.read()).sin() if on or self.on else self.layer(x)

    mask = torch.ones(4)
    stack = ReversibleSequence([(Switched(mask), nn.Linear(4, 4))], scheduler=Functional())
    xs = leaves(dtype=torch.float32)
    for _ in range(2):
        loss(stack(*xs)).backward()
    if how == "attribute":
        stack[0].F.on = True
    total = loss(stack(*xs, **({"on": True} if how == "context" else {})))
    mask.mul_(1.0005)
    with pytest.raises(RuntimeError, match=r"shape \(4,\) that .* reads was modified by an inplace"):
        total.backward()


def test_a_function_that_does_not_repeat():
    counts = itertools.count().__next__  # where no guard sees it
    stack = ReversibleSequence([(Lambda(lambda x: x * counts()), nn.Linear(4, 4))], scheduler=Functional())
    y = stack(*leaves(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="does not repeat"):
        loss(y).backward()
    with pytest.raises(RuntimeError, match="does not repeat"):
        grad(lambda x: loss(stack(x, x)))(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="does not repeat"):
        vmap(grad(lambda x: loss(stack(x, x))))(torch.randn(3, 4))
    stack.scheduler = Functional(tolerance=float("inf"))
    loss(stack(*leaves(dtype=torch.float32))).backward()


def test_a_stream_that_leaves_the_range_of_an_exact_coupling():
    stack = ReversibleSequence([(Lambda(lambda x: 9.0 * x), mlp())], ExactAdditive(8.0), Functional())
    with pytest.raises(RuntimeError, match="beyond the limit of 8"):
        loss(stack(*(x + 3 for x in leaves(dtype=torch.float32)))).backward()


def test_streams_keep_their_dtype():
    xs = leaves(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="keep their dtype"):
        reversible([(lambda x: x.float(), lambda x: x)], *xs, coupling=Additive(), scheduler=Functional())


def test_batch_norm_is_refused_under_transforms():
    stack = net(Functional(), lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(RuntimeError, match=r"BatchNorm1d in F of block 0 .* eval mode"):
        grad(lambda x: loss(stack(x, x)))(torch.randn(6, 4, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- couplings
def test_other_couplings_and_more_streams():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = mlp(), mlp()

        def forward(self, x):
            return self.scale(x).tanh(), self.shift(x)

    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(), mlp()

        def forward(self, a, b):
            return self.a(a) * self.b(b)

    def scene(scheduler):
        torch.manual_seed(0)
        affine = ReversibleSequence([(Two(), Two())] * 2, Affine(), scheduler).double()
        three = ReversibleSequence([Step(Of()) for _ in range(4)], scheduler=scheduler).double()
        return [*train(affine, *leaves()), *train(three, *leaves(count=3))]

    assert error(scene(Functional()), scene(ByHand())) < 1e-10


def test_exact_couplings_are_exact():
    def scene(scheduler):
        torch.manual_seed(0)
        stack = ReversibleSequence([(mlp(dropout=0.2), mlp()) for _ in range(12)], ExactAdditive(), scheduler)
        with torch.autocast("cpu", torch.bfloat16):
            return train(stack, *leaves(8, 4, dtype=torch.float32))

    got, want = scene(Functional()), scene(Naive())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------------------------------- compiled
@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, make=mlp, depth=3, coupling=None, scheduler=None):
        super().__init__()
        pairs = [(make(), make()) for _ in range(depth)]
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.stack = ReversibleSequence(pairs, coupling, scheduler or Functional())

    def forward(self, x, **context):
        x = self.stem(x)
        return self.head(torch.cat(self.stack(x, x, **context)).tanh())


def trained(run, model, *inputs, **context):
    outputs = []
    for x in inputs:
        y = run(x, **context)
        y.sin().sum().backward()
        outputs.append(y.detach())
    found = [*outputs, *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    return found


def whole(model, backend="aot_eager", **options):
    """Compiled without a graph break, in as many graphs as it counts."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter, **options), counter


inductor = pytest.param("inductor", marks=pytest.mark.slow)
in_one_graph = pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 breaks its graph at Functional()")


@pytest.mark.some(1)
@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("coupling", [None, ExactAdditive(1024.0)], ids=["additive", "exact"])
def test_forward_and_backward_as_one_graph_each(backend, coupling):
    torch.manual_seed(0)
    model = Model(coupling=coupling).double()
    inputs = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    run, counter = whole(model, backend, dynamic=False)
    got = trained(run, model, *inputs)
    model.stack.scheduler = Naive()
    assert error(got, trained(model, model, *inputs)) < 1e-10
    assert counter.frame_count == 1


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_any_batch_size_in_two_graphs(backend):
    torch.manual_seed(0)
    model = Model().double()
    inputs = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 5, 8)]
    run, counter = whole(model, backend)
    got = trained(run, model, *inputs)
    model.stack.scheduler = Naive()
    assert error(got, trained(model, model, *inputs)) < 1e-10
    assert counter.frame_count == 2  # one for the first size, and one for all others


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
def test_autocast_in_one_graph():
    torch.manual_seed(0)
    model, x = Model(coupling=ExactAdditive(functions=torch.bfloat16)), torch.randn(6, 4)
    run, _ = whole(model)

    def step(run):
        with torch.autocast("cpu", torch.bfloat16):
            total = run(x).float().sin().sum()
        total.backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    got = step(run)
    model.stack.scheduler = Naive()
    assert all(torch.equal(a, b) for a, b in zip(got, step(model), strict=True))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, gate, strong):
        return self.linear(x) * gate if strong else self.linear(x)


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
def test_context_and_shared_modules_in_one_graph():
    def scene(compiled):
        torch.manual_seed(0)
        shared = Gated()
        model = Model(lambda: shared, scheduler=Functional() if compiled else Naive()).double()
        gate = torch.randn(4, dtype=torch.float64, requires_grad=True)
        run = whole(model)[0] if compiled else model
        found = trained(run, model, torch.randn(3, 4, dtype=torch.float64), gate=gate, strong=True)
        return [*found, gate.grad]

    assert error(scene(True), scene(False)) < 1e-10


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
def test_training_then_evaluating_is_two_graphs_and_swapping_the_scheduler_one_more():
    model, x = Model(), torch.randn(3, 4)
    run, counter = whole(model, dynamic=False)
    for _ in range(3):
        run(x).sum().backward()
    assert counter.frame_count == 1
    with torch.no_grad():
        run(x), run(x)
    assert counter.frame_count == 2
    model.stack.scheduler = Naive()
    run(x).sum().backward()
    assert counter.frame_count == 3
    model.stack.scheduler = Functional()
    run(x).sum().backward()
    assert counter.frame_count == 3


MODELS = {
    "vit": partial(RevViT, 16, 8, 3, 4, embed_dim=12, depth=2, num_heads=3),
    "swin": partial(RevSwin, 16, 2, 3, 4, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4),
    "mvit": partial(RevMViT, 16, 4, embed_dim=8, depths=(1, 2), num_heads=1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_per_sample(name):
    def scene(scheduler):
        torch.manual_seed(0)
        model, images = MODELS[name](scheduler=scheduler).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
        own = {k: p.detach() for k, p in model.named_parameters()}
        one = lambda own, x: functional_call(model, own, (x[None],)).sin().sum()  # noqa: E731
        return vmap(grad(one), in_dims=(None, 0))(own, images)

    assert error(scene(Functional()), scene(Naive())) < 1e-10


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_in_one_graph(name):
    torch.manual_seed(0)
    model, images = MODELS[name](scheduler=Functional()).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    run, counter = whole(model, dynamic=False)
    got = trained(run, model, images)
    torch.manual_seed(0)
    stored = MODELS[name](scheduler=Naive()).double()
    assert error(got, trained(stored, stored, images)) < 1e-10
    assert counter.frame_count == 1


def saved_by(depth, scheduler, rows=256):
    """Elements per row that the compiled forward hands to the compiled backward."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    outputs = []

    def forward(graph, _):
        (node,) = (n for n in graph.graph.nodes if n.op == "output")
        outputs.extend(t.meta["val"] for t in node.args[0] if hasattr(t, "meta"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    model = Model(depth=depth, scheduler=scheduler)
    torch.compile(model, fullgraph=True, backend=backend, dynamic=False)(torch.randn(rows, 4)).sum().backward()
    return sum(t.numel() for t in outputs if rows in t.shape[:1]) / rows


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
def test_what_a_compiled_forward_keeps_is_flat_in_depth():
    assert saved_by(8, Functional()) == saved_by(2, Functional()) < 0.5 * saved_by(8, Naive())


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.linear, self.draw = nn.Linear(4, 4), draw

    def forward(self, x):
        return self.draw(self.linear(x), self.training)


DRAWS = {
    "dropout": lambda h, training: F.dropout(h, 0.1, training),
    "dropout by keyword": lambda h, training: F.dropout1d(h, training=training),
    "torch.dropout": lambda h, training: torch.dropout(h, 0.1, training),
    "attention": lambda h, training: F.scaled_dot_product_attention(h, h, h, dropout_p=0.1 * training),
    "rrelu": lambda h, training: F.rrelu(h, training=training),
    "rand": lambda h, training: h * torch.rand(4, dtype=h.dtype) if training else h,
    "uniform_": lambda h, training: h * torch.empty(4).uniform_() if training else h,
}


class HoldsAGradient(Drawing):
    def __init__(self):
        super().__init__(None)
        self.gain = torch.ones(4, requires_grad=True)

    def forward(self, x):
        return self.linear(x) * self.gain


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "make",
    [partial(mlp, dropout=0.5), lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), HoldsAGradient],
    ids=["dropout", "batch norm", "a tensor that is no parameter"],
)
def test_what_does_not_go_into_a_whole_graph(make):
    model, x = Model(make), torch.randn(6, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Functional\(\) goes into a whole graph"):
        whole(model)[0](x)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_dropout_breaks_the_graph_and_is_replayed():
    def scene(compiled):
        torch.manual_seed(0)
        model = Model(partial(mlp, dropout=0.5), scheduler=Functional() if compiled else Naive()).double()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        return trained(run, model, torch.randn(6, 4, dtype=torch.float64))

    assert error(scene(True), scene(False)) < 1e-10


@pytest.mark.some(1)
@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_functions_that_draw_by_themselves_are_refused_while_tracing(draw):
    """Not by comparing: under bfloat16 it tolerates errors as large as those of a dropout."""
    model, x = Model(partial(Drawing, draw)), torch.randn(6, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="draws random numbers in a whole compiled graph"):
        whole(model)[0](x)
    torch._dynamo.reset()
    model.eval()
    whole(model)[0](x).sum().backward()


@pytest.mark.usefixtures("fresh")
def test_and_so_are_layers_that_do_without_a_module_for_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, dropout=0.1)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Functional\(\) goes into a whole graph"):
        whole(Model(Attention))[0](torch.randn(6, 4))


@pytest.mark.slow
@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_a_compiled_backward_notices_draws_that_tracing_does_not_show(backend):
    model, x = Model(partial(Drawing, lambda h, training: h * torch.rand_like(h))), torch.randn(6, 4)
    total = whole(model, backend)[0](x).sum()
    with pytest.raises(RuntimeError, match="recovered the inputs of a stack wrongly"):
        total.backward()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["dropout", "rand"])
def test_without_fullgraph_functions_that_draw_are_replayed(name):
    def scene(compiled):
        torch.manual_seed(0)
        scheduler = Functional() if compiled else Naive()
        model = Model(partial(Drawing, DRAWS[name]), scheduler=scheduler).double()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        return trained(run, model, torch.randn(6, 4, dtype=torch.float64))

    assert error(scene(True), scene(False)) < 1e-10


@in_one_graph
@pytest.mark.usefixtures("fresh")
def test_without_fullgraph_a_graph_break_within_a_function_leaves_the_stack_uncompiled():
    def broken(h, training):
        torch._dynamo.graph_break()
        return h.tanh()

    def gradients(compiled):
        torch.manual_seed(0)
        model, x = Model(partial(Drawing, broken)), torch.randn(6, 4, requires_grad=True)
        y = (torch.compile(model, backend="aot_eager") if compiled else model)(x)
        loss((y,)).backward()
        return [y, x.grad, *grads(model)]

    assert error(gradients(True), gradients(False)) < 1e-5


def test_what_was_made_for_a_graph_runs_without_one():
    def gradients(scheduler):
        torch.manual_seed(0)
        stack, xs = net(scheduler), leaves()
        steps = stack.bound_steps
        run = functional.autograd_function._apply
        ys = run(steps, tuple(xs), [{}] * 6, None, None, buffers=True) if scheduler == Functional() else stack(*xs)
        loss(ys).backward()
        return [*ys, *grads(*xs, stack)]

    assert error(gradients(Functional()), gradients(Naive())) < 1e-10


def test_what_was_made_for_a_graph_and_reads_more_does_not_run_without_one():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4)]

        def forward(self, x):
            return self.layers[0](x)

    stack = ReversibleSequence([(Listed(), Listed()) for _ in range(3)], scheduler=Functional()).double()
    with pytest.raises(RuntimeError, match="did not fit into one graph"):
        functional.autograd_function._apply(stack.bound_steps, tuple(leaves()), [{}] * 6, None, None, buffers=True)


GLOBAL = torch.ones(4, requires_grad=True)


@in_one_graph
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("read", [lambda h: h * GLOBAL, lambda h: torch.stack([h, GLOBAL.expand_as(h)]).sum(0)])
def test_a_global_variable_that_needs_a_gradient_is_refused_while_tracing(read):
    model = Model(partial(Drawing, lambda h, training: read(h)))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Pass it as context"):
        whole(model)[0](torch.randn(6, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_transforms_inside_compiled_code():
    def scene(compiled):
        torch.manual_seed(0)
        stack = net(Functional() if compiled else ByHand())
        xs = [torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2)]
        own = {k: p.detach() for k, p in stack.named_parameters()}
        f = vmap(grad(lambda own, *x: loss(functional_call(stack, own, x))), in_dims=(None, 0, 0))
        return (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(own, *xs)

    assert error(scene(True), scene(False)) < 1e-10
