"""Weights of the authors' own reversible transformers, minREV's and PySlowFast's, into the models here and back.

Of minREV: a RevViT is a ``RevViT(..., fc_norm=True)`` here, as ``revlib.models.minrev_vit`` builds it; a RevSwin is
a ``revlib.models.minrev_swin(..., unrolled_windows=True)``, a RevMViT a ``revlib.models.minrev_mvit(...)``. Of
PySlowFast: Rev-ViT-S is a ``RevViT(224, 16, 3, 1000, embed_dim=384, depth=12, num_heads=6)``, Rev-ViT-B one with
768 and 12 of these, Rev-MViT-B of ImageNet a ``PublishedRevMViT()``, and Rev-MViT-B 16x4 of Kinetics a
``PublishedRevMViTVideo()``; with ``USE_MEAN_POOLING``, each with ``fc_norm=True``. The stream that attention is
added to is first there and here, also before the head. Norms get the epsilon of the code that a checkpoint is from.
All give logits; PySlowFast adds a softmax in evaluation. Sizes are compared by shapes, which do not tell the heads of
a ViT nor strides: those, and where the last norm stands, are compared with the configuration that PySlowFast keeps in
its checkpoints; a report says so if there is none.

minREV's attention runs over the patches of each image since 23 February 2023 (``batch_first=True``), and the models
here compute the same function. In its first two commits, of 8 February, it ran over the images of a batch: weights
trained with these load too, but no model here computes that function of them.

Source: github.com/karttikeya/minREV; github.com/facebookresearch/SlowFast (reversible_mvit.py, configs REV_*.yaml).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from revlib.checkpoints._formats import FUSED, MINREV, SEPARATE, Format, names, settings
from revlib.checkpoints._report import Report
from revlib.models import RevMViT, RevSwin, RevViT
from revlib.models.pyslowfast import SlowFast, refuse_other_settings

__all__ = ["Report", "load_minrev", "load_pyslowfast", "to_minrev", "to_pyslowfast"]

MinREV = RevViT | RevSwin | RevMViT
INDEX = "relative_position_index"  # a table of integers among the weights of minREV's RevSwin


def load_minrev(
    model: MinREV,
    checkpoint: Mapping[str, Any],
    *,
    keep_classifier: bool = False,
    same_function: bool = True,
    num_heads: int | None = None,
) -> Report:
    """Load the state_dict of a minREV RevViT, RevSwin or RevMViT into ``model``, all of it or nothing.

    ``checkpoint`` may hold it as "model_state", "state_dict" or "model", and names may start with DDP's
    ``module.``. With ``keep_classifier`` the model keeps its own head, for any number of classes. With
    ``same_function=False``, a model whose weights fit gets them even where it computes another function of them, as
    a RevSwin does that rolls its windows back.

    The attention heads of a RevViT cannot be seen in its weights, and minREV keeps no configuration with them: weights
    that were trained with another number of heads load without an error, and give other outputs. Pass the ``--n_head``
    of the training as ``num_heads``, and a model with another number is refused. Where it is not given for a RevViT,
    the report says so.

    Shapes: each tensor has that of the parameter, or is one of the parts it is split into. Cost: the weights once more
    while they are loaded.

    Raises:
        ValueError: with a report of both sides, unless everything matches; nothing is loaded then.
        TypeError: if the model, or the checkpoint, is no such thing.

    Source: the names in github.com/karttikeya/minREV.

    Example:
        >>> from revlib.models import minrev_vit
        >>> sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
        >>> trained, model = minrev_vit(**sizes), minrev_vit(**sizes)
        >>> print(load_minrev(model, {"model_state": to_minrev(trained)}, num_heads=2))
        minREV checkpoint for a RevViT: 31 parameters match
          nothing is left over
    """
    fmt = _minrev(model)
    # Only in a RevViT no shape of a weight depends on the number of heads.
    heads_are_unseen = isinstance(model, RevViT)
    heads = {m.num_heads for m in model.modules() if isinstance(m, Attention)}
    if heads_are_unseen and num_heads is not None and heads - {num_heads}:
        raise ValueError(
            f"num_heads is {heads.pop()} in the model and {num_heads} in the checkpoint: build the "
            f"model with num_heads={num_heads}; nothing was loaded"
        )
    report = _load(fmt, model, checkpoint, keep_classifier, same_function)
    missing = (
        ", without its number of heads to compare" if heads_are_unseen and num_heads is None else ""
    )
    return replace(report, title=report.title + missing)


def load_pyslowfast(
    model: SlowFast,
    checkpoint: Mapping[str, Any],
    *,
    keep_classifier: bool = False,
    config: str | Mapping[str, Any] | None = None,
) -> Report:
    """Load a Rev-ViT or Rev-MViT of PySlowFast, with fused or separate qkv, as :func:`load_minrev` does.

    ``config`` is its configuration, YAML or a mapping, by default what the checkpoint holds as "cfg".

    Shapes and cost are those of :func:`load_minrev`.

    Raises:
        ValueError: as :func:`load_minrev`, and where the configuration is of another network, in heads, strides or
            pooling.
        TypeError: if the model, or the checkpoint, is no such thing.

    Source: the names in github.com/facebookresearch/SlowFast (reversible_mvit.py).

    Example:
        >>> from functools import partial
        >>> sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
        >>> trained = RevViT(**sizes, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        >>> model = RevViT(**sizes)  # its norms get PySlowFast's epsilon, too
        >>> load_pyslowfast(model, {"model_state": to_pyslowfast(trained)}).complete
        True
    """
    fused = any(".attn.qkv." in name for name in _tensors(checkpoint))
    fmt = _fitting((FUSED if fused else SEPARATE,), model)
    known = refuse_other_settings(model, config or checkpoint.get("cfg"))
    report = _load(fmt, model, checkpoint, keep_classifier, True)
    missing = (
        "" if known else ", without a configuration to compare heads, strides and pooling with"
    )
    return replace(report, title=report.title + missing)


def to_minrev(model: MinREV, *, same_function: bool = True) -> dict[str, Tensor]:
    """A state_dict for minREV's network of the same kind. Its tensors are copies.

    Shapes: those of minREV's parameters. Cost: the weights once more.

    Raises:
        ValueError: where minREV's network would compute something else, unless ``same_function=False``.
        TypeError: for a model of another kind.

    Source: the names in github.com/karttikeya/minREV.

    Example:
        >>> from revlib.models import minrev_vit
        >>> model = minrev_vit(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2)
        >>> sorted(to_minrev(model))[:2]
        ['head.bias', 'head.weight']
    """
    return _save(_minrev(model), model, same_function)


def to_pyslowfast(model: SlowFast, *, separate_qkv: bool = True) -> dict[str, Tensor]:
    """A state_dict for PySlowFast's MViT, as :func:`to_minrev`; its checkpoints hold it as "model_state".

    PySlowFast's ``MVIT.USE_MEAN_POOLING`` must be what ``fc_norm`` is here, and ``MVIT.NUM_HEADS`` the heads.

    Shapes and cost are those of :func:`to_minrev`.

    Raises:
        ValueError: where PySlowFast's network would compute something else, such as another epsilon of a norm.
        TypeError: for a model of another kind.

    Source: the names in github.com/facebookresearch/SlowFast (reversible_mvit.py).

    Example:
        >>> from functools import partial
        >>> norm = partial(nn.LayerNorm, eps=1e-6)  # PySlowFast's
        >>> model = RevViT(8, 4, embed_dim=12, depth=1, num_heads=2, norm_layer=norm)
        >>> sorted(to_pyslowfast(model))[:2]
        ['head.projection.bias', 'head.projection.weight']
    """
    return _save(_fitting((SEPARATE if separate_qkv else FUSED,), model), model, True)


def _minrev(model: nn.Module) -> Format:
    return _fitting(MINREV, model)


def _fitting(formats: tuple[Format, ...], model: nn.Module) -> Format:
    for fmt in formats:
        if isinstance(model, fmt.kinds):
            return fmt
    wanted = " or ".join(fmt.model for fmt in formats)
    raise TypeError(
        f"{formats[0].name} takes a {wanted}, got {type(model).__name__}; of a DDP model pass its .module"
    )


def _split(fmt: Format, tensor: Tensor, names: list[str]) -> tuple[Tensor, ...]:
    """One of our parameters in the parts under which the other code has it."""
    pooling = fmt.in_time and tensor.ndim == 4 and any(".pool_" in name for name in names)
    return (tensor.unsqueeze(2) if pooling else tensor).chunk(len(names) or 1)


def _join(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tensors).reshape(like.shape)


def _load(
    fmt: Format,
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    keep_classifier: bool,
    same_function: bool,
) -> Report:
    theirs, ours, skip = _tensors(checkpoint), model.state_dict(), ("head.",) * keep_classifier
    new, matched, ours_left, misshapen, sizes = {}, [], [], [], dict[str, torch.Size]()
    left = {name for name in theirs if not name.startswith(skip) and not name.endswith(INDEX)}
    for name, sought in names(fmt, model):
        want = {
            n: part.shape for n, part in zip(sought, _split(fmt, ours[name], sought), strict=False)
        }
        if name.startswith(skip):
            continue
        sizes |= want
        left -= set(sought)
        missing = [f"{n} of shape {list(want[n])}" for n in sought if n not in theirs]
        wrong = [
            (n, want[n], theirs[n].shape)
            for n in sought
            if n in theirs and theirs[n].shape != want[n]
        ]
        misshapen += wrong
        if missing or not sought:
            ours_left.append((name, ", ".join(missing) or "no such thing in this format"))
        elif not wrong:
            new[name] = _join([theirs[n] for n in sought], ours[name])
            matched.append((name, ", ".join(sought)))
    if sizes and theirs and theirs.keys().isdisjoint(sizes):
        raise ValueError(
            f"no name in the checkpoint is one that {fmt.name} gives to {fmt.model}: it holds {_some(theirs)}, and "
            f"{_some(sizes)} are sought. Nothing was loaded; pass a checkpoint of {fmt.name}"
        )
    different = list(fmt.differs(model)) if same_function else []
    if ours_left or left or misshapen:
        there = settings(model, {n: t.shape for n, t in theirs.items() if not n.startswith(skip)})
        different += [
            f"{key} is {here} in the model and {there[key]} in the checkpoint: build the model with {key}={there[key]}"
            for key, here in settings(model, sizes).items()
            if key in there and there[key] != here
        ]
    title = (
        f"{fmt.name} checkpoint for a {type(model).__name__}"
        + ", which keeps its head" * keep_classifier
    )
    report = Report(
        title,
        tuple(matched),
        tuple(ours_left),
        tuple(sorted(left)),
        tuple(misshapen),
        tuple(different),
    )
    if not report.complete:
        advice = (
            f"build {fmt.model} with the sizes of the checkpoint, or pass keep_classifier=True if "
            "only head differs"
        )
        raise ValueError(f"{report}\nnothing was loaded; {advice}")
    model.load_state_dict({**ours, **new})
    for _, norm, eps in fmt.norms(model):
        norm.eps = eps
    return report


def _some(names: Iterable[str]) -> str:
    """The first of many names."""
    every = list(names)
    return ", ".join([*every[:3], *["..."] * (len(every) > 3)])


def _save(fmt: Format, model: nn.Module, same_function: bool) -> dict[str, Tensor]:
    if same_function and (different := list(fmt.differs(model))):
        raise ValueError(f"{fmt.name} would compute something else of the weights of this {type(model).__name__}:"
                         + "".join(f"\n  {line}" for line in different))  # fmt: skip
    ours, state = model.state_dict(), dict[str, Tensor]()
    for name, sought in names(fmt, model):
        if not sought:
            raise ValueError(f"{fmt.name} has nothing like {name}; it takes {fmt.model}")
        state |= {
            their: part.clone()
            for their, part in zip(sought, _split(fmt, ours[name], sought), strict=True)
        }
        if name.endswith("relative_position_bias_table"):
            attention: Any = model.get_submodule(name.rpartition(".")[0])
            state[f"{sought[0].rpartition('.')[0]}.{INDEX}"] = (
                attention.relative_position_index.clone()
            )
    for name, norm, eps in fmt.norms(model):
        if same_function and norm.eps != eps:
            raise ValueError(
                f"{fmt.name} has eps={eps} for {name}, got {norm.eps}; set eps of that module"
            )
    return state


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    if isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(
            f"expected a checkpoint, got the path {os.fspath(checkpoint)!r}; load it first, by "
            f"torch.load({os.fspath(checkpoint)!r}, map_location='cpu')"
        )
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"expected a state_dict, or a checkpoint that holds one, got {type(checkpoint).__name__}; pass the mapping "
            "of names to tensors"
        )
    for key in ("model_state", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"expected a state_dict of tensors, got {name!r} of {type(value).__name__}; pass that part"
            )
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
