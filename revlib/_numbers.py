"""Checks of the numbers that users give. Errors name the argument, say what it takes, and show what was given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

__all__ = ["divisible", "is_power_of_two", "real", "whole"]


def whole(argument: str, value: object, least: int, *, of: str = "", advice: str = "") -> None:
    """Require a whole number, of something such as bytes, that is not below ``least``.

    Integers of NumPy are whole numbers, too.

    Raises: ValueError with ``advice`` at its end.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        counted = f" of {of}" if of else ""
        raise ValueError(
            f"{argument} takes a whole number{counted} from {least} up, got {value!r}{advice}"
        )


def real(
    argument: str,
    value: object,
    accepts: Callable[[float], bool],
    wanted: str,
    *,
    advice: str = "",
) -> None:
    """Require a number that ``accepts`` takes; ``wanted`` says in words which numbers these are.

    Raises: ValueError with ``advice`` at its end.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not accepts(float(value)):
        raise ValueError(f"{argument} takes {wanted}, got {value!r}{advice}")


def divisible(argument: str, value: int, divisor: str, by: int) -> None:
    """Require that the argument ``divisor``, which is ``by``, divides the value. Raises: ValueError."""
    if value % by:
        raise ValueError(f"{argument} must be divisible by {divisor}={by}, got {value}")


def is_power_of_two(x: float) -> bool:
    return x > 0 and math.frexp(x)[0] == 0.5
