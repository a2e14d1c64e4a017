"""Weights of the authors' own reversible transformers, minREV's and PySlowFast's, into the models here and back.

A minREV RevViT is a ``RevViT(..., fc_norm=True)`` here, Rev-ViT-S a ``RevViT(224, 16, 3, 1000, embed_dim=384, depth=12,
num_heads=6)``, Rev-ViT-B one with 768 and 12 of these, Rev-MViT-B of ImageNet a ``PublishedRevMViT()``, and Rev-MViT-B
16x4 of Kinetics a ``PublishedRevMViTVideo()``; with ``USE_MEAN_POOLING``, each with ``fc_norm=True``. The stream that
attention is added to is first there and here, also before the head. Norms get the epsilon of the code that a checkpoint
is from: 1e-6, but 1e-5 before MLPs and head of minREV. All give logits; PySlowFast adds a softmax in evaluation.
Sizes are compared by shapes, which do not tell heads of a ViT nor strides: those, and where the last norm stands, are
compared with the configuration that PySlowFast keeps in its checkpoints; a report says so if there is none.

minREV gives ``nn.MultiheadAttention`` the batch for the sequence: there a patch attends to the same patch of the other
images. Weights fit one to one, but here, as in the paper, patches attend to patches: another function of them.

Source: github.com/karttikeya/minREV; github.com/facebookresearch/SlowFast (reversible_mvit.py, configs REV_*.yaml).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revlib.models import PublishedRevMViT, PublishedRevMViTVideo, RevViT
from revlib.models.pyslowfast import SlowFast, refuse_other_settings

__all__ = ["Report", "load_minrev", "load_pyslowfast", "to_minrev", "to_pyslowfast"]


@dataclass(frozen=True)
class Report:
    """What loading a checkpoint came to. ``str`` gives a few lines of it, everything is in the attributes."""

    title: str
    matched: tuple[tuple[str, str], ...]  # our name and theirs, of what has the right shape
    ours_left: tuple[tuple[str, str], ...]  # our name and what was sought, of parameters that get nothing
    theirs_left: tuple[str, ...]  # tensors that have no place in the model
    misshapen: tuple[tuple[str, torch.Size, torch.Size], ...]  # their name, the shape that fits the model, and theirs

    @property
    def complete(self) -> bool:
        return not (self.ours_left or self.theirs_left or self.misshapen)

    def __str__(self) -> str:
        wrong = [f"{name} has shape {list(got)}, expected {list(want)}" for name, want, got in self.misshapen]
        wrong += [f"{ours} of the model gets nothing: expected {theirs}" for ours, theirs in self.ours_left]
        wrong += [f"{name} of the checkpoint has no place in the model" for name in self.theirs_left]
        told = wrong if len(wrong) <= 11 else [*wrong[:10], f"and {len(wrong) - 10} more"]
        return "\n  ".join([f"{self.title}: {len(self.matched)} parameters match", *(told or ["nothing is left over"])])


class _Format(NamedTuple):
    name: str
    model: str  # how to build one that fits
    kinds: tuple[type[nn.Module], ...]
    block: str  # what their names in the n-th block start with
    table: dict[str, str]  # what our names start with, after the block: what theirs do; the first that fits
    coarse: tuple[str, ...] = ()  # our norms whose epsilon there is 1e-5, not 1e-6


_MINREV = _Format(
    *("minREV", "RevViT(..., fc_norm=True)", (RevViT,), "layers.{}."),
    table={
        "pos_embed": "pos_embeddings",
        "patch_embed.proj.": "patch_embed.",
        "F.0.": "F.norm.",
        "F.1.qkv.": "F.attn.in_proj_",
        "F.1.proj.": "F.attn.out_proj.",
        "G.0.": "G.norm.",
        "G.1.fc1.": "G.mlp.0.",
        "G.1.fc2.": "G.mlp.2.",
        "fc_norm.": "norm.",
        "head.": "head.",
    },
    coarse=("G.0", "fc_norm"),
)
_SEPARATE = _Format(
    *("PySlowFast", "RevViT, PublishedRevMViT or PublishedRevMViTVideo"),
    *((RevViT, PublishedRevMViT, PublishedRevMViTVideo), "rev_backbone.layers.{}."),
    table={
        "pos_embed": "pos_embed",
        "patch_embed.": "patch_embed.",
        "fusion.": "pre_q_fuse.fuse_fn.",
        "F.0.": "F.norm.",  # of RevViT
        "F.1.qkv.": "F.attn.q. F.attn.k. F.attn.v.",
        "F.1.proj.": "F.attn.proj.",
        "F.norm.": "F.norm.",  # of PublishedRevMViT
        "F.attn.qkv.": "F.attn.q. F.attn.k. F.attn.v.",
        "F.attn.": "F.attn.",
        "G.0.": "G.norm.",
        "G.1.": "G.mlp.",
        "project.": "res_proj.",  # of PublishedRevMViTVideo
        "norm.": "norm.",
        "fc_norm.": "norm.",
        "head.": "head.projection.",
    },
)
_FUSED = _SEPARATE._replace(table=_SEPARATE.table | dict.fromkeys(("F.1.qkv.", "F.attn.qkv."), "F.attn.qkv."))


def load_minrev(model: RevViT, checkpoint: Mapping[str, Any], *, keep_classifier: bool = False) -> Report:
    """Load the state_dict of a minREV RevViT into ``model``, all of it or nothing.

    ``checkpoint`` may hold it as "model_state", "state_dict" or "model", and names may start with DDP's ``module.``.
    With ``keep_classifier`` the model keeps its own head, for any number of classes.
    Raises: ValueError, with a report of both sides, unless everything matches; TypeError for what is no such thing.
    """
    return _load(_MINREV, model, checkpoint, keep_classifier)


def load_pyslowfast(
    model: SlowFast,
    checkpoint: Mapping[str, Any],
    *,
    keep_classifier: bool = False,
    config: str | Mapping[str, Any] | None = None,
) -> Report:
    """Load a Rev-ViT or Rev-MViT of PySlowFast, with fused or separate qkv, as :func:`load_minrev` does.

    ``config`` is its configuration, YAML or a mapping, by default what the checkpoint holds as "cfg".
    Raises: ValueError also where that is of another network, in heads, strides or pooling.
    """
    fused = any(".attn.qkv." in name for name in _tensors(checkpoint))
    known = isinstance(model, _SEPARATE.kinds) and refuse_other_settings(model, config or checkpoint.get("cfg"))
    report = _load(_FUSED if fused else _SEPARATE, model, checkpoint, keep_classifier)
    missing = "" if known else ", without a configuration to compare heads, strides and pooling with"
    return replace(report, title=report.title + missing)


def to_minrev(model: RevViT) -> dict[str, Tensor]:
    """A state_dict for minREV's RevViT, of copies. Raises: ValueError where it would compute something else."""
    return _save(_MINREV, model)


def to_pyslowfast(model: SlowFast, *, separate_qkv: bool = True) -> dict[str, Tensor]:
    """A state_dict for PySlowFast's MViT, as :func:`to_minrev`; its checkpoints hold it as "model_state".

    PySlowFast's ``MVIT.USE_MEAN_POOLING`` must be what ``fc_norm`` is here, and ``MVIT.NUM_HEADS`` the heads.
    """
    return _save(_SEPARATE if separate_qkv else _FUSED, model)


def _names(fmt: _Format, model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Of every parameter, our name and theirs: several if they lie one after another in ours. Blocks have F and G."""
    if not isinstance(model, fmt.kinds):
        raise TypeError(f"{fmt.name} takes a {fmt.model}, got {type(model).__name__}; of a DDP model pass its .module")
    blocks = [f"{name}." for name, module in model.named_modules() if hasattr(module, "F") and hasattr(module, "G")]
    for name in model.state_dict():
        number = next((n for n, block in enumerate(blocks) if name.startswith(block)), None)
        inner, start = (name, "") if number is None else (name[len(blocks[number]) :], fmt.block.format(number))
        prefix = next((prefix for prefix in fmt.table if inner.startswith(prefix)), "")
        yield name, [start + their + inner[len(prefix) :] for their in fmt.table.get(prefix, "").split()]


def _split(tensor: Tensor, names: list[str]) -> tuple[Tensor, ...]:
    """Our parameter as theirs. Their pools convolve in time too, one frame long."""
    flat = tensor.ndim == 4 and any(".pool_" in name for name in names)
    return (tensor.unsqueeze(2) if flat else tensor).chunk(len(names) or 1)


def _join(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tensors).reshape(like.shape)


def _norms(fmt: _Format, model: nn.Module) -> Iterator[tuple[str, nn.LayerNorm, float]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            yield name, module, 1e-5 if name.endswith(fmt.coarse) else 1e-6


def _load(fmt: _Format, model: nn.Module, checkpoint: Mapping[str, Any], keep_classifier: bool) -> Report:
    theirs, ours, skip = _tensors(checkpoint), model.state_dict(), ("head.",) * keep_classifier
    new, matched, ours_left, misshapen, left = {}, [], [], [], {n for n in theirs if not n.startswith(skip)}
    for name, sought in _names(fmt, model):
        if name.startswith(skip):
            continue
        left -= set(sought)
        want = {n: part.shape for n, part in zip(sought, _split(ours[name], sought), strict=False)}
        missing = [f"{n} of shape {list(want[n])}" for n in sought if n not in theirs]
        wrong = [(n, want[n], theirs[n].shape) for n in sought if n in theirs and theirs[n].shape != want[n]]
        misshapen += wrong
        if missing or not sought:
            ours_left.append((name, ", ".join(missing) or "no such thing in this format"))
        elif not wrong:
            new[name] = _join([theirs[n] for n in sought], ours[name])
            matched.append((name, ", ".join(sought)))
    title = f"{fmt.name} checkpoint for a {type(model).__name__}" + ", which keeps its head" * keep_classifier
    report = Report(title, tuple(matched), tuple(ours_left), tuple(sorted(left)), tuple(misshapen))
    if not report.complete:
        advice = (
            f"build {fmt.model} with the sizes of the checkpoint, or pass keep_classifier=True if only head differs"
        )
        raise ValueError(f"{report}\nnothing was loaded; {advice}")
    model.load_state_dict({**ours, **new})
    for _, norm, eps in _norms(fmt, model):
        norm.eps = eps
    return report


def _save(fmt: _Format, model: nn.Module) -> dict[str, Tensor]:
    ours, state = model.state_dict(), dict[str, Tensor]()
    for name, names in _names(fmt, model):
        if not names:
            raise ValueError(f"{fmt.name} has nothing like {name}; it takes {fmt.model}")
        state |= {their: part.clone() for their, part in zip(names, _split(ours[name], names), strict=True)}
    for name, norm, eps in _norms(fmt, model):
        if norm.eps != eps:
            raise ValueError(f"{fmt.name} has eps={eps} for {name}, got {norm.eps}; set eps of that module")
    return state


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("model_state", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a state_dict of tensors, got {name!r} of {type(value).__name__}; pass that part")
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
