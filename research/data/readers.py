"""The data sets that a run can train on, each read by a function."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive

from research.data.folders import contents, find_classes, folder, in_memory, reject
from research.data.split import Dataset, Split

DatasetName = Literal["digits", "cifar10", "fashion-mnist", "folder"]

FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist


Reader = Callable[[Path | None, Path], Dataset]


def digits(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8: always the same fifth of each class is the test set.

    Not cropped: they fill their frame, so a crop loses strokes (20 epochs: 94 %, uncropped 96 %).
    """
    if data_dir is not None:
        reject(f"digits comes with scikit-learn, got {data_dir}; leave it out, or choose another --dataset.")
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15).to(torch.uint8).unsqueeze(1)  # levels 0..16 -> 0..240
    labels = torch.from_numpy(bunch.target).long()
    order = torch.arange(len(labels))
    train, test = train_test_split(order, test_size=0.2, random_state=0, stratify=labels)
    names = [str(name) for name in bunch.target_names]
    splits = Split(images[train], labels[train]), Split(images[test], labels[test])
    return Dataset(*splits, names, 0, False, "a fifth of each class, always the same")


def cifar10(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """CIFAR-10, 32x32 in colour: an image tree, torchvision's own files, or a download into cache_dir."""
    if data_dir is None or (data_dir / datasets.CIFAR10.base_folder).is_dir():
        both = [_torchvision(datasets.CIFAR10, data_dir, cache_dir, train) for train in (True, False)]
        train, test = (
            Split(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)) for d in both
        )
        return Dataset(train, test, both[0].classes, 4, True)
    if not ((data_dir / "train").is_dir() and (data_dir / "test").is_dir()):
        reject(
            f"expected {data_dir}/train/CLASS/*.jpg and {data_dir}/test/CLASS/*.jpg, or "
            f"{data_dir}/{datasets.CIFAR10.base_folder}; found {contents(data_dir)}. "
            "Point it at such a folder, or leave it out to download CIFAR-10; for other images use --dataset folder."
        )
    trees = [find_classes(data_dir / name) for name in ("train", "test")]
    (train, _), (test, _) = (in_memory(tree, cache_dir) for tree in trees)
    names = trees[1].classes
    if names != trees[0].classes:
        reject(f"{data_dir}/train has the classes {trees[0].classes}, {data_dir}/test {names}; they must agree.")
    if train.shape != test.shape:
        reject(f"training images are {train.shape}, test images {test.shape}; bring them to one size.")
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


DATASETS: dict[DatasetName, Reader] = {
    "digits": digits,
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "folder": folder,
}


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
            reject(
                f"expected {name} or {name}.gz in {data_dir} or {folders[1]}; found {contents(data_dir)}. "
                "Point it at the folder of the four idx files, or leave it out to download them."
            )

        image_file, label_file = plain("images-idx3"), plain("labels-idx1")
        try:
            images, labels = read_image_file(image_file).unsqueeze(1), read_label_file(label_file)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reject(f"the {prefix} files in {data_dir} are not idx files ({error!r}); fetch them again.")
    if len(images) != len(labels):
        reject(f"{data_dir} has {len(images)} {prefix} images but {len(labels)} labels; fetch them again.")
    return Split(images, labels)


def _torchvision(kind: type, data_dir: Path | None, cache_dir: Path, train: bool):  # type: ignore[no-untyped-def]
    """One split as torchvision reads it, downloaded into cache_dir if no data_dir is named."""
    root = (data_dir or cache_dir).expanduser()
    try:
        return kind(str(root), train=train, download=data_dir is None)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        reject(
            f"{kind.__name__} could not be {'downloaded to' if data_dir is None else 'read from'} {root}: "
            f"{error}. Fetch it on a machine with a network and name its folder here."
        )
