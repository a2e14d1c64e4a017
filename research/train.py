"""Train a reversible model on an image data set.

    python -m research.train                                               # digits: a minute on two CPU cores
    python -m research.train --dataset folder --data-dir DIR               # your images, DIR/CLASS/*
    python -m research.train --recipe minrev-vit --amp                     # minREV's, on CIFAR-10: see recipes/
    torchrun --nproc-per-node 2 -m research.train                          # on two processes
    python -m research.train --help

Settings are in settings/config.py, the loop in training/loop.py, data sets and batches in data/.
"""

import typer

from research.settings.config import Config, flags
from research.settings.seed_flags import Command
from research.training.distributed import join
from research.training.loop import train

app = typer.Typer(add_completion=False)


@app.command(cls=Command)
@flags
def main(config: Config) -> None:
    """Train a reversible model. Each epoch writes log.jsonl, curve.png and last.pt, the checkpoint."""
    last = config.folder / "last.pt"
    if last.exists() and not (config.resume or config.overwrite):
        raise typer.BadParameter(
            f"{config.folder} holds a run; add --resume to continue it, --overwrite to start it anew, "
            "or name another folder.",
            param_hint="--out",
        )
    for place in (config.folder, *config.folder.parents):
        if place.exists() and not place.is_dir():
            raise typer.BadParameter(f"expected a folder, got the file {place}; name another.", param_hint="--out")
    try:
        with join(config) as (processes, device):
            train(config, processes, device)
    except KeyboardInterrupt:
        where = (
            f"{last} has the last whole epoch: repeat the flags and add --resume" if last.exists() else "nothing kept"
        )
        typer.echo(f"\ninterrupted; {where}", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
