"""The data sets that a run can train on, each read by a function."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

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

from research.data.split import Dataset, Split
from research.shared.files import replacing

DatasetName = Literal["digits", "cifar10", "fashion-mnist", "folder"]

FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist


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
            "Point it at such a folder, or leave it out to download CIFAR-10; for other images use --dataset folder."
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


def folder(data_dir: Path | None, cache_dir: Path, side: int | None = None) -> Dataset:
    """Images of one's own, of any size and number of classes: {train,test}/CLASS/* or {train,val}/CLASS/*; of CLASS/*
    alone, always the same fifth of each class is the test set.

    Brought to side x side (32 unless given) in colour: resized until the shorter side fits, the middle of the other cut
    out.
    """
    if data_dir is None:
        _reject("expected a folder of images, DIR/CLASS/*.jpg or DIR/{train,test}/CLASS/*.jpg, got none; name it.")
    side = side or 32
    inner = {entry.name for entry in data_dir.iterdir() if entry.is_dir()} if data_dir.is_dir() else set()
    held = next((name for name in ("test", "val") if name in inner), None)
    if "train" in inner and held:
        train, names = read_tree(data_dir / "train", cache_dir, side)
        test, others = read_tree(data_dir / held, cache_dir, side)
        if names != others:
            _reject(f"{data_dir}/train has the classes {names}, {data_dir}/{held} {others}; they must agree.")
    elif "train" in inner or held:
        _reject(
            f"found {_contents(data_dir)} in {data_dir}, expected train and test (or val), each with a folder a class. "
            "Add the other, or name the folder that holds the classes: a fifth of each is then the test set."
        )
    else:
        every, names = read_tree(data_dir, cache_dir, side)
        train, test = _hold_out(every, names, data_dir)
    if len(names) < 2:
        _reject(f"{data_dir} has one class only, {names[0]}; expected a folder for each of two or more.")
    return Dataset(train, test, names, side // 8, True)


DATASETS: dict[DatasetName, Reader] = {
    "digits": digits,
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "folder": folder,
}


def _hold_out(every: Split, names: list[str], root: Path) -> tuple[Split, Split]:
    """A fifth of each class, at least one image of it, for testing: the same on every call. -> train, test."""
    draws, test = torch.Generator().manual_seed(0), torch.zeros(len(every), dtype=torch.bool)
    for label, name in enumerate(names):
        theirs = (every.labels == label).nonzero()[:, 0]
        if len(theirs) < 2:
            _reject(f"{root}/{name} has one image only; expected two or more, of which some are for testing.")
        test[theirs[torch.randperm(len(theirs), generator=draws)[: max(1, len(theirs) // 5)]]] = True
    return Split(every.images[~test], every.labels[~test]), Split(every.images[test], every.labels[test])


def read_tree(root: Path, cache_dir: Path, side: int | None = None) -> tuple[Split, list[str]]:
    """Decode root/CLASS/* once, all of one size or brought to side x side; later calls read the tensor kept in
    cache_dir."""
    if not root.is_dir():
        _reject(f"expected {root}/CLASS/*.jpg; found {_contents(root)}. Name a folder that has one for each class.")
    resize = [] if side is None else [v2.Resize(side), v2.CenterCrop(side)]
    try:
        tree = datasets.ImageFolder(str(root), transform=v2.Compose([*resize, v2.PILToTensor()]))
    except FileNotFoundError as error:
        _reject(
            f"expected {root}/CLASS/*.jpg, but: {str(error).rstrip('.')}; found {_contents(root)}. "
            "Sort the images into a folder for each class, and remove folders without images."
        )
    name = "-".join([root.parent.name, root.name, *([] if side is None else [str(side)])])
    cached = cache_dir.expanduser() / f"{name}-{_fingerprint(root, tree.samples)}.pt"
    if cached.exists():
        return Split(**torch.load(cached, weights_only=True)), tree.classes
    images: Tensor | None = None
    for i, (path, _) in enumerate(tqdm(tree.samples, desc=f"decoding {root}", disable=None)):
        try:
            image = tree[i][0]
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for broken files
            _reject(f"{path} is not an image that can be read ({error}); repair or remove it.")
        if images is None:
            images = torch.empty(len(tree), *image.shape, dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            _reject(f"{path} is {tuple(image.shape)}, others {tuple(images.shape[1:])}; use one size.")
        images[i] = image
    assert images is not None  # ImageFolder refuses an empty tree
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
        return "a file" if folder.exists() else "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5] + ["..."] * (len(names) > 5)) or "an empty folder"


def _reject(message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint="--data-dir")
