"""minREV's own flags, accepted by research.train: each is replaced by the flag here, and a line says which that is."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

RENAMED = {
    "--bs": "--batch-size",
    "--embed_dim": "--embed-dim",
    "--n_head": "--num-heads",
    "--patch_size": "--patch-size",
}
# Flags with a value that minREV's argparse takes for true unless it is empty. Here "False" means false.
SWITCHES: dict[str, dict[bool, list[str]]] = {
    "--vanilla_bp": {True: ["--scheduler", "naive"], False: []},
    "--pareprop": {True: ["--scheduler", "pareprop"], False: []},
    "--amp": {True: ["--amp"], False: ["--no-amp"]},
}
WITHOUT_USE = {
    "--image_size": "images of a data set keep their size, and --image-size is for --dataset folder",
    "--num_classes": "the data set tells the number of classes",
}
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def translate(args: list[str], say: Callable[[str], None]) -> list[str]:
    """The same call in the flags of research.train. ``say`` gets a line for each flag of minREV's.

    Raises: typer.BadParameter for a flag of minREV's that has no meaning here, or without its value.
    """
    found: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        flag, equals, value = arg.partition("=")
        inside = [value] if equals else []
        if flag in WITHOUT_USE:
            raise typer.BadParameter(f"{WITHOUT_USE[flag]}; drop it.", param_hint=flag)
        if flag in RENAMED:
            say(f"note: {flag} is {RENAMED[flag]} here")
            found += [RENAMED[flag], *inside]
        elif flag in SWITCHES and (inside or flag != "--amp" or (rest and rest[0].lower() in TRUTHS)):
            word = inside[0] if inside else rest.pop(0) if rest else ""
            if word.lower() not in TRUTHS:
                raise typer.BadParameter(f"expected True or False, got {word or 'nothing'}.", param_hint=flag)
            ours = SWITCHES[flag][TRUTHS[word.lower()]]
            say(f"note: {flag} {word} is {' '.join(ours) or 'the default'} here")
            found += ours
        else:
            found.append(arg)
    if found.count("--scheduler") > 1 and "--vanilla_bp" in " ".join(args):  # there, too, it wins
        place = found.index("naive")
        found += [found.pop(place - 1), found.pop(place - 1)]
    return found


class Command(TyperCommand):
    """A command whose flags may be minREV's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, translate(args, lambda line: typer.echo(line, err=True)))
