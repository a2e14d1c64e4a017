"""Where epochs are told beside the log: TensorBoard and Weights & Biases, if they are installed and asked for."""

import shutil
from collections.abc import Callable
from typing import Any

import typer

from research.settings.config import Config
from research.training.log import Log, Row

Tell = Callable[[Row], None]


def trackers(config: Config, log: Log) -> list[Tell]:
    """A function for each tracker that the flags ask for. It is called with each epoch to come."""
    wanted = ((config.tensorboard, tensorboard), (config.wandb, wandb))
    return [open_(config, log) for asked, open_ in wanted if asked]


def tensorboard(config: Config, log: Log) -> Tell:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", "--tensorboard") from error
    folder = config.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted epoch may have left events; the log tells all of them
    writer = SummaryWriter(str(folder))

    def tell(row: Row) -> None:
        for name, value in _values(row).items():
            writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    for row in log.rows:
        tell(row)
    return tell


def wandb(config: Config, log: Log) -> Tell:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", "--wandb") from error
    name = "-".join(config.folder.parts[-2:])
    run = wandb.init(project=config.wandb, name=name, id=name, resume="allow", config=log.header)

    def tell(row: Row) -> None:
        run.log(_values(row), step=row["epoch"])

    return tell


def _values(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "epoch"}


def _missing(package: str, flag: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"needs the package {package}; pip install {package}, or drop it: log.jsonl has every number.", param_hint=flag
    )
