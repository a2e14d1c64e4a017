"""The published sizes: their parameters and multiply-adds, and timm's conventions on all three models."""

import copy
import inspect
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from common import error
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from research.simulate import GOALS, PAPER
from research.simulate import PUBLISHED as PUBLISHED_MODELS
from research.studies.footprints import MODELS, Setting, count
from revlib import Checkpoint, ExactAdditive, Naive, Reversible, ReversibleSequence
from revlib.models import PublishedRevMViT, RevMViT, RevSwin, RevViT, presets
from revlib.testing import footprint

ROOT = Path(__file__).parent.parent
TINY = {
    "rev_vit_small": {"img_size": (16, 8), "patch_size": 2, "embed_dim": 8, "depth": 4, "num_heads": 2},
    "rev_swin_tiny": {"img_size": (16, 8), "patch_size": 2, "embed_dim": 4, "depths": (1, 2, 1),
                      "num_heads": (1, 2, 4), "window_size": 3},
    "rev_mvit_base": {"img_size": (16, 8), "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "kv_stride": 2},
}  # fmt: skip
every_model = pytest.mark.parametrize("name", TINY)
our_models = pytest.mark.parametrize("name", ["rev_vit_small", "rev_swin_tiny"])


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY[name], "num_classes": 5, **kwargs})


def images(**kwargs):
    return torch.randn(3, 3, 16, 8, generator=torch.Generator().manual_seed(1)).to(**kwargs)


def sequences(model):
    return [m for m in model.modules() if isinstance(m, ReversibleSequence)]


def counted(model, pixels=224):
    """Parameters, and multiply-adds of an image in 10^9: torch counts two operations each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, pixels, pixels, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


class Counts(dict):
    """Of presets, and of the models of timm that they are compared with, by name; nothing is allocated."""

    def __missing__(self, name):
        with torch.device("meta"):
            self[name] = counted(timm.create_model(name), 32 if name.endswith("cifar10") else 224)
        return self[name]


@pytest.fixture(scope="module")
def counts():
    return Counts()


# Millions of parameters and 10^9 multiply-adds. Rev-ViT: Mangalam et al. 2022, table 1; Swin: Liu et al. 2021, table 1.
PUBLISHED = {
    "rev_vit_small": (22, 4.6),
    "rev_vit_base": (87, 17.6),
    "rev_swin_tiny": (29, 4.5),
    "rev_swin_small": (50, 8.7),
    "rev_swin_base": (88, 15.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name, counts):
    """Rev-ViT within 1 %: the paper's multiply-adds are those of ViT, which has a class token, to all its digits
    (see below); ours are at 196 tokens instead of 197. MMPreTrain counts the authors' weights as we do: 22.43 M and
    4.58, 87.33 M and 17.49. Swin's multiply-adds are RevSwin's; its parameters but for the head, see below."""
    parameters, multiply_adds = counts[name]
    millions, billions = PUBLISHED[name]
    swin = name.startswith("rev_swin")
    assert parameters / 1e6 == pytest.approx(millions, abs=1 if swin else 0.5)
    assert multiply_adds == pytest.approx(billions, rel=0.008)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("size", "width", "published"), [("small", 384, 4.6), ("base", 768, 17.6), ("large", 1024, None)]
)
def test_every_difference_to_the_vit_of_one_stream(counts, size, width, published):
    """Two streams: the last norm and the classifier are twice as wide. No class token, and no position for it."""
    (ours, fewer), (theirs, more) = counts[f"rev_vit_{size}"], counts[f"vit_{size}_patch16_224"]
    assert ours == theirs - 2 * width + 2 * width + 1000 * width
    assert fewer < more < fewer * 1.0057
    assert published in (None, round(more, 1))


@pytest.mark.some(1)
@pytest.mark.parametrize(("size", "width"), [("tiny", 96), ("small", 96), ("base", 128), ("large", 192)])
def test_every_difference_to_the_swin_of_one_stream(counts, size, width):
    (ours, more), (theirs, fewer) = counts[f"rev_swin_{size}"], counts[f"swin_{size}_patch4_window7_224"]
    assert ours == theirs + (2 + 1000) * 8 * width
    assert more - fewer == pytest.approx(1000 * 8 * width / 1e9)


def test_rev_mvit_base_beside_the_published_39_millions_and_8_7(counts):
    """39.58 M and 7.65: MViTv2-S, and a fusion by an MLP after each stage, of 6 dim^2 + 7 dim parameters.

    The model as published (PySlowFast's REV_MVIT_B_16_CONV) stands on the first MViT, and its transitions and fusions
    work on both streams side by side, where there are four times as many patches: ``PublishedRevMViT`` has its 8.64.
    """
    parameters, multiply_adds = counts["rev_mvit_base"]
    dims = [96, 192, 384, 768]
    assert parameters == counts["mvitv2_small"][0] + sum(6 * dim**2 + 7 * dim for dim in dims) == 39_580_456
    patches = [(56 // 2**i) ** 2 for i in range(4)]
    fusions = sum(6 * dim**2 * n for dim, n in zip(dims, patches, strict=True)) / 1e9
    assert multiply_adds == pytest.approx(counts["mvitv2_small"][1] + fusions)
    with torch.device("meta"):
        published = counted(PublishedRevMViT())
    assert published[0] == 39_689_320 and published[1] == pytest.approx(8.64, abs=0.005)


def test_every_preset_is_registered_and_builds_its_class(counts):
    assert sorted(presets.SIZES) == timm.list_models("rev_*") == timm.list_models(module="presets")
    assert set(presets.__all__) == set(presets.SIZES) <= set(vars(presets)) and not timm.list_pretrained("rev_*")
    exact = {"rev_vit_tiny": 5_909_416, "rev_vit_large": 305_350_632, "rev_swin_large": 198_071_548,
             "rev_vit_cifar10": 1_207_178, "rev_swin_cifar10": 2_122_018, "rev_mvit_cifar10": 1_179_466}  # fmt: skip
    assert {name: counts[name][0] for name in exact} == exact
    for name, (cls, sizes) in presets.SIZES.items():
        create = getattr(presets, name)
        assert inspect.signature(create, eval_str=True).return_annotation is cls and cls.__name__ in create.__doc__
        assert (create.__name__, create.__module__) == (name, "revlib.models.presets")
        assert set(sizes) <= set(inspect.signature(cls).parameters)


def test_the_sizes_for_cifar10_are_the_defaults():
    for name, cls in (("rev_vit_cifar10", RevViT), ("rev_swin_cifar10", RevSwin), ("rev_mvit_cifar10", RevMViT)):
        model = timm.create_model(name)
        assert repr(model) == repr(cls()) and model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
        assert model.pretrained_cfg["input_size"] == (3, 32, 32)


def test_details_of_the_configurations():
    with torch.device("meta"):
        vit, swin, mvit = (timm.create_model(f"rev_{n}_base") for n in ("vit", "swin", "mvit"))
    for size, heads in (("tiny", 3), ("small", 6), ("base", 12), ("large", 16)):  # 64 channels each
        assert presets.SIZES[f"rev_vit_{size}"][1]["num_heads"] == heads
        assert presets.SIZES[f"rev_vit_{size}"][1]["embed_dim"] == 64 * heads
    for size in ("tiny", "small", "base", "large"):  # 32 channels each
        sizes = presets.SIZES[f"rev_swin_{size}"][1]
        assert sizes["num_heads"] == tuple(sizes["embed_dim"] * 2**i // 32 for i in range(4))
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert (len(vit.blocks), vit.blocks[0].F[1].num_heads, vit.pos_embed.shape) == (12, 12, (1, 196, 768))
    assert vit.blocks[0].F[1].qkv.bias is not None
    assert [len(stage) for stage in swin.stages] == [2, 2, 18, 2]
    assert [stage[0].F.attn.num_heads for stage in swin.stages] == [4, 8, 16, 32]
    assert [stage[0].F.window_size for stage in swin.stages] == [(7, 7)] * 4
    assert [len(stage.pairs) + (stage.transition is not None) for stage in mvit.stages] == [1, 2, 11, 2]
    assert [stage.pairs[0].F.attn.num_heads for stage in mvit.stages] == [1, 2, 4, 8]
    assert [stage.pairs[0].F.attn.pool_k.stride for stage in mvit.stages[:2]] == [(4, 4), (2, 2)]


def test_the_table_of_the_guide(counts):
    """Every number in it is counted here, or in the committed simulation."""
    guide = (ROOT / "revlib" / "README.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in guide.splitlines()
             if line.startswith(("| `rev_", "| | parameters"))]  # fmt: skip
    simulated = json.loads((ROOT / "research/results/simulate/simulation.json").read_text())
    assert simulated["setting"] == asdict(Setting()) | {"batch_size": 64}
    peaks = {(row["model"], row["contender"]): row["peak_per_image"] / 1e6 for row in simulated["rows"]}
    hows = {"`Naive()`": "naive", "`Budget(fraction=0.25)`": "budget-25%", "`Checkpoint()`": "checkpoint",
            "`Checkpoint(every=2)`": "checkpoint-2", "`Reversible()`": "reversible", "timm's, one stream": "timm",
            "timm's, checkpointed": "timm-checkpoint"}  # fmt: skip
    assert table[0] == ["", "parameters [M]", "multiply-adds [10⁹]", *hows, "paper's"]
    want = [
        [f"`{MODELS[m].preset}`", f"{counts[MODELS[m].preset][0] / 1e6:.1f}", f"{counts[MODELS[m].preset][1]:.2f}",
         *(f"{peaks[m, how]:.1f}" for how in hows.values()), str(PAPER.get(m, ""))]
        for m in PUBLISHED_MODELS
    ]  # fmt: skip
    assert table[1:] == want


@pytest.mark.slow
@pytest.mark.parametrize("model", GOALS)
def test_the_goals_in_memory_are_met(model):
    """Bytes an image at 224 pixels under Reversible(), simulated: 512 images less 256."""
    few, many = count(model, ["reversible"], MODELS[model].depth, [256, 512], Setting())
    assert (many.peak - few.peak) / 256 / 1e6 <= GOALS[model] < PAPER[model]


# What users pass


@every_model
def test_arguments_reach_the_model(name):
    scheduler, coupling = Checkpoint(), ExactAdditive()
    model = build(name, in_chans=1, num_classes=7, drop_rate=0.1, drop_path_rate=0.2, scheduler=scheduler,
                  coupling=coupling)  # fmt: skip
    assert model(torch.randn(2, 1, 16, 8)).shape == (2, 7) and model.in_chans == 1 and model.num_classes == 7
    assert all(s.scheduler is scheduler and s.coupling is coupling for s in sequences(model))
    assert max(getattr(m, "drop_prob", 0) or 0 for m in model.modules()) == pytest.approx(0.2)
    assert any(isinstance(m, nn.Dropout) and m.p == 0.1 for m in model.modules())
    assert not any(getattr(m, "drop_prob", 0) for m in build(name).modules())


def test_what_they_cannot_take_is_an_error():
    with pytest.raises(TypeError, match=r"rev_mvit_base takes no argument 'qk_norm'; RevMViT takes img_size, "):
        build("rev_mvit_base", qk_norm=True)
    with pytest.raises(TypeError, match="rev_vit_small takes no argument 'class_token'; RevViT takes img_size, "):
        build("rev_vit_small", class_token=True)
    for name in ("rev_vit_small", "rev_swin_tiny"):
        with pytest.raises(ValueError, match=r"global_pool must be 'avg' .* or '' .*, got 'token'"):
            build(name, global_pool="token")
        with pytest.raises(ValueError, match=r"global_pool must be 'avg' .* or '' .*, got 'max'"):
            build(name).reset_classifier(3, "max")
    for name in TINY:
        with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
            build(name, pretrained=True)


RATE, RATIO, SIZE = "a number from 0 to 1", "a finite number from 0 up", "a whole number from 1 up"
WRONG = {
    "drop_rate": (RATE, 1.5), "drop_path_rate": (RATE, 1.5, -0.1, math.nan, "0.1", True), "mlp_ratio": (RATIO, -1, "a"),
    "in_chans": (SIZE, 0, 2.5), "embed_dim": (SIZE, -8), "patch_size": (SIZE, 0),
    "num_classes": ("a whole number from 0 up", -1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "given"), [(name, value) for name, (_, *values) in WRONG.items() for value in values]
)
@every_model
def test_a_size_or_a_rate_that_is_none(name, argument, given):
    with pytest.raises(ValueError, match=re.escape(f"{argument} takes {WRONG[argument][0]}, got {given!r}")):
        build(name, **{argument: given})


@pytest.mark.parametrize(
    ("name", "argument", "given", "message"),
    [
        *[("rev_vit_small", "depth", depth, f"depth takes {SIZE}, got {depth!r}") for depth in (0, -1, 2.5, "4")],
        *[("rev_vit_small", "num_heads", heads, f"num_heads takes {SIZE}, got {heads}") for heads in (0, -4)],
        ("rev_vit_small", "attn_drop_rate", 2, f"attn_drop_rate takes {RATE}, got 2"),
        ("rev_vit_small", "proj_drop_rate", 2, f"proj_drop_rate takes {RATE}, got 2"),
        ("rev_vit_small", "img_size", (16, -8), f"img_size[1] takes {SIZE}, got -8; img_size is (16, -8)"),
        ("rev_swin_tiny", "num_heads", (1, 0, 4), f"num_heads[1] takes {SIZE}, got 0; num_heads is (1, 0, 4)"),
        ("rev_swin_tiny", "num_heads", 4, "num_heads takes a list with a whole number for each stage, got 4"),
        ("rev_swin_tiny", "depths", (1, 2.5, 1), f"depths[1] takes {SIZE}, got 2.5; depths is (1, 2.5, 1)"),
        ("rev_swin_tiny", "depths", 3, "depths takes a list with a whole number for each stage, got 3"),
        ("rev_mvit_base", "num_heads", 0, f"num_heads takes {SIZE}, got 0"),
        ("rev_mvit_base", "kv_stride", 0, f"kv_stride takes {SIZE}, got 0"),
    ],
)
def test_a_size_of_one_model_that_is_none(name, argument, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(name, **{argument: given})


@every_model
def test_numbers_of_numpy_and_lists_are_sizes_too(name):
    given = {key: list(map(np.int64, v)) if isinstance(v, tuple) else np.int64(v) for key, v in TINY[name].items()}
    rates = {"drop_path_rate": np.float32(0.1), "drop_rate": 1, "mlp_ratio": np.float64(2)}
    model = timm.create_model(name, **given, **rates, num_classes=np.int64(5), in_chans=np.int32(3))
    assert model(images()).shape == (3, 5)


# timm's conventions


@every_model
def test_timms_helpers_work(name):
    model = build(name)
    config = resolve_model_data_config(model)
    assert config["input_size"][0] == 3 and config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert model.default_cfg is model.pretrained_cfg and model.pretrained_cfg["architecture"] == name
    modules = dict(model.named_modules())
    assert isinstance(modules[model.pretrained_cfg["first_conv"]], nn.Conv2d)
    assert modules[model.pretrained_cfg["classifier"]] is model.get_classifier()
    ema, before = ModelEmaV3(model, decay=0.5), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update(model)
    got = ema.module.state_dict()
    assert all(torch.allclose(got[key], before[key] + 0.5) for key, _ in model.named_parameters())
    assert torch.isfinite(ema.module(images())).all()


@every_model
def test_rates_of_an_optimizer_rise_from_layer_to_layer(name):
    model = build(name)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.75)
    names = {id(p): key for key, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert set(scale) == set(names.values()) and scale["patch_embed.proj.weight"] == min(scale.values()) < 0.5
    assert {key for key, rate in scale.items() if rate == 1} >= {key for key in scale if key.startswith("head")}
    assert not decayed & model.no_weight_decay()
    assert all(p.ndim == 1 or key in decayed | model.no_weight_decay() for key, p in model.named_parameters())
    model(images()).sum().backward()
    optimizer.step()


def test_layers_are_in_the_order_of_forward():
    vit, swin = build("rev_vit_small"), build("rev_swin_tiny")
    for coarse in (False, True):
        layers = group_parameters(vit, vit.group_matcher(coarse))
        tops = [{".".join(key.split(".")[: 2 if key.startswith("blocks") else 1]) for key in names}
                for names in layers.values()]  # fmt: skip
        blocks = [{f"blocks.{i}"} for i in range(3)]
        assert tops == [{"pos_embed", "patch_embed"}, *blocks, {"blocks.3", "norm"}, {"head"}]  # as in timm's ViT
    found = [{".".join(key.split(".")[:3]) if key.startswith("stages") else key.split(".")[0] for key in names}
             for names in group_parameters(swin, swin.group_matcher()).values()]  # fmt: skip
    assert found == [{"patch_embed"}, {"stages.0.0"}, {"downsamples", "stages.1.0"}, {"stages.1.1"},
                     {"downsamples", "stages.2.0", "norm"}, {"head"}]  # fmt: skip
    coarse = list(group_parameters(swin, swin.group_matcher(coarse=True)).values())
    assert len(coarse) == 5 and "downsamples.0.reduction.weight" in coarse[2]
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **TINY["rev_swin_tiny"])
    assert len(group_parameters(theirs, theirs.group_matcher())) == len(found)


@every_model
def test_grad_checkpointing_is_a_scheduler_and_gradients_stay(name):
    found = []
    for enable in (True, False):
        model = build(name, drop_path_rate=0.3).double()
        assert model.scheduler == Reversible()
        model.set_grad_checkpointing(enable)
        assert {s.scheduler for s in sequences(model)} == {Reversible() if enable else Naive()} == {model.scheduler}
        torch.manual_seed(2)
        logits = model(images(dtype=torch.float64))
        logits.sin().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    model.scheduler = Checkpoint()
    model.set_grad_checkpointing()
    assert {s.scheduler for s in sequences(model)} == {Reversible()}
    assert error(*found) < 1e-9


@our_models
def test_heads(name):
    model = build(name).double()
    x, features = images(dtype=torch.float64), model.forward_features(images(dtype=torch.float64))
    assert torch.equal(model.forward_head(features), model(x)) and features.shape[-1] == model.num_features
    pooled = features.flatten(1, -2).mean(1)
    assert torch.allclose(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64 and model.num_classes == 3 and model.global_pool == "avg"
    model.reset_classifier(3, global_pool="")
    assert model(x).shape == (*features.shape[:-1], 3) and model.global_pool == ""
    model.reset_classifier(2)
    assert model(x).shape == (*features.shape[:-1], 2)  # pooling stays as it was
    model.reset_classifier(0, "avg")
    assert torch.allclose(model(x), pooled) and isinstance(model.get_classifier(), nn.Identity)
    assert build(name, global_pool="")(x.float()).shape == (*features.shape[:-1], 5)


# Feature maps


def levels_by_hand(model, x):
    """The concatenated streams after each level, in rows and columns, without the engine."""
    found = []
    if isinstance(model, RevViT):
        x1 = x2 = model.patch_embed(x) + model.pos_embed
        for F, G in model.blocks:
            x1 = x1 + F(x2)
            x2 = x2 + G(x1)
            found.append(torch.cat((x1, x2), -1).unflatten(1, (8, 4)))
        return found
    x = model.patch_embed(x)
    for i, stage in enumerate(model.stages):
        x1 = x2 = x
        for F, G in stage:
            x1 = x1 + F(x2)
            x2 = x2 + G(x1)
        found.append(torch.cat((x1, x2), -1))
        if i < 2:
            x = model.downsamples[i](model.fusions[i](x1, x2))
    return found


@our_models
def test_intermediates(name):
    model, x = build(name).double(), images(dtype=torch.float64)
    want, levels = levels_by_hand(model, x), len(model.feature_info)
    final, found = model.forward_intermediates(x, output_fmt="NHWC")
    assert len(found) == len(want) == levels and all(map(torch.allclose, found, want))
    assert torch.allclose(final, model.forward_features(x))
    for indices, taken in ((2, [-2, -1]), ([0], [0]), ([-1, 1], [1, levels - 1]), ((1, 1, 0), [0, 1])):
        for fmt in ("NCHW", "NHWC", "NLC"):
            got = model.forward_intermediates(x, indices, output_fmt=fmt, intermediates_only=True)
            shaped = [want[i].permute(0, 3, 1, 2) if fmt == "NCHW" else want[i].flatten(1, 2) if fmt == "NLC"
                      else want[i] for i in taken]  # fmt: skip
            assert len(got) == len(shaped) and all(map(torch.allclose, got, shaped))
    early, got = model.forward_intermediates(x, [0], stop_early=True, output_fmt="NLC")
    assert torch.allclose(got[0], want[0].flatten(1, 2))
    vit = name == "rev_vit_small"  # the norm is as wide as all of its levels
    first = want[0].flatten(1, 2)
    assert torch.allclose(early.flatten(1, -2), model.norm(first) if vit else first)
    *_, before, last = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.allclose(last, model.norm(want[-1]).flatten(1, 2))
    assert torch.allclose(before, (model.norm(want[-2]) if vit else want[-2]).flatten(1, 2))
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NHWC, NLC, got 'NCL'"):
        model.forward_intermediates(x, output_fmt="NCL")


@our_models
def test_levels_that_nothing_takes_are_not_run(name):
    model, ran = build(name, **({"parts": 1} if name == "rev_swin_tiny" else {})), []
    for i, sequence in enumerate(sequences(model)):
        for j, pair in enumerate(sequence):
            pair.G.register_forward_hook(lambda *args, at=(i, j), note=ran.append: note(at))
    for i, between in enumerate(getattr(model, "downsamples", [])):
        between.register_forward_pre_hook(lambda *args, at=i, note=ran.append: note(at))
    model.forward_intermediates(images(), [1], stop_early=True)
    assert ran == ([(0, 0), (0, 1)] if name == "rev_vit_small" else [(0, 0), 0, (1, 0), (1, 1)])
    ran.clear()
    model.forward_intermediates(images(), [1])
    assert len(ran) == (4 if name == "rev_vit_small" else 6)


def test_parts_of_a_sequence_run_as_the_whole_does():
    """Under its scheduler and coupling, and between all levels as itself, so that its hooks run."""
    runs, hooked = [], []

    class Spy(Naive):
        def run(self, branches, state, context):
            runs.append((len(branches), {b.coupling for b in branches}))
            return super().run(branches, state, context)

    model = build("rev_vit_small", scheduler=Spy(), coupling=ExactAdditive())
    model.blocks.register_forward_hook(lambda *args, note=hooked.append: note(len(runs)))
    model.forward_intermediates(images(), [0, 2])
    assert runs == [(n, {ExactAdditive()}) for n in (2, 4, 2)] and not hooked
    model(images())
    assert runs[3:] == [(8, {ExactAdditive()})] and hooked == [4]


@every_model
@pytest.mark.parametrize("indices", [(0, 1), (1,), (-1,), (0, -2)])
def test_gradients_through_features_are_those_of_naive(name, indices):
    found = []
    for scheduler in (Naive(), Reversible(), Checkpoint()):
        model = build(name, features_only=True, out_indices=indices, drop_path_rate=0.3, scheduler=scheduler).double()
        x = images(dtype=torch.float64).requires_grad_()
        torch.manual_seed(2)
        maps = model(x)
        sum((i + 1) * m.sin().sum() for i, m in enumerate(maps)).backward()
        assert all(p.grad is not None for p in model.parameters())  # what no map needs is gone
        found.append([*maps, x.grad, *(p.grad for p in model.parameters())])
    assert error(found[1], found[0]) < 1e-9 and error(found[2], found[0]) < 1e-9


@every_model
def test_features_say_what_they_are(name):
    full = build(name).eval()
    for indices in (None, (0, -1), (1,)):
        model = build(name, features_only=True, **({"out_indices": indices} if indices else {})).eval()
        maps = model(images())
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        assert [(16 // m.shape[2], 8 // m.shape[3]) for m in maps] == [(r, r) for r in model.feature_info.reduction()]
        want = full.forward_intermediates(images(), indices, intermediates_only=True)
        assert len(maps) == len(want) and all(map(torch.equal, maps, want))
        assert not any("head" in key for key, _ in model.named_parameters())
    model.model.set_grad_checkpointing(False)
    assert {s.scheduler for s in sequences(model)} == {Naive()}


@our_models
def test_pruning_drops_what_is_not_needed(name):
    model, x = build(name), images()
    want = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([1, 0]) == [1, 0] and len(model.feature_info) == 2
    final, got = model.forward_intermediates(x)
    assert all(map(torch.equal, got, want))
    assert final.shape[-1] == model.num_features == model.head_hidden_size == want[-1].shape[1]
    assert sum(map(len, sequences(model))) == (2 if name == "rev_vit_small" else 3)
    assert torch.equal(model(x), final) and torch.equal(model.forward_features(x), final)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (3, 3)
    kept = build(name)
    kept.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(kept(x), build(name)(x))


def test_memory_of_features_does_not_grow_with_the_blocks_between_them():
    def held(depth):
        model = build("rev_vit_small", depth=depth, features_only=True, out_indices=(depth // 2, depth - 1))
        return footprint(model, [images().repeat(100, 1, 1, 1)], model.parameters())

    shallow, deep = held(4), held(32)
    assert deep.held < 1.05 * shallow.held and deep.peak < 1.05 * shallow.peak


@our_models
def test_no_weight_decay_spares_the_tables_of_positions(name):
    model = build(name)
    spared = {
        id(p) for p in param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    }
    tables = [p for key, p in model.named_parameters() if "pos_embed" in key or "relative_position" in key]
    assert tables and all(id(p) in spared for p in tables)
