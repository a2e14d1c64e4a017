"""Batches of a data set in memory: shuffled, augmented a whole batch at once, normalised.

torchvision's RandomCrop and RandomHorizontalFlip draw once per call, so they would move a batch as one image.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from research.data import Dataset, Split

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, labels (B,) int64


class Batches:
    """Training and test batches of `data`. All draws come from the generator given."""

    def __init__(self, data: Dataset, size: int) -> None:
        self.data, self.size, self.normalize = data, size, normalizer(data.train)

    def train(self, draws: torch.Generator, label: str) -> Iterator[Batch]:
        """Every training image once, in random order, moved about as the data set allows."""
        split = self.data.train
        order = torch.randperm(len(split), generator=draws).to(split.labels.device)
        for chosen in _progress(order.split(self.size), label):
            images = random_crop(split.images[chosen], self.data.crop_padding, draws)
            if self.data.flip:
                images = random_flip(images, draws)
            yield self.normalize(images), split.labels[chosen]

    def test(self, label: str) -> Iterator[Batch]:
        """Every test image once, as it is."""
        split = self.data.test
        pairs = zip(split.images.split(self.size), split.labels.split(self.size), strict=True)
        for images, labels in _progress(list(pairs), label):
            yield self.normalize(images), labels


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


def normalizer(train: Split) -> v2.Compose:
    """uint8 -> float32 with mean 0 and standard deviation 1 per channel over the training images."""
    channels = [channel.float() / 255 for channel in train.images.transpose(0, 1)]
    mean = [channel.mean().item() for channel in channels]
    std = [max(channel.std().item(), 1 / 255) for channel in channels]  # blank channels stay finite
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _progress(batches, label: str):  # type: ignore[no-untyped-def]
    return tqdm(batches, desc=label, leave=False, disable=None)  # None: only on a terminal
