"""Compiled functions, sequences, models and training steps: right gradients, counted graphs, flat memory; and exports.

What is compiled is compared with the same stack written down by hand and not compiled. The backend ``aot_eager`` takes
apart and differentiates as ``inductor`` does, and runs the same kernels as eager code, its dropout included.
"""

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import ByHand, error, every_recomputing_scheduler, grads, leaves, loss, mlp, train
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from research.benchmarking.instruments import cost
from revlib import ExactAdditive, ReversibleSequence, reversible
from revlib.models import RevMViT, RevSwin, RevViT
from revlib.schedulers import Anchored, Budget, Checkpoint, KeepLast, Naive, PaReprop, Reversible, Scheduler

SCHEDULERS = [Reversible(), Checkpoint(), Checkpoint(every=2), PaReprop(), Budget(fraction=0.5), Anchored(2), Naive()]
every_plan = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor on a CPU needs a C++ compiler"
)
slowly = pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])
backends = pytest.mark.parametrize("backend", ["aot_eager", slowly])


@pytest.fixture(autouse=True)
def fresh_compiler():
    def forget() -> None:
        torch._dynamo.reset()
        counters.clear()

    forget()
    with warnings.catch_warnings(), torch._inductor.config.patch(fallback_random=True):  # inductor draws as eager does
        warnings.simplefilter("ignore")
        yield
    forget()


class F(nn.Module):
    """A class of its own: torch 2.11 does not compile a bare ``nn.Sequential`` by ``Module.compile()``."""

    def __init__(self, width: int = 4, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mlp, self.drop = mlp(width, dropout=dropout), DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x):
        return self.drop(self.mlp(x))


class G(F):
    def forward(self, x):
        return self.drop(self.mlp(x.cos()))


def make(
    scheduler: Scheduler, depth: int = 2, dtype: torch.dtype = torch.float64, **noise: float
) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([(F(**noise), G(**noise)) for _ in range(depth)], scheduler=scheduler).to(dtype)


def compiled(model: nn.Module, backend: Any = "aot_eager", **options: Any) -> Any:
    """The same, with F and G of each of its stacks compiled."""
    for stack in model.modules():
        if isinstance(stack, ReversibleSequence):
            for branch in stack.bound_steps:
                branch.fn.compile(backend=backend, **options)
    return model


def counting(backend: str = "aot_eager") -> CompileCounterWithBackend:
    """A backend whose ``frame_count`` is the number of graphs it was given."""
    return CompileCounterWithBackend(backend)


def entries(function: type[nn.Module]) -> int:
    """The number of graphs kept for a class. A backend may be called twice for one, while torch finds out that a number
    is a constant of it."""
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(function.forward.__code__))


def breaks() -> int:
    return sum(counters["graph_break"].values())


def batches(*sizes: int, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [leaves(n, 4, dtype=dtype) for n in sizes]


def trained(stack: Any, inputs: list[list[Tensor]], train: Callable[..., Any] = train) -> list[Any]:
    """One training step after another: outputs and gradients of each."""
    torch.manual_seed(2)
    found = []
    for xs in inputs:
        for t in (*xs, *stack.parameters()):
            t.grad = None
        found.append(train(stack, *xs))
    return found


NOISES = {"plain": {}, "dropout": {"dropout": 0.4}, "drop path": {"drop_path": 0.3}}
every_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


# ---------------------------------------------------------------------------------------------- right gradients
@pytest.mark.some(3)
@backends
@every_noise
@every_plan
def test_functions(scheduler, noise, backend):
    want = trained(make(ByHand(), **noise), batches(3, 3, 3))
    counter = counting(backend)
    got = trained(compiled(make(scheduler, **noise), counter), batches(3, 3, 3))
    assert error(got, want) < 1e-10
    assert counter.frame_count == 2  # F and G, once each


@pytest.mark.slow
@needs_a_compiler
def test_functions_by_inductor():
    """One of the above in every run; the rest is slow."""
    test_functions(Reversible(), {"dropout": 0.4}, "inductor")


@pytest.mark.some(1)
@backends
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(every=2), Naive()], ids=repr)
def test_functions_in_wrappers(scheduler, backend):
    want = trained(make(ByHand(), dropout=0.4), batches(3, 3))
    counter, plain = counting(backend), make(scheduler, dropout=0.4)
    pairs = [tuple(torch.compile(f, backend=counter) for f in pair) for pair in plain]
    assert error(trained(ReversibleSequence(pairs, scheduler=scheduler), batches(3, 3)), want) < 1e-10
    assert counter.frame_count == 2


@every_plan
def test_a_compiled_function_on_two_streams_of_a_step(scheduler):
    """By ``revlib.reversible``: plain functions, of which one differentiates with respect to a tensor it captures."""
    torch.manual_seed(0)
    w, xs = torch.randn(4, 4, dtype=torch.float64, requires_grad=True), leaves()

    def f(x: Tensor) -> Tensor:
        return (x @ w).sin()

    found = []
    for function, plan in ((f, ByHand()), (torch.compile(f, backend="aot_eager"), scheduler)):
        y = reversible([(function, torch.tanh)] * 3, *xs, scheduler=plan)
        found.append(torch.autograd.grad(loss(y), [w, *xs]))
    assert error(found[1], found[0]) < 1e-10


@pytest.mark.some(1)
@backends
@every_plan
def test_bfloat16_autocast(scheduler, backend):
    """Compiled code rounds to bfloat16 elsewhere than eager code, which calls one kernel after another."""

    def amp(stack, *xs):
        with torch.autocast("cpu", torch.bfloat16):
            y = stack(*xs)
        loss(y).backward()
        return [*y, *grads(*xs, stack)]

    inputs = batches(64, 64, dtype=torch.float32)
    want = trained(make(ByHand(), dtype=torch.float32, dropout=0.4), inputs, amp)
    same = trained(compiled(make(ByHand(), dtype=torch.float32, dropout=0.4), backend), inputs, amp)
    torch._dynamo.reset()
    counter = counting(backend)
    got = trained(compiled(make(scheduler, dtype=torch.float32, dropout=0.4), counter), inputs, amp)
    assert counter.frame_count == 2
    assert error(got, want) < 0.03
    assert error(got, same) < 0.01


@pytest.mark.some(1)
@backends
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("scheduler", [s for s in SCHEDULERS if s != Naive()], ids=repr)
def test_exact_sums_give_every_bit_back(scheduler, amp, backend):
    """The same compiled functions give the same bits in the repetition, and then so do the gradients."""

    def play(plan: Scheduler) -> list[Any]:
        torch._dynamo.reset()
        stack = make(plan, 4, torch.float32, dropout=0.4, drop_path=0.3)
        stack.coupling = ExactAdditive()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return trained(compiled(stack, backend), batches(16, 16, 16, dtype=torch.float32))

    for got, want in zip(play(scheduler), play(Naive()), strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@backends
@every_recomputing_scheduler
def test_dropout_in_compiled_functions_is_replayed(scheduler, backend):
    """Inductor's own dropout draws other masks than eager dropout does, so its outputs tell which ones it drew.

    With F and G linear in their weights apart from the mask, gradients show the masks that backward used.
    """

    class Drop(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    torch.manual_seed(0)
    drop = Drop(4, 4)
    drop.compile(backend=backend)
    x1, x2 = leaves(64, 4, dtype=torch.float32)
    stack = ReversibleSequence([(drop, nn.Linear(4, 4))], scheduler=scheduler)
    with torch._inductor.config.patch(fallback_random=False):
        y1, _ = stack(x1, x2)
        kept = (y1 - x1).detach().abs() > 1e-5
        assert 0.3 < kept.float().mean() < 0.7
        y1.sum().backward()
    assert torch.allclose(drop.bias.grad, 2.0 * kept.sum(0), atol=1e-4)


# ---------------------------------------------------------------------------------------------- dynamic shapes
@pytest.mark.some(2)
@backends
@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(every=2), Budget(fraction=0.5), Naive()], ids=repr)
@pytest.mark.parametrize(
    ("options", "graphs"),
    [({"dynamic": True}, [2, 2, 2, 2]), ({}, [2, 4, 4, 4]), ({"dynamic": False}, [2, 4, 6, 6])],
    ids=["dynamic", "automatic", "static"],
)
def test_batches_of_several_sizes(scheduler, options, graphs, backend):
    """Left to itself, torch compiles a second time, for all sizes, when it sees a second size."""
    inputs, found, got = batches(6, 5, 7, 6), [], []
    want, stack = trained(make(ByHand()), inputs), compiled(make(scheduler), backend, **options)
    for xs in inputs:
        got += trained(stack, [xs])
        found.append(entries(F) + entries(G))
    assert error(got, want) < 1e-10
    assert found == graphs


@pytest.mark.some(1)
@every_plan
def test_two_sizes_before_the_first_backward(scheduler):
    """The first size meets, in its repetition, a graph for all sizes that was compiled after its forward."""
    sizes, found = batches(6, 5), []
    for plan, wrap in ((ByHand(), lambda stack: stack), (scheduler, compiled)):
        stack = wrap(make(plan))
        totals = [loss(stack(*xs)) for xs in sizes]
        found.append([torch.autograd.grad(t, [*xs, *stack.parameters()]) for t, xs in zip(totals, sizes, strict=True)])
    assert error(found[1], found[0]) < 1e-10


@pytest.mark.some(1)
@every_recomputing_scheduler
def test_a_size_marked_as_dynamic(scheduler):
    """A mark is on one tensor: F meets a marked stream and serves all sizes at once, G meets a merged one."""
    inputs, counter = batches(6, 5, 7), counting()
    want, stack = trained(make(ByHand()), inputs), compiled(make(scheduler), counter)
    for xs in inputs:
        for x in xs:
            torch._dynamo.mark_dynamic(x, 0)
    found, got = [], []
    for xs in inputs:
        got += trained(stack, [xs])
        found.append(counter.frame_count)
    assert error(got, want) < 1e-10
    assert found == [2, 3, 3]


# ---------------------------------------------------------------------------------------------- graphs and breaks
@pytest.mark.some(1)
@pytest.mark.parametrize("depth", [12, 2, 32])
def test_functions_of_one_class_share_a_graph(depth):
    counter, stack = counting(), make(Reversible(), depth)
    trained(compiled(stack, counter), batches(3, 3, 3))
    assert (counter.frame_count, breaks(), sum(counters["recompile_limit"].values())) == (2, 0, 0)


def test_the_tape_is_not_compiled():
    """Torch 2.11 runs a bare ``nn.Sequential`` uncompiled, with dynamo watching: it compiled what packs its tensors."""
    stack = ReversibleSequence([(mlp(), mlp()) for _ in range(2)]).double()
    trained(compiled(stack), batches(3, 3))
    assert counters["frames"]["total"] <= 1 and breaks() == 0


@pytest.mark.some(1)
@pytest.mark.parametrize("depth", [2, 8, 32])
@pytest.mark.parametrize("functions", [False, True], ids=["alone", "with functions"])
def test_a_compiled_sequence_breaks_once(depth, functions):
    """The sequence itself runs in Python: inside it, only functions that are compiled themselves are.

    Its two frames (of the sequence and of the scheduler) each break at the same call, once.
    """
    counter, inner, stack = counting(), counting(), make(Reversible(), depth)
    want = trained(make(ByHand(), depth), batches(3, 3, 3))
    if functions:
        compiled(stack, inner)
    run, frames = torch.compile(stack, backend=counter), []
    for xs in batches(3, 3, 3):
        run(*xs)
        frames.append(counters["frames"]["total"])
    assert frames[0] == frames[2]  # nothing is compiled again
    assert (counter.frame_count, inner.frame_count, breaks()) == (0, 2 if functions else 0, 2)
    assert list(counters["graph_break"].values()) == [2] and "record" in next(iter(counters["graph_break"]))
    assert error(trained(run, batches(3, 3, 3)), want) < 1e-8


def test_a_compiled_sequence_that_stores_everything_is_one_graph():
    counter, stack = counting(), make(Naive(), 8)
    want = trained(make(ByHand(), 8), batches(3, 3))
    assert error(trained(torch.compile(stack, backend=counter, fullgraph=True), batches(3, 3)), want) < 1e-10
    assert counter.frame_count == 1


@pytest.mark.parametrize("scheduler", [s for s in SCHEDULERS if s != Naive()], ids=repr)
def test_a_whole_graph_of_a_sequence_that_recomputes_is_refused(scheduler):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(make(scheduler), backend="eager", fullgraph=True)(*leaves())


@pytest.mark.some(2)
@pytest.mark.parametrize("scheduler", [s for s in SCHEDULERS if s != Naive()], ids=repr)
def test_a_compiled_sequence_recomputes(scheduler):
    """On torch 2.11 it once stored what ``Naive`` stores, and nothing said so."""
    calls, stack = [], make(scheduler)
    stack[0].F.register_forward_pre_hook(lambda *_, note=calls.append: note(1))
    run = torch.compile(stack, backend="aot_eager")
    for xs in batches(3, 3):
        loss(run(*xs)).backward()
    assert len(calls) == 4


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **rest: RevViT(8, 4, 3, 3, embed_dim=8, depth=3, num_heads=2, **rest),
    "swin": lambda **rest: RevSwin(16, 2, 3, 3, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, **rest),
    "mvit": lambda **rest: RevMViT(16, 4, 3, 3, embed_dim=8, depths=(1, 2), **rest),
}
every_model = pytest.mark.parametrize("name", MODELS)
quick_models = pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow), "mvit"])


def model(name: str, scheduler: Scheduler, **noise: float) -> nn.Module:
    torch.manual_seed(0)
    built = MODELS[name](scheduler=scheduler, **noise).double()
    for p in built.parameters():  # far from zero, so that no branch vanishes
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return built


def images(size: int, *counts: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, size, size, dtype=torch.float64) for n in counts]


def model_trained(run: Any, parameters: Any, inputs: list[Tensor]) -> list[Any]:
    torch.manual_seed(2)
    found, parameters = [], list(parameters)
    for x in inputs:
        y = run(x)
        found.append([y, *torch.autograd.grad(y.sin().square().sum(), parameters)])
    return found


@pytest.mark.some(1)
@backends
@quick_models
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.timeout(900)  # inductor compiles dozens of functions
def test_whole_models(name, noisy, backend):
    """The model compiled, and the functions in its stacks: the model's own part is patches, transitions and head."""
    noise = {"drop_path_rate": 0.3, "drop_rate": 0.2} if noisy else {}
    inputs = images(8 if name == "vit" else 16, 2, 2)
    plain, whole = model(name, Naive(), **noise), model(name, Reversible(), **noise)
    outer, inner = counting(backend), counting(backend)
    # Stages call the same code with other sizes. Symbolic sizes would keep inductor busy for a quarter of an hour.
    static = {"automatic_dynamic_shapes": backend != "inductor"}
    with torch._dynamo.config.patch(recompile_limit=64, **static):
        if noisy and backend == "inductor":  # whose functions draw in an order of their own: compare with the same
            compiled(plain, counting(backend))
        want = model_trained(plain, plain.parameters(), inputs)
        torch._dynamo.utils.counters.clear()
        got = model_trained(torch.compile(compiled(whole, inner), backend=outer), whole.parameters(), inputs)
    assert error(got, want) < 1e-8
    assert (outer.frame_count, breaks()) == {"vit": (4, 5), "swin": (5, 7), "mvit": (7, 9)}[name]


# ---------------------------------------------------------------------------------------------- recompilations
def test_what_compiles_again_and_what_does_not():
    counter = counting()
    stack = compiled(make(Reversible(), dropout=0.4), counter)
    found: dict[str, int] = {}

    def event(what: str) -> None:
        found[what] = counter.frame_count - sum(found.values())

    y = stack(*leaves())
    event("forward")
    loss(y).backward()
    event("backward, where functions are repeated")
    train(stack, *leaves())
    event("a second step")
    for scheduler in SCHEDULERS:
        stack.scheduler = scheduler
        train(stack, *leaves())
        event(f"swapped to {scheduler}")
    stack.scheduler = Reversible()
    stack.eval()
    train(stack, *leaves())
    event("eval mode")
    stack.train()
    train(stack, *leaves())
    event("train mode again")
    with torch.no_grad():
        stack(*leaves())
    event("no_grad")
    with torch.inference_mode():
        stack(*leaves())
    event("inference_mode")
    train(stack, *leaves())
    event("gradients again")
    y = stack(*(x.detach() for x in leaves()))
    event("streams without gradients")
    loss(y).backward()
    event("their backward")
    train(stack, *leaves(5, 4))
    event("a second batch size")
    train(stack, *leaves(7, 4))
    event("a third")
    assert {what: graphs for what, graphs in found.items() if graphs} == {
        "forward": 2,
        "eval mode": 2,  # of the dropout: modes are constants of a graph
        "no_grad": 3,  # gradients are, too; and whether an input wants them: x2 does, what is merged without does not
        "inference_mode": 3,
        "streams without gradients": 1,
        "a second batch size": 2,  # for all further sizes
    }
    assert counters["recompile_limit"] == Counter()


@pytest.mark.some(1)
@pytest.mark.parametrize(("limit", "graphs"), [(8, 8), (64, 12)])
def test_rates_of_drop_path_are_constants_of_a_graph(limit, graphs):
    """Each rate is compiled apart; from the ninth on, torch silently runs the function uncompiled. Right either way."""
    rates = [0.02 * i for i in range(12)]

    def deep(scheduler: Scheduler) -> ReversibleSequence:
        torch.manual_seed(0)
        stack = ReversibleSequence([(F(drop_path=rate), nn.Tanh()) for rate in rates], scheduler=scheduler)
        return stack.double()

    want, stack = trained(deep(ByHand()), batches(3, 3)), deep(Reversible())
    with torch._dynamo.config.patch(recompile_limit=limit):
        for f, _ in stack:
            f.compile(backend="aot_eager")
        assert error(trained(stack, batches(3, 3)), want) < 1e-9
    assert entries(F) == graphs


# ---------------------------------------------------------------------------------------------- memory
@backends
def test_memory_is_flat_in_depth(backend):
    """Counted by torch's allocator, since no dispatch mode sees what compiled code allocates."""

    def peak(scheduler: Scheduler, depth: int) -> int:
        stack = compiled(make(scheduler, depth, torch.float32), backend)
        x = torch.randn(512, 4, requires_grad=True)

        def run(x: Tensor) -> Any:
            return stack(x, x.cos())

        loss(run(x)).backward()
        return cost(run, x, list(stack.parameters())).peak

    shallow, deep = peak(Reversible(), 4), peak(Reversible(), 12)
    # Of each of 16 more steps, samples of up to 128 numbers of a stream and 16 of an activation to compare.
    assert shallow <= deep <= shallow + 16 * 4 * (128 + 16)
    assert peak(Naive(), 12) > 2.5 * peak(Naive(), 4)


# ---------------------------------------------------------------------------------------------- a whole training step
@pytest.mark.some(1)
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, KeepLast(1)], ids=repr)
@pytest.mark.parametrize("functions", [False, True], ids=["alone", "with functions"])
def test_a_compiled_training_step(scheduler, functions):
    """Forward, loss and backward in one compiled function: dynamo must leave alone what runs inside backward."""
    check_training_step(scheduler, functions)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, KeepLast(1)], ids=repr)
def test_a_training_step_with_compiled_autograd(scheduler):
    with torch._dynamo.config.patch(compiled_autograd=True):
        check_training_step(scheduler, functions=True)


def check_training_step(scheduler: Scheduler, functions: bool) -> None:
    inputs = batches(3, 3, 3)
    want, counter, stack = trained(make(ByHand(), dropout=0.4), inputs), counting(), make(scheduler, dropout=0.4)
    if functions:
        compiled(stack)

    @torch.compile(backend=counter)
    def step(stack, *xs):
        y = stack(*xs)
        loss(y).backward()
        return y

    got = trained(stack, inputs, lambda stack, *xs: [*step(stack, *xs), *grads(*xs, stack)])
    assert error(got, want) < 1e-10
    assert counter.frame_count > 0


# ---------------------------------------------------------------------------------------------- export
every_export = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


def exported(model: nn.Module, inputs: tuple[Tensor, ...], strict: bool) -> Any:
    sizes = [{0: torch.export.Dim("batch", min=2, max=64)}] * len(inputs)
    dynamic = (tuple(sizes),) if isinstance(model, ReversibleSequence) else tuple(sizes)
    return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=strict)


def operations(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.some(1)
@every_export
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@every_plan
def test_an_exported_stack_is_the_recurrence_written_down(scheduler, mode, training, strict):
    """The same operations as by hand: nothing of the engine is in the program."""
    with mode():
        programs = [
            exported(make(plan, dropout=0.4).train(training), tuple(x.detach() for x in leaves(5, 4)), strict)
            for plan in (ByHand(), scheduler)
        ]
    assert operations(programs[1]) == operations(programs[0])
    if not training:
        xs = leaves(9, 4)
        assert error(programs[1].module()(*xs), make(ByHand()).eval()(*xs)) < 1e-12


@pytest.mark.some(1)
@every_export
@every_model
def test_exported_models(name, strict):
    plain = model(name, Reversible()).eval()
    few, more = images(8 if name == "vit" else 16, 3, 7)
    with torch.no_grad():
        program = exported(plain, (few,), strict)
        assert error(program.module()(more), plain(more)) < 1e-12
    assert all(target.startswith(("aten", "<built-in function")) for target in operations(program)), operations(program)


def test_a_traced_stack():
    """``torch.jit.trace`` knows nothing of hooks: while it records, everything is kept."""
    stack, (few, more) = make(Reversible()).eval(), batches(5, 9)
    with torch.no_grad():
        assert error(torch.jit.trace(stack, tuple(few))(*more), stack(*more)) < 1e-12
    traced = torch.jit.trace(stack, tuple(x.detach() for x in few))
    assert error(traced(*more), stack(*more)) < 1e-12
