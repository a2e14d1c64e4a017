"""Couplings: the law by which a step merges what its function returned into a stream, and its inverse.

``base.py`` says what a coupling is. ``additive.py`` has the sums: in floating point, and on a grid where nothing is
lost, for which ``kernel.py`` is the CUDA kernel. ``family.py`` has the couplings that scale.
"""

from revlib.couplings.additive import Additive, DefaultAdditive, ExactAdditive
from revlib.couplings.base import Coupling
from revlib.couplings.family import Affine, Scaled

__all__ = ["Additive", "Affine", "Coupling", "DefaultAdditive", "ExactAdditive", "Scaled"]
