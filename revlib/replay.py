"""Running a function a second time exactly as it ran the first time.

This is the one place that touches random generators. It also replays autocast, and the module's parameters, buffers
and mode, so that a recomputation inside backward sees the world that forward saw, and leaves the world as it was.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Autocast", "ModuleState", "Randomness"]


class _Turn(contextlib.AbstractContextManager[None]):
    """Threads draw from the CPU generator one function at a time, since it belongs to the whole process.

    After some seconds a thread goes ahead unasked: the function whose turn it is may itself be waiting for this thread.
    Device generators need no turns: autograd runs all of a device's backward on one thread.
    """

    lock = threading.RLock()
    patience = 5.0

    def __enter__(self) -> None:
        self.taken = self.lock.acquire(timeout=self.patience)
        if not self.taken:
            warnings.warn(
                f"a thread has waited {self.patience:.0f} s for another to leave a function of a reversible sequence; "
                "if both draw random numbers, backward may refuse to repeat them",
                stacklevel=3,
            )

    def __exit__(self, *exception: object) -> None:
        if self.taken:
            self.lock.release()


def _modules_of(fn: Any) -> list[nn.Module]:
    """The modules whose state a function reads: its own, or those of a bound method, within any partial application."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(owner, nn.Module):
        return []
    wrapped = vars(owner).get("fn")  # the plain function in a Step
    return [*owner.modules(), *(_modules_of(wrapped) if wrapped is not None else [])]


# ---------------------------------------------------------------------------------------------- randomness
def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _same(a: Tensor, b: Tensor) -> bool:
    with _disable_current_modes():  # the states are real where the stack's tensors are fake
        return torch.equal(a, b)


class Randomness:
    """The default generators of a stack's devices: which of them a function drew from, and from where.

    Cost: 5 kB for each function that draws from the CPU generator, 16 bytes on CUDA, nothing for one that does not.
    Generators of the user's own (``torch.Generator``, ``random``, NumPy) cannot be seen and are not replayed;
    closing the loop notices them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {t.device for t in tensors if t.device.type != "meta"}
        self.on_cpu = all(d.type == "cpu" for d in devices)
        self.devices = sorted(devices | {torch.device("cpu")}, key=str)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return _Turn() if self.on_cpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def recording(self, drawn: dict[torch.device, Tensor]) -> Iterator[None]:
        """Around a function's first run: fills ``drawn`` with the state before it of each generator it moved."""
        with self._turn():
            before = [_generator_state(d) for d in self.devices]
            yield
            for device, state in zip(self.devices, before, strict=True):
                if not _same(state, _generator_state(device)):
                    drawn[device] = state

    @contextlib.contextmanager
    def replaying(self, drawn: dict[torch.device, Tensor]) -> Iterator[None]:
        """Around a repetition: the same numbers again, and the caller's stream untouched afterwards."""
        if not drawn:
            yield
            return
        with self._turn():
            now = {device: _generator_state(device) for device in drawn}
            try:
                for device, state in drawn.items():
                    _set_generator_state(device, state)
                yield
            finally:
                for device, state in now.items():
                    _set_generator_state(device, state)


# ---------------------------------------------------------------------------------------------- autocast
class Autocast:
    """The autocast settings of forward, entered again where backward runs under others."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds = sorted({t.device.type for t in tensors} - {"meta"} | {"cpu"})
        self.settings = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(kind):
                    # No cache: weights cast inside a throw-away graph must not reach the user's next forward.
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


# ---------------------------------------------------------------------------------------------- modules
class ModuleState:
    """Parameters, buffers and mode of a function's modules as they were when it ran.

    Parameters are bound again by identity (``torch.func.functional_call`` swaps them during forward only) and must not
    have been edited since. Buffers that the run itself changed (BatchNorm's statistics, spectral norm's vectors) are
    bound again as copies from before it, so that a repetition neither sees nor makes a second update.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        modules = _modules_of(fn)
        self.mode = [(m, m.training) for m in modules]
        self.parameters = [
            (m, k, p, p.requires_grad, -1 if p.is_inference() else p._version)
            for m in modules
            for k, p in m._parameters.items()
            if p is not None
        ]
        with torch.no_grad():
            self._before = [
                (m, k, b, b._version, b.clone())
                for m in modules
                for k, b in m._buffers.items()
                if b is not None and not b.is_inference()
            ]

    def seal(self) -> None:
        """After the first run: keep copies of the buffers it changed, and the versions of those it did not."""
        self.changed: list[tuple[nn.Module, str, Tensor]] = []
        self.constant: list[tuple[nn.Module, str, Tensor, int]] = []
        for m, k, b, version, copy in self._before:
            # Native batch norm writes its running statistics without moving their version counters.
            silent = m.training and isinstance(m, nn.modules.batchnorm._NormBase)
            if silent or m._buffers.get(k) is not b or b._version != version:
                self.changed.append((m, k, copy))
            else:
                self.constant.append((m, k, b, version))
        del self._before

    def check(self, name: str) -> None:
        """Raise where a repetition would not repeat: naive autograd raises there, or would have used stored values."""
        for m, training in self.mode:
            if m.training != training:
                was, now = ("train", "eval") if training else ("eval", "train")
                raise RuntimeError(
                    f"{type(m).__name__} in {name} was in {was}() mode in forward and is in {now}() mode in backward; "
                    "switch modes only after backward."
                )
        for _, k, p, _, version in self.parameters:
            if version >= 0 and p._version != version:
                raise RuntimeError(
                    f"parameter {k!r} of {name} was modified by an inplace operation between forward and backward "
                    f"(version {p._version}, expected {version}); step the optimizer only after backward."
                )
        for _, k, b, version in self.constant:
            if b._version != version:
                raise RuntimeError(
                    f"buffer {k!r} of {name} was modified by an inplace operation between forward and backward; "
                    "edit buffers only after backward."
                )

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Around a repetition: the modules hold what they held in forward."""
        undo: list[tuple[dict[str, Any], str, Any]] = []

        def bind(slots: dict[str, Any], key: str, value: Any) -> None:
            undo.append((slots, key, slots.get(key)))
            slots[key] = value

        attributes = [(m.__dict__, m.__dict__.copy()) for m, _ in self.mode]
        try:
            for m, k, p, required_grad, _ in self.parameters:
                now = m._parameters.get(k)
                if isinstance(now, _DTensor) or isinstance(p, _DTensor):
                    continue  # FSDP swaps its own
                if p.requires_grad != required_grad:
                    bind(m._parameters, k, p.detach().requires_grad_(required_grad))
                elif now is not p:
                    bind(m._parameters, k, p)
            for m, k, b, _ in self.constant:
                if m._buffers.get(k) is not b:
                    bind(m._buffers, k, b)
            for m, k, copy in self.changed:
                bind(m._buffers, k, copy.clone())
            yield
        finally:
            for slots, key, value in reversed(undo):
                slots[key] = value
            for current, before in attributes:  # what the repetition assigned is of a graph that nobody differentiates
                for key in current.keys() - before.keys():
                    del current[key]
                current.update(before)


try:
    from torch.distributed.tensor import DTensor as _DTensor
except ImportError:  # torch built without distributed

    class _DTensor: ...  # type: ignore[no-redef]
