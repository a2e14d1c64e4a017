"""What type checkers see of the public interface: code of a user, which test_types.py has checked by mypy and pyright.

A line with ``type: ignore`` must be an error: both checkers also report an ignored line without one.
"""
# mypy: warn-unused-ignores
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportConstantRedefinition=false

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from revlib import (
    Additive,
    Budget,
    Coupling,
    ExactAdditive,
    PaReprop,
    Reversible,
    ReversibleSequence,
    Step,
    checkpoints,
    convert,
    diagnostics,
    invert,
    positionwise,
    recurrences,
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
from revlib.couplings import Affine, Scaled
from revlib.models import (
    ConcatMlp,
    Mean,
    PublishedRevMViT,
    RevMViT,
    RevSwin,
    RevViT,
    minrev_swin,
)
from revlib.schedulers import Scheduler
from revlib.step import Pair
from revlib.testing import assert_inverts, assert_same_gradients


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())


def a_sequence(x: Tensor) -> None:
    seq = ReversibleSequence([(mlp(), mlp()) for _ in range(4)])
    assert_type(seq(x, x), tuple[Tensor, ...])
    y1, y2 = seq(x, x, mask=None)
    assert_type(y1, Tensor)
    assert_type(y2.sum(), Tensor)
    assert_type(seq.inverse(y1, y2), tuple[Tensor, ...])
    seq(1.0, x)  # type: ignore
    seq([x, x])  # type: ignore
    assert_type(seq.coupling, Coupling)
    assert_type(seq.scheduler, Scheduler)
    seq.scheduler = Budget(fraction=0.5)
    seq.scheduler = Budget  # type: ignore


def its_items() -> None:
    seq = ReversibleSequence([(mlp(), mlp()), Step(mlp()), Split(2), Pair(mlp(), mlp())])
    assert_type(seq[0], Step | Pair | Bijection)
    assert_type(seq[1:], ReversibleSequence)
    assert_type(seq.pop(), Step | Pair | Bijection)
    assert_type(len(seq), int)
    for item in seq:
        assert_type(item, Step | Pair | Bijection)
    for F, G in seq:
        assert_type(F, nn.Module)
        assert_type(G, nn.Module)
        F.requires_grad_(False)
    for i, (F, _) in enumerate(seq):
        assert_type(i, int)
        assert_type(F, nn.Module)
    F, G = seq[0]
    assert_type(F, nn.Module)
    assert_type([G for _, G in seq], list[nn.Module])


class Stack(ReversibleSequence):
    """A user's own kind of sequence."""


def editing_it() -> None:
    stack = Stack()
    assert_type(stack.append((mlp(), mlp())), Stack)
    assert_type(stack.append(Step(mlp(), ExactAdditive())), Stack)
    assert_type(stack.extend(recurrences.midpoint([mlp()], h=0.1)), Stack)
    assert_type(stack.insert(0, Permute(1, 0)), Stack)
    assert_type(stack[:1] + stack[1:], Stack)
    stack.append(mlp())  # type: ignore
    stack.append((torch.sin, torch.cos))  # type: ignore
    ReversibleSequence([mlp(), mlp()])  # type: ignore
    ReversibleSequence([(mlp(), mlp(), mlp())])  # type: ignore
    ReversibleSequence((mlp(), mlp()) for _ in range(3))
    ReversibleSequence([], Additive, Reversible())  # type: ignore


def without_modules(x: Tensor) -> None:
    functions = [(torch.sin, torch.tanh)] * 3
    assert_type(reversible(functions, x, x, coupling=Scaled(add=0.5)), tuple[Tensor, ...])
    assert_type(invert(functions, x, x, scheduler=PaReprop()), tuple[Tensor, ...])
    reversible([Step(torch.sin), (torch.sin, mlp()), Split(2)], x, x)
    reversible([torch.sin, torch.sin], x, x)  # type: ignore


def bijections(x: Tensor) -> None:
    assert_type(Split(2)(x), tuple[Tensor, ...])
    assert_type(Split(2).inverse(x, x), Tensor)
    assert_type(Concat(2)(x, x), Tensor)
    assert_type(Permute(1, 0)(x, x), tuple[Tensor, ...])
    assert_type(Rearrange("b (c p) -> b c p", p=2)(x), Tensor)
    assert_type(Rearrange("b (c p) -> b c p", p=2)(x, x), tuple[Tensor, ...])
    assert_type(ActNorm(3)(x), Tensor)
    assert_type(Convolution1x1(3).inverse(x), Tensor)
    assert_type(Inverse(Split(2))(x, x), Tensor | tuple[Tensor, ...])
    assert_type(Split(2).log_det(x), Tensor)
    assert_type(Rearrange("b c -> c b").on_last(1), Rearrange)
    flow = with_log_det([Split(2), Step(mlp(), Affine()), (torch.sin, torch.sin), Concat(2)])
    assert_type(flow, list[Step | Bijection])
    assert_type(ReversibleSequence(flow)(x, x), tuple[Tensor, ...])
    assert_type(with_losses([Step(mlp())]), list[Step])


class Difference(Coupling):
    """A user's own law, with the types that its functions return."""

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return s - f

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        return merged + f


class Negate(Bijection):
    """A user's own bijection, of one stream."""

    takes = makes = 1
    exact = True

    def forward(self, x: Tensor) -> Tensor:
        return -x

    def inverse(self, y: Tensor) -> Tensor:
        return -y


def steps() -> None:
    seq = ReversibleSequence([Negate(), Step(mlp(), Difference())], coupling=Difference())
    seq.extend([*positionwise(mlp(), chunks=2), *recurrences.grouped([mlp(), mlp()])])
    assert_type(recurrences.leapfrog([mlp()]), list[Step])
    assert_type(recurrences.columns([mlp()], gamma=0.9), list[Step])
    recurrences.midpoint([mlp()], h="0.1")  # type: ignore
    assert_type(Difference().merge(torch.ones(1), torch.ones(1)), Tensor)


def models(x: Tensor) -> None:
    assert_type(RevViT()(x), Tensor)
    assert_type(RevSwin()(x), Tensor)
    assert_type(PublishedRevMViT()(x), Tensor)
    assert_type(minrev_swin()(x), Tensor)
    assert_type(RevMViT().scheduler, Scheduler)
    for F, _ in RevViT().blocks:
        assert_type(F, nn.Module)
    assert_type(Mean(4)(x, x), Tensor)
    assert_type(ConcatMlp(4)(x, x), Tensor)


class Network(nn.Module):
    """A user's own network."""


def around_them(x: Tensor, network: Network) -> None:
    assert_type(convert.vit(network, inplace=True, momentum=0.5), Network)
    assert_type(convert.restore(network), Network)
    convert.vit(network, momenta=0.5)  # type: ignore
    stack = convert.residual([mlp(), mlp()], group=2, limit=512.0)
    assert_type(stack(x), Tensor)
    assert_type(stack[0], nn.Module)
    assert_type(stack.sequence, ReversibleSequence)
    assert_type(checkpoints.to_minrev(RevViT()), dict[str, Tensor])
    assert_type(checkpoints.load_minrev(RevViT(), {}).complete, bool)
    monitor = diagnostics.DriftMonitor(ReversibleSequence(), every=10)
    assert_type([d.error for d in monitor.history], list[float])
    assert_inverts(ReversibleSequence(), x, x)
    assert_same_gradients(ReversibleSequence(), x, x, schedulers=[Reversible()])
