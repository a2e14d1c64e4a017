"""Image files on their way to tensors, and what to do with those that cannot be read."""

import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch
import typer
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from research.data.augment import Moves, drawing_from

CorruptName = Literal["refuse", "skip"]

# Pillow raises each of them for some broken file.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error, zlib.error)
BROKEN += (Image.DecompressionBombError,)

Corrupt = Callable[[str, str], None]  # called with the path of a file that cannot be read, and why


class Refuse:
    """Ends the program at the first file that cannot be read, and names it."""

    def __init__(
        self,
        param_hint: str = "--data-dir",
        advice: str = " A training run that has begun goes on with --resume.",
    ) -> None:
        self.param_hint, self.advice = param_hint, advice

    def __call__(self, path: str, reason: str) -> NoReturn:
        raise typer.BadParameter(
            f"{path} is not an image that can be read ({reason}). Repair or remove it, or skip such files with "
            f"--corrupt skip.{self.advice}",
            param_hint=self.param_hint,
        )


class Skip:
    """Leaves files that cannot be read out, and names each of them once."""

    def __init__(self, say: Callable[[str], None] = lambda line: typer.echo(line, err=True)) -> None:
        self.say = say
        self.named: set[str] = set()

    def __call__(self, path: str, reason: str) -> None:
        if path not in self.named:
            self.named.add(path)
            self.say(f"skipped {path}: it is not an image that can be read ({reason})")


CORRUPT: dict[CorruptName, Callable[[], Corrupt]] = {"refuse": Refuse, "skip": Skip}


def fitting(side: int | None) -> v2.Transform:
    """An image to a uint8 tensor: resized until its shorter side is ``side``, the middle of the other cut out."""
    return v2.Compose([*([] if side is None else [v2.Resize(side), v2.CenterCrop(side)]), v2.PILToTensor()])


def opened(path: str, channels: int) -> Image.Image:
    """The image of a file, in colour or in grey."""
    with open(path, "rb") as file:
        image = Image.open(file)
        if image.mode == "P" and "transparency" in image.info:  # Pillow warns of the direct way, which is the same
            image = image.convert("RGBA")
        image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")


class Unreadable(NamedTuple):
    """Stands for an image that could not be read."""

    path: str
    reason: str


class Decoder(torch.utils.data.Dataset[tuple[Tensor, int] | Unreadable]):
    """Image files as tensors of side x side. An index is (the number of a file, a seed of its augmentation).

    Each image draws from a generator of its own seed, so that the numbers do not depend on which worker decodes it.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], side: int, channels: int = 3, moves: Moves | None = None
    ) -> None:
        self.samples, self.channels, self.moves, self.fit = samples, channels, moves, fitting(side)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        number, seed = key
        path, label = self.samples[number]
        try:
            image = self.fit(opened(path, self.channels))
        except BROKEN as error:
            return Unreadable(path, str(error) or type(error).__name__)
        if self.moves is not None:
            with drawing_from(torch.Generator().manual_seed(seed)):
                image = self.moves.one(image)
        return image, label


def together(items: Sequence[tuple[Tensor, int] | Unreadable]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """A batch of the images that could be read, their labels, and what could not be read."""
    read = [item for item in items if not isinstance(item, Unreadable)]
    broken = [item for item in items if isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, dtype=torch.uint8)
    return images, torch.tensor([label for _, label in read], dtype=torch.int64), broken


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and all images below the folders that are named, in the order of their names."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
            if not inside:
                raise typer.BadParameter(f"{path} holds no image; name another folder.", param_hint="IMAGES")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise typer.BadParameter(f"{path} does not exist; name image files, or folders.", param_hint="IMAGES")
    return found
