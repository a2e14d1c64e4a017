"""Functions that differentiate inside by ``torch.func`` or run a higher-order operation, and stacks that are traced."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Lambda, error, grads, leaves, loss, mlp
from scenes import Foreign, Stage, Unlike, scene
from situations.base import SCHEDULERS
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from revlib import Naive, ReversibleSequence
from revlib.schedulers import Scheduler

# ---------------------------------------------------------------------------------------------- torch.func inside
REASON = r"torch\.func|transform|higher.order"


def inside(stage: Stage, run: Callable[..., Tensor], *modules: Callable[[], nn.Module]) -> list[Any]:
    made = modules or (lambda: nn.Linear(4, 4),)
    stack = stage.sequence(*((Lambda(run, *(m() for m in made)), mlp()) for _ in range(2)))
    xs, found = leaves(), []
    for _ in range(2):
        outputs = stack(*xs)
        stage.forward_is_over()
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@scene("9", refusal=REASON)
def test_one_step_of_an_inner_model(stage: Stage):
    """Test-time training."""

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.k, self.v = (
                nn.Parameter(0.1 * torch.randn(4, 4)),
                nn.Linear(4, 4),
                nn.Linear(4, 4),
            )

        def forward(self, x):
            k, v = self.k(x), self.v(x)
            return k @ (self.w - 0.1 * grad(lambda w: (k @ w - v).square().mean())(self.w))

    stack, xs = (
        stage.sequence((Training(), nn.Linear(4, 4)), (Training(), nn.Linear(4, 4))),
        leaves(),
    )
    outputs = stack(*xs)
    stage.forward_is_over()
    loss(outputs).backward()
    return grads(*xs, stack)


@scene("9", refusal=REASON)
def test_the_gradient_of_an_energy_by_func(stage: Stage):
    return inside(stage, lambda m, x: -grad(lambda x: m(x).sin().sum())(x))


@scene("9", refusal=REASON)
def test_a_jacobian_in_reverse(stage: Stage):
    def run(m, x):
        return torch.stack([jacrev(lambda z: m(z).tanh())(z).sum(0) for z in x])

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_a_jacobian_in_forward_mode(stage: Stage):
    def run(m, x):
        return torch.stack([jacfwd(lambda z: m(z).tanh())(z).sum(0) for z in x])

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_a_vector_jacobian_product(stage: Stage):
    def run(m, x):
        y, pull = vjp(lambda x: m(x).tanh(), x)
        return pull(y)[0]

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_a_jacobian_vector_product(stage: Stage):
    return inside(stage, lambda m, x: jvp(lambda x: m(x).tanh(), (x,), (x.cos(),))[1])


@scene("9", refusal=REASON)
def test_the_trace_of_a_hessian(stage: Stage):
    def run(m, x):
        return torch.stack([hessian(lambda z: m(z).sin().sum())(z).diagonal() for z in x])

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_gradients_per_sample(stage: Stage):
    return inside(stage, lambda m, x: vmap(grad(lambda z: m(z).sin().sum()))(x))


@scene("9", refusal=REASON)
def test_a_vmap_alone(stage: Stage):
    return inside(stage, lambda m, x: vmap(lambda z: m(z).tanh())(x))


@scene("9", refusal=REASON)
def test_gradients_of_weights_by_functional_call(stage: Stage):
    def run(m, x):
        weights = dict(m.named_parameters())
        steps = grad(lambda w: functional_call(m, w, (x,)).square().mean())(weights)
        return functional_call(m, {k: w - 0.1 * steps[k] for k, w in weights.items()}, (x,))

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_a_divergence_estimated_by_noise(stage: Stage):
    """Hutchinson's, as of continuous flows."""

    def run(m, x):
        noise = torch.randn_like(x)
        y, pull = vjp(lambda x: m(x).tanh(), x)
        return y + (pull(noise)[0] * noise).sum(-1, keepdim=True)

    return inside(stage, run)


@scene("9", refusal=REASON)
def test_an_unrolled_inner_loop(stage: Stage):
    """MAML: three steps of the inner weights."""

    def run(m, x):
        w = m.weight
        for _ in range(3):
            w = w - 0.1 * grad(lambda w: (x @ w).tanh().square().mean())(w)
        return x @ w

    return inside(stage, run)


# ---------------------------------------------------------------------------------------------- higher-order operations
def cell(c: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h = (0.5 * c + t).tanh()
    return h, h.clone()


def scanned(stage: Stage, run: Callable[..., Tensor]) -> list[Any]:
    torch._dynamo.reset()
    stack, xs = stage.stack(lambda: Lambda(run, nn.Linear(4, 4)), depth=1), leaves(2, 5, 4)
    try:
        outputs = stack(*xs)
        stage.forward_is_over()
        loss(outputs).backward()
        return [*outputs, *grads(*xs, stack)]
    finally:
        torch._dynamo.reset()


@pytest.mark.some(3)
@scene("9", refusal=REASON)
def test_a_scan(stage: Stage):
    from torch._higher_order_ops import scan

    def run(m, x):
        h = m(x)
        found = scan(cell, h[:, 0] * 0, h, dim=1)[1]
        return found if found.shape == h.shape else found.movedim(0, 1)  # torch 2.11 puts the results side by side

    return scanned(stage, run)


@scene("9", refusal=REASON)
def test_an_associative_scan(stage: Stage):
    from torch._higher_order_ops import associative_scan

    def run(m, x):
        return associative_scan(lambda a, b: a * b + b, m(x).tanh(), dim=1, combine_mode="generic")

    return scanned(stage, run)


@pytest.mark.some(3)
@scene("9", refusal=REASON)
def test_a_conditional(stage: Stage):
    def run(m, x):
        h = m(x)
        return torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))

    return scanned(stage, run)


@pytest.mark.some(3)
@scene("9", refusal=REASON)
def test_a_map(stage: Stage):
    from torch._higher_order_ops import map as mapped

    def run(m, x):
        return mapped(lambda row, w: (row @ w).tanh(), m(x), m.weight)

    return scanned(stage, run)


# ---------------------------------------------------------------------------------------------- traced
class Net(nn.Module):
    def __init__(self, scheduler: Scheduler, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stack = ReversibleSequence([(make(), make()) for _ in range(2)], scheduler=scheduler)

    def forward(self, x):
        return torch.cat(self.stack(x, x), -1)


def traced(net: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(net, x)(x)


def traced_module(net: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace_module(net, {"forward": x})(x)


def traced_and_trained(net: nn.Module, x: Tensor) -> Any:
    """What was traced has weights of its own, which are those of the net."""
    made = torch.jit.trace(net, x)
    made(x).sin().sum().backward()
    return [p.grad for p in net.parameters()]


def traced_while_another_trains(net: nn.Module, x: Tensor) -> Any:
    outputs = net(x)
    found = torch.jit.trace(net, x)(x)
    outputs.sin().sum().backward()
    return [found, *(p.grad for p in net.parameters())]


def counted_by_fvcore(net: nn.Module, x: Tensor) -> Any:
    counting = pytest.importorskip("fvcore.nn")
    return counting.FlopCountAnalysis(net, x).unsupported_ops_warnings(False).total()


def drawn_by_tensorboard(net: nn.Module, x: Tensor) -> Any:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard._pytorch_graph import graph

    nodes = graph(net, x)[0].node
    return sorted(n.op for n in nodes if n.op.startswith("aten"))


def exported_by_tracing(net: nn.Module, x: Tensor) -> Any:
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False)
    return sorted(n.op_type for n in onnx.load_model_from_string(file.getvalue()).graph.node)


def made_a_graph(net: nn.Module, x: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(net)(x)(x)


def counted_by_torch(net: nn.Module, x: Tensor) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def exported(net: nn.Module, x: Tensor) -> Any:
    return torch.export.export(net, (x,)).module()(x)


TRACERS = [
    *(traced, traced_module, traced_and_trained, traced_while_another_trains),
    *(counted_by_fvcore, drawn_by_tensorboard, exported_by_tracing),
    *(made_a_graph, counted_by_torch, exported),
]


def _cells() -> list[Any]:
    cells = [(trace, *named) for trace in TRACERS for named in SCHEDULERS.items()]
    return [pytest.param(t, s, id=f"{t.__name__}-{name}") for t, name, s in cells]


@pytest.mark.some(12)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trace", "scheduler"), _cells())
def test_tracing_with_gradients_on(trace, scheduler):
    """While something traces, a stack runs as plain autograd would run it."""
    found = []
    for s in (Naive(), scheduler):
        torch.manual_seed(0)
        net = Net(s, mlp).eval()
        x = torch.randn(3, 4)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found.append(trace(net, x))
        except Exception as raised:
            raise Foreign(f"{type(raised).__name__}: {raised}") from raised
    want, got = found
    try:
        far = error(got, want)
    except AssertionError as unlike:
        raise Unlike(f"{got} for {want}") from unlike
    if not far < 1e-5:
        raise Unlike(f"{far:.2g} from plain autograd")
