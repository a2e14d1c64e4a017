"""The settings of one training run. Each field is a command-line flag, and a key of the log's first line."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from research.data.batches import StatisticsName
from research.data.decoding import CorruptName
from research.data.readers import DatasetName
from research.recipes import SETTINGS, RecipeName
from research.settings.flags import flag, keywords, real, whole
from research.settings.schedulers import EXAMPLES, checked

ModelName = Literal["vit", "swin", "mvit", "plain-vit", "plain-swin", "plain-mvit"]
CouplingName = Literal["additive", "exact"]
FusionName = Literal["mean", "concat-linear", "concat-mlp", "concat"]
OptimizerName = Literal["adam", "adamw"]
AmpDtypeName = Literal["bfloat16", "float16"]
VariantName = Literal["default", "minrev"]

# Defaults that depend on the data set. Those in Config are for digits. With those of cifar10, which are minREV's in
# every respect, minREV's own command lines train its networks. The others have the sizes of minREV.
_SIZES: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 8,
    "drop_path": 0.0,
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-3,
}
DATASET_DEFAULTS: dict[DatasetName, dict[str, Any]] = {
    "digits": {},
    "cifar10": _SIZES | {"statistics": "minrev", "variant": "minrev", "cosine_lag": 2},
    "fashion-mnist": _SIZES | {"epochs": 30},
    "folder": _SIZES | {"epochs": 30, "batch_size": 32},
}
# Defaults that depend on the model: on every data set, and on CIFAR-10 alone.
_MVIT: dict[str, Any] = {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 1}
MODEL_DEFAULTS: dict[ModelName, dict[str, Any]] = {"mvit": _MVIT, "plain-mvit": _MVIT}
_SWIN: dict[str, Any] = {"depth": 4, "num_heads": 4, "drop_path": 0.2}
CIFAR10_MODEL_DEFAULTS: dict[ModelName, dict[str, Any]] = {"swin": _SWIN, "plain-swin": _SWIN}


def defaults(dataset: DatasetName, model: ModelName) -> dict[str, Any]:
    """The settings whose defaults are not Config's in a call that names this data set and this model."""
    only = CIFAR10_MODEL_DEFAULTS.get(model, {}) if dataset == "cifar10" else {}
    return DATASET_DEFAULTS[dataset] | MODEL_DEFAULTS.get(model, {}) | only


# These run before other flags are read. A recipe sets all of them, so data set and model then set none.
def _defaults_of_recipe(context: typer.Context, recipe: RecipeName | None) -> RecipeName | None:
    if recipe is not None:
        context.meta["recipe"] = recipe
        context.default_map = {k: v for k, v in dataclasses.asdict(RECIPES[recipe]).items() if v is not None}
    return recipe


def _defaults_of_dataset(context: typer.Context, dataset: DatasetName) -> DatasetName:
    if "recipe" not in context.meta:
        context.meta["dataset"] = dataset
        context.default_map = dict(DATASET_DEFAULTS[dataset])
    return dataset


def _defaults_of_model(context: typer.Context, model: ModelName) -> ModelName:
    if "recipe" not in context.meta:
        context.default_map = defaults(context.meta["dataset"], model)
    return model


_start = functools.partial(flag, "Where to start from")
_data = functools.partial(flag, "Data")
_augment = functools.partial(flag, "Augmentation")
_model = functools.partial(flag, "Model")
_training = functools.partial(flag, "Training")
_machine = functools.partial(flag, "Machine and reproducibility")
_output = functools.partial(flag, "Output and resuming")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run. An equal Config on an equal machine gives an equal log (but for `seconds`)."""

    recipe: Annotated[
        RecipeName | None,
        _start(
            "A whole set of flags, which others given here override: see research/recipes.",
            is_eager=True,
            callback=_defaults_of_recipe,
        ),
    ] = None

    dataset: Annotated[
        DatasetName,
        _data("What to train on; it also sets the defaults shown here.", is_eager=True, callback=_defaults_of_dataset),
    ] = "digits"
    data_dir: Annotated[
        Path | None,
        _data(
            "Where the data lies. cifar10: a tree {train,test}/CLASS/*.jpg, or the folder that holds "
            "cifar-10-batches-py. fashion-mnist: the folder of the four idx files, gzipped or not. "
            "Without it both are downloaded; digits comes with scikit-learn. folder: your own images, DIR/CLASS/*, of "
            "which a fifth is held out for testing, or DIR/{train,test}/CLASS/*; any size, number and names of "
            "classes.",
            show_default=False,
        ),
    ] = None
    image_size: Annotated[
        int | None,
        _data(
            "Side to which images of --dataset folder are scaled and cut; a multiple of --patch-size.",
            show_default="32",
            **whole(1),
        ),
    ] = None
    stream_above: Annotated[
        float,
        _data(
            "Images of --dataset folder are held in memory if they take at most so many GB there, 3 bytes a pixel once "
            "they are scaled. Of more, each is read from disk whenever its turn comes.",
            **real(0, math.inf),
        ),
    ] = 2.0
    workers: Annotated[
        int,
        _data(
            "Processes that decode and augment images read from disk; 0: the training process itself. Of no influence "
            "on the numbers.",
            **whole(0),
        ),
    ] = 2
    corrupt: Annotated[
        CorruptName,
        _data(
            "What to do with a file of --dataset folder that cannot be read: name it and stop, or name it and leave it "
            "out."
        ),
    ] = "refuse"
    cache_dir: Annotated[Path, _data("Keeps downloads and decoded images.")] = Path("~/.cache/revlib")
    limit_train: Annotated[int | None, _data("Train on this many images only.", **whole(1))] = None
    limit_test: Annotated[int | None, _data("Test on this many images only.", **whole(1))] = None

    statistics: Annotated[
        StatisticsName,
        _data(
            "What images are normalised by, per channel: means and standard deviations measured on the training "
            "images, or the numbers in minREV's script, for images in colour."
        ),
    ] = "measured"

    rand_augment: Annotated[
        int, _augment("Magnitude of RandAugment's two operations, 0 for none; 9 is usual.", **whole(0, 30))
    ] = 0
    mixup: Annotated[
        float, _augment("Alpha of mixup, 0 for none. With --cutmix too, each batch draws which.", **real(0, math.inf))
    ] = 0.0
    cutmix: Annotated[float, _augment("Alpha of cutmix, 0 for none.", **real(0, math.inf))] = 0.0
    label_smoothing: Annotated[float, _augment("Part of a label that all classes share.", **real(0, 1))] = 0.0

    model: Annotated[
        ModelName,
        _model(
            "Architecture. swin: two stages with half of the blocks each, the second of twice the features and heads, "
            "and windows of 4x4 patches. mvit: stages of 1, 2 and depth - 3 blocks, as minREV's; it sets "
            "--patch-size 2, --embed-dim 64, --depth 4 and --num-heads 1 unless given. plain-...: timm's, of one "
            "stream, not reversible.",
            callback=_defaults_of_model,
        ),
    ] = "vit"
    variant: Annotated[
        VariantName,
        _model(
            "Details of a network, such as initial weights and epsilons. default: those of timm's layers. minrev: all "
            "that changes a number is as in minREV's code, see research/recipes; plain-... get its initial weights "
            "and epsilons."
        ),
    ] = "default"
    coupling: Annotated[CouplingName, _model("How blocks merge; exact keeps streams on a grid.")] = "additive"
    fusion: Annotated[
        FusionName,
        _model(
            "How the two streams become one between stages of swin and mvit. concat-linear and concat-mlp put a layer "
            "on both, concat gives both to the next stage (mvit only). --variant minrev has its own, and takes none."
        ),
    ] = "mean"
    unrolled_windows: Annotated[
        bool,
        _model(
            "Of --model swin --variant minrev: do not roll shifted windows back, as minREV's code by mistake does not."
        ),
    ] = False
    scheduler: Annotated[
        str,
        _model(
            f"How backward gets activations back: the gradients are the same. {', '.join(EXAMPLES)}. Numbers: steps, "
            "and for a budget a fraction of all activations, or bytes.",
            parser=checked,
            metavar="NAME[:NUMBER]",
        ),
    ] = "reversible"
    patch_size: Annotated[int, _model("Side of a patch, in pixels.", **whole(1))] = 4
    embed_dim: Annotated[int, _model("Features per token.", **whole(1))] = 64
    depth: Annotated[int, _model("Number of blocks.", **whole(1))] = 6
    num_heads: Annotated[int, _model("Attention heads per block.", **whole(1))] = 4
    mlp_ratio: Annotated[float, _model("Hidden features of the MLP, per feature of a token.", **real(0, math.inf))] = (
        4.0
    )
    drop_path: Annotated[float, _model("Rate of stochastic depth.", **real(0, 1))] = 0.1

    epochs: Annotated[int, _training("Passes over the training images: the cosine's length.", **whole(1))] = 30
    batch_size: Annotated[int, _training("Images per step.", **whole(1))] = 32
    optimizer: Annotated[OptimizerName, _training("adamw decays weights apart from the gradients.")] = "adam"
    lr: Annotated[float, _training("Highest learning rate; falls to 0 on a cosine.", **real(0, math.inf))] = 2e-3
    warmup_epochs: Annotated[int, _training("Epochs in which --lr is approached, of --epochs.", **whole(0))] = 0
    cosine_lag: Annotated[
        int,
        _training(
            "Epochs by which the cosine is late, so that it does not reach 0; after the first epoch it starts at "
            "minus this number. 2 in minREV's script.",
            **whole(0),
        ),
    ] = 0
    weight_decay: Annotated[
        float, _training("Of all but biases, norms and tables of positions.", **real(0, math.inf))
    ] = 0.0
    clip_grad: Annotated[
        float, _training("Longest gradient, over all parameters; 0 for any length.", **real(0, math.inf))
    ] = 0.0
    ema: Annotated[
        float,
        _training("Test a running average of the weights, with this decay a step; 0 for none.", **real(0, 1)),
    ] = 0.0
    amp: Annotated[bool, _training("Run the forward pass in mixed precision.")] = False
    amp_dtype: Annotated[AmpDtypeName, _training("Number format of --amp; float16 adds loss scaling.")] = "bfloat16"

    device: Annotated[str, _machine("auto, cpu, cuda, cuda:1, mps, ...; auto prefers a GPU.")] = "auto"
    seed: Annotated[int, _machine("Seeds weights, order of images, augmentation and dropout.", **whole(0))] = 0
    graph: Annotated[
        bool, _machine("Capture the training step as a CUDA graph: faster where the host is the bottleneck.")
    ] = False
    compile: Annotated[bool, _machine("Compile F and G of every step, or all of a model that is not reversible.")] = (
        False
    )
    deterministic: Annotated[
        bool, _machine("Refuse kernels whose result varies from run to run (slower on a GPU).")
    ] = True

    out: Annotated[
        Path | None,
        _output(
            "Folder of log.jsonl, curve.png and last.pt.",
            show_default="runs/RECIPE-SCHEDULER, or runs/DATASET-MODEL-SCHEDULER",
        ),
    ] = None
    resume: Annotated[
        bool,
        _output("Continue the run in --out, bit for bit: repeat its flags and add this one.", "--resume"),
    ] = False
    overwrite: Annotated[bool, _output("Start anew in --out, even if it holds a run.", "--overwrite")] = False
    stop_after: Annotated[
        int | None,
        _output("Stop once this epoch is done; --resume goes on. The cosine is unchanged.", **whole(1)),
    ] = None
    tensorboard: Annotated[bool, _output("Write events for TensorBoard, too, into the folder.")] = False
    wandb: Annotated[str | None, _output("Report to this project of Weights & Biases, too.")] = None

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise typer.BadParameter(
                f"{self.embed_dim} features do not divide among {self.num_heads} heads; "
                f"choose a multiple of {self.num_heads}, or other --num-heads.",
                param_hint="--embed-dim",
            )
        if self.image_size is not None and self.dataset != "folder":
            raise typer.BadParameter(
                f"images of {self.dataset} stay as they are; drop it, or choose --dataset folder.",
                param_hint="--image-size",
            )
        for flag_, given, usual in (("--stream-above", self.stream_above, 2.0), ("--corrupt", self.corrupt, "refuse")):
            if given != usual and self.dataset != "folder":
                raise typer.BadParameter(
                    f"is for images of your own, got {given} for {self.dataset}; drop it, or choose --dataset folder.",
                    param_hint=flag_,
                )
        fusing = () if self.variant == "minrev" else ("mvit",) if self.fusion == "concat" else ("mvit", "swin")
        if self.fusion != "mean" and self.model not in fusing:
            raise typer.BadParameter(
                f"{self.model} has no use for {self.fusion} in --variant {self.variant}; drop it, or choose another "
                "--model or --variant.",
                param_hint="--fusion",
            )
        if self.unrolled_windows and (self.model, self.variant) != ("swin", "minrev"):
            raise typer.BadParameter(
                f"is for --model swin --variant minrev, got {self.model} and {self.variant}; drop it.",
                param_hint="--unrolled-windows",
            )
        if self.amp_dtype == "float16" and not self.amp:
            raise typer.BadParameter("float16 has no effect without --amp; add it.", param_hint="--amp-dtype")
        if self.graph and self.amp_dtype == "float16":
            raise typer.BadParameter(
                "float16 skips steps that overflow, which a captured step cannot; use --amp-dtype bfloat16, "
                "or drop --graph.",
                param_hint="--graph",
            )
        if self.graph and self.compile:
            raise typer.BadParameter(
                "captures what runs eagerly; compiled functions in a capture are not tried. Drop it, or --compile.",
                param_hint="--graph",
            )
        if self.warmup_epochs >= self.epochs:
            raise typer.BadParameter(
                f"expected less than --epochs {self.epochs}, got {self.warmup_epochs}; nothing is left for the cosine.",
                param_hint="--warmup-epochs",
            )
        if self.warmup_epochs and self.cosine_lag:
            raise typer.BadParameter(
                "is for a cosine that starts at once; drop it, or --warmup-epochs.", param_hint="--cosine-lag"
            )
        if self.resume and self.overwrite:
            raise typer.BadParameter("continues a run, --overwrite drops it; give one.", param_hint="--resume")

    @property
    def folder(self) -> Path:
        """Where this run's files go."""
        return self.out or Path("runs") / f"{self.recipe or f'{self.dataset}-{self.model}'}-{self.scheduler}".replace(
            ":", "-"
        )

    def as_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


RECIPES: dict[RecipeName, Config] = {name: Config(recipe=name, **settings) for name, settings in SETTINGS.items()}


def flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function(config, ...)` one keyword per field of Config, for typer to turn into flags."""
    return keywords(function, Config)
