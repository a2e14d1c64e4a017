"""What timm expects of a model, told once for all models that are reversible sequences around ordinary layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from revlib._numbers import real, whole
from revlib.models.tracing import NotScripted, Tap, joined
from revlib.schedulers import Naive, Reversible, Scheduler
from revlib.sequence import ReversibleSequence

__all__ = ["Groups", "Layer", "Scheduled", "TimmModel", "check_numbers", "placed"]

Layer = str | Callable[..., nn.Module]  # a class, or what timm calls it
# Patterns of the names of parameters, by groups of layers; a tuple is the number of a layer.
Groups = dict[str, str | list[tuple[str, tuple[int, ...] | None]]]
FORMATS = {
    "NCHW": "b h w c -> b c h w",
    "NHWC": "b h w c -> b h w c",
    "NLC": "b h w c -> b (h w) c",
}


class Scheduled(NotScripted):
    """A model with one scheduler for all of its reversible sequences."""

    _arguments: dict[str, Any]

    @property
    def sequences(self) -> list[ReversibleSequence]:
        """The reversible sequences of the model, in the order of its modules."""
        return [module for module in self.modules() if isinstance(module, ReversibleSequence)]

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of every sequence. All of them share the bytes of a ``Budget``."""
        return self.sequences[0].scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        for sequence in self.sequences:
            sequence.scheduler = scheduler

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """``Reversible()`` everywhere, or ``Naive()``, which keeps every activation."""
        self.scheduler = Reversible() if enable else Naive()

    def extra_repr(self) -> str:
        """The scheduler, as ``print(model)`` shows it above the layers."""
        return ", ".join(f"scheduler={sequence.scheduler}" for sequence in self.sequences[:1])

    @property
    def _model_args(self) -> dict[str, Any]:
        """The arguments with which timm builds the model again from a file. How it was trained is not among them."""
        return self._arguments

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        self._arguments = {name: value for name, value in arguments.items() if name != "scheduler"}


class TimmModel(Scheduled):
    """An image classifier with timm's methods: patches, levels of reversible blocks, norm, pooling, dropout, linear.

    A level is what ``features_only=True`` can tap, an entry of ``feature_info``: a block of RevViT, a stage of RevSwin.
    Its feature map is the concatenation of both streams, which is also what the head sees of the last one. Hooks get it
    from ``taps.0``, ``taps.1`` and so on, modules that run only while they have hooks.

    A model sets ``patch_embed``, ``norm``, ``fc_norm``, ``head_drop``, ``head`` and the numbers below, calls
    ``make_taps``, and defines ``streams`` and ``keep``.

    Source of the conventions: Wightman, *PyTorch Image Models*; ``timm.models.VisionTransformer`` has each of them.
    """

    patch_embed: Any
    taps: Any
    norm: nn.Module
    fc_norm: nn.Module  # after pooling
    head_drop: nn.Module
    head: nn.Module
    feature_info: list[dict[str, Any]]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str
    num_prefix_tokens = 0

    def streams(self, images: Tensor, stops: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """Both streams after as many levels as each stop says, in rising order."""
        raise NotImplementedError

    def keep(self, levels: int) -> None:
        """Drop all blocks after the first ``levels`` levels."""
        raise NotImplementedError

    def make_taps(self, channels: Sequence[int], reductions: Sequence[int]) -> None:
        """Make a tap after each level, of so many channels, whose map has a patch for every so many pixels."""
        self.taps = nn.ModuleList(Tap() for _ in channels)
        self.feature_info = [
            {"module": f"taps.{i}", "num_chs": channels[i], "reduction": reductions[i]}
            for i in range(len(channels))
        ]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, patches, num_features), normalised; patches are one dimension, or rows and columns."""
        last = len(self.taps)
        heard = [stop for stop in range(1, last + 1) if self.taps[stop - 1].heard]
        stops = heard if last in heard else [*heard, last]
        for stop, streams in zip(stops, self.streams(images, stops), strict=True):
            x = self.taps[stop - 1](streams[0], streams[1]) if stop in heard else joined(streams)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What ``forward_features`` returns to (B, num_classes), or to the pooled features before the classifier."""
        if self.global_pool:
            # The mean over patches, without einops, which cannot read the shapes in a symbolic trace.
            x = x.flatten(1, -2).mean(1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes), or to features where there is no classifier."""
        return self.forward_head(self.forward_features(images))

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, images: Tensor) -> Tensor: ...

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
            raise ValueError(
                f"output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}; choose one of them"
            )
        taken, last = feature_take_indices(len(self.taps), indices)
        end = last + 1 if stop_early else len(self.taps)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        stops, found = sorted({end, *(index + 1 for index in taken)}), []
        for stop, streams in zip(stops, self.streams(x, stops), strict=True):
            x = joined(streams)
            fits = x.shape[-1] == self.num_features
            if stop - 1 in taken:
                tap = self.norm(x) if norm and fits else x
                tap = tap.unflatten(1, grid) if tap.ndim == 3 else tap
                found.append(rearrange(tap, FORMATS[output_fmt]).contiguous())
        return found if intermediates_only else (self.norm(x) if fits else x, found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """The feature maps after the last n levels, or after those listed, as (B, patches, channels).

        With ``reshape`` as (B, channels, rows, columns). There are no prefix tokens to return, as in timm's models
        without a class token. Source: the interface of DINO.
        """
        fmt = "NCHW" if reshape else "NLC"
        maps: Any = self.forward_intermediates(
            x, n, norm=norm, output_fmt=fmt, intermediates_only=True
        )
        return maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the feature maps at ``indices`` do not need; returns these, counted from the first level."""
        taken, last = feature_take_indices(len(self.taps), indices)
        shorter = last + 1 < len(self.taps)
        del self.feature_info[last + 1 :]
        self.taps = self.taps[: last + 1]
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
        """Set the pooling, and make a last layer, without initialising it."""
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
        self.head.apply(init_weights_vit_timm).to(self.patch_embed.proj.weight).train(self.training)


def placed(device: torch.device | str | None) -> contextlib.AbstractContextManager[object]:
    """A context in which layers are made on a device; None leaves the choice to the context around it."""
    return contextlib.nullcontext() if device is None else torch.device(device)


# The arguments of models that are sizes, and count from 1.
SIZES = {"img_size", "clip_size", "patch_size", "window_size", "in_chans", "embed_dim", "depth"}
SIZES |= {"depths", "num_heads", "kv_stride"}


def check_numbers(arguments: Mapping[str, Any], *, per_stage: Sequence[str] = ()) -> None:
    """Check the numbers among the arguments of a model, which are known by their names.

    A ``_rate`` is a number from 0 to 1, and a ``_ratio`` a finite one from 0 up. ``num_classes`` is a whole number from
    0 up, and ``SIZES`` are whole numbers from 1 up. A ``_size`` may be a list of them, and what is given ``per_stage``
    must be one.

    Raises: ValueError for the first that is none.
    """
    for name, value in arguments.items():
        if name in per_stage and not (_is_list(value) and len(value)):
            raise ValueError(
                f"{name} takes a list with a whole number for each stage, got {value!r}; (2, 2) is two stages"
            )
        if name in per_stage or (name.endswith("_size") and _is_list(value)):
            for i, number in enumerate(value):
                whole(f"{name}[{i}]", number, 1, advice=f"; {name} is {tuple(value)}")
        elif name in SIZES:
            whole(name, value, 1)
        elif name == "num_classes":
            whole(name, value, 0, advice="; 0 leaves out the classifier")
        elif name.endswith("_rate"):
            real(name, value, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        elif name.endswith("_ratio"):
            real(name, value, lambda x: 0 <= x < math.inf, "a finite number from 0 up")


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and hasattr(value, "__len__") and not isinstance(value, str)
