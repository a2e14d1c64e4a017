"""Shapes and counts that depend on data: where the input comes back with rounding errors, a near-tie may flip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import ByHand, Lambda, error, grads, leaves, loss, mlp
from scenes import INEXACT, Stage, scene
from torch import Tensor, nn

from revlib import Additive, Checkpoint, ExactAdditive, Functional, KeepLast, Reversible, ReversibleSequence

# What the message must say: that the input came back with rounding errors, and what helps.
HELPS = r"round.*(ExactAdditive|Checkpoint).*(ExactAdditive|Checkpoint)"
ROWS = 64


def tied(stage: Stage, run: Callable[..., Tensor]) -> list[Any]:
    """Functions that decide by a number which lies on their threshold: half of those that come back fall beside it.

    The first stream starts on the grid, and what is added to it in between takes it off, by amounts that round.
    """
    stack = stage.sequence(*((Lambda(run, nn.Linear(4, 4)), mlp()) for _ in range(2)))
    xs = [torch.randn(ROWS, 4), torch.rand(ROWS, 4).mul(3).round().div(3)]
    for x in xs:
        x.requires_grad_()
    outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


THIRD = torch.tensor(1 / 3, dtype=torch.float64)


def above(m: nn.Module, x: Tensor) -> Tensor:
    """A threshold, at values that are met exactly."""
    (rows,) = torch.where(x[:, 0] >= THIRD)
    return torch.zeros_like(x).index_add(0, rows, m(x[rows]).tanh())


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_rows_above_a_threshold(stage: Stage):
    return tied(stage, above)


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_tokens_by_their_expert(stage: Stage):
    """Top-1 of two, between which many tokens are undecided."""

    def run(m, x):
        chosen = torch.stack([x[:, 0], THIRD.expand(len(x))], -1).argmax(-1)
        y = torch.zeros_like(x)
        for i in range(2):
            (rows,) = torch.where(chosen == i)
            y = y.index_add(0, rows, (m(x[rows]) * (i + 1)).tanh())
        return y

    return tied(stage, run)


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_a_boolean_mask(stage: Stage):
    def run(m, x):
        mask = x > THIRD
        return torch.zeros_like(x).masked_scatter(mask, m(x).tanh()[mask].sin())

    return tied(stage, run)


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_distinct_values(stage: Stage):
    """As of pooling by voxel or by cluster."""

    def run(m, x):
        cells, index = torch.unique(x[:, 0].detach(), return_inverse=True)
        pooled = torch.zeros(len(cells), 4).index_add(0, index, m(x).tanh())
        return pooled.sin()[index]

    return tied(stage, run)


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_buckets_by_hash(stage: Stage):
    """Locality-sensitive hashing, whose buckets are attended one by one."""

    def run(m, x):
        bucket = (x[:, :2].detach() >= THIRD).long() @ torch.tensor([1, 2])
        h, y = m(x), torch.zeros_like(x)
        for b in range(4):
            (rows,) = torch.where(bucket == b)
            part = h[rows]
            y = y.index_add(0, rows, (part @ part.t()).softmax(-1) @ part)
        return y

    return tied(stage, run)


@scene(
    "7",
    refusal=HELPS,
    refusing=INEXACT + " Functional",
)
def test_iterations_until_converged(stage: Stage):
    """A solver that stops by the size of a residual, which lands on its limit."""

    def run(m, x):
        y = m(x).tanh()
        steps = int((x[:, 0].detach() >= THIRD).sum())
        for _ in range(steps % 7 + 1):
            y = (y + 0.1 * m(y)).tanh()
        return y

    return tied(stage, run)


def dropped(m: nn.Module, x: Tensor) -> Tensor:
    """Tokens pruned by their score, and padded to the longest again."""
    kept = [row[row >= THIRD] for row in x[:8]]
    padded = nn.utils.rnn.pad_sequence(kept, batch_first=True)
    return m(x).tanh() * padded.square().sum()


# The function itself runs again without an error, and the shapes that it saves are those of forward. Only the mask
# selects another number of elements, at which autograd fails on its own, where nobody can add to the message.
@pytest.mark.parametrize("scheduler", [Reversible(), KeepLast(1), Functional()], ids=lambda s: type(s).__name__)
def test_a_mask_that_selects_another_number_is_an_error_of_autograd(scheduler):
    torch.manual_seed(0)
    stage = Stage(scheduler, Additive())
    with pytest.raises(RuntimeError, match=r"shape mismatch|round"):
        tied(stage, dropped)


@scene("7", coupling=ExactAdditive())
def test_tokens_dropped_by_their_score(stage: Stage):
    return tied(stage, dropped)


@scene("7", coupling=ExactAdditive())
def test_rows_above_a_threshold_with_an_exact_coupling(stage: Stage):
    return tied(stage, above)


# ---------------------------------------------------------------------------------------------- mixtures of experts
class MoE(nn.Module):
    """Top-1 of 8 experts, each on the tokens that it is given."""

    def __init__(self, width: int = 32, count: int = 8) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x):
        x = self.norm(x)
        value, index = self.gate(x).float().softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (index == e).nonzero()[:, 0]
            out = out.index_add(0, rows, (expert(x[rows]) * value[rows, None]).to(out.dtype))
        return out


def dense(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def steps_of_experts(stack: ReversibleSequence) -> list[str]:
    """The messages of the steps that failed."""
    told = []
    for _ in range(10):
        x = torch.randn(4096, 32)
        stack.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(y.float().square().mean() for y in stack(x, x))
        try:
            total.backward()
        except RuntimeError as error:
            told.append(str(error))
    return told


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "scheduler"), [(ExactAdditive(), Reversible()), (None, Checkpoint())], ids=str)
def test_experts_with_what_helps(coupling, scheduler):
    torch.manual_seed(0)
    stack = ReversibleSequence([(dense(), MoE()) for _ in range(16)], coupling, scheduler)
    assert not steps_of_experts(stack)


@pytest.mark.slow
def test_experts_whose_counts_differ_are_told_why():
    torch.manual_seed(0)
    stack = ReversibleSequence([(dense(), MoE()) for _ in range(16)], scheduler=Reversible())
    told = steps_of_experts(stack)
    assert told, "no tie has flipped: the test shows nothing"
    for message in told:
        assert all(word in message for word in ("round", "ExactAdditive", "Checkpoint"))


def test_an_exact_step_whose_counts_differ_is_told_otherwise():
    """Rounding is no excuse where the coupling is exact: there the function itself does not repeat."""
    calls = iter(range(100))

    def fickle(m, x):
        return torch.zeros_like(x).index_add(0, torch.arange(next(calls) + 1), m(x[: 1 + next(calls) // 2]).tanh()[:1])

    stack = ReversibleSequence([(Lambda(fickle, nn.Linear(4, 4)), mlp())], ExactAdditive())
    with pytest.raises((RuntimeError, IndexError)) as told:
        loss(stack(*leaves(ROWS, 4, dtype=torch.float32))).backward()
    assert "ExactAdditive" not in str(told.value)


def test_the_oracle_decides_alike_twice():
    """A check of this file: by hand, the scene repeats its bits."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            found.append(tied(Stage(ByHand(), ExactAdditive()), above))
        finally:
            torch.set_default_dtype(torch.float32)
    assert error(*found) == 0
