"""Images that stay on disk: decoded, brought to one size and augmented by worker processes while a network trains."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from research.data.augment import Moves
from research.data.decoding import Corrupt, Decoder, Refuse, together

CPU = torch.device("cpu")
MEASURED = 10_000  # images whose mean and deviation stand for those of all


@dataclasses.dataclass(frozen=True)
class Reading:
    """How images of one's own are read.

    Decoded images of more than ``above`` bytes stay on disk. ``workers`` processes decode them, or for 0 the training
    process itself; what comes out is the same for any number. ``corrupt`` is told of files that cannot be read.
    """

    above: float = float("inf")
    workers: int = 2
    corrupt: Corrupt = dataclasses.field(default_factory=Refuse)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """What Split is in memory, of files: ``chosen`` (int64, (N,)) are numbers of ``samples``, which are (path, label).

    Memory: the paths of all files, and a few batches for each worker. The number of images does not matter otherwise.
    """

    samples: Sequence[tuple[str, int]]
    chosen: Tensor
    side: int
    reading: Reading
    device: torch.device = CPU
    channels: int = 3

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def take(self, limit: int | None) -> "Streamed":
        """The same `limit` images on every call, drawn from all classes; all of them for None."""
        if limit is None or limit >= len(self):
            return self
        return self.part(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:limit])

    def part(self, chosen: Tensor) -> "Streamed":
        """The images at some indices, or where a mask is true."""
        return dataclasses.replace(self, chosen=self.chosen[chosen])

    def to(self, device: torch.device) -> "Streamed":
        return dataclasses.replace(self, device=device)

    def shuffled(self, size: int, draws: torch.Generator, moves: Moves) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in random order, moved about. -> uint8 images and labels of each batch."""
        order = torch.randperm(len(self), generator=draws)
        seeds = torch.randint(2**62, (len(self),), generator=draws)
        yield from self._batches(self.chosen[order], seeds, size, moves)

    def ordered(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as it is."""
        yield from self._batches(self.chosen, torch.zeros_like(self.chosen), size, None)

    def measured(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of values from 0 to 1, over some of the images: (C,) each."""
        few, size = self.take(MEASURED), 32
        count, sums, squares = 0, *torch.zeros(2, self.channels, dtype=torch.float64)
        total = -(-len(few) // size)
        for images, _ in tqdm(few.ordered(size), "measuring colours", total, leave=False, disable=None):
            values = images.cpu().double().div(255)
            count += len(values) * self.side**2
            sums, squares = sums + values.sum((0, 2, 3)), squares + values.square().sum((0, 2, 3))
        mean = sums / max(1, count)
        variance = (squares - count * mean.square()) / max(1, count - 1)
        return mean.float(), variance.clamp_min(0).sqrt().float()

    def _batches(
        self, numbers: Tensor, seeds: Tensor, size: int, moves: Moves | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            Decoder(self.samples, self.side, self.channels, moves),
            batch_sampler=Keys(numbers, seeds, size),
            num_workers=self.reading.workers,
            collate_fn=together,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from torch's global one, and change what dropout draws
        )
        for images, labels, broken in loader:
            for path, reason in broken:
                self.reading.corrupt(path, reason)
            if len(labels):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Batches of keys for a Decoder, made one at a time."""

    numbers: Tensor
    seeds: Tensor
    size: int

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for numbers, seeds in zip(self.numbers.split(self.size), self.seeds.split(self.size), strict=True):
            yield list(zip(numbers.tolist(), seeds.tolist(), strict=True))
