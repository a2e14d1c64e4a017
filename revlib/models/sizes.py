"""Models for images of another size than they were built for, and checkpoints from models of another size.

Positions and patches are resampled as timm does it: bicubically, and linearly along tables of one dimension.
Each ``resize_`` changes a model in place, each ``checkpoint_of_`` gives the tensors of a checkpoint in the model's
sizes; timm calls the latter ``checkpoint_filter_fn``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from timm.layers import (
    resample_abs_pos_embed,
    resample_patch_embed,
    resize_rel_pos_bias_table,
    to_2tuple,
)
from torch import Tensor, nn
from torch.nn import functional

try:
    from timm.models._input import get_pretrained_grid_size, update_model_input_size
except ImportError:  # timm before 1.0.31 notes no sizes beside those in the arguments of a model

    def get_pretrained_grid_size(*args: object) -> None: ...  # type: ignore[misc]

    def update_model_input_size(*args: object, **kwargs: object) -> None: ...  # type: ignore[misc]


if TYPE_CHECKING:
    from revlib.models.mvit import RevMViT
    from revlib.models.swin import RevSwin
    from revlib.models.vit import RevViT

__all__ = [
    "Size",
    "checkpoint_of_mvit",
    "checkpoint_of_swin",
    "checkpoint_of_vit",
    "divisible",
    "grid_of",
    "resampled_positions",
    "resize_mvit",
    "resize_swin",
    "resize_vit",
]

Size = int | tuple[int, int]


def _tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may hold them as "model" or "state_dict"."""
    for key in ("model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)
    return dict(checkpoint)


# ------------------------------------------------------------------------------------------------------ RevViT
def divisible(img_size: Size, patch_size: Size) -> tuple[int, int]:
    """The size of an image as (height, width). Raises: ValueError unless patches divide both."""
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    if height % rows or width % columns:
        resized = f"{max(1, height // rows) * rows}x{max(1, width // columns) * columns}"
        raise ValueError(
            f"img_size must be divisible by patch_size={patch_size}, got {height}x{width}; resize to {resized}"
        )
    return height, width


def resampled_positions(
    positions: Tensor, grid: tuple[int, int], before: tuple[int, int]
) -> Tensor:
    """Positions resampled for another map of patches: (1, patches before, C) to (1, patches, C)."""
    found: Tensor = resample_abs_pos_embed(positions, list(grid), list(before), num_prefix_tokens=0)
    return found


def resize_vit(model: RevViT, img_size: Size | None, patch_size: Size | None) -> None:
    embed = model.patch_embed
    pixels, patch = (given if new is None else new for given, new in (
        (embed.img_size, img_size), (embed.patch_size, patch_size)))  # fmt: skip
    size, before = divisible(pixels, patch), embed.grid_size
    embed.set_input_size(size, patch_size)
    positions = resampled_positions(model.pos_embed.detach(), embed.grid_size, before)
    model.pos_embed = nn.Parameter(positions, requires_grad=model.pos_embed.requires_grad)
    for level in model.feature_info:
        level["reduction"] = max(embed.patch_size)
    update_model_input_size(model, size, patch_size=patch_size)


def checkpoint_of_vit(checkpoint: dict[str, Any], model: RevViT) -> dict[str, Tensor]:
    """Raises: ValueError for positions of an oblong map whose sides are not known."""
    tensors, embed = _tensors(checkpoint), model.patch_embed
    positions, patches = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if positions is not None:
        number = positions.shape[1]
        grid = get_pretrained_grid_size(model, patches, number)
        if grid is None and number != embed.num_patches:
            grid = (math.isqrt(number), math.isqrt(number))
            if grid[0] ** 2 != number:
                raise ValueError(
                    f"pos_embed of the checkpoint is of {number} patches, expected {embed.num_patches} or a square; "
                    "build the model with the checkpoint's img_size, load it, and call model.set_input_size"
                )
        if grid is not None:
            tensors["pos_embed"] = resampled_positions(positions, embed.grid_size, grid)
    if patches is not None and patches.shape[-2:] != embed.patch_size:
        tensors["patch_embed.proj.weight"] = resample_patch_embed(patches, list(embed.patch_size))
    return tensors


# ------------------------------------------------------------------------------------------------------ RevSwin
def grid_of(size: tuple[int, int], patch_size: Size, stage: int = 0) -> tuple[int, int]:
    """Rows and columns of the map of a stage: images are padded to patches, and maps to pairs of them."""
    (height, width), (rows, columns) = size, to_2tuple(patch_size)
    return -(-height // (rows * 2**stage)), -(-width // (columns * 2**stage))


def resize_swin(
    model: RevSwin,
    img_size: Size | None,
    patch_size: Size | None,
    window_size: Size | None,
    window_ratio: int | None,
) -> None:
    embed = model.patch_embed
    embed.set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
    grid, (before, at) = grid_of(embed.img_size, embed.patch_size), model.windows
    window = tuple(
        max(1, side * new // old) for side, new, old in zip(before, grid, at, strict=True)
    )
    if window_size is not None or window_ratio is not None:
        parts = tuple(max(1, side // (window_ratio or 1)) for side in grid)
        window = parts if window_size is None else to_2tuple(window_size)
        model.windows = (window, grid)
    for i, stage in enumerate(model.stages):
        model.feature_info[i]["reduction"] = max(embed.patch_size) * 2**i
        for F, _ in stage:
            F.set_input_size(
                feat_size=grid_of(embed.img_size, embed.patch_size, i), window_size=window
            )
    update_model_input_size(model, embed.img_size, patch_size=patch_size, window_size=window)


def checkpoint_of_swin(checkpoint: dict[str, Any], model: RevSwin) -> dict[str, Tensor]:
    tensors = _tensors(checkpoint)
    for name, tensor in model.state_dict().items():
        given = tensors.get(name)
        if given is None or given.shape == tensor.shape:
            continue
        if name.endswith("relative_position_bias_table"):
            window = model.get_submodule(name.rpartition(".")[0]).window_size
            tensors[name] = resize_rel_pos_bias_table(given, window, tuple(tensor.shape))
        elif name == "patch_embed.proj.weight":
            tensors[name] = resample_patch_embed(given, list(model.patch_embed.patch_size))
    return tensors


# ------------------------------------------------------------------------------------------------------ RevMViT
def _fit(attention: Any, before: tuple[int, int], now: tuple[int, int]) -> None:
    """Fit tables of relative positions to another map.

    For an oblong map timm makes the tables of a square one, so that rows are left over along the shorter side. Only
    rows in use are resampled."""
    strides = [
        pool.stride if pool is not None else (1, 1) for pool in (attention.pool_q, attention.pool_k)
    ]
    (_, used), (longest, needed) = (
        (2 * max(lengths) - 1, [2 * length - 1 for length in lengths])
        for lengths in (
            [max(size[d] // stride[d] for stride in strides) for d in (0, 1)]
            for size in (before, now)
        )
    )
    for d, name in enumerate(("rel_pos_h", "rel_pos_w")):
        table = getattr(attention, name)
        other = table.new_zeros(longest, table.shape[1], requires_grad=False)
        other[: needed[d]] = _resampled_table(table.detach()[: used[d]], needed[d])
        setattr(attention, name, nn.Parameter(other, requires_grad=table.requires_grad))


def resize_mvit(model: RevMViT, img_size: Size | None) -> None:
    if img_size is None:
        return
    embed: Any = model.patch_embed
    rows, columns = embed.proj.stride
    unit = rows * 2 ** (len(model.stages) - 1)
    height, width = to_2tuple(img_size)
    if height % unit or width % unit:
        resized = f"{-(-height // unit) * unit}x{-(-width // unit) * unit}"
        raise ValueError(
            f"img_size must be divisible by {unit}, got {height}x{width}; resize to {resized}"
        )
    now = (height // rows, width // columns)
    if now == model.stages[0].feat_size:
        return
    for stage in model.stages:
        before, stage.feat_size = stage.feat_size, now
        if stage.transition is not None:
            _fit(stage.transition.attn, before, now)
            before, now = ((size[0] // 2, size[1] // 2) for size in (before, now))
        for F, _ in stage.pairs:
            _fit(F.attn, before, now)
            F.feat_size = now
    update_model_input_size(model, (height, width))


def checkpoint_of_mvit(checkpoint: dict[str, Any], model: RevMViT) -> dict[str, Tensor]:
    tensors = _tensors(checkpoint)
    for name, tensor in model.state_dict().items():
        if name.endswith(("rel_pos_h", "rel_pos_w")) and name in tensors:
            tensors[name] = _resampled_table(tensors[name], len(tensor))
    return tensors


def _resampled_table(table: Tensor, length: int) -> Tensor:
    """A table of relative positions resampled linearly: (2 side - 1, C) to (length, C)."""
    if len(table) == length:
        return table
    other = functional.interpolate(table.T[None].float(), size=length, mode="linear")[0].T
    return other.to(table.dtype).contiguous()
