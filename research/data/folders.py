"""Folders with a folder of images for each class: held in memory, or left on disk."""

import hashlib
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

from research.data.decoding import BROKEN, fitting, opened
from research.data.split import Dataset, Images, Split
from research.data.streamed import Reading, Streamed
from research.shared.files import replacing


def folder(data_dir: Path | None, cache_dir: Path, side: int | None = None, reading: Reading | None = None) -> Dataset:
    """Images of one's own, of any size and number of classes: {train,test}/CLASS/* or {train,val}/CLASS/*; of CLASS/*
    alone, always the same fifth of each class is the test set.

    Brought to side x side (32 unless given) in colour: resized until the shorter side fits, the middle of the other cut
    out. Held in memory, unless they would take more bytes there than ``reading`` allows.
    """
    if data_dir is None:
        reject("expected a folder of images, DIR/CLASS/* or DIR/{train,test}/CLASS/*, got none; name it.")
    side, reading = side or 32, reading or Reading()
    inner = {entry.name for entry in data_dir.iterdir() if entry.is_dir()} if data_dir.is_dir() else set()
    held = next((name for name in ("test", "val") if name in inner), None)
    if ("train" in inner) != bool(held):
        reject(
            f"found {contents(data_dir)} in {data_dir}, expected train and test (or val), each with a folder a class. "
            "Add the other, or name the folder that holds the classes: a fifth of each is then the test set."
        )
    trees = [find_classes(data_dir / name) for name in ("train", held)] if held else [find_classes(data_dir)]
    names = trees[0].classes
    if trees[-1].classes != names:
        reject(f"{data_dir}/train has the classes {names}, {data_dir}/{held} {trees[-1].classes}; they must agree.")
    if len(names) < 2:
        reject(f"{data_dir} has one class only, {names[0]}; expected a folder for each of two or more.")
    streamed = sum(len(tree) for tree in trees) * 3 * side**2 > reading.above
    found = [on_disk(tree, side, reading) if streamed else in_memory(tree, cache_dir, side, reading) for tree in trees]
    if held:
        (train, _), (test, _) = found
        return Dataset(train, test, names, side // 8, True, f"the folders train and {held}")
    ((every, files),) = found
    out = held_out(torch.tensor([label for _, label in files]), names, data_dir)
    paths = [str(Path(files[i][0]).relative_to(data_dir)) for i in out.nonzero()[:, 0].tolist()]
    return Dataset(
        every.part(~out), every.part(out), names, side // 8, True, "a fifth of each class, held out at random", paths
    )


class Tree(datasets.ImageFolder):
    """Folders of images. Hidden ones, such as those that notebooks and thumbnails leave, are no classes."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the classes in their order, and the label of each."""
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: label for label, name in enumerate(names)}


def find_classes(root: Path) -> datasets.ImageFolder:
    """The files of root/CLASS/*, and the names of the classes, in their order."""
    if not root.is_dir():
        reject(f"expected {root}/CLASS/*; found {contents(root)}. Name a folder that has one for each class.")
    try:
        return Tree(str(root))
    except FileNotFoundError as error:
        reject(
            f"expected {root}/CLASS/*, but: {str(error).rstrip('.')}; found {contents(root)}. "
            "Sort the images into a folder for each class, and remove folders without images."
        )


def held_out(labels: Tensor, names: list[str], root: Path) -> Tensor:
    """Which images are for testing: a fifth of each class, at least one image of it, the same on every call. (N,)
    bool."""
    draws, test = torch.Generator().manual_seed(0), torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(names):
        theirs = (labels == label).nonzero()[:, 0]
        if len(theirs) < 2:
            reject(f"{root}/{name} has one image only; expected two or more, of which some are for testing.")
        test[theirs[torch.randperm(len(theirs), generator=draws)[: max(1, len(theirs) // 5)]]] = True
    return test


Found = tuple[Images, list[tuple[str, int]]]  # the images, and the file and label of each


def on_disk(tree: datasets.ImageFolder, side: int, reading: Reading) -> Found:
    """The images of a tree, decoded whenever they are asked for."""
    return Streamed(tree.samples, torch.arange(len(tree)), side, reading), tree.samples


def in_memory(
    tree: datasets.ImageFolder, cache_dir: Path, side: int | None = None, reading: Reading | None = None
) -> Found:
    """Decode a tree once, all images of one size or brought to side x side; later calls read the tensor kept in
    cache_dir."""
    root, corrupt = Path(tree.root), (reading or Reading()).corrupt
    name = "-".join([root.parent.name, root.name, *([] if side is None else [str(side)])])
    cached = cache_dir.expanduser() / f"{name}-{_fingerprint(root, tree.samples)}.pt"
    if cached.exists():
        kept = torch.load(cached, weights_only=True)
        for path, reason in kept.get("broken", {}).items():  # caches of earlier versions have no such entry
            corrupt(path, reason)
        return _kept(tree, kept)
    images: Tensor | None = None
    broken: dict[str, str] = {}
    fit = fitting(side)
    for i, (path, _) in enumerate(tqdm(tree.samples, desc=f"decoding {root}", disable=None)):
        try:
            image = fit(opened(path, 3))
        except BROKEN as error:
            broken[path] = str(error) or type(error).__name__
            corrupt(path, broken[path])
            continue
        if images is None:
            images = torch.empty(len(tree), *image.shape, dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            reject(f"{path} is {tuple(image.shape)}, others {tuple(images.shape[1:])}; use one size.")
        images[i] = image
    if images is None:
        reject(f"no file below {root} is an image that can be read; name another folder.")
    good = torch.tensor([path not in broken for path, _ in tree.samples])
    kept = {"images": images[good], "labels": torch.tensor(tree.targets)[good], "broken": broken}
    with replacing(cached) as temporary:
        torch.save(kept, temporary)
    typer.echo(f"decoded {len(kept['labels']):,} images of {root}, kept in {cached}", err=True)
    return _kept(tree, kept)


def _kept(tree: datasets.ImageFolder, kept: dict[str, Any]) -> Found:
    broken = kept.get("broken", {})
    return Split(kept["images"], kept["labels"]), [sample for sample in tree.samples if sample[0] not in broken]


def _fingerprint(root: Path, samples: list[tuple[str, int]]) -> str:
    """Changes whenever an image below root is added, removed, renamed or rewritten."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for path, _ in samples:
        stat = Path(path).stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def contents(folder: Path) -> str:
    """What an error says that a folder holds."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5] + ["..."] * (len(names) > 5)) or "an empty folder"


def reject(message: str) -> NoReturn:
    """Ends the program, and names the flag."""
    raise typer.BadParameter(message, param_hint="--data-dir")
