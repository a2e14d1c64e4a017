"""Finding races of stream code on a CPU, without a GPU and without luck.

Two kernels on different streams race if they use the same memory, one of them writes it, and no chain of events puts
one before the other. On a GPU a race goes wrong once in a thousand runs; here it is found in every run, because order
is computed, not observed.

Three models make that possible:

- *Streams* with vector clocks (:mod:`revlib.testing.model`). Each kernel ticks the clock of its stream. A stream also
  knows how far it has waited for every other one, and an event is a copy of that knowledge. Work happens before what
  comes now if the current stream knows of its tick.
- *Kernels*: the operators that a dispatch mode sees, with the memory that each reads and writes. Views are no kernels.
- *Memory*, as the caching allocator gives it. A block belongs to the stream it was made on. Once the *host* has dropped
  the last reference, and whatever the device is still doing, the next allocation on that stream may get the block. So
  that allocation must come after everything that used it.

All of it looks like CPU tensors on a device with streams, as long as :class:`RaceChecker` is open.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revlib import cuda_streams
from revlib._torch import TorchDispatchMode, has_storage, tree_leaves, tree_map
from revlib.schedulers import PaReprop, Scheduler
from revlib.sequence import ReversibleSequence
from revlib.testing.model import Model, Stream

__all__ = ["RaceChecker", "assert_no_races"]

_METADATA = {"aten::is_same_size"}  # operators that look at no element


class _Memory:
    """A block of memory: the stream that owns it, and of each stream the last kernel that wrote it and that read it."""

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.written: dict[Stream, tuple[int, str]] = {}
        self.read: dict[Stream, tuple[int, str]] = {}


class RaceChecker(TorchDispatchMode):
    """Within this context, CPU tensors look as if their device had streams, and races are found.

    Open it around forward *and* backward. It swaps :data:`revlib.cuda_streams.driver`, which is of the whole process,
    and sees the operators of this thread, which on a CPU are those of backward too.

    Args:
        clock: what events note as their time, in milliseconds; the number of kernels so far, unless given.

    Attributes:
        races: what is wrong, one message each. Besides races: a host synchronisation, work on a side stream that its
            main stream has not waited for at the end, and in a capture anything that asks for the time or an event.
        on_side: how many kernels ran on side streams. If none did, having no races says nothing.
        driver: the model of the device, with settings for its clock, its events, and graph capture.

    Not modelled: that the host waits where it reads an element (``item()``), and that on a GPU autograd runs each
    node's backward on the stream of its forward.

    Cost: a call of Python for every operation, and an entry for every block of memory that is alive.

    Source: vector clocks, Fidge, *Timestamps in Message-Passing Systems That Preserve the Partial Ordering*, 1988, and
    Mattern, *Virtual Time and Global States of Distributed Systems*, 1989.

    Example:
        >>> looking_ahead = PaReprop(trials=0)  # from the first step on, without measuring whether it pays
        >>> stack = ReversibleSequence([(torch.nn.Tanh(), torch.nn.Tanh())] * 3, scheduler=looking_ahead)
        >>> with RaceChecker() as checker:
        ...     y1, y2 = stack(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3))
        ...     (y1 + y2).sum().backward()
        >>> checker.on_side > 0, checker.races
        (True, [])
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.races: list[str] = []
        self.on_side = self.kernels = 0
        self.driver = Model(self.report, clock or (lambda: float(self.kernels)))
        self._outer: list[Any] = []
        self._memory: dict[int, _Memory] = {}  # of live storages
        # What the host has dropped, by its stream, and what has been given to no one since.
        self._free: dict[Stream, list[_Memory]] = {}

    def __enter__(self) -> RaceChecker:
        super().__enter__()
        self._outer.append(cuda_streams.driver)
        cuda_streams.driver = self.driver
        return self

    def __exit__(self, *exception: Any) -> None:
        cuda_streams.driver = self._outer.pop()
        super().__exit__(*exception)
        self.check_joined()

    def stream(self, name: str) -> Stream:
        """Another main stream, under a name for messages."""
        return Stream(self.driver, name)

    def on(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        """A context in which the device gets its work on this stream."""
        return self.driver.on(stream)

    def report(self, message: str) -> None:
        """Add a message to ``races``, unless it is there."""
        if message not in self.races:
            self.races.append(message)

    def check_joined(self) -> None:
        """Report work on side streams that their main streams have not waited for; for the end of a backward pass."""
        for main, side in self.driver.sides.items():
            behind = side.known[side] - main.known.get(side, 0)
            if behind:
                self.report(
                    f"not joined: stream {main} has not waited for the last {behind} kernels on {side}"
                )

    # ------------------------------------------------------------------------------------------ kernels
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before, written = (
            self._storages((args, kwargs)),
            self._storages(_written(func, args, kwargs)),
        )
        after = self._storages(result)
        view = not written and after and after.keys() <= before.keys()
        name = func.name().split("::")[-1] if hasattr(func, "name") else str(func)
        if (
            not view
            and (before or after)
            and getattr(getattr(func, "_schema", None), "name", "") not in _METADATA
        ):
            self._kernel(name, before, written, after)
        return result

    def _storages(self, nest: Any) -> dict[int, Any]:
        tensors = (t for t in tree_leaves(nest) if isinstance(t, Tensor) and has_storage(t))
        return {
            s._cdata: s for s in (t.untyped_storage() for t in tensors if self.driver.serves(t))
        }

    def _kernel(
        self, name: str, before: dict[int, Any], written: dict[int, Any], after: dict[int, Any]
    ) -> None:
        now = self.driver.stream
        mark = (now.tick(), name)
        self.kernels += 1
        self.on_side += now in self.driver.sides.values()
        for key, storage in before.items():
            # A storage that is not known is older than this context, and is taken to be of the main stream.
            memory = self._memory.get(key) or self._born(storage, self.driver.main)
            if key in written:
                this = f"{name} on {now} overwrites"
                self._compare(memory.read, "write after read", this, "reads")
                self._compare(memory.written, "write after write", this, "writes")
                memory.written, memory.read = {now: mark}, {}
            else:
                this = f"{name} on {now} reads"
                self._compare(memory.written, "read after write", this, "writes")
                memory.read[now] = mark
        for key in after.keys() - before.keys():
            for memory in self._free.pop(now, []):
                for uses in (memory.written, memory.read):
                    self._compare(uses, "memory reuse", f"{name} on {now} may be given", "uses")
            # Also what is only allocated here (torch.empty) must not be touched by other streams before this point.
            self._born(after[key], now).written = {now: mark}

    def _compare(
        self, uses: Mapping[Stream, tuple[int, str]], kind: str, this: str, does: str
    ) -> None:
        """Report the uses of some memory that do not happen before the current stream's next kernel."""
        for stream, (tick, name) in uses.items():
            if not self.driver.stream.knows(stream, tick):
                self.report(f"{kind}: {this} memory that {name} on {stream} still {does}")

    def _born(self, storage: Any, owner: Stream) -> _Memory:
        memory = self._memory[storage._cdata] = _Memory(owner)
        weakref.finalize(storage, self._died, storage._cdata).atexit = False
        return memory

    def _died(self, key: int) -> None:
        memory = self._memory.pop(key)
        self._free.setdefault(memory.owner, []).append(memory)


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator edits, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return []
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    names = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    # The schema of native batch norm does not say that it edits its statistics.
    if given.get("training") and "batch_norm" in schema.name:
        names |= {"running_mean", "running_var"}
    return [given[name] for name in names if name in given]


def assert_no_races(
    stack: ReversibleSequence,
    *streams: Tensor,
    scheduler: Scheduler | None = None,
    context: Mapping[str, Any] | None = None,
    steps: int = 2,
) -> None:
    """Training steps (forward, backward, an update of the parameters) have no races, and do use a side stream.

    It trains a copy of the stack. The loss is the sum of the outputs' mean squares.

    Args:
        scheduler: ``PaReprop(trials=0)`` unless given, which looks ahead always.
        context: keyword arguments for the functions.
        steps: more than one, because memory that one step frees is used again by the next.

    Shapes: those of the stack. Cost: so many training steps, with a call of Python for every operation.

    Raises:
        AssertionError: there are races, or nothing ran on a side stream, which would say nothing.

    Example:
        >>> stack = ReversibleSequence([(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in range(3)])
        >>> assert_no_races(stack, torch.randn(2, 3, requires_grad=True), torch.randn(2, 3))
    """
    stack = copy.deepcopy(stack)
    stack.scheduler = scheduler or PaReprop(trials=0)

    def leaf(v: Any) -> Any:
        return v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    with torch.random.fork_rng(devices=[]), RaceChecker() as checker:
        for _ in range(steps):
            outputs = stack(*map(leaf, streams), **tree_map(leaf, dict(context or {})))
            torch.stack([y.abs().square().mean() for y in outputs]).sum().backward()
            del outputs
            checker.check_joined()
            with torch.no_grad():
                for parameter in stack.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=1e-3)
                        parameter.grad = None
    if checker.races:
        listed = "\n  ".join(checker.races[:8])
        raise AssertionError(
            f"{stack.scheduler} has {len(checker.races)} races, among them\n  {listed}"
        )
    if not checker.on_side:
        raise AssertionError(
            f"{stack.scheduler} gave no work to a side stream in {steps} steps, so that it has no races says nothing"
        )
