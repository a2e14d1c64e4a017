"""A stack as a pure function of tensors: streams, and whatever else its functions read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from revlib.modules import ModuleState
from revlib.replay import Autocast, Randomness, Settings, Turn
from revlib.step import Branch, State, evaluate, merge

__all__ = ["Program", "Surroundings", "Watch", "program_of"]

_OF_A_GRAPH = (Tensor.register_hook, Tensor.retain_grad, Tensor.backward, torch.autograd.grad)
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


class Watch(TorchFunctionMode):
    """Sees to it that no gradient is lost: a tensor that needs one must come in as argument, and leave as result.

    Args:
        known: the arguments.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(t) for t in known}
        self.carrying = {id(t) for t in known if t.requires_grad}
        self.made: list[weakref.ref[Tensor]] = []  # out of those

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function, watched; its streams and context come from elsewhere."""

        def watched(*streams: Tensor, **context: Any) -> Any:
            for t in tree_leaves((streams, context)):
                if isinstance(t, Tensor):
                    self.known.add(id(t))
            self.carrying.update(id(s) for s in streams)
            with self:
                result = fn(*streams, **context)
            self._refuse([t for t in tree_leaves(result) if isinstance(t, Tensor)])
            return result

        return watched

    def _refuse(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if id(t) not in self.known and (t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t)):
                raise RuntimeError(
                    f"a function of a stack with scheduler=Functional() uses a tensor of shape {tuple(t.shape)} that "
                    "needs a gradient, or is mapped over, and is neither a stream, nor a parameter or buffer of the "
                    "function, nor in its context. Pass it as context, make it a parameter, or use "
                    "scheduler=Reversible()."
                )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._refuse(tensors)
        if func in _OF_A_GRAPH and not tensors[0].requires_grad:
            raise RuntimeError(
                f"a function of a stack with scheduler=Functional() calls {func.__name__}() on a tensor that it "
                "computes; its functions run without a graph in forward. Use scheduler=Reversible()."
            )
        carries = func is not Tensor.detach and any(id(t) in self.carrying for t in tensors)
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.known.add(id(t))
                (self.carrying.add if carries else self.carrying.discard)(id(t))
                if carries and not any(t is a for a in tensors):
                    self.made.append(weakref.ref(t))
        return result

    def close(self) -> None:
        """After forward. Raise if something that needs a gradient is still there: a loss on it would have none."""
        for ref in self.made:
            t = ref()
            if t is not None:
                raise RuntimeError(
                    f"a function of a stack with scheduler=Functional() keeps a tensor of shape {tuple(t.shape)} that "
                    "it computed (in an attribute, a list, a forward hook), through which no gradient would flow. Keep "
                    "t.detach(), or use scheduler=Reversible()."
                )


class Surroundings:
    """What functions run in besides their arguments: random numbers, autocast, and the state of modules."""

    def __init__(self, branches: Sequence[Branch], modules: Sequence[list[nn.Module]], tensors: list[Tensor]) -> None:
        self.branches, self.modules = branches, modules
        self.randomness, self.autocast, self.settings = Randomness(tensors), Autocast(tensors), Settings()
        self.drawn: list[dict[torch.device, Tensor]] = [{} for _ in branches]
        self.states: dict[int, ModuleState] = {}
        self.watch: Watch | None = None

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
        self.states[k].check(self.branches[k].name)
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
