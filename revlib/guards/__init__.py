"""Guards: each knows one thing that a repetition depends on. The core calls them, and knows none of them.

==================  ====================================================================================
randomness          the states of random generators
settings            autocast, the default dtype and device, kernels of attention, inference mode
modules             which modules a function reads, and what they hold (not a guard: two guards need it)
module_state        parameters, buffers, modes, attributes, children and hooks of these modules
containers          state in lists, dicts, arrays and plain objects (not a guard: module_state uses it)
edits               tensors that the function reads besides: edited in place, or replaced
recovery_check      everything else, by what it does: the recovered streams are compared with forward's
early_stop          whether a repetition may end with the last tensor that the function saves
several             all of them as one guard, which is what the core is given (not a guard itself)
measure             what each step would take to keep; it refuses nothing
==================  ====================================================================================

Each file says what it catches, what it cannot see, and what it costs. They are independent of each other, but for one
edge: a captured tensor that was replaced is compared by the recovery check.
"""

from revlib.guards.early_stop import EarlyStop
from revlib.guards.edits import Edits
from revlib.guards.measure import Measure, StepCost
from revlib.guards.module_state import ModuleStates
from revlib.guards.randomness import Randomness
from revlib.guards.recovery_check import RecoveryCheck, raise_pending
from revlib.guards.settings import Settings
from revlib.guards.several import Guards, StepGuards, first_run, repetition

__all__ = [
    "EarlyStop",
    "Edits",
    "Guards",
    "Measure",
    "ModuleStates",
    "Randomness",
    "RecoveryCheck",
    "Settings",
    "StepCost",
    "StepGuards",
    "first_run",
    "raise_pending",
    "repetition",
]
