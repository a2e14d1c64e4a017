"""A device that has streams, as a model: what :class:`revlib.cuda_streams.CUDA` is to a GPU, this is to CPU tensors.

A CUDA device gets its work in streams. Kernels of one stream run in order; between streams there is no order but what
events make: ``b.wait_event(a.record_event())`` puts what a has been given so far before what b is given from now on.
Nothing runs in parallel here. The streams only keep account, with vector clocks, of what comes after what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Event", "Model", "Stream"]


class Event:
    """A point in the work of a stream: all that happens before it, by stream."""

    def __init__(self, stream: Stream) -> None:
        self.model, self.known, self.time = stream.model, dict(stream.known), 0.0

    def query(self) -> bool:
        """Whether the device has come to this point. As there is no device, ``model.arrived`` says so."""
        if self.model.captured:
            self.model.report("capture: an event was queried while a graph is captured")
        return self.model.arrived

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between two events, by what ``model.clock`` said as they were marked."""
        return end.time - self.time

    def synchronize(self) -> None:
        """Report that the host waits, since the device would soon have nothing to do."""
        self.model.report("host synchronisation: the host waits for an event")


class Stream:
    """A stream: its kernels run in order, and it knows which kernels happen before its next one."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name, self.device = model, name, torch.device("cpu")
        self.known: dict[Stream, int] = {self: 0}  # how many kernels of each stream: a vector clock

    def __repr__(self) -> str:
        return repr(self.name)

    def tick(self) -> int:
        """Count one more kernel, and return its number."""
        self.known[self] += 1
        return self.known[self]

    def knows(self, stream: Stream, tick: int) -> bool:
        """Whether that kernel happens before what this stream is given now."""
        return self.known.get(stream, 0) >= tick

    def record_event(self) -> Event:
        """An event after all kernels that the stream has been given so far."""
        return Event(self)

    def wait_event(self, event: Event) -> None:
        """Let all kernels that the stream is given from now on come after the event."""
        for stream, tick in event.known.items():
            self.known[stream] = max(self.known.get(stream, 0), tick)

    def wait_stream(self, stream: Stream) -> None:
        """Let all kernels that this stream is given from now on come after those that the other has so far."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """Report that the host waits."""
        self.model.report(f"host synchronisation: the host waits for stream {self}")


class Model:
    """The methods of :class:`revlib.cuda_streams.CUDA`, for CPU tensors.

    Args:
        report: called with a message where the host would wait, or a capture be spoilt.
        clock: milliseconds, asked whenever an event is marked.

    Attributes:
        main: the stream that is current at first. Others are made by ``Stream(model, name)``.
        sides: the side streams, by their main streams.
        arrived: what events answer when queried.
        captured: whether a CUDA graph is being captured.

    Example:
        >>> model = Model(report=print, clock=lambda: 0.0)
        >>> first, second = model.main, model.side(model.main)
        >>> number = first.tick()  # a kernel
        >>> second.knows(first, number)  # nothing puts it before what the second stream is given
        False
        >>> second.wait_stream(first)
        >>> second.knows(first, number)
        True
    """

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.report, self.clock = report, clock
        self.arrived, self.captured = True, False
        self.main = self.stream = Stream(self, "main")
        self.sides: dict[Stream, Stream] = {}

    def serves(self, t: Tensor) -> bool:
        """Whether a tensor is on this device."""
        return t.device.type == "cpu" and not isinstance(t, FakeTensor)

    def current(self, device: torch.device) -> Stream:
        """The stream that gets the work now."""
        return self.stream

    def side(self, main: Stream) -> Stream:
        """The side stream of a main stream, made when first asked for."""
        if main not in self.sides:
            self.sides[main] = Stream(self, f"side of {main.name}")
        return self.sides[main]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """A context in which the work goes to this stream."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self.captured

    def mark(self, device: torch.device) -> Event:
        """An event with the time, after what the current stream has been given so far."""
        if self.captured:
            self.report("capture: an event with a time was recorded while a graph is captured")
        event = self.stream.record_event()
        event.time = self.clock()
        return event
