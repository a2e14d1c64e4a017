"""A data set in memory, as two uint8 tensors, so that the loader is never the bottleneck; and what a data set is."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from research.data.augment import Moves


class Images(Protocol):
    """Images and their labels, wherever they lie: what Split and Streamed have in common."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...
    def take(self, limit: int | None) -> "Images": ...
    def part(self, chosen: Tensor) -> "Images": ...
    def to(self, device: torch.device) -> "Images": ...
    def shuffled(self, size: int, draws: torch.Generator, moves: Moves) -> Iterator[tuple[Tensor, Tensor]]: ...
    def ordered(self, size: int) -> Iterator[tuple[Tensor, Tensor]]: ...
    def measured(self) -> tuple[Tensor, Tensor]: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """Images in memory, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (C, H, W)."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.images.device

    def take(self, limit: int | None) -> "Split":
        """The same `limit` images on every call, drawn from all classes; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:limit]
        return self.part(chosen)

    def part(self, chosen: Tensor) -> "Split":
        """The images at some indices, or where a mask is true."""
        return Split(self.images[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def shuffled(self, size: int, draws: torch.Generator, moves: Moves) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in random order, moved about, a whole epoch at once. -> uint8 images and labels of each
        batch."""
        order = torch.randperm(len(self), generator=draws).to(self.labels.device)
        images = moves.all(self.images[order], draws)
        yield from zip(images.split(size), self.labels[order].split(size), strict=True)

    def ordered(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as it is."""
        yield from zip(self.images.split(size), self.labels.split(size), strict=True)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all images, of values from 0 to 1: (C,) each."""
        channels = [channel.float() / 255 for channel in self.images.transpose(0, 1)]
        return tuple(torch.stack([f(channel) for channel in channels]) for f in (torch.mean, torch.std))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, and how its training images may be moved about: crop_padding pixels, mirrored or not.

    ``origin`` says how it was split into training and test images. ``held_out`` names the test images where that was
    decided here: by their paths below the folder that was given.
    """

    train: Images
    test: Images
    classes: list[str]
    crop_padding: int
    flip: bool
    origin: str = "as published"
    held_out: list[str] = dataclasses.field(default_factory=list)

    def prepare(self, limit_train: int | None, limit_test: int | None, device: torch.device) -> "Dataset":
        """The data set cut to the limits, on `device`."""
        train, test = self.train.take(limit_train).to(device), self.test.take(limit_test).to(device)
        return dataclasses.replace(self, train=train, test=test)
