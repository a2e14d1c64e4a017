r"""From a pretrained residual network to a reversible one, near enough to be fine-tuned instead of it.

A residual stack $x \leftarrow x + f_t(x)$ cannot be undone. Here $m$ velocities are carried beside $x$. The functions
run in cycles of $m$, and the $i$-th of each cycle $c$ owns the velocity $v_i$:

$$v_i \leftarrow \gamma v_i + [(1 - \gamma) f_{cm+i}(x + v_1 + \dots + v_{i-1})] \quad (i = 1, \dots, m), \qquad
x \leftarrow x + v_1 + \dots + v_m.$$

In the first cycle $v_i = [f_i]$: a stack of one cycle is the original, and with $\gamma = 0$ any would be. But undoing
a step divides by $\gamma$, and in floating point errors would grow by $1/\gamma$ a cycle. So nothing is rounded away:
$\gamma = 2^{-k}$, $[f]$ is $f$ rounded to multiples of a ``resolution``, and streams are float64, whose mantissa has
room for what each product shifts down. Inversion gives back every bit, and the gradients of every scheduler are those
of ``Naive`` wherever kernels repeat their bits, also under autocast, for stacks of $C$ cycles with

$$k (C - 1) \le 53 - \log_2(\mathrm{limit} / \mathrm{resolution}) = 30 \quad \text{(as defaults are).}$$

By default $k$ is the largest that fits. Cycles are 2 blocks / ``group``, and decide how close the start is:

======  =======  =======================================================================
cycles  γ        relative error of the logits: ViTs of 12 to 48 random blocks; 12 trained
======  =======  =======================================================================
3       2^-15    1e-4 to 4e-4; 9e-5
6       2^-6     1 to 3 %; 1 % (12 blocks, as :func:`vit` converts them)
12      2^-2     20 to 50 %; 15 %: another network, which must be trained
======  =======  =======================================================================

Cost: at any depth 2 ``group`` + 2 streams of float32 after forward, and 4 ``group`` + 22 at the peak of backward (ViT).
Checkpointing the original is exact, and takes blocks and blocks + 20: use that for less than 9 cycles, where its peak
is lower. Nor is this for devices without float64.

Source: momentum residual networks, Sander et al., ICML 2021; keeping shifted bits, Maclaurin et al. 2015; starting near
a pretrained network, Dr²Net, Zhao et al., CVPR 2024. Velocities by turns, with their bits in float64, are our own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

import torch
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from revlib._numbers import is_power_of_two, real, whole
from revlib.couplings import Coupling, ExactAdditive
from revlib.encoder import encoder_pair
from revlib.schedulers import Scheduler
from revlib.sequence import ReversibleSequence
from revlib.step import Step

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Momentum", "ReversibleResidual", "encoder_pair", "residual", "restore", "vit"]

_DIGITS = 53  # of a float64
Parts = Sequence[nn.Module]  # a residual branch: these modules one after the other
Model = TypeVar("Model", bound=nn.Module)


class Settings(TypedDict, total=False):
    """The keyword arguments of :class:`ReversibleResidual` but for ``group``."""

    momentum: float | None
    limit: float
    resolution: float
    scheduler: Scheduler | None


class Options(Settings, total=False):
    """All keyword arguments of :class:`ReversibleResidual`."""

    group: int


def _grid(resolution: float) -> ExactAdditive:
    return ExactAdditive(resolution * 2.0**_DIGITS)


@dataclass(frozen=True)
class Momentum(Coupling):
    r"""$\mathrm{merge}(v, f) = \gamma v + [(1 - \gamma) f]$, where $[f]$ is $f$ rounded to the resolution.

    Exact in float64 for $\gamma = 2^{-k}$ while the digits last. :class:`ReversibleResidual` makes its steps with it.

    Args:
        momentum: $\gamma$, a power of two below 1. limit: the magnitude that streams must stay below.
        resolution: what functions return is rounded to its multiples, a power of two.

    Shapes: streams of any shape, in float64. Cost: four passes over the stream.
    Raises: RuntimeError in backward for a stream that has reached the limit.

    Source: momentum of Sander et al., ICML 2021, with the shifted bits kept, as in Maclaurin et al. 2015.

    Example:
        >>> coupling, v, f = Momentum(0.5, 512.0, 2.0**-14), torch.zeros(2).double(), torch.randn(2).double()
        >>> v = coupling.merge(v, f)  # on the grid
        >>> torch.equal(coupling.unmerge(coupling.merge(v, f), f), v)
        True
    """

    momentum: float
    limit: float
    resolution: float

    def merge(self, s: Tensor, f: Tensor) -> Tensor:
        return _grid(self.resolution).merge(s * self.momentum, self._scaled(f, s))

    def unmerge(self, merged: Tensor, f: Tensor) -> Tensor:
        return _grid(self.resolution).unmerge(merged, self._scaled(f, merged)) * (1 / self.momentum)

    def limit_of(self, dtype: torch.dtype) -> float:
        return self.limit

    def _scaled(self, f: Tensor, s: Tensor) -> Tensor:
        return f.to(s.dtype) * (1 - self.momentum)


class _Branch(nn.Sequential):
    """The function of a step: sums the position and the velocities before its own, in the precision of the input."""

    def __init__(self, parts: Parts, skip: int) -> None:
        """Make the function; it leaves out the first ``skip`` velocities, whose turn in its cycle comes later."""
        super().__init__(*parts)
        self.skip = skip

    def forward(self, *streams: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return super().forward(_sum(*streams[self.skip :]).to(dtype))


class ReversibleResidual(nn.Sequential):
    """The stack ``for f in branches: x = x + f(x)`` as a module, run by ``sequence`` on (v_1, ..., v_m, x) in float64.

    It holds the original modules under their names, so ``state_dict`` is the original's. Iterating it, as timm does for
    intermediate features, attention masks and its own checkpointing, runs the original network, activations stored.

    Args:
        modules, split: what it holds; the branches of each, as modules that run in turn.
        group: m, branches in a cycle; best a multiple of the period in which kinds of branches recur.
        momentum: γ, a power of two; the smallest that can be undone unless given.
        limit: the magnitude of x up to which no digit is lost, a power of two; backward raises an error beyond it.
        resolution: a power of two; what branches return is rounded to its multiples.
        scheduler: how backward gets activations back; swap it at any time by assignment.

    Shapes: x of any shape and precision to the same.
    Cost: at any depth 2 ``group`` + 2 streams of float32 after forward; see :mod:`revlib.convert` for the peak.

    Raises:
        ValueError: for a momentum, limit or resolution that is no power of two, or with which so many branches cannot
            be undone.
        RuntimeError: in backward, if x reached the limit.

    Example:
        >>> blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)]
        >>> stack, x = ReversibleResidual(blocks, lambda block: [(block,)]), torch.randn(2, 8)
        >>> stack(x).sum().backward()
        >>> len(stack), stack(x).shape, stack.momentum
        (4, torch.Size([2, 8]), 9.5367431640625e-07)
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        split: Callable[[nn.Module], Sequence[Parts]],
        *,
        group: int = 2,
        momentum: float | None = None,
        limit: float = 512.0,
        resolution: float = 2.0**-14,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Hold the modules and build the steps; the docstring of the class explains the arguments."""
        super().__init__(*modules)
        self._split, self.group, self.limit, self.resolution = split, group, limit, resolution
        self._build(momentum, scheduler)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Run the branches on ``x``: what the residual network would return, close to it or exactly as γ allows."""
        velocities = (x.new_zeros(x.shape, dtype=torch.float64) for _ in range(self.group))
        state = self.sequence(*velocities, x.double(), dtype=x.dtype)
        latest = (len(self._built[0]) - 1) % self.group + 1  # velocities of the last cycle
        return _sum(*state[-1 - latest :]).to(x.dtype)

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        """The momentum and the scheduler, as ``print`` shows them above the modules."""
        return f"momentum={self.momentum}, scheduler={self.scheduler}"

    @property
    def sequence(self) -> ReversibleSequence:
        """The reversible stack that runs the branches, on m velocities and the position x, in float64.

        It is built again when branches have been replaced, for example by adapters.
        """
        # Modules are equal if they are the same; adapters may have replaced some.
        if self._branches() != self._built[0]:
            self._build(self.momentum, self.scheduler)
        return self._built[1]

    @property
    def scheduler(self) -> Scheduler:
        """What forward keeps for backward; assign another one at any time, which changes no gradient."""
        return self._built[1].scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._built[1].scheduler = scheduler

    @overload
    def __getitem__(self, index: slice) -> Self: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: int | slice) -> nn.Module:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        settings = {
            k: getattr(self, k) for k in ("group", "momentum", "limit", "resolution", "scheduler")
        }
        return type(self)(list(self)[index], self._split, **settings)

    def _branches(self) -> list[tuple[nn.Module, ...]]:
        return [tuple(parts) for module in self for parts in self._split(module)]

    def _build(self, momentum: float | None, scheduler: Scheduler | None) -> None:
        branches = self._branches()
        self.momentum = _momentum(momentum, len(branches), self.group, self.limit, self.resolution)
        first = _grid(self.resolution)  # its velocities are zero
        later = Momentum(self.momentum, self.limit, self.resolution)
        sequence = ReversibleSequence(scheduler=scheduler)
        for i, parts in enumerate(branches):
            if i and i % self.group == 0:
                sequence.append(Step(_sum, ExactAdditive(self.limit)))
            branch = _Branch(parts, skip=self.group - 1 - i % self.group)
            sequence.append(Step(branch, first if i < self.group else later))
        # In a tuple, the sequence is no submodule: its modules are among those of this stack already.
        self._built = branches, sequence


def residual(branches: Iterable[nn.Module], **options: Unpack[Options]) -> ReversibleResidual:
    """The stack ``for f in branches: x = x + f(x)``, reversible; for ``options`` see :class:`ReversibleResidual`.

    Shapes and cost are those of :class:`ReversibleResidual`.

    Raises:
        TypeError: for a branch that is no module, or a timm ``Block``, which adds its own input; for an unknown option.
        ValueError: as :class:`ReversibleResidual`.

    Example:
        >>> branches = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)]
        >>> x = torch.randn(3, 8)
        >>> h = x + branches[0](x)
        >>> torch.allclose(residual(branches)(x), h + branches[1](h), atol=1e-3)  # one cycle is the original
        True
    """
    _refuse_unknown("convert.residual", options, (*Options.__annotations__,))
    branches = list(branches)
    for f in branches:
        if not isinstance(f, nn.Module):
            raise TypeError(
                f"a branch must be an nn.Module, got {type(f).__name__}; wrap a function in one"
            )
        if isinstance(f, timm_vit.Block):
            raise TypeError(
                "a timm Block adds its own input; pass its branches, or convert the model by convert.vit"
            )
    return ReversibleResidual(branches, _whole, **options)


def vit(
    model: Model, *, inplace: bool = False, group: int = 4, **options: Unpack[Settings]
) -> Model:
    """A timm VisionTransformer with reversible blocks: a copy, or ``model`` itself if ``inplace``.

    Features, pooling, class token and head are those of timm, and ``state_dict`` is the original's either way. A
    block has two branches: a ``group`` of 4 is two blocks. For ``options`` see :class:`ReversibleResidual`.

    Shapes: those of the model. Cost: for 12 blocks more memory than checkpointing the original; the docstring of
    :mod:`revlib.convert` has the numbers, also of how close the converted model starts.

    Raises:
        TypeError: if ``model`` is no timm VisionTransformer, or has blocks that are no pre-norm residuals; for an
            unknown option.
        ValueError: for hooks on blocks, which nobody would call; and as :class:`ReversibleResidual`.

    Source: our own, see :mod:`revlib.convert`.

    Example:
        >>> model = timm_vit.VisionTransformer(32, 16, num_classes=3, embed_dim=12, depth=2, num_heads=2)
        >>> images = torch.randn(1, 3, 32, 32)
        >>> torch.allclose(vit(model)(images), model(images), atol=1e-3)
        True
    """
    _refuse_unknown("convert.vit", options, ("inplace", *Options.__annotations__))
    blocks = getattr(model, "blocks", None)
    if not isinstance(model, timm_vit.VisionTransformer) or not isinstance(blocks, nn.Sequential):
        raise TypeError(
            f"convert.vit takes a timm VisionTransformer, got {type(model).__name__}; try convert.residual"
        )
    for i, block in enumerate(blocks):
        _check_block(i, block)
    converted: Any = model if inplace else copy.deepcopy(model)
    converted.set_grad_checkpointing(False)
    converted.blocks = ReversibleResidual(converted.blocks, _halves, group=group, **options)
    return converted


def restore(model: Model) -> Model:
    """Undo :func:`vit` in place: the ordinary network, with the weights as they are now.

    Cost: none; no weight is copied.

    Raises:
        TypeError: if the model is none that :func:`vit` returned.

    Example:
        >>> model = timm_vit.VisionTransformer(32, 16, num_classes=3, embed_dim=12, depth=2, num_heads=2)
        >>> type(restore(vit(model)).blocks).__name__
        'Sequential'
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, ReversibleResidual):
        raise TypeError(f"expected a model that convert.vit returned, got {type(model).__name__}")
    model.blocks = nn.Sequential(*blocks)
    return model


def _refuse_unknown(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    for option in options:
        if option not in known:
            raise TypeError(
                f"{name} takes no keyword {option!r}; the keywords it takes are {', '.join(known)}"
            )


def _sum(*streams: Tensor) -> Tensor:
    return sum(streams[1:], streams[0])


def _whole(branch: nn.Module) -> list[Parts]:
    return [(branch,)]


def _halves(b: Any) -> list[Parts]:
    return [(b.norm1, b.attn, b.ls1, b.drop_path1), (b.norm2, b.mlp, b.ls2, b.drop_path2)]


def _check_block(i: int, block: nn.Module) -> None:
    if type(block).forward is not timm_vit.Block.forward:
        name = type(block).__name__
        kind = (
            "parallel branches"
            if "Parallel" in name
            else "a post-norm"
            if "Post" in name
            else "its own forward"
        )
        told = f"block {i} is a {name} with {kind}, not x + attn(norm1(x)), then x + mlp(norm2(x))"
        raise TypeError(f"{told}; give what it adds to x to convert.residual, as modules")
    if (
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
    ):
        raise ValueError(
            f"block {i} has hooks, which would not be called; put them on its parts, such as block.attn"
        )


def _momentum(
    momentum: float | None, branches: int, group: int, limit: float, resolution: float
) -> float:
    """The momentum to use, checked: unless given, the smallest whose products fit into the digits of a float64."""
    if not branches:
        raise ValueError("expected branches, got none; a stack has at least one")
    whole("group", group, 1, of="functions")
    values = {"limit": limit, "resolution": resolution, "momentum": momentum}
    for name, value in values.items():
        if value is not None:
            real(name, value, is_power_of_two, "a power of two")
    undone = -(-branches // group) - 1  # products that must not be rounded
    room = _DIGITS - round(math.log2(limit / resolution))
    most = room // undone if undone else room
    bits = min(most, 20) if momentum is None else -round(math.log2(momentum))
    if bits < 1 or bits > most:
        asked = "any momentum" if momentum is None else f"momentum=2**{-bits}"
        raise ValueError(
            f"{branches} functions in cycles of {group} cannot be undone with {asked}: {undone} products have {room} "
            f"bits, so it must be 2**-{most} to 1/2. Raise group, at one float64 stream each, or momentum."
        )
    return 2.0**-bits
