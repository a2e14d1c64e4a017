"""Couplings: the law by which a step merges what its function returned into a stream, and its inverse."""

from revlib.couplings.additive import Additive, ExactAdditive
from revlib.couplings.base import Coupling
from revlib.couplings.family import Affine, Scaled

__all__ = ["Additive", "Affine", "Coupling", "ExactAdditive", "Scaled"]
