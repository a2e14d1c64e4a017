"""Stopping a repetition early: never inside an operation, and never so that a function can catch it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import ByHand, Lambda, error, grads, leaves, loss, net
from scenes import Stage, Unlike, scene
from situations.base import train, train_on
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from revlib import Checkpoint, KeepLast

# ---------------------------------------------------------------------------------------------- within an operation
JUNK = iter(float(10**i % 997 + 1) for i in range(10**9))


def litter(*shapes: tuple[int, ...]) -> None:
    """Leave numbers in memory that is free, other ones each time: what is not written must not be compared."""
    left = [torch.full(shape, next(JUNK)) for shape in shapes for _ in range(20)]
    del left


@scene("8")
def test_a_random_leaky_relu_last(stage: Stage):
    """Autograd saves its noise before the kernel writes it."""
    return train(stage.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU())), 16, 4)


@scene("8")
def test_a_random_leaky_relu_in_eval_mode(stage: Stage):
    """Where the noise is never written, and never read."""

    def make():
        layer = nn.Linear(4, 4)
        layer.register_forward_pre_hook(lambda m, args: litter((16, 4)))
        return nn.Sequential(layer, nn.RReLU())

    return train(stage.stack(make).eval(), 16, 4)


@scene("8")
def test_a_random_leaky_relu_in_place(stage: Stage):
    return train(stage.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU(inplace=True))), 16, 4)


@scene("8")
def test_a_random_leaky_relu_before_a_view(stage: Stage):
    """Nothing after it saves a tensor."""

    def leak(m, x):
        return F.rrelu(m(x), training=True).t().contiguous().t().flip(0) + 1

    return train(stage.stack(lambda: Lambda(leak, nn.Linear(4, 4))), 16, 4)


@scene("8")
def test_a_random_leaky_relu_of_the_stream_itself(stage: Stage):
    return train_on(
        [leaves(16, 4) for _ in range(2)],
        stage.stack(lambda: Lambda(lambda x: F.rrelu(x, training=True))),
    )


@scene("8")
def test_a_random_leaky_relu_alone_in_a_branch(stage: Stage):
    """Two branches: the one that is computed last saves last."""

    def branches(m, x):
        return m(x).tanh() + F.rrelu(x, 0.1, 0.9, training=True)

    return train(stage.stack(lambda: Lambda(branches, nn.Linear(4, 4))), 16, 4)


@pytest.mark.parametrize("elsewhere", [False, True])
@scene("8", refusal="recovered what enters")
def test_a_random_leaky_relu_beside_numbers_of_the_functions_own(stage: Stage, elsewhere: bool):
    """What the operation leaves unwritten is not compared, and all the rest is."""
    generator = torch.Generator().manual_seed(0)

    def noisy(m, x):
        numbers = torch.rand(x.shape, generator=generator)
        return m(x) * numbers + F.rrelu(x, training=True) if elsewhere else F.rrelu(m(x), training=True) * numbers

    return train(stage.stack(lambda: Lambda(noisy, nn.Linear(4, 4))), 16, 4)


# ---------------------------------------------------------------------------------------------- before an edit
class Editing(nn.Module):
    """Edits what autograd has saved, without a trace, after the last tensor is saved: backward sees the edit."""

    def __init__(self, edit: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("scale", torch.ones(4))
        self.edit = edit

    def forward(self, x):
        h = self.first(x) * self.scale
        y = self.third(self.second(h).tanh())
        self.edit(self, h)
        return y


def statistics(m: Any, h: Tensor) -> None:
    m.scale.data.lerp_(1 / h.detach().std(0), 0.1)


def decay(m: Any, h: Tensor) -> None:
    m.second.weight.data.mul_(0.9)


def intermediate(m: Any, h: Tensor) -> None:
    h.data[0] = 0


def by_numpy(m: Any, h: Tensor) -> None:
    m.scale.numpy()[0] *= 0.9


@pytest.mark.parametrize("edit", [statistics, decay, intermediate, by_numpy])
@scene("8")
def test_what_was_saved_is_edited_at_the_end(stage: Stage, edit: Any):
    return train(stage.stack(lambda: Editing(edit)), 16, 4)


@scene("8")
def test_a_codebook_whose_distances_are_differentiated(stage: Stage):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("codes", torch.randn(6, 4))

        def forward(self, x):
            z = self.layer(x)
            q = self.codes[torch.cdist(z, self.codes).argmin(-1)]
            with torch.no_grad():
                self.codes.mul_(0.9).add_(0.1 * z.mean(0))
            return z + (q - z).detach()

    return train(stage.stack(Quantised), 16, 4)


# ---------------------------------------------------------------------------------------------- before it is given back
class Restoring(nn.Module):
    """Sets something while it runs, and back again, without ``finally``."""

    def __init__(self, on: Callable[[Any], None], off: Callable[[Any], None]) -> None:
        super().__init__()
        self.layer, self.dropout, self.switch = nn.Linear(4, 4), nn.Dropout(0.5), False
        self.box, self.on, self.off = {"on": False}, on, off

    def forward(self, x):
        self.on(self)
        y = self.layer(self.dropout(x))
        self.off(self)
        return y


def hook_child(m: Any) -> None:
    m.handle = m.dropout.register_forward_hook(lambda _, args, y: 0.5 * y)


def freeze_child(m: Any, learns: bool) -> None:
    for p in m.layer.parameters():
        p.requires_grad_(learns)


LOCK = threading.Lock()


def take_lock(m: Any) -> None:
    assert LOCK.acquire(timeout=1), "nobody has given it back"


@pytest.mark.parametrize(
    ("on", "off"),
    [
        (lambda m: m.dropout.eval(), lambda m: m.dropout.train()),
        (lambda m: setattr(m, "switch", True), lambda m: setattr(m, "switch", False)),
        (lambda m: m.box.update(on=True), lambda m: m.box.update(on=False)),
        (lambda m: torch.use_deterministic_algorithms(True), lambda m: torch.use_deterministic_algorithms(False)),
        (take_lock, lambda m: LOCK.release()),
        (hook_child, lambda m: m.handle.remove()),
        (lambda m: freeze_child(m, False), lambda m: freeze_child(m, True)),
    ],
    ids=["mode", "attribute", "dict", "setting", "lock", "hook", "freezing"],
)
@scene("8")
def test_what_a_function_sets_is_set_back(stage: Stage, on: Any, off: Any):
    stack, xs = stage.stack(lambda: Restoring(on, off)), leaves(16, 4)
    outputs = stack(*xs)
    loss(outputs).backward()
    states = [(m.switch, m.box["on"]) for m in stack.modules() if isinstance(m, Restoring)]
    hooks = [len(m._forward_hooks) for m in stack.modules()]
    learns = [p.requires_grad for p in stack.parameters()]
    now = (
        [m.training for m in stack.modules()],
        states,
        hooks,
        learns,
        torch.are_deterministic_algorithms_enabled(),
        LOCK.locked(),
    )
    return [*outputs, *grads(*xs, stack), *now]


def temporal(
    m: nn.Module,
    x: Tensor,
    lengths: Any = (3, 2),
    reduction: str = "none",
    zero_infinity: bool = False,
):
    """A CTC loss of what the stream predicts, as a gate: batches of 2 of 12 steps, with 4 classes."""
    targets = torch.tensor([[1, 2, 1], [3, 1, 2]])
    log_probs = m(x).log_softmax(-1)
    litter((2, 12, 7))
    found = F.ctc_loss(log_probs, targets, (12, 9), lengths, reduction=reduction, zero_infinity=zero_infinity) / 100
    return found.view(1, -1, 1) if reduction == "none" else found


@scene("8", refusal="recovered what enters", refusing="Checkpoint Checkpoint(every=2) Anchored Budget")
def test_a_ctc_loss_last(stage: Stage):
    """Its kernel leaves the part of a saved tensor that no target reaches as it was allocated."""
    return train(stage.stack(lambda: Lambda(temporal, nn.Linear(4, 4))), 12, 2, 4)


@scene("8", refusal="recovered what enters", refusing="Checkpoint Checkpoint(every=2) Anchored Budget")
def test_a_ctc_loss_that_is_averaged(stage: Stage):
    run = functools.partial(temporal, reduction="mean")
    return train(stage.stack(lambda: Lambda(run, nn.Linear(4, 4))), 12, 2, 4)


@scene("8", refusal="recovered what enters", refusing="Checkpoint Checkpoint(every=2) Anchored Budget")
def test_a_ctc_loss_without_infinities(stage: Stage):
    run = functools.partial(temporal, zero_infinity=True, lengths=(3, 1))
    return train(stage.stack(lambda: Lambda(run, nn.Linear(4, 4))), 12, 2, 4)


class Noisy(torch.autograd.Function):
    """Saves a tensor that it fills only afterwards, as kernels that are launched on another stream do."""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        noise = torch.empty_like(output)
        ctx.save_for_backward(noise)
        noise.numpy()[:] = torch.rand_like(output).numpy()

    @staticmethod
    def backward(ctx, g):
        return g * (2 + 0 * ctx.saved_tensors[0])


@scene("8")
def test_a_tensor_written_after_it_was_saved(stage: Stage):
    """By memory that torch shares with NumPy. Plain autograd differentiates what is there in backward."""

    def noisy(m, x):
        h, mask = m(x), torch.zeros(x.shape)
        y = h * mask
        mask.numpy()[:] = 0.5
        return y - y.detach() + h.detach() * 0.5

    return train(stage.stack(lambda: Lambda(noisy, nn.Linear(4, 4))))


@scene("8")
def test_a_custom_function_that_fills_what_it_saves(stage: Stage):
    return train(stage.stack(lambda: Lambda(lambda m, x: Noisy.apply(m(x)), nn.Linear(4, 4))))


@scene("8", refusal="recovered what enters", refusing="Checkpoint Checkpoint(every=2) Anchored Budget")
def test_an_uninitialised_part_of_a_saved_tensor(stage: Stage):
    """Padding that nobody writes and no gradient reads, as of ragged kernels."""

    class Padded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            litter((2 * len(x), *x.shape[1:]))
            kept = torch.empty(2 * len(x), *x.shape[1:])
            kept[: len(x)] = x
            ctx.save_for_backward(kept)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0][: len(g)].cos()

    return train(stage.stack(lambda: Lambda(lambda m, x: Padded.apply(m(x)), nn.Linear(4, 4))))


@scene("8", refusal="recovered what enters", refusing="Checkpoint Checkpoint(every=2) Anchored Budget")
def test_a_buffer_that_is_filled_in_part(stage: Stage):
    """No gradient reads the rest, which holds something else in backward."""

    def padded(m, x):
        litter((2 * len(x), *x.shape[1:]))
        rows = torch.empty(2 * len(x), *x.shape[1:])
        rows[: len(x)] = m(x)
        return rows.sin()[: len(x)]

    return train(stage.stack(lambda: Lambda(padded, nn.Linear(4, 4))))


WITHOUT_CHECK = [Checkpoint(tolerance=math.inf), KeepLast(1, Checkpoint(tolerance=math.inf))]


@pytest.mark.parametrize("scheduler", WITHOUT_CHECK, ids=str)
def test_a_random_leaky_relu_without_the_check(scheduler):
    """Nobody compares what came back: it must be right by itself."""
    found = []
    for s in (ByHand(), scheduler):
        torch.manual_seed(0)
        stack, xs = net(s, lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU())), leaves(64, 4)
        loss(stack(*xs)).backward()
        found.append(grads(*xs, stack))
    if error(found[1], found[0]) > 1e-10:
        raise Unlike


# ---------------------------------------------------------------------------------------------- functions that catch
class Fast(nn.Module):
    """Two layers, and what to do where they fail, which they do not."""

    def __init__(self, run: Callable[[Callable[[], Tensor], Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 4), run

    def forward(self, x):
        return self.run(lambda: self.b(self.a(x).relu()), lambda: self.a(x) + self.b(x))


def caught(stage: Stage, run: Callable[..., Any]) -> list[Any]:
    return train(stage.stack(lambda: Fast(run)))


@scene("12")
def test_a_bare_except(stage: Stage):
    def run(fast, slow):
        try:
            return fast()
        except:  # noqa: E722
            return slow()

    return caught(stage, run)


@scene("12")
def test_an_except_of_base_exceptions(stage: Stage):
    def run(fast, slow):
        try:
            return fast()
        except BaseException:
            return slow()

    return caught(stage, run)


@scene("12")
def test_suppressed_exceptions(stage: Stage):
    def run(fast, slow):
        found = None
        with contextlib.suppress(BaseException):
            found = fast()
        return slow() if found is None else found

    return caught(stage, run)


@scene("12")
def test_a_finally_that_returns(stage: Stage):
    def run(fast, slow):
        found = None
        try:
            found = fast()
        finally:
            return slow() if found is None else found  # noqa: B012

    return caught(stage, run)


@scene("12")
def test_a_context_manager_that_swallows(stage: Stage):
    class Swallowing:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return True

    def run(fast, slow):
        found = None
        with Swallowing():
            found = fast()
        return slow() if found is None else found

    return caught(stage, run)


@scene("12")
def test_tries_again_after_any_failure(stage: Stage):
    def run(fast, slow):
        for _ in range(3):
            try:
                return fast()
            except:  # noqa: E722
                continue
        return slow()

    return caught(stage, run)


@scene("12")
def test_an_error_wrapped_in_another(stage: Stage):
    """What a function raises in place of the stop is told to the user as its own error."""

    def run(fast, slow):
        try:
            return fast()
        except BaseException as error:
            raise RuntimeError("the fast kernel failed") from error

    return caught(stage, run)


@scene("12")
def test_an_except_that_cleans_up_and_goes_on(stage: Stage):
    def run(fast, slow):
        results = []
        for f in (fast, slow):
            try:
                results.append(f())
            except:  # noqa: E722
                results.append(torch.zeros(()))
        return sum(results)

    return caught(stage, run)


@scene("12", refusal="Functional", refusing="Functional")  # which does not see what another thread computes
def test_a_worker_thread(stage: Stage):
    """Executors hand exceptions on; where nobody asks, they are lost."""

    def run(fast, slow):
        def work():
            try:
                return fast()
            except BaseException:
                return None

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(work).result()
        return slow() if found is None else found

    return caught(stage, run)


@scene("12")
def test_a_generator(stage: Stage):
    def parts(fast, slow):
        try:
            found = fast()
        except:  # noqa: E722
            found = slow()
        yield found

    return caught(stage, lambda fast, slow: next(parts(fast, slow)))


@scene("12")
def test_a_bare_except_within_a_checkpoint(stage: Stage):
    def run(fast, slow):
        def both(_):
            try:
                return fast()
            except:  # noqa: E722
                return slow()

        with set_checkpoint_early_stop(False):  # torch's own stop is caught as well
            return checkpoint(both, torch.ones(1, requires_grad=True), use_reentrant=False)

    return caught(stage, run)
