"""Bytes of a training step of RevViT, and of timm's ViT, on fake tensors or real ones.

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
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from revlib.models import RevViT
from revlib.schedulers import Anchored, Budget, Checkpoint, Naive, Reversible, Scheduler
from revlib.testing import footprint

MODELS: dict[str, dict[str, int]] = {  # the published sizes; patches of 16 pixels
    "tiny": {"embed_dim": 40, "depth": 2, "num_heads": 4, "num_classes": 10},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
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
# timm's ViT of the same size, one stream and a class token: without and with its own checkpointing.
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
    """Layer norm's gradient is contiguous, as its kernels return it. Fake tensors give it the strides of what came in,
    and the next linear layer would copy it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.native_layer_norm_backward.default:
            return result
        return [t if t is None else t.contiguous() for t in result]


def build(architecture: type[nn.Module], model: str, depth: int, setting: Setting) -> nn.Module:
    """A model on the default device; the two architectures name their arguments alike, but for dropout."""
    drop_rate = "drop_rate" if architecture is RevViT else "proj_drop_rate"
    sizes = {"num_classes": 1000, **MODELS[model], "depth": depth, "img_size": setting.img_size, "patch_size": 16}
    net = architecture(**sizes, **{drop_rate: setting.dropout}, drop_path_rate=setting.dropout)
    return net.to(getattr(torch, setting.dtype))


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
    for architecture in (RevViT, VisionTransformer):
        names = [c for c in contenders if isinstance(CONTENDERS[c], Scheduler) == (architecture is RevViT)]
        if not names:
            continue
        # Not under FakeTensorMode from the start: timm reads numbers from tensors, which fake ones refuse.
        with torch.device("meta" if fake else setting.device):
            net = build(architecture, model, depth, setting)
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
                    net.blocks.scheduler = how
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
