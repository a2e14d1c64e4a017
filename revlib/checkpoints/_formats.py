"""How other code names the parameters of the models here, and which settings its checkpoints imply."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from timm.models.mvitv2 import MultiScaleBlock
from torch import Size, nn

from revlib.models import PublishedRevMViT, PublishedRevMViTVideo, RevMViT, RevSwin, RevViT
from revlib.models.fusion import Concat
from revlib.models.minrev import UnrolledRevSwin

__all__ = ["FUSED", "MINREV", "SEPARATE", "Format", "names", "settings"]


def _nothing(model: nn.Module) -> Iterator[str]:
    return iter(())


class Format(NamedTuple):
    """The names of a model's parameters in other code, and what else that code takes for granted.

    Attributes:
        name: of the other code.
        model: how to build a model here that fits, in words.
        kinds: the classes of such models.
        block: what their names in the n-th block start with.
        table: from what one of our names starts with, after the block, to what theirs starts with. The first entry
            that fits counts.
        eps: the epsilon of their norms.
        coarse: our names of the norms that have an epsilon of 1e-5 there all the same.
        in_time: whether their pools also convolve in time, with kernels that are one frame long.
        differs: tells of a model here in what it computes another function, which no shape shows.
    """

    name: str
    model: str
    kinds: tuple[type[nn.Module], ...]
    block: str
    table: dict[str, str]
    eps: float
    coarse: tuple[str, ...] = ()
    in_time: bool = False
    differs: Callable[[Any], Iterator[str]] = _nothing

    def norms(self, model: nn.Module) -> Iterator[tuple[str, nn.LayerNorm, float]]:
        """Each norm of the model: its name, the module, and its epsilon in the other code."""
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                yield name, module, 1e-5 if self.coarse and name.endswith(self.coarse) else self.eps


def names(fmt: Format, model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Each parameter: our name, and their names, which are several if ours holds theirs one after another."""
    blocks = (
        [f"{name}." for name, module in model.named_modules() if _is_block(module)]
        if fmt.block
        else []
    )
    for name in model.state_dict():
        number = next((n for n, block in enumerate(blocks) if name.startswith(block)), None)
        inner, start = (
            (name, "")
            if number is None
            else (name[len(blocks[number]) :], fmt.block.format(number))
        )
        yield name, [start + their for their in _translated(fmt, inner)]


def _is_block(module: nn.Module) -> bool:
    return (hasattr(module, "F") and hasattr(module, "G")) or isinstance(module, MultiScaleBlock)


def _translated(fmt: Format, inner: str) -> list[str]:
    """Their names for one of ours. A star in the table stands for a number, the same in both names."""
    for ours, theirs in fmt.table.items():
        if match := re.match(re.escape(ours).replace(r"\*", r"(\d+)"), inner):
            numbers = match.groups()
            return [
                their.replace("*", "{}").format(*numbers) + inner[match.end() :]
                for their in theirs.split()
            ]
    return []


def settings(model: nn.Module, shapes: Mapping[str, Size]) -> dict[str, Any]:
    """The arguments of the model's class that can be read from these shapes, by the names of the other code."""
    found: dict[str, Any] = {}
    stem = next(
        (
            shapes[name]
            for name in ("patch_embed.weight", "patch_embed.proj.weight")
            if name in shapes
        ),
        None,
    )
    head = next(
        (shapes[name] for name in ("head.weight", "head.projection.weight") if name in shapes), None
    )
    if stem is not None and len(stem) == 4:
        overlapping = isinstance(model, RevMViT | PublishedRevMViT)
        found |= {"embed_dim": stem[0], "in_chans": stem[1]}
        found["patch_size"] = (stem[-1] + 1) // 2 if overlapping else stem[-1]
    if head is not None:
        found["num_classes"] = head[0]
    if isinstance(model, RevSwin):
        stages: dict[int, int] = {}
        for name in shapes:
            if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
                stages[int(match[1])] = max(stages.get(int(match[1]), 0), int(match[2]) + 1)
        found["depths"] = tuple(stages[i] for i in sorted(stages))
        tables = [f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in sorted(stages)]
        found["num_heads"] = tuple(shapes[table][1] for table in tables if table in shapes)
    else:
        blocks = [
            int(match[1])
            for name in shapes
            if (match := re.search(r"(?:layers|blocks)\.(\d+)\.", name))
        ]
        found["depth" if isinstance(model, RevViT) else "sum(depths)"] = max(blocks, default=-1) + 1
        if "blocks.0.attn.norm_q.weight" in shapes and "embed_dim" in found:
            found["num_heads"] = found["embed_dim"] // shapes["blocks.0.attn.norm_q.weight"][0]
    return found


TAKE_ANYWAY = "or pass same_function=False to move the weights all the same"


def _vit_differs(model: RevViT) -> Iterator[str]:
    if not isinstance(model.norm, nn.Identity):
        yield "fc_norm is False, and minREV averages patches before the last norm: build the model with fc_norm=True"


def _swin_differs(model: RevSwin) -> Iterator[str]:
    norms: list[Any] = [getattr(fusion, "norm", nn.Identity()) for fusion in model.fusions]
    if any(list(norm.parameters()) for norm in norms):
        yield "fusion has a norm, and minREV's has none: build the model by revlib.models.minrev_swin"
    if any(not any(step.F.shift_size) for stage in model.stages for step in list(stage)[1::2]):
        yield (
            "always_partition is False, and minREV shifts windows on small maps too: build the model by "
            f"revlib.models.minrev_swin, {TAKE_ANYWAY}"
        )
    shifted = any(any(step.F.shift_size) for stage in model.stages for step in stage)
    if shifted and not isinstance(model, UnrolledRevSwin):
        yield (
            "unrolled_windows is False, and minREV never rolls shifted windows back: build the model by "
            f"revlib.models.minrev_swin(..., unrolled_windows=True), {TAKE_ANYWAY}"
        )


def _mvit_differs(model: RevMViT) -> Iterator[str]:
    built = "build the model by revlib.models.minrev_mvit"
    if not isinstance(model.norm, nn.Identity):
        yield f"fc_norm is False, and minREV averages patches before the last norm: {built}"
    if not all(isinstance(stage.fusion, Concat) for stage in model.stages[:-1]):
        yield f"fusion is not that of minREV, whose transitions take both streams side by side: {built}"
    if len(model.stages) > 1 and len(model.stages[1].pairs):
        first, third = (stage.pairs[-1].F.attn.pool_k.stride[0] for stage in model.stages[:2])
        if third != 2 * max(first // 2, 1):
            yield f"keys of the third block are pooled by {third}, and by {2 * max(first // 2, 1)} in minREV: {built}"
    if tuple(len(stage.pairs) for stage in model.stages) != (1, 1, 0):
        yield "depths are not (1, 2, 1), the only ones for which minREV's head fits: build the model with these"


_MINREV_VIT = Format(
    *("minREV", "RevViT(..., fc_norm=True)", (RevViT,), "layers.{}."),
    table={
        "pos_embed": "pos_embeddings",
        "patch_embed.proj.": "patch_embed.",
        "F.0.": "F.norm.",
        "F.1.qkv.": "F.attn.in_proj_",
        "F.1.proj.": "F.attn.out_proj.",
        "G.0.": "G.norm.",
        "G.1.fc1.": "G.mlp.0.",
        "G.1.fc2.": "G.mlp.2.",
        "fc_norm.": "norm.",
        "head.": "head.",
    },
    eps=1e-6,
    coarse=("G.0", "fc_norm"),
    differs=_vit_differs,
)
_MINREV_SWIN = Format(
    *("minREV", "revlib.models.minrev_swin(..., unrolled_windows=True)", (RevSwin,), ""),
    table={
        "patch_embed.": "patch_embed.",
        "stages.*.*.F.norm1.": "layers.*.blocks.*.norm1.",
        "stages.*.*.F.attn.": "layers.*.blocks.*.attn.",
        "stages.*.*.G.0.": "layers.*.blocks.*.norm2.",
        "stages.*.*.G.1.": "layers.*.blocks.*.mlp.",
        "fusions.*.mlp.": "layers.*.lateral_fuse.fuse_fn.",
        "downsamples.*.": "layers.*.downsample.",
        "norm.": "norm.",
        "head.": "head.",
    },
    eps=1e-5,
    differs=_swin_differs,
)
_MINREV_MVIT = Format(
    *("minREV", "revlib.models.minrev_mvit(...)", (RevMViT,), "blocks.{}."),
    table={
        "patch_embed.": "patch_embed.",
        "F.norm.": "norm1.",
        "F.attn.": "attn.",
        "G.0.": "norm2.",
        "G.1.": "mlp.",
        "norm1.": "norm1.",  # of a transition
        "attn.": "attn.",
        "norm2.": "norm2.",
        "mlp.": "mlp.",
        "fc_norm.": "norm.",
        "head.fc.": "head.",
    },
    eps=1e-5,
    differs=_mvit_differs,
)
MINREV = (_MINREV_VIT, _MINREV_SWIN, _MINREV_MVIT)
SEPARATE = Format(
    *("PySlowFast", "RevViT, PublishedRevMViT or PublishedRevMViTVideo"),
    *((RevViT, PublishedRevMViT, PublishedRevMViTVideo), "rev_backbone.layers.{}."),
    table={
        "pos_embed": "pos_embed",
        "patch_embed.": "patch_embed.",
        "fusion.": "pre_q_fuse.fuse_fn.",
        "F.0.": "F.norm.",  # of RevViT
        "F.1.qkv.": "F.attn.q. F.attn.k. F.attn.v.",
        "F.1.proj.": "F.attn.proj.",
        "F.norm.": "F.norm.",  # of PublishedRevMViT
        "F.attn.qkv.": "F.attn.q. F.attn.k. F.attn.v.",
        "F.attn.": "F.attn.",
        "G.0.": "G.norm.",
        "G.1.": "G.mlp.",
        "project.": "res_proj.",  # of PublishedRevMViTVideo
        "norm.": "norm.",
        "fc_norm.": "norm.",
        "head.": "head.projection.",
    },
    eps=1e-6,
    in_time=True,
)
FUSED = SEPARATE._replace(
    table=SEPARATE.table | dict.fromkeys(("F.1.qkv.", "F.attn.qkv."), "F.attn.qkv.")
)
