"""RevSwin: timm's blocks in reversible stages, windows of every size, any scheduler."""

from functools import partial
from itertools import chain

import pytest
import test_train
import torch
from common import error, examples, grads
from hypothesis import given
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.optim import param_groups_weight_decay
from torch import nn

from research.training import networks
from revlib import Anchored, Budget, Checkpoint, ExactAdditive, KeepLast, Naive, PaReprop, Reversible
from revlib.models import RevSwin
from revlib.models.fusion import ConcatLinear, ConcatMlp, Mean
from revlib.testing import footprint

# Maps of 5x7, 3x4 and 2x2 patches: padded to windows, padded to merge, and covered by a window.
TINY = {"img_size": (10, 14), "patch_size": 2, "in_chans": 1, "embed_dim": 4, "depths": (3, 2, 1),
        "num_heads": (1, 2, 4), "window_size": 3}  # fmt: skip
NOISY = {"drop_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}

SCHEDULERS = [Reversible(), Checkpoint(), Checkpoint(every=2), KeepLast(1), Anchored(2), Budget(fraction=0.5),
              PaReprop()]  # fmt: skip
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)

_leave_no_trace = test_train._leave_no_trace  # of the training script


def gradients(model, scheduler, images, amp=False, seed=0):
    """Outputs, and gradients of images and parameters; from the second step, as a Budget's first only measures."""
    model.scheduler = scheduler
    for _ in range(2):
        torch.manual_seed(seed)
        model.zero_grad()
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(x)
        logits.float().sin().sum().backward()
    return [logits.detach(), *grads(x, model)]


@pytest.mark.some(7)
@every_scheduler
@pytest.mark.parametrize("fusion", [Mean, ConcatLinear, ConcatMlp])
def test_gradients_are_those_of_naive_with_every_kind_of_dropout(scheduler, fusion):
    torch.manual_seed(0)
    model, images = RevSwin(**TINY, **NOISY, fusion=fusion).double(), torch.randn(3, 1, 10, 14).double()
    assert error(gradients(model, scheduler, images), gradients(model, Naive(), images)) < 1e-10


@pytest.mark.some(6)
@every_scheduler
@pytest.mark.parametrize("amp", [False, True])
def test_on_a_grid_gradients_are_bit_for_bit_those_of_naive(scheduler, amp):
    torch.manual_seed(0)
    model, images = RevSwin(**TINY, **NOISY, coupling=ExactAdditive()), torch.randn(3, 1, 10, 14)
    got, want = (gradients(model, s, images, amp) for s in (scheduler, Naive()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@examples(25)
@given(st.tuples(st.integers(1, 13), st.integers(1, 13)), st.tuples(st.integers(1, 13), st.integers(1, 13)),
       st.integers(1, 3), st.tuples(st.integers(1, 5), st.integers(1, 5)),
       st.lists(st.integers(1, 3), min_size=1, max_size=3))  # fmt: skip
def test_any_image_in_any_windows_in_any_depths(img_size, size, patch, window, depths):
    torch.manual_seed(0)
    model = RevSwin(img_size, patch, 1, 5, 4, depths, [2] * len(depths), window, **NOISY).double()
    images = torch.randn(2, 1, *size, dtype=torch.float64)
    got, want = (gradients(model, scheduler, images) for scheduler in (Reversible(), Naive()))
    assert got[0].shape == (2, 5) and error(got, want) < 1e-9
    half = 2 ** (len(depths) - 1) * patch
    assert model.forward_features(images).shape[1:3] == (-(-size[0] // half), -(-size[1] // half))


@examples(25)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_patches_see_their_window_which_every_other_block_shifts(grid, window):
    """By perturbing each patch: what changes is the window, or the part of it that the shift did not carry around."""
    torch.manual_seed(0)
    model = RevSwin(grid, 1, embed_dim=4, depths=(3,), num_heads=(2,), window_size=window).double().eval()
    plain = torch.randn(4).double().expand(1, *grid, 4)
    x = plain.repeat(grid[0] * grid[1], 1, 1, 1).flatten(1, 2)
    x.diagonal(dim1=0, dim2=1).add_(torch.randn(4, len(x)))
    for i, (F, _) in enumerate(model.stages[0]):
        rows, columns = (
            [window_of(r, *sizes, i % 2) for r in range(sizes[0])] for sizes in zip(grid, window, strict=True)
        )
        windows = [(r, c) for r in rows for c in columns]
        changed = (F(x.unflatten(1, grid)) - F(plain)).flatten(1, 2).abs().amax(-1) > 1e-12
        assert changed.tolist() == [[a == b for b in windows] for a in windows]


def window_of(position, side, window, shifted):
    window = min(window, side)
    shift = window // 2 if shifted and window < side else 0
    position, padded = (position - shift) % side, -(-side // window) * window
    return position // window, position >= padded - shift


def test_pairs_are_the_branches_of_timms_blocks():
    torch.manual_seed(0)
    model, x = RevSwin(**TINY, **NOISY), torch.randn(3, 5, 7, 4)
    for i, (F, G) in enumerate(model.stages[0]):
        block = SwinTransformerBlock(4, (5, 7), 1, window_size=3, shift_size=i % 2, proj_drop=0.1, attn_drop=0.1,
                                     drop_path=0.3 * i / 5)  # fmt: skip
        mlp = {f"{name}.{key}": value for name, part in zip(["norm2", "mlp"], G, strict=False)
               for key, value in part.state_dict().items()}  # fmt: skip
        block.load_state_dict({**F.state_dict(), **mlp})
        for ours, theirs in [(F, lambda x, b=block: b.drop_path1(b._attn(b.norm1(x)))),
                             (G, lambda x, b=block: b.drop_path2(b.mlp(b.norm2(x))))]:  # fmt: skip
            got, want = (torch.random.manual_seed(i) and f(x) for f in (ours, theirs))
            assert torch.equal(got, want)


@pytest.mark.parametrize("fusion", [Mean, ConcatMlp])
def test_it_is_the_published_composition(fusion):
    torch.manual_seed(0)
    model, images = RevSwin(**TINY, fusion=fusion).eval(), torch.randn(3, 1, 10, 14)
    x, transitions = model.patch_embed(images), list(zip(model.fusions, model.downsamples, strict=True))
    for stage in model.stages:
        x1 = x2 = x
        for F, G in stage:
            x1 = x1 + F(x2)
            x2 = x2 + G(x1)
        if transitions:
            fuse, downsample = transitions.pop(0)
            x = downsample(fuse(x1, x2))
    logits = model.head(model.norm(torch.cat((x1, x2), dim=-1)).mean(dim=(1, 2)))
    assert not transitions and [type(module) for module in model.fusions] == [fusion] * 2
    assert torch.allclose(model(images), logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
    assert model.forward_features(images).shape == (3, 2, 2, 32)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (3, 32)


def test_its_parameters_are_swins_but_for_the_head_on_both_streams():
    sizes = {**TINY, "img_size": (24, 40), "num_classes": 5, "mlp_ratio": 3.0}
    ours, theirs = RevSwin(**sizes), SwinTransformer(**sizes)
    assert len(ours.state_dict()) == len(list(ours.parameters()))  # none is in F and G
    ours.norm, ours.head, theirs.norm, theirs.head = (nn.Identity() for _ in range(4))
    assert [p.shape for p in theirs.patch_embed.parameters()] == [p.shape for p in ours.patch_embed.parameters()]
    found, want = (sorted((*p.shape, p.std().item() > 0.01) for p in m.parameters()) for m in (ours, theirs))
    assert found == want


def test_every_norm_is_of_the_kind_given():
    model = RevSwin(**TINY, fusion=ConcatLinear, norm_layer=partial(nn.LayerNorm, eps=1e-3))
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [1e-3] * (1 + 2 * 6 + 2 * 2 + 1)  # of patches, pairs, transitions, the head


def test_rates_rise_over_all_blocks_and_every_stage_has_the_scheduler_and_coupling():
    budget = Budget(fraction=0.5)
    model = RevSwin(**TINY, **NOISY, coupling=ExactAdditive(), scheduler=budget)
    pairs = list(chain(*model.stages))
    assert [F.drop_path1.drop_prob for F, _ in pairs[1:]] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])
    assert [G[2].drop_prob for _, G in pairs[1:]] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])
    assert [(F.attn.attn_drop.p, F.attn.proj_drop.p, G[1].drop1.p) for F, G in pairs] == [(0.1, 0.1, 0.1)] * 6
    assert model.head_drop.p == 0.2
    assert all(stage.scheduler is budget and stage.coupling == ExactAdditive() for stage in model.stages)
    model.scheduler = Naive()
    assert [stage.scheduler for stage in model.stages] == [Naive()] * 3 and model.scheduler == Naive()
    assert RevSwin(**TINY).scheduler == Reversible()


def test_windows_shrink_to_the_map_of_their_stage():
    assert [stage[0].F.window_size for stage in RevSwin(**TINY).stages] == [(3, 3), (3, 3), (2, 2)]


def test_activation_memory_does_not_grow_with_the_depth_of_any_stage():
    def memory(*depths):
        model = RevSwin(32, 2, 1, embed_dim=16, depths=depths, num_heads=(1, 2))
        return footprint(lambda x: [model(x)], [torch.randn(4, 1, 32, 32)], [*model.parameters(), *model.buffers()])

    shallow = memory(2, 2)
    for depths in [(8, 2), (2, 8)]:
        found = memory(*depths)
        assert found.held <= 1.03 * shallow.held and found.peak <= 1.03 * shallow.peak
    unit = 4 * 4 * 16 * 16 * 16  # a stream of the first stage
    assert shallow.held < 8.5 * unit and shallow.peak < 22 * unit


def test_under_autocast_streams_stay_in_full_precision():
    torch.manual_seed(0)
    model, images, seen = RevSwin(**TINY), torch.randn(3, 1, 10, 14), []
    for F, G in chain(*model.stages):
        for branch in (F, G):
            branch.register_forward_pre_hook(lambda _, args, note=seen.append: note(args[0].dtype))
    low, full = (gradients(model, Reversible(), images, amp) for amp in (True, False))
    assert set(seen) == {torch.float32} and low[0].dtype == torch.bfloat16
    assert error(low, full) < 0.2 and not torch.equal(low[1], full[1])


@pytest.mark.parametrize(("wrong", "message"), [
    ({"depths": (3, 2)}, r"as many numbers as there are stages, got depths=\(3, 2\), num_heads=\(1, 2, 4\)"),
    ({"depths": (), "num_heads": ()}, r"depths takes a list with a whole number for each stage, got \(\)"),
    ({"depths": (3, 0, 1)}, r"depths\[1\] takes a whole number from 1 up, got 0; depths is \(3, 0, 1\)"),
    ({"window_size": (3, 0)}, r"window_size\[1\] takes a whole number from 1 up, got 0"),
    ({"num_heads": (1, 3, 4)}, r"num_heads must divide the widths \[4, 8, 16\] .* got \(1, 3, 4\)"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        RevSwin(**{**TINY, **wrong})


def test_timms_conventions():
    model, images = RevSwin(**TINY).double(), torch.randn(2, 1, 10, 14).double()
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 32
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model.get_classifier() is model.head and model(images).shape == (2, 32)
    spared = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    assert all(any(F.attn.relative_position_bias_table is p for p in spared) for F, _ in chain(*model.stages))


@pytest.mark.parametrize(("depth", "depths"), [(1, [1]), (4, [2, 2]), (5, [2, 3])])
def test_the_script_trains_it(tmp_path, depth, depths):
    args = ["--model", "swin", "--patch-size", 1, "--epochs", 1, "--depth", depth]
    log = test_train.train_tiny(tmp_path, *args)
    assert len(log.rows) == 1 and 1.5 < log.rows[0]["train_loss"] < 3
    model = networks.MODELS["swin"](depth=depth, num_heads=2, img_size=8, embed_dim=16)
    assert [len(stage) for stage in model.stages] == depths
    assert [stage[0].F.attn.num_heads for stage in model.stages] == [2, 4][: len(depths)]
