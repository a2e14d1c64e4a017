"""Property-test your own functions, couplings and schedulers in a few lines.

The assertions need nothing but torch. :mod:`revlib.testing.strategies` needs hypothesis
(``pip install "revlib-torch[testing]"``)::

    from hypothesis import given
    from revlib.testing import assert_inverts, assert_same_gradients, strategies

    @given(strategies.cases())
    def test_my_scheduler(case):
        assert_same_gradients(case.stack, *case.streams, context=case.context, schedulers=[MyScheduler()])

What works on several CUDA streams is tested for races on a CPU, with :func:`assert_no_races` or, around code of your
own, :class:`RaceChecker`.

``assertions.py`` has the assertions, ``strategies.py`` what hypothesis draws, ``memory.py`` counts bytes, and
``races.py`` finds races, on the device that ``model.py`` models.
"""

from typing import TYPE_CHECKING

from revlib.testing.assertions import (
    assert_bijects,
    assert_inverts,
    assert_memory_flat,
    assert_same_gradients,
    assert_unmerges,
)
from revlib.testing.memory import Footprint, LiveBytes, footprint
from revlib.testing.races import RaceChecker, assert_no_races

if TYPE_CHECKING:
    from revlib.testing import strategies

__all__ = [
    "Footprint",
    "LiveBytes",
    "RaceChecker",
    "assert_bijects",
    "assert_inverts",
    "assert_memory_flat",
    "assert_no_races",
    "assert_same_gradients",
    "assert_unmerges",
    "footprint",
    "strategies",
]


def __getattr__(name: str) -> object:
    if name != "strategies":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("revlib.testing.strategies")
