"""Batches of a data set in memory: shuffled, augmented a whole epoch at once, normalised, mixed.

Drawn batch by batch, each copy of the numbers to the device would make the host wait.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from research.data.augment import Mix, drawing_from, rand_augment, random_crop, random_flip
from research.data.split import Dataset, Split

StatisticsName = Literal["measured", "minrev"]

# In minREV's main.py. Its deviations are means over single images; those over all pixels are near 0.247.
MINREV_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64 or parts of classes (B, classes) float32


class Batches:
    """Training and test batches of `data`. All draws come from the generator given."""

    def __init__(
        self,
        data: Dataset,
        size: int,
        quiet: bool = False,
        magnitude: int = 0,
        mix: Mix | None = None,
        statistics: StatisticsName = "measured",
    ) -> None:
        self.data, self.size, self.normalize = data, size, normalizer(data.train, statistics)
        self.magnitude, self.mix = magnitude, mix
        self.quiet = quiet or None  # None: only on a terminal

    def train(self, draws: torch.Generator, label: str) -> Iterator[Batch]:
        """Every training image once, in random order, moved about as the data set allows."""
        split = self.data.train
        order = torch.randperm(len(split), generator=draws).to(split.labels.device)
        images = random_crop(split.images[order], self.data.crop_padding, draws)
        if self.data.flip:
            images = random_flip(images, draws)
        if self.magnitude:
            images = rand_augment(images, self.magnitude, draws)
        for some, theirs in self._cut(images, split.labels[order], self.size, label):
            if self.mix is None:
                yield some, theirs
            else:
                with drawing_from(draws):
                    mixed = self.mix(some, theirs)
                yield mixed

    def test(self, label: str) -> Iterator[Batch]:
        """Every test image once, as it is."""
        yield from self._cut(self.data.test.images, self.data.test.labels, 2 * self.size, label)  # backward needs more

    def _cut(self, images: Tensor, labels: Tensor, size: int, label: str) -> Iterator[Batch]:
        pairs = list(zip(images.split(size), labels.split(size), strict=True))
        for some, theirs in tqdm(pairs, desc=label, leave=False, disable=self.quiet):
            yield self.normalize(some), theirs


def normalizer(train: Split, statistics: StatisticsName = "measured") -> Callable[[Tensor], Tensor]:
    """uint8 -> float32, minus a mean and over a standard deviation per channel: those of the training images, or
    minREV's."""
    # Tensors on the device, where torchvision's Normalize would copy a list there with each batch.
    if statistics == "minrev":
        mean, std = train.images.new_tensor(MINREV_STATISTICS, dtype=torch.float32).view(2, -1, 1, 1)
        if train.images.shape[1] != len(mean):
            raise typer.BadParameter(
                f"minrev is for images of 3 channels, these have {train.images.shape[1]}; drop it.",
                param_hint="--statistics",
            )
    else:
        channels = [channel.float() / 255 for channel in train.images.transpose(0, 1)]
        mean = torch.stack([channel.mean() for channel in channels]).view(-1, 1, 1)
        std = torch.stack([channel.std() for channel in channels]).view(-1, 1, 1).clamp_min(1 / 255)  # blank channels

    def normalize(images: Tensor) -> Tensor:
        return (images.float() * (1 / 255) - mean) / std

    return normalize
