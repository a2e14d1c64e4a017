"""Shapes and numbers of streams that change: bijections between the steps, and sums as streams."""

import torch
from common import grads, leaves, loss
from torch import Tensor, nn

from revlib import Additive, Step
from revlib.bijections import (
    ActNorm,
    Bijection,
    Concat,
    Convolution1x1,
    Permute,
    Rearrange,
    Split,
    with_log_det,
    with_losses,
)
from situations.base import Setting, everything, situation

DEEPER = "b c (n p) -> b (c p) n"


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1), nn.Conv1d(width, width, 3, padding=1))


def signals(count: int = 1) -> list[Tensor]:
    return leaves(3, 4, 8, count=count)


def trained(setting: Setting, *items, streams: int = 1, start: tuple[Tensor, ...] = ()):
    """Two forwards and backwards, and what is left."""
    stack, found = setting.sequence(*items), []
    for _ in range(2):
        xs = signals(streams)
        ys = stack(*start, *xs)
        loss(ys).backward()
        found += [*ys, *grads(*xs, stack)]
    return [*found, *everything(stack)]


@situation("space to depth, a split and a join: an image to its features in one stack")
def image_to_features(setting: Setting):
    return trained(
        setting,
        *(Split(2), (conv(2), conv(2)), Rearrange(DEEPER, p=2), (conv(4), conv(4)), Permute(1, 0), (conv(4), conv(4))),
        *(Concat(2), Rearrange("b c n -> b n c")),
    )


@situation("skip connections as streams that wait, in a U-Net")
def skip(setting: Setting):
    down = Rearrange(DEEPER, p=2).on_last(1)
    up = Rearrange("b (c p) n -> b c (n p)", p=2).on_last(1)
    blocks = lambda: (setting.fit_step(conv(2), streams=2) for _ in range(2))  # noqa: E731
    return trained(
        setting, *(Split(2), *blocks(), Concat(2), Split(2), down, Split(2), *blocks(), Concat(2), up, Concat(2))
    )


@situation(
    "an activation norm that the first batch initialises, and a mixing of channels", tolerance=1e-9, bitwise=False
)
def glow(setting: Setting):
    return trained(setting, ActNorm(4), Convolution1x1(4), Split(2), (conv(2), conv(2)), Concat(2), ActNorm(4))


@situation("log-determinants that add up in a stream", tolerance=1e-9, bitwise=False)
def log_det(setting: Setting):
    items = [Convolution1x1(4), Split(2), setting.fit_step(conv(2)), setting.fit_step(conv(2)), Concat(2)]
    return trained(setting, *with_log_det(items), start=(torch.zeros(3),))


@situation("losses from inside functions that add up in a stream", only="Additive()")
def losses(setting: Setting):
    class Balanced(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(2)

        def forward(self, x):
            y = self.conv(x)
            return y, y.square().mean()

    steps = with_losses(Step(Balanced(), Additive()) for _ in range(3))
    return trained(setting, Split(2), *steps, start=(torch.zeros(()),))


@situation("a bijection of one's own, twice in a stack", bitwise=False)
def own(setting: Setting):
    class Turn(Bijection):
        takes = makes = 2

        def __init__(self):
            super().__init__()
            self.angle = nn.Parameter(torch.tensor(0.3))

        def forward(self, a, b):
            c, s = self.angle.cos(), self.angle.sin()
            return c * a - s * b, s * a + c * b

        def inverse(self, a, b):
            c, s = self.angle.cos(), self.angle.sin()
            return c * a + s * b, c * b - s * a

    turn = Turn()
    return trained(setting, (conv(4), conv(4)), turn, (conv(4), conv(4)), turn, streams=2)
