"""What only a GPU can show. All of it is skipped without one; `TORCH_CUDA_SANITIZER=1` looks for races besides."""

import pytest
import torch
from common import error, grads, loss, vit_block
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
    raise_pending,
)
from revlib.couplings import kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ALWAYS = PaReprop(trials=0)
SLEEP = 2_000_000  # cycles: about a millisecond


class Asleep(nn.Module):
    """Delays its result on the device, in forward or in its gradient."""

    def __init__(self, fn, when):
        super().__init__()
        self.fn, self.when = fn, when

    def forward(self, x):
        y = self.fn(x)
        if self.when == "recovery":  # on the side stream, in backward
            torch.cuda._sleep(SLEEP)
        elif y.requires_grad:
            y.register_hook(lambda _: torch.cuda._sleep(SLEEP))  # on main, among the gradients
        return y


def vits(depth, width=64, when=None, dropout=0.0):
    torch.manual_seed(0)
    blocks = [vit_block(width, 2) for _ in range(depth)]
    if dropout:
        blocks = [tuple(nn.Sequential(f, nn.Dropout(dropout)) for f in pair) for pair in blocks]
    if when:
        blocks = [tuple(Asleep(f, when) for f in pair) for pair in blocks]
    return ReversibleSequence(blocks).cuda()


def step(stack, scheduler, x, amp=False):
    stack.scheduler = scheduler
    stack.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        outputs = stack(x, x)
    loss(outputs).backward()
    found = [*(y.detach() for y in outputs), *grads(x, stack)]
    raise_pending()
    return found


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 33, 64, device="cuda")


@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@pytest.mark.parametrize("when", [None, "recovery", "gradient"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pareprop_has_the_gradients_of_reversible(x, depth, when, dropout):
    stack = vits(depth, when=when, dropout=dropout)
    want = step(stack, Reversible(), x)
    for _ in range(3):  # memory comes back from the allocator
        assert error(step(stack, ALWAYS, x), want) < 1e-5
    assert error(want, step(stack, Naive(), x)) < 1e-3


@pytest.mark.parametrize(
    "scheduler", [KeepLast(3), Checkpoint(), Checkpoint(2), Anchored(4), Budget(fraction=0.5)], ids=str
)
def test_it_composes(x, scheduler):
    stack = vits(6, when="recovery")
    want = step(stack, Naive(), x)
    for _ in range(3):
        assert error(step(stack, scheduler, x), want) < 1e-3
        assert error(step(stack, PaReprop(scheduler, trials=0), x), want) < 1e-3


@pytest.mark.parametrize("when", ["recovery", "gradient"])
def test_under_autocast_on_another_stream(x, when):
    stack = vits(4, when=when, dropout=0.1)
    want = step(stack, Reversible(), x, amp=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            found = step(stack, ALWAYS, x, amp=True)
        torch.cuda.current_stream().synchronize()
    assert error(found, want) < 1e-2


@pytest.mark.parametrize("when", ["recovery", "gradient"])
def test_with_the_optimizer_in_backward(x, when):
    found = []
    for scheduler in (Naive(), ALWAYS):
        stack = vits(4, when=when)
        stack.scheduler = scheduler

        def update(p):
            with torch.no_grad():
                p.sub_(1e-4 * p.grad)
            p.grad = None

        for p in stack.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            loss(stack(x, x)).backward()
        found.append([p.detach() for p in stack.parameters()])
    assert error(found[1], found[0]) < 1e-3


def test_the_host_never_waits(x):
    stack = vits(4, dropout=0.1)
    for scheduler in (Reversible(), ALWAYS, PaReprop(trials=2)):
        step(stack, scheduler, x)
        torch.cuda.synchronize()
        stack.zero_grad(set_to_none=False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                outputs = stack(x, x)
                sum(y.square().mean() for y in outputs).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    raise_pending()


@pytest.mark.parametrize("scheduler", [Reversible(), ALWAYS], ids=["reversible", "pareprop"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_step_in_a_cuda_graph(x, scheduler, dropout):
    """Forward, backward and optimizer, captured together and replayed, against the same steps run one by one."""

    def make():
        stack = vits(3, dropout=dropout)
        stack.scheduler = scheduler
        return stack, torch.optim.SGD(stack.parameters(), 0.1)

    def train(stack, optimizer):
        optimizer.zero_grad(set_to_none=False)
        sum(y.square().mean() for y in stack(x, x)).backward()
        optimizer.step()

    found = []
    for captured in (False, True):
        stack, optimizer = make()
        state = {k: v.clone() for k, v in stack.state_dict().items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train(stack, optimizer)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        raise_pending()
        stack.load_state_dict(state)
        torch.manual_seed(2)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train(stack, optimizer)
            stack.load_state_dict(state)
            torch.manual_seed(2)
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                train(stack, optimizer)
        torch.cuda.synchronize()
        found.append([p.detach().clone() for p in stack.parameters()])
    assert error(found[1], found[0]) < 1e-3


def test_peaks():
    """Look-ahead takes the activations of a step of attention, at any depth."""
    peaks = {}
    for depth in (4, 12):
        stack, x = vits(depth, width=256), torch.randn(16, 197, 256, device="cuda")
        for name, scheduler in (("reversible", Reversible()), ("pareprop", ALWAYS)):
            step(stack, scheduler, x)
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            outputs = stack(x, x)
            sum(y.square().mean() for y in outputs).backward()
            del outputs
            peaks[name, depth] = (torch.cuda.max_memory_allocated() - base) / x.nbytes
    print(peaks)
    assert peaks["pareprop", 12] <= peaks["reversible", 12] + 6.2
    assert peaks["pareprop", 12] <= peaks["pareprop", 4] * 1.03


def test_out_of_memory_in_the_look_ahead_is_survived(x):
    class Greedy(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn, self.main = fn, torch.cuda.current_stream()

        def forward(self, x):
            if torch.cuda.current_stream() != self.main:
                torch.empty(2**44, dtype=torch.uint8, device=x.device)
            return self.fn(x)

    stack = vits(3)
    want = step(stack, Reversible(), x)
    stack[1].G = Greedy(stack[1].G)
    scheduler = PaReprop(trials=1)
    assert error(step(stack, scheduler, x), want) < 1e-5
    assert [t.verdict for t in scheduler._trials.values()] == [False]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("scheduler", [Checkpoint(), Checkpoint(2), Anchored(4), Reversible()], ids=str)
def test_what_attention_leaves_uninitialised_is_no_error(x, scheduler, amp):
    """Its kernels save a seed that they write only where they draw, and pad the logarithms of their sums."""
    stack = vits(3)
    for tokens in (33, 64):
        for _ in range(5):
            step(stack, scheduler, x[:, :1].expand(-1, tokens, -1).contiguous(), amp)
            torch.randint(2**40, (1000,))  # other rubbish on the heap


# ---------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("results", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("streams", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_kernel_adds_bit_for_bit_as_the_cpu_does(streams, results, sign):
    torch.manual_seed(0)
    grid = 1024 * 2.0 ** (-24 if streams == torch.float32 else -53)
    t = torch.cat([torch.randn(100_000), torch.randn(1000) * 300, torch.randint(-9, 9, (999,)) * grid / 2]).to(results)
    s = (torch.randn(len(t), dtype=streams) / grid).round() * grid
    coupling = ExactAdditive()
    law = coupling.merge if sign > 0 else coupling.unmerge
    assert kernel.serves(s.cuda(), t.cuda())
    assert torch.equal(law(s.cuda(), t.cuda()).cpu(), law(s, t))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("depth", [3, 192])
def test_inversion_gives_back_every_bit(x, depth, amp):
    stack = vits(depth).eval()
    stack.coupling = ExactAdditive()
    x = stack.coupling.enter(x)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        assert all(torch.equal(a, x) for a in stack.inverse(*stack(x, x)))


@pytest.mark.parametrize("scheduler", [Reversible(), ALWAYS, Checkpoint(2), Anchored(4)], ids=str)
@pytest.mark.parametrize("amp", [False, True])
def test_exact_gradients_are_those_of_naive_bit_for_bit(x, scheduler, amp, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        stack = vits(12, dropout=0.1)
        stack.coupling = ExactAdditive()
        want = step(stack, Naive(), x, amp)
        assert all(map(torch.equal, want, step(stack, Naive(), x, amp))), "the kernels do not repeat their bits"
        assert all(map(torch.equal, want, step(stack, scheduler, x, amp)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("amp", [False, True])
def test_functional(amp):
    stack, x = vits(3, dropout=0.2), torch.randn(4, 9, 64, device="cuda")
    if amp:
        stack = ReversibleSequence([tuple(pair) for pair in stack], ExactAdditive())
    want, got = step(stack, Naive(), x, amp), step(stack, Functional(), x, amp)
    raise_pending()
    assert error(got, want) < 1e-4


def test_gradients_per_sample_under_functional():
    stack, x = vits(3), torch.randn(4, 9, 64, device="cuda")
    weights = {name: p.detach() for name, p in stack.named_parameters()}

    def found(scheduler):
        stack.scheduler = scheduler
        one = lambda w, x: loss(torch.func.functional_call(stack, w, (x[None], x[None])))  # noqa: E731
        return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(weights, x)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want, got = found(Naive()), found(Functional())
    raise_pending()
    assert error(got, want) < 1e-3  # TF32 may take part


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 breaks its graph at Functional()")
def test_functional_in_one_graph():
    stack, x = vits(3), torch.randn(4, 9, 64, device="cuda")
    want = step(stack, Naive(), x)
    whole = ReversibleSequence([tuple(pair) for pair in stack], scheduler=Functional())
    whole.zero_grad()
    again = x.detach().requires_grad_()
    outputs = torch.compile(whole, fullgraph=True)(again, again)
    loss(outputs).backward()
    assert error([*outputs, *grads(again, whole)], want) < 1e-3
