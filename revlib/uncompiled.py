"""The entries to both engines that ``torch.compile`` must not look into, as it meets them while it traces a model.

This file is imported by code that is being traced, and only then: making these functions loads the compiler, which
takes seconds, and without a compiler nobody needs them.
"""

from __future__ import annotations

import torch

from revlib.functional.autograd_function import run_eagerly
from revlib.schedulers.base import Scheduler

__all__ = ["run_functional_uncompiled", "run_uncompiled"]

run_uncompiled = torch.compiler.disable(Scheduler.record)
# The compiler prints the reason with its graph break.
run_functional_uncompiled = torch.compiler.disable(
    run_eagerly,
    reason="Functional() goes into a whole graph, with torch 2.14, where functions are modules, draw no random numbers "
    "(dropout, drop path: compiled code would draw others in the repetition), update no statistics, and hold tensors "
    "that need gradients as parameters only; compile without fullgraph, or compile the functions alone",
)
