"""Fields of a dataclass as command-line flags, and rules for their values, whose errors show what was given."""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import typer


def flag(panel: str, text: str, *names: str, **rules: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **rules)


def whole(low: int, high: int | None = None) -> dict[str, Any]:
    """Rules of a flag that takes a whole number. typer's own message would not show what was given."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise typer.BadParameter(f"expected {wanted}, got {text}.")
        return number

    return {"parser": parse, "metavar": "INT"}


def real(low: float, below: float) -> dict[str, Any]:
    """Rules of a flag that takes a number x with low <= x < below."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not low <= number < below:
            raise typer.BadParameter(f"expected a number x with {low:g} <= x < {below:g}, got {text}.")
        return number

    return {"parser": parse, "metavar": "FLOAT"}


def whole_numbers(text: str, flag: str) -> list[int]:
    """The numbers of a text such as 4,12,48, in order and none twice."""
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise typer.BadParameter(
            f"expected whole numbers of at least 1, such as 4,12,48, got {text!r}", param_hint=flag
        )
    return numbers


def keywords(function: Callable[..., Any], kind: type) -> Callable[..., Any]:
    """Make a command of `function(config, ...)`: it takes a keyword for each field of config, which is of the class
    `kind`, and the other arguments of the function. typer turns these into flags."""
    own = list(inspect.signature(function).parameters.values())[1:]

    def command(**values: Any) -> Any:
        others = {p.name: values.pop(p.name) for p in own}
        return function(kind(**values), **others)

    hints = get_type_hints(function, include_extras=True)
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*own, *inspect.signature(kind).parameters.values()]
    )
    command.__annotations__ = {p.name: hints[p.name] for p in own} | get_type_hints(kind, include_extras=True)
    return command
