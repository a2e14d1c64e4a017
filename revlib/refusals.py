"""What is said where a function cannot run again, or did not run again as it ran in forward."""

from __future__ import annotations

from typing import NoReturn

import torch

from revlib._torch import raised_by_forbidding_hooks, saved_tensor_hooks_allowed

__all__ = [
    "Metadata",
    "refuse_after_rounding",
    "refuse_forbidden_hooks",
    "refuse_mismatch",
    "refuse_without_hooks",
]

Metadata = tuple[torch.Size, torch.dtype]  # of a saved tensor

_ROUNDED = (
    "Its streams were recovered by inversion, which rounds. That is enough to change what a function decides by value "
    "(routing to experts, argmax, top-k, sorting, thresholds): use coupling=ExactAdditive(), which gives back every "
    "bit, or scheduler=Checkpoint(), which keeps the streams. If it does not decide by value: "
)


def refuse_forbidden_hooks(name: str, error: RuntimeError) -> None:
    """Raises with the reason where a function forbids saved-tensor hooks while it runs in forward."""
    if raised_by_forbidding_hooks(error):
        raise RuntimeError(
            f"{name} uses a torch.func transform (grad, vjp, jacrev, hessian), or enters "
            "disable_saved_tensors_hooks. Neither can run under saved-tensor hooks, by which this scheduler saves "
            "memory. Use scheduler=Functional(), which needs none, or torch.autograd.grad(create_graph=True) in "
            "place of the transform."
        ) from error


def refuse_without_hooks(name: str) -> None:
    """Raises where backward was called with saved-tensor hooks forbidden."""
    if not saved_tensor_hooks_allowed():
        raise RuntimeError(
            f"backward through a reversible sequence runs {name} again under saved-tensor hooks, which "
            "torch.autograd.graph.disable_saved_tensors_hooks forbids here; call backward outside of it, or use "
            "scheduler=Naive() or Functional(), which need none."
        )


def refuse_mismatch(
    name: str, came: list[Metadata], expected: list[Metadata], rounded: bool
) -> NoReturn:
    """Raises with the first saved tensor that differs in shape or dtype, or is missing."""
    i = next((i for i, (a, b) in enumerate(zip(came, expected, strict=False)) if a != b), None)
    i = min(len(came), len(expected)) if i is None else i
    kept, now = (
        f"{tuple(m[i][0])} {m[i][1]}" if i < len(m) else "nothing more" for m in (expected, came)
    )
    raise RuntimeError(
        f"{name} does not repeat: as saved tensor {i} autograd kept {kept} in forward, and {now} "
        f"when it ran again in backward. {_ROUNDED if rounded else ''}Its result must depend only on its "
        "streams, its context, its parameters and the default random generators. Something it reads has changed "
        "since forward, or it chooses at random."
    )


def refuse_after_rounding(name: str, error: Exception) -> None:
    """Raises with the likely cause where a function fails on streams that have rounding errors."""
    if type(error) in (RuntimeError, ValueError, IndexError):
        raise RuntimeError(
            f"{name} raised {type(error).__name__} when it ran again in backward, and not in forward: {error}. "
            f"{_ROUNDED}something it reads has changed since forward."
        ) from error
