"""A batch in parts, where the maps of a hierarchical model are largest: the same numbers, in less memory."""

import copy

import pytest
import torch
from common import error, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from research.studies.footprints import MODELS, Setting, count
from revlib import Anchored, Budget, Checkpoint, ExactAdditive, KeepLast, Naive, PaReprop, Reversible
from revlib.models import RevMViT, RevSwin
from revlib.models.blocks import Blocks, parts_of
from revlib.models.stage import RevStage
from revlib.testing import footprint

SWIN = {"img_size": (10, 14), "patch_size": 2, "in_chans": 1, "embed_dim": 4, "depths": (3, 2, 1),
        "num_heads": (1, 2, 4), "window_size": 3}  # fmt: skip
MVIT = {"img_size": (16, 8), "in_chans": 1, "embed_dim": 8, "depths": (3, 2, 4)}
CASES = {"swin": (RevSwin, SWIN), "mvit": (RevMViT, MVIT)}
every_model = pytest.mark.parametrize("name", CASES)
SCHEDULERS = [Reversible(), Checkpoint(), Checkpoint(every=2), KeepLast(1), Anchored(2), Budget(fraction=0.5),
              PaReprop()]  # fmt: skip


def build(name, **changes):
    torch.manual_seed(0)
    cls, sizes = CASES[name]
    return cls(**sizes, **changes)


def images(name, batch=5, dtype=torch.float64):
    return torch.randn(batch, 1, *CASES[name][1]["img_size"], dtype=dtype)


def gradients(model, x, scheduler, amp=False):
    model.scheduler = scheduler
    for _ in range(2):  # a Budget's first pass only measures
        torch.manual_seed(1)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(leaf)
        logits.float().sin().square().sum().backward()
    return [logits.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]


@examples(20)
@given(st.sampled_from(sorted(CASES)), st.integers(1, 6), st.integers(1, 6), st.sampled_from([Naive(), Reversible()]))
def test_parts_change_nothing(name, batch, parts, scheduler):
    """Any number of parts of any batch, also more parts than images."""
    whole = build(name, parts=1).double()
    apart = build(name, parts=parts).double()
    assert repr(whole) == repr(apart) and whole.state_dict().keys() == apart.state_dict().keys()
    x = images(name, batch)
    assert error(gradients(apart, x, scheduler), gradients(whole, x, Naive())) < 1e-10


@pytest.mark.some(3)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=str)
@every_model
@pytest.mark.parametrize("amp", [False, True])
def test_in_parts_gradients_are_those_of_naive_in_every_bit_on_a_grid(scheduler, name, amp):
    noise = {"drop_rate": 0.1, "drop_path_rate": 0.3}
    model = build(name, parts=3, coupling=ExactAdditive(), **noise)
    x = images(name, 5, torch.float32)
    got, want = (gradients(model, x, s, amp) for s in (scheduler, Naive()))
    assert all(map(torch.equal, got, want))


@every_model
def test_each_part_is_run_by_itself_and_only_while_gradients_are_recorded(name):
    model, seen = build(name, parts=2, scheduler=Naive()), []
    first = model.sequences[0]
    first[0].F.register_forward_hook(lambda module, args, y, note=seen.append: note(len(args[0])))
    model(images(name, 5, torch.float32))
    assert sorted(seen) == [2, 3]
    seen.clear()
    with torch.no_grad():
        model(images(name, 5, torch.float32))
    assert seen == [5]
    assert parts_of(4, torch.zeros(3, requires_grad=True)) == 3 and parts_of(1, torch.zeros(3)) == 1
    assert [m.parts for m in model.modules() if isinstance(m, (Blocks, RevStage)) and m.parts > 1].count(2) == (
        1 if name == "swin" else 4)  # fmt: skip


@every_model
def test_copies_changes_and_schedulers_are_noticed(name):
    model = build(name, parts=2, scheduler=Reversible()).double()
    x = images(name)
    want = gradients(model, x, Reversible())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert error(gradients(twin, x, Reversible()), want) < 1e-12  # of its own parameters
    twin.sequences[0][0].F = nn.Identity()
    changed = gradients(twin, x, Naive())
    assert error(gradients(twin, x, Reversible()), changed) < 1e-10 and not torch.equal(changed[0], want[0])
    twin.sequences[0].coupling = ExactAdditive()
    assert not torch.equal(gradients(twin, x, Reversible())[0], changed[0])


def test_layers_that_look_at_a_whole_batch_are_left_whole():
    class Flat(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.flatten(0, -2)).view(x.shape)

    model = build("swin", parts=2, norm_layer=Flat)
    assert model.sequences[0].parts == 1
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="parts takes a whole number from 1 up, got"):
            build("mvit", parts=wrong)


@every_model
def test_the_peak_falls(name):
    def peak(parts):
        cls, sizes = CASES[name]
        model = cls(**{**sizes, "img_size": 64, "embed_dim": 16}, parts=parts, scheduler=Reversible())
        return footprint(lambda x: (model(x),), [torch.randn(8, 1, 64, 64)], model.parameters()).peak

    assert peak(2) < 0.8 * peak(1)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "megabytes"), [("mvit-b", 30), ("swin-t", 20)])
def test_the_goals_in_memory_are_met(model, megabytes):
    """Bytes an image at 224 pixels under Reversible(), simulated: of 32 images, with all that they share."""
    (point,) = count(model, ["reversible"], MODELS[model].depth, [32], Setting())
    assert point.peak / 32 / 1e6 < megabytes
