"""Recovery check: what backward recovered must be what forward had.

Catches what no version counter sees: a function that reads a clock or draws from a generator that nobody knows of, a
stream that does not invert accurately. All of them leave a trace: a stream recovered in backward differs from the
stream that forward merged away. Forward keeps a sample of up to 128 elements of each such stream, and backward
compares. Of each step it also compares the last activation, since the results of a function may be small beside its
stream, or zero, as they are where its last layer starts at zero.
Cannot see: differences below the tolerance, or outside of the sample. The sample moves from one forward to the next.
Cost: the samples, 576 bytes a step in float32, and at the end of backward a dozen operations on all of them together.
"""

from __future__ import annotations

import itertools
import math
import statistics
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from revlib import cuda_streams
from revlib._torch import is_fake, is_opaque_wrapper, saved_unwritten
from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.guards.modules import ModuleTree, current_tree
from revlib.step import BoundStep, State
from revlib.tensors import (
    SavedPlace,
    has_dense_memory,
    is_integral,
    is_parameter,
    last_activation,
    local_part,
    operations,
    saved_at,
    sum_dtype,
)

__all__ = [
    "Activations",
    "Comparison",
    "RecoveryCheck",
    "Sampler",
    "StreamRange",
    "default_tolerance",
    "raise_pending",
    "refuse_opaque",
    "report",
]

# Elements of a stream: at most, at least, and of a whole stack. Of an activation that only has to be the same roughly.
_SAMPLES, _FEWEST, _ALL, _ROUGH = 128, 8, 2**13, 16
# What functions may compute in, and return something wider, as under autocast.
_COARSE = frozenset((torch.float16, torch.bfloat16))
_RESIDUAL = 0.5  # a cosine that residual blocks exceed, and what is added to a residual seldom does
_serial = itertools.count()
# What was compared, in words, and the error that it may have.
Compared = list[tuple[str, float]]


class Sampler:
    """Picks a grid of up to 128 elements of a tensor, at an offset that moves from one forward to the next.

    Stacks of more than 64 steps take fewer of each, down to 8: what is kept to compare must not grow with depth.
    """

    def __init__(self, steps: int = 1) -> None:
        self.samples = min(_SAMPLES, max(_FEWEST, _ALL // max(1, steps)))
        self.offset = next(_serial)
        # The numbers of the elements. They are forgotten between forward and backward, to save their memory.
        self.places: dict[tuple[torch.Size, torch.device, type], Tensor] = {}

    def __call__(self, t: Tensor) -> Tensor:
        t = local_part(t).detach()
        key = t.shape, t.device, type(t)  # a fake tensor wants fake places
        places = self.places.get(key)
        if places is None:
            places = self.places[key] = self._places(t)
        if type(t) is not Tensor and is_fake(t) and not is_fake(places):
            return t  # a fake tensor outside of its mode has nothing to compare
        if t.dtype.itemsize == 1 and t.is_floating_point():  # of float8 torch takes none
            return torch.take(t.view(torch.uint8), places).view(t.dtype).float()
        return torch.take(t, places)

    def _places(self, t: Tensor) -> Tensor:
        """The numbers of the chosen elements, counted in rows as if the tensor were contiguous."""
        per_dim = max(1, int(self.samples ** (1 / max(1, t.ndim)) + 1e-9))
        places = torch.zeros((), dtype=torch.int64, device=t.device)
        for n in t.shape:
            count = min(n, per_dim)
            stride = n // count if count else 1
            # Each of the n places comes up at some offset.
            first = self.offset % (n - stride * (count - 1)) if count else 0
            along = torch.arange(first, first + stride * count, stride, device=t.device)
            places = places[..., None] * n + along
        return places


class _RoughSampler(Sampler):
    """Picks up to 16 elements, an odd distance apart, of what only has to be the same roughly."""

    def __init__(self, other: Sampler) -> None:
        self.samples, self.offset, self.places = min(_ROUGH, other.samples // 4), other.offset, {}

    def _places(self, t: Tensor) -> Tensor:
        n = t.numel()
        count = min(n, self.samples)
        along = torch.arange(count, device=t.device) * (n // max(1, count) | 1)
        return (along + self.offset) % max(1, n)


class Comparison(NamedTuple):
    """A recovered tensor, a stream or an activation, beside the original: samples of both."""

    name: str  # of the step
    original: Tensor
    recovered: Tensor
    # What the difference is measured against, if that is not the original.
    reference: Tensor | None = None
    step: int = -1  # the number of the step, if this is the stream that it merges away
    # Of an activation that was computed from recovered streams. It inherits their errors, and may enlarge them.
    rough: bool = False
    # Of an activation that was computed from a stream that was kept. Only kernels may round it in another way.
    computed: bool = False


class StreamRange(NamedTuple):
    """The least and the largest element of a merged stream, and the magnitude that its coupling allows."""

    name: str
    least: Tensor
    largest: Tensor
    limit: float


def default_tolerance(dtypes: set[torch.dtype], on_accelerator: bool) -> float:
    r"""$4\sqrt{\epsilon}$ of the coarsest arithmetic that took part: half of the digits, and two bits.

    float64 6e-8, float32 1.4e-3, float16 0.13, bfloat16 0.35. Accelerators may multiply float32 with TF32's 10-bit
    mantissa, so float32 counts as float16 there.
    """
    eps = max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float64).eps)
    if on_accelerator and torch.float32 in dtypes:
        eps = max(eps, 2.0**-10)
    return 4 * math.sqrt(eps)


def refuse_opaque(state: State) -> None:
    """Raises for a stream whose values cannot be read, so that what comes back could not be compared."""
    for i, stream in enumerate(state):
        if type(stream) is not Tensor and is_opaque_wrapper(stream):
            raise TypeError(
                f"stream {i} is a {type(stream).__name__}, a wrapper of tensors without __tensor_flatten__, so what "
                "comes back in backward cannot be compared with what went in; give the class that "
                "method, pass the tensor inside, or use scheduler=Naive()"
            )


# ------------------------------------------------------------------------------------------ the guard
class RecoveryCheck(Guard):
    """Samples of what forward had, compared with what backward recovers at the end of each backward pass."""

    def __init__(self, steps: int, tolerance: float | None, outer: RecoveryCheck | None) -> None:
        self.steps, self.tolerance = steps, tolerance
        # Of the stack that this one runs inside.
        self.outer = None if outer is None else weakref.ref(outer)
        self.sampler = Sampler(steps)
        self.rough_sampler = _RoughSampler(self.sampler)
        self.comparisons: dict[Hashable, list[Comparison]] = {}
        self.ranges: list[StreamRange] = []
        self.exact_steps = 0
        self.dtypes: set[torch.dtype] = set()
        # The sum of the last state, which is finite if the state is.
        self.total: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether every step is, here and in the stack around this one, which recovers our inputs."""
        if self.exact_steps != self.steps or self.outer is None:
            return self.exact_steps == self.steps
        outer = self.outer()
        return outer is not None and outer.exact

    def step(self, view: StepView, state: State) -> StepGuard:
        return _StepRecovery(view, self)

    def forward_done(self, state: State) -> None:
        self._forget_places()
        if self.tolerance != math.inf:
            with torch.no_grad():
                device, parts = state[0].device, map(local_part, state)
                sums = [s.sum(dtype=sum_dtype(s)) for s in parts]
                self.total = sum(t.to(device) if t.device != device else t for t in sums)  # type: ignore[assignment]

    def compare(self, key: Hashable, comparison: Comparison) -> None:
        self.comparisons.setdefault(key, []).append(comparison)

    def _forget_places(self) -> None:
        self.sampler.places.clear()
        self.rough_sampler.places.clear()

    def backward_done(self, key: Hashable) -> None:
        self._forget_places()
        found = self.comparisons.pop(key, [])
        compare_recovered(found, self.ranges, self.exact, self.tolerance, self.dtypes, self.total)

    def forget(self, key: Hashable) -> None:
        self.comparisons.pop(key, None)


class _StepRecovery(StepGuard):
    def __init__(self, view: StepView, of: RecoveryCheck) -> None:
        self.view, self.of = view, of
        self.streams = 0
        # Of saved tensors, by position, and of the streams that are taken away at -1, -2, ...
        self.samples: dict[int, Tensor] = {}
        self.weight = -1  # the position of the last saved parameter. Only its first row is sampled: updates change all
        self.reference: Tensor | None = None

    def first_run_done(self, run: FirstRun) -> None:
        view, of = self.view, self.of
        self.streams = len(run.state)
        if view.dropped and of.tolerance != math.inf:
            if view.streams_kept:
                self._sample_activations(run)
            else:
                # A sum may be as good as zero in between, where terms cancel; then nothing of it comes back.
                self.samples = {
                    -1 - i: of.sampler(run.taken[i]) for i in range(view.step.sums, len(run.taken))
                }
                merges = not view.step.merge_reads and len(run.saved) == run.function_saves
                if view.number == 0 and merges:
                    # If no function reads the first stream, it may be far smaller than what is added to it. Rounding
                    # then destroys it, which is harmless; so its error is measured against the merged stream.
                    self.reference = of.sampler(run.made[-1])
                self._sample_last_activation(run)
        of.dtypes.update(t.dtype for t in (*run.taken, *run.made, *run.result))
        saved = (placeholder.tensor for _, placeholder in run.saved)
        of.dtypes.update(
            t.dtype for t in saved if t is not None and t.dtype in _COARSE and t.requires_grad
        )
        made, step = run.made[-1], view.step
        of.exact_steps += all(step.inverts_exactly(t.dtype) for t in run.taken)
        limit = step.limit_of(made.dtype)
        if limit < math.inf and made.numel():
            # On a CPU this is many times as fast as a norm.
            least, largest = torch.aminmax(local_part(made).detach())
            of.ranges.append(StreamRange(step.name, least, largest, limit))

    def _sample_last_activation(self, run: FirstRun) -> None:
        """Of those that depend on what the function differentiates. What it saves besides may be noise of a generator
        that is compared where it enters, or memory that nobody has written. Where the function makes such memory
        itself, as padding that it fills in part, its activations may hold that, too, and none is compared."""
        if current_tree(self.view.step).leaves_unwritten:
            return
        for place, placeholder in reversed(run.saved):
            t = placeholder.tensor
            if t is None or place >= run.function_saves or not t.requires_grad:
                continue
            if not is_parameter(t) and has_dense_memory(t):
                self.samples[place] = self.of.rough_sampler(t)
                return

    def _sample_activations(self, run: FirstRun) -> None:
        """The stream is kept, so backward will not recover it. The last activations stand for what it recovers.

        Not integers: attention kernels save seeds that they leave uninitialised where they draw nothing; and not what
        RReLU and CTC loss save, which they leave unwritten in part.
        And no activation depends on the last weight, whose data somebody may exchange unseen.
        """
        activations = 0
        unwritten: set[int] | None = None  # looked for once, where it is needed
        for place, placeholder in reversed(run.saved):
            t = placeholder.tensor
            merges = place >= run.function_saves and not self.view.step.merge_reads
            if t is None or merges or not has_dense_memory(t):
                continue
            if is_parameter(t):
                if self.weight < 0:
                    self.weight = place
                    self.samples[place] = self.of.sampler(_first_row(t))
            elif activations < 2 and not is_integral(t):
                if unwritten is None and not t.requires_grad:
                    found = map(saved_unwritten, operations(run.result))
                    unwritten = {id(packed) for packed in found if packed is not None}
                if t.requires_grad or id(placeholder) not in (unwritten or ()):
                    activations += 1
                    self.samples[place] = self.of.sampler(t)
            if activations == 2 and self.weight >= 0:
                return

    def repeated(
        self, key: Hashable, inputs: State, saved: Sequence[Tensor], streams: State
    ) -> None:
        for place, original in self.samples.items():
            if place < 0:
                t = streams[-1 - place] if streams else None
            else:
                t = saved[place] if place < len(saved) else None
            if t is not None and (place < 0 or has_dense_memory(t)):
                rough = place >= 0 and not self.view.streams_kept
                sampler = self.of.rough_sampler if rough else self.of.sampler
                t = sampler(_first_row(t) if place == self.weight >= 0 else t)
                if is_fake(t) == is_fake(original):  # what is traced into a graph has no values
                    adds = place < 0 and self.streams == 2 and not self.view.step.merge_reads
                    number = self.view.number if adds else -1
                    reference = self.samples.get(-1) if rough else self.reference
                    computed = place >= 0 and not rough and place != self.weight
                    found = Comparison(
                        self.view.step.name, original, t, reference, number, rough, computed
                    )
                    self.of.compare(key, found)


def _first_row(t: Tensor) -> Tensor:
    return t[:1] if t.ndim else t


class Activations:
    """The last activations of the functions of a stack, for an engine that has the graph of each function at hand."""

    def __init__(self, trees: Mapping[BoundStep, ModuleTree]) -> None:
        self.trees = trees
        self.sampler = _RoughSampler(Sampler(len(trees)))
        self.originals: dict[BoundStep, tuple[SavedPlace, Tensor]] = {}

    def keep(self, step: BoundStep, results: Sequence[Any]) -> None:
        """Of the first run of a step's function, a sample. See :meth:`_StepRecovery._sample_last_activation`."""
        found = None if self.trees[step].leaves_unwritten else last_activation(results)
        if found is not None and has_dense_memory(found[1]):
            self.originals[step] = found[0], self.sampler(found[1])

    def compared(self, step: BoundStep, results: Sequence[Any]) -> list[Comparison]:
        """The same of its repetition, beside that sample, if there is one."""
        if step not in self.originals:
            return []
        place, original = self.originals[step]
        t = saved_at(results, place)
        if t is None or not has_dense_memory(t) or is_fake(t) != is_fake(original):
            return []
        return [Comparison(step.name, original, self.sampler(t), rough=True)]

    def errors(
        self,
        comparisons: Sequence[Comparison],
        stream: Tensor,
        tolerance: float,
        dtypes: set[torch.dtype],
    ) -> tuple[Tensor | None, Compared]:
        """How far off they are, measured against the errors that a stream may have, and what each may be off by."""
        self.sampler.places.clear()
        limit = rough_tolerance(tolerance, dtypes)
        if not comparisons or _unreadable(comparisons[0].original):
            return None, []
        with torch.no_grad(), torch.autocast(stream.device.type, enabled=False):
            if _agree(comparisons, limit):
                return None, []
            reference = self.sampler(stream)
            beside = [c._replace(reference=reference) for c in comparisons]
            return relative_errors(beside, tolerance), [named(c, limit) for c in beside]


def coarse(activations: Sequence[Comparison]) -> set[torch.dtype]:
    """The formats of half precision that functions have computed in, whatever they returned."""
    return {c.original.dtype for c in activations} & _COARSE


# ------------------------------------------------------------------------------------------ comparing
def named(c: Comparison, allowed: float) -> tuple[str, float]:
    """What was compared, in words, and the error that it may have."""
    return f"{'an activation of' if c.rough else 'what enters'} {c.name}", allowed


def _rows(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    """Samples as the rows of a matrix, in at least single precision, filled up with zeros."""
    if len({(t.shape, t.dtype, t.device) for t in samples}) == 1:  # as nearly always
        rows = (
            torch.stack(list(samples)).flatten(1)
            if samples[0].ndim
            else torch.stack(list(samples))[:, None]
        )
        return rows.to(device, sum_dtype(rows))
    flat = [t.flatten() if t.device == device else t.flatten().to(device) for t in samples]
    if len({t.dtype for t in flat}) > 1:
        common = torch.cat([t[:0] for t in flat]).dtype
        flat = [t.to(common) for t in flat]
    rows = pad_sequence(flat, batch_first=True)
    return rows.to(sum_dtype(rows))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).double()


def _finite(rows: Tensor) -> Tensor:
    return rows.masked_fill_(~rows.isfinite(), 0.0)


def relative_errors(comparisons: Sequence[Comparison], tolerance: float) -> Tensor:
    """$|r - o| / |o|$ of each recovered sample $r$ and its original $o$.

    A stream of zeros is measured against the largest one. A stream that no function sees may lose digits to what was
    merged into it, but must come back to one digit. Activations, which come last, may be small by chance, or be nothing
    but rounding errors of their streams, and are measured against the errors that these may have. The error is infinite
    where a number came back as NaN.
    """
    device = comparisons[0].original.device  # streams may live on several
    originals = _rows([c.original for c in comparisons], device)
    gaps = _rows([c.recovered for c in comparisons], device)
    # Infinities and NaNs too, which attention may save of what is masked.
    same = (gaps == originals) | (gaps.isnan() & originals.isnan())
    differences = _norms(gaps.sub_(originals).masked_fill_(same, 0.0))
    del gaps, same
    norms = _norms(_finite(originals))
    del originals
    sizes = norms
    if any(c.reference is not None for c in comparisons):
        others = [c.original if c.reference is None else c.reference for c in comparisons]
        references = _norms(_finite(_rows(others, device)))
        most = norms * max(1.0, 0.1 / tolerance if tolerance else 1.0)
        floors = references.minimum(most)
        # Of activations: the errors that a stream may have, on as many elements as were taken of it, but no more than a
        # tenth, or little would be noticed in bfloat16. A list of numbers would be copied to the device, which waits.
        rough = [
            math.sqrt(c.original.numel() / max(1, o.numel()))
            for c, o in zip(comparisons, others, strict=True)
            if c.rough
        ]
        if rough:
            others_of = references[-len(rough) :]
            # A stream of zeros says nothing of the one that entered the function.
            others_of = torch.where(others_of > 0, others_of, others_of.max())
            noise = others_of * (min(tolerance, 0.1) * max(rough))
            floors = torch.cat([floors[: -len(rough)], noise])
        sizes = torch.maximum(norms, torch.where(norms > 0, floors, 0.0))
    sizes = torch.where(sizes > 0, sizes, sizes.max().clamp_min(torch.finfo(torch.float64).tiny))
    return (differences / sizes).nan_to_num(nan=math.inf, posinf=math.inf)


def _agree(comparisons: Sequence[Comparison], allowed: float) -> bool:
    """Whether a first look, on a CPU, shows that all came back. Otherwise :func:`relative_errors` looks closely.

    It takes few operations. Each runs once a pass, when its code has left the processor's caches, and so they cost more
    than the comparison itself.
    """
    originals, recovered = [c.original for c in comparisons], [c.recovered for c in comparisons]
    if not all(t.is_cpu for t in originals):
        return False
    rows = _rows(originals, originals[0].device)
    gaps = _rows(recovered, originals[0].device).sub_(rows)
    norm = partial(torch.linalg.vector_norm, dim=1)
    # With infinities and NaNs this is NaN, which is not below zero.
    return torch.sub(norm(gaps), norm(rows), alpha=allowed).max().item() <= 0


def _within(ranges: Sequence[StreamRange]) -> bool:
    """The same of ranges: whether a first look, on a CPU, shows that no stream has left its own."""
    ends = [end for r in ranges for end in (r.least, r.largest)]
    if not ends or not all(t.is_cpu for t in ends):
        return not ends
    return torch.stack(ends).abs().max().item() < min(r.limit for r in ranges)


def rough_tolerance(tolerance: float, dtypes: set[torch.dtype]) -> float:
    """What an activation may be off by, if it was computed from streams that are known up to the tolerance.

    A function may enlarge their errors, or take another branch for single elements. What does not repeat at all is off
    by more. Where streams come back bit for bit, so do activations, up to the order in which kernels add: that depends
    on the number of threads.
    """
    if tolerance:
        return max(0.25, 1.5 * tolerance)
    return 16 * max((torch.finfo(d).eps for d in dtypes), default=0.0)


def compare_recovered(
    comparisons: Sequence[Comparison],
    ranges: Sequence[StreamRange],
    exact: bool,
    tolerance: float | None,
    dtypes: set[torch.dtype],
    total: Tensor | None,
) -> None:
    """Raises where a stream came back wrong or left its range, as :func:`report` says.

    Nothing is wrong where forward itself overflowed: naive autograd has NaN gradients then too, and GradScaler skips
    the step.
    """
    if any(is_fake(c.original) for c in comparisons):  # a function traces something into a graph
        comparisons = [c for c in comparisons if not is_fake(c.original)] or comparisons[:1]
    found = [c.original for c in comparisons] + [r.largest for r in ranges]
    if not found or _unreadable(found[0]):
        return
    device = found[0].device
    if tolerance is None:  # where every step is exact, equality, wherever kernels repeat their bits
        tolerance = (
            0.0
            if exact and device.type == "cpu"
            else default_tolerance(dtypes, device.type != "cpu")
        )
    comparisons = sorted(comparisons, key=lambda c: c.rough)
    rough = rough_tolerance(tolerance, dtypes)
    limits = [
        rough if c.rough or (c.computed and not tolerance) else tolerance for c in comparisons
    ]
    groups = [
        (limit, [c for c, own in zip(comparisons, limits, strict=True) if own == limit])
        for limit in dict.fromkeys(limits)
    ]
    # Autocast would have a say in how samples are put together.
    autocast = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), autocast:
        if _within(ranges) and all(_agree(group, limit) for limit, group in groups):
            return
        parts = [relative_errors(comparisons, tolerance)] if comparisons else []
        if ranges:
            ends = torch.stack(
                [
                    _rows([r.least for r in ranges], device),
                    _rows([r.largest for r in ranges], device),
                ]
            )
            parts.append(ends.abs().amax(0)[:, 0].double())
        values = torch.cat(parts)
        values = values if total is None else torch.where(total.isfinite(), values, 0.0)
    hint = partial(residual_hint, comparisons)
    compared = list(map(named, comparisons, limits))
    report(values, compared, ranges, hint)


def residual_hint(comparisons: Sequence[Comparison]) -> str:
    r"""A sentence if functions return much of what enters them, as whole residual blocks do; otherwise nothing.

    On two streams, what is added to stream k is $f_k = s_{k+2} - s_k$, and what enters the function is $s_{k+1}$. So
    samples of three streams in a row give the cosine of both. It is near 0 for functions that return something new.
    """
    streams = {c.step: c.original.detach().double().flatten() for c in comparisons if c.step >= 0}
    cosines = []
    for k, s in streams.items():
        if all(k + i in streams and streams[k + i].shape == s.shape for i in (1, 2)):
            added, entered = streams[k + 2] - s, streams[k + 1]
            cosines.append(torch.cosine_similarity(added, entered, dim=0).item())
    typical = statistics.median(cosines) if cosines else 0.0
    if not typical > _RESIDUAL:
        return ""
    return (
        f" Here functions return much of what enters them (cosine {typical:.2f}), as blocks do that have a residual "
        "connection of their own: then streams grow with every block. Take the blocks apart, as 'An existing residual "
        "block' in the guide shows."
    )


def _unreadable(values: Tensor) -> bool:
    return values.is_meta or is_fake(values) or cuda_streams.driver.capturing()


Hint = Callable[[], str]
_pending: list[tuple[cuda_streams.Arriving, Compared, Sequence[StreamRange], Hint]] = []


def report(
    values: Tensor,
    compared: Compared,
    ranges: Sequence[StreamRange],
    hint: Hint = str,  # returns what else there is to say where an error is too large
) -> None:
    """Raise where one of the errors, or of the magnitudes after them, is too large: at once on a CPU.

    On CUDA the values are copied without a synchronisation. The first forward or backward of any stack that finds them
    arrived raises, or :func:`raise_pending`. Inside a CUDA-graph capture nothing can be raised.
    """
    if _unreadable(values):
        return
    if values.is_cuda:
        _pending.append((cuda_streams.Arriving(values), compared, ranges, hint))
    else:
        _judge(values, compared, ranges, hint, "backward")


def raise_pending(*, wait: bool = True) -> None:
    """Raise if an earlier backward on a GPU recovered a stream wrongly.

    Such verdicts arrive without a host synchronisation, so the last one of a run may still be under way when the run
    ends; call this once there. ``wait=False`` looks only at those that have arrived, as every stack does by itself.

    Cost: where a verdict is still under way, the host waits for the device once. On a CPU nothing is ever pending.

    Raises:
        RuntimeError: that which backward raises on a CPU. It names the step, and says what to do.

    Example:
        >>> from revlib import ReversibleSequence
        >>> stack = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Linear(3, 3))])
        >>> for x in torch.randn(5, 2, 3):
        ...     y1, y2 = stack(x, x)
        ...     (y1 + y2).sum().backward()
        >>> raise_pending()  # after the last step of training
    """
    while _pending and not cuda_streams.driver.capturing() and (wait or _pending[0][0].here()):
        verdict, compared, ranges, hint = _pending.pop(0)
        _judge(verdict.get(), compared, ranges, hint, "an earlier backward")


def _judge(
    values: Tensor, compared: Compared, ranges: Sequence[StreamRange], hint: Hint, when: str
) -> None:
    """Raise for the first of the magnitudes, then errors, that is too large."""
    errors, sizes = values[: len(compared)].tolist(), values[len(compared) :].tolist()
    for size, (name, _, _, limit) in zip(sizes, ranges, strict=True):
        if not size < limit:
            raise RuntimeError(
                f"{name} took its stream to a magnitude of {size:.6g}, beyond the limit of {limit:g} below which its "
                "coupling is exact. Give the coupling a larger limit, at a coarser resolution, or normalise what the "
                "function returns."
            )
    for error, (what, allowed) in zip(errors, compared, strict=True):
        if error > allowed:
            raise RuntimeError(
                f"{when} recovered {what} with a relative error of {error:.2g}, "
                f"where {allowed:.2g} is tolerated, so its gradients are wrong. Either that function does not "
                "repeat, or its stream does not invert accurately, and rounding is enough where a function decides by "
                "value (routing, argmax, thresholds): there use coupling=ExactAdditive(). With scheduler=Checkpoint(), "
                "which inverts nothing, only a function that does not repeat is refused. 'When backward refuses' in "
                "the guide, revlib/README.md, has the causes of both and what to do." + hint()
            )
