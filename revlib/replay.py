"""Running a function a second time under the random numbers and the autocast settings of the first.

This is the one place that touches random generators. A repetition leaves them as it found them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Autocast", "Randomness", "Settings", "Turn"]


class Turn(contextlib.AbstractContextManager[None]):
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
    if not torch._C._len_torch_dispatch_stack():
        return torch.equal(a, b)
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
        return Turn() if self.on_cpu else contextlib.nullcontext()

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


# ---------------------------------------------------------------------------------------------- settings
class Settings:
    """What else torch lets a program set, and functions read unasked, as it was in forward.

    The default dtype, the default device and other function modes (autograd runs backward without any), and which
    kernels attention may use. Inference mode is off, whoever calls backward.
    """

    def __init__(self) -> None:
        self.values = [get() for get, _ in _SETTINGS]
        self.modes = _modes()

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        now, modes = [get() for get, _ in _SETTINGS], _modes()
        if now == self.values and modes == self.modes and not torch.is_inference_mode_enabled():
            yield
            return
        try:
            self._set(self.values, self.modes)
            with torch.inference_mode(False):
                yield
        finally:
            self._set(now, modes)

    @staticmethod
    def _set(values: list[Any], modes: list[Any]) -> None:
        for (_, put), value in zip(_SETTINGS, values, strict=True):
            put(value)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in modes:  # entering them again would have them forget how to leave
            torch._C._push_on_torch_function_stack(mode)


def _modes() -> list[Any]:
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
]


# ---------------------------------------------------------------------------------------------- autocast
class Autocast:
    """The autocast settings of forward, entered again where backward runs under others.

    The cache of cast weights is off, in forward too: a weight that was cast before an optimizer's step would be used
    there, and not in backward; one cast in backward would be used, without a gradient, by the user's next forward.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds = sorted({t.device.type for t in tensors} - {"meta"} | {"cpu"})
        self.settings = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        settings = [s for s in self.settings if s[1] or torch.is_autocast_enabled(s[0])]
        if not settings:
            yield
            return
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in settings:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield
