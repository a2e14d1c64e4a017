"""What loading a checkpoint came to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What was loaded from a checkpoint. ``str`` gives a few lines of it, the attributes have everything.

    Args:
        title: the kind of checkpoint and of model.
        matched: pairs of our name and theirs, of what has the right shape.
        ours_left: pairs of our name and what was sought, of parameters that get nothing.
        theirs_left: names of tensors of the checkpoint that have no place in the model.
        misshapen: their name, the shape that fits the model, and the shape that the checkpoint has.
        settings: which settings of the model differ, and how to set them.

    Example:
        >>> report = Report("a checkpoint", (("ours", "theirs"),), (), ("extra",), ())
        >>> print(report)
        a checkpoint: 1 parameters match
          extra of the checkpoint has no place in the model
        >>> report.complete
        False
    """

    title: str
    matched: tuple[tuple[str, str], ...]
    ours_left: tuple[tuple[str, str], ...]
    theirs_left: tuple[str, ...]
    misshapen: tuple[tuple[str, torch.Size, torch.Size], ...]
    settings: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything matches, so that the checkpoint was loaded."""
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
