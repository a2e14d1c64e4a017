"""What loading a checkpoint came to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What loading a checkpoint came to. ``str`` gives a few lines of it, everything is in the attributes."""

    title: str
    matched: tuple[tuple[str, str], ...]  # our name and theirs, of what has the right shape
    ours_left: tuple[
        tuple[str, str], ...
    ]  # our name and what was sought, of parameters that get nothing
    theirs_left: tuple[str, ...]  # tensors that have no place in the model
    misshapen: tuple[
        tuple[str, torch.Size, torch.Size], ...
    ]  # their name, the shape that fits the model, and theirs
    settings: tuple[str, ...] = ()  # which settings of the model differ, and how to set them

    @property
    def complete(self) -> bool:
        return not (self.ours_left or self.theirs_left or self.misshapen or self.settings)

    def __str__(self) -> str:
        wrong = [
            f"{name} has shape {list(got)}, expected {list(want)}"
            for name, want, got in self.misshapen
        ]
        wrong += [
            f"{ours} of the model gets nothing: expected {theirs}"
            for ours, theirs in self.ours_left
        ]
        wrong += [
            f"{name} of the checkpoint has no place in the model" for name in self.theirs_left
        ]
        told = wrong if len(wrong) <= 11 else [*wrong[:10], f"and {len(wrong) - 10} more"]
        lines = [f"{self.title}: {len(self.matched)} parameters match", *self.settings, *told]
        return "\n  ".join(lines if len(lines) > 1 else [*lines, "nothing is left over"])
