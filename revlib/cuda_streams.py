"""Work on a side CUDA stream, next to the main one: the only place that touches streams and events.

Four rules make it right, without the host ever waiting for the device:

1. Before a launch, the side stream waits for the main one. So it sees what main has written, and may reuse memory that
   main has read: the caching allocator gives a stream back its own blocks as soon as the *host* has freed them.
2. After a launch, the side stream records an event, and whoever uses the results waits for it on the device.
3. What a launch reads is held until main has waited for it: main could otherwise reuse its memory too early.
4. A launch that nobody has waited for is waited for at the end of the backward pass, or when it is dropped.

:data:`driver` is what they are made of; :mod:`revlib.testing.races` puts a model of it in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revlib._torch import is_fake

__all__ = ["CUDA", "Arriving", "Launch", "LookAheadPolicy", "driver", "settle"]


class CUDA:
    """Streams and events of the accelerators that have them."""

    def __init__(self) -> None:
        # One side stream per main stream: its memory pool is then reused from pass to pass, and only ever by launches
        # that waited for that main stream.
        self._sides: dict[torch.cuda.Stream, torch.cuda.Stream] = {}

    def serves(self, t: Tensor) -> bool:
        """Whether work on the device of this tensor can overlap."""
        return t.is_cuda and not is_fake(t)

    def current(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which the device gets its work now."""
        return torch.cuda.current_stream(device)

    def side(self, main: torch.cuda.Stream) -> torch.cuda.Stream:
        """Another stream of the same device, always the same for the same main stream."""
        found = self._sides.get(main)
        if found is None:
            found = torch.cuda.Stream(main.device)
            if found == main:  # torch's streams are a pool, and the same one may come again
                found = torch.cuda.Stream(main.device)
            self._sides[main] = found
        return found

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[None]:
        """A context in which the device gets its work on this stream."""
        return torch.cuda.stream(stream)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: nothing may ask then whether an event has happened."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def mark(self, device: torch.device) -> torch.cuda.Event:
        """Record an event on the current stream, with the time at which the device comes to it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.current(device))
        return event


driver: Any = CUDA()  # or a model of it, which has streams and events of its own


class Launch:
    """Work given to the side stream of the device's current stream, which it calls main.

    Args:
        work: does it, on the host, at once; what it raises is kept in ``failure``.
        held: what the work reads, of main's memory (rule 3).
    """

    def __init__(self, device: torch.device, work: Callable[[], None], held: object) -> None:
        self.device, self.held = device, held
        self.failure: Exception | None = None
        self.main = driver.current(device)
        side = driver.side(self.main)
        side.wait_stream(self.main)
        try:
            with driver.on(side):
                work()
        except Exception as failure:
            self.failure = failure
        finally:
            self.event = side.record_event()

    def join(self) -> None:
        """Make main and the current stream wait until the work is done, without making the host wait."""
        for stream in {self.main, driver.current(self.device)}:
            stream.wait_event(self.event)
        self.held = None

    def __del__(self) -> None:  # an exception elsewhere in backward may leave a launch behind
        if self.held is not None and hasattr(self, "event"):
            with contextlib.suppress(Exception):
                self.main.wait_event(self.event)


def settle(launches: dict[int, Launch]) -> None:
    """Make main wait for launches that nobody has waited for, and forget them."""
    for launch in set(launches.values()):
        launch.join()
    launches.clear()


class LookAheadPolicy:
    """Decides whether one backward pass through a stack looks ahead, and is told how it goes."""

    # Whether the next step is recovered on the side stream while the gradients of this one are computed.
    ahead: bool = True

    def started(self, device: torch.device) -> None:
        """The first step is about to be recovered."""

    def ended(self, device: torch.device) -> None:
        """The last step has been recovered."""

    def failed(self, failure: Exception) -> None:
        """A launch did not come to its end. Nothing is lost: its step is recovered on main when it is needed."""
        self.ahead = False


class Arriving:
    """A small tensor on its way to the host, which does not wait for it."""

    def __init__(self, t: Tensor) -> None:
        self.host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
        self.host.copy_(t, non_blocking=True)
        self.event = driver.mark(t.device)

    def here(self) -> bool:
        """Whether the copy is done."""
        return self.event.query()

    def get(self) -> Tensor:
        """The tensor on the host. Waits until the copy is done."""
        self.event.synchronize()
        return self.host
