"""What a network is trained on: read by the flags of a run, and told in its log and checkpoint."""

import dataclasses
from typing import Any

import torch

from research.data.batches import Normalizer
from research.data.decoding import CORRUPT
from research.data.readers import DATASETS, folder
from research.data.split import Dataset
from research.data.streamed import Reading, Streamed
from research.settings.config import Config


def read(config: Config) -> Dataset:
    """The data set that a run trains on."""
    if config.dataset == "folder":
        reading = Reading(config.stream_above * 1e9, config.workers, CORRUPT[config.corrupt]())
        return folder(config.data_dir, config.cache_dir, config.image_size, reading)
    return DATASETS[config.dataset](config.data_dir, config.cache_dir)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What went into a network, and what comes out of it: all that a prediction needs beside the weights.

    ``mean`` and ``std`` are per channel, of values from 0 to 1. ``held_out`` names the test images, if the program
    chose them. ``streamed``: they were read from disk while it trained.
    """

    classes: list[str]
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    train: int
    test: int
    split: str
    held_out: list[str]
    streamed: bool

    @classmethod
    def of(cls, data: Dataset, normalize: Normalizer) -> "Inputs":
        channels, side, _ = data.train.shape
        mean, std = normalize.mean.flatten().tolist(), normalize.std.flatten().tolist()
        counts = len(data.train), len(data.test)
        streamed = isinstance(data.train, Streamed)
        return cls(data.classes, channels, side, mean, std, *counts, data.origin, data.held_out, streamed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (C, H, W)."""
        return self.channels, self.image_size, self.image_size

    def normalizer(self, device: torch.device) -> Normalizer:
        return Normalizer.of(self.mean, self.std, device)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
