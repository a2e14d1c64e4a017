"""What timm's tools expect of a model, on the models registered with it, beside timm's own where they tell.

The applicable part of timm's test-suite, on small sizes and in our words; the rest of it is in test_presets.py.
"""

import fnmatch
import inspect
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from common import gap
from timm.layers import LayerNorm, RmsNorm, resample_abs_pos_embed
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters, save_for_hf
from timm.utils import reparameterize_model
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import revlib.models
from revlib import Checkpoint, ExactAdditive, Naive, Reversible, ReversibleSequence
from revlib.models import ConcatMlp, Mean, PublishedRevMViT, RevSwin, presets
from revlib.models.sizes import checkpoint_of_mvit, checkpoint_of_swin, checkpoint_of_vit
from revlib.testing import footprint

SIZE = (32, 16)
TINY = {
    "rev_vit_small": {"img_size": SIZE, "patch_size": 4, "embed_dim": 8, "depth": 4, "num_heads": 2},
    "rev_swin_tiny": {"img_size": SIZE, "patch_size": 2, "embed_dim": 4, "depths": (1, 2, 1), "num_heads": (1, 2, 4),
                      "window_size": 4},
    "rev_mvit_base": {"img_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "kv_stride": 2},
}  # fmt: skip
PEERS = {"rev_vit_small": "vit_tiny_patch16_224", "rev_swin_tiny": "swin_tiny_patch4_window7_224",
         "rev_mvit_base": "mvitv2_tiny"}  # fmt: skip
every_model = pytest.mark.parametrize("name", TINY)
two_streams = pytest.mark.parametrize("name", ["rev_vit_small", "rev_swin_tiny"])


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**TINY[name], "num_classes": 5, **kwargs})


def images(*size, batch=2, **kwargs):
    return torch.randn(batch, 3, *(size or SIZE), generator=torch.Generator().manual_seed(1)).to(**kwargs)


def tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


def shuffled(model):
    """Positions that differ from one another, also where they begin as zeros."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "pos" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    return model


# Contract of every model


@every_model
def test_what_a_factory_relies_on(name):
    with pytest.raises(TypeError, match="takes no argument 'not_an_argument'"):
        build(name, not_an_argument=1)
    model = build(name)
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    assert len(set(group_parameters(model, model.group_matcher(), reverse=True).values())) > 1
    names = [key for key, _ in model.named_parameters()]
    assert all(fnmatch.filter(names, pattern) for pattern in model.no_weight_decay())
    assert model.in_chans == 3 and model.num_classes == 5 and model.num_prefix_tokens == 0


def test_prefix_tokens_are_counted():
    assert build("rev_mvit_base", class_token=True).num_prefix_tokens == 1


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_tensor_is_made_where_and_as_told(name, dtype):
    model = build(name, device="meta", dtype=dtype, **({"fusion": ConcatMlp} if name != "rev_vit_small" else {}))
    assert {t.device.type for _, t in tensors(model)} == {"meta"}
    assert {t.dtype for _, t in tensors(model) if t.is_floating_point()} == {dtype}
    model.eval()
    for classes in (0, 2):
        model.reset_classifier(classes)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", dtype)}
    assert not any(module.training for module in model.modules())
    assert model(images(device="meta", dtype=dtype)).shape == (2, 2)
    real = build(name, device="cpu", dtype=torch.float64)
    assert real(images(dtype=torch.float64)).dtype == torch.float64
    want = build(name).state_dict()
    assert {key: t.shape for key, t in real.state_dict().items()} == {key: t.shape for key, t in want.items()}
    assert all((want[key].std() > 0.01) == (t.std() > 0.01) for key, t in real.state_dict().items() if t.numel() > 1)


@every_model
def test_a_model_that_has_run_can_change_its_dtype(name):
    model = build(name).eval()
    model(images())
    assert model.to(torch.bfloat16)(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_model
def test_what_is_frozen_stays_frozen(name):
    model = build(name).requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    model.set_input_size((64, 32))
    assert not [key for key, p in model.named_parameters() if p.requires_grad]


@pytest.mark.some(2)
@pytest.mark.parametrize("name", sorted(presets.SIZES))
def test_shapes_are_as_the_configuration_says(name):
    model = timm.create_model(name, device="meta").eval()
    x, cfg = torch.randn(1, *model.default_cfg["input_size"], device="meta"), model.default_cfg
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features and pooled.shape == (1, model.head_hidden_size)
    assert features.shape[1:-1] == (cfg["pool_size"] if cfg["pool_size"] else features.shape[1:2])
    assert (getattr(model, "output_fmt", None), bool(cfg["pool_size"])) == (
        ("NHWC", True) if isinstance(model, RevSwin) else (None, False))  # fmt: skip
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    unpooled = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    assert unpooled(x).shape == features.shape
    names = timm.create_model(name, device="meta").state_dict()
    assert {f"{cfg[part]}.weight" for part in ("classifier", "first_conv")} <= set(names)


@every_model
def test_pooling_is_told_to_the_constructor_and_to_reset_classifier(name):
    model, x = build(name, global_pool="avg").eval(), images()
    features = model.forward_features(x)
    assert torch.allclose(model(x), model.get_classifier()(features.flatten(1, -2).mean(1)), atol=1e-6)
    assert torch.allclose(build(name, global_pool="").eval()(x), model.get_classifier()(features), atol=1e-6)


# Dropout and layers by name


@every_model
def test_drop_rate_is_the_classifiers_and_proj_drop_rate_the_projections(name):
    def dropouts(model, rate):
        return [key for key, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p == rate]

    ours = build(name, drop_rate=0.3)
    assert len(dropouts(ours, 0.3)) == len(dropouts(timm.create_model(PEERS[name], drop_rate=0.3), 0.3)) == 1
    x, torch_seed = images(), 4
    torch.manual_seed(torch_seed)
    got = ours.forward_head(ours.forward_features(x))
    torch.manual_seed(torch_seed)
    pooled = ours.forward_features(x).flatten(1, -2).mean(1)
    assert torch.allclose(got, ours.get_classifier()(nn.functional.dropout(pooled, 0.3)), atol=1e-6)
    if name != "rev_mvit_base":
        rates = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.4}
        inside = build(name, **rates)
        assert len(dropouts(inside, 0.3)) == 12 and len(dropouts(inside, 0.4)) == 4  # three and one in every block
        theirs = timm.create_model(PEERS[name], **rates)
        blocks = len(dropouts(theirs, 0.4))
        assert len(dropouts(theirs, 0.3)) == 3 * blocks


@every_model
def test_layers_by_name_and_by_class(name):
    fusion = {"fusion": Mean} if name == "rev_mvit_base" else {}  # that of the preset has an activation of its own
    named = build(name, norm_layer="rmsnorm", act_layer="silu", **fusion)
    given = build(name, norm_layer=RmsNorm, act_layer=nn.SiLU, **fusion)
    for model in (named, given):
        norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, LayerNorm, RmsNorm))]
        acts = [m for m in model.modules() if isinstance(m, (nn.GELU, nn.SiLU))]
        assert {type(m) for m in norms} == {RmsNorm} and {type(m) for m in acts} == {nn.SiLU} and acts
    assert torch.equal(named(images()), given(images()))


# Feature maps


@every_model
def test_hooks_get_what_feature_info_promises(name):
    hooked = build(name, features_only=True, feature_cls="hook").eval()
    want = build(name, features_only=True).eval()(images())
    got = hooked(images())
    assert len(got) == len(want) >= 3
    for channels, ours, theirs in zip(hooked.feature_info.channels(), got, want, strict=True):
        assert ours.shape[-1] == channels  # channels last, as those of timm's ViT and Swin
        assert torch.equal(ours.flatten(1, -2), theirs.flatten(2).transpose(1, 2))
    again = hooked(images())
    assert all(map(torch.equal, again, got))


@two_streams
def test_taps_run_only_where_somebody_listens_and_change_nothing(name):
    model, x, ran = build(name).eval(), images(), []
    want = model(x)
    forward = type(model.taps[0]).forward

    def spied(self, x1, x2):
        ran.append(self)
        return forward(self, x1, x2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.taps[0]), "forward", spied)
        model(x)
        assert not ran
        handle = model.taps[1].register_forward_hook(lambda *_: None)
        assert torch.equal(model(x), want) and ran == [model.taps[1]]
        handle.remove()
        model(x)
    assert len(ran) == 1


@two_streams
def test_gradients_through_hooks_are_those_of_naive(name):
    found = []
    for scheduler in (Naive(), Reversible(), Checkpoint()):
        model = build(name, features_only=True, feature_cls="hook", scheduler=scheduler).double()
        sum((i + 1) * m.sin().sum() for i, m in enumerate(model(images(dtype=torch.float64)))).backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(found[1]) == len(found[2]) > 20
    assert gap(found[1], found[0]) < 1e-9 and gap(found[2], found[0]) < 1e-9


@every_model
def test_get_intermediate_layers(name):
    """As timm's ViT, whose interface it is: the last n, or those listed, with or without rows and columns."""
    model, x = build(name).eval(), images()
    levels = len(model.feature_info)
    for n in (1, 2, [0, levels - 1], (1,)):
        for norm in (False, True):
            maps = model.forward_intermediates(x, n, norm=norm, intermediates_only=True)
            reshaped = model.get_intermediate_layers(x, n, reshape=True, norm=norm)
            assert len(reshaped) == len(maps) and all(map(torch.equal, reshaped, maps))
            flat = model.get_intermediate_layers(x, n, norm=norm, return_prefix_tokens=True)
            assert all(torch.equal(a, b.flatten(2).transpose(1, 2)) for a, b in zip(flat, maps, strict=True))
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=2).eval()
    assert len(theirs.get_intermediate_layers(x, 2)) == len(model.get_intermediate_layers(x, 2))
    info = FeatureInfo(model.feature_info, levels)
    assert [m.shape[1] for m in model.get_intermediate_layers(x, levels, reshape=True)] == info.channels()


@every_model
def test_pruned_models_have_no_parameter_that_a_map_does_not_need(name):
    for scheduler in (Naive(), Reversible()):
        for i in range(len(build(name).feature_info)):
            model = build(name, scheduler=scheduler)
            want = model.forward_intermediates(images(), [i], intermediates_only=True)[0]
            taken = model.prune_intermediate_layers([i], prune_norm=True)
            got = model.forward_intermediates(images(), taken, intermediates_only=True)[0]
            assert torch.equal(got, want)
            got.sum().backward()
            assert not [key for key, p in model.named_parameters() if p.grad is None]


# Traces and scripts


def extracted(model):
    """As timm's tests trace: the output node, by torchvision, with timm's lists of what is not traced."""
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    options["param_shapes_constant"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, evaluate = get_graph_node_names(model, tracer_kwargs=options)
        return create_feature_extractor(model, train_return_nodes=[train[-1]], eval_return_nodes=[evaluate[-1]],
                                        tracer_kwargs=options)  # fmt: skip


def first(outputs):
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs


TRACES = {"torch.fx": fx.symbolic_trace, "torchvision": extracted}
every_trace = pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)


@pytest.mark.some(5)
@every_model
@every_trace
@pytest.mark.parametrize("training", [False, True])
def test_a_traced_network_computes_and_differentiates_the_same(name, trace, training):
    model = build(name).double().train(training)
    x = images(dtype=torch.float64)
    want = model(x)
    want.sin().sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    traced = trace(model).train(training)
    got = first(traced(x))
    got.sin().sum().backward()
    assert torch.allclose(got, want, rtol=1e-12)
    assert gap({key: p.grad for key, p in model.named_parameters()}, gradients) < 1e-12


@pytest.mark.some(3)
@every_model
@every_trace
def test_a_traced_network_keeps_no_more_than_the_model(name, trace):
    model = build(name, scheduler=Reversible()).eval()
    traced = trace(model).train(model.training)
    kinds = [type(m) for m in traced.modules()]
    assert sum(issubclass(kind, ReversibleSequence) for kind in kinds) == (1 if name == "rev_vit_small" else 3)
    x = images(batch=16)
    ours, theirs = (footprint(lambda x, f=f: (first(f(x)),), [x], model.parameters()) for f in (model, traced))
    assert theirs.held <= 1.01 * ours.held and theirs.peak <= 1.05 * ours.peak
    model.scheduler = Naive()
    assert footprint(lambda x: (first(traced(x)),), [x], model.parameters()).held > 1.5 * theirs.held


@every_model
@pytest.mark.parametrize("indices", [None, (0, 1), (-1,), 2])
def test_feature_maps_out_of_a_trace(name, indices):
    given = {} if indices is None else {"out_indices": indices}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = build(name, features_only=True, feature_cls="fx", **given).eval()
    getter = build(name, features_only=True, **given).eval()
    got, want = traced(images()), getter(images())
    assert [m.shape[-1] for m in got] == traced.feature_info.channels() and len(got) == len(want)
    assert all(torch.allclose(a.flatten(1, -2), b.flatten(2).transpose(1, 2), atol=1e-6)
               for a, b in zip(got, want, strict=True))  # fmt: skip


@every_model
def test_scripts_are_refused_in_one_sentence(name):
    sentence = r"^torch.jit.script cannot compile \w+, whose backward is Python .*; export it with torch.export or .*"
    model = build(name).eval()
    before = {key: type(m) for key, m in model.named_modules()}
    for target in (model, nn.Sequential(model), fx.symbolic_trace(model), build(name, features_only=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=sentence) as caught:
                torch.jit.script(target)
        assert "\n" not in str(caught.value)
    assert {key: type(m) for key, m in model.named_modules()} == before
    with torch.no_grad(), warnings.catch_warnings():  # what the sentence advises
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images())
        assert torch.allclose(traced(images()), model(images()), atol=1e-6)


@every_model
@pytest.mark.parametrize("dynamo", [False, True])
def test_exported_to_onnx(name, dynamo, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model, path = build(name).eval(), str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(),), path, dynamo=dynamo, input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"images": images().numpy()})[0])
    want = model(images())
    assert (got - want).abs().max() < 2e-6 * want.abs().max()


# Sizes of images


OTHER = (48, 32)


@every_model
def test_a_resized_model_is_one_of_that_size_with_resampled_positions(name):
    model = shuffled(build(name, window_size=4) if name == "rev_swin_tiny" else build(name)).eval()
    old = images()
    want_before = model(old)
    model.set_input_size(SIZE)
    assert torch.equal(model(old), want_before)  # nothing to change
    tokens = [p.clone() for key, p in model.named_parameters() if "pos" not in key]
    model.set_input_size(OTHER)
    assert all(map(torch.equal, tokens, [p for key, p in model.named_parameters() if "pos" not in key]))
    other = build(name, seed=1, img_size=OTHER, **({"window_size": (6, 8)} if name == "rev_swin_tiny" else {})).eval()
    other.load_state_dict(model.state_dict())
    assert torch.allclose(model(images(*OTHER)), other(images(*OTHER)), atol=1e-6)
    model(images(*OTHER)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_positions_of_a_vit_are_resampled_as_timm_does_it():
    model = shuffled(build("rev_vit_small"))
    positions = model.pos_embed.detach().clone()
    model.set_input_size(OTHER)
    want = resample_abs_pos_embed(positions, (12, 8), (8, 4), num_prefix_tokens=0)
    assert model.pos_embed.shape == (1, 96, 8) and torch.equal(model.pos_embed, want)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, class_token=False, embed_dim=8,
                               num_heads=2, global_pool="avg")  # fmt: skip
    with torch.no_grad():
        theirs.pos_embed.copy_(positions)
    theirs.set_input_size(OTHER)
    assert torch.equal(model.pos_embed, theirs.pos_embed)
    model.set_input_size(patch_size=(8, 8))
    theirs.set_input_size(patch_size=(8, 8))
    assert torch.equal(model.pos_embed, theirs.pos_embed) and model.patch_embed.proj.kernel_size == (8, 8)
    assert model(images(*OTHER)).shape == (2, 5) and {i["reduction"] for i in model.feature_info} == {8}
    with pytest.raises(ValueError, match=r"divisible by patch_size=.* got 33x16; resize to 32x16"):
        model.set_input_size((33, 16))


def test_windows_of_a_swin_follow_the_map_or_what_they_are_told():
    model = build("rev_swin_tiny")

    def windows():
        return [stage[0].F.window_size for stage in model.stages]

    assert windows() == [(4, 4), (4, 4), (4, 2)]  # no wider than the maps of 16x8, 8x4 and 4x2 patches
    model.set_input_size((64, 32))  # maps twice as large
    assert windows() == [(8, 8), (8, 8), (8, 4)] and model.stages[1][1].F.shift_size == (4, 0)
    model.set_input_size((64, 32), window_size=(2, 4))
    assert windows() == [(2, 4), (2, 4), (2, 4)]
    model.set_input_size((32, 16))
    assert windows() == [(1, 2), (1, 2), (1, 2)]
    model.set_input_size((64, 64), window_ratio=8)
    assert windows() == [(4, 4), (4, 4), (4, 4)] and model(images(64, 64)).shape == (2, 5)
    model.set_input_size(patch_size=4)
    assert [i["reduction"] for i in model.feature_info] == [4, 8, 16] and model(images(64, 64)).shape == (2, 5)


def test_tables_of_an_oblong_mvit_are_resampled_side_by_side():
    """Linear tables stay linear, and rows that a shorter side leaves over are not mixed into those in use."""
    model = build("rev_mvit_base")
    with torch.no_grad():
        for name, table in model.named_parameters():
            if "rel_pos" in name:
                table.copy_(torch.linspace(-1, 1, len(table))[:, None].expand_as(table))
    F = model.stages[0].pairs[0].F
    F.attn.rel_pos_w.data[15:] = 1e9  # 8 columns use 15 of the 31 rows that 16 rows of patches need
    model.set_input_size((64, 32))
    assert F.attn.rel_pos_h.shape == F.attn.rel_pos_w.shape == (63, 8) and F.feat_size == (32, 16)
    rows, columns = F.attn.rel_pos_h[:, 0], F.attn.rel_pos_w[:, 0]
    assert rows.diff().min() >= 0 and rows[31].abs() < 1e-6 and columns[:31].max() < 1 and columns[31:].eq(0).all()
    assert model(images(64, 32)).isfinite().all()
    with pytest.raises(ValueError, match="img_size must be divisible by 8, got 36x16; resize to 40x16"):
        model.set_input_size((36, 16))
    model.set_input_size()
    assert model.stages[0].feat_size == (32, 16)


@two_streams
def test_images_of_any_size(name):
    model = build(name, dynamic_img_size=True).eval()
    fixed = build(name, dynamic_img_size=False).eval()
    assert torch.allclose(model(images()), fixed(images()), atol=1e-6)
    assert model(images(*OTHER)).shape == (2, 5)
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images(*OTHER))
    maps = model.forward_intermediates(images(*OTHER), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [
        (OTHER[0] // i["reduction"], OTHER[1] // i["reduction"]) for i in model.feature_info]  # fmt: skip
    if name == "rev_vit_small":
        shuffled(model)
        want = shuffled(build(name)).eval()
        want.set_input_size(OTHER)
        assert torch.allclose(model(images(*OTHER)), want(images(*OTHER)), atol=1e-5)
        with pytest.raises(AssertionError, match="divisible by patch size"):
            model(images(33, 16))


@every_model
def test_checkpoints_of_another_size_are_resampled_while_they_load(name, tmp_path):
    square = {"img_size": 32} | ({"window_size": 4} if name == "rev_swin_tiny" else {})
    other = {"img_size": 64} | ({"window_size": 8} if name == "rev_swin_tiny" else {})
    model = shuffled(build(name, **square))
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **other).eval()
    model.eval().set_input_size(64)
    assert torch.allclose(loaded(images(64, 64)), model(images(64, 64)), atol=1e-5)
    assert not torch.equal(loaded(images(64, 64)), shuffled(build(name, **other)).eval()(images(64, 64)))


def test_checkpoint_filters():
    for name, filtered in (("rev_vit_small", checkpoint_of_vit), ("rev_swin_tiny", checkpoint_of_swin),
                           ("rev_mvit_base", checkpoint_of_mvit)):  # fmt: skip
        model = shuffled(build(name))
        state = model.state_dict()
        for wrapped in (state, {"state_dict": state}, {"model": state}):
            assert all(torch.equal(t, state[key]) for key, t in filtered(wrapped, build(name, seed=1)).items())
    patches = build("rev_vit_small", patch_size=8)
    assert filtered_shape(patches, build("rev_vit_small")) == (8, 3, 8, 8)
    with pytest.raises(ValueError, match="pos_embed of the checkpoint is of 32 patches, expected 96 or a square"):
        checkpoint_of_vit(build("rev_vit_small").state_dict(), build("rev_vit_small", img_size=OTHER))


def filtered_shape(model, source):
    state = {"patch_embed.proj.weight": source.patch_embed.proj.weight}
    return tuple(checkpoint_of_vit(state, model)["patch_embed.proj.weight"].shape)


# Files and inference


@every_model
@pytest.mark.parametrize("given", [{}, {"drop_rate": 0.1, "scheduler": Checkpoint(), "global_pool": "avg"}])
def test_saved_for_the_hub_and_created_again(name, given, tmp_path):
    model = build(name, **given).eval()
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model) and torch.equal(again(images()), model(images()))
    assert again.scheduler == Reversible()  # how a model was trained is no part of it
    finer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert finer(images()).shape == (2, 3)
    assert torch.equal(finer.forward_features(images()), model.forward_features(images()))
    model.set_input_size((64, 32))
    save_for_hf(model, tmp_path)
    resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(resized(images(64, 32)), model(images(64, 32)))


def test_what_the_hub_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'coupling' is not serializable"):
        save_for_hf(build("rev_vit_small", coupling=ExactAdditive()), tmp_path)


@every_model
@pytest.mark.parametrize("inplace", [False, True])
def test_reparameterized_for_inference(name, inplace):
    fusion = {} if name == "rev_vit_small" else {"fusion": ConcatMlp}
    model = build(name, **fusion).eval()
    want = model(images())
    assert torch.equal(reparameterize_model(model, inplace=inplace)(images()), want)
    published = PublishedRevMViT(32, 4, embed_dim=8, depths=(1, 2)).eval()
    assert torch.equal(reparameterize_model(published)(images(32, 32)), published(images(32, 32)))
    assert not any(hasattr(m, "fuse") for m in [*model.modules(), *published.modules()])


# torchvision, and the table


@pytest.mark.slow
def test_torchvision_is_imported_for_the_model_of_clips_alone():
    program = (
        "import sys, revlib.models; assert 'revlib.models.video' not in sys.modules\n"
        "sys.modules['torchvision.models.video.mvit'] = None\n"
        "try: revlib.models.RevMViTVideo\n"
        "except ImportError as e: print(e)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("RevMViTVideo is made of torchvision's blocks") and "pip install torchvision" in said
    assert revlib.models.RevMViTVideo.__name__ in revlib.models.__all__
    with pytest.raises(AttributeError, match="has no attribute 'RevResNet'"):
        revlib.models.RevResNet  # noqa: B018


def table():
    lines = [line for line in revlib.models.__doc__.splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def columns():
    made = {"RevViT": build("rev_vit_small"), "RevSwin": build("rev_swin_tiny"), "RevMViT": build("rev_mvit_base")}
    return made | {
        "vit": timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=2),
        "swin": timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=12,
                                  depths=(1, 1, 1, 1)),
        "mvitv2": timm.create_model("mvitv2_tiny", img_size=64),
    }  # fmt: skip


def test_the_table_of_conventions():
    """Each cell that names an attribute, an argument or a property that can be asked for."""
    said, models = table(), columns()
    assert all(list(row) == ["RevViT", "vit", "RevSwin", "swin", "RevMViT", "mvitv2"] for row in said.values())
    size = {name: (64, 64) if name in ("swin", "mvitv2") else SIZE for name in models}
    for row, attribute in (("`output_fmt`, `pool_size`", "output_fmt"), ("`set_input_size`", "set_input_size"),
                           ("`get_intermediate_layers`", "get_intermediate_layers"),
                           ("`forward_intermediates`", "forward_intermediates")):  # fmt: skip
        assert {name: cell != "-" for name, cell in said[row].items()} == {
            name: hasattr(model, attribute) for name, model in models.items()}, row  # fmt: skip
    for name, model in models.items():
        features = model.forward_features(images(*size[name]))
        assert said["`forward_features`"][name] == {3: "NLC", 4: "NHWC"}[features.ndim]
        assert bool(model.default_cfg["pool_size"]) == (said["`output_fmt`, `pool_size`"][name] == "yes")
        tokens = getattr(model, "num_prefix_tokens", None)
        assert ("-" if tokens is None else str(tokens)) in said["`num_prefix_tokens`"][name]
        head = next(key for key, m in model.named_modules() if m is model.get_classifier())
        assert said["`get_classifier()`"][name] == head
        for row, argument, value in (("`proj_drop_rate`, `attn_drop_rate`", "proj_drop_rate", 0.1),
                                     ("`norm_layer` by name", "norm_layer", "rmsnorm"),
                                     ("`act_layer` by name", "act_layer", "silu"),
                                     ("`device`, `dtype`", "dtype", torch.float64),
                                     ("`dynamic_img_size`", "dynamic_img_size", True)):  # fmt: skip
            assert (said[row][name] != "-") == takes(name, **{argument: value}), (row, name)
        for how in ("hook", "fx"):
            assert (said[f"`features_only`, `{how}`"][name] != "-") == has_features(name, how, size[name]), (how, name)
        assert (said["`torch.fx.symbolic_trace`"][name] == "yes") == succeeds(fx.symbolic_trace, model)
        assert (said["`torch.jit.script`"][name] == "yes") == succeeds(torch.jit.script, model)


def create(name, **kwargs):
    if name.startswith("Rev"):
        return build(next(key for key in TINY if key.split("_")[1] == name[3:].lower()), **kwargs)
    small = {"vit": {"depth": 4}, "swin": {"embed_dim": 12, "depths": (1, 1, 1, 1)}, "mvitv2": {}}[name]
    return timm.create_model({"vit": "vit_tiny_patch16_224", "swin": "swin_tiny_patch4_window7_224",
                              "mvitv2": "mvitv2_tiny"}[name], **small, **kwargs)  # fmt: skip


def takes(name, **kwargs):
    try:
        create(name, **kwargs)
    except TypeError:
        return False
    return True


def has_features(name, how, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = create(name, **({"img_size": size} if name != "swin" else {"img_size": 64, "window_size": 2}),
                           features_only=True, feature_cls=how)  # fmt: skip
            return all(torch.is_tensor(m) for m in model(images(*size)))
        except (KeyError, ValueError):
            return False


def succeeds(tool, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tool(model)
        except (RuntimeError, fx.proxy.TraceError):
            return False
    return True
