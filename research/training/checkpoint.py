"""Checkpoints that continue a run bit for bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from timm.utils import ModelEmaV3
from torch import nn

from research.settings.config import Config
from research.shared.files import check_room, remove_leftovers, replacing
from research.training.inputs import Inputs
from research.training.log import Log

# Flags that may differ when a run is resumed: where things lie and when to stop, not what is computed.
FREE = {"recipe", "data_dir", "cache_dir", "device", "out", "resume", "overwrite", "stop_after", "tensorboard", "wandb"}
FREE |= {"stream_above", "workers", "corrupt"}  # and those that say how files are read


@dataclasses.dataclass(frozen=True)
class Run:
    """All that changes while training, except for torch's global random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    draws: torch.Generator  # order of the images and augmentation, on the CPU
    ema: ModelEmaV3 | None = None  # average of the weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
            "draws": self.draws.get_state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        for group in self.optimizer.param_groups:  # torch moves an optimizer's state to the device, but not its rates
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(group["params"][0].device)
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["cpu_rng"])
        for index, rng in enumerate(state["cuda_rng"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng, index)


def save(path: Path, run: Run, log: Log) -> None:
    """Write the run and its log, atomically. Cost: three copies of the parameters (Adam) on disk, four with --ema."""
    with replacing(path) as temporary:
        torch.save({"run": run.state_dict(), "log": dataclasses.asdict(log)}, temporary)


def make_room(config: Config, run: Run) -> None:
    """Remove what a killed run has left in the folder, and make sure that checkpoints can be written there."""
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    size = 2 * weights * (4 if run.ema else 3) + 2**21  # two checkpoints for a moment, a picture and the log
    try:
        remove_leftovers(config.folder, {"log.jsonl", "curve.png", "last.pt"})
        check_room(config.folder, size)
    except OSError as error:
        raise typer.BadParameter(
            f"expected a folder that can be written, with room for the run; {config.folder} is none ({error}). "
            "Make room, or name another folder.",
            param_hint="--out",
        ) from error


def unwritten(config: Config, epoch: int, error: Exception) -> SystemExit:
    """The error that ends a run which could not write an epoch. It says what is there, and how to go on."""
    kept = "last.pt there has the epochs before it" if epoch > 1 else "nothing of the run is kept"
    how = "repeat the flags and add --resume" if epoch > 1 else "start it again"
    return SystemExit(
        f"epoch {epoch} could not be written to {config.folder}: {error}. {kept}: make room there, then {how}"
    )


def resume(
    path: Path,
    run: Run,
    config: Config,
    inputs: Inputs,
    environment: dict[str, Any],
    say: Callable[[str], None] = typer.echo,
) -> Log:
    """Put `run` back to where `path` left it, after checking that `config` is still the same.

    Returns its log, which has ``inputs`` even if an earlier version wrote it."""
    if not path.is_file():
        raise typer.BadParameter(
            f"expected a checkpoint {path}, found none; name the run's folder with --out, "
            "or drop --resume to start anew.",
            param_hint="--resume",
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    log = Log(**state["log"])
    then, now = Config().as_json() | log.header["config"], config.as_json()  # an older log lacks flags made since
    for name in now.keys() - FREE:
        if then[name] != now[name]:
            raise typer.BadParameter(
                f"the run in {path.parent} has {then[name]}, this call {now[name]}; "
                "repeat the run's flags, or start another with --out.",
                param_hint="--" + name.replace("_", "-"),
            )
    check_inputs(Inputs(**log.header["data"]) if "data" in log.header else None, inputs, path, say)
    log.header.setdefault("data", inputs.as_json())
    for name, value in environment.items():
        was = log.header["environment"].get(name, value)  # an older log may not tell
        if was != value:
            say(f"note: {name} was {was}, is {value}: not bit for bit from here")
    run.load_state_dict(state["run"])
    return log


def check_inputs(then: Inputs | None, now: Inputs, path: Path, say: Callable[[str], None]) -> None:
    """Check that a run goes on with the images it was begun with. A checkpoint of an earlier version, whose images
    were in memory, does not tell which they were."""
    if now.streamed != (then is not None and then.streamed):
        was, is_ = ("held in memory", "read from disk") if now.streamed else ("read from disk", "held in memory")
        raise typer.BadParameter(
            f"the run in {path.parent} has its images {was}, and with this call they would be {is_}, which draws other "
            f"numbers; give it a {'larger' if now.streamed else 'smaller'} number of GB, or start another with --out.",
            param_hint="--stream-above",
        )
    if then is None:
        return
    if then.classes != now.classes:
        raise typer.BadParameter(
            f"the run in {path.parent} has the classes {', '.join(then.classes)}, and there are now "
            f"{', '.join(now.classes)}; name the folder it was begun with.",
            param_hint="--data-dir",
        )
    for name, was in dataclasses.asdict(then).items():
        if was != getattr(now, name):
            told = (
                "the images held out for testing are others"
                if name == "held_out"
                else (f"{name} of the images is {_rounded(getattr(now, name))}, was {_rounded(was)}")
            )
            say(f"note: {told}: not bit for bit from here")


def _rounded(value: Any) -> Any:
    """As a note shows it."""
    return [round(v, 4) for v in value] if isinstance(value, list) and isinstance(value[0], float) else value
