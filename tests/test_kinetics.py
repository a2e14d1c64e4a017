"""PySlowFast's Rev-MViT-B 16x4 of Kinetics: its names and shapes, and what its own equations compute; configurations.

``Kinetics`` is the published equations in plain torch under the published names: its state_dict is the checkpoint.
"""

import copy
from functools import partial

import pytest
import torch
from common import error
from torch import nn

from revlib import Checkpoint, ExactAdditive, Naive, PaReprop, Reversible
from revlib.checkpoints import load_pyslowfast, to_pyslowfast
from revlib.models import PublishedRevMViT, PublishedRevMViTVideo, RevViT
from revlib.testing import footprint

LN6 = partial(nn.LayerNorm, eps=1e-6)
CLIP = (4, 32, 16)
DEPTHS = (1, 2, 3)
SIZES = {"clip_size": CLIP, "embed_dim": 8, "depths": DEPTHS, "num_classes": 5, "num_heads": 2, "kv_stride": 4}


class Pool(nn.Module):
    """Of (B, heads, N, c): a convolution of a volume per head and channel; the norm is its owner's."""

    @staticmethod
    def run(x, volume, conv, norm):
        if conv is None:
            return x, volume
        batch, heads = x.shape[:2]
        maps = conv(x.reshape(batch * heads, *volume, -1).permute(0, 4, 1, 2, 3))
        after = tuple(maps.shape[2:])
        return norm(maps.permute(0, 2, 3, 4, 1).reshape(batch, heads, -1, x.shape[-1])), after


class Attention(nn.Module):
    def __init__(self, dim, out, heads, volume, stride_q, stride_kv, separate):
        super().__init__()
        self.heads, self.volume, self.out = heads, volume, out
        for name, width in ({"q": out, "k": out, "v": out} if separate else {"qkv": 3 * out}).items():
            self.add_module(name, nn.Linear(dim, width, bias=False))
        self.proj = nn.Linear(out, out)
        c = out // heads
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            if stride:
                conv = nn.Conv3d(c, c, (3, 3, 3), (1, stride, stride), (1, 1, 1), groups=c, bias=False)
                self.add_module(f"pool_{name}", conv)
                self.add_module(f"norm_{name}", LN6(c))

    def pool(self, name, x):
        return Pool.run(x, self.volume, getattr(self, f"pool_{name}", None), getattr(self, f"norm_{name}", None))[0]

    def split(self, x):
        return x.reshape(len(x), x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x):
        parts = [getattr(self, n)(x) for n in "qkv"] if hasattr(self, "q") else self.qkv(x).split(self.out, dim=-1)
        q, k, v = (self.pool(name, self.split(part)) for name, part in zip("qkv", parts, strict=True))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (self.out // self.heads) ** 0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(len(x), -1, self.out))


class Sub(nn.Module):
    def __init__(self, dim, **inner):
        super().__init__()
        self.norm = LN6(dim)
        for name, module in inner.items():
            self.add_module(name, module)

    def forward(self, x):
        return (self.attn if hasattr(self, "attn") else self.mlp)(self.norm(x))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Kinetics(nn.Module):
    """MViT with REV.ENABLE, CLS_EMBED_ON off, SEP_POS_EMBED, PRE_Q_FUSION "avg", RES_PATH "conv", QKV_BIAS off."""

    def __init__(self, clip=CLIP, patch=(2, 4, 4), dim=8, depths=DEPTHS, heads=2, stride_kv=4, classes=5,
                 separate=False, mean_pooling=False):  # fmt: skip
        super().__init__()
        t, h, w = (n // p for n, p in zip(clip, patch, strict=True))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, dim, (3, 7, 7), patch, (1, 3, 3))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, h * w, dim))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, t, dim))
        self.frames, self.mean_pooling, self.buffers_at = t, mean_pooling, set()
        layers, number = nn.ModuleList(), 0
        for stage, depth in enumerate(depths):
            for block in range(depth):
                layer, entering, volume, stride_q = nn.Module(), dim, (t, h, w), None
                if stage and block == 0:
                    self.buffers_at.add(number)
                    dim, heads, stride_kv, stride_q = 2 * dim, 2 * heads, max(stride_kv // 2, 1), 2
                    h, w = h // 2, w // 2
                    layer.res_proj = nn.Linear(entering, dim)
                layer.F = Sub(entering, attn=Attention(entering, dim, heads, volume, stride_q, stride_kv, separate))
                layer.G = Sub(dim, mlp=Mlp(dim))
                layers.append(layer)
                number += 1
        self.rev_backbone = nn.Module()
        self.rev_backbone.layers = layers
        self.norm, self.head = LN6(2 * dim), nn.Module()
        self.head.projection = nn.Linear(2 * dim, classes)

    def forward(self, clips):
        x = self.patch_embed.proj(clips).flatten(2).transpose(1, 2)
        places = self.pos_embed_spatial.shape[1]
        x = x + self.pos_embed_spatial.repeat(1, self.frames, 1)
        x1 = x2 = x + torch.repeat_interleave(self.pos_embed_temporal, places, dim=1)
        for number, layer in enumerate(self.rev_backbone.layers):
            if number in self.buffers_at:
                x, attn = torch.stack([x1, x2]).mean(0), layer.F.attn
                residual = attn.pool("q", attn.split(layer.res_proj(x))).transpose(1, 2).flatten(2)
                x = residual + layer.F(x)
                x1 = x2 = x + layer.G(x)
            else:
                x1 = x1 + layer.F(x2)
                x2 = x2 + layer.G(x1)
        x = torch.cat([x1, x2], dim=-1)
        x = self.norm(x.mean(1)) if self.mean_pooling else self.norm(x).mean(1)
        return self.head.projection(x)


def build(separate=False, mean_pooling=False, **changes):
    torch.manual_seed(0)
    theirs = Kinetics(separate=separate, mean_pooling=mean_pooling).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    return theirs, PublishedRevMViTVideo(**{**SIZES, "fc_norm": mean_pooling, **changes}).double()


def clips(batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *CLIP, dtype=dtype)


@pytest.mark.parametrize("scheduler", [Naive(), Reversible(), Checkpoint(), PaReprop()], ids=str)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mean_pooling", [False, True])
def test_logits_and_gradients_are_those_of_the_published_equations(scheduler, separate, mean_pooling):
    theirs, ours = build(separate, mean_pooling, scheduler=scheduler)
    report = load_pyslowfast(ours, theirs.state_dict())
    x = clips()
    want, got = theirs(x), ours(x)
    assert error(got, want) < 1e-11
    want.sin().square().sum().backward()
    got.sin().square().sum().backward()
    gradients = copy.deepcopy(ours)
    gradients.load_state_dict({name: p.grad for name, p in ours.named_parameters()})
    mapped = to_pyslowfast(gradients, separate_qkv=separate)
    assert error([mapped[name] for name, _ in theirs.named_parameters()], [p.grad for p in theirs.parameters()]) < 1e-9
    assert report.complete and [name for name, _ in report.matched] == list(ours.state_dict())
    assert "without a configuration" in str(report)


@pytest.mark.parametrize("separate", [False, True])
def test_there_and_back_are_the_same_bits(separate):
    theirs, ours = build(separate)
    load_pyslowfast(ours, {"model_state": {f"module.{name}": t for name, t in theirs.state_dict().items()}})
    back = to_pyslowfast(ours, separate_qkv=separate)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], t) for name, t in theirs.state_dict().items())


LAYER = """F.norm.weight E; F.norm.bias E; F.attn.qkv.weight 3D E; F.attn.proj.weight D D; F.attn.proj.bias D;
F.attn.pool_k.weight C 1 3 3 3; F.attn.norm_k.weight C; F.attn.norm_k.bias C; F.attn.pool_v.weight C 1 3 3 3;
F.attn.norm_v.weight C; F.attn.norm_v.bias C; G.norm.weight D; G.norm.bias D; G.mlp.fc1.weight 4D D; G.mlp.fc1.bias 4D;
G.mlp.fc2.weight D 4D; G.mlp.fc2.bias D"""
TRANSITION = """F.attn.pool_q.weight C 1 3 3 3; F.attn.norm_q.weight C; F.attn.norm_q.bias C; res_proj.weight D E;
res_proj.bias D"""
REST = """pos_embed_spatial 1 3136 96; pos_embed_temporal 1 8 96; patch_embed.proj.weight 96 3 3 7 7;
patch_embed.proj.bias 96; norm.weight 1536; norm.bias 1536; head.projection.weight 400 1536; head.projection.bias 400"""


def shapes(text, prefix="", **sizes):
    def number(token):
        letter = token[-1] if token[-1] in sizes else ""
        return int(token.removesuffix(letter) or 1) * sizes.get(letter, 1)

    items = (item.split() for item in text.replace("\n", " ").split(";"))
    return {prefix + name: tuple(map(number, dims)) for name, *dims in items}


def test_the_published_names_and_shapes():
    published = shapes(REST)
    for i in range(16):
        width = 96 * 2 ** sum(i >= layer for layer in (1, 3, 14))
        entering, layer = (width // 2, f"{LAYER}; {TRANSITION}") if i in (1, 3, 14) else (width, LAYER)
        published |= shapes(layer, f"rev_backbone.layers.{i}.", D=width, E=entering, C=96)
    with torch.device("meta"):
        ours = PublishedRevMViTVideo()
        theirs = Kinetics((16, 224, 224), dim=96, depths=(1, 2, 11, 2), heads=1, stride_kv=8, classes=400)
        assert ours(torch.randn(2, 3, 16, 224, 224)).shape == (2, 400)
    for found in (to_pyslowfast(ours, separate_qkv=False), theirs.state_dict()):
        assert {name: tuple(t.shape) for name, t in found.items()} == published
    assert sum(p.numel() for p in ours.parameters()) == 34_963_120


@pytest.mark.parametrize("scheduler", [Reversible(), Checkpoint(every=2), PaReprop()], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_are_those_of_naive_with_every_kind_of_dropout(scheduler, exact):
    def gradients(scheduler):
        dtype = torch.float32 if exact else torch.float64
        changes = {"drop_path_rate": 0.4, "drop_rate": 0.3, "coupling": ExactAdditive() if exact else None}
        model = build(scheduler=scheduler, **changes)[1].to(dtype)
        torch.manual_seed(1)
        model(clips(8, dtype)).sin().square().sum().backward()
        return [p.grad for p in model.parameters()]

    got, want = gradients(scheduler), gradients(Naive())
    assert all(map(torch.equal, got, want)) if exact else error(got, want) < 1e-10


def test_what_is_held_does_not_grow_with_the_depth_of_a_stage():
    def held(scheduler, *depths):
        model = build(scheduler=scheduler, depths=depths)[1].float()
        return footprint(lambda x: (model(x),), [clips(64, torch.float32)], model.parameters())

    shallow, deep = held(Reversible(), 1, 2, 2), held(Reversible(), 4, 5, 6)
    # What grows are samples of one clip's streams, to compare in backward: of 64 clips, little.
    assert deep.held <= 1.02 * shallow.held and deep.peak <= 1.02 * shallow.peak
    assert held(Naive(), 4, 5, 6).held > 2 * held(Naive(), 1, 2, 2).held


def test_rates_and_head():
    model = PublishedRevMViTVideo(**SIZES, drop_rate=0.5, drop_path_rate=0.5).double()
    rates = [m.drop_prob for name, m in model.named_modules() if hasattr(m, "drop_prob") and "G" not in name]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    assert model.head_drop.p == 0.5 and model.num_features == 64
    assert model.no_weight_decay() == {"pos_embed_spatial", "pos_embed_temporal"}
    model.eval().reset_classifier(3)
    assert model(clips()).shape == (2, 3)
    model.reset_classifier(0)
    x = clips()
    features = model.forward_features(x)
    assert features.shape == (2, 2 * 2 * 1, 64) and torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model(x), features.mean(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clip_size": (4, 32, 24)}, r"clip_size .* \(2, 16, 16\), got \(4, 32, 24\); resize to \(4, 32, 32\)"),
        ({"clip_size": (3, 32, 16)}, r"clip_size .* resize to \(4, 32, 16\)"),
        ({"num_heads": 3}, "embed_dim .* num_heads=3, got 8"),
        ({"depths": (2, 0)}, r"depths\[1\] takes a whole number from 1 up, got 0; depths is \(2, 0\)"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        PublishedRevMViTVideo(**{**SIZES, **wrong})


def test_clips_of_another_size_are_errors():
    with pytest.raises(ValueError, match="must give 2x8x4 patches, got 2x4x8"):
        build()[1](torch.randn(1, 3, 4, 16, 32, dtype=torch.float64))


# Configurations


def config(**changes):
    mvit = {"NUM_HEADS": 2, "CLS_EMBED_ON": False, "USE_MEAN_POOLING": False, "QKV_BIAS": False,
            "POOL_KV_STRIDE_ADAPTIVE": [1, 4, 4], "POOL_Q_STRIDE": [[1, 1, 2, 2], [3, 1, 2, 2]],
            "RESIDUAL_POOLING": False}  # fmt: skip
    rev = {"ENABLE": True, "RESPATH_FUSE": "concat", "BUFFER_LAYERS": [1, 3], "RES_PATH": "conv", "PRE_Q_FUSION": "avg"}
    return {"MVIT": {**mvit, "REV": {**rev, **changes.pop("rev", {})}, **changes}, "MODEL": {"NUM_CLASSES": 5}}


def as_yaml(values, indent=0):
    lines = []
    for name, value in values.items():
        nested = f"\n{as_yaml(value, indent + 2)}" if isinstance(value, dict) else f" {value}"
        lines.append(f"{' ' * indent}{name}:{nested}")
    return "\n".join(lines)


WRONG = [
    ({"NUM_HEADS": 4}, "MVIT.NUM_HEADS is 4, and 2 of this PublishedRevMViTVideo; change num_heads of the model"),
    ({"USE_MEAN_POOLING": True}, "MVIT.USE_MEAN_POOLING is True, and False .*; change fc_norm of the model"),
    ({"CLS_EMBED_ON": True}, "MVIT.CLS_EMBED_ON is True, .*; no model here has that"),
    ({"POOL_KV_STRIDE_ADAPTIVE": [1, 8, 8]}, r"\[1, 8, 8\], and \[1, 4, 4\] .*; change kv_stride of the model"),
    ({"POOL_Q_STRIDE": [[2, 1, 2, 2], [3, 1, 2, 2]]}, "MVIT.POOL_Q_STRIDE .*; change depths of the model"),
    ({"rev": {"PRE_Q_FUSION": "max"}}, "MVIT.REV.PRE_Q_FUSION is max, and avg of this"),
    ({"rev": {"RES_PATH": "max"}}, "MVIT.REV.RES_PATH is max"),
]


@pytest.mark.parametrize("text", [False, True])
def test_a_configuration_of_the_same_network_is_accepted(text):
    theirs, ours = build()
    stated = as_yaml(config()) if text else config()
    for checkpoint, given in (
        ({"model_state": theirs.state_dict(), "cfg": stated}, None),
        (theirs.state_dict(), stated),
    ):
        report = load_pyslowfast(ours, checkpoint, config=given)
        assert report.complete and "without a configuration" not in str(report)


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_one_of_another_network_is_an_error_and_nothing_is_loaded(changes, message):
    theirs, ours = build()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        load_pyslowfast(ours, {"model_state": theirs.state_dict(), "cfg": as_yaml(config(**changes))})
    assert all(torch.equal(before[name], t) for name, t in ours.state_dict().items())


def test_heads_and_pooling_of_a_vit_are_told_by_the_configuration_alone():
    right = RevViT(8, 4, embed_dim=8, depth=2, num_heads=2, norm_layer=LN6)
    wrong = RevViT(8, 4, embed_dim=8, depth=2, num_heads=4, norm_layer=LN6)
    state = to_pyslowfast(right)
    said = {"MVIT": {"NUM_HEADS": 2, "USE_MEAN_POOLING": False, "REV": {"RESPATH_FUSE": "concat"}}}
    assert load_pyslowfast(right, {"model_state": state, "cfg": said}).complete
    with pytest.raises(ValueError, match=r"MVIT.NUM_HEADS is 2, and 4 of this RevViT; change num_heads of the model"):
        load_pyslowfast(wrong, {"model_state": state, "cfg": said})
    assert "without a configuration to compare heads" in str(load_pyslowfast(wrong, state))


def test_mean_pooling_is_fc_norm():
    """Averaged first and normalised after, with the names of PySlowFast, which are the same either way."""
    said = {"MVIT": {"NUM_HEADS": 2, "USE_MEAN_POOLING": True}}
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "norm_layer": LN6}
    before, after = RevViT(**sizes).double(), RevViT(**sizes, fc_norm=True).double()
    for p in before.parameters():
        nn.init.normal_(p)
    state = to_pyslowfast(before)
    with pytest.raises(ValueError, match=r"MVIT.USE_MEAN_POOLING is True, and False of this RevViT; change fc_norm"):
        load_pyslowfast(before, {"model_state": state, "cfg": said})
    load_pyslowfast(after, {"model_state": state, "cfg": said})
    assert to_pyslowfast(after).keys() == state.keys()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    streams = next(iter(before.streams(x, [2])))
    pooled = torch.cat(streams, -1).mean(1)
    want = before.head(nn.functional.layer_norm(pooled, (16,), before.norm.weight, before.norm.bias, 1e-6))
    assert torch.allclose(after(x), want) and not torch.allclose(before(x), want)
    mvit = {"img_size": 16, "embed_dim": 8, "depths": (1, 2), "num_classes": 5}
    published = PublishedRevMViT(**mvit, fc_norm=True)
    said["MVIT"] |= {"NUM_HEADS": 1, "REV": {"BUFFER_LAYERS": [1], "PRE_Q_FUSION": "concat_linear_2"}}
    assert load_pyslowfast(published, {"model_state": to_pyslowfast(PublishedRevMViT(**mvit)), "cfg": said}).complete
