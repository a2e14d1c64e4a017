"""RevSwin: the reversible Swin Transformer, out of timm's layers and one reversible sequence per stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import (
    PatchEmbed,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
    to_2tuple,
)
from timm.models.swin_transformer import PatchMerging
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from revlib.couplings import Coupling
from revlib.models.base import Groups, Layer, TimmModel, check_numbers, placed
from revlib.models.blocks import Blocks, separable
from revlib.models.fusion import Fusion, Mean
from revlib.models.sizes import Size, grid_of, resize_swin
from revlib.models.stage import WindowBranch
from revlib.schedulers import Scheduler

__all__ = ["RevSwin"]


class RevSwin(TimmModel):
    r"""Reversible Swin Transformer: stages of reversible blocks, each at half the resolution and twice the width.

    $$y_1 = x_1 + \mathrm{Attention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    Attention stays within windows, which every other block shifts by half their size. Between stages, not reversibly,
    the streams are fused, merged 2x2 and duplicated. As in RevViT, the head sees the normalised concatenation of both.

    Args:
        img_size: pixels, a number or (height, width). Images may have any other size; windows are fit for this one.
        patch_size, window_size: pixels; patches, a number or (height, width). Images and maps are padded to multiples;
            along a side of a map that a window covers, it shrinks to that side and does not shift.
        in_chans, num_classes: channels in; classes out (0: no classifier, ``forward`` returns pooled features).
        embed_dim, depths, num_heads, mlp_ratio: width of each stream in the first stage; blocks and heads of every
            stage; hidden width of the MLP / width.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after projections and
            of attention weights, and stochastic depth (rising linearly over the blocks of all stages).
        always_partition: keep windows and their shifts on maps that a window covers, as timm's Swin has it.
        norm_layer, act_layer: classes, or timm's names of them.
        global_pool: "avg", or "" for none: the head then sees every patch.
        dynamic_img_size: False refuses images of another size, as timm's Swin does unless told.
        fusion: how two streams become one between stages: see :mod:`revlib.models.fusion`.
        coupling, scheduler: of all stages, see :class:`~revlib.ReversibleSequence`; also ``model.scheduler = ...``.
        parts: of a batch, that the first stage takes one after another in training: see ``revlib.models.blocks``.
        device, dtype: of parameters.

    Shapes: images (B, in_chans, H, W) to logits (B, num_classes). Features are (B, h, w, 2^stages embed_dim).
    Cost: activation memory of one block at any depths, about 15 B·h·w·embed_dim elements for h·w patches at its peak.
    Raises: ValueError where depths, num_heads, window_size and embed_dim do not fit each other.
    Source: Liu et al., *Swin Transformer*, ICCV 2021; Mangalam et al., *Reversible Vision Transformers*, CVPR 2022,
    section 3.3 (stages); Zhu & Mangalam, *PaReprop*, 2023 (Rev-Swin).

    Example:
        >>> model = RevSwin(img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2))
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    output_fmt = "NHWC"  # of features
    branch = WindowBranch  # F of a pair

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depths: tuple[int, ...] = (2, 2),
        num_heads: tuple[int, ...] = (4, 8),
        window_size: int | tuple[int, int] = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = nn.LayerNorm,
        always_partition: bool = False,
        global_pool: str = "avg",
        fusion: Fusion = Mean,
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
        *,
        proj_drop_rate: float = 0.0,
        act_layer: Layer = nn.GELU,
        dynamic_img_size: bool = True,
        parts: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        super().__init__()
        check_numbers(locals(), per_stage=("depths", "num_heads"))
        size, window = to_2tuple(img_size), to_2tuple(window_size)
        if len(depths) != len(num_heads):
            raise ValueError(
                "depths and num_heads must have as many numbers as there are stages, got "
                f"depths={depths}, num_heads={num_heads}"
            )
        widths = [embed_dim * 2**i for i in range(len(depths))]
        if any(width % heads for width, heads in zip(widths, num_heads, strict=True)):
            raise ValueError(
                f"num_heads must divide the widths {widths} of the stages, got {num_heads}"
            )
        self.in_chans, self.embed_dim, self.dynamic_img_size = in_chans, embed_dim, dynamic_img_size
        self.num_features = self.head_hidden_size = 2 * widths[-1]
        self.make_taps(
            [2 * width for width in widths], [patch_size * 2**i for i in range(len(depths))]
        )
        norm, act = get_norm_layer(norm_layer), get_act_layer(act_layer)
        embed = {
            "output_fmt": "NHWC",
            "strict_img_size": not dynamic_img_size,
            "dynamic_img_pad": True,
        }
        layers = {
            "norm_layer": norm,
            "act_layer": act,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
        }
        sizes = {"window_size": window, "dynamic_mask": True, "mlp_ratio": mlp_ratio}
        sizes["always_partition"] = always_partition
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        with placed(device):
            self.patch_embed = PatchEmbed(size, patch_size, in_chans, embed_dim, norm, **embed)
            # The windows, and the size of the map for which they are meant: for others they grow in proportion.
            self.windows = (window, grid_of(size, patch_size))
            self.stages: Any = nn.ModuleList()
            for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
                blocks = Blocks(coupling=coupling, scheduler=scheduler)
                for j, rate in enumerate(drop_paths[i]):
                    own = {
                        "shift_size": [j % 2 * (side // 2) for side in window],
                        "drop_path": rate,
                    }
                    grid = grid_of(size, patch_size, i)
                    blocks.append(self.branch(width, grid, heads, **sizes, **layers, **own).pair())
                self.stages.append(blocks)
            self.fusions = nn.ModuleList(fusion(width, norm) for width in widths[:-1])
            self.downsamples = nn.ModuleList(
                PatchMerging(width, 2 * width, norm) for width in widths[:-1]
            )
            self.norm, self.fc_norm = norm(self.num_features), nn.Identity()
            self.head_drop = nn.Dropout(drop_rate)
            self.reset_classifier(num_classes, global_pool)
        first: Any = self.stages[0]
        first.parts = separable(parts, self)
        self.apply(init_weights_vit_timm)
        self.to(dtype=dtype)

    def streams(self, images: Tensor, stops: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        # In the dtype of autocast, sums over many blocks would be too coarse to be inverted.
        dtype = self.patch_embed.proj.weight.dtype
        x = self.patch_embed(images).to(dtype)
        for i in range(stops[-1]):
            streams = self.stages[i](x, x)
            if i + 1 in stops:
                yield streams
            if i + 1 < stops[-1]:
                x = self.downsamples[i](self.fusions[i](streams[0], streams[1])).to(dtype)

    def keep(self, levels: int) -> None:
        self.stages = self.stages[:levels]
        self.fusions, self.downsamples = self.fusions[: levels - 1], self.downsamples[: levels - 1]

    def set_input_size(
        self,
        img_size: Size | None = None,
        patch_size: Size | None = None,
        window_size: Size | None = None,
        window_ratio: int | None = None,
    ) -> None:
        """Fit windows to images of another size, or to other patches; tables of positions and patches are resampled.

        Windows keep their proportion to the map of the first stage, unless ``window_size`` gives them, or
        ``window_ratio`` their number along each side of that map.
        """
        resize_swin(self, img_size, patch_size, window_size, window_ratio)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beside biases and norms."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith("relative_position_bias_table")
        }

    def group_matcher(self, coarse: bool = False) -> Groups:
        """Which parameters form a layer, for rates that depend on depth: patches, blocks or stages, norm, head.

        What stands between two stages belongs to the first block of the second.
        """
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        between = [
            (rf"^(?:fusions|downsamples)\.{i}\.", (i + 1,) if coarse else (i + 1, 0))
            for i in range(len(self.downsamples))
        ]
        return {"stem": r"^patch_embed", "blocks": [(block, None), *between, (r"^norm", (99999,))]}
