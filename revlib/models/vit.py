"""RevViT: the Reversible Vision Transformer, out of timm's layers and a reversible sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_act_layer,
    get_norm_layer,
    trunc_normal_,
)
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from revlib import _numbers
from revlib.couplings import Coupling
from revlib.models.attention import SelfAttention
from revlib.models.base import Groups, Layer, TimmModel, check_numbers, placed
from revlib.models.blocks import Blocks
from revlib.models.sizes import divisible, resampled_positions, resize_vit
from revlib.schedulers import Scheduler

__all__ = ["RevViT"]


class RevViT(TimmModel):
    r"""Reversible Vision Transformer: two copies of the embedded patches run through reversible blocks.

    $$y_1 = x_1 + \mathrm{Attention}(\mathrm{LN}(x_2)), \qquad y_2 = x_2 + \mathrm{MLP}(\mathrm{LN}(y_1))$$

    and the head sees the normalised concatenation of both streams, averaged over the patches. There is no class token.

    Args:
        img_size: pixels, a number or (height, width). patch_size: pixels; it must divide both.
        in_chans, num_classes: channels in; classes out (0: no classifier, ``forward`` returns pooled features).
        embed_dim, depth, num_heads, mlp_ratio: width of each stream, blocks, heads, hidden width of the MLP / width.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the classifier, after projections and
            of attention weights, and stochastic depth (rising linearly over the blocks).
        norm_layer, act_layer: classes, or timm's names of them.
        fc_norm: average over the patches first, and normalise after; by timm's name.
        global_pool: "avg", or "" for none: the head then sees every patch.
        dynamic_img_size: take images of any size that patches divide, with positions resampled for each.
        coupling: how blocks merge into the streams; ``ExactAdditive()`` for inversion without rounding errors.
        scheduler: how backward gets activations back; also ``model.scheduler = ...`` at any time.
        device, dtype: of parameters.

    Shapes: images (B, in_chans, H, W) to logits (B, num_classes). With N patches, features are (B, N, 2 embed_dim).
    Cost: activation memory of one block at any depth, about 17.5 B·N·embed_dim elements at the peak of backward.

    Raises: ValueError for sizes that do not divide each other, and in forward for images of another size, unless
    ``dynamic_img_size``.

    Source: Mangalam et al., *Reversible Vision Transformers*, CVPR 2022: no residual around the pair, no layer
    between blocks, fusion by concatenation at the end.

    Example:
        >>> model = RevViT(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
        >>> logits = model(torch.randn(2, 3, 16, 16))
        >>> logits.sum().backward()
        >>> logits.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 6,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = nn.LayerNorm,
        fc_norm: bool = False,
        global_pool: str = "avg",
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
        *,
        proj_drop_rate: float = 0.0,
        act_layer: Layer = nn.GELU,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the model; the docstring of the class explains the arguments."""
        super().__init__()
        check_numbers(locals())
        size = divisible(img_size, patch_size)
        _numbers.divisible("embed_dim", embed_dim, "num_heads", num_heads)
        self.in_chans, self.embed_dim, self.dynamic_img_size = in_chans, embed_dim, dynamic_img_size
        self.num_features = self.head_hidden_size = 2 * embed_dim
        self.make_taps([2 * embed_dim] * depth, [patch_size] * depth)
        norm, act = get_norm_layer(norm_layer), get_act_layer(act_layer)

        with placed(device):
            embed = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
            self.patch_embed = PatchEmbed(size, patch_size, in_chans, embed_dim, **embed)
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
            self.blocks = Blocks(coupling=coupling, scheduler=scheduler)
            for rate in calculate_drop_path_rates(drop_path_rate, int(depth)):
                dropout = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
                attention = SelfAttention(embed_dim, num_heads, qkv_bias=True, **dropout)
                mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), act_layer=act, drop=proj_drop_rate)
                F, G = (nn.Sequential(norm(embed_dim), f, DropPath(rate)) for f in (attention, mlp))
                self.blocks.append((F, G))
            self.norm = nn.Identity() if fc_norm else norm(2 * embed_dim)
            self.fc_norm = norm(2 * embed_dim) if fc_norm else nn.Identity()
            self.head_drop = nn.Dropout(drop_rate)
            self.make_head(num_classes, global_pool)

        trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(init_weights_vit_timm)
        self.head.apply(init_weights_vit_timm)
        self.to(dtype=dtype)

    def streams(self, images: Tensor, stops: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        x = self._placed(self.patch_embed(images))
        streams: tuple[Tensor, ...] = (x, x)
        for start, stop in itertools.pairwise([0, *stops]):
            streams = self.blocks.part(start, stop, streams[0], streams[1])
            yield streams

    def _placed(self, x: Tensor) -> Tensor:
        """Patches with their positions added. For images of another size the positions are resampled."""
        if not self.dynamic_img_size:
            return x + self.pos_embed
        grid = (x.shape[1], x.shape[2])
        return x.flatten(1, 2) + resampled_positions(
            self.pos_embed, grid, self.patch_embed.grid_size
        )

    def keep(self, levels: int) -> None:
        self.blocks = self.blocks[:levels]

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size, or cut them into other patches: positions and patches are resampled."""
        resize_vit(self, img_size, patch_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, beside biases and norms."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> Groups:
        """Which parameters form a layer, for rates that depend on depth: patches, blocks, norm, head."""
        return {
            "stem": r"^pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }
