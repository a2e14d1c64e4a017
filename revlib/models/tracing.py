"""What tools that read a model's code see of its reversible parts: a symbolic trace one call, a script a refusal.

``torch.fx`` cannot look into a reversible sequence, whose backward is Python that inverts it. A trace therefore notes
the call of the whole module, which then trains in a traced network with the memory that it has outside of one. timm's
and torchvision's feature extraction trace too, and are told by timm's list of modules that are not traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from revlib.step import State

__all__ = ["NotScripted", "Tap", "joined", "noted", "traced"]


def traced(value: object) -> bool:
    """Whether a value is a proxy, which stands for a tensor in a symbolic trace."""
    return isinstance(value, fx.Proxy)


def noted(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Note the call of a module in the trace that its first argument belongs to, and return the proxy of its result."""
    tracer: Any = args[0].tracer
    return tracer.create_proxy(
        "call_module", tracer.path_of_module(module), args, dict(kwargs or {})
    )


class NotScripted(nn.Module):
    """A module that ``torch.jit.script`` refuses in one sentence."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose backward is Python that inverts the stack; "
            "export it with torch.export or torch.onnx.export, or use torch.jit.trace under torch.no_grad()"
        )


class Tap(nn.Module):
    r"""The feature map of a level, $[x_1; x_2]$: a module for hooks, which runs only where it has some.

    Shapes: (..., dim), twice -> (..., 2 dim). No parameters.
    """

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return joined((x1, x2))

    @property
    def heard(self) -> bool:
        """Whether the tap has hooks, so that it must run."""
        return bool(self._forward_hooks or self._forward_pre_hooks)


def joined(streams: State) -> Tensor:
    """Both streams side by side. They are taken by index, since those of a symbolic trace cannot be unpacked."""
    return torch.cat([streams[0], streams[1]], dim=-1)
