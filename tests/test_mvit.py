"""RevMViT: timm's blocks in reversible stages, the gradients of Naive under every scheduler, timm's conventions."""

import copy
import functools
import os
import re

import pytest
import timm
import torch
import typer
from common import examples, gap, model_gradients
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import RmsNorm
from timm.models import group_parameters
from timm.models.mvitv2 import MultiScaleBlock, MultiScaleVit, MultiScaleVitCfg
from timm.optim import param_groups_weight_decay
from torch import nn
from typer.testing import CliRunner

from research import train
from research.settings import config
from research.training import networks
from research.training.log import read_log
from revlib import Anchored, Budget, Checkpoint, ExactAdditive, KeepLast, Naive, PaReprop, Reversible
from revlib.models import ConcatLinear, ConcatMlp, Mean, RevMViT, minrev_mvit
from revlib.testing import footprint

DEPTHS = (3, 2, 4)  # 3, 1 and 3 pairs
TINY = {"img_size": (16, 8), "in_chans": 1, "embed_dim": 8, "depths": DEPTHS}
SCHEDULERS = [Reversible(), Checkpoint(), Checkpoint(every=2), KeepLast(1), Anchored(2), Budget(fraction=0.5),
              PaReprop()]  # fmt: skip
FUSIONS = [Mean, ConcatLinear, ConcatMlp]


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return RevMViT(**{**TINY, **changes})


def with_dropout_inside(model):
    """timm's blocks have none, so put some behind each projection and MLP."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module is not model.get_classifier():
            module.register_forward_hook(lambda m, args, y: nn.functional.dropout(y, 0.1, m.training))
    return model


@pytest.mark.some(4)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_gradients_are_those_of_naive_with_every_kind_of_dropout(scheduler):
    model = with_dropout_inside(build(drop_rate=0.1, drop_path_rate=0.3).double())
    images = torch.randn(3, 1, 16, 8, dtype=torch.float64)
    model.scheduler = Naive()
    want = model_gradients(model, images)
    model.scheduler = scheduler
    assert gap(model_gradients(model, images, times=2), want) <= 1e-10  # a Budget measures first
    assert all(g.count_nonzero() for name, g in want.items() if not name.startswith("head"))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
def test_exact_streams_give_the_bits_of_naive(scheduler):
    model = with_dropout_inside(build(drop_path_rate=0.3, coupling=ExactAdditive()))
    images = torch.randn(3, 1, 16, 8)
    model.scheduler = Naive()
    want = model_gradients(model, images)
    model.scheduler = scheduler
    got = model_gradients(model, images, times=2)
    assert all(torch.equal(got[name], want[name]) for name in want)


@examples(12)
@given(data=st.data())
def test_the_gradients_of_any_sizes(data):
    depths = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    patch, rows, columns = (data.draw(st.integers(1, 2)) for _ in range(3))
    size = (rows * patch * 2 ** (len(depths) - 1), columns * patch * 2 ** (len(depths) - 1))
    model = build(img_size=size, patch_size=patch, depths=depths, num_heads=data.draw(st.sampled_from([1, 2])),
                  kv_stride=data.draw(st.integers(1, 4)), class_token=data.draw(st.booleans()),
                  fusion=data.draw(st.sampled_from(FUSIONS)), scheduler=Naive()).double()  # fmt: skip
    images = torch.randn(2, 1, *size, dtype=torch.float64)
    width, patches = 8 * 2 ** (len(depths) - 1), rows * columns + model.num_prefix_tokens
    assert model.forward_features(images).shape == (2, patches, width) and model(images).shape == (2, 10)
    want = model_gradients(model, images)
    model.scheduler = Reversible()
    assert gap(model_gradients(model, images), want) <= 1e-10


def to_timm(name):
    """The name of a parameter in timm's MultiScaleVit: there a transition is block 0."""
    name = name.replace(".transition.", ".blocks.0.")
    pair = re.compile(r"stages\.(\d+)\.pairs\.(\d+)\.(F\.norm|F\.attn|G\.0|G\.1)")
    parts = {"F.norm": "norm1", "F.attn": "attn", "G.0": "norm2", "G.1": "mlp"}
    return pair.sub(lambda m: f"stages.{m[1]}.blocks.{int(m[2]) + (m[1] != '0')}.{parts[m[3]]}", name)


def timm_twin(model, drop_path_rate=0.0, class_token=False):
    strides = ((1, 1), (2, 2), (2, 2))
    cfg = MultiScaleVitCfg(DEPTHS, 8, 1, use_cls_token=class_token, stride_q=strides, stride_kv_adaptive=(2, 2),
                           patch_kernel=(3, 3), patch_stride=(2, 2), patch_padding=(1, 1))  # fmt: skip
    twin = MultiScaleVit(cfg, (16, 16), 1, num_classes=10, drop_rate=0.1, drop_path_rate=drop_path_rate)
    twin.load_state_dict({to_timm(name): tensor for name, tensor in model.state_dict().items()})
    return twin


def by_hand(twin, images):
    """In one piece: compare with parts=1."""
    x, size = twin.patch_embed(images)
    if twin.cls_token is not None:
        x = torch.cat([twin.cls_token.expand(len(x), -1, -1), x], dim=1)
    for number, stage in enumerate(twin.stages):
        blocks = list(stage.blocks)
        if number:
            x, size = blocks.pop(0)(x, size)
        x1 = x2 = x
        for block in blocks:
            x1 = x1 + block.drop_path1(block.attn(block.norm1(x2), size)[0])
            x2 = x2 + block.drop_path2(block.mlp(block.norm2(x1)))
        x = (x1 + x2) / 2
    return twin.forward_head(twin.norm(x))


@pytest.mark.parametrize("class_token", [False, True])
def test_it_is_timms_model_with_reversible_stages(class_token):
    model = build(drop_rate=0.1, drop_path_rate=0.3, class_token=class_token, parts=1)
    twin = timm_twin(model, 0.3, class_token)
    images = torch.randn(3, 1, 16, 8)
    torch.manual_seed(1)
    want = by_hand(twin, images)
    want.square().sum().backward()
    torch.manual_seed(1)
    got = model(images)
    assert torch.equal(got, want)
    got.square().sum().backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    assert gap({to_timm(name): p.grad for name, p in model.named_parameters()}, theirs) <= 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_f_and_g_are_those_of_a_timm_block(stage):
    model, width, size = build(drop_path_rate=0.5), 8 * 2**stage, (8 // 2**stage, 4 // 2**stage)
    *_, (F, G) = model.stages[stage].pairs
    rate = torch.linspace(0, 0.5, sum(DEPTHS))[sum(DEPTHS[: stage + 1]) - 1].item()
    block = MultiScaleBlock(width, width, 2**stage, (max(size),) * 2, drop_path=rate, kernel_q=(3, 3),
                            kernel_kv=(3, 3), stride_kv=(2 if stage == 0 else 1,) * 2, has_cls_token=False,
                            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))  # fmt: skip
    block.norm1.load_state_dict(F.norm.state_dict())
    block.attn.load_state_dict(F.attn.state_dict())
    block.norm2.load_state_dict(G[0].state_dict())
    block.mlp.load_state_dict(G[1].state_dict())
    x = torch.randn(16, size[0] * size[1], width)
    for ours, theirs in (F, lambda x: block.drop_path1(block.attn(block.norm1(x), list(size))[0])), (
        G, lambda x: block.drop_path2(block.mlp(block.norm2(x)))):  # fmt: skip
        torch.manual_seed(2)
        want = theirs(x)
        torch.manual_seed(2)
        assert torch.equal(ours(x), want) and (want == 0).all((1, 2)).any()  # a sample was dropped


@pytest.mark.parametrize("fusion", FUSIONS)
def test_both_streams_are_fused_after_every_stage(fusion):
    model, seen = build(fusion=fusion, parts=1).eval(), []
    for stage in model.stages:
        assert type(stage.fusion) is fusion
        stage.pairs.register_forward_hook(lambda module, args, streams, note=seen.append: note(streams))
        stage.fusion.register_forward_hook(lambda module, args, fused, note=seen.append: note((args, fused)))
        if stage.transition is not None:
            stage.transition.register_forward_pre_hook(lambda module, args, note=seen.append: note(args[0]))
    features = model.forward_features(torch.randn(2, 1, 16, 8))
    streams, fusions, entered = seen[0::3], seen[1::3], seen[2::3]
    assert [s.shape[1:] for s in entered] == [(32, 8), (8, 16)] and len(streams) == len(fusions) == 3
    assert all(a is x and b is y and not torch.equal(x, y)
               for (a, b), ((x, y), _) in zip(streams, fusions, strict=True))  # fmt: skip
    assert all(x is fused for x, (_, fused) in zip(entered, fusions, strict=False))
    assert torch.equal(features, model.norm(fusions[-1][1]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"img_size": 18}, "img_size .* divisible by 8 .*patch_size=2.* got 18x18; resize to 24x24"),
        ({"img_size": (8, 4)}, "img_size .* got 8x4; resize to 8x8"),
        ({"num_heads": 3}, "embed_dim .* num_heads=3, got 8"),
        ({"depths": (2, 0)}, r"depths\[1\] takes a whole number from 1 up, got 0; depths is \(2, 0\)"),
        ({"depths": ()}, r"depths .* got \(\)"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


@pytest.mark.parametrize("size", [(8, 16), (32, 16)])
def test_images_of_another_size_are_errors(size):
    with pytest.raises(ValueError, match=f"give 8x4 patches, got {size[0] // 2}x{size[1] // 2}.* img_size"):
        build()(torch.randn(2, 1, *size))


def test_timms_conventions():
    model = build().double()
    images = torch.randn(2, 1, 16, 8, dtype=torch.float64)
    assert model.num_features == model.head_hidden_size == 32 and model.num_classes == 10
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 32)
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
    assert [x.shape[1:] for x in model.forward_intermediates(images, intermediates_only=True)] == [
        (8, 8, 4), (16, 4, 2), (32, 2, 1)]  # fmt: skip
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3 and model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model(images).shape == (2, 32)
    tokens = build(class_token=True)
    spared = {
        id(p) for p in param_groups_weight_decay(tokens, no_weight_decay_list=tokens.no_weight_decay())[0]["params"]
    }
    tables = [id(p) for name, p in tokens.named_parameters() if "rel_pos" in name or "cls_token" in name]
    assert len(tables) == 2 * sum(DEPTHS) + 1 and spared.issuperset(tables)
    for coarse in (False, True):
        ours, theirs = (group_parameters(m, m.group_matcher(coarse)) for m in (build(), timm_twin(build())))
        assert {k: sorted(map(to_timm, names)) for k, names in ours.items()} == {
            k: sorted(names) for k, names in theirs.items()}  # fmt: skip
    model.set_grad_checkpointing()
    assert {stage.pairs.scheduler for stage in model.stages} == {Reversible()}
    model.set_grad_checkpointing(False)
    assert {stage.pairs.scheduler for stage in model.stages} == {Naive()}


def test_depths_drop_path_coupling_and_scheduler_are_passed_on():
    budget = Budget(bytes=1000)
    model = build(drop_path_rate=0.8, scheduler=budget, coupling=ExactAdditive())
    assert [len(stage.pairs) for stage in model.stages] == [3, 1, 3]
    assert all(s.pairs.scheduler is budget and s.pairs.coupling == ExactAdditive() for s in model.stages)
    rates = [getattr(m, "drop_prob", 0.0) for name, m in model.named_modules()
             if name.endswith(("drop_path", "G.2", "drop_path1", "drop_path2"))]  # fmt: skip
    assert rates == pytest.approx([0.1 * (i // 2) for i in range(18)])
    model.scheduler = other = Budget(fraction=0.1)
    assert model.scheduler is other and all(stage.pairs.scheduler is other for stage in model.stages)
    assert {stage.pairs.scheduler for stage in build().stages} == {Reversible()}


def test_what_is_held_does_not_grow_with_the_depth_of_a_stage():
    def held(scheduler, *depths):
        model = build(depths=depths, scheduler=scheduler)
        return footprint(lambda x: (model(x),), [torch.randn(64, 1, 16, 8)], model.parameters())

    shallow, deep = held(Reversible(), 2, 3, 2), held(Reversible(), 5, 9, 7)
    samples = 14 * 2 * (128 + 16) * 4  # at most so much of streams and activations of 14 more blocks, to compare
    assert deep.held <= shallow.held + samples and deep.peak <= 1.03 * shallow.peak
    assert held(Naive(), 5, 9, 7).held > 2 * held(Naive(), 2, 3, 2).held


def test_mixed_precision_and_copies():
    model, images = build(drop_path_rate=0.3), torch.randn(3, 1, 16, 8)

    def mixed(scheduler):
        twin = copy.deepcopy(model)
        twin.scheduler = scheduler
        with torch.autocast("cpu", torch.bfloat16):
            return model_gradients(twin, images)

    want = mixed(Naive())
    assert gap(mixed(Reversible()), want) <= 0.02 and 0 < gap(model_gradients(model, images), want) <= 0.2


@pytest.mark.parametrize(("name", "depths"), [("mvitv2_tiny", (1, 2, 5, 2)), ("mvitv2_base", (2, 3, 16, 3))])
def test_as_many_parameters_as_timms(name, depths):
    with torch.device("meta"):
        ours, theirs = RevMViT(224, 4, 3, 1000, 96, depths, kv_stride=4), timm.create_model(name)
    assert {to_timm(n): p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()}  # fmt: skip
    assert repr(ours.patch_embed) == repr(theirs.patch_embed)


@pytest.fixture
def _undo(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("_undo")
def test_it_trains_from_the_command_line(tmp_path):
    args = f"--model mvit --embed-dim 8 --limit-train 96 --limit-test 40 --epochs 1 --device cpu --out {tmp_path}"
    result = CliRunner().invoke(train.app, args.split())
    log = read_log(tmp_path / "log.jsonl")
    assert result.exit_code == 0 and len(log.rows) == 1 and log.rows[0]["train_loss"] < 3
    flags = {"model": "mvit", "patch_size": 2, "embed_dim": 8, "depth": 4, "num_heads": 1}
    assert {key: log.header["config"][key] for key in flags} == flags
    result = CliRunner().invoke(train.app, [*args.split(), "--overwrite", "--patch-size", "4"])
    assert result.exit_code == 2 and "--patch-size" in result.output


@pytest.mark.parametrize(("depth", "pairs"), [(1, [1]), (2, [1, 0]), (3, [1, 1]), (4, [1, 1, 0]), (7, [1, 1, 3])])
def test_depth_counts_the_blocks_of_all_stages(depth, pairs):
    model = networks.mvit(depth, embed_dim=8, scheduler=Naive())
    assert [len(stage.pairs) for stage in model.stages] == pairs
    assert config.MODEL_DEFAULTS["mvit"]["depth"] == sum(RevMViT.__init__.__defaults__[5])


def test_the_model_brings_its_defaults_and_flags_win():
    seen: list[config.Config] = []
    app = typer.Typer()
    app.command()(config.flags(seen.append))
    for args in ["--model mvit --dataset cifar10", "--dataset cifar10 --patch-size 4 --model mvit"]:
        assert CliRunner().invoke(app, args.split()).exit_code == 0
    minrev = config.defaults("cifar10", "mvit")
    assert seen[0] == config.Config(dataset="cifar10", model="mvit", **minrev)
    assert seen[1] == config.Config(dataset="cifar10", model="mvit", **{**minrev, "patch_size": 4})


def test_under_autocast_streams_stay_in_full_precision():
    model, seen = RevMViT(), []
    for stage in model.stages:
        stage.pairs.register_forward_pre_hook(lambda _, streams, note=seen.extend: note(s.dtype for s in streams))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32))
    assert seen == [torch.float32] * 6


def test_transitions_and_fusions_are_checkpointed_unless_all_is_kept():
    """So that a stage holds its two streams and what enters its transition: 64 images of 128 patches, 8 channels."""
    model = build(depths=(1, 1, 1), fusion=ConcatMlp, scheduler=Reversible())
    images = torch.randn(64, 1, 16, 8)
    held = footprint(lambda x: (model(x),), [images], model.parameters()).held
    model.scheduler = Naive()
    assert held < 0.2 * footprint(lambda x: (model(x),), [images], model.parameters()).held


def test_under_function_transforms():
    """They refuse checkpointing, so transitions are kept there."""
    model, images = build(scheduler=Reversible()).double(), torch.randn(2, 1, 16, 8, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images,)).square().sum())(parameters)
    model(images).square().sum().backward()
    assert all(torch.allclose(found[name], p.grad, rtol=1e-9) for name, p in parameters.items())


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ({"device": "meta"}, lambda block: {p.device.type for p in block.parameters()} == {"meta"}),
        ({"dtype": torch.bfloat16}, lambda block: {p.dtype for p in block.parameters()} == {torch.bfloat16}),
        ({"act_layer": "relu"}, lambda block: isinstance(block.mlp.act, nn.ReLU)),
        ({"norm_layer": "rmsnorm"}, lambda block: isinstance(block.norm1, RmsNorm)),
        ({"class_token": True}, lambda block: block.attn.has_cls_token),
        ({"img_size": (16, 8)}, lambda block: len({len(block.attn.rel_pos_h), len(block.attn.rel_pos_w)}) == 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_transitions_of_minrevs_network_keep_the_settings_of_the_model(setting, seen):
    """Its transitions are put in after the model is built, in place of others."""
    sizes = {"img_size": 16, "embed_dim": 8, **setting}
    model = minrev_mvit(**sizes)
    rebuilt = [stage.transition for stage in model.stages[1:]]
    assert len(rebuilt) == 2 and all(map(seen, rebuilt))
    rows, columns = sizes["img_size"] if isinstance(sizes["img_size"], tuple) else (16, 16)
    images = torch.randn(2, 3, rows, columns, device=setting.get("device"), dtype=setting.get("dtype"))
    assert model(images).shape == (2, 10)
