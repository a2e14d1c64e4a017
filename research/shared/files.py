"""Writing files that are whole or absent, whenever the program is killed."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves it over `path` if the block succeeds.

    The data reach the disk before the move, so that not even a loss of power leaves half a file under the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # with its suffix, which tells savefig the format
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: set[str]) -> None:
    """Delete temporary files of `replacing` for these names, which a killed program has left in the folder."""
    for file in folder.glob(".*-*"):
        match = re.fullmatch(r"\.(\d+)-(.+)", file.name)
        if match and match[2] in names:
            file.unlink(missing_ok=True)


def check_room(folder: Path, size: int) -> None:
    """Raises: OSError unless a file of `size` bytes can be written into the folder, which is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "room") as temporary:
        temporary.write_bytes(b"?")
    (folder / "room").unlink()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{size:,} bytes are needed, {free:,} are free")
