"""A trained network, as its checkpoint has it, with all that a prediction needs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from research.data.batches import normalizer
from research.settings.config import Config
from research.training.build import AMP_DTYPES, network
from research.training.inputs import Inputs, read


@dataclasses.dataclass(frozen=True)
class Trained:
    """``model`` in evaluation mode, and what it was trained on."""

    model: nn.Module
    inputs: Inputs
    config: Config

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of the size it was trained on -> (B, classes), rows that add up to 1. Normalises by
        itself, and computes in the precision that the run was tested in."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, AMP_DTYPES[self.config.amp_dtype], enabled=self.config.amp):
            logits = self.model(self.inputs.normalizer(device)(images.to(device)))
        return logits.float().softmax(1)


def load(
    path: Path,
    device: torch.device | None = None,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: typer.echo(line, err=True),
) -> Trained:
    """The network of a run: its folder, or the last.pt in it. Of a run with --ema, the averaged weights, which are the
    ones that its log has test accuracies of.

    Everything that shapes the network comes from the checkpoint. Weights alone do not tell all of it: for another
    number of attention heads they have the same shapes, and would load and give other outputs. A checkpoint of an
    earlier version, which does not tell what the network was trained on, is completed by reading the data set again,
    from ``data_dir`` or where it lay.

    Raises: typer.BadParameter for a file that is no checkpoint, or if that data set cannot be read.
    """
    if not path.exists() or (path.is_dir() and not (path / "last.pt").exists()):
        raise typer.BadParameter(
            f"expected the folder of a run of research.train, or its last.pt; there is no {path}"
            f"{'/last.pt' if path.is_dir() else ''}. Runs lie in runs/, unless they were given another --out.",
            param_hint="RUN",
        )
    path = path / "last.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        header, run = state["log"]["header"], state["run"]
        weights = run["ema"] if run.get("ema") else run["model"]
    except Exception as error:  # torch.load raises many kinds, by what the file holds
        raise typer.BadParameter(
            f"expected the folder of a run of research.train, or its last.pt; {path} is none "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}).",
            param_hint="RUN",
        ) from error
    config = config_of(header["config"])
    inputs = Inputs(**header["data"]) if "data" in header else inputs_of(config, path, data_dir, say)
    model = network(config, inputs.shape, len(inputs.classes))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"the weights in {path} are not those of the network that its settings name: {error}", param_hint="RUN"
        ) from error
    return Trained(model.eval().to(device or torch.device("cpu")), inputs, config)


def config_of(told: dict[str, Any]) -> Config:
    """The settings that a log tells. Flags that are newer than the log have their defaults."""
    known = {field.name for field in dataclasses.fields(Config)}
    paths = {name: told[name] and Path(told[name]) for name in ("data_dir", "cache_dir", "out") if name in told}
    return Config(**{name: value for name, value in (told | paths).items() if name in known})


def inputs_of(config: Config, path: Path, data_dir: Path | None, say: Callable[[str], None]) -> Inputs:
    """What a network was trained on, of which its checkpoint tells nothing: its data set is read again."""
    say(f"note: {path} does not tell its classes and normalisation, an earlier version wrote it; reading the data set")
    all_in_memory = {"stream_above": 1e9} if config.dataset == "folder" else {}  # as earlier versions had them
    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir, **all_in_memory)
    try:
        data = read(config).prepare(config.limit_train, config.limit_test, torch.device("cpu"))
    except typer.BadParameter as error:
        raise typer.BadParameter(
            f"{path} does not tell its classes and normalisation, since an earlier version wrote it, and its data set "
            f"cannot be read again: {error.message} Name the folder of the images it was trained on.",
            param_hint="--data-dir",
        ) from error
    return Inputs.of(data, normalizer(data.train, config.statistics))
