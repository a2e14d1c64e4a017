"""What forward keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What forward keeps: the activations of some steps, and some states. Backward recovers the rest.

    Step k leads from state k to state k + 1, so a stack of n steps has the states 0, ..., n.

    Args:
        activations: steps for which autograd keeps what it saves, as it does without this library.
        states: whole states to keep. A step whose activations are not kept is repeated from state k if that is kept.
            Otherwise it is undone, together with all steps in between, from the nearest state above that is known.
        streams: steps of which the stream that they merge away is kept (of a bijection, its whole input). Such a step
            need not be inverted, so its function stops as soon as its activations are back.

    Steps among ``activations`` that a stack does not have name nothing of it, so that a plan may say
    ``range(length - 2, length)`` of a stack of one step.

    Cost: memory for what is named, from forward until backward has used it. Of a step, that is what autograd saves in
    it; of a state, all of its streams, less those that something else keeps alive anyway.

    Raises:
        TypeError: for anything but collections of whole numbers.
        ValueError: in :meth:`check`, which every forward calls.

    Example:
        >>> Plan(activations=[4, 5], states=[4]).check(6)  # KeepLast(2): steps 3, 2, 1, 0 are undone from state 4
        >>> Plan(activations=[4, 5]).check(6)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the plan of this scheduler keeps neither the activations of step 0 nor any of ...
    """

    activations: Collection[int] = ()
    states: Collection[int] = ()
    streams: Collection[int] = ()

    def __post_init__(self) -> None:
        for name in ("activations", "states", "streams"):
            value = getattr(self, name)
            if isinstance(value, range):
                continue
            counts = isinstance(value, Collection) and all(isinstance(k, Integral) for k in value)
            if not counts:
                raise TypeError(
                    f"Plan({name}=...) takes a collection of whole numbers, such as a list or a range, got {value!r}"
                )

    def check(self, length: int) -> None:
        """Raise ValueError if backward could not recover some step of a stack of ``length`` steps."""
        top = max((j for j in self.states if j <= length), default=-1)
        for k in range(top + 1, length):
            if k not in self.activations:
                raise ValueError(
                    f"the plan of this scheduler keeps neither the activations of step {k} nor any of the states "
                    f"{k}, ..., {length}, so backward could not recover the step; keep state {length}, the last."
                )
