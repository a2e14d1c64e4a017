"""Foreign checkpoints: their names and shapes, and the functions that their own code computes with them.

``MinREV`` and ``SlowFast`` are the published equations in plain torch, under the published names: their state_dicts are
the checkpoints.
"""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from common import error, examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from revlib import Naive, Reversible
from revlib.checkpoints import load_minrev, load_pyslowfast, to_minrev, to_pyslowfast
from revlib.models import ConcatMlp, PublishedRevMViT, RevMViT, RevSwin, RevViT, minrev_mvit, minrev_swin, minrev_vit

LN6 = partial(nn.LayerNorm, eps=1e-6)


def module(forward, **parts):
    """A module of parts by name that computes ``forward(itself, ...)``."""

    class Module(nn.Module):
        def forward(self, *args):
            return forward(self, *args)

    made = Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


class MinREV(nn.Module):
    """Patches attend to patches. ``batch_first=False`` is what minREV's first two commits ran, of 8 February 2023."""

    def __init__(self, image=(8, 12), patch=4, dim=8, heads=2, depth=3, classes=5, batch_first=True):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.pos_embeddings = nn.Parameter(torch.zeros(1, image[0] // patch * (image[1] // patch), dim))

        def attend(self, x):
            x = self.norm(x)
            return self.attn(x, x, x)[0]

        def block():
            attn = nn.MultiheadAttention(dim, heads, batch_first=batch_first)
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            F = module(attend, norm=LN6(dim), attn=attn)
            return nn.ModuleDict({"F": F, "G": module(lambda g, x: g.mlp(g.norm(x)), norm=nn.LayerNorm(dim), mlp=mlp)})

        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, classes)

    def forward(self, images):
        x1 = x2 = self.patch_embed(images).flatten(2).mT + self.pos_embeddings
        for layer in self.layers:
            x1 = x1 + layer["F"](x2)
            x2 = x2 + layer["G"](x1)
        return self.head(self.norm(torch.cat([x1, x2], -1).mean(1)))


def mlp(dim, hidden, out=None):
    fc1, fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out or dim)
    return module(lambda m, x: m.fc2(nn.functional.gelu(m.fc1(x))), fc1=fc1, fc2=fc2)


def pool(x, size, conv, norm):
    """Of (B, heads, N, C), a map of that size per head, by a convolution in time and space."""
    if conv is None:
        return x, size
    maps = conv(x.flatten(0, 1).mT.unflatten(-1, (1, *size)))
    return norm(maps.flatten(2).mT.unflatten(0, x.shape[:2])), maps.shape[-2:]


class SlowFastAttention(nn.Module):
    def __init__(self, dim, heads, size, stride_q, stride_kv, separate):
        super().__init__()
        self.heads, self.size, c = heads, size, dim // heads
        projections = {x: nn.Linear(dim, dim) for x in "qkv"} if separate else {"qkv": nn.Linear(dim, 3 * dim)}
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.proj = nn.Linear(dim, dim)
        for x, stride in zip("qkv", (stride_q, stride_kv, stride_kv), strict=True):
            conv = stride and nn.Conv3d(c, c, (1, 3, 3), (1, stride, stride), (0, 1, 1), groups=c, bias=False)
            setattr(self, f"pool_{x}", conv)
            setattr(self, f"norm_{x}", stride and LN6(c))

    def forward(self, x):
        qkv = [self.q(x), self.k(x), self.v(x)] if hasattr(self, "q") else self.qkv(x).chunk(3, -1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv]
        pools = [(getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")) for name in "qkv"]
        q, k, v = (pool(part, self.size, *how)[0] for part, how in zip(split, pools, strict=True))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class SlowFast(nn.Module):
    """PySlowFast's MViT with REV.ENABLE: DIM_MUL and HEAD_MUL are 2, and POOL_Q_STRIDE too, in BUFFER_LAYERS only."""

    def __init__(self, image=8, conv=(4, 4, 0), dim=8, heads=2, depth=2, buffer_layers=(), stride_kv=None, classes=5,
                 separate=True):  # fmt: skip
        super().__init__()
        side = image // conv[1]
        self.patch_embed = module(lambda m, x: m.proj(x).flatten(2).mT, proj=nn.Conv2d(3, dim, *conv))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, dim))
        self.buffer_layers, layers = buffer_layers, nn.ModuleList()
        for i in range(depth):
            buffer = i in buffer_layers
            if buffer:
                dim, heads, stride_kv = 2 * dim, 2 * heads, max(stride_kv // 2, 1)
            attn = SlowFastAttention(dim, heads, (side, side), 2 if buffer else None, stride_kv, separate)
            F = module(lambda f, x: f.attn(f.norm(x)), norm=LN6(dim), attn=attn)
            G = module(lambda g, x: g.mlp(g.norm(x)), norm=LN6(dim), mlp=mlp(dim, 4 * dim))
            layers.append(nn.ModuleDict({"F": F, "G": G}))
            if buffer:
                layers[-1]["pre_q_fuse"] = module(lambda m, x: m.fuse_fn(x) + x, fuse_fn=mlp(dim, 2 * dim))
                side //= 2
        self.rev_backbone = nn.ModuleDict({"layers": layers})
        self.norm = LN6(2 * dim)
        self.head = module(lambda m, x: m.projection(x), projection=nn.Linear(2 * dim, classes))

    def forward(self, images):
        x1 = x2 = self.patch_embed(images) + self.pos_embed
        for i, layer in enumerate(self.rev_backbone["layers"]):
            F, G = layer["F"], layer["G"]
            if i in self.buffer_layers:
                x = layer["pre_q_fuse"](torch.cat([x1, x2], -1))
                heads = x.unflatten(-1, (F.attn.heads, -1)).transpose(1, 2)
                residual, _ = pool(heads, F.attn.size, F.attn.pool_q, F.attn.norm_q)
                x = residual.transpose(1, 2).flatten(2) + F(x)
                x1 = x2 = x + G(x)
            else:
                x1 = x1 + F(x2)
                x2 = x2 + G(x1)
        return self.head(self.norm(torch.cat([x1, x2], -1)).mean(1))


class MinREVSwin(nn.Module):
    """Windows by coordinates: each patch of a window gets its offset within it, and the quarter of the map it is from.

    ``unrolled`` is what minREV runs: what attention finds for a patch is added half a window away from it.
    """

    def __init__(self, image=8, patch=2, dim=8, depths=(2, 2), heads=(2, 4), window=2, classes=5, unrolled=True):
        super().__init__()
        self.window, self.unrolled, self.sides = window, unrolled, [image // patch // 2**i for i in range(len(depths))]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch), "norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList()
        for i, (depth, n) in enumerate(zip(depths, heads, strict=True)):
            w = dim * 2**i
            layer = nn.ModuleDict({"blocks": nn.ModuleList(self.block(w, n) for _ in range(depth))})
            if i + 1 < len(depths):
                layer["lateral_fuse"] = nn.ModuleDict({"fuse_fn": mlp(2 * w, 2 * w, w)})
                reduction = nn.Linear(4 * w, 2 * w, bias=False)
                layer["downsample"] = nn.ModuleDict({"norm": nn.LayerNorm(4 * w), "reduction": reduction})
            self.layers.append(layer)
        self.norm, self.head = nn.LayerNorm(2 * w), nn.Linear(2 * w, classes)

    def block(self, dim, heads):
        attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        table = torch.zeros((2 * self.window - 1) ** 2, heads)
        attn.register_parameter("relative_position_bias_table", nn.Parameter(table))
        y, x = (torch.arange(self.window**2) // self.window, torch.arange(self.window**2) % self.window)
        index = (y[:, None] - y + self.window - 1) * (2 * self.window - 1) + x[:, None] - x + self.window - 1
        attn.register_buffer("relative_position_index", index)
        return nn.ModuleDict(
            {"norm1": nn.LayerNorm(dim), "attn": attn, "norm2": nn.LayerNorm(dim), "mlp": mlp(dim, 4 * dim)}
        )

    def attend(self, block, x, side, shift):
        """Of (B, side², C). Where the map is shifted by s, place p holds the patch of p + s."""
        attn, w, heads = block["attn"], self.window, block["attn"].relative_position_bias_table.shape[1]
        place = torch.arange(side * side)
        y, x_ = place // side, place % side
        holds = (y + shift) % side * side + (x_ + shift) % side
        q, k, v = attn["qkv"](block["norm1"](x)[:, holds]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        offset = y % w * w + x_ % w
        bias = attn.relative_position_bias_table[attn.relative_position_index][offset][:, offset]
        window = y // w * side + x_ // w
        part = ((y >= side - shift).long() * 2 + (x_ >= side - shift)) * (shift > 0)  # came in from the other edge
        same = window[:, None] == window
        near = torch.where(part[:, None] == part, 0.0, -100.0)
        scores = (scores + bias.permute(2, 0, 1) + near).masked_fill(~same, -torch.inf)
        out = attn["proj"]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out if self.unrolled else torch.empty_like(out).index_copy(1, holds, out)

    def forward(self, images):
        x = self.patch_embed["norm"](self.patch_embed["proj"](images).flatten(2).mT)
        for layer, side in zip(self.layers, self.sides, strict=True):
            x1 = x2 = x
            for j, block in enumerate(layer["blocks"]):
                x1 = x1 + self.attend(block, x2, side, j % 2 * (self.window // 2))
                x2 = x2 + block["mlp"](block["norm2"](x1))
            x = torch.cat([x1, x2], -1)
            if "downsample" in layer:
                x = layer["lateral_fuse"]["fuse_fn"](x).unflatten(1, (side, side))
                x = torch.cat([x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)], -1).flatten(1, 2)
                x = layer["downsample"]["reduction"](layer["downsample"]["norm"](x))
        return self.head(self.norm(x).mean(1))


class MinREVMViT(nn.Module):
    """Four blocks, of which the second and the last are ordinary ones on both streams side by side."""

    def __init__(self, image=16, dim=4, heads=1, classes=5):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 3, 2, 1)})
        side, self.blocks = image // 2, nn.ModuleList()
        for scale, stride_q, stride_kv in ((1, 1, 2), (2, 2, 1), (2, 1, 2), (4, 2, 1)):
            self.blocks.append(self.block(scale * dim, scale * heads, side, stride_q, stride_kv))
            side //= stride_q
        self.norm, self.head = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, classes)

    def block(self, dim, heads, side, stride_q, stride_kv):
        c, attn = dim // heads, nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        for x, stride in zip("qkv", (stride_q, stride_kv, stride_kv), strict=True):
            attn[f"pool_{x}"] = nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False)
            attn[f"norm_{x}"] = nn.LayerNorm(c)
        for name in ("rel_pos_h", "rel_pos_w"):
            attn.register_parameter(name, nn.Parameter(torch.zeros(2 * side // min(stride_q, stride_kv) - 1, c)))
        return nn.ModuleDict(
            {"norm1": nn.LayerNorm(dim), "attn": attn, "norm2": nn.LayerNorm(dim), "mlp": mlp(dim, 4 * dim)}
        )

    def attend(self, block, x):
        """Of maps (B, side, side, C)."""
        attn, heads = block["attn"], x.shape[-1] // block["attn"]["norm_q"].normalized_shape[0]
        parts = attn["qkv"](block["norm1"](x)).unflatten(-1, (3, heads, -1)).permute(3, 0, 4, 5, 1, 2)
        q, k, v = (
            attn[f"norm_{name}"](attn[f"pool_{name}"](part.flatten(0, 1)).permute(0, 2, 3, 1))
            for name, part in zip("qkv", parts, strict=True)
        )
        rows, columns = (torch.arange(t.shape[1]) * max(u.shape[1] / t.shape[1], 1.0) for t, u in ((q, k), (k, q)))
        distance = (rows[:, None] - columns + columns.max()).long()
        scores = torch.einsum("nabc,ndec->nabde", q, k) * q.shape[-1] ** -0.5
        scores = scores + torch.einsum("nabc,adc->nabd", q, attn.rel_pos_h[distance])[..., None]
        scores = scores + torch.einsum("nabc,bec->nabe", q, attn.rel_pos_w[distance])[..., None, :]
        weights = scores.flatten(3).softmax(-1)
        out = torch.einsum("nabj,njc->nabc", weights, v.flatten(1, 2)) + q
        return attn["proj"](out.unflatten(0, (len(x), heads)).permute(0, 2, 3, 1, 4).flatten(3))

    def forward(self, images):
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1)
        for i, block in enumerate(self.blocks):
            if i % 2:
                shorter = nn.functional.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
                x = shorter + self.attend(block, x)
                x = x + block["mlp"](block["norm2"](x))
            else:
                x1 = x + self.attend(block, x)
                x = torch.cat([x1, x + block["mlp"](block["norm2"](x1))], -1)
        return self.head(self.norm(x.flatten(1, 2).mean(1)))


STAGES = {"conv": (7, 4, 3), "heads": 1, "depth": 6, "buffer_layers": (1, 3), "stride_kv": 4}  # depths (1, 2, 3)
MINREV = (MinREV, {}, RevViT, {"img_size": (8, 12), "fc_norm": True, "depth": 3}, load_minrev, to_minrev)
SWIN = (MinREVSwin, {}, partial(minrev_swin, unrolled_windows=True),
        {"img_size": 8, "patch_size": 2, "num_heads": (2, 4), "window_size": 2}, load_minrev, to_minrev)  # fmt: skip
THREE = (MinREVMViT, {}, minrev_mvit,
         {"img_size": 16, "patch_size": 2, "embed_dim": 4, "num_heads": 1}, load_minrev, to_minrev)  # fmt: skip
VIT = (SlowFast, {}, RevViT, {"img_size": 8, "depth": 2}, load_pyslowfast, to_pyslowfast)
FUSED = (SlowFast, {"separate": False}, *VIT[2:5], partial(to_pyslowfast, separate_qkv=False))
MVIT = (SlowFast, {"image": 32, **STAGES}, PublishedRevMViT, {"img_size": 32, "depths": (1, 2, 3), "num_heads": 1},
        load_pyslowfast, to_pyslowfast)  # fmt: skip
MVIT_FUSED = (SlowFast, {**MVIT[1], "separate": False}, *MVIT[2:5], FUSED[5])
CASES = [MINREV, SWIN, THREE, VIT, FUSED, MVIT, MVIT_FUSED]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=["minrev", "minrev-swin", "minrev-mvit", "vit", "vit-fused", "mvit", "mvit-fused"]
)


def build(case, **changes):
    make, sizes, model, ours, load, save = case
    torch.manual_seed(0)
    theirs = make(**sizes).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    sizes = {"patch_size": 4, "num_classes": 5, "embed_dim": 8, "num_heads": 2, **ours, **changes}
    return theirs, model(**sizes).double(), load, save


@pytest.mark.parametrize("scheduler", [Naive(), Reversible()], ids=str)
@every_case
def test_logits_and_gradients_are_those_of_the_published_equations(case, scheduler):
    theirs, ours, load, save = build(case, scheduler=scheduler)
    report = load(ours, theirs.state_dict())
    size = (8, 12) if case is MINREV else (16, 16) if case is THREE else (case[1].get("image", 8),) * 2
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    want, got = theirs(images), ours(images)
    assert error(got, want) < 1e-11
    want.sin().square().sum().backward()
    got.sin().square().sum().backward()
    gradients = copy.deepcopy(ours)
    gradients.load_state_dict({name: p.grad for name, p in ours.named_parameters()})
    mapped = save(gradients)
    assert error([mapped[name] for name, _ in theirs.named_parameters()], [p.grad for p in theirs.parameters()]) < 1e-9
    assert report.complete and [name for name, _ in report.matched] == list(ours.state_dict())


def assert_same_bits(got, want):
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@every_case
def test_there_and_back_are_the_same_bits(case):
    theirs, ours, load, save = build(case)
    load(ours, theirs.state_dict())
    assert_same_bits(save(ours), theirs.state_dict())
    other = build(case)[1]
    load(other, save(ours))
    assert_same_bits(other.state_dict(), ours.state_dict())
    assert {p.data_ptr() for p in ours.state_dict().values()}.isdisjoint(t.data_ptr() for t in save(ours).values())


sizes = st.fixed_dictionaries({"heads": st.integers(1, 3), "channels": st.integers(1, 3), "depth": st.integers(1, 3),
                               "side": st.integers(1, 2), "classes": st.integers(1, 4)})  # fmt: skip


@examples(15)
@given(sizes, st.sampled_from(["minrev", "vit", "mvit"]), st.booleans())
def test_any_sizes(sizes, kind, separate):
    heads, depth, classes, dim = (sizes[key] for key in ("heads", "depth", "classes", "heads"))
    dim *= sizes["channels"]
    side, vit = 4 * sizes["side"], {"embed_dim": dim, "num_heads": heads, "num_classes": classes}
    same = {"dim": dim, "heads": heads, "classes": classes}
    if kind == "minrev":
        case = (MinREV, {**same, "image": (side, side), "depth": depth}, RevViT,
                {**vit, "img_size": side, "depth": depth, "fc_norm": True}, *MINREV[4:])  # fmt: skip
    elif kind == "vit":
        case = (
            SlowFast,
            {**same, "image": side, "depth": depth, "separate": separate},
            RevViT,
            {**vit, "img_size": side, "depth": depth},
            load_pyslowfast,
            partial(to_pyslowfast, separate_qkv=separate),
        )
    else:
        depths = (1, *(2,) * (depth - 1))
        stages = {"depth": sum(depths), "buffer_layers": tuple(range(1, sum(depths), 2)), "stride_kv": 2}
        side *= 2 ** (depth - 1)
        case = (SlowFast, {**same, "image": side, "conv": (7, 4, 3), **stages, "separate": separate}, PublishedRevMViT,
                {**vit, "img_size": side, "depths": depths, "kv_stride": 2}, load_pyslowfast,
                partial(to_pyslowfast, separate_qkv=separate))  # fmt: skip
    theirs, ours, load, save = build(case)
    assert load(ours, theirs.state_dict()).complete
    assert_same_bits(save(ours), theirs.state_dict())
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert torch.allclose(ours(images), theirs(images), rtol=1e-8, atol=1e-8)


VIT_LAYER = """F.norm.weight D; F.norm.bias D; F.attn.q.weight D D; F.attn.q.bias D; F.attn.k.weight D D;
F.attn.k.bias D; F.attn.v.weight D D; F.attn.v.bias D; F.attn.proj.weight D D; F.attn.proj.bias D; G.norm.weight D;
G.norm.bias D; G.mlp.fc1.weight 4D D; G.mlp.fc1.bias 4D; G.mlp.fc2.weight D 4D; G.mlp.fc2.bias D"""
KEYS = """F.attn.pool_k.weight C 1 1 3 3; F.attn.norm_k.weight C; F.attn.norm_k.bias C;
F.attn.pool_v.weight C 1 1 3 3; F.attn.norm_v.weight C; F.attn.norm_v.bias C"""
TRANSITION = """F.attn.pool_q.weight C 1 1 3 3; F.attn.norm_q.weight C; F.attn.norm_q.bias C;
pre_q_fuse.fuse_fn.fc1.weight 2D D; pre_q_fuse.fuse_fn.fc1.bias 2D; pre_q_fuse.fuse_fn.fc2.weight D 2D;
pre_q_fuse.fuse_fn.fc2.bias D"""
MINREV_LAYER = """F.norm.weight D; F.norm.bias D; F.attn.in_proj_weight 3D D; F.attn.in_proj_bias 3D;
F.attn.out_proj.weight D D; F.attn.out_proj.bias D; G.norm.weight D; G.norm.bias D; G.mlp.0.weight 4D D;
G.mlp.0.bias 4D; G.mlp.2.weight D 4D; G.mlp.2.bias D"""
MINREV_REST = "pos_embeddings 1 N D; patch_embed.weight D 3 P P; patch_embed.bias D; norm.weight 2D; norm.bias 2D; " \
              "head.weight K 2D; head.bias K"  # fmt: skip
STEM = "pos_embed 1 N D; patch_embed.proj.weight D 3 P P; patch_embed.proj.bias D"
HEAD = "norm.weight 2D; norm.bias 2D; head.projection.weight K 2D; head.projection.bias K"


def shapes(text, prefix="", **sizes):
    def number(token):
        digits = token.rstrip("CDKNP")
        return int(digits or 1) * sizes.get(token[len(digits) :], 1)

    items = (item.split() for item in text.replace("\n", " ").split(";"))
    return {prefix + name: tuple(map(number, dims)) for name, *dims in items}


def published_vit(dim, depth, patches, patch, classes, rest, layer, prefix):
    found = shapes(rest, D=dim, N=patches, P=patch, K=classes)
    for i in range(depth):
        found |= shapes(layer, f"{prefix}layers.{i}.", D=dim)
    return found


def published_mvit_b():
    found = shapes(STEM, D=96, N=56 * 56, P=7) | shapes(HEAD, D=768, K=1000)
    for i in range(16):
        width, transition = 96 * 2 ** sum(i >= layer for layer in (1, 3, 14)), f"; {TRANSITION}" * (i in (1, 3, 14))
        found |= shapes(f"{VIT_LAYER}; {KEYS}{transition}", f"rev_backbone.layers.{i}.", D=width, C=96)
    return found


@pytest.mark.parametrize(
    ("published", "millions", "model", "theirs", "save"),
    [
        (published_vit(384, 12, 196, 16, 1000, f"{STEM}; {HEAD}", VIT_LAYER, "rev_backbone."), 22.43,
         lambda: RevViT(224, 16, 3, 1000, 384, 12, 6, norm_layer=LN6),
         lambda: SlowFast(224, (16, 16, 0), 384, 6, 12, classes=1000), to_pyslowfast),
        (published_vit(768, 12, 196, 16, 1000, f"{STEM}; {HEAD}", VIT_LAYER, "rev_backbone."), 87.34,
         lambda: RevViT(224, 16, 3, 1000, 768, 12, 12, norm_layer=LN6),
         lambda: SlowFast(224, (16, 16, 0), 768, 12, 12, classes=1000), to_pyslowfast),
        (published_mvit_b(), 39.69, PublishedRevMViT,
         lambda: SlowFast(224, (7, 4, 3), 96, 1, 16, (1, 3, 14), 4, 1000), to_pyslowfast),
        (published_vit(768, 8, 256, 2, 10, MINREV_REST, MINREV_LAYER, ""), 56.93,
         lambda: RevViT(32, 2, 3, 10, 768, 8, 8, fc_norm=True),
         lambda: MinREV((32, 32), 2, 768, 8, 8, 10), to_minrev),
    ],
    ids=["Rev-ViT-S", "Rev-ViT-B", "Rev-MViT-B", "minREV"],
)  # fmt: skip
def test_the_published_names_and_shapes(published, millions, model, theirs, save):
    with torch.device("meta"):
        ours, theirs = model(), theirs()
    if save is to_minrev:
        for name, m in ours.named_modules():
            m.eps = 1e-6 if name.endswith("F.0") else 1e-5
    assert {name: tuple(t.shape) for name, t in save(ours).items()} == published
    assert {name: tuple(t.shape) for name, t in theirs.state_dict().items()} == published
    parameters = sum(p.numel() for p in ours.parameters())
    assert parameters == sum(torch.Size(shape).numel() for shape in published.values())
    assert round(parameters / 1e6, 2) == millions


@every_case
def test_wrappings_and_precisions(case):
    theirs, ours, load, save = build(case)
    state = theirs.state_dict()
    load(ours, state)
    want = ours.state_dict()
    parallel = {f"module.{name}": t for name, t in state.items()}
    for checkpoint in ({"epoch": 3, "model_state": state}, {"state_dict": parallel}, {"model": parallel, "cfg": "x"}):
        other = build(case)[1]
        load(other, checkpoint)
        assert_same_bits(other.state_dict(), want)
    half = build(case)[1].float()
    load(half, {name: t.bfloat16() for name, t in state.items()})
    assert all(t.dtype == torch.float32 for t in half.state_dict().values())
    assert_same_bits(save(half), {name: t.bfloat16().float() for name, t in state.items()})


def refused(load, model, checkpoint, *messages, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing was loaded; build ") as caught:
        load(model, checkpoint, **options)
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert_same_bits(model.state_dict(), before)
    return str(caught.value)


@every_case
def test_what_does_not_match_is_an_error_and_loads_nothing(case):
    theirs, ours, load, _ = build(case)
    eps = {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")}
    state = theirs.state_dict()
    head = "head.weight" if load is load_minrev else "head.projection.weight"
    key = next(name for name in state if ".0." in name and ".attn." in name and name.endswith("weight"))
    refused(
        load, ours, {**state, "head.extra": torch.ones(1)}, "head.extra of the checkpoint has no place in the model"
    )
    gone = f"of the model gets nothing: expected {key} of shape {list(state[key].shape)}"
    refused(load, ours, {name: t for name, t in state.items() if name != key}, gone)
    message = f"{key} has shape [3, 1], expected {list(state[key].shape)}"
    refused(load, ours, {**state, key: torch.ones(3, 1)}, message)
    refused(
        load,
        ours,
        {**state, head: torch.ones(7, 16)},
        f"{head} has shape [7, 16], expected [5, ",
        "keep_classifier",
        "num_classes is 5 in the model and 7 in the checkpoint: build the model with num_classes=7",
    )
    refused(load, ours, {}, f"and {len(ours.state_dict()) - 10} more")
    assert {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")} == eps
    load(ours, state)


@every_case
@pytest.mark.parametrize("classes", [0, 3])
def test_a_classifier_of_ones_own(case, classes):
    theirs, ours, load, save = build(case, num_classes=classes)
    state = theirs.state_dict()
    refused(load, ours, state, "head.", "keep_classifier=True")
    kept = copy.deepcopy(ours.head.state_dict())
    report = load(ours, state, keep_classifier=True)
    assert_same_bits(ours.head.state_dict(), kept)
    assert report.complete and "keeps its head" in str(report) and not any("head" in name for name, _ in report.matched)
    body = {name: t for name, t in state.items() if not name.startswith("head.")}
    assert_same_bits({name: t for name, t in save(ours).items() if not name.startswith("head.")}, body)
    load(ours, body, keep_classifier=True)  # a checkpoint without one
    refused(load, ours, {**body, "norm.weight": torch.ones(3)}, "norm.weight", keep_classifier=True)


def test_reports_say_both_sides():
    theirs, ours, load, _ = build(MINREV)
    report = load(ours, theirs.state_dict())
    assert str(report) == (
        "minREV checkpoint for a RevViT, without its number of heads to compare: 43 parameters match\n"
        "  nothing is left over"
    )
    assert ("blocks.2.F.1.qkv.bias", "layers.2.F.attn.in_proj_bias") in report.matched and len({report}) == 1
    text = refused(load, build(MINREV, fc_norm=False)[1], theirs.state_dict(), "RevViT(..., fc_norm=True)",
                   "fc_norm is False, and minREV averages patches before the last norm: build")  # fmt: skip
    assert "norm.weight of the model gets nothing: expected no such thing in this format" in text
    assert "norm.weight of the checkpoint has no place in the model" in text
    theirs, ours, load, _ = build(VIT)
    assert ("blocks.1.F.1.qkv.bias", "rev_backbone.layers.1.F.attn.q.bias, rev_backbone.layers.1.F.attn.k.bias, "
            "rev_backbone.layers.1.F.attn.v.bias") in load(ours, theirs.state_dict()).matched  # fmt: skip
    refused(load, build(VIT, depth=3)[1], theirs.state_dict(), "expected rev_backbone.layers.2.F.norm.weight")
    refused(load, build(VIT, depth=1)[1], theirs.state_dict(), "rev_backbone.layers.1.F.norm.weight of the checkpoint")


def test_other_things_are_errors():
    theirs, ours, _, _ = build(MINREV)
    with pytest.raises(TypeError, match=r"minREV takes a RevViT.*got Linear"):
        load_minrev(nn.Linear(1, 1), theirs.state_dict())
    with pytest.raises(TypeError, match=r"minREV takes a RevViT\(..., fc_norm=True\) or .*, got PublishedRevMViT"):
        to_minrev(build(MVIT)[1])
    with pytest.raises(TypeError, match="got 'epoch' of int; pass that part"):
        load_minrev(ours, {"epoch": 3, "weights": theirs.state_dict()})
    with pytest.raises(TypeError, match=r"PySlowFast takes a RevViT, PublishedRevMViT or .*, got RevMViT"):
        load_pyslowfast(RevMViT(), {"model_state": {}, "cfg": "MVIT: {NUM_HEADS: 1}"})
    with pytest.raises(ValueError, match=r"eps=1e-06 for blocks.0.F.0, got 1e-05; set eps"):
        to_pyslowfast(RevViT(8, 4, embed_dim=8, depth=1))


def test_the_first_commits_of_minrev_attended_over_the_batch():
    right, wrong = build(MINREV)[0], MinREV(batch_first=False).double()
    wrong.load_state_dict(right.state_dict())
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    assert not torch.allclose(wrong(images)[:1], wrong(images[:1])) and torch.allclose(
        right(images)[:1], right(images[:1])
    )


def test_windows_that_are_rolled_back_are_another_function_of_the_same_weights():
    theirs, _, load, save = build(SWIN)
    rolled = minrev_swin(img_size=8, patch_size=2, num_classes=5, embed_dim=8, num_heads=(2, 4), window_size=2).double()
    state = theirs.state_dict()
    told = "unrolled_windows is False, and minREV never rolls shifted windows back: build the model by"
    refused(load, rolled, state, told, "minrev_swin(..., unrolled_windows=True), or pass same_function=False")
    with pytest.raises(ValueError, match="would compute something else") as caught:
        save(rolled)
    assert told in str(caught.value)
    assert load(rolled, state, same_function=False).complete
    assert_same_bits(save(rolled, same_function=False), state)
    right = MinREVSwin(unrolled=False).double()
    right.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(rolled(images), right(images), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(right(images), theirs(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: RevSwin(drop_path_rate=0.2), ["always_partition is False", "minrev_swin"]),
        (lambda: RevSwin(fusion=ConcatMlp), ["fusion has a norm, and minREV's has none"]),
        (RevMViT, ["fc_norm is False", "fusion is not that of minREV", "keys of the third block are pooled by 1"]),
        (lambda: minrev_mvit(depths=(1, 2, 2)), ["depths are not (1, 2, 1)"]),
        (RevViT, ["fc_norm is False"]),
    ],
)
def test_a_network_that_minrev_cannot_be_is_told_what_to_set(model, words):
    with pytest.raises(ValueError, match="would compute something else") as caught:
        to_minrev(model())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        (MINREV, {"depth": 2}, ["depth is 2 in the model and 3 in the checkpoint: build the model with depth=3"]),
        (MINREV, {"embed_dim": 4}, ["embed_dim is 4", "embed_dim=8"]),
        (SWIN, {"depths": (2, 1)}, ["depths is (2, 1) in the model and (2, 2)"]),
        (SWIN, {"num_heads": (1, 2)}, ["num_heads is (1, 2) in the model and (2, 4)"]),
        (THREE, {"num_heads": 2}, ["num_heads is 2 in the model and 1 in the checkpoint"]),
        (VIT, {"patch_size": 2}, ["patch_size is 2 in the model and 4 in the checkpoint"]),
    ],
)
def test_settings_that_differ_are_named(case, changes, words):
    theirs, ours, load, _ = build(case, **changes)
    refused(load, ours, theirs.state_dict(), *words)


def test_another_number_of_heads_is_seen_where_it_can_be():
    """The weights of a ViT do not tell it, nor does minREV keep it with them; it may be given."""
    theirs, ours, load, _ = build(MINREV, num_heads=4)
    with pytest.raises(ValueError, match="num_heads is 4 in the model and 2 in the checkpoint: build the model"):
        load(ours, theirs.state_dict(), num_heads=2)
    assert "without its number of heads" in str(load(ours, theirs.state_dict()))
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    assert error(ours(images), theirs(images)) > 1e-3
    theirs, ours, load, _ = build(MINREV)
    assert "heads" not in str(load(ours, theirs.state_dict(), num_heads=2))
    assert error(ours(images), theirs(images)) < 1e-11


@pytest.mark.parametrize("network", [minrev_vit, partial(minrev_swin, drop_path_rate=0.2), minrev_mvit])
def test_networks_of_the_recipes_go_there_and_back(network):
    torch.manual_seed(0)
    model, other = network(), network()
    rolled = {"same_function": False} if isinstance(model, RevSwin) else {}
    assert load_minrev(other, to_minrev(model, **rolled), **rolled).complete
    assert_same_bits(other.state_dict(), model.state_dict())


def test_initial_weights_are_those_of_minrev():
    """Its ViT starts as torch's layers do, its other two as timm's; and norms have torch's epsilon but for one."""
    torch.manual_seed(0)
    ours, theirs = minrev_vit(), MinREV((32, 32), 4, 128, 8, 6, 10)
    there = theirs.state_dict()
    for name, mine in to_minrev(ours).items():
        if mine.std() > 0 and mine.numel() > 1000:
            assert mine.std().item() == pytest.approx(there[name].std().item(), rel=0.05), name
        else:
            assert (mine.abs().max() > 0) == (there[name].abs().max() > 0), name
    deviations = [ours.blocks[0].F[1].qkv, ours.blocks[0].F[1].proj, ours.blocks[0].G[1].fc1]
    assert [p.weight.std().item() for p in deviations] == pytest.approx([0.0625, 0.051, 0.051], rel=0.02)
    swin, mvit = minrev_swin(), minrev_mvit()
    biases = [p for name, p in swin.named_parameters() if name.endswith("bias") and "patch_embed.proj" not in name]
    assert biases and all((bias == 0.02).all() for bias in biases)
    tables = [p for name, p in mvit.named_parameters() if "rel_pos" in name]
    assert len(tables) == 8 and not any(table.any() for table in tables)
    assert {m.eps for net in (swin, mvit) for m in net.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    rates = [step.F.drop_path1 for stage in minrev_swin(drop_path_rate=0.2).stages for step in stage]
    assert [getattr(rate, "drop_prob", 0) for rate in rates] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])


def test_published_stages():
    model = build(MVIT, drop_path_rate=0.6)[1]
    model.scheduler = Naive()
    assert {stage.pairs.scheduler for stage in model.stages} == {Naive()} and model.scheduler == Naive()
    rates = [m.drop_prob for name, m in model.named_modules() if name.endswith("drop_path") and hasattr(m, "drop_prob")]
    rates_of_mlps = [pair.G[2].drop_prob for stage in model.stages for pair in stage.pairs]
    assert rates == pytest.approx([0.12 * i for i in range(6)])
    assert rates_of_mlps == pytest.approx([0.0, 0.24, 0.48, 0.6])
    transition = model.stages[2].transition
    x = torch.randn(16, 16, 32, dtype=torch.float64)
    dropped, size = transition(x, (4, 4))
    kept, _ = transition.eval()(x, (4, 4))
    gone = (dropped == 0).all((1, 2))
    assert tuple(size) == (2, 2) and gone.any() and not gone.all()
    assert torch.allclose(dropped[~gone], kept[~gone] / 0.64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = model.eval().forward_features(images)
    assert features.shape == (2, 4, 64) and torch.equal(model(images), model.forward_head(features))
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model(images).shape == (2, 64)
    assert torch.equal(model(images), model.forward_head(features, pre_logits=True))
    model.reset_classifier(4)
    assert model.get_classifier().weight.dtype == torch.float64 and model.no_weight_decay() == {"pos_embed"}


def test_published_stages_have_the_gradients_of_naive_with_stochastic_depth():
    def gradients(scheduler):
        model = build(MVIT, drop_path_rate=0.5, scheduler=scheduler)[1]
        torch.manual_seed(1)
        model(torch.randn(8, 3, 32, 32, dtype=torch.float64)).sin().square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert error(gradients(Reversible()), gradients(Naive())) < 1e-10


@pytest.mark.parametrize(("load", "network"), [(load_pyslowfast, partial(RevViT, 8, 4)), (load_minrev, minrev_vit)])
def test_what_is_no_checkpoint(load, network):
    model = network(embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(TypeError, match=r"got the path 'file.pyth'; load it first, by torch.load\('file.pyth', map_"):
        load(model, "file.pyth")
    with pytest.raises(TypeError, match=r"got the path 'file.pyth'"):
        load(model, Path("file.pyth"))
    with pytest.raises(TypeError, match=r"expected a state_dict, .* got Linear; pass the mapping"):
        load(model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no name in the checkpoint .* it holds 0.weight, 0.bias, and .* are sought"):
        load(model, nn.Sequential(nn.Linear(2, 2)).state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"img_size": 40}, "img_size .* divisible by 16 .* got 40x40; resize to 48x48"),
        ({"num_heads": 3}, "embed_dim .* num_heads=3, got 8"),
        ({"depths": (1, 0)}, r"depths\[1\] takes a whole number from 1 up, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(MVIT, **wrong)


def test_images_of_another_size_are_errors():
    model = build(MVIT, img_size=(32, 64))[1].float()
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="give 8x16 patches, got 16x8"):
        model(torch.randn(1, 3, 64, 32))
