"""Bytes of a training step of RevViT, RevSwin and RevMViT, and of timm's models, on fake tensors or real ones.

Activations are counted as in revlib.testing: bytes of live storages, gradients allocated beforehand. To them come the
images, weights, gradients, and Adam's two moments in float32.

Fake tensors take torch's CPU path. Its attention keeps queries, keys, values, output and one number a row, as the fused
kernels on CUDA do, but attention maps under attention dropout; its dropout masks are as wide as the activations, where
those on CUDA are bytes. Not counted: what an operation takes and returns inside itself, states of random generators, an
optimizer's temporaries, the allocator's fragmentation, and CUDA's own context.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from revlib.models import presets
from revlib.schedulers import Anchored, Budget, Checkpoint, Naive, Reversible, Scheduler
from revlib.testing import footprint


@dataclass(frozen=True)
class Model:
    """A preset, and timm's model of the same sizes. ``sizes`` override those of both; without them, it is published.

    A ViT is as deep as it has blocks. A model in stages is made deeper as its authors did, in its longest stage.
    """

    preset: str
    timm: str
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[int, ...] | None:
        """The blocks of each stage; empty for a model without stages."""
        return (presets.SIZES[self.preset][1] | self.sizes).get("depths")

    @property
    def depth(self) -> int:
        """The number of blocks that the preset has."""
        sizes = presets.SIZES[self.preset][1] | self.sizes
        return sum(self.stages) if self.stages else sizes["depth"]

    @property
    def least(self) -> int:
        """The smallest depth that the model can have."""
        return sum(self.stages) - max(self.stages) + 1 if self.stages else 1

    @property
    def pixels(self) -> int:
        """The number of which heights and widths of images must be multiples."""
        return 32 if self.stages else 16

    def at(self, depth: int) -> dict[str, Any]:
        """The arguments that give the model this depth."""
        if not self.stages:
            return {"depth": depth}
        if depth < self.least:
            raise ValueError(f"depth must be at least {self.least} for {self.preset}, got {depth}; add blocks")
        longest = self.stages.index(max(self.stages))
        rest = depth - sum(self.stages) + self.stages[longest]
        return {"depths": (*self.stages[:longest], rest, *self.stages[longest + 1 :])}


MODELS: dict[str, Model] = {
    "tiny": Model("rev_vit_small", "vit_small_patch16_224", {"embed_dim": 40, "depth": 2, "num_heads": 4}),
    "s": Model("rev_vit_small", "vit_small_patch16_224"),
    "b": Model("rev_vit_base", "vit_base_patch16_224"),
    "l": Model("rev_vit_large", "vit_large_patch16_224"),
    "tiny-swin": Model(
        "rev_swin_tiny",
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 40, "depths": (2, 1, 2), "num_heads": (1, 2, 4), "window_size": 4},
    ),
    "swin-t": Model("rev_swin_tiny", "swin_tiny_patch4_window7_224"),
    "swin-s": Model("rev_swin_small", "swin_small_patch4_window7_224"),
    "swin-b": Model("rev_swin_base", "swin_base_patch4_window7_224"),
    "tiny-mvit": Model("rev_mvit_base", "mvitv2_small", {"embed_dim": 40, "depths": (1, 2, 3)}),
    "mvit-b": Model("rev_mvit_base", "mvitv2_small"),
}
SCHEDULERS: dict[str, Scheduler] = {  # every line here is a row of the tables; add yours
    "naive": Naive(),
    "reversible": Reversible(),
    "checkpoint": Checkpoint(),
    "checkpoint-2": Checkpoint(every=2),
    "anchored-4": Anchored(4),
    "budget-25%": Budget(fraction=0.25),
    "budget-50%": Budget(fraction=0.5),
}
# timm's model of the same size, with one stream: without and with its own checkpointing.
CONTENDERS: dict[str, Scheduler | bool] = {**SCHEDULERS, "timm": False, "timm-checkpoint": True}


@dataclass(frozen=True)
class Setting:
    img_size: int = 224
    dtype: str = "float32"
    amp: str | None = None
    device: str = "cpu"
    dropout: float = 0.0  # of projections, and stochastic depth


@dataclass(frozen=True)
class Point:
    """Bytes of one training step; ``held`` after forward and ``peak`` in backward are activations."""

    model: str
    contender: str
    depth: int
    batch: int
    held: int
    peak: int
    images: int
    weights: int
    gradients: int
    optimizer: int
    seconds: float  # that counting took

    @property
    def total(self) -> int:
        return self.peak + self.images + self.weights + self.gradients + self.optimizer


class KernelLayouts(TorchDispatchMode):
    """Makes the gradient of layer norm contiguous, as kernels do. Fake tensors give it the strides of the incoming one,
    and the next linear layer would copy it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.native_layer_norm_backward.default:
            return result
        return [t if t is None else t.contiguous() for t in result]


def build(model: str, depth: int, setting: Setting, reversible: bool = True) -> nn.Module:
    """A model, or timm's of its sizes, on the default device."""
    chosen = MODELS[model]
    arguments = chosen.sizes | chosen.at(depth) | {"num_classes": 10 if chosen.sizes else 1000}
    name = chosen.preset if reversible else chosen.timm
    if name == "mvitv2_small":  # timm takes its sizes as a configuration
        sizes = arguments | {"drop_rate": setting.dropout}
        return multiscale(setting.img_size, **sizes, drop_path_rate=setting.dropout).to(getattr(torch, setting.dtype))
    inner = "drop_rate" if "mvit" in name else "proj_drop_rate"  # as timm names them
    arguments |= {inner: setting.dropout, "drop_path_rate": setting.dropout}
    return timm.create_model(name, img_size=setting.img_size, **arguments).to(getattr(torch, setting.dtype))


def multiscale(img_size: int, embed_dim: int = 96, depths: tuple[int, ...] = (), **arguments: Any) -> nn.Module:
    """timm's MViTv2 of any depths."""
    cfg = MultiScaleVitCfg(depths, embed_dim, stride_q=((1, 1), *[(2, 2)] * (len(depths) - 1)))
    return MultiScaleVit(cfg, (img_size, img_size), **arguments)


def count(
    model: str,
    contenders: Sequence[str],
    depth: int,
    batches: Sequence[int],
    setting: Setting,
    *,
    fake: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> list[Point]:
    """A point for each contender and batch size, on fake tensors or on real ones."""
    points = []
    dtype, amp = getattr(torch, setting.dtype), getattr(torch, setting.amp or "bfloat16")
    for reversible in (True, False):
        names = [c for c in contenders if isinstance(CONTENDERS[c], Scheduler) == reversible]
        if not names:
            continue
        # Not under FakeTensorMode from the start: timm reads numbers from tensors, which fake ones refuse.
        with torch.device("meta" if fake else setting.device):
            net = build(model, depth, setting, reversible)
        number = sum(p.numel() for p in net.parameters())
        weights = number * dtype.itemsize

        def run(images: Tensor, net: nn.Module = net) -> tuple[Tensor]:
            with torch.autocast(images.device.type, amp, enabled=setting.amp is not None):
                return (net(images),)

        with ExitStack() as stack:
            if fake:
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                stack.enter_context(KernelLayouts())
                net.to_empty(device=setting.device)
            for name in names:
                how = CONTENDERS[name]
                if isinstance(how, Scheduler):
                    net.scheduler = how
                else:
                    net.set_grad_checkpointing(how)
                for batch in batches:
                    began = time.perf_counter()
                    images = torch.randn(batch, 3, *[setting.img_size] * 2, dtype=dtype, device=setting.device)
                    if isinstance(how, Budget):  # its first pass measures
                        footprint(run, [images], net.parameters())
                    found = footprint(run, [images], net.parameters())
                    size, seconds = images.numel() * dtype.itemsize, time.perf_counter() - began
                    seen = (found.held, found.peak, size, weights, weights, 8 * number, seconds)
                    points.append(Point(model, name, depth, batch, *seen))
                    tick()
    return points
