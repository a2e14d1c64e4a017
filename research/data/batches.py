"""Batches of a data set in memory: shuffled, augmented a whole epoch at once, normalised, mixed.

What is drawn for images in memory is drawn for a whole epoch at once: batch by batch, each copy of the numbers to the
device would make the host wait.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from research.data.augment import Mix, Moves, drawing_from
from research.data.split import Dataset, Images

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
        self.moves, self.mix = Moves(data.crop_padding, data.flip, magnitude), mix
        self.quiet = quiet or None  # None makes tqdm quiet unless it writes to a terminal

    def train(self, draws: torch.Generator, label: str) -> Iterator[Batch]:
        """Every training image once, in random order, moved about as the data set allows."""
        train = self.data.train
        for images, labels in self._shown(train.shuffled(self.size, draws, self.moves), len(train), self.size, label):
            if self.mix is None:
                yield images, labels
            else:
                with drawing_from(draws):
                    mixed = self.mix(images, labels)
                yield mixed

    def test(self, label: str) -> Iterator[Batch]:
        """Every test image once, as it is."""
        test, size = self.data.test, 2 * self.size  # without a backward, twice as many fit
        yield from self._shown(test.ordered(size), len(test), size, label)

    def _shown(self, pairs: Iterator[tuple[Tensor, Tensor]], count: int, size: int, label: str) -> Iterator[Batch]:
        total = -(-count // size)
        for images, labels in tqdm(pairs, desc=label, total=total, leave=False, disable=self.quiet):
            yield self.normalize(images), labels


@dataclass(frozen=True)
class Normalizer:
    """uint8 -> float32, minus a mean and over a standard deviation per channel, both of values from 0 to 1."""

    # They are tensors on the device. torchvision's Normalize would copy a list there with each batch.
    mean: Tensor  # (C, 1, 1), as std
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() * (1 / 255) - self.mean) / self.std

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], device: torch.device | None = None) -> "Normalizer":
        """A normalizer of these means and deviations, a number for each channel."""
        both = torch.tensor([list(mean), list(std)], dtype=torch.float32, device=device)
        return cls(*both.view(2, -1, 1, 1))


def normalizer(train: Images, statistics: StatisticsName = "measured") -> Normalizer:
    """A normalizer by the mean and standard deviation of the training images, or by minREV's."""
    if statistics == "minrev":
        if train.shape[0] != len(MINREV_STATISTICS[0]):
            raise typer.BadParameter(
                f"minrev is for images of 3 channels, these have {train.shape[0]}; drop it.",
                param_hint="--statistics",
            )
        return Normalizer.of(*MINREV_STATISTICS, train.device)
    mean, std = train.measured()
    device = train.device
    # Of a channel that is blank, the deviation is 0.
    return Normalizer(mean.view(-1, 1, 1).to(device), std.view(-1, 1, 1).clamp_min(1 / 255).to(device))
