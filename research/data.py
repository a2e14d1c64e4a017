"""Data sets as two uint8 tensors in memory, so that the loader is never the bottleneck."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2
from tqdm import tqdm

from research.config import DatasetName
from research.files import replacing

FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist


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


Reader = Callable[[Path | None, Path], Dataset]


def digits(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8: always the same fifth of each class is the test set.

    Not cropped: they fill their frame, so a crop loses strokes (20 epochs: 94 %, uncropped 96 %).
    """
    if data_dir is not None:
        _reject(f"digits comes with scikit-learn, got {data_dir}; leave it out, or choose another --dataset.")
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15).to(torch.uint8).unsqueeze(1)  # levels 0..16 -> 0..240
    labels = torch.from_numpy(bunch.target).long()
    order = torch.arange(len(labels))
    train, test = train_test_split(order, test_size=0.2, random_state=0, stratify=labels)
    names = [str(name) for name in bunch.target_names]
    return Dataset(Split(images[train], labels[train]), Split(images[test], labels[test]), names, 0, False)


def cifar10(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """CIFAR-10, 32x32 in colour: an image tree, torchvision's own files, or a download into cache_dir."""
    if data_dir is None or (data_dir / datasets.CIFAR10.base_folder).is_dir():
        both = [_torchvision(datasets.CIFAR10, data_dir, cache_dir, train) for train in (True, False)]
        train, test = (
            Split(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)) for d in both
        )
        return Dataset(train, test, both[0].classes, 4, True)
    if not ((data_dir / "train").is_dir() and (data_dir / "test").is_dir()):
        _reject(
            f"expected {data_dir}/train/CLASS/*.jpg and {data_dir}/test/CLASS/*.jpg, or "
            f"{data_dir}/{datasets.CIFAR10.base_folder}; found {_contents(data_dir)}. "
            "Point it at such a folder, or leave it out to download CIFAR-10."
        )
    train, train_names = read_tree(data_dir / "train", cache_dir)
    test, names = read_tree(data_dir / "test", cache_dir)
    if names != train_names:
        _reject(f"{data_dir}/train has the classes {train_names}, {data_dir}/test {names}; they must agree.")
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = [tuple(s.images.shape[1:]) for s in (train, test)]
        _reject(f"training images are {sizes[0]}, test images {sizes[1]}; bring them to one size.")
    return Dataset(train, test, names, 4, True)


def fashion_mnist(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """Fashion-MNIST, 28x28 grey: the idx files (plain or .gz) of data_dir, of Debian, or a download."""
    names = datasets.FashionMNIST.classes
    if data_dir is None and FASHION_DEBIAN.is_dir():
        data_dir = FASHION_DEBIAN
    if data_dir is None:
        both = [_torchvision(datasets.FashionMNIST, None, cache_dir, train) for train in (True, False)]
        train, test = (Split(d.data.unsqueeze(1), d.targets) for d in both)
    else:
        train, test = (read_idx(data_dir, prefix) for prefix in ("train", "t10k"))
    return Dataset(train, test, names, 4, True)


DATASETS: dict[DatasetName, Reader] = {"digits": digits, "cifar10": cifar10, "fashion-mnist": fashion_mnist}


def read_tree(root: Path, cache_dir: Path) -> tuple[Split, list[str]]:
    """Decode root/CLASS/*.jpg (all of one size) once; later calls read the tensor kept in cache_dir."""
    try:
        tree = datasets.ImageFolder(str(root), transform=v2.PILToTensor())
    except FileNotFoundError as error:
        _reject(f"expected {root}/CLASS/*.jpg, but: {error}")
    cached = cache_dir.expanduser() / f"{root.parent.name}-{root.name}-{_fingerprint(root, tree.samples)}.pt"
    if cached.exists():
        return Split(**torch.load(cached, weights_only=True)), tree.classes
    images = torch.empty(len(tree), *tree[0][0].shape, dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(tree.samples, desc=f"decoding {root}", disable=None)):
        try:
            image = tree[i][0]
        except OSError as error:
            _reject(f"{path} is not an image that can be read ({error}); repair or remove it.")
        if image.shape != images.shape[1:]:
            _reject(f"{path} is {tuple(image.shape)}, others {tuple(images.shape[1:])}; use one size.")
        images[i] = image
    split = Split(images, torch.tensor(tree.targets))
    with replacing(cached) as temporary:
        torch.save({"images": split.images, "labels": split.labels}, temporary)
    typer.echo(f"decoded {len(split):,} images of {root}, kept in {cached}")
    return split, tree.classes


def read_idx(data_dir: Path, prefix: str) -> Split:
    """The images and labels of one split from data_dir, or from data_dir/FashionMNIST/raw."""
    folders = [data_dir, data_dir / "FashionMNIST" / "raw"]
    with tempfile.TemporaryDirectory() as scratch:

        def plain(kind: str) -> str:
            name = f"{prefix}-{kind}-ubyte"
            for folder in folders:
                if (folder / name).is_file():
                    return str(folder / name)
                if (folder / f"{name}.gz").is_file():
                    return str(extract_archive(folder / f"{name}.gz", scratch))
            _reject(
                f"expected {name} or {name}.gz in {data_dir} or {folders[1]}; found {_contents(data_dir)}. "
                "Point it at the folder of the four idx files, or leave it out to download them."
            )

        image_file, label_file = plain("images-idx3"), plain("labels-idx1")
        try:
            images, labels = read_image_file(image_file).unsqueeze(1), read_label_file(label_file)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            _reject(f"the {prefix} files in {data_dir} are not idx files ({error!r}); fetch them again.")
    if len(images) != len(labels):
        _reject(f"{data_dir} has {len(images)} {prefix} images but {len(labels)} labels; fetch them again.")
    return Split(images, labels)


def _torchvision(kind: type, data_dir: Path | None, cache_dir: Path, train: bool):  # type: ignore[no-untyped-def]
    """One split as torchvision reads it, downloaded into cache_dir if no data_dir is named."""
    root = (data_dir or cache_dir).expanduser()
    try:
        return kind(str(root), train=train, download=data_dir is None)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        _reject(
            f"{kind.__name__} could not be {'downloaded to' if data_dir is None else 'read from'} {root}: "
            f"{error}. Fetch it on a machine with a network and name its folder here."
        )


def _fingerprint(root: Path, samples: list[tuple[str, int]]) -> str:
    """Changes whenever an image below root is added, removed, renamed or rewritten."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for path, _ in samples:
        stat = Path(path).stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5] + ["..."] * (len(names) > 5)) or "an empty folder"


def _reject(message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint="--data-dir")
