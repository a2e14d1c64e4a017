"""A stack as a pure function of tensors: streams, and whatever else its functions read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from revlib.held import ModuleState
from revlib.replay import Autocast, Randomness, Settings, Turn
from revlib.step import Branch, State, evaluate, merge
from revlib.watch import Watch

__all__ = ["Program", "Surroundings", "program_of"]

_TENSOR = object()  # in place of a tensor of the context


class Function(NamedTuple):
    """The function of a step, and what it reads."""

    branch: Branch
    names: tuple[str, ...]  # of its parameters, and of its buffers where these are arguments too
    own: tuple[Tensor, ...]  # what it reads by itself: what its modules hold under these names, and
    context: dict[str, Any]  # the user's, with
    leaves: tuple[Any, ...]  # these
    spec: TreeSpec
    reads: tuple[int, ...]  # places, among all tensors, of the named ones and of the tensors in its context

    def __call__(self, inputs: State, tensors: Sequence[Tensor], *, bind: bool, watch: Watch | None = None) -> Any:
        """On its streams and the tensors that it reads."""
        fn: Any = self.branch.fn
        count = len(self.names)
        context = self.context
        if bind:
            rest = iter(tensors[count:])
            context = tree_unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves], self.spec)
        if bind and count:
            own, held = fn, dict(zip(self.names, tensors[:count], strict=True))
            fn = lambda *args, **context: functional_call(own, held, args, context)  # noqa: E731
        if watch is not None:
            fn = watch.over(fn)
        return evaluate(self.branch._replace(fn=fn), inputs, context)


class Surroundings:
    """What functions run in besides their arguments: random numbers, autocast, and the state of modules."""

    def __init__(self, branches: Sequence[Branch], modules: Sequence[list[nn.Module]], tensors: list[Tensor]) -> None:
        self.branches, self.modules = branches, modules
        self.randomness, self.autocast, self.settings = Randomness(tensors), Autocast(tensors), Settings()
        self.drawn: list[dict[torch.device, Tensor]] = [{} for _ in branches]
        self.states: dict[int, ModuleState] = {}
        self.watch: Watch | None = None

    def watching(self, arguments: Sequence[Tensor]) -> Watch:
        buffers = [b for ms in self.modules for m in ms for b in m._buffers.values() if b is not None]
        self.watch = Watch([*arguments, *buffers])
        return self.watch

    @contextmanager
    def once(self, k: int) -> Iterator[None]:
        """Around the first run of a step's function."""
        state = self.states[k] = ModuleState(self.modules[k], self.branches[k].fn)
        with Turn(), self.randomness.recording(self.drawn[k]), self.autocast.replaying():
            yield
        state.seal()

    @contextmanager
    def again(self, k: int) -> Iterator[None]:
        """Around a repetition."""
        name = self.branches[k].name
        self.states[k].check(name)
        if self.watch is not None:
            self.watch.check(name)
        random, held = self.randomness.replaying(self.drawn[k]), self.states[k].bound()
        with Turn(), self.settings.replaying(), random, held, self.autocast.replaying():
            yield


@dataclass(frozen=True, eq=False)
class Program:  # not a tuple: transforms would look for tensors in it
    """All steps. In compiled code there are no surroundings but the settings of autocast."""

    functions: tuple[Function, ...]
    m: int
    tolerance: float | None
    surroundings: Surroundings | None
    settings: tuple[tuple[str, bool, torch.dtype], ...]

    def mine(self, k: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of all tensors that are not streams, those that a step reads."""
        return [tensors[i] for i in self.functions[k].reads]

    def evaluate(self, k: int, inputs: State, mine: Sequence[Tensor], *, again: bool) -> Any:
        """The function of a step, in the surroundings of forward."""
        function = self.functions[k]
        if self.surroundings is None:
            settings = tuple(s for s in self.settings if s[1] or torch.is_autocast_enabled(s[0]))
            return _under(settings, function, inputs, mine)
        if again:
            with self.surroundings.again(k):
                return function(inputs, mine, bind=True)
        # Its own need no binding, which would disturb other threads and undo what it assigns to itself.
        bind = not all(a is b for a, b in zip(mine, function.own, strict=True))
        with self.surroundings.once(k):
            return function(inputs, mine, bind=bind, watch=self.surroundings.watch)

    def __call__(self, flat: Sequence[Tensor], *, again: bool) -> State:
        """All steps, on the streams and all other tensors."""
        state, tensors = tuple(flat[: self.m]), flat[self.m :]
        for k, function in enumerate(self.functions):
            s, *inputs = state
            f = self.evaluate(k, tuple(inputs), self.mine(k, tensors), again=again)
            merged = merge(function.branch, s, f)
            if merged.dtype != s.dtype:
                raise TypeError(
                    f"{function.branch.name} would turn its {s.dtype} stream into {merged.dtype}; Functional() needs "
                    "streams that keep their dtype: cast the streams, or its result."
                )
            state = (*inputs, merged)
        return state


def _under(settings: Any, function: Function, inputs: State, mine: Sequence[Tensor]) -> Any:
    if not settings:
        return function(inputs, mine, bind=True)
    kind, enabled, dtype = settings[0]
    with torch.autocast(kind, dtype, enabled, cache_enabled=False):  # one by one: the compiler knows no ExitStack
        return _under(settings[1:], function, inputs, mine)


def program_of(
    branches: Sequence[Branch],
    state: State,
    contexts: Sequence[dict[str, Any]],
    tolerance: float | None,
    surroundings: Surroundings | None,
    *,
    buffers: bool,
) -> tuple[Program, list[Tensor]]:
    """A stack, with or without buffers among its arguments. -> itself, and its arguments but streams."""
    places: dict[Tensor, int] = {}
    functions = []
    for branch, context in zip(branches, contexts, strict=True):
        leaves, spec = tree_flatten(context)
        named: dict[str, Tensor] = {}
        if isinstance(branch.fn, nn.Module):
            named = dict(branch.fn.named_parameters())
            if buffers:
                named = {**named, **dict(branch.fn.named_buffers())}
        read = [*named.values(), *(t for t in leaves if isinstance(t, Tensor))]
        saved = read if surroundings is None else [t.clone() if t.is_inference() else t for t in read]
        reads = tuple(places.setdefault(t, len(places)) for t in saved)
        others = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        functions.append(Function(branch, tuple(named), tuple(read), context, others, spec, reads))
    tensors = list(places)
    settings = tuple(Autocast([*state, *tensors]).settings)
    return Program(tuple(functions), len(state), tolerance, surroundings, settings), tensors
