"""Scenes: pieces of a researcher's code, played under every scheduler and compared with plain autograd.

A scene is a function of a :class:`Stage`, which it asks for stacks. It returns all that a user
sees: outputs, gradients, parameters, buffers, counts. ``@scene`` makes a test of it for each
scheduler: what it returns there must be what it returns by hand, without the engine. A scene may
let a scheduler refuse instead. Then revlib itself must raise an error whose words match, and what
the scene has declared :meth:`Stage.intact` must be as it was before.

What fails today is marked strictly with the item of the issue, by how it fails. ``wrong`` returns
something else. ``refused`` raises revlib's error where the right answer is asked for, or with a
message that does not say what it should. ``broken`` ends in an error that is not revlib's. After
a fix the test fails until the mark is taken away.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from common import ByHand, error
from situations.base import SCHEDULERS, Setting, raised_by_revlib
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revlib import Additive, Coupling
from revlib.schedulers import Scheduler

__all__ = ["ALL", "INEXACT", "RECOMPUTING", "Stage", "Unlike", "scene", "share_no_storage"]

ALL = " ".join(SCHEDULERS)
_KINDS = {name: name.partition("(")[0] for name in SCHEDULERS}
RECOMPUTING = "Reversible PaReprop Checkpoint Checkpoint(every=2) Anchored KeepLast Budget"
INEXACT = "Reversible PaReprop Checkpoint(every=2) Anchored KeepLast Budget"


class Unlike(AssertionError):  # noqa: N818
    """A scheduler returned something else than plain autograd does."""


class Foreign(Exception):  # noqa: N818
    """An error that is not revlib's, where plain autograd raises none."""


class Refused(Exception):  # noqa: N818
    """revlib's own error, where the right answer is wanted, or with a message that does not help."""


@dataclass(frozen=True)
class Stage(Setting):
    """A :class:`Setting` that also remembers what a refusal must leave as it is."""

    kept: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)

    def intact(self, look: Callable[[], Any]) -> None:
        """From here on, whatever is refused."""
        self.kept.append((look, _copied(look())))

    def forward_is_over(self) -> None:
        """A refusal comes too late from here on."""
        self.kept.append((lambda: "over", "running"))


def _copied(found: Any) -> Any:
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else copy.copy(v), found)


def _names(listed: str) -> set[str]:
    """Schedulers by name, the kind for short: all of those of a kind without arguments are meant."""
    found = set()
    for word in listed.split():
        matching = {n for n, kind in _KINDS.items() if n == word or (kind == word and n != "Checkpoint(every=2)")}
        assert matching, f"no scheduler is called {word!r}"
        found |= matching
    return found


def _play(play: Callable[..., Any], stage: Stage, **rest: Any) -> Any:
    """From the same seeds, in float64."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            return [play(stage, **rest), torch.rand(1)]
        finally:
            torch.set_default_dtype(before)


@functools.cache
def _by_hand(play: Callable[..., Any], coupling: Coupling, **rest: Any) -> Any:
    """What the scene returns without the engine: the same for every scheduler."""
    return _play(play, Stage(ByHand(), coupling), **rest)


def scene(
    item: str,
    *,
    wrong: str = "",
    refused: str = "",
    broken: str = "",
    refusal: str | None = None,
    refusing: str = ALL,
    without: str = "",
    tolerance: float = 1e-10,
    coupling: Coupling = Additive(),  # noqa: B008
    marks: Sequence[Any] = (),
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a test of a scene.

    Args:
        item: of the issue; what fails today is marked with it.
        wrong, refused, broken: the schedulers that fail today, by how.
        refusal: a pattern of the message with which a scheduler may refuse, where the right answer need not be given.
        refusing: the schedulers that may.
        without: schedulers under which there is nothing to play.
    """
    fails = {
        name: kind
        for kind, listed in ((Unlike, wrong), (Refused, refused), (Foreign, broken))
        for name in _names(listed)
    }
    may = _names(refusing) if refusal is not None else set()
    told = {Unlike: "silently wrong", Refused: "refused", Foreign: "an error that is not revlib's"}

    def parameter(name: str, scheduler: Scheduler) -> Any:
        kind = fails.get(name)
        failing = [] if kind is None else [
            pytest.mark.xfail(strict=True, raises=kind, reason=f"issue 15 item {item}: {told[kind]}")
        ]  # fmt: skip
        return pytest.param(scheduler, id=name, marks=[*failing, *marks])

    cells = [parameter(name, s) for name, s in SCHEDULERS.items() if name not in _names(without)]

    def decorate(play: Callable[..., Any]) -> Callable[..., None]:
        @pytest.mark.filterwarnings("ignore")
        @pytest.mark.parametrize("scheduler", cells)
        @functools.wraps(play)
        def test(scheduler: Scheduler, **rest: Any) -> None:
            want = _by_hand(play, coupling, **rest)
            stage = Stage(copy.deepcopy(scheduler), coupling)
            try:
                got = _play(play, stage, **rest)
            except Exception as raised:
                if not raised_by_revlib(raised):
                    raise Foreign(f"{type(raised).__name__}: {raised}") from raised
                name = next(n for n, s in SCHEDULERS.items() if s == scheduler)
                if name not in may or not re.search(refusal or "", str(raised), re.DOTALL | re.IGNORECASE):
                    raise Refused(f"{type(raised).__name__}: {raised}") from raised
                for look, before in stage.kept:
                    if not _same(look(), before):
                        raise Unlike(f"refused, but only after {before} had become {look()}") from raised
                return
            try:
                far = error(got, want)
            except AssertionError as unlike:
                raise Unlike((str(unlike) or "a number or a flag differs")[:600]) from None
            if not far < tolerance:
                raise Unlike(f"{far:.2e} from plain autograd, where {tolerance:.0e} is tolerated")

        _, *others = inspect.signature(play).parameters.values()
        own = inspect.Parameter("scheduler", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *others])  # type: ignore[attr-defined]
        return test

    return decorate


def _same(found: Any, before: Any) -> bool:
    now, then = tree_leaves(found), tree_leaves(before)
    return len(now) == len(then) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(now, then, strict=True)
    )


def share_no_storage(*holders: Tensor | nn.Module) -> int:
    """How many of the gradients lie in the memory of another: none, under autograd."""
    leaves = [t for h in holders for t in (h.parameters() if isinstance(h, nn.Module) else [h])]
    found = [t.grad.untyped_storage().data_ptr() for t in {id(t): t for t in leaves}.values() if t.grad is not None]
    return len(found) - len(set(found))
