"""minREV's three networks, built of the models here: the same function of the images, the same initial distribution.

What each of them has that the model here has not, unless told, is listed in its docstring. One thing in minREV is a
mistake, not a choice: shifted windows are never rolled back. It has a name, ``unrolled_windows``, and is off.

Source: github.com/karttikeya/minREV as of May 2023 (rev.py, revswin.py, revmvit.py, main.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Attention
from timm.models.mvitv2 import MultiScaleBlock
from torch import Tensor, nn

from revlib.models.fusion import Concat, ConcatMlp, Mean
from revlib.models.mvit import RevMViT
from revlib.models.stage import WindowBranch
from revlib.models.swin import RevSwin
from revlib.models.vit import RevViT

__all__ = [
    "UnrolledRevSwin",
    "init_like_torch",
    "minrev_mvit",
    "minrev_swin",
    "minrev_vit",
    "take_both_streams",
]


def minrev_vit(**sizes: Any) -> RevViT:
    """A :class:`RevViT` as minREV builds it, with its initial weights.

    It differs from ``RevViT(**sizes)`` in this: patches are averaged before the last norm (``fc_norm=True``); the norm
    before attention has an epsilon of 1e-6, all others of 1e-5; layers start as torch's own do
    (``init_like_torch``); positions start at zero.

    Args: those of ``RevViT``, but for ``fc_norm`` and ``norm_layer``. Shapes, cost and errors are its, too.

    Source: rev.py of github.com/karttikeya/minREV.

    Example:
        >>> model = minrev_vit(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    model = RevViT(**sizes, fc_norm=True)
    for F, _ in model.blocks:
        norm: Any = F.get_submodule("0")
        norm.eps = 1e-6
    nn.init.zeros_(model.pos_embed)
    init_like_torch(model)
    return model


def init_like_torch(model: nn.Module) -> None:
    """Give every linear layer the initial weights that torch gives it, and attention those of ``MultiheadAttention``.

    These are, for a layer with n inputs, uniform weights and biases of magnitude below 1/sqrt(n). In attention, the
    weights of queries, keys and values together are uniform by Glorot's rule, and all biases are zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.xavier_uniform_(module.qkv.weight)
            for layer in (module.qkv, module.proj):
                nn.init.zeros_(layer.bias)


class UnrolledWindowBranch(WindowBranch):
    """F of :class:`RevSwin` whose result stays where the shift has put it, and is not rolled back."""

    def forward(self, x: Tensor) -> Tensor:
        rolled_back = self._attn(self.norm1(x))
        return self.drop_path1(
            torch.roll(rolled_back, [-shift for shift in self.shift_size], dims=(1, 2))
        )


class UnrolledRevSwin(RevSwin):
    """:class:`RevSwin` as minREV's code runs: every other block adds to each patch what attention found for another.

    The patch is the one that lies half a window further down and to the right, around the edges of the map.
    """

    branch = UnrolledWindowBranch


def minrev_swin(unrolled_windows: bool = False, **sizes: Any) -> RevSwin:
    """A :class:`RevSwin` as minREV builds it, with its initial weights.

    It differs from ``RevSwin(**sizes, fusion=ConcatMlp)`` in this: the MLP that fuses the streams has no norm before
    it; every other block shifts its windows even on a map that one window covers (timm's ``always_partition=True``), so
    that patches there attend within quarters; all biases start at 0.02.

    Args: those of ``RevSwin``, but for ``fusion`` and ``always_partition``, and
        unrolled_windows: leave shifted windows where they are, as minREV's code does by mistake.

    Shapes, cost and errors are those of ``RevSwin``. Source: revswin.py of github.com/karttikeya/minREV.

    Example:
        >>> model = minrev_swin(img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2))
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def fusion(dim: int, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
        return ConcatMlp(dim, lambda _: nn.Identity())

    kind = UnrolledRevSwin if unrolled_windows else RevSwin
    model = kind(**sizes, fusion=fusion, always_partition=True)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.constant_(module.bias, 0.02)
    return model


def minrev_mvit(mlp_ratio: float = 4.0, **sizes: Any) -> RevMViT:
    """A :class:`RevMViT` as minREV builds it, with its initial weights.

    It differs from ``RevMViT(**sizes)`` in this: the next stage takes both streams side by side, so that its transition
    need not widen them; all norms have an epsilon of 1e-5; tables of relative positions start at zero; the third block,
    the last of the second stage, pools keys and values by 2 once more; patches are averaged before the last norm
    (``fc_norm=True``). minREV's code works for four blocks, ``depths=(1, 2, 1)``.

    Args: those of ``RevMViT``, but for ``fusion`` and ``fc_norm``. Shapes, cost and errors are its, too.

    Source: revmvit.py of github.com/karttikeya/minREV.

    Example:
        >>> model = minrev_mvit(img_size=16, patch_size=2, embed_dim=8, depths=(1, 2, 1))
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    model = RevMViT(**sizes, mlp_ratio=mlp_ratio, fusion=Mean, fc_norm=True)
    take_both_streams(model, mlp_ratio)
    if len(model.stages) > 1 and len(model.stages[1].pairs):
        attention = model.stages[1].pairs[-1].F.attn
        for pool in (attention.pool_k, attention.pool_v):
            pool.stride = tuple(2 * stride for stride in pool.stride)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.zeros_(parameter)
    return model


def take_both_streams(model: RevMViT, mlp_ratio: float) -> None:
    """Put in transitions for streams side by side, which have the width of the next stage already.

    In all else they are as those in whose place they come.
    """
    for before, stage in pairwise(model.stages):
        old = stage.transition
        norm: Callable[..., nn.Module] = type(old.norm1)
        weight = old.attn.qkv.weight
        side = max(stage.feat_size)  # timm makes square tables only, as for RevMViT
        new = MultiScaleBlock(
            old.dim_out,
            old.dim_out,
            old.attn.num_heads,
            (side, side),
            mlp_ratio,
            drop_path=getattr(old.drop_path1, "drop_prob", 0.0),
            norm_layer=partial(norm, eps=old.norm1.eps),
            kernel_q=old.attn.pool_q.kernel_size,
            kernel_kv=old.attn.pool_k.kernel_size,
            stride_q=old.attn.pool_q.stride,
            stride_kv=old.attn.pool_k.stride,
            has_cls_token=old.has_cls_token,
            expand_attn=True,
        )
        new.mlp.act = old.mlp.act
        new = new.to(device=weight.device, dtype=weight.dtype)
        stage.transition = new.apply(model._init_weights)
        before.fusion = Concat()
