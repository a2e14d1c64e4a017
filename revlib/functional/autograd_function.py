"""A second engine, without hooks: a whole stack as one autograd.Function, for what hooks cannot go through.

``torch.func`` transforms refuse saved-tensor hooks, and the compiler does not trace them. Both go through an
``autograd.Function`` whose forward and backward are pure functions of tensors. So all that the steps read is an
argument here: streams, parameters, buffers, tensors of the context. Backward undoes the steps one by one, and
differentiates each on the way. What cannot be an argument is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from revlib._torch import (
    bypass_compiler,
    exporting,
    forward_mode_active,
    normalises,
    storage_id,
    tracing,
    transforming,
    transforms,
)
from revlib.functional.pure_stack import Environment, PureStack, pure_stack_of
from revlib.functional.purity import TracingPurityMode
from revlib.functional.vjp import backward_by_inversion, vjp
from revlib.guards import raise_pending
from revlib.guards.modules import module_tree
from revlib.guards.randomness import CpuGeneratorLock
from revlib.guards.recovery_check import refuse_opaque
from revlib.step import NEEDS_DATA, BoundStep, State, advance, apart, layouts, numbered, route

__all__ = ["run", "run_eagerly"]

_OLD = bool(torch.__version__ < "2.12")  # torch 2.11 does not trace a look at a module's attributes


def run(
    steps: Sequence[BoundStep], state: State, context: Mapping[str, Any], tolerance: float | None
) -> State:
    """Run the steps in order on ``state`` and return the last state, differentiable in all that the steps read."""
    contexts = route(steps, len(state), context)
    if not torch.is_grad_enabled() or exporting() or tracing():
        return advance(steps, state, contexts)
    if not torch.compiler.is_compiling():
        return run_eagerly(steps, state, contexts, tolerance)
    if transforming():  # the compiler does not trace a Function within a transform
        return advance(steps, state, contexts)
    if _OLD or _untraceable(steps):
        from revlib.uncompiled import run_functional_uncompiled  # makes a graph break

        return run_functional_uncompiled(steps, state, contexts, tolerance)
    return _apply(steps, state, contexts, tolerance, None, buffers=True)


def run_eagerly(
    steps: Sequence[BoundStep],
    state: State,
    contexts: list[dict[str, Any]],
    tolerance: float | None,
) -> State:
    raise_pending(wait=False)
    refuse_opaque(state)
    hooked = next((s for s in steps if s.begins is not None and s.begins.is_hooked), None)
    if hooked is not None:
        raise RuntimeError(
            f"the block of {hooked.name} has hooks of its own, which would see streams without a graph under "
            "scheduler=Functional(); register them on its F or G, or use scheduler=Reversible()."
        )
    trees = [module_tree(step) for step in steps]
    active = transforms()
    if "Jvp" in active or forward_mode_active() or any(tree.is_lazy for tree in trees):
        # Forward mode keeps nothing; lazy modules first take their shape.
        return advance(steps, state, contexts)
    for step, tree in zip(steps, trees, strict=True):
        if active and step.needs_data:
            raise RuntimeError(NEEDS_DATA.format(step.name))
        for m in tree.modules:
            if active and normalises(m):
                raise RuntimeError(
                    f"{type(m).__name__} in {step.name} updates its statistics when it runs, which torch.func "
                    "transforms of it cannot; put it into eval mode, or use GroupNorm."
                )
    # Within a transform buffers may be mapped over. Without one, functions may update them.
    environment = Environment(steps, contexts, trees, state, transformed=bool(active))
    return _apply(steps, state, contexts, tolerance, environment, buffers=bool(active))


def _untraceable(steps: Sequence[BoundStep]) -> bool:
    """Written for the compiler, which guards all that is read here."""
    for step in steps:
        if not isinstance(step.fn, nn.Module) or step.merge_reads:
            return True
        if step.begins is not None and step.begins.is_hooked:
            return True
        for m in step.fn.modules():
            # The rates of layers that draw random numbers.
            rates = (getattr(m, name, None) for name in ("p", "drop_prob", "dropout"))
            if m.training and (any(isinstance(r, float) and r > 0 for r in rates) or normalises(m)):
                return True
            if any(isinstance(t, Tensor) and t.requires_grad for t in m.__dict__.values()):
                return True
    return False


def _apply(
    steps: Sequence[BoundStep],
    state: State,
    contexts: Sequence[dict[str, Any]],
    tolerance: float | None,
    environment: Environment | None,
    *,
    buffers: bool,
) -> State:
    # An output of a Function may depend on others. A hook of those, or a gradient with respect to them, must see that:
    # so the steps that read outputs are plain, but in a transform, where nobody can ask.
    whole = environment is not None and buffers
    inner, numbers = _inside(steps, len(state), whole=whole)
    # Another thread may just have bound these modules to its own tensors.
    with CpuGeneratorLock() if environment is not None else nullcontext():
        program, tensors = pure_stack_of(
            steps[:inner], state, contexts[:inner], tolerance, environment, buffers=buffers
        )
    if inner:
        given = state
        if torch.compiler.is_compiling():  # which wants no argument twice
            state = tuple(s.view_as(s) for s in state)
        made = _Stack.apply(program, *state, *tensors)
        # A stream that nobody has touched needs a gradient only if it did before.
        pairs = zip(numbers, made, strict=True)
        state = tuple(given[i] if i < len(given) else s for i, s in pairs)
    return advance(steps[inner:], state, contexts[inner:])


def _inside(steps: Sequence[BoundStep], m: int, *, whole: bool) -> tuple[int, tuple[int, ...]]:
    """How many steps go into the Function: those before the first that reads an output, unless the ``whole`` does.

    -> this number, and the state after so many steps, where the streams that go in are numbered from 0.
    """
    found = layouts(steps, m)
    states = numbered(found, m)
    inner, outputs = len(steps), set(states[-1])
    for k in reversed(range(len(steps))):
        # A bijection may hand on the very streams that it takes, as a permutation does.
        if steps[k].merge_reads and not outputs.isdisjoint(apart(states[k + 1], found[k].made)[0]):
            outputs.update(apart(states[k], found[k].taken)[0])
    for k, (taken, _, read) in enumerate(() if whole else found):
        others = apart(states[k], taken)[1]
        if not outputs.isdisjoint(others[len(others) - read :]):
            inner = k
            break
    return inner, states[inner]


class _Stack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(program: PureStack, *flat: Tensor) -> State:  # type: ignore[override]
        if torch.compiler.is_compiling():
            with TracingPurityMode(flat):
                return _views(program(flat), flat)
        if program.environment is None:
            program.leave_compiler(flat)
        return _views(program.forward(flat), flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: State) -> None:
        program, *flat = inputs
        ctx.program = program
        ctx.copied = {} if program.environment is None else program.copied_for_repetition(flat)
        ctx.save_for_backward(
            *(None if i in ctx.copied else t for i, t in enumerate(flat)), *output
        )
        if not torch.compiler.is_compiling():
            pairs = zip(output, program.needs, strict=True)
            ctx.mark_non_differentiable(*(y for y, needed in pairs if not needed))
            ctx.set_materialize_grads(False)
            # Also where some other transform wants the gradient.
            ctx.required = [t.requires_grad for t in flat]

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        program, wanted, saved = ctx.program, ctx.needs_input_grad[1:], _saved(ctx)
        flat, y = saved[: -program.n], tuple(saved[-program.n :])
        if torch.compiler.is_compiling():
            found = backward_by_inversion(program, wanted, flat, y, g)
        elif torch.is_grad_enabled() or transforming():  # it may be differentiated itself
            if ctx.copied:
                raise RuntimeError(
                    "a function of a stack with scheduler=Functional() edits its own parameters, so that it is "
                    "repeated with copies of them, and its gradients cannot be differentiated again; use "
                    "scheduler=Reversible()."
                )
            # What was frozen in forward, and is not any more, is no input of the graph.
            flat = [
                t if r or not t.requires_grad else t.detach()
                for t, r in zip(flat, ctx.required, strict=True)
            ]
            found = _Sweep.apply(program, wanted, *flat, *y, *_zeros(g, y))
        else:
            with torch.inference_mode(False), torch.no_grad():  # the first turns gradients on
                found = backward_by_inversion(program, wanted, flat, y, g)
            found = _apart(found, g)
        return None, *_filled([None] * len(wanted), wanted, found)


def _apart(
    gradients: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that share no memory unless they are one tensor: autograd takes a tensor that nobody else holds for
    ``.grad`` as it is, and would have two leaves accumulate into the same memory."""
    owners = {storage_id(g): g for g in given if g is not None}
    return [
        g if g is None or owners.setdefault(storage_id(g), g) is g else g.clone() for g in gradients
    ]


def _saved(ctx: Any) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    try:
        return [ctx.copied.get(i, t) for i, t in enumerate(ctx.saved_tensors)]
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "an input or output of a stack with scheduler=Functional(), or a parameter or context tensor that it "
            "reads, was modified by an inplace operation between forward and backward; edit a clone of it instead, and "
            "step the optimizer only after backward."
        ) from error


# Where the compiler breaks its graph within a function, these are called as they are. Compiled as frames of their own,
# they would take themselves for a part of a whole graph, and guards look at what the compiler cannot trace.
for _called in (run_eagerly, _Stack.forward, _Stack.setup_context, _Stack.backward):
    bypass_compiler(_called)


class _Sweep(torch.autograd.Function):
    """Backward as a function of its own: ``torch.func`` records what backward does, and would keep all of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: PureStack, wanted: Sequence[bool], *tensors: Tensor) -> Any:  # type: ignore[override]
        n = program.n
        found = backward_by_inversion(
            program, wanted, tensors[: -2 * n], tensors[-2 * n : -n], tensors[-n:]
        )
        return _views(found, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: State) -> None:
        ctx.program, ctx.wanted, *tensors = inputs
        n = ctx.program.n
        ctx.save_for_backward(*tensors[: -2 * n], *tensors[-n:])

    @staticmethod
    def backward(ctx: Any, *gg: Tensor) -> Any:
        """Of the gradient as a function of the inputs and of the gradient above; nothing is dropped here."""
        program, wanted, n, saved = ctx.program, ctx.wanted, ctx.program.n, ctx.saved_tensors
        flat, g = saved[:-n], saved[-n:]
        needed = ctx.needs_input_grad[2 : 2 + len(flat)]

        def gradient(some: Sequence[Tensor], g: State) -> Any:
            whole = _filled(flat, needed, some)
            chosen = _picked(whole, wanted)
            pull = vjp(lambda chosen: program(_filled(whole, wanted, chosen)), chosen)[1]
            return tuple(_zeros(pull(g)[0], chosen))

        pull = vjp(gradient, _picked(flat, needed), g)[1]
        found, g_g = pull(tuple(_zeros(gg, _picked(flat, wanted))))
        return None, None, *_filled([None] * len(flat), needed, found), *([None] * n), *g_g


def _zeros(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, of, strict=True)]


def _views(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Of what is returned as it came in; autograd saves no tensor that is both input and output."""
    return tuple(
        t.view_as(t) if t is not None and any(t is i for i in inputs) else t for t in outputs
    )


def _picked(all: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [t for t, w in zip(all, which, strict=True) if w]


def _filled(all: Sequence[Any], which: Sequence[bool], some: Sequence[Any]) -> list[Any]:
    """The inverse of :func:`_picked`."""
    rest = iter(some)
    return [next(rest) if w else t for t, w in zip(all, which, strict=True)]
