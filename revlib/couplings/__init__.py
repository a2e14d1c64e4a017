"""Couplings: the law by which a step merges what its function returned into a stream, and its inverse."""

from revlib.couplings.additive import Additive, ExactAdditive
from revlib.couplings.base import Coupling

__all__ = ["Additive", "Coupling", "ExactAdditive"]
