"""minREV's networks, built of the models here: the same function of the images, and the same initial distribution.

Source: github.com/karttikeya/minREV as of May 2023 (rev.py, revswin.py, revmvit.py, main.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from revlib.models.vit import RevViT

__all__ = ["minrev_vit"]


def minrev_vit(**sizes: Any) -> RevViT:
    """A :class:`RevViT` as minREV builds it, with its initial weights.

    It differs from ``RevViT(**sizes)`` in this: patches are averaged before the last norm (``fc_norm=True``); the norm
    before attention has an epsilon of 1e-6, all others of 1e-5; layers start as torch's own do (``init_like_torch``);
    positions start at zero.

    Args: those of ``RevViT``, but for ``fc_norm`` and ``norm_layer``.
    """
    model = RevViT(**sizes, fc_norm=True)
    for step in model.blocks:
        step.F[0].eps = 1e-6
    nn.init.zeros_(model.pos_embed)
    init_like_torch(model)
    return model


def init_like_torch(model: nn.Module) -> None:
    """Give every linear layer the initial weights that torch gives it, and attention those of ``MultiheadAttention``.

    These are, for a layer with n inputs, uniform weights and biases below 1/sqrt(n) in magnitude. In attention, the
    weights of queries, keys and values together are uniform by Glorot's rule, and all biases are zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for module in model.modules():
        if hasattr(module, "qkv") and hasattr(module, "proj"):
            nn.init.xavier_uniform_(module.qkv.weight)
            for layer in (module.qkv, module.proj):
                nn.init.zeros_(layer.bias)
