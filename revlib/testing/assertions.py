"""Assertions about reversible sequences. Naive autograd is the oracle; messages name the tensor and the error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revlib._torch import tree_flatten_with_path, tree_map
from revlib.bijections import Bijection
from revlib.couplings import Coupling
from revlib.schedulers import Checkpoint, Naive, Reversible, Scheduler
from revlib.sequence import ReversibleSequence
from revlib.step import advance, checked
from revlib.testing.memory import footprint

__all__ = [
    "assert_bijects",
    "assert_inverts",
    "assert_memory_flat",
    "assert_same_gradients",
    "assert_unmerges",
]

_RTOL = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4, torch.complex64: 1e-4}

Loss = Callable[[Sequence[Tensor]], Tensor]


def _rtol(given: float | None, tensors: Iterable[Tensor]) -> float:
    """The tolerance: unless given, 1e-10 in float64, 1e-4 in float32, 0.1 in float16 and 0.3 in bfloat16."""
    coarse = {torch.float16: 0.1, torch.bfloat16: 0.3}
    return (
        max(({**_RTOL, **coarse}[t.dtype] for t in tensors), default=1e-10)
        if given is None
        else given
    )


def _compare(
    what: str,
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    rtol: float,
    noisy: str = "gradient",
) -> None:
    """Relative error in the norm of each tensor, plus 64 roundings of the largest gradient: gradients that vanish
    exactly (of a key's bias, of a bias before batch norm) are nothing but rounding errors of others. So is a stream of
    zeros, such as a sum that starts with nothing."""
    sizes = {k: float(t.detach().abs().double().norm()) for k, t in want.items() if t is not None}
    eps = max((torch.finfo(t.dtype).eps for t in want.values() if t is not None), default=0.0)
    noise = 64 * eps * max((size for k, size in sizes.items() if k.startswith(noisy)), default=0.0)
    problems = []
    for name in want:
        a, b = got[name], want[name]
        if a is None or b is None:
            if a is not b:
                problems.append(
                    (
                        float("inf"),
                        f"{name}: {'none' if a is None else 'one'}, not like the oracle's",
                    )
                )
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(
                (
                    float("inf"),
                    f"{name}: {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}",
                )
            )
            continue
        gap = (a.detach() - b.detach()).abs().double()
        error, allowed = (
            float(gap.norm()),
            rtol * sizes[name] + (noise if name.startswith(noisy) else 0.0),
        )
        if not error <= allowed:
            relative = error / sizes[name] if sizes[name] else float("inf")
            where = (
                tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
                if gap.ndim
                else ()
            )
            at = f"largest at {list(where)}: {a[where].item():.6g}, not {b[where].item():.6g}"
            problems.append(
                (
                    relative,
                    f"{name} {tuple(a.shape)}: relative error {relative:.3g} > {rtol:.3g}; {at}",
                )
            )
    if problems:
        problems.sort(key=lambda p: -p[0])
        listed = "\n  ".join(text for _, text in problems[:8])
        raise AssertionError(f"{what}: {len(problems)} of {len(want)} tensors differ\n  {listed}")


def assert_unmerges(coupling: Coupling, s: Tensor, f: Any, *, rtol: float | None = None) -> None:
    r"""The law of a coupling: ``unmerge(merge(s, f), f)`` gives ``s`` back, in its shape.

    $$\lVert \mathrm{unmerge}(\mathrm{merge}(s, f), f) - s \rVert \le \mathrm{rtol} \cdot \lVert s \rVert$$

    Args:
        s, f: a stream, and what a step's function returned, as the coupling takes them.
        rtol: the relative error allowed in the norm; by precision unless given: 1e-10 in float64, 1e-4 in float32, 0.1
            in float16, 0.3 in bfloat16. An exact coupling is held to every bit by ``rtol=0``.

    Shapes: those of the coupling. Cost: one merge and one unmerge, without a graph.

    Raises:
        AssertionError: it does not; the message says where by how much.
        TypeError: ``coupling`` is no coupling.

    Example:
        >>> from revlib import Additive
        >>> assert_unmerges(Additive(), torch.randn(3), torch.randn(3))
    """
    checked(coupling)
    with torch.no_grad():
        recovered = coupling.unmerge(coupling.merge(s, f), f)
    _compare(
        f"{coupling} does not unmerge what it merged", {"s": recovered}, {"s": s}, _rtol(rtol, [s])
    )


def assert_inverts(
    stack: ReversibleSequence,
    *streams: Tensor,
    context: Mapping[str, Any] | None = None,
    rtol: float | None = None,
) -> None:
    """``stack.inverse(*stack(*streams))`` gives the streams back, in ``eval()`` mode (which is left afterwards).

    Args:
        context: keyword arguments for the functions.
        rtol: the relative error allowed in the norm of each stream; by precision unless given, as in
            :func:`assert_unmerges`. Errors grow with depth unless the coupling is exact.

    Shapes: those of the stack. Cost: two forwards, without a graph.

    Raises:
        AssertionError: it does not; the message names the streams.

    Example:
        >>> stack = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Tanh())])
        >>> assert_inverts(stack, torch.randn(2, 3), torch.randn(2, 3))
    """
    modes = [(m, m.training) for m in stack.modules()]
    try:
        with torch.no_grad():
            stack.eval()
            recovered = stack.inverse(*stack(*streams, **(context or {})), **(context or {}))
    finally:
        for module, training in modes:
            module.training = training
    names = [f"stream {i}" for i in range(len(streams))]
    _compare(
        f"a stack of {len(stack.bound_steps)} steps does not invert",
        dict(zip(names, recovered, strict=True)),
        dict(zip(names, streams, strict=True)),
        _rtol(rtol, streams),
        noisy="stream",
    )


def assert_bijects(bijection: Bijection, *streams: Tensor, rtol: float | None = None) -> None:
    r"""The law of a bijection: forward and inverse undo each other, both ways.

    $$b^{-1}(b(s)) = s, \qquad b(b^{-1}(t)) = t, \qquad \ell(s) = \log |\det \partial b / \partial s|$$

    An exact one gives back every bit. Where it has a ``log_det``, $\ell$, that is the logarithm of the determinant of
    the Jacobian of the first sample, computed by autograd. The bijection is initialised on the streams, if it does that
    in train mode.

    Args:
        rtol: the relative error allowed in the norm of each stream, of one that is not exact; by precision unless
            given, as in :func:`assert_unmerges`.

    Shapes: streams as the bijection takes them; small ones, with the batch first. Cost: four passes, and the Jacobian:
    as many backwards as the first sample has elements, and their square in memory.

    Raises:
        AssertionError: they do not, or ``log_det`` says something else than the Jacobian.

    Example:
        >>> from revlib.bijections import ActNorm
        >>> assert_bijects(ActNorm(3), torch.randn(5, 3, 4))
    """
    what, rtol = f"{bijection} does not biject", 0.0 if bijection.exact else _rtol(rtol, streams)
    step = bijection.bind(what)
    with torch.no_grad():
        made = advance([step], streams, [{}])
        for which, inverse, given in (
            ("inverse", step.inverse(), made),
            ("forward", step, streams),
        ):
            other = step if which == "inverse" else step.inverse()
            there = advance([inverse], given, [{}])
            back = advance([other], there, [{}])
            names = [f"stream {i}" for i in range(len(given))]
            _compare(
                f"{what}: {which} is not undone",
                dict(zip(names, back, strict=True)),
                dict(zip(names, given, strict=True)),
                rtol,
                noisy="" if bijection.exact else "stream",
            )
    try:
        found = bijection.log_det(*streams[-(bijection.takes or 0) :]).detach()[0]
    except NotImplementedError:
        return
    sizes = [s[:1].numel() for s in streams]

    def flat(x: Tensor) -> Tensor:
        parts = [p.view_as(s[:1]) for p, s in zip(x.split(sizes), streams, strict=True)]
        return torch.cat([t.flatten() for t in advance([step], tuple(parts), [{}])])

    x = torch.cat([s[:1].detach().flatten() for s in streams])
    want = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x))[1]
    if not torch.isclose(found.to(want.dtype), want, rtol=1e-4, atol=1e-4):
        raise AssertionError(
            f"{what}: log_det is {float(found):.6g}, and of its Jacobian {float(want):.6g}"
        )


def _default_loss(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar of all outputs, curved and different for each, so that no mistakes cancel."""
    terms = [
        (y.abs().square() if y.is_complex() else y.sin() * y).sum() / (i + 1)
        for i, y in enumerate(outputs)
    ]
    return torch.stack([t.double() for t in terms]).sum()


def _observe(
    stack: ReversibleSequence,
    scheduler: Scheduler,
    streams: Sequence[Tensor],
    context: Mapping[str, Any],
    loss: Loss,
    seed: int,
) -> dict[str, Tensor | None]:
    """Everything a training step leaves behind, on a copy of the stack."""
    stack = copy.deepcopy(stack)
    stack.scheduler = scheduler
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in streams]

    def leaf(v: Any) -> Any:
        return v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    context = tree_map(leaf, dict(context))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = stack(*leaves, **context)
        total = loss(outputs)
        if total.requires_grad:
            total.backward()
        seen: dict[str, Tensor | None] = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        seen |= {f"gradient of stream {i}": t.grad for i, t in enumerate(leaves)}
        tensors = {"".join(map(str, path)): v for path, v in tree_flatten_with_path(context)[0]}
        seen |= {
            f"gradient of context{k}": v.grad for k, v in tensors.items() if isinstance(v, Tensor)
        }
        seen |= {f"gradient of {k}": p.grad for k, p in stack.named_parameters()}
        seen |= {f"buffer {k}": b for k, b in stack.named_buffers() if b.is_floating_point()}
        seen["the caller's next random number"] = torch.rand((), dtype=torch.float64)
    return seen


def assert_same_gradients(
    stack: ReversibleSequence,
    *streams: Tensor,
    context: Mapping[str, Any] | None = None,
    schedulers: Iterable[Scheduler] = (Reversible(), Checkpoint()),
    oracle: Scheduler | None = None,
    loss: Loss | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> None:
    """Every scheduler leaves behind what the oracle, ``Naive()``, does.

    Compared are the outputs, the gradients of all streams, context tensors and parameters that require one, the
    buffers, and the next number from the default random generator. Neither the stack nor its gradients are touched.

    Args:
        context: keyword arguments for the functions; its tensors may require gradients.
        schedulers: those to be tried. oracle: the one to be compared with.
        loss: maps the outputs to a scalar; a curved function of all of them unless given.
        rtol: relative error allowed in the norm of each tensor; by precision unless given: 1e-10 in float64, 1e-4 in
            float32, 0.1 in float16, 0.3 in bfloat16.
        seed: of the random numbers that functions draw.

    Shapes: those of the stack. Cost: a forward and a backward for the oracle and for each scheduler, on copies.

    Raises:
        AssertionError: a scheduler leaves something else behind; the message names the eight tensors that are furthest
            off, and where.

    Example:
        >>> stack = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Linear(3, 3))] * 2)
        >>> assert_same_gradients(stack, torch.randn(2, 3), torch.randn(2, 3))
    """
    rtol = _rtol(rtol, streams)
    arguments = (streams, context or {}, loss or _default_loss, seed)
    want = _observe(stack, oracle or Naive(), *arguments)
    for scheduler in schedulers:
        got = _observe(stack, scheduler, *arguments)
        _compare(
            f"{scheduler} against {oracle or Naive()} on {len(stack.bound_steps)} steps",
            got,
            want,
            rtol,
        )


def assert_memory_flat(
    make: Callable[[int], ReversibleSequence],
    *streams: Tensor,
    depths: Sequence[int] = (4, 16),
    rtol: float = 0.03,
) -> None:
    """The activation bytes of a training step do not grow with depth.

    Bytes are counted, not sampled: on a CPU the result is exact.

    Args:
        make: builds the stack of a depth.
        depths: those to be compared with the first of them.
        rtol: how far what is held after forward, and the peak, may exceed those at the first depth, relatively.

    Shapes: streams as the stacks take them, large beside a few hundred bytes a step. Cost: a forward and a backward at
    each depth.

    Raises:
        AssertionError: they grow; the message has a table of the bytes at each depth.

    Example:
        >>> def make(depth):
        ...     return ReversibleSequence([(torch.nn.Tanh(), torch.nn.Tanh()) for _ in range(depth)])
        >>> x = torch.randn(4096, 16, requires_grad=True)
        >>> assert_memory_flat(make, x, x, depths=(2, 8))
    """
    prints = {}
    for depth in depths:
        stack = make(depth)
        prints[depth] = footprint(stack, streams, stack.parameters())
    first = prints[depths[0]]
    for found in prints.values():
        if found.peak > first.peak * (1 + rtol) or found.held > first.held * (1 + rtol):
            table = "\n  ".join(
                f"depth {d}: held {p.held:,} B, peak {p.peak:,} B" for d, p in prints.items()
            )
            raise AssertionError(
                f"activation memory grows with depth (allowed: {rtol:.0%})\n  {table}"
            )
