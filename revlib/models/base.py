"""What timm expects of a model, told once for all models that are reversible sequences around ordinary layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from revlib.schedulers import Naive, Reversible, Scheduler
from revlib.sequence import ReversibleSequence

__all__ = ["Scheduled", "TimmModel"]

FORMATS = {"NCHW": "b h w c -> b c h w", "NHWC": "b h w c -> b h w c", "NLC": "b h w c -> b (h w) c"}


class Scheduled(nn.Module):
    """A model with one scheduler for all of its reversible sequences."""

    @property
    def sequences(self) -> list[ReversibleSequence]:
        """All that the scheduler is of."""
        return [module for module in self.modules() if isinstance(module, ReversibleSequence)]

    @property
    def scheduler(self) -> Scheduler:
        """That of every sequence; they share the bytes of a ``Budget``."""
        return self.sequences[0].scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        for sequence in self.sequences:
            sequence.scheduler = scheduler

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """``Reversible()`` everywhere, or ``Naive()``, which keeps every activation."""
        self.scheduler = Reversible() if enable else Naive()


class TimmModel(Scheduled):
    """An image classifier with timm's methods: patches, levels of reversible blocks, norm, pooling, linear.

    A level is what ``features_only=True`` can tap, an entry of ``feature_info``: a block of RevViT, a stage of RevSwin.
    Its feature map is the concatenation of both streams, which is also what the head sees of the last one.

    A model sets ``patch_embed``, ``norm``, ``fc_norm``, ``head``, ``feature_info`` and the numbers below, and defines
    ``streams`` and ``keep``.

    Source of the conventions: Wightman, *PyTorch Image Models*; ``timm.models.VisionTransformer`` has each of them.
    """

    patch_embed: Any
    norm: nn.Module
    fc_norm: nn.Module  # after pooling
    head: nn.Module
    feature_info: list[dict[str, Any]]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str

    def streams(self, images: Tensor, stops: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """Both streams after as many levels as each stop says, in rising order."""
        raise NotImplementedError

    def keep(self, levels: int) -> None:
        """Drop all blocks after the first ``levels`` levels."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, patches, num_features), normalised; patches are one dimension, or rows and columns."""
        (streams,) = self.streams(images, [len(self.feature_info)])
        return self.norm(torch.cat(streams, dim=-1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` returns to (B, num_classes), or to the pooled features before the classifier."""
        if self.global_pool:
            x = reduce(x, "batch ... features -> batch features", "mean")
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps after some levels, as timm's models give them, and what ``forward_features`` returns.

        Args:
            x: images. indices: of levels; a number n for the last n, None for all.
            norm: normalise them, where they are as wide as the last one. stop_early: leave out levels that nothing
                taken needs, and return the last taken in place of the final features.
            output_fmt: "NCHW", "NHWC" or "NLC". intermediates_only: return the list alone.

        Activations are recovered between taps as in a whole pass; each tap keeps its own two streams for backward.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}; choose one of them")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        end = last + 1 if stop_early else len(self.feature_info)
        stops, found = sorted({end, *(index + 1 for index in taken)}), []
        for stop, streams in zip(stops, self.streams(x, stops), strict=True):
            x = torch.cat(streams, dim=-1)
            fits = x.shape[-1] == self.num_features
            if stop - 1 in taken:
                tap = self.norm(x) if norm and fits else x
                tap = tap.unflatten(1, self.patch_embed.grid_size) if tap.ndim == 3 else tap
                found.append(rearrange(tap, FORMATS[output_fmt]).contiguous())
        return found if intermediates_only else (self.norm(x) if fits else x, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the feature maps at ``indices`` do not need; returns these, counted from the first level."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        shorter = last + 1 < len(self.feature_info)
        del self.feature_info[last + 1 :]
        self.keep(last + 1)
        if prune_norm or shorter:
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def make_head(self, num_classes: int, global_pool: str) -> None:
        """Pooling and a last layer, before its initialisation."""
        if global_pool not in ("avg", ""):
            raise ValueError(
                f"global_pool must be 'avg' (mean over patches) or '' (none), got {global_pool!r}; there is no class "
                "token to take instead"
            )
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for another number of classes, on the device and in the dtype of the model."""
        self.make_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.head.apply(init_weights_vit_timm).to(self.patch_embed.proj.weight)
