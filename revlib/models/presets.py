"""The published sizes, registered with timm: ``timm.create_model("rev_vit_small", num_classes=10)``.

Importing :mod:`revlib.models` registers them. Arguments of the model's class override those of the preset, also
``coupling=`` and ``scheduler=``; ``features_only=True, out_indices=...`` gives feature maps. Weights come with none.

Presets are architectures. Drop path, which timm leaves at 0 too, belongs to a recipe: PySlowFast trained Rev-ViT-S and
Rev-MViT-B with 0.1, Rev-ViT-B with 0.2; Swin's authors trained T/S/B with 0.2/0.3/0.5.

Source: Mangalam et al., *Reversible Vision Transformers*, CVPR 2022, and its configurations in PySlowFast
(configs/ImageNet/REV_*.yaml); Dosovitskiy et al., *ViT*, 2021, and Touvron et al., *DeiT*, 2021 (L and tiny); Liu et
al., *Swin Transformer*, ICCV 2021; minREV (CIFAR-10), whose sizes are the defaults of the classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from revlib.models.base import TimmModel, check_numbers
from revlib.models.fusion import ConcatMlp
from revlib.models.mvit import RevMViT
from revlib.models.sizes import checkpoint_of_mvit, checkpoint_of_swin, checkpoint_of_vit
from revlib.models.swin import RevSwin
from revlib.models.vit import RevViT

__all__: list[str] = []  # register_model adds the presets

CIFAR10 = {
    "num_classes": 10, "input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)
}  # fmt: skip
PATCH16 = {"patch_size": 16, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
WINDOW7 = {"patch_size": 4, "window_size": 7}

SIZES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "rev_vit_tiny": (RevViT, {**PATCH16, "embed_dim": 192, "depth": 12, "num_heads": 3}),
    "rev_vit_small": (RevViT, {**PATCH16, "embed_dim": 384, "depth": 12, "num_heads": 6}),
    "rev_vit_base": (RevViT, {**PATCH16, "embed_dim": 768, "depth": 12, "num_heads": 12}),
    "rev_vit_large": (RevViT, {**PATCH16, "embed_dim": 1024, "depth": 24, "num_heads": 16}),
    "rev_swin_tiny": (
        RevSwin,
        {**WINDOW7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    ),
    "rev_swin_small": (
        RevSwin,
        {**WINDOW7, "embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    ),
    "rev_swin_base": (
        RevSwin,
        {**WINDOW7, "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    ),
    "rev_swin_large": (
        RevSwin,
        {**WINDOW7, "embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    ),
    "rev_mvit_base": (
        RevMViT,
        {
            "patch_size": 4,
            "embed_dim": 96,
            "depths": (1, 2, 11, 2),
            "kv_stride": 4,
            "fusion": ConcatMlp,
        },
    ),
    "rev_vit_cifar10": (RevViT, {}),
    "rev_swin_cifar10": (RevSwin, {}),
    "rev_mvit_cifar10": (RevMViT, {}),
}


FILTERS: dict[type[nn.Module], Callable[..., dict[str, Tensor]]] = {
    RevViT: checkpoint_of_vit,
    RevSwin: checkpoint_of_swin,
    RevMViT: checkpoint_of_mvit,
}


def _cfg(name: str, model: type[nn.Module]) -> dict[str, Any]:
    """timm's configuration of a model: it has no pretrained weights, and images of this size."""
    return {
        "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True,
        "pool_size": None if model is not RevSwin else (4, 4) if name.endswith("cifar10") else (7, 7),
        "crop_pct": 0.9, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head.fc" if model is RevMViT else "head",
        **(CIFAR10 if name.endswith("cifar10") else {}),
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {name: _cfg(name, model) for name, (model, _) in SIZES.items()}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    model, sizes = SIZES[name]
    defaults = {argument: p.default for argument, p in inspect.signature(model).parameters.items()}

    def checked(**given: Any) -> nn.Module:
        if unknown := [argument for argument in given if argument not in defaults]:
            raise TypeError(
                f"{name} takes no argument {unknown[0]!r}; {model.__name__} takes {', '.join(defaults)}"
            )
        built = model(**given)
        if features["feature_cls"] == "fx" and isinstance(built, TimmModel):
            for i in feature_take_indices(levels, features["out_indices"])[0]:
                # A tap runs only while it has a hook, and the trace must have its map.
                built.taps[i].register_forward_hook(_listen)
        return built

    arguments = defaults | sizes | kwargs
    depth = "depths" if "depths" in arguments else "depth"
    check_numbers({depth: arguments[depth]}, per_stage=("depths",))
    levels = len(arguments["depths"]) if depth == "depths" else arguments["depth"]
    # A number asks for so many of the last feature maps.
    features: dict[str, Any] = {"out_indices": min(levels, 4), "feature_cls": "getter"}
    if kwargs.get("features_only"):
        features |= {name: kwargs.pop(name) for name in list(features) if name in kwargs}
    filter_fn = FILTERS[model]
    return build_model_with_cfg(
        checked,
        name,
        pretrained,
        feature_cfg=features,
        pretrained_filter_fn=filter_fn,
        **(sizes | kwargs),
    )


def _listen(*args: object) -> None: ...


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function that timm calls for a name, as if written out: it is registered under its module and name."""
    model, sizes = SIZES[name]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"{model.__name__} with {sizes or 'its default sizes'}; ``kwargs`` override them."
    )
    create.__annotations__["return"] = model
    return register_model(create)


globals().update({name: _entrypoint(name) for name in SIZES})
