"""A stack as a pure function of tensors: streams, and whatever else its functions read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from revlib._torch import TreeSpec, tree_flatten, tree_unflatten
from revlib.core import StepView
from revlib.functional.purity import GraphPurity, Purity, PurityMode
from revlib.guards import (
    Guards,
    ModuleStates,
    Randomness,
    Settings,
    StepGuards,
    first_run,
    repetition,
)
from revlib.guards.module_state import ModuleState
from revlib.guards.modules import ModuleTree, identical, module_tree
from revlib.guards.randomness import CpuGeneratorLock, devices_of
from revlib.guards.recovery_check import Activations
from revlib.guards.settings import AutocastSettings, autocast_settings
from revlib.refusals import refuse_after_rounding
from revlib.step import BoundStep, Layout, State, apart, layouts, together

__all__ = ["Environment", "PureStack", "pure_stack_of"]

_TENSOR = object()  # in place of a tensor of the context


class Slot(NamedTuple):
    """Where a module holds one of the tensors that a function reads by itself."""

    held: dict[str, Tensor | None]
    name: str
    place: int  # among these tensors


class Own(NamedTuple):
    """What a function reads by itself: the parameters of its modules, and their buffers where these are arguments."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] = ()  # for the compiler, which traces a call by names
    slots: tuple[Slot, ...] = ()  # for everybody else


class PureStep(NamedTuple):
    """The function of a step, and what it reads."""

    step: BoundStep
    own: Own
    context: dict[str, Any]  # the user's, with
    leaves: tuple[Any, ...]  # these
    spec: TreeSpec | None
    given: tuple[Tensor, ...]  # the tensors in it
    reads: tuple[int, ...]  # places, among all tensors, of its own and of those in its context

    def run(
        self,
        act: Callable[[BoundStep, dict[str, Any]], Any],
        tensors: Sequence[Tensor],
        purity: Purity | None = None,
    ) -> Any:
        """``act`` on the step and its context, while the step reads these tensors."""
        fn: Any = self.step.fn
        (own, names, slots), context = self.own, self.context
        if self.spec is not None and (
            purity is None or not identical(tensors[len(own) :], self.given)
        ):
            rest = iter(tensors[len(own) :])
            context = tree_unflatten(
                [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves], self.spec
            )
        if names:
            held = dict(zip(names, tensors[: len(own)], strict=True))
            module = fn
            fn = lambda *args, **context: functional_call(module, held, args, context)  # noqa: E731
        elif purity is not None:
            fn = purity.over(fn)
        step = self.step if fn is self.step.fn else self.step.with_function(fn)
        # Its own need no binding, which would undo what it assigns to itself.
        if all(slot.held.get(slot.name) is tensors[slot.place] for slot in slots):
            return act(step, context)
        with _bound(slots, tensors):
            return act(step, context)


@contextmanager
def _bound(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Modules hold other tensors for a moment."""
    before = [slot.held.get(slot.name) for slot in slots]
    try:
        for slot in slots:
            slot.held[slot.name] = tensors[slot.place]
        yield
    finally:
        for slot, t in zip(slots, before, strict=True):
            slot.held[slot.name] = t


def _own(step: BoundStep, tree: ModuleTree | None, *, buffers: bool) -> Own:
    if tree is None:
        named: dict[str, Tensor] = {}
        if isinstance(step.fn, nn.Module):
            named = dict(step.fn.named_parameters())
            named = {**named, **dict(step.fn.named_buffers())} if buffers else named
        return Own(tuple(named.values()), tuple(named))
    known = step.memory.get(Own)
    if known is not None and known[0] is tree and not buffers:
        found: Own = known[1]
        return found
    places: dict[int, int] = {}
    tensors: list[Tensor] = []
    slots = []
    for held in (*tree.parameter_slots, *(tree.buffer_slots if buffers else ())):
        for name, t in held.items():
            if t is not None:
                if id(t) not in places:
                    places[id(t)] = len(tensors)
                    tensors.append(t)
                slots.append(Slot(held, name, places[id(t)]))
    found = Own(tuple(tensors), (), tuple(slots))
    if tree.reusable and not buffers:
        step.memory[Own] = tree, found
    return found


class Environment:
    """What functions run in besides their arguments: random numbers, settings, and the state of modules.

    It is watched by the same guards as in the other engine, at the points where this engine runs a function.
    """

    def __init__(
        self,
        steps: Sequence[BoundStep],
        contexts: Sequence[dict[str, Any]],
        trees: Sequence[ModuleTree],
        state: State,
        *,
        transformed: bool,
    ) -> None:
        self.steps, self.trees, self.transformed = steps, trees, transformed
        # Without tensors, which are arguments of the pure function.
        self.contexts = [
            {k: v for k, v in context.items() if not isinstance(v, Tensor)} for context in contexts
        ]
        tensors = [*state, *(p for tree in trees for p in tree.parameters if p is not None)]
        devices = devices_of(tensors)
        self.guards = Guards([Randomness(devices), Settings(devices), ModuleStates()])
        self.step_guards: dict[int, StepGuards] = {}
        self.activations = Activations(dict(zip(steps, trees, strict=True)))
        self.purity: Purity | None = None

    def watching(self, streams: State, tensors: Sequence[Tensor]) -> Purity:
        """Whoever watches forward, on these arguments."""
        if self.transformed:
            self.purity = PurityMode(streams, tensors, self._buffers())
        else:
            self.purity = GraphPurity(tensors, self._buffers, self.activations.keep)
        return self.purity

    def _state(self, k: int) -> ModuleState | None:
        states = (guard for guard in self.step_guards[k].guards if isinstance(guard, ModuleState))
        return next(states, None)

    def own_edits(self, k: int) -> dict[int, Tensor]:
        """Of the parameters that the function of a step edits itself, by identity: copies from before it ran."""
        state = self._state(k)
        return {} if state is None else state.own_edits.copies

    def before_own_edits(self, k: int, tensors: list[Tensor]) -> list[Tensor]:
        """The same tensors, but of those parameters copies that the repetition may edit."""
        state = self._state(k)
        fresh = {} if state is None else state.own_edits.for_repetition(state.parameters)
        return [fresh.get(id(t), t) for t in tensors] if fresh else tensors

    def refuse_edited(self, k: int, mine: Sequence[Tensor]) -> None:
        """After the first run of a step's function. Raise if it edited a tensor that it reads as an argument, and also
        holds: its repetition holds a copy, from which no gradient would flow."""
        state = self._state(k)
        changed = {} if state is None else state.buffers.changed_tensors
        if changed and any(id(t) in changed for t in mine if t.requires_grad):
            raise RuntimeError(
                f"{self.steps[k].name} edits a tensor of its context that needs a gradient, so its step cannot be "
                "repeated; clone the tensor before editing it, or use an out-of-place operation."
            )

    def _buffers(self) -> list[Tensor]:
        slots = [named for tree in self.trees for named in tree.buffer_slots]
        slots += [m._buffers for tree in self.trees for m in tree.remote]
        return [b for named in slots for b in named.values() if b is not None]

    @contextmanager
    def first_run(self, k: int, layout: Layout) -> Iterator[None]:
        """Around the first run of a step's function."""
        guard = self.step_guards[k] = self.guards.step(
            StepView(k, self.steps[k], self.contexts[k], True, False, layout, (), ()), ()
        )
        # Other threads may bind these modules to their tensors.
        with CpuGeneratorLock(), first_run(guard):
            yield

    @contextmanager
    def repetition(self, k: int) -> Iterator[None]:
        """Around a repetition."""
        guard = self.step_guards[k]
        with CpuGeneratorLock():
            guard.check()
            if self.purity is not None:
                state = self._state(k)
                changed = {} if state is None else state.buffers.changed_tensors
                self.purity.check(self.steps[k], changed)
            with repetition(guard):
                yield


@dataclass(eq=False)
class PureStack:  # not a tuple: transforms would look for tensors in it
    """All steps. In compiled code there is no environment but the settings of autocast."""

    functions: tuple[PureStep, ...]
    layouts: tuple[Layout, ...]
    m: int  # streams that go in
    n: int  # and that come out
    tolerance: float | None
    environment: Environment | None
    settings: AutocastSettings
    needs: tuple[bool, ...] = ()  # which streams that come out need a gradient, after forward

    def leave_compiler(self, flat: Sequence[Tensor]) -> None:
        """Get an environment after all: the compiler broke its graph within a function, and calls the stack as it is.

        Buffers are among the arguments already. They stay unread, since guards put them back for a repetition.
        """
        steps = [function.step for function in self.functions]
        contexts = [function.context for function in self.functions]
        trees = [module_tree(step) for step in steps]
        self.environment = Environment(
            steps, contexts, trees, tuple(flat[: self.m]), transformed=False
        )
        places = {id(t): i for i, t in enumerate(flat[self.m :])}
        functions = []
        for function, tree in zip(self.functions, trees, strict=True):
            own = _own(function.step, tree, buffers=False)
            read = [places.get(id(t)) for t in (*own.tensors, *function.given)]
            if None in read:
                raise RuntimeError(
                    f"{function.step.name} with scheduler=Functional() did not fit into one graph, since the compiler "
                    "broke it, and reads a tensor that is no parameter that its modules register: "
                    "torch.compile(fullgraph=True) says why. Compile its functions alone, or use "
                    "scheduler=Reversible()."
                )
            functions.append(
                function._replace(own=own, reads=tuple(i for i in read if i is not None))
            )
        self.functions = tuple(functions)

    def mine(self, k: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of all tensors that are not streams, those that a step reads."""
        return [tensors[i] for i in self.functions[k].reads]

    def mine_again(self, k: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same for a repetition."""
        mine = self.mine(k, tensors)
        return mine if self.environment is None else self.environment.before_own_edits(k, mine)

    def copied_for_repetition(self, flat: Sequence[Tensor]) -> dict[int, Tensor]:
        """The arguments that no repetition reads, since every function that reads them edits them: by place.

        Functions after the stack may go on editing these.
        """
        environment = self.environment
        if environment is None:
            return {}
        edits = [environment.own_edits(k) for k in environment.step_guards]
        if not any(edits):
            return {}
        edited = {i for copies in edits for i in copies}
        for k, copies in enumerate(edits):
            edited -= {id(t) for t in self.mine(k, flat[self.m :])} - copies.keys()
        return {i: t for i, t in enumerate(flat) if id(t) in edited}

    def forward(self, flat: Sequence[Tensor]) -> State:
        """All steps for the first time, on the streams and all other tensors; neither may carry a graph away."""
        environment = self.environment
        assert environment is not None
        state, needs = tuple(flat[: self.m]), tuple(t.requires_grad for t in flat[: self.m])
        purity = environment.watching(state, flat[self.m :])
        for k, (function, layout) in enumerate(zip(self.functions, self.layouts, strict=True)):
            taken, others = apart(state, layout.taken)
            need, others_need = apart(needs, layout.taken)
            mine, step = self.mine(k, purity.arguments), function.step
            step.prepare(taken)

            def call(
                inputs: State, function: PureStep = function, mine: list[Tensor] = mine
            ) -> Any:
                return function.run(_forwards(function.step, inputs), mine, purity)

            with environment.first_run(k, layout):
                inputs = (taken, need) if step.merge_reads else (others, others_need)
                f, needing = purity.run(function, call, *inputs, mine)
            environment.refuse_edited(k, mine)
            made = f if step.merge_reads else self._merged(step, taken, f)
            state = together(made, layout.made, others)
            if not step.merge_reads:
                needing = (any(need) or any(needing),) * len(made)
            needs = together(needing, layout.made, others_need)
            del f, call, mine
        purity.close()
        self.needs = needs
        return state

    def act(self, k: int, act: Callable[[BoundStep, Any], Any], mine: Sequence[Tensor]) -> Any:
        """``act`` on a step and its context, in the environment of forward."""
        function = self.functions[k]
        if self.environment is None:
            settings = tuple(s for s in self.settings if s[1] or torch.is_autocast_enabled(s[0]))
            return _under(settings, function, act, mine)
        with self.environment.repetition(k):
            try:
                return function.run(act, mine)
            except Exception as error:
                above = [f.step for f in self.functions[k + 1 :]]
                if any(step.limit_of(torch.float32) == math.inf for step in above):
                    refuse_after_rounding(function.step.name, error)
                raise

    def evaluate(self, k: int, inputs: State, mine: Sequence[Tensor]) -> Any:
        """The function of a step, or the map of a bijection, in the environment of forward."""
        return self.act(k, _forwards(self.functions[k].step, inputs), mine)

    def unmerge(self, k: int, made: State, mine: Sequence[Tensor]) -> State:
        """The inverse of a bijection, in the environment of forward."""
        return self.act(k, lambda step, context: step.unmerge(made, context), mine)

    def __call__(self, flat: Sequence[Tensor]) -> State:
        """All steps again, or in compiled code."""
        state, tensors = tuple(flat[: self.m]), flat[self.m :]
        for k, (function, layout) in enumerate(zip(self.functions, self.layouts, strict=True)):
            taken, others = apart(state, layout.taken)
            reads, mine = function.step.merge_reads, self.mine(k, tensors)
            f = self.evaluate(k, taken if reads else others, mine)
            made = f if reads else self._merged(function.step, taken, f)
            state = together(made, layout.made, others)
        return state

    def _merged(self, step: BoundStep, taken: State, f: Any) -> State:
        made = step.merge(taken, f)
        if made[-1].dtype != taken[-1].dtype:
            raise TypeError(
                f"{step.name} would turn its {taken[-1].dtype} stream into {made[-1].dtype}; Functional() needs "
                "streams that keep their dtype: cast the streams, or its result."
            )
        return made


def _forwards(step: BoundStep, inputs: State) -> Callable[[BoundStep, dict[str, Any]], Any]:
    """What runs in forward on the tensors that a step reads: its function, or a bijection as a whole."""
    if step.merge_reads:
        return lambda step, context: step.merge(inputs, context)
    return lambda step, context: step.evaluate(inputs, context)


def _under(settings: Any, function: PureStep, act: Any, mine: Sequence[Tensor]) -> Any:
    if not settings:
        return function.run(act, mine)
    kind, enabled, dtype = settings[0]
    # One by one: the compiler knows no ExitStack.
    with torch.autocast(kind, dtype, enabled, cache_enabled=False):
        return _under(settings[1:], function, act, mine)


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
    for k, (step, context) in enumerate(zip(steps, contexts, strict=True)):
        own = _own(step, None if environment is None else environment.trees[k], buffers=buffers)
        leaves, spec = tree_flatten(context) if context else ((), None)
        given = tuple(t for t in leaves if isinstance(t, Tensor))
        read = [*own.tensors, *given]
        saved = (
            read if environment is None else [t.clone() if t.is_inference() else t for t in read]
        )
        reads = tuple(places.setdefault(t, len(places)) for t in saved)
        others = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        functions.append(PureStep(step, own, context, others, spec, given, reads))
    tensors = list(places)
    settings = autocast_settings([t.device for t in (*state, *tensors)])
    found = tuple(layouts(steps, len(state)))
    n = len(state) + sum(len(a.made) - len(a.taken) for a in found)
    stack = PureStack(tuple(functions), found, len(state), n, tolerance, environment, settings)
    return stack, tensors
