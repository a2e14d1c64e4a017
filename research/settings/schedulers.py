"""Schedulers by name, with their number after a colon: what --scheduler takes."""

import typer

from revlib.schedulers import (
    Anchored,
    Budget,
    Checkpoint,
    Functional,
    KeepLast,
    Naive,
    PaReprop,
    Reversible,
    Scheduler,
)

# The schedulers that take no number, and those that do, with an example of each.
PLAIN: dict[str, Scheduler] = {
    "naive": Naive(),
    "reversible": Reversible(),
    "functional": Functional(),
    "pareprop": PaReprop(),
    "checkpoint": Checkpoint(),
}
NUMBERED = {
    "checkpoint": (Checkpoint, "checkpoint:2"),
    "keep-last": (KeepLast, "keep-last:4"),
    "anchored": (Anchored, "anchored:8"),
}
EXAMPLES = [*PLAIN, *(example for _, example in NUMBERED.values()), "budget:0.5", "budget:2000000000"]


def scheduler(text: str) -> Scheduler:
    """The scheduler that a text names, such as ``reversible``, ``checkpoint:2`` or ``budget:0.5``.

    A number of a budget is a fraction of what all activations take if it has a point, and otherwise a number of bytes.
    Raises: typer.BadParameter for a text that names none.
    """
    name, colon, number = text.partition(":")
    if not colon and name in PLAIN:
        return PLAIN[name]
    try:
        if name in NUMBERED:
            return NUMBERED[name][0](int(number))
        if name == "budget":
            return Budget(fraction=float(number)) if "." in number else Budget(bytes=int(number))
    except (ValueError, TypeError) as error:
        raise _unknown(text, f" ({error})" if number else "") from error
    raise _unknown(text)


def _unknown(text: str, reason: str = "") -> typer.BadParameter:
    return typer.BadParameter(
        f"expected a scheduler, such as {', '.join(EXAMPLES)}; got {text}{reason}. The number of checkpoint, keep-last "
        "and anchored counts steps; that of budget is a fraction of all activations, or bytes.",
        param_hint="--scheduler",
    )


def checked(text: str) -> str:
    """The text, once it is known to name a scheduler."""
    scheduler(text)
    return text
