"""Augmentation of images on their device, by torchvision's transforms where these can be told apart by image.

torchvision draws once per call. Moving each image its own way takes one gather for a whole epoch (`random_crop`,
`random_flip`). RandAugment has no such form, and a call per image, or per few images of a batch, would launch more
kernels than the training step does. So an epoch draws `POLICIES` pairs of operations, and images POLICIES places apart
share one: within a batch every image has its own, for ten kernels or so per pair and epoch. mixup and cutmix draw once
per batch, as they do everywhere.

All numbers are drawn on the CPU, the same for every device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

POLICIES = 512

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images, labels -> images, parts of classes (B, classes)


@contextmanager
def drawing_from(draws: torch.Generator) -> Iterator[None]:
    """Inside the block, torch's global random numbers on the CPU, which torchvision takes, are those of `draws`."""
    outside = torch.get_rng_state()
    torch.set_rng_state(draws.get_state())
    try:
        yield
    finally:
        draws.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


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


def rand_augment(images: Tensor, magnitude: int, draws: torch.Generator) -> Tensor:
    """Two random operations per image, of the given magnitude in 0..30. uint8 (N, C, H, W) -> (N, C, H, W)."""
    augmented, transform = torch.empty_like(images), v2.RandAugment(magnitude=magnitude)
    with drawing_from(draws):
        for i in range(min(POLICIES, len(images))):
            augmented[i::POLICIES] = transform(images[i::POLICIES])
    return augmented


@dataclass(frozen=True)
class Moves:
    """How training images are moved about: shifted by up to ``padding`` pixels, mirrored, and changed by RandAugment of
    the given magnitude, unless that is 0."""

    padding: int
    flip: bool
    magnitude: int = 0

    def all(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """A whole epoch at once. uint8 (N, C, H, W) -> (N, C, H, W)."""
        images = random_crop(images, self.padding, draws)
        if self.flip:
            images = random_flip(images, draws)
        return rand_augment(images, self.magnitude, draws) if self.magnitude else images

    def one(self, image: Tensor) -> Tensor:
        """A single image, by torch's global numbers. uint8 (C, H, W) -> (C, H, W)."""
        image = v2.RandomCrop(list(image.shape[1:]), padding=self.padding)(image)
        if self.flip:
            image = v2.RandomHorizontalFlip()(image)
        return v2.RandAugment(magnitude=self.magnitude)(image) if self.magnitude else image


def mixer(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """Makes mixup or cutmix of a batch, with these alphas: one of them at random if neither is 0."""
    both = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    chosen = [kind(alpha=alpha, num_classes=classes) for kind, alpha in both if alpha]
    return v2.RandomChoice(chosen) if chosen else None
