"""Converted networks: close to the original by as much as documented, exactly reversible, and the original again."""

import copy
import itertools

import pytest
import torch
from common import error, grads, mlp
from timm.models import VisionTransformer
from timm.models import vision_transformer as timm_vit
from torch import nn

from revlib import Anchored, Budget, Checkpoint, KeepLast, Naive, Reversible, ReversibleSequence, convert
from revlib.testing import assert_inverts, assert_same_gradients, footprint

TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
SCHEDULERS = [
    Reversible(tolerance=0),
    Checkpoint(),
    Checkpoint(every=2),
    KeepLast(3),
    Anchored(4),
    Budget(fraction=0.5),
]


def tiny(depth=4, **kwargs):
    """Of random weights large enough that branches matter."""
    torch.manual_seed(0)
    model = VisionTransformer(**(TINY | kwargs), depth=depth)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def images(n=3, **kwargs):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1), **kwargs)


def gradients(model):
    torch.manual_seed(2)
    model.zero_grad()
    model(images(dtype=next(model.parameters()).dtype)).float().square().sum().backward()
    return grads(model)


def plain(branches, x):
    for f in branches:
        x = x + f(x)
    return x


# ---------------------------------------------------------------------------------------------- closeness
@pytest.mark.parametrize(
    ("depth", "group", "momentum", "bound"), [(4, 8, 2**-20, 1e-3), (12, 8, 2**-15, 2e-3), (12, 4, 2**-6, 0.05)]
)
def test_logits_are_as_close_as_documented(depth, group, momentum, bound):
    model = tiny(depth)
    converted = convert.vit(model, group=group)
    assert converted.blocks.momentum == momentum
    assert 0 < error(converted(images()), model(images())) < bound


def test_the_error_is_proportional_to_the_momentum():
    torch.manual_seed(0)
    branches = [mlp(4) for _ in range(6)]
    x = torch.randn(5, 4, dtype=torch.float64)
    for f in branches:
        f.double()
    want = plain(branches, x)
    fine = {"resolution": 2.0**-30, "limit": 16.0}
    errors = [error(convert.residual(branches, momentum=2.0**-k, **fine)(x), want) for k in (3, 5, 7)]
    assert errors[2] > 1e-5
    for a, b in itertools.pairwise(errors):
        assert 3 < a / b < 5.5  # a quarter each time


@pytest.mark.parametrize("count", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_it_is_the_documented_recurrence(count, group):
    torch.manual_seed(0)
    branches = [mlp(4).double() for _ in range(count)]
    x = y = torch.randn(5, 4, dtype=torch.float64)
    stack = convert.residual(branches, group=group, resolution=2.0**-30, limit=64.0, momentum=2.0**-2)
    v = [None] * group
    for i, f in enumerate(branches):
        v[i % group] = f(y) if i < group else v[i % group] / 4 + 0.75 * f(y)
        y = y + v[i % group]
    assert error(stack(x), y) < 1e-8


# ---------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_naive_bit_for_bit(dtype):
    kinds = {"qk_norm": True, "init_values": 0.5, "drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    converted = convert.vit(tiny(6, **kinds).to(dtype), group=2).train()
    converted.blocks.scheduler = Naive()
    want = gradients(converted)
    assert all(w.abs().sum() > 0 for w in want)
    for scheduler in SCHEDULERS:
        converted.blocks.scheduler = scheduler
        assert all(map(torch.equal, gradients(converted), want)), scheduler


def test_dropout_and_stochastic_depth_are_drawn_like_the_original():
    kinds = {"qk_norm": True, "init_values": 0.5, "drop_path_rate": 0.5, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = tiny(2, **kinds).train()
    found = []
    for net in (convert.vit(model), model):
        torch.manual_seed(3)
        found.append(net(images(8)))
    assert error(*found) < 1e-3


def test_under_autocast_too():
    converted = convert.vit(tiny(6), group=2)
    found = []
    for scheduler in (Naive(), Reversible(tolerance=0)):
        converted.blocks.scheduler = scheduler
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(converted))
    assert all(map(torch.equal, *found))


def test_gradients_are_near_the_original():
    model = tiny(4)
    assert error(gradients(convert.vit(model)), gradients(model)) < 5e-3


@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_sequence_is_a_lawful_stack(group):
    torch.manual_seed(0)
    stack = convert.residual([mlp(4) for _ in range(7)], group=group)
    streams = [torch.zeros(5, 4, dtype=torch.float64) for _ in range(group)]
    streams.append(torch.randn(5, 4).double().requires_grad_())
    assert isinstance(stack.sequence, ReversibleSequence)
    context = {"dtype": torch.float32}
    assert_same_gradients(stack.sequence, *streams, context=context, rtol=0.0)
    assert_inverts(stack.sequence, *streams, context=context, rtol=0.0)


def test_inversion_is_exact_at_every_depth_and_momentum_that_is_allowed():
    torch.manual_seed(0)
    for depth in (2, 3, 8, 16, 31):
        stack = convert.residual([mlp(4) for _ in range(depth)], group=1).sequence
        assert_inverts(
            stack, torch.zeros(64, 4).double(), torch.randn(64, 4).double(), context={"dtype": torch.float32}, rtol=0.0
        )


def test_one_bit_more_would_be_lost():
    def stack():
        torch.manual_seed(0)
        return convert.residual([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(16)], group=1)

    good = stack()
    assert good.momentum == 2.0**-2
    rounded = stack()
    for step in rounded.sequence:
        if isinstance(step.coupling, convert.Momentum):
            step.coupling = convert.Momentum(2.0**-8, 512.0, 2.0**-14)
    state = torch.zeros(64, 4).double(), torch.randn(64, 4).double()
    with pytest.raises(AssertionError, match="does not invert"):
        assert_inverts(rounded.sequence, *state, context={"dtype": torch.float32}, rtol=1e-3)


def test_beyond_the_limit_backward_raises_and_names_the_step():
    torch.manual_seed(0)
    stack = convert.residual([mlp(4) for _ in range(6)], limit=1.0)
    total = stack(2.0**12 * torch.randn(5, 4)).square().mean()
    with pytest.raises(
        RuntimeError, match=r"step \d+ .* magnitude of \d+.*, beyond the limit .* normalise what the function returns"
    ):
        total.backward()


def test_memory_is_flat_in_depth():
    def peak(depth):
        stack = convert.residual([mlp(64) for _ in range(depth)], group=2)
        return footprint(lambda x: (stack(x),), [torch.randn(1024, 64, requires_grad=True)], stack.parameters())

    few, many = peak(6), peak(24)
    assert many.held < few.held * 1.05 and many.peak < few.peak * 1.05


# ---------------------------------------------------------------------------------------------- a timm model
def test_features_pooling_and_classifier_work():
    model = tiny(4, class_token=True, reg_tokens=2, dynamic_img_size=True, pre_norm=True)
    converted = convert.vit(model)
    assert error(converted.forward_features(images()), model.forward_features(images())) < 1e-3
    assert converted.forward_features(images()).shape == (3, 19, 16)
    wide = torch.randn(2, 1, 8, 12)
    assert error(converted(wide), model(wide)) < 1e-3
    converted.reset_classifier(7, global_pool="avg")
    assert converted(images()).shape == (3, 7)
    assert converted.forward_features(images()).dtype == torch.float32
    want = model.get_intermediate_layers(images(), n=2)
    assert error(converted.get_intermediate_layers(images(), n=2), want) == 0  # the original path, as documented


def test_pruned_blocks_stay_reversible():
    model, converted = tiny(4), convert.vit(tiny(4))
    converted.prune_intermediate_layers([1])
    model.prune_intermediate_layers([1])
    assert isinstance(converted.blocks, convert.ReversibleResidual) and len(converted.blocks) == 2
    assert error(converted(images()), model(images())) < 1e-3


def test_state_dict_round_trip_and_restoring():
    model = tiny(4)
    converted = convert.vit(model)
    before = copy.deepcopy(model.state_dict())
    assert list(converted.state_dict()) == list(before)
    assert len(list(converted.modules())) == len(list(model.modules()))  # each once
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    gradients(converted)
    optimizer.step()
    assert all(map(torch.equal, model.state_dict().values(), before.values()))  # a copy
    model.load_state_dict(converted.state_dict())
    logits = converted(images())
    assert error(logits, model(images())) < 1e-3
    restored = convert.restore(converted)
    assert type(restored.blocks) is nn.Sequential
    assert torch.equal(restored(images()), model(images()))


def test_in_place_and_copies():
    model = tiny(4)
    assert convert.vit(model, inplace=True) is model
    other, x = copy.deepcopy(model), torch.randn(1, 2, 16)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.zero_()
    assert error(other.blocks(x), x) > 0.1
    assert torch.equal(model.blocks(x), x)


def test_converting_again_changes_the_settings():
    again = convert.vit(convert.vit(tiny(12), group=2), group=8)
    assert again.blocks.momentum == 2.0**-15
    assert error(again(images()), tiny(12)(images())) < 2e-3


def test_checkpointing_of_the_original_is_switched_off():
    model = tiny(4)
    model.set_grad_checkpointing()
    converted = convert.vit(model)
    assert model.grad_checkpointing and not converted.grad_checkpointing


def test_a_replaced_part_is_used():
    converted = convert.vit(tiny(4))
    before = converted(images())
    converted.blocks.scheduler = Checkpoint()
    converted.blocks[2].mlp = nn.Identity()
    assert error(converted(images()), before) > 1e-2
    assert converted.blocks.scheduler == Checkpoint()


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (timm_vit.ResPostBlock, "post-norm"),
        (timm_vit.ParallelScalingBlock, "parallel"),
        (timm_vit.ParallelThingsBlock, "parallel"),
    ],
)
def test_other_blocks_are_refused(block, kind):
    with pytest.raises(TypeError, match=rf"block 0 is a {block.__name__} with .*{kind}.*convert.residual"):
        convert.vit(tiny(2, block_fn=block))


class Halved(timm_vit.Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 0.5 * super().forward(x)


def test_other_models_and_hooks_are_refused():
    with pytest.raises(TypeError, match="its own forward"):
        convert.vit(tiny(2, block_fn=Halved))
    with pytest.raises(TypeError, match="takes a timm VisionTransformer, got Linear"):
        convert.vit(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a model that convert.vit returned"):
        convert.restore(tiny(2))
    hooked = tiny(2)
    hooked.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="block 1 has hooks"):
        convert.vit(hooked)


def test_what_is_no_branch_is_refused():
    with pytest.raises(TypeError, match="adds its own input"):
        convert.residual(tiny(2).blocks)
    with pytest.raises(TypeError, match=r"nn.Module, got function"):
        convert.residual([lambda x: x])
    with pytest.raises(ValueError, match="expected branches"):
        convert.residual([])
    with pytest.raises(ValueError, match=r"without changing|merge"):
        convert.residual([nn.Linear(4, 5)])(torch.randn(2, 4))


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.3}, {"momentum": 1.0}, {"momentum": 0.0}, {"limit": 100.0}, {"resolution": 0.0}, {"group": 0}],
)
def test_settings_out_of_range_are_refused(options):
    argument = next(iter(options))
    with pytest.raises(
        ValueError, match="group takes .* of functions from 1 up, got 0" if argument == "group" else argument
    ):
        convert.residual([mlp(4) for _ in range(4)], **options)


def test_an_unknown_option_is_refused_by_the_function_that_got_it():
    known = "group, momentum, limit, resolution, scheduler"
    for name, call in (
        (r"convert\.vit .* inplace, ", lambda: convert.vit(tiny(2), gamma=1)),
        (r"convert\.residual .* are ", lambda: convert.residual([mlp(4)], gamma=1)),
    ):
        with pytest.raises(TypeError, match=name) as found:
            call()
        assert "takes no keyword 'gamma'" in str(found.value)
        assert sorted(str(found.value).split(" are ")[1].replace("inplace, ", "").split(", ")) == sorted(
            known.split(", ")
        )


def test_what_cannot_be_undone_is_refused():
    branches = [nn.Identity() for _ in range(40)]
    with pytest.raises(ValueError, match=r"40 functions .* cannot be undone with any momentum.*Raise group"):
        convert.residual(branches, group=1)
    assert convert.residual(branches[:31], group=1).momentum == 0.5
    with pytest.raises(ValueError, match=r"must be 2\*\*-1 to"):
        convert.residual(branches, group=2, momentum=2.0**-2)
    grown = convert.residual(branches[:31], group=1)
    grown.append(nn.Identity())
    with pytest.raises(ValueError, match="cannot be undone"):
        grown(torch.ones(2))
