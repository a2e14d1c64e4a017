"""RevMViTVideo: torchvision's blocks in reversible stages, the gradients of Naive under every scheduler."""

import pytest
import torch
from common import gap, model_gradients
from torch import nn
from torchvision.models.video import mvit_v2_s

from revlib import Anchored, Budget, Checkpoint, ExactAdditive, KeepLast, Naive, PaReprop, Reversible
from revlib.models import ConcatLinear, ConcatMlp, Mean, RevMViTVideo
from revlib.testing import footprint

DEPTHS = (3, 2, 4)  # 3, 1 and 3 pairs
SIZE = (4, 16, 8)
SCHEDULERS = [Reversible(), Checkpoint(), Checkpoint(every=2), KeepLast(1), Anchored(2), Budget(fraction=0.5),
              PaReprop()]  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    sizes = {"clip_size": SIZE, "patch_size": (2, 2, 2), "num_classes": 5, "embed_dim": 8, "depths": DEPTHS}
    return RevMViTVideo(**{"kv_stride": 2, **sizes, **changes})


def clips(dtype=torch.float32, batch=2):
    return torch.randn(batch, 3, *SIZE, dtype=dtype)


@pytest.mark.some(6)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_are_those_of_naive_with_every_kind_of_dropout(scheduler, exact):
    model = build(drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.3, coupling=ExactAdditive() if exact else None)
    dtype = torch.float32 if exact else torch.float64
    model, images = model.to(dtype), clips(dtype)
    model.scheduler = Naive()
    want = model_gradients(model, images)
    model.scheduler = scheduler
    got = model_gradients(model, images, times=2)  # a Budget measures first
    assert all(torch.equal(got[n], want[n]) for n in want) if exact else gap(got, want) <= 1e-10
    assert {stage.pairs.scheduler for stage in model.blocks} == {scheduler}


@pytest.mark.parametrize("fusion", [Mean, ConcatLinear, ConcatMlp])
def test_it_is_torchvisions_model_with_reversible_stages(fusion):
    model = build(drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.3, fusion=fusion)
    images, size = clips(), (2, 8, 4)
    torch.manual_seed(1)
    x = model.pos_encoding(model.conv_proj(images).flatten(2).transpose(1, 2))
    for stage in model.blocks:
        if stage.transition is not None:
            x, size = stage.transition(x, size)
        x1 = x2 = x
        for F, G in stage.pairs:
            x1 = x1 + F.drop_path(F.attn(F.norm(x2), size)[0])
            norm, mlp, drop_path = G
            x2 = x2 + drop_path(mlp(norm(x1)))
        x = stage.fusion(x1, x2)
    want = model.head(model.norm(x)[:, 0])
    assert size == (2, 2, 1) and {type(stage.fusion) for stage in model.blocks} == {fusion}
    torch.manual_seed(1)
    assert torch.equal(model(images), want)


def test_dropout_scheduler_and_coupling_are_passed_on():
    model = build(drop_rate=0.1, proj_drop_rate=0.2, scheduler=Naive(), coupling=ExactAdditive())
    assert model.head[0].p == 0.1 and model.scheduler == Naive()
    dropouts = [m.p for m in model.blocks.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.2] * 3 * sum(DEPTHS)  # behind attention, within and behind the MLP
    assert {stage.pairs.scheduler for stage in model.blocks} == {Naive()}
    assert {stage.pairs.coupling for stage in model.blocks} == {ExactAdditive()}


def test_as_many_parameters_as_torchvisions():
    with torch.device("meta"):
        ours, theirs = RevMViTVideo(drop_path_rate=0.2), mvit_v2_s()
    shapes = [sorted(map(str, (p.shape for p in model.parameters()))) for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    rates = [F.drop_path.p for stage in ours.blocks for F, _ in stage.pairs]
    blocks = [block.stochastic_depth.p for i, block in enumerate(theirs.blocks) if i not in (1, 3, 14)]
    assert rates == blocks == [G[2].p for stage in ours.blocks for _, G in stage.pairs]
    transitions = [stage.transition.stochastic_depth.p for stage in ours.blocks if stage.transition is not None]
    assert transitions == [theirs.blocks[i].stochastic_depth.p for i in (1, 3, 14)]
    attentions = [m for m in ours.modules() if type(m).__name__ == "MultiscaleAttention"]
    assert list(map(repr, attentions)) == [repr(block.attn) for block in theirs.blocks]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip_size": (4, 16, 12)}, r"clip_size .* \(2, 8, 8\), got \(4, 16, 12\); resize to \(4, 16, 16\)"),
        ({"clip_size": (3, 16, 8)}, r"clip_size .* resize to \(4, 16, 8\)"),
        ({"num_heads": 3}, "embed_dim .* num_heads=3, got 8"),
        ({"depths": (2, 0)}, r"depths\[1\] takes a whole number from 1 up, got 0; depths is \(2, 0\)"),
        ({"depths": (1,)}, r"depths .* two in all, got \(1,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_clips_of_another_size_are_errors():
    with pytest.raises(ValueError, match=r"clips must be \(B, 3, \*\(4, 16, 8\)\), got \(2, 3, 4, 8, 16\)"):
        build()(torch.randn(2, 3, 4, 8, 16))


def test_what_is_held_does_not_grow_with_the_depth_of_a_stage():
    def held(scheduler, *depths):
        model = build(depths=depths, scheduler=scheduler)
        return footprint(lambda x: (model(x),), [clips(batch=32)], model.parameters())

    shallow, deep = held(Reversible(), 2, 3, 2), held(Reversible(), 4, 7, 5)
    samples = 9 * 2 * (128 + 16) * 4  # at most so much of streams and activations of 9 more blocks, to compare
    assert deep.held <= shallow.held + samples and deep.peak <= 1.03 * shallow.peak
    assert held(Naive(), 4, 7, 5).held > 1.5 * held(Naive(), 2, 3, 2).held


def test_mixed_precision():
    model, images = build(), clips()
    with torch.autocast("cpu", torch.bfloat16):
        got = model_gradients(model, images)
        model.scheduler = Naive()
        assert gap(got, model_gradients(model, images)) <= 0.05
