"""Backward as a pure function: undo the steps of a program, last first, and differentiate each on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, func

from revlib._torch import (
    assert_on_device,
    in_transform,
    tree_flatten,
    tree_unflatten,
    unwrapped,
)
from revlib.functional.pure_stack import PureStack
from revlib.functional.purity import asked_directly
from revlib.guards import recovery_check
from revlib.step import State, apart, together
from revlib.tensors import dense, leaves_of, local_part, sum_dtype

__all__ = ["backward_by_inversion", "vjp"]

_Gradients = Sequence[Tensor | None]


def vjp(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """:func:`torch.func.vjp`, by plain autograd where it can be: functions may checkpoint and nest stacks there."""
    recorded = _record(f, *primals)
    return recorded.result, recorded.pull


def _record(f: Callable[..., Any], *primals: Any) -> _Recorded | _Transformed:
    within = torch.compiler.is_compiling() or in_transform()
    return _Transformed(f, primals) if within else _Recorded(f, primals)


class _Transformed:
    """A function of some trees of tensors, and what gives their gradients, by :func:`torch.func.vjp`."""

    def __init__(self, f: Callable[..., Any], primals: Sequence[Any]) -> None:
        self.result: Any
        self.pull: Callable[[Any], Any]
        self.result, self.pull = func.vjp(f, *primals)  # type: ignore[misc]

    def then(self, f: Callable[..., Any], *primals: Any) -> None:
        """Go on with a function of some more trees, and of the result."""
        below = self.pull
        self.result, above = func.vjp(f, *primals, _detached(self.result))  # type: ignore[misc]

        def pull(gradient: Any) -> list[Any]:
            *g_primals, g_result = above(gradient)
            return [*below(g_result), *g_primals]

        self.pull = pull


class _Recorded:
    """The same by plain autograd: a graph that nothing else leads to."""

    def __init__(self, f: Callable[..., Any], primals: Sequence[Any]) -> None:
        # Whether gradients are to be differentiated themselves.
        self.again = torch.is_grad_enabled()
        self.leaves: list[Tensor] = []
        self.trees: list[tuple[int, Callable[[list[Any]], Any]]] = []
        originals, arguments = self._enter(primals)
        with torch.enable_grad():
            self.result = f(*arguments)
        self.results = _in_order(self.result)[0]
        _refuse_bypassed(self.results, self.leaves, originals)

    def then(self, f: Callable[..., Any], *primals: Any) -> None:
        _, arguments = self._enter(primals)
        with torch.enable_grad():
            self.result = f(*arguments, self.result)
        self.results = _in_order(self.result)[0]

    def _enter(self, primals: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
        """-> the tensors of these trees, and the trees with leaves of the graph in their places."""
        originals: list[Tensor] = []
        arguments: list[Any] = []
        for primal in primals:
            tensors, rebuild = _in_order(primal)
            leaves = [_leaf(t, again=self.again) for t in tensors]
            self.leaves += leaves
            self.trees.append((len(leaves), rebuild))
            originals += tensors
            arguments.append(rebuild(leaves))
        return originals, arguments

    def pull(self, gradient: Any) -> list[Any]:
        """The gradients of all trees, in the order in which they came."""
        leaves = self.leaves
        both = zip(self.results, _in_order(gradient)[0], strict=True)
        pairs = [(y, g) for y, g in both if y.requires_grad and g is not None]
        found: list[Tensor | None] = [None] * len(leaves)
        if pairs:
            # A tensor may come in twice, as a parameter and as context. Its gradient counts once, for its first place.
            places = {id(t): i for i, t in reversed(list(enumerate(leaves)))}.values()
            gradients = _differentiate(pairs, [leaves[i] for i in places], again=self.again)
            for i, g in zip(places, gradients, strict=True):
                found[i] = g
        rest = iter(found)
        return [rebuild(list(islice(rest, count))) for count, rebuild in self.trees]


def _differentiate(
    pairs: Sequence[tuple[Tensor, Tensor]], leaves: Sequence[Tensor], *, again: bool
) -> Sequence[Tensor | None]:
    ys, gs = [y for y, _ in pairs], [g for _, g in pairs]
    try:
        return torch.autograd.grad(ys, leaves, gs, allow_unused=True, create_graph=again)
    except RuntimeError as error:
        if ".grad()" not in str(error):
            raise
        raise RuntimeError(
            "a function of a stack with scheduler=Functional() does what torch.autograd.grad() does not go "
            "through, such as a checkpoint with use_reentrant=True, or a profiler's or counter's hook in backward; "
            "use use_reentrant=False, or scheduler=Reversible()."
        ) from error


def _detached(tree: Any) -> Any:
    tensors, rebuild = _in_order(tree)
    return rebuild([dense(t.detach()) for t in tensors])


def _in_order(tree: Any) -> tuple[Sequence[Any], Callable[[list[Any]], Any]]:
    """The tensors of a tree, and what makes such a tree of as many others. Most trees here are one tensor, or a row of
    them, for which torch's functions take twenty times as long."""
    if isinstance(tree, Tensor):
        return (tree,), _only
    if (kind := type(tree)) in (tuple, list) and all(
        t is None or isinstance(t, Tensor) for t in tree
    ):
        return tree, kind
    leaves, spec = tree_flatten(tree)
    return leaves, partial(tree_unflatten, treespec=spec)


def _only(leaves: list[Any]) -> Any:
    return leaves[0]


def _leaf(t: Tensor, *, again: bool) -> Tensor:
    """What to differentiate with respect to in place of an argument.

    A leaf of the user's stands for itself, since a function may reach it in several ways. Not where the result is
    differentiated again: there other arguments may lead to the same leaf, and it would be counted for these as well.
    """
    if not again and t.requires_grad and asked_directly(t):
        return t
    t = t.view_as(t)  # a transform that is over leaves wrappers, which say more than is so
    return t if again and t.requires_grad else t.detach().requires_grad_()


def _refuse_bypassed(
    results: Sequence[Any], views: Sequence[Tensor], originals: Sequence[Tensor]
) -> None:
    """Raise where a function reaches one of the originals otherwise than through the view that stands for it."""
    pairs = zip(originals, views, strict=True)
    replaced = {id(t) for t, view in pairs if t.requires_grad and t is not view}
    if not replaced:
        return
    ends = leaves_of([t for t in results if t.requires_grad], stop=views)
    if any(id(t) in replaced for t in ends):
        raise RuntimeError(
            "a function of a stack with scheduler=Functional() reaches a parameter in another way than through the "
            "module that registers it (a list, a closure, a partial). Where the parameter has hooks, or gradients are "
            "differentiated again, its gradient would be lost. Read it from its module, or use scheduler=Reversible()."
        )


def _invert_and_pull_back(
    program: PureStack,
    k: int,
    state: State,
    gradients: _Gradients,
    mine: list[Tensor],
    places: Sequence[int],
    activations: list[recovery_check.Comparison],
) -> tuple[State, _Gradients, _Gradients, set[torch.dtype]]:
    """One step. -> the state before it, gradients of that, and of the tensors at some places of those that it reads.

    Its last activation is put among the ``activations``, beside that of forward.
    """
    step, layout = program.functions[k].step, program.layouts[k]
    made, others = apart(state, layout.made)
    g_made, after = apart(tuple(gradients), layout.made)

    def f(inputs: State, chosen: Sequence[Tensor]) -> Any:
        filled = list(mine)
        for i, t in zip(places, chosen, strict=True):
            filled[i] = t
        return program.evaluate(k, inputs, filled)

    chosen = [mine[i] for i in places]
    if step.merge_reads:
        taken = program.unmerge(k, made, mine)
        # Torch says of a view made now that it is a leaf with a gradient.
        if not torch.is_grad_enabled():
            taken = tuple(t.detach() for t in taken)
        _, pull = vjp(f, taken, chosen)
        g_taken, g_mine = pull(g_made)
        before = together(tuple(g_taken), layout.taken, after)
        return together(taken, layout.taken, others), before, g_mine, {t.dtype for t in taken}
    recorded = _record(f, others, chosen)
    if isinstance(recorded, _Recorded) and program.environment is not None:
        activations += program.environment.activations.compared(step, recorded.results)
    result = _detached(recorded.result)
    taken = tuple(s.to(t.dtype) for s, t in zip(step.unmerge(made, result), made, strict=True))
    dtypes = {t.dtype for t in (*taken, *_in_order(result)[0])}
    del result  # its memory may not be needed for the gradient
    recorded.then(step.merge, taken)
    g_others, g_mine, g_taken = recorded.pull(g_made)
    before = together(tuple(g_taken), layout.taken, tuple(map(_plus, after, g_others)))
    return together(taken, layout.taken, others), before, g_mine, dtypes


def backward_by_inversion(
    program: PureStack, wanted: Sequence[bool], flat: Sequence[Tensor], y: State, g: _Gradients
) -> list[Tensor | None]:
    """Undo the steps, last first, and differentiate each. -> the gradients that are wanted."""
    m = program.m
    tensors, needs = flat[m:], wanted[m:]
    totals: list[Tensor | None] = [None] * len(tensors)
    state, gradients = y, g
    dtypes: set[torch.dtype] = set()
    sizes: list[tuple[str, Tensor, float]] = []
    activations: list[recovery_check.Comparison] = []
    for k in reversed(range(len(program.functions))):
        reads, step = program.functions[k].reads, program.functions[k].step
        made = state[program.layouts[k].made[-1]]
        limit = step.limit_of(made.dtype)
        if limit < math.inf and made.numel():
            sizes.append((step.name, local_part(made).abs().amax(), limit))
        places = [i for i, place in enumerate(reads) if needs[place]]
        state, gradients, found, kinds = _invert_and_pull_back(
            program, k, state, gradients, program.mine_again(k, tensors), places, activations
        )
        for i, gradient in zip(places, found, strict=True):
            totals[reads[i]] = _plus(totals[reads[i]], gradient)
        dtypes = dtypes | kinds
    dtypes = dtypes | recovery_check.coarse(activations)
    # Gradients tell the compiler that there is nothing to compare before backward; elsewhere they may be mapped over.
    given = [*y, *(t for t in g if t is not None)] if torch.compiler.is_compiling() else y
    _close(program, dtypes, sizes, activations, tuple(flat[:m]), state, given)
    return [t for t, w in zip([*gradients, *totals], wanted, strict=True) if w]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients; None, as autograd has it, is that of what has not been used."""
    return a if b is None else b if a is None else a + b


def _close(
    program: PureStack,
    dtypes: set[torch.dtype],
    sizes: list[tuple[str, Tensor, float]],
    activations: Sequence[recovery_check.Comparison],
    x: State,
    back: State,
    given: Sequence[Tensor],
) -> None:
    """Compare the streams that came back with those that went in, activations of functions with those of forward, and
    the sizes of streams with their limits.

    Unless what backward was ``given`` has overflowed: naive autograd has no gradients then either.
    """
    tolerance = program.tolerance
    if tolerance is None:
        # Equality, wherever kernels repeat their bits, as in the other engine.
        steps = [function.step for function in program.functions]
        environment = program.environment
        plain = environment is not None and not environment.transformed
        exact = plain and all(t.is_cpu for t in x)
        exact = exact and all(step.inverts_exactly(t.dtype) for step in steps for t in x)
        tolerance = recovery_check.default_tolerance(dtypes, x[0].device.type != "cpu")
        tolerance = 0.0 if exact else tolerance
    if tolerance == math.inf or not program.functions:
        return
    finite = _norm(given).isfinite()
    gap, whole = _norm([b - a for a, b in zip(x, back, strict=True)]), _norm(x)
    errors = [torch.where(whole > 0, gap / whole, gap).nan_to_num(nan=math.inf)]
    found = [torch.where(finite, v, 0.0) for v in (*errors, *(size for _, size, _ in sizes))]
    if torch.compiler.is_compiling():
        for v, limit in zip(found, [tolerance, *(limit for _, _, limit in sizes)], strict=True):
            assert_on_device(v <= limit, _WRONG)
        return
    ranges = [recovery_check.StreamRange(name, size, size, limit) for name, size, limit in sizes]
    values = torch.stack([unwrapped(v).amax().double() for v in found])
    compared = [(f"what enters {program.functions[0].step.name}", tolerance)]
    if activations and program.environment is not None:
        off, named = program.environment.activations.errors(
            activations, given[-1], tolerance, dtypes
        )
        if off is not None:
            off = torch.where(finite, off.to(values.device), 0.0)
            values, compared = torch.cat([values[:1], off, values[1:]]), compared + named
    recovery_check.report(values, compared, ranges)


_WRONG = (
    "a compiled backward recovered the inputs of a stack wrongly, or a stream left the range of its coupling; "
    "run it without torch.compile to see which"
)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [
        torch.linalg.vector_norm(t.to(sum_dtype(t))).double() for t in map(local_part, tensors)
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
