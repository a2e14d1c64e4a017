"""Schedulers: how backward gets each step's activations back. Immutable values, swapped at any time.

A scheduler answers one question, :meth:`Scheduler.plan`: of a stack of n steps, which steps keep their activations,
and which streams and states are kept? The engine recovers everything else. So a new scheduler is a few lines::

    @dataclass(frozen=True)
    class KeepFirst(Scheduler):
        "Keep the activations of the first k steps, and invert the rest."

        k: int

        def plan(self, length: int) -> Plan:
            return Plan(activations=range(min(self.k, length)), states=[length])

They compose: ``KeepLast(4, below=Checkpoint(every=2))``, ``PaReprop(Budget(fraction=0.3))``.
"""

from revlib.engine import PassOptions, Plan
from revlib.schedulers.base import Scheduler
from revlib.schedulers.budget import Budget
from revlib.schedulers.functional import Functional
from revlib.schedulers.pareprop import PaReprop
from revlib.schedulers.plans import Anchored, Checkpoint, KeepLast, Naive, Reversible

__all__ = [
    "Anchored",
    "Budget",
    "Checkpoint",
    "Functional",
    "KeepLast",
    "Naive",
    "PaReprop",
    "PassOptions",
    "Plan",
    "Reversible",
    "Scheduler",
]
