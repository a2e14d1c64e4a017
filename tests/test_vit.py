"""RevViT: the published composition, timm's conventions, any scheduler."""

import pytest
import torch
from common import every_scheduler
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_weight_decay
from torch import nn

from revlib import Naive, Reversible
from revlib.models import RevViT

TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}


def gradients(model, images):
    torch.manual_seed(0)
    model.zero_grad()
    model(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@every_scheduler
def test_gradients_are_those_of_naive_with_every_kind_of_dropout(scheduler):
    torch.manual_seed(0)
    model = RevViT(**TINY, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2).double()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    model.blocks.scheduler = Naive()
    want = gradients(model, images)
    model.blocks.scheduler = scheduler
    largest = max(g.norm() for g in want)
    assert all((a - b).norm() <= 1e-10 * largest for a, b in zip(gradients(model, images), want, strict=True))


def test_it_is_the_published_composition():
    torch.manual_seed(0)
    model = RevViT(**TINY, num_classes=5).eval()
    images = torch.randn(3, 1, 8, 8)
    x = model.patch_embed(images) + model.pos_embed
    x1 = x2 = x
    for F, G in model.blocks:
        x1 = x1 + F(x2)
        x2 = x2 + G(x1)
    logits = model.head(model.norm(torch.cat((x1, x2), dim=-1)).mean(dim=1))
    assert torch.equal(model(images), logits)
    assert torch.equal(model.forward_head(model.forward_features(images)), logits)
    assert model.forward_features(images).shape == (3, 16, 16)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (3, 16)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_any_image_that_the_patch_divides(rows, columns, patch):
    size = (rows * patch, columns * patch)
    model = RevViT(**{**TINY, "img_size": size, "patch_size": patch, "depth": 1})
    assert model(torch.randn(2, 1, *size)).shape == (2, 10)
    assert model.pos_embed.shape == (1, rows * columns, 8)


@pytest.mark.parametrize(("wrong", "message"), [({"img_size": 9}, "img_size .* patch_size=2, got 9x9; resize to 8x8"),
                                                ({"num_heads": 3}, "embed_dim .* num_heads=3, got 8")])  # fmt: skip
def test_sizes_that_do_not_divide_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        RevViT(**{**TINY, **wrong})


def test_timms_conventions():
    model = RevViT(**TINY).double()
    assert model.num_features == 16 and model.get_classifier().out_features == model.num_classes == 10
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 8, 8, dtype=torch.float64)).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity) and model(torch.randn(2, 1, 8, 8).double()).shape == (2, 16)
    spared = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    assert any(p is model.pos_embed for p in spared)


def test_depth_drop_path_and_scheduler_are_passed_on():
    model = RevViT(**{**TINY, "depth": 3}, drop_path_rate=0.2, scheduler=Naive())
    assert [block.F[-1].drop_prob for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert model.blocks.scheduler == Naive() and RevViT(**TINY).blocks.scheduler == Reversible()
