"""The bijections of normalizing flows that have parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revlib._numbers import whole
from revlib.bijections.base import Bijection

__all__ = ["ActNorm", "Convolution1x1"]


class ActNorm(Bijection):
    r"""A scale and a shift a channel, $y = e^{a} x + b$, of the last stream.

    In the first forward in train mode, $a$ and $b$ are set so that every channel of $y$ has mean 0 and variance 1 over
    the batch; from then on they are parameters like any other. ``state_dict`` knows whether that has happened. Where
    several processes share the parameters, as under DDP, let one batch through before wrapping.

    Args:
        channels: the size of dimension 1.

    Shapes: (batch, channels, ...). $\log\det = n \sum a$ for n positions. Cost: the stream is saved for backward, of
    one step at a time under ``Reversible``. Inversion rounds; it multiplies the error of a channel by $e^{-a}$.

    Raises:
        ValueError: ``channels`` is no whole number from 1 up.
        RuntimeError: the first forward in train mode runs under a ``torch.func`` transform.

    Source: Kingma and Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, NeurIPS 2018, section 3.1.

    Example:
        >>> from revlib import ReversibleSequence
        >>> norm = ActNorm(3)
        >>> (y,) = ReversibleSequence([norm])(5 + 2 * torch.randn(100, 3, 4))
        >>> torch.allclose(y.mean((0, 2)), torch.zeros(3), atol=1e-4)
        True
    """

    takes = makes = 1

    def __init__(self, channels: int) -> None:
        """Make the scales and shifts of so many channels; data decides on them in the first forward."""
        super().__init__()
        whole("ActNorm", channels, 1, of="channels")
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.initialised = False

    def get_extra_state(self) -> bool:
        """What ``state_dict`` holds besides parameters: whether data has decided on them."""
        return self.initialised

    def set_extra_state(self, state: bool) -> None:
        """What ``load_state_dict`` does with it."""
        self.initialised = state

    def initialise(self, x: Tensor) -> None:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(wide.transpose(0, 1).flatten(1), dim=1, correction=0)
        self.log_scale.copy_(var.clamp_min(1e-12).log().mul(-0.5))
        self.shift.copy_(-mean * self.log_scale.exp())

    def forward(self, x: Tensor) -> Tensor:
        return x * _along(self.log_scale, x).exp() + _along(self.shift, x)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{len(self.shift)}"

    def inverse(self, y: Tensor) -> Tensor:
        return (y - _along(self.shift, y)) * _along(-self.log_scale, y).exp()

    def log_det(self, x: Tensor) -> Tensor:
        return (self.log_scale.to(x.dtype).sum() * x[0, 0].numel()).expand(x.shape[0])


def _along(parameter: Tensor, x: Tensor) -> Tensor:
    """The parameter in the dtype of the stream, in the shape in which it meets the channels of the stream."""
    return parameter.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


class Convolution1x1(Bijection):
    r"""Channels mixed by a square matrix, $y = W x$ at every position, of the last stream.

    Args:
        channels: the size of dimension 1. $W$ starts as a random rotation.

    Shapes: (batch, channels, ...). $\log\det = n \log |\det W|$ for n positions. Cost: $c^2$ multiplications a
    position, and $c^3$ to invert $W$, in float64; the stream is saved for backward, of one step at a time.
    Inversion rounds; it multiplies errors by at most the condition number of $W$. Not for a $W$ that training may drive
    towards a singular one: backward then refuses what it recovers.

    Raises:
        ValueError: ``channels`` is no whole number from 1 up.
        RuntimeError: in backward, where a stream came back less accurately than the scheduler tolerates.

    Source: Kingma and Dhariwal 2018, section 3.2.

    Example:
        >>> mix, x = Convolution1x1(4), torch.randn(2, 4, 8, 8)
        >>> torch.allclose(mix.inverse(mix(x)), x, atol=1e-5)
        True
    """

    takes = makes = 1

    def __init__(self, channels: int) -> None:
        """Make the matrix of so many channels, a random rotation."""
        super().__init__()
        whole("Convolution1x1", channels, 1, of="channels")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self.weight, x)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{len(self.weight)}"

    def inverse(self, y: Tensor) -> Tensor:
        return _mixed(torch.linalg.inv(self.weight.double()), y)

    def log_det(self, x: Tensor) -> Tensor:
        volume = torch.linalg.slogdet(self.weight.double())[1] * x[0, 0].numel()
        return volume.to(x.dtype).expand(x.shape[0])


def _mixed(weight: Tensor, x: Tensor) -> Tensor:
    return F.conv1d(
        x.flatten(2) if x.ndim > 2 else x[..., None], weight.to(x.dtype)[..., None]
    ).view(x.shape)
