"""What tests of the research scripts share."""

from pathlib import Path

import torch

from research.data.split import Dataset, Split
from research.training.log import Log, Row, read_log

# Flags that turn on all that has a state, or draws numbers.
EVERYTHING = (
    "--rand-augment 9 --mixup 0.8 --cutmix 1 --label-smoothing 0.1 --optimizer adamw --weight-decay 0.05 "
    "--clip-grad 1 --ema 0.9"
).split()


def small(shape: tuple[int, int, int]) -> Dataset:
    """Four images of this shape, of ten classes."""
    split = Split(torch.randint(256, (4, *shape), dtype=torch.uint8), torch.arange(4))
    return Dataset(split, split, [str(i) for i in range(10)], 4, True)


def read(folder: Path) -> Log:
    return read_log(folder / "log.jsonl")


def rows(losses: list[float]) -> list[Row]:
    """Epochs of these training losses, and of twice as high test losses."""
    shared = {"test_accuracy": 0.5, "lr": 0.1, "seconds": 1.0}
    return [
        Row(epoch=t, train_loss=x, test_loss=2 * x, train_accuracy=1 - x, **shared)
        for t, x in enumerate(losses, start=1)
    ]
