"""A stack as a pure function of tensors: streams, and whatever else its functions read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from revlib._torch import TreeSpec, tree_flatten, tree_unflatten
from revlib.core import Guards, StepGuard, StepView, first_run, repetition
from revlib.functional.purity import PurityMode
from revlib.guards import ModuleStates, Randomness, Settings
from revlib.guards.randomness import CpuGeneratorLock
from revlib.guards.settings import AutocastSettings, autocast_settings
from revlib.step import BoundStep, State, evaluate, merge

__all__ = ["Environment", "PureStack", "pure_stack_of"]

_TENSOR = object()  # in place of a tensor of the context


class PureStep(NamedTuple):
    """The function of a step, and what it reads."""

    step: BoundStep
    names: tuple[str, ...]  # of its parameters, and of its buffers where these are arguments too
    own: tuple[Tensor, ...]  # what it reads by itself: what its modules hold under these names, and
    context: dict[str, Any]  # the user's, with
    leaves: tuple[Any, ...]  # these
    spec: TreeSpec
    reads: tuple[
        int, ...
    ]  # places, among all tensors, of the named ones and of the tensors in its context

    def __call__(
        self,
        inputs: State,
        tensors: Sequence[Tensor],
        *,
        bind: bool,
        purity: PurityMode | None = None,
    ) -> Any:
        """On its streams and the tensors that it reads."""
        fn: Any = self.step.fn
        count = len(self.names)
        context = self.context
        if bind:
            rest = iter(tensors[count:])
            context = tree_unflatten(
                [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves], self.spec
            )
        if bind and count:
            own, held = fn, dict(zip(self.names, tensors[:count], strict=True))
            fn = lambda *args, **context: functional_call(own, held, args, context)  # noqa: E731
        if purity is not None:
            fn = purity.over(fn)
        return evaluate(BoundStep(fn, self.step.coupling, self.step.name), inputs, context)


class Environment:
    """What functions run in besides their arguments: random numbers, settings, and the state of modules.

    It is watched by the same guards as in the other engine, at the points where this engine runs a function.
    """

    def __init__(
        self,
        steps: Sequence[BoundStep],
        contexts: Sequence[dict[str, Any]],
        modules: Sequence[list[nn.Module]],
        tensors: list[Tensor],
    ) -> None:
        self.steps, self.modules = steps, modules
        # Without tensors, which are arguments of the pure function.
        self.contexts = [
            {k: v for k, v in context.items() if not isinstance(v, Tensor)} for context in contexts
        ]
        self.guards = Guards([Randomness(tensors), Settings(tensors), ModuleStates()])
        self.step_guards: dict[int, StepGuard] = {}
        self.purity: PurityMode | None = None

    def watching(self, arguments: Sequence[Tensor]) -> PurityMode:
        buffers = [
            b for ms in self.modules for m in ms for b in m._buffers.values() if b is not None
        ]
        self.purity = PurityMode([*arguments, *buffers])
        return self.purity

    @contextmanager
    def first_run(self, k: int) -> Iterator[None]:
        """Around the first run of a step's function."""
        guard = self.step_guards[k] = self.guards.step(
            StepView(k, self.steps[k], self.contexts[k], True, False), ()
        )
        with (
            CpuGeneratorLock(),
            first_run(guard),
        ):  # other threads may bind these modules to their tensors
            yield

    @contextmanager
    def repetition(self, k: int) -> Iterator[None]:
        """Around a repetition."""
        guard = self.step_guards[k]
        with CpuGeneratorLock():
            guard.check()
            if self.purity is not None:
                self.purity.check(self.steps[k].name)
            with repetition(guard):
                yield


@dataclass(frozen=True, eq=False)
class PureStack:  # not a tuple: transforms would look for tensors in it
    """All steps. In compiled code there are no environment but the settings of autocast."""

    functions: tuple[PureStep, ...]
    m: int
    tolerance: float | None
    environment: Environment | None
    settings: AutocastSettings

    def mine(self, k: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of all tensors that are not streams, those that a step reads."""
        return [tensors[i] for i in self.functions[k].reads]

    def evaluate(self, k: int, inputs: State, mine: Sequence[Tensor], *, again: bool) -> Any:
        """The function of a step, in the environment of forward."""
        function = self.functions[k]
        if self.environment is None:
            settings = tuple(s for s in self.settings if s[1] or torch.is_autocast_enabled(s[0]))
            return _under(settings, function, inputs, mine)
        if again:
            with self.environment.repetition(k):
                return function(inputs, mine, bind=True)
        # Its own need no binding, which would disturb other threads and undo what it assigns to itself.
        bind = not all(a is b for a, b in zip(mine, function.own, strict=True))
        with self.environment.first_run(k):
            return function(inputs, mine, bind=bind, purity=self.environment.purity)

    def __call__(self, flat: Sequence[Tensor], *, again: bool) -> State:
        """All steps, on the streams and all other tensors."""
        state, tensors = tuple(flat[: self.m]), flat[self.m :]
        for k, function in enumerate(self.functions):
            s, *inputs = state
            f = self.evaluate(k, tuple(inputs), self.mine(k, tensors), again=again)
            merged = merge(function.step, s, f)
            if merged.dtype != s.dtype:
                raise TypeError(
                    f"{function.step.name} would turn its {s.dtype} stream into {merged.dtype}; Functional() needs "
                    "streams that keep their dtype: cast the streams, or its result."
                )
            state = (*inputs, merged)
        return state


def _under(settings: Any, function: PureStep, inputs: State, mine: Sequence[Tensor]) -> Any:
    if not settings:
        return function(inputs, mine, bind=True)
    kind, enabled, dtype = settings[0]
    with torch.autocast(
        kind, dtype, enabled, cache_enabled=False
    ):  # one by one: the compiler knows no ExitStack
        return _under(settings[1:], function, inputs, mine)


def pure_stack_of(
    steps: Sequence[BoundStep],
    state: State,
    contexts: Sequence[dict[str, Any]],
    tolerance: float | None,
    environment: Environment | None,
    *,
    buffers: bool,
) -> tuple[PureStack, list[Tensor]]:
    """A stack, with or without buffers among its arguments. -> itself, and its arguments but streams."""
    places: dict[Tensor, int] = {}
    functions = []
    for step, context in zip(steps, contexts, strict=True):
        leaves, spec = tree_flatten(context)
        named: dict[str, Tensor] = {}
        if isinstance(step.fn, nn.Module):
            named = dict(step.fn.named_parameters())
            if buffers:
                named = {**named, **dict(step.fn.named_buffers())}
        read = [*named.values(), *(t for t in leaves if isinstance(t, Tensor))]
        saved = (
            read if environment is None else [t.clone() if t.is_inference() else t for t in read]
        )
        reads = tuple(places.setdefault(t, len(places)) for t in saved)
        others = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        functions.append(PureStep(step, tuple(named), tuple(read), context, others, spec, reads))
    tensors = list(places)
    settings = autocast_settings([*state, *tensors])
    return PureStack(tuple(functions), len(state), tolerance, environment, settings), tensors
