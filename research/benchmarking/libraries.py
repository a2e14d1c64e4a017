"""Reversible blocks of other libraries, around the same F and G.

Two of them take one tensor and split it. They get both streams along the batch, where halves are contiguous.
"""

import warnings
from collections.abc import Sequence

from einops import rearrange, repeat
from torch import Tensor, nn

from research.benchmarking.instruments import Run

Block = tuple[nn.Module, nn.Module]  # F and G

__all__ = ["Block", "invtorch", "memcnn", "revtorch"]


def memcnn(blocks: Sequence[Block], compiled: bool) -> Run:
    with warnings.catch_warnings():  # of torch's, which changed since
        warnings.simplefilter("ignore")
        from memcnn import AdditiveCoupling, InvertibleModuleWrapper
    wrapped = [InvertibleModuleWrapper(AdditiveCoupling(F, G, split_dim=0)) for F, G in blocks]

    def run(x: Tensor) -> Sequence[Tensor]:
        z = repeat(x, "b ... -> (streams b) ...", streams=2)
        for block in wrapped:
            z = block(z)
        return rearrange(z, "(streams b) ... -> streams b ...", streams=2).unbind()

    return run


def revtorch(blocks: Sequence[Block], compiled: bool) -> Run:
    from revtorch import ReversibleBlock
    from revtorch import ReversibleSequence as Theirs

    stack = Theirs(nn.ModuleList(ReversibleBlock(F, G, split_along_dim=0) for F, G in blocks))

    def run(x: Tensor) -> Sequence[Tensor]:
        z = stack(repeat(x, "b ... -> (streams b) ...", streams=2))
        return rearrange(z, "(streams b) ... -> streams b ...", streams=2).unbind()

    return run


def invtorch(blocks: Sequence[Block], compiled: bool) -> Run:
    from invtorch.nn import Module

    class Coupled(Module):  # type: ignore[misc]  # it is not typed
        def __init__(self, F: nn.Module, G: nn.Module) -> None:
            super().__init__()
            self.F, self.G = F, G

        def function(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1 = x1 + self.F(x2)
            return y1, x2 + self.G(y1)

        def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
            x2 = y2 - self.G(y1)
            return y1 - self.F(x2), x2

    wrapped = [Coupled(F, G) for F, G in blocks]

    def run(x: Tensor) -> Sequence[Tensor]:
        x1, x2 = x.clone(), x.clone()  # it frees the memory of its inputs
        for block in wrapped:
            x1, x2 = block(x1, x2)
        return x1, x2

    return run
