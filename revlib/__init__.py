"""revlib: reversible networks in PyTorch, trained in the activation memory of one step."""

from revlib.chunks import positionwise
from revlib.couplings import Additive, Coupling, ExactAdditive
from revlib.guards import raise_pending
from revlib.schedulers import (
    Anchored,
    Budget,
    Checkpoint,
    Functional,
    KeepLast,
    Naive,
    PaReprop,
    Reversible,
)
from revlib.sequence import ReversibleSequence, invert, reversible
from revlib.step import Step

__version__ = "0.2.0"
__all__ = [
    "Additive",
    "Anchored",
    "Budget",
    "Checkpoint",
    "Coupling",
    "ExactAdditive",
    "Functional",
    "KeepLast",
    "Naive",
    "PaReprop",
    "Reversible",
    "ReversibleSequence",
    "Step",
    "invert",
    "positionwise",
    "raise_pending",
    "reversible",
]
