"""Batches of a data set in memory: shuffled, augmented a whole epoch at once, normalised.

torchvision's RandomCrop and RandomHorizontalFlip draw once per call, so they would move an epoch as one image. Numbers
are drawn on the CPU, the same for every device; drawn batch by batch, each copy of them would make the host wait.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from research.data import Dataset, Split

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64


class Batches:
    """Training and test batches of `data`. All draws come from the generator given."""

    def __init__(self, data: Dataset, size: int, quiet: bool = False) -> None:
        self.data, self.size, self.normalize = data, size, normalizer(data.train)
        self.quiet = quiet or None  # None: only on a terminal

    def train(self, draws: torch.Generator, label: str) -> Iterator[Batch]:
        """Every training image once, in random order, moved about as the data set allows."""
        split = self.data.train
        order = torch.randperm(len(split), generator=draws).to(split.labels.device)
        images = random_crop(split.images[order], self.data.crop_padding, draws)
        if self.data.flip:
            images = random_flip(images, draws)
        yield from self._cut(images, split.labels[order], self.size, label)

    def test(self, label: str) -> Iterator[Batch]:
        """Every test image once, as it is."""
        yield from self._cut(self.data.test.images, self.data.test.labels, 2 * self.size, label)  # backward needs more

    def _cut(self, images: Tensor, labels: Tensor, size: int, label: str) -> Iterator[Batch]:
        pairs = list(zip(images.split(size), labels.split(size), strict=True))
        for some, theirs in tqdm(pairs, desc=label, leave=False, disable=self.quiet):
            yield self.normalize(some), theirs


def random_crop(images: Tensor, padding: int, draws: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels each way; black comes in. (N, C, H, W) -> (N, C, H, W)."""
    n, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n), generator=draws).to(images.device)
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, top, left, H, W)
    return windows[torch.arange(n, device=images.device), :, top, left]


def random_flip(images: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. (N, C, H, W) -> (N, C, H, W)."""
    mirrored = torch.randint(2, (len(images), 1, 1, 1), generator=draws).bool().to(images.device)
    return torch.where(mirrored, images.flip(-1), images)


def normalizer(train: Split) -> Callable[[Tensor], Tensor]:
    """uint8 -> float32 with mean 0 and standard deviation 1 per channel over the training images."""
    channels = [channel.float() / 255 for channel in train.images.transpose(0, 1)]
    # Tensors on the device, where torchvision's Normalize would copy a list there with each batch.
    mean = torch.stack([channel.mean() for channel in channels]).view(-1, 1, 1)
    std = torch.stack([channel.std() for channel in channels]).view(-1, 1, 1).clamp_min(1 / 255)  # blank channels

    def normalize(images: Tensor) -> Tensor:
        return (images.float() * (1 / 255) - mean) / std

    return normalize
