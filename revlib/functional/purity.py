"""What a function may not do where it must be pure, noticed as it runs.

Three watchers for three situations. In plain autograd :class:`GraphPurity` has each function build its graph once, and
reads there what the function has used and whether anything of the graph is left over. Within ``torch.func`` transforms
such a graph says nothing, so :class:`PurityMode` looks at every operation. :class:`TracingPurityMode` does so while the
compiler traces.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from revlib._torch import (
    is_transformed,
    saved_tensor_hooks,
    transforms,
    tree_leaves,
    tree_map,
    version_of,
)
from revlib.core.saved_tensors import unedited
from revlib.guards.edits import hooks_of
from revlib.guards.modules import current_tree, module_tree
from revlib.step import BoundStep, State
from revlib.tensors import leaves_of

if TYPE_CHECKING:
    from revlib.functional.pure_stack import PureStep

__all__ = [
    "GraphPurity",
    "Purity",
    "PurityMode",
    "TracingPurityMode",
    "asked_directly",
]

CAPTURED = (
    "uses a tensor that needs a gradient, or is mapped over, and is neither a stream, nor a parameter or buffer that "
    "its modules register, nor in its context. Pass it as context, make it a parameter, or use scheduler=Reversible()."
)
_FUNCTION = "a function of a stack with scheduler=Functional()"
_KEEPS = (
    "that it computed (in an attribute, a list, a forward hook), through which no gradient would flow. Keep "
    "t.detach(), or use scheduler=Reversible()."
)


def asked_directly(t: Tensor) -> bool:
    """Whether a gradient can be asked for with respect to this very tensor, in whatever way a function reaches it.

    Not if it is part of a graph, which would be differentiated as well, nor if it has hooks, which would be called with
    the gradient of one function.
    """
    return t.is_leaf and not t._backward_hooks and not t.is_inference()


class Purity:
    """Watches the functions of one forward."""

    # What functions get: the tensors that the stack reads, or others in their place.
    arguments: list[Tensor]

    def __init__(self) -> None:
        # Of what functions read besides: each by itself, or all together under None.
        self.versions: dict[BoundStep | None, list[tuple[weakref.ref[Tensor], int]]] = {}

    def run(
        self,
        function: PureStep,
        call: Callable[[State], Any],
        inputs: State,
        needs: Sequence[bool],
        mine: Sequence[Tensor],
    ) -> tuple[Any, tuple[bool, ...]]:
        """Run a function on streams, of which some need a gradient, with the tensors that it reads.

        -> its result, without a graph, and which tensors of it need a gradient.
        """
        raise NotImplementedError

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function that ``call`` calls, watched."""
        return fn

    def close(self) -> None:
        """After forward."""
        raise NotImplementedError

    def _watch(self, step: BoundStep | None, captured: dict[int, weakref.ref[Tensor]]) -> None:
        """From now on, what is left of the tensors that were captured."""
        left = ((ref, ref()) for ref in captured.values())
        self.versions[step] = [(ref, version_of(t)) for ref, t in left if t is not None]

    def check(self, step: BoundStep, put_back: Container[int]) -> None:
        """Before a repetition. Raise where a tensor was edited that the function reads unasked, unless it is one of
        those that are ``put_back``, by identity."""
        for ref, version in (*self.versions.get(step, ()), *self.versions.get(None, ())):
            t = ref()
            if t is not None and version_of(t) != version and id(t) not in put_back:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} that {step.name}, or another function of its stack, reads was "
                    "modified by an inplace operation between forward and backward; edit a clone of it instead."
                )


# ------------------------------------------------------------------------------------------ plain autograd
class GraphPurity(Purity):
    """A function first runs on leaves of its own and builds a graph, which is dropped when the function is over.

    The leaves of this graph are all that the function differentiates, however it reaches it: each must be a stream or
    an argument. If one of the streams' leaves is still there after forward, then somebody keeps a part of the graph.
    Integers, masks, and what was computed under ``no_grad`` keep none.

    Args:
        tensors: all that the stack reads besides streams.
        watched: finds the buffers, which others watch.
        graph_made: is called with each step and the results of its function, while these have their graph.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        watched: Callable[[], list[Tensor]],
        graph_made: Callable[[BoundStep, Sequence[Any]], None],
    ) -> None:
        super().__init__()
        self.watched, self.graph_made = watched, graph_made
        # A gradient of what has hooks, or is part of a graph, can be asked for at a view alone. What somebody keeps of
        # a function's graph leads through the view to the tensor itself.
        with torch.enable_grad():
            self.arguments = [t if asked_directly(t) else t.view_as(t) for t in tensors]
        self.streams: list[tuple[BoundStep, weakref.ref[Tensor]]] = []
        # Leaves of their graphs that are neither streams nor arguments.
        self.others: list[tuple[BoundStep, weakref.ref[Tensor]]] = []

    def run(
        self,
        function: PureStep,
        call: Callable[[State], Any],
        inputs: State,
        needs: Sequence[bool],
        mine: Sequence[Tensor],
    ) -> tuple[Any, tuple[bool, ...]]:
        step = function.step
        leaves = tuple(
            t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)
        )
        hooks, needed = _hook_counts(mine), [t.requires_grad for t in mine]
        with torch.enable_grad(), _without_outer_hooks():
            f = self._first_call(function, call, leaves, mine)
        results = (f,) if isinstance(f, Tensor) else tree_leaves(f)
        differentiable = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
        if differentiable:
            known = {id(t) for t in (*leaves, *mine)}
            ends = leaves_of(differentiable, stop=mine)
            others = [t for t in ends if id(t) not in known]
            self.others += [(step, weakref.ref(t)) for t in others]
            del others, ends
            if not step.merge_reads:
                self.graph_made(step, results)
        if _hook_counts(leaves) or hooks != _hook_counts(mine):
            raise RuntimeError(
                f"{step.name} calls register_hook() on a stream, a parameter or a tensor of its context while it runs; "
                "under scheduler=Functional() it sees copies of these, whose hooks nothing would call. Register the "
                "hook outside of the stack, or use scheduler=Reversible()."
            )
        if needed != [t.requires_grad for t in mine]:
            raise RuntimeError(
                f"{step.name} freezes or thaws its parameters while it runs, when scheduler=Functional() has asked "
                "already which of them need a gradient; call requires_grad_() before forward, or use "
                "scheduler=Reversible()."
            )
        self.streams += [(step, weakref.ref(t)) for t in leaves if t.requires_grad]
        return _without_graph(f), tuple(t.requires_grad for t in results if isinstance(t, Tensor))

    def _first_call(
        self,
        function: PureStep,
        call: Callable[[State], Any],
        leaves: State,
        mine: Sequence[Tensor],
    ) -> Any:
        step = function.step
        try:
            # What a function captures besides is found out once, for as long as its attributes are what they were.
            tree = current_tree(step)
            if step.memory.get(_Captures) is tree:
                return call(leaves)
            with _Captures((*leaves, *mine, *self.watched())) as captures:
                f = call(leaves)
            captures.returned(f)
            # Another function may edit them, after which this one cannot be repeated.
            self._watch(step, captures.found)
            if tree.reusable and not captures.found and not function.context:
                step.memory[_Captures] = tree
            return f
        except RuntimeError as error:
            if "a leaf Variable that requires grad" not in str(error):
                raise
            raise RuntimeError(
                f"{step.name} edited a stream, a context tensor or a parameter in place, so its step cannot be "
                "inverted; clone the tensor before editing it, or use an out-of-place operation."
            ) from error

    def close(self) -> None:
        if any(ref() is not None for _, ref in self.streams):
            gc.collect()  # it may be in a cycle that nobody holds
            for step, ref in self.streams:
                if ref() is not None:
                    self._refuse_kept(step, ref)
        # Leaves that a function made for itself are gone by now, and no gradient of them can be asked for.
        if any(ref() is not None for _, ref in self.others):
            gc.collect()
            for step, ref in self.others:
                if (t := ref()) is not None:
                    _refuse_captured(step, t)

    def _refuse_kept(self, step: BoundStep, ref: weakref.ref[Tensor]) -> None:
        # Views that were made without gradients keep a stream as well, and are harmless. So is what only autograd
        # holds, as the hooks of a flop counter do, or what hooks around the stack have packed.
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.requires_grad]
        for t in tensors:
            descends = t is ref() or (
                t.grad_fn is not None and any(v is ref() for v in leaves_of([t]))
            )
            if descends and _is_held(t, tensors):
                raise RuntimeError(
                    f"{step.name} with scheduler=Functional() keeps a tensor of shape {tuple(t.shape)}"
                    f"{_where(step, t)} {_KEEPS}"
                )


def _without_outer_hooks() -> AbstractContextManager[Any]:
    """What a function saves is dropped with its graph, so no saved-tensor hooks around the stack need to see it.

    Some, such as those of another stack, would hold a result as it was packed, with its graph, and keep that alive: it
    takes most of a second to find out that nobody else does.
    """
    if saved_tensor_hooks() is None:
        return nullcontext()
    return saved_tensors_hooks(
        lambda t: (t.detach(), version_of(t)), lambda saved: unedited(*saved)
    )


def _is_held(t: Tensor, tensors: list[Tensor]) -> bool:
    """Whether something in Python leads to a tensor, besides a thing that only autograd refers to."""
    holders = gc.get_referrers(t)
    for holder in holders:
        if holder is not tensors and not isinstance(holder, types.FrameType):
            others = gc.get_referrers(holder)
            if any(o is not holders and not isinstance(o, types.FrameType) for o in others):
                return True
    return False


def _where(step: BoundStep, t: Tensor) -> str:
    """The name under which a function holds a tensor, if it can be found."""
    tree = module_tree(step)
    for slots in tree.slots:
        for name, value in slots.items():
            if value is t:
                return f" as {name!r}"
    for holder in tree.holders:
        if any(value is t for value in holder.read()):
            return f" in {holder.name!r}"
    return ""


def _hook_counts(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Of the tensors that have hooks by which somebody may edit their gradients: how many, by identity."""
    counts = {}
    for t in tensors:
        if t._backward_hooks or t._post_accumulate_grad_hooks:
            hooks = [hook for found in hooks_of(t) for hook in found.values()]
            if count := sum(not _is_a_trackers(hook) for hook in hooks):
                counts[id(t)] = count
    return counts


_TRACKERS = ("torch.utils.", "torch.distributed._tools.")


def _is_a_trackers(hook: Callable[..., Any]) -> bool:
    """Whether torch itself put a hook on a stream, as flop counters and profilers do to follow modules in backward.

    They only count. They come by ``register_multi_grad_hook``, which wraps what it is given, so the closure tells whose
    hook it is. A function of torch's as the hook, such as ``x.register_hook(relu)``, is the user's and edits gradients.
    """
    cells = getattr(hook, "__closure__", None) or ()
    inside = [cell.cell_contents for cell in cells if callable(cell.cell_contents)]
    given = [_module_of(f) for f in inside if _module_of(f) != "torch.autograd.graph"]
    wraps = _module_of(hook) == "torch.autograd.graph"
    return wraps and bool(given) and all(name.startswith(_TRACKERS) for name in given)


def _module_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__module__", None) or ""


def _without_graph(f: Any) -> Any:
    if isinstance(f, Tensor):
        return f.detach()
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, f)


def _refuse_captured(step: BoundStep, t: Tensor) -> None:
    names = [
        name
        for name, p in getattr(step.owner, "named_parameters", lambda: ())()
        if p is t
    ]  # fmt: skip
    if names and asked_directly(t):
        raise RuntimeError(
            f"{step.name} with scheduler=Functional() registered its parameter {names[0]!r} while it ran, when the "
            "arguments of the stack were known already, so that no gradient would flow. It is there now: run the first "
            "forward under torch.no_grad(), or use scheduler=Reversible()."
        )
    if names:
        raise RuntimeError(
            f"{step.name} with scheduler=Functional() reaches its parameter {names[0]!r}, which has hooks or is part "
            "of a graph, in another way than through the module that registers it (a list, a closure, a partial), so "
            "that no gradient would flow. Read it from its module, or use scheduler=Reversible()."
        )
    raise RuntimeError(
        f"{step.name} with scheduler=Functional() {CAPTURED} Its shape is {tuple(t.shape)}."
    )


class _Captures(TorchFunctionMode):
    """Which tensors a function reads that need no gradient, and that it was not given."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = list(known)  # numbers of tensors are used again
        self.known = {id(t) for t in self.alive}
        self.found: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        self.returned((args, kwargs))
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t) not in self.found:
                self.known.add(id(t))
        return result

    def returned(self, values: Any) -> None:
        for t in tree_leaves(values):
            if isinstance(t, Tensor) and id(t) not in self.known and not is_transformed(t):
                self.found[id(t)] = weakref.ref(t)


# ------------------------------------------------------------------------------------------ transforms
_OF_A_GRAPH = (Tensor.register_hook, Tensor.retain_grad, Tensor.backward, torch.autograd.grad)
_DETACHING = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class PurityMode(TorchFunctionMode, Purity):
    """Sees to it that no gradient is lost: a tensor that needs one must come in as argument, and leave as result.

    Args:
        streams, tensors: the arguments.
        watched: buffers, which others watch.
    """

    def __init__(
        self, streams: Sequence[Tensor], tensors: Sequence[Tensor], watched: Sequence[Tensor]
    ) -> None:
        TorchFunctionMode.__init__(self)
        Purity.__init__(self)
        # Others in their place, so that a parameter which a function reaches in another way is not taken for them.
        self.arguments = [t.view_as(t) for t in tensors]
        self.known = {id(t) for t in (*streams, *self.arguments, *watched)}
        needing = (*streams, *self.arguments)
        self.carrying = {
            id(t) for t, o in zip(needing, (*streams, *tensors), strict=True) if o.requires_grad
        }
        self.made: list[weakref.ref[Tensor]] = []  # out of those
        self.captured: dict[int, weakref.ref[Tensor]] = {}  # what functions read besides
        self.transforms = transforms()

    def run(
        self,
        function: PureStep,
        call: Callable[[State], Any],
        inputs: State,
        needs: Sequence[bool],
        mine: Sequence[Tensor],
    ) -> tuple[Any, tuple[bool, ...]]:
        with torch.enable_grad():
            f = _without_graph(call(inputs))
        return f, (True,) * len(tree_leaves(f))

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*streams: Tensor, **context: Any) -> Any:
            for t in tree_leaves((streams, context)):
                if isinstance(t, Tensor):
                    self.known.add(id(t))
            self.carrying.update(id(s) for s in streams)
            with self:
                result = fn(*streams, **context)
            self._seen([t for t in tree_leaves(result) if isinstance(t, Tensor)])
            return result

        return watched

    def _seen(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if id(t) in self.known:
                continue
            if t.requires_grad or is_transformed(t):
                if transforms() != self.transforms:
                    raise RuntimeError(
                        f"{_FUNCTION} runs a torch.func transform while the stack itself is transformed; use "
                        "torch.autograd.grad(create_graph=True) inside the function, or scheduler=Naive()."
                    )
                raise RuntimeError(f"{_FUNCTION} {CAPTURED} Its shape is {tuple(t.shape)}.")
            self.captured[id(t)] = weakref.ref(t)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._seen(tensors)
        if func in _OF_A_GRAPH and not tensors[0].requires_grad:
            raise RuntimeError(
                f"{_FUNCTION} calls {func.__name__}() on a tensor that it computes; within torch.func transforms its "
                "functions run without a graph in forward. Use scheduler=Reversible()."
            )
        # What was computed without gradients, or has none, is harmless.
        carries = func not in _DETACHING and any(id(t) in self.carrying for t in tensors)
        carries = carries and torch.is_grad_enabled()
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                if (ref := self.captured.get(id(t))) is None or ref() is not t:
                    self.known.add(id(t))
                mine = carries and (t.is_floating_point() or t.is_complex())
                (self.carrying.add if mine else self.carrying.discard)(id(t))
                if mine and not any(t is a for a in tensors):
                    self.made.append(weakref.ref(t))
        return result

    def close(self) -> None:
        if any(ref() is not None for ref in self.made):
            gc.collect()  # it may be in a cycle that nobody holds
        for ref in self.made:
            t = ref()
            if t is not None:
                raise RuntimeError(f"{_FUNCTION} keeps a tensor of shape {tuple(t.shape)} {_KEEPS}")
        self._watch(None, self.captured)


# ------------------------------------------------------------------------------------------ compiled
_ALWAYS = (
    *(
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randint_like,
        torch.randperm,
        torch.normal,
        torch.poisson,
    ),
    *(
        torch.bernoulli,
        torch.multinomial,
        Tensor.bernoulli,
        Tensor.bernoulli_,
        Tensor.multinomial,
        Tensor.normal_,
    ),
    *(
        Tensor.cauchy_,
        Tensor.exponential_,
        Tensor.geometric_,
        Tensor.log_normal_,
        Tensor.random_,
        Tensor.uniform_,
    ),
    *(F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d),
)
# p, training
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
)


class TracingPurityMode(TorchFunctionMode):
    """The same while the compiler traces, and no random numbers: compiled code would draw others in a repetition.

    Of these the compiler does not show ``torch.rand_like`` and ``torch.randn_like``.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for arg in (*args, *kwargs.values()):
            # The compiler has to follow this loop, so it is not a comprehension.
            for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                if (
                    isinstance(t, Tensor)
                    and t.requires_grad
                    and not any(t is k for k in self.known)
                ):
                    raise RuntimeError(
                        f"{_FUNCTION} {CAPTURED} Or the compiler broke its graph: fullgraph=True says where."
                    )
        draws = func in _ALWAYS
        if func in _DROPOUTS:
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = (
                args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
            )
            draws = p > 0 and training
        elif func is F.scaled_dot_product_attention:
            draws = (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
        elif func is F.rrelu:
            draws = args[3] if len(args) > 3 else kwargs.get("training", False)
        if draws:
            raise RuntimeError(
                "a function of a stack with scheduler=Functional() draws random numbers in a whole compiled graph, "
                "which would draw others when it repeats the function; compile the functions alone, or use "
                "scheduler=Reversible()."
            )
        return func(*args, **kwargs)
