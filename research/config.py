"""The settings of one training run. Each field is a command-line flag, and a key of the log's first line."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

DatasetName = Literal["digits", "cifar10", "fashion-mnist"]
ModelName = Literal["vit", "swin", "mvit", "plain-vit"]
CouplingName = Literal["additive", "exact"]
SchedulerName = Literal["naive", "reversible", "pareprop", "checkpoint"]
AmpDtypeName = Literal["bfloat16", "float16"]

Result = TypeVar("Result")

# Defaults that a data set changes. Config's own are those of digits, the others' are minREV's.
_MINREV: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 8,
    "drop_path": 0.0,
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-3,
}
RECIPES: dict[DatasetName, dict[str, Any]] = {
    "digits": {},
    "cifar10": _MINREV,
    "fashion-mnist": _MINREV | {"epochs": 30},
}
# And those that a model changes, on every data set.
MODEL_RECIPES: dict[ModelName, dict[str, Any]] = {
    "mvit": {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 1},
}


def _use_recipe(context: typer.Context, dataset: DatasetName) -> DatasetName:
    context.default_map = dict(RECIPES[dataset])
    return dataset


def _use_model_recipe(context: typer.Context, model: ModelName) -> ModelName:
    context.default_map = {**(context.default_map or {}), **MODEL_RECIPES.get(model, {})}
    return model


def _flag(panel: str, text: str, *names: str, **rules: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **rules)


def _whole(low: int) -> dict[str, Any]:
    """Rules of a flag that takes a whole number: typer's own message would not tell what came."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise typer.BadParameter(f"expected a whole number of at least {low}, got {text}.")
        return number

    return {"parser": parse, "metavar": "INT"}


def _real(low: float, below: float) -> dict[str, Any]:
    """Rules of a flag that takes a number x with low <= x < below."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number < below:
            raise typer.BadParameter(f"expected a number x with {low:g} <= x < {below:g}, got {text}.")
        return number

    return {"parser": parse, "metavar": "FLOAT"}


_data = functools.partial(_flag, "Data")
_model = functools.partial(_flag, "Model")
_training = functools.partial(_flag, "Training")
_machine = functools.partial(_flag, "Machine and reproducibility")
_output = functools.partial(_flag, "Output and resuming")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run. An equal Config on an equal machine gives an equal log (but for `seconds`)."""

    dataset: Annotated[
        DatasetName,
        _data("What to train on; it also sets the defaults shown here.", is_eager=True, callback=_use_recipe),
    ] = "digits"
    data_dir: Annotated[
        Path | None,
        _data(
            "Where the data lies. cifar10: a tree {train,test}/CLASS/*.jpg, or the folder that holds "
            "cifar-10-batches-py. fashion-mnist: the folder of the four idx files, gzipped or not. "
            "Without it both are downloaded; digits comes with scikit-learn.",
            show_default=False,
        ),
    ] = None
    cache_dir: Annotated[Path, _data("Keeps downloads and decoded images.")] = Path("~/.cache/revlib")
    limit_train: Annotated[int | None, _data("Train on this many images only.", **_whole(1))] = None
    limit_test: Annotated[int | None, _data("Test on this many images only.", **_whole(1))] = None

    model: Annotated[
        ModelName,
        _model(
            "Architecture. swin: two stages with half of the blocks each, the second of twice the features and heads, "
            "and windows of 4x4 patches. mvit: stages of 1, 2 and depth - 3 blocks, as minREV's; it sets "
            "--patch-size 2, --embed-dim 64, --depth 4 and --num-heads 1 unless given. plain-vit: timm's, with one "
            "stream, not reversible.",
            callback=_use_model_recipe,
        ),
    ] = "vit"
    coupling: Annotated[CouplingName, _model("How blocks merge; exact keeps streams on a grid.")] = "additive"
    scheduler: Annotated[SchedulerName, _model("How backward gets activations back: the gradients are the same.")] = (
        "reversible"
    )
    patch_size: Annotated[int, _model("Side of a patch, in pixels.", **_whole(1))] = 4
    embed_dim: Annotated[int, _model("Features per token.", **_whole(1))] = 64
    depth: Annotated[int, _model("Number of blocks.", **_whole(1))] = 6
    num_heads: Annotated[int, _model("Attention heads per block.", **_whole(1))] = 4
    mlp_ratio: Annotated[float, _model("Hidden features of the MLP, per feature of a token.", **_real(0, math.inf))] = (
        4.0
    )
    drop_path: Annotated[float, _model("Rate of stochastic depth.", **_real(0, 1))] = 0.1

    epochs: Annotated[int, _training("Passes over the training images: the cosine's length.", **_whole(1))] = 30
    batch_size: Annotated[int, _training("Images per step.", **_whole(1))] = 32
    lr: Annotated[float, _training("Adam's first learning rate; falls to 0 on a cosine.", **_real(0, math.inf))] = 2e-3
    amp: Annotated[bool, _training("Run the forward pass in mixed precision.", "--amp")] = False
    amp_dtype: Annotated[AmpDtypeName, _training("Number format of --amp; float16 adds loss scaling.")] = "bfloat16"

    device: Annotated[str, _machine("auto, cpu, cuda, cuda:1, mps, ...; auto prefers a GPU.")] = "auto"
    seed: Annotated[int, _machine("Seeds weights, order of images, augmentation and dropout.", **_whole(0))] = 0
    graph: Annotated[
        bool, _machine("Capture the training step as a CUDA graph: faster where the host is the bottleneck.", "--graph")
    ] = False
    deterministic: Annotated[
        bool, _machine("Refuse kernels whose result varies from run to run (slower on a GPU).")
    ] = True

    out: Annotated[
        Path | None,
        _output("Folder of log.jsonl, curve.png and last.pt.", show_default="runs/DATASET-MODEL-SCHEDULER"),
    ] = None
    resume: Annotated[
        bool,
        _output("Continue the run in --out, bit for bit: repeat its flags and add this one.", "--resume"),
    ] = False
    overwrite: Annotated[bool, _output("Start anew in --out, even if it holds a run.", "--overwrite")] = False
    stop_after: Annotated[
        int | None,
        _output("Stop once this epoch is done; --resume goes on. The cosine is unchanged.", **_whole(1)),
    ] = None

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise typer.BadParameter(
                f"{self.embed_dim} features do not divide among {self.num_heads} heads; "
                f"choose a multiple of {self.num_heads}, or other --num-heads.",
                param_hint="--embed-dim",
            )
        if self.amp_dtype == "float16" and not self.amp:
            raise typer.BadParameter("float16 has no effect without --amp; add it.", param_hint="--amp-dtype")
        if self.graph and self.amp_dtype == "float16":
            raise typer.BadParameter(
                "float16 skips steps that overflow, which a captured step cannot; use --amp-dtype bfloat16, "
                "or drop --graph.",
                param_hint="--graph",
            )
        if self.resume and self.overwrite:
            raise typer.BadParameter("continues a run, --overwrite drops it; give one.", param_hint="--resume")

    @property
    def folder(self) -> Path:
        """Where this run's files go."""
        return self.out or Path("runs") / f"{self.dataset}-{self.model}-{self.scheduler}"

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def flags(function: Callable[[Config], Result]) -> Callable[..., Result]:
    """Give `function(config)` one keyword per field of Config: the signature that typer turns into flags."""

    @functools.wraps(function)
    def command(**values: Any) -> Result:
        return function(Config(**values))

    command.__signature__ = inspect.signature(Config)  # type: ignore[attr-defined]
    command.__annotations__ = get_type_hints(Config, include_extras=True)
    return command
