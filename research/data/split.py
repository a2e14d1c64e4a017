"""A data set as two uint8 tensors in memory, so that the loader is never the bottleneck."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, limit: int | None) -> "Split":
        """The same `limit` images on every call, drawn from all classes; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:limit]
        return Split(self.images[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, and how its training images may be moved about: crop_padding pixels, mirrored or not."""

    train: Split
    test: Split
    classes: list[str]
    crop_padding: int
    flip: bool

    def prepare(self, limit_train: int | None, limit_test: int | None, device: torch.device) -> "Dataset":
        """The data set cut to the limits, on `device`."""
        train, test = self.train.take(limit_train).to(device), self.test.take(limit_test).to(device)
        return dataclasses.replace(self, train=train, test=test)
