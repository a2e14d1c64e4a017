"""Recipes, and what they are made of: augmentation, optimizer, schedule, averaged weights, compiling, tracking."""

import dataclasses
import importlib
import math
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import test_train
import torch
import torch.nn.functional as F
import typer
from research_cases import EVERYTHING, read, small
from test_train import assert_identical, run, saved, squeeze, timeless, train_tiny
from torch import nn
from torchvision.transforms import v2

from research import train
from research.data import augment
from research.data.augment import drawing_from, mixer, rand_augment
from research.data.batches import normalizer
from research.data.split import Split
from research.settings import config
from research.settings.config import RECIPES, Config
from research.settings.seed_flags import RENAMED, SWITCHES, Command
from research.training import build, loop
from research.training.distributed import Processes

_leave_no_trace = test_train._leave_no_trace  # of the training script


# Recipes


PARAMETERS = {"vit": 1_207_178, "swin": 2_220_706, "mvit": 1_261_386}
every_network = pytest.mark.parametrize("network", PARAMETERS)


@every_network
def test_recipes_have_the_parameters_of_minrev(network):
    """Added up by hand from the shapes in its code."""
    for kind in ("minrev", "tuned"):
        model = build.build(RECIPES[f"{kind}-{network}"], small((3, 32, 32)), torch.device("cpu")).model
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[network]
        told = importlib.import_module(f"research.recipes.{kind}_{network}").__doc__
        assert f"{PARAMETERS[network]:,}" in told


SEED = {
    "vit": "--lr 1e-3 --bs 128 --embed_dim 128 --depth 6 --n_head 8 --epochs 100 --model vit",
    "swin": "--lr 1e-3 --bs 128 --embed_dim 128 --depth 4 --n_head 4 --epochs 100 --model swin",
    "mvit": "--lr 1e-3 --bs 128 --embed_dim 64 --depth 4 --n_head 1 --epochs 100 --model mvit",
}


def settings_of(args: str) -> tuple[Config, str]:
    """What research.train gets from these flags, and what it says."""
    seen: list[Config] = []
    app = typer.Typer()
    app.command(cls=Command)(config.flags(seen.append))
    code, output = run(app, *args.split())
    assert code == 0, output
    return seen[0], output


@every_network
def test_minrevs_own_command_lines_give_its_recipes(network):
    found, output = settings_of(f"--dataset cifar10 {SEED[network]}")
    assert found == dataclasses.replace(RECIPES[f"minrev-{network}"], recipe=None)
    for ours in ("--bs is --batch-size", "--embed_dim is --embed-dim", "--n_head is --num-heads"):
        assert squeeze(f"note: {ours} here") in output
    assert settings_of(f"{SEED[network]} --dataset cifar10")[0] == found


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--vanilla_bp True", {"scheduler": "naive"}),
        ("--vanilla_bp False", {}),
        ("--vanilla_bp=True", {"scheduler": "naive"}),
        ("--pareprop True", {"scheduler": "pareprop"}),
        ("--vanilla_bp True --pareprop True", {"scheduler": "naive"}),
        ("--pareprop True --vanilla_bp True", {"scheduler": "naive"}),
        ("--amp True", {"amp": True}),
        ("--amp False", {"amp": False}),
        ("--amp", {"amp": True}),
        ("--amp --epochs 3", {"amp": True, "epochs": 3}),
        ("--patch_size 4 --bs=64", {"patch_size": 4, "batch_size": 64}),
    ],
)
def test_minrevs_flags_are_known(flags, wanted):
    found, output = settings_of(flags)
    assert found == Config(**wanted)
    theirs = {*RENAMED, *SWITCHES} - ({"--amp"} if flags.split()[1:2] not in (["True"], ["False"]) else set())
    assert output.count("note:") == sum(flag.split("=")[0] in theirs for flag in flags.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num_classes 10", ["--num_classes", "the data set tells", "drop it"]),
        ("--image_size 32", ["--image_size", "--image-size", "drop it"]),
        ("--vanilla_bp maybe", ["--vanilla_bp", "True or False, got maybe"]),
        ("--pareprop", ["--pareprop", "True or False, got nothing"]),
    ],
)
def test_a_flag_of_minrevs_without_meaning_is_an_error(tmp_path, flags, words):
    code, output = run(train.app, "--out", tmp_path, *flags.split())
    assert code == 2 and all(squeeze(word) in output for word in words), output


def test_the_rate_of_minrev_is_two_epochs_late():
    """That of its script: after each epoch, counted from 0, it sets the cosine to the epoch before."""
    made = build.build(RECIPES["minrev-vit"], small((3, 32, 32)), torch.device("cpu"))
    theirs = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 100)
    for epoch in range(100):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in (made.optimizer, theirs)]
        assert rates[0] == rates[1] == made.schedule.get_last_lr()[0]
        theirs.step()
        made.optimizer.step()
        made.schedule.step()
        with warnings.catch_warnings(action="ignore"):
            cosine.step(epoch - 1)


def test_images_are_normalised_by_the_numbers_of_minrev():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    split = Split(images, torch.zeros(2))
    pixels = normalizer(split, "minrev")(images)
    theirs = v2.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))(images.float() / 255)
    torch.testing.assert_close(pixels, theirs)
    with pytest.raises(typer.BadParameter, match="3 channels, these have 1"):
        normalizer(Split(images[:, :1], torch.zeros(2)), "minrev")


def test_minrev_recipes_are_its_command_lines():
    same = {"dataset": "cifar10", "optimizer": "adam", "lr": 1e-3, "batch_size": 128, "epochs": 100, "amp": False}
    none = dict.fromkeys(["rand_augment", "mixup", "cutmix", "label_smoothing", "weight_decay", "warmup_epochs"], 0)
    for network, dim, depth, heads in (("vit", 128, 6, 8), ("swin", 128, 4, 4), ("mvit", 64, 4, 1)):
        recipe = RECIPES[f"minrev-{network}"]
        sizes = {"model": network, "embed_dim": dim, "depth": depth, "num_heads": heads}
        wanted = same | none | {"clip_grad": 0, "ema": 0} | sizes
        assert {name: getattr(recipe, name) for name in wanted} == wanted


def test_tuned_recipes_change_the_training_alone():
    kept = ["dataset", "model", "fusion", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "coupling"]
    for network in ("vit", "swin", "mvit"):
        seed, tuned = RECIPES[f"minrev-{network}"], RECIPES[f"tuned-{network}"]
        assert all(getattr(seed, name) == getattr(tuned, name) for name in kept)
        assert (seed.recipe, tuned.recipe) == (f"minrev-{network}", f"tuned-{network}")


def test_a_recipe_sets_every_flag_and_others_override_it():
    seen: list[Config] = []
    app = typer.Typer()
    app.command()(config.flags(seen.append))
    for args in [
        "--recipe tuned-mvit",
        "--recipe minrev-mvit --depth 5 --dataset digits",
        "--dataset digits --depth 5 --recipe minrev-mvit",
        "--model vit --fusion mean --recipe tuned-mvit --no-amp --ema 0 --rand-augment 0",
    ]:
        assert run(app, *args.split())[0] == 0
    assert seen[0] == RECIPES["tuned-mvit"]
    assert seen[1] == seen[2] == dataclasses.replace(RECIPES["minrev-mvit"], depth=5, dataset="digits")
    off = {"amp": False, "ema": 0.0, "rand_augment": 0}
    assert seen[3] == dataclasses.replace(RECIPES["tuned-mvit"], model="vit", fusion="mean", **off)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_each_recipe_runs(tmp_path, recipe):
    """On tiny images, at its own settings but for the size of the network."""
    sizes = "--embed-dim 16 --num-heads 2 --limit-train 16 --limit-test 8 --epochs 2 --statistics measured".split()
    sizes += [] if recipe.startswith("minrev") else ["--warmup-epochs", "1"]
    code, output = run(
        train.app, "--recipe", recipe, "--dataset", "digits", "--device", "cpu", "--out", tmp_path, *sizes
    )
    assert code == 0, output
    log = read(tmp_path)
    assert log.header["config"]["recipe"] == recipe and len(log.rows) == 2


def test_the_default_folder_is_named_after_the_recipe():
    assert RECIPES["tuned-vit"].folder == Path("runs/tuned-vit-reversible")
    assert Config().folder == Path("runs/digits-vit-reversible")


# Networks


@pytest.mark.some(4)
@pytest.mark.parametrize("model", get_args(config.ModelName))
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_every_network_trains_in_mixed_precision(tmp_path, model, precision):
    args = ["--model", model, "--patch-size", 2, "--depth", 4, "--epochs", 1, "--amp", "--amp-dtype", precision]
    log = train_tiny(tmp_path, *args, "--embed-dim", 16, "--num-heads", 2, "--limit-train", 32)
    assert log.rows[0]["train_loss"] == pytest.approx(math.log(10), rel=0.3)
    # float16 multiplies the loss by what its state tells
    assert bool(saved(tmp_path)["run"]["scaler"]) == (precision == "float16")


@pytest.mark.parametrize("model", ["vit", "swin", "mvit"])
def test_a_plain_twin_is_of_the_same_size(model):
    counts = []
    for name in (model, f"plain-{model}"):
        chosen = dataclasses.replace(RECIPES[f"minrev-{model}"], model=name, variant="default")
        network = build.build(chosen, small((3, 32, 32)), torch.device("cpu")).model
        counts.append(sum(p.numel() for p in network.parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)  # the head of two streams is wider


def test_fusion_is_for_stages():
    for model, fusion in [("vit", "concat-mlp"), ("swin", "concat"), ("plain-mvit", "concat")]:
        with pytest.raises(typer.BadParameter, match=f"{model} has no use for {fusion}"):
            Config(model=model, fusion=fusion)
    with pytest.raises(typer.BadParameter, match="swin has no use for concat-mlp in --variant minrev"):
        Config(model="swin", variant="minrev", fusion="concat-mlp")
    with pytest.raises(typer.BadParameter, match="is for --model swin --variant minrev, got swin and default"):
        Config(model="swin", unrolled_windows=True)


def test_fused_side_by_side_the_next_stage_sees_both_streams():
    """Of the mean, it would see no difference between streams that are exchanged."""
    torch.manual_seed(0)
    model = build.build(RECIPES["minrev-mvit"], small((3, 32, 32)), torch.device("cpu")).model
    first, second = model.stages[0], model.stages[1]
    a, b = torch.randn(2, 1, 256, 64).unbind()
    fused = first.fusion(a, b)
    assert torch.equal(fused, torch.cat([a, b], -1))
    out, size = second(fused, (16, 16))
    assert tuple(size) == (8, 8) and out.shape == (1, 64, 256)  # the next, too, gets both
    assert not torch.allclose(out, second(first.fusion(b, a), (16, 16))[0])


# Augmentation


def test_rand_augment_gives_neighbours_their_own_policies(monkeypatch):
    monkeypatch.setattr(augment, "POLICIES", 40)
    image = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    found = rand_augment(image.expand(100, -1, -1, -1), 9, torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8
    assert torch.equal(found[:40], found[40:80]) and torch.equal(found[:20], found[80:])
    assert len(found[:40].flatten(1).unique(dim=0)) > 30


def test_rand_augment_is_torchvisions_by_the_numbers_given():
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    outside, draws = torch.get_rng_state(), torch.Generator().manual_seed(3)
    found = rand_augment(images, 9, draws)
    assert torch.equal(torch.get_rng_state(), outside)
    torch.manual_seed(3)
    transform = v2.RandAugment(magnitude=9)
    assert torch.equal(found, torch.stack([transform(image) for image in images]))
    assert torch.equal(draws.get_state(), torch.get_rng_state())  # and the next epoch goes on from there


def test_drawing_from_a_generator_survives_an_error():
    outside, draws = torch.get_rng_state(), torch.Generator().manual_seed(0)
    with pytest.raises(InterruptedError), drawing_from(draws):
        torch.rand(3)
        raise InterruptedError
    assert torch.equal(torch.get_rng_state(), outside)


def test_mixing_gives_convex_sums_and_their_labels():
    assert mixer(0.0, 0.0, 10) is None
    images = torch.eye(8).view(8, 1, 2, 4)
    labels = torch.arange(8)
    seen = set()
    for seed in range(20):
        with drawing_from(torch.Generator().manual_seed(seed)):
            mixed, parts = mixer(0.8, 1.0, 10)(images, labels)
        torch.testing.assert_close(parts.sum(1), torch.ones(8))
        assert parts.shape == (8, 10) and (parts > 0).sum(1).max() <= 2
        whole = bool(((mixed == 0) | (mixed == 1)).all())  # cutmix mixes no pixel
        seen.add("cutmix" if whole else "mixup")
        if not whole:
            torch.testing.assert_close(mixed.flatten(1), parts[:, :8])
    assert seen == {"mixup", "cutmix"}


def test_parts_of_mixed_batches_make_up_the_loss():
    parts, logits = torch.rand(7, 3, dtype=torch.float64).softmax(1), torch.randn(7, 3, dtype=torch.float64)
    whole = F.cross_entropy(logits, parts, label_smoothing=0.1)
    for count in (1, 2, 9):
        everyone = [Processes(rank, count) for rank in range(count)]
        losses = [p.loss(p.part(logits), p.part(parts), 7, 0.1) for p in everyone]
        torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_a_mixture_counts_as_its_larger_part():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    parts = torch.tensor([[0.4, 0.6], [0.4, 0.6]])
    assert loop.score(logits, torch.tensor(2.0), parts).tolist() == [2.0, 1.0, 2.0]


# Optimizer and schedule


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_rate_rises_on_a_line_and_falls_on_a_cosine(warmup, graph):
    chosen = Config(epochs=8, warmup_epochs=warmup, lr=0.1, weight_decay=0.1, optimizer="adamw", graph=graph)
    made = build.build(chosen, small((1, 8, 8)), torch.device("cpu"))
    found = []
    for _ in range(8):
        made.optimizer.step()
        rates = [float(group["lr"]) for group in made.optimizer.param_groups]
        assert len(set(rates)) == 1 and rates[0] == pytest.approx(float(made.schedule.get_last_lr()[0]))
        found.append(rates[0])
        made.schedule.step()
    rise = [0.1 * (t + 1) / (warmup + 1) for t in range(warmup)]
    fall = [0.05 * (1 + math.cos(math.pi * t / (8 - warmup))) for t in range(8 - warmup)]
    assert found == pytest.approx(rise + fall, rel=1e-5)


@pytest.mark.parametrize("model", ["vit", "swin", "mvit"])
def test_biases_norms_and_tables_do_not_decay(model):
    chosen = dataclasses.replace(RECIPES[f"tuned-{model}"], embed_dim=16, num_heads=1)
    made = build.build(chosen, small((3, 32, 32)), torch.device("cpu"))
    assert type(made.optimizer) is torch.optim.AdamW
    names = {p: name for name, p in made.model.named_parameters()}
    groups = {g["weight_decay"]: {names[p] for p in g["params"]} for g in made.optimizer.param_groups}
    tables = {n for n in names.values() if any(t in n for t in ("pos_embed", "rel_pos", "relative_position"))}
    vectors = {name for p, name in names.items() if p.ndim < 2}  # biases, and norms
    assert tables and groups == {0.0: tables | vectors, 0.05: set(names.values()) - tables - vectors}


def steps(made: Any, *, longest: float = 0.0, count: int = 3) -> None:
    off = torch.autocast("cpu", enabled=False)
    step = loop.train_step(made, off, longest=longest)
    for seed in range(count):
        draws = torch.Generator().manual_seed(seed)
        step(torch.randn(8, 1, 8, 8, generator=draws), torch.randint(10, (8,), generator=draws))


def test_averaged_weights_follow_the_weights():
    made = build.build(Config(ema=0.75), small((1, 8, 8)), torch.device("cpu"))
    name, live = next((n, p) for n, p in made.model.named_parameters() if n.endswith("weight"))
    wanted = live.detach().clone()
    for _ in range(3):
        steps(made, count=1)
        wanted = 0.75 * wanted + 0.25 * live.detach()
    torch.testing.assert_close(dict(made.ema.module.named_parameters())[name].detach(), wanted)
    assert not torch.equal(wanted, live)


def test_averaged_weights_are_the_ones_tested(tmp_path):
    """With a decay of nearly 1 they stay where they began, at chance."""
    args = ["--limit-train", 400, "--limit-test", 200, "--epochs", 8, "--ema", 0.9999]
    last = train_tiny(tmp_path, *args).rows[-1]
    assert last["train_accuracy"] > 0.3 and last["test_accuracy"] < 0.25
    state = saved(tmp_path)["run"]
    assert state["ema"].keys() == state["model"].keys()
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("scaled", [False, True])
def test_long_gradients_are_cut(scaled):
    """The unscaled ones; seen by the optimizer."""
    made = build.build(Config(), small((1, 8, 8)), torch.device("cpu"))
    made = dataclasses.replace(made, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled))
    lengths = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        lengths.append(nn.utils.get_total_norm([p.grad for p in made.model.parameters()]).item())

    made.optimizer.register_step_pre_hook(note)
    steps(made)
    assert min(lengths) > 0.02
    lengths.clear()
    steps(made, longest=0.01)
    assert lengths == pytest.approx([0.01] * 3, rel=1e-3)


# Resuming


@pytest.mark.some(1)
@pytest.mark.parametrize("precision", ["", "--amp --amp-dtype float16"])
@pytest.mark.parametrize("stop", [1, 2])
def test_stopping_and_resuming_changes_no_bit_of_anything(tmp_path, precision, stop):
    """Before and after the warm-up ends."""
    args = ["--epochs", 4, "--warmup-epochs", 2, *EVERYTHING, *precision.split()]
    straight = train_tiny(tmp_path / "straight", *args)
    train_tiny(tmp_path / "halves", *args, "--stop-after", stop)
    resumed = train_tiny(tmp_path / "halves", *args, "--resume")
    assert timeless(resumed) == timeless(straight)
    assert_identical(saved(tmp_path / "halves")["run"], saved(tmp_path / "straight")["run"])


def test_a_run_from_before_these_flags_goes_on(tmp_path):
    train_tiny(tmp_path, "--epochs", 2, "--stop-after", 1)
    state = saved(tmp_path)
    new = ["recipe", "rand_augment", "mixup", "ema", "optimizer", "fusion", "compile", "tensorboard"]
    for name in new:
        del state["log"]["header"]["config"][name]
    del state["run"]["ema"]
    torch.save(state, tmp_path / "last.pt")
    code, output = run(train.app, *test_train.TINY, "--out", tmp_path, "--epochs", 2, "--resume", "--ema", 0.9)
    assert code == 2 and squeeze("--ema: the run") in output
    assert len(train_tiny(tmp_path, "--epochs", 2, "--resume").rows) == 2


@pytest.mark.slow
def test_two_processes_train_as_one_with_everything(tmp_path):
    args = ["--epochs", 2, "--batch-size", 8, "--drop-path", 0, "--limit-train", 97, *EVERYTHING]
    alone = train_tiny(tmp_path / "alone", *args)
    code, output = test_train.torchrun(tmp_path / "both", *args)
    assert code == 0, output
    for a, b in zip(alone.rows, read(tmp_path / "both").rows, strict=True):
        for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


# Compiling


@pytest.mark.slow
@pytest.mark.parametrize(("model", "functions"), [("vit", 8), ("swin", 8), ("mvit", 4), ("plain-vit", 1)])
def test_what_is_compiled(tmp_path, monkeypatch, model, functions):
    """F and G, each of them; or a whole model of one stream. Losses are those of eager functions."""
    compiled, original = [], nn.Module.compile

    def eagerly(module: nn.Module) -> None:
        compiled.append(module)
        original(module, backend="aot_eager")

    args = ["--model", model, "--patch-size", 2, "--depth", 4, "--epochs", 1, "--limit-train", 64, "--drop-path", 0]
    eager = train_tiny(tmp_path / "eager", *args)
    monkeypatch.setattr(nn.Module, "compile", eagerly)
    torch._dynamo.reset()
    found = train_tiny(tmp_path / "compiled", *args, "--compile", "--ema", 0.5)
    torch._dynamo.reset()
    assert len(compiled) == functions
    assert found.rows[0]["train_loss"] == pytest.approx(eager.rows[0]["train_loss"], rel=1e-4)
    assert saved(tmp_path / "compiled")["run"]["model"].keys() == saved(tmp_path / "eager")["run"]["model"].keys()


@pytest.mark.slow
def test_compiled_by_inductor_it_trains_as_eagerly(tmp_path):
    args = ["--epochs", 2, "--drop-path", 0]
    eager, compiled = (train_tiny(tmp_path / str(i), *args, *more) for i, more in enumerate(([], ["--compile"])))
    for a, b in zip(eager.rows, compiled.rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)


# Flags


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--recipe best", ["--recipe", "best", "tuned-vit"]),
        ("--rand-augment 31", ["--rand-augment", "from 0 to 30, got 31"]),
        ("--ema 1", ["--ema", "0 <= x < 1, got 1"]),
        ("--label-smoothing 1", ["--label-smoothing", "0 <= x < 1"]),
        ("--warmup-epochs 30", ["--warmup-epochs", "less than --epochs 30, got 30"]),
        ("--fusion concat-mlp", ["--fusion", "vit has no use", "another --model"]),
        ("--cosine-lag 2 --warmup-epochs 1", ["--cosine-lag", "--warmup-epochs"]),
        ("--statistics minrev", ["--statistics", "3 channels, these have 1"]),
        ("--graph --compile", ["--graph", "not tried", "--compile"]),
    ],
)
def test_a_bad_flag_is_named_with_what_to_do(tmp_path, args, words):
    code, output = run(train.app, *test_train.TINY, "--out", tmp_path, *args.split())
    assert code == 2
    assert all(squeeze(word) in output for word in words), output
    assert not list(tmp_path.iterdir())


# Tracking


class Board:
    """As torch's SummaryWriter, and as a run of wandb."""

    told: ClassVar[list[tuple[str, float, int]]] = []

    def __init__(self, folder: str = "") -> None:
        if folder:
            Path(folder).mkdir()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def log(self, values: dict[str, float], step: int) -> None:
        self.told += [(name, value, step) for name, value in values.items()]

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("flag", ["--tensorboard", "--wandb=revlib"])
def test_epochs_are_told_to_trackers(tmp_path, monkeypatch, flag):
    calls: list[dict[str, Any]] = []

    def init(**kwargs: Any) -> Board:
        calls.append(kwargs)
        return Board()

    monkeypatch.setattr(Board, "told", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train_tiny(tmp_path / "run", "--epochs", 3, flag, "--stop-after", 1)
    log = train_tiny(tmp_path / "run", "--epochs", 3, flag, "--resume")
    accuracies = {step: value for name, value, step in Board.told if name == "test_accuracy"}
    assert accuracies == {row["epoch"]: row["test_accuracy"] for row in log.rows}
    if calls:  # a run there goes on under its name; a board is written anew
        assert len({call["id"] for call in calls}) == 1 and calls[0]["project"] == "revlib"
        assert len([entry for entry in Board.told if entry[0] == "lr"]) == 3


@pytest.mark.parametrize(("flag", "module"), [("--tensorboard", "torch.utils.tensorboard"), ("--wandb=p", "wandb")])
def test_a_missing_tracker_is_named(tmp_path, monkeypatch, flag, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, output = run(train.app, *test_train.TINY, "--out", tmp_path, flag)
    name = re.sub("=.*", "", flag)
    assert code == 2 and name in output and squeeze(f"pip install {name[2:]}") in output
