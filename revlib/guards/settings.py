"""Settings that torch lets a program change, and that functions obey unasked: a repetition runs under forward's.

Catches: autocast with its dtypes, the default dtype and device, other function modes, the kernels that attention may
use, and inference mode, which is off in a repetition whoever calls backward.
Cannot see: the environment, deterministic algorithms, the precision of matrix products, which threads a library uses.
Cost: a comparison of some ten values a step, in forward of none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from revlib._torch import function_modes, set_function_modes
from revlib.core.guard import Guard, StepGuard, StepView
from revlib.step import State

__all__ = ["AutocastSettings", "Settings", "autocast_settings"]

AutocastSettings = tuple[tuple[str, bool, torch.dtype], ...]

_cuda = torch.backends.cuda
_GLOBAL: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
]
_GETTERS = [get for get, _ in _GLOBAL]


def autocast_settings(devices: Iterable[torch.device]) -> AutocastSettings:
    """Device type, whether autocast is on, and its dtype, for these devices and the CPU."""
    kinds = sorted({d.type for d in devices} - {"meta"} | {"cpu"})
    return tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)


def _enter_autocast(settings: AutocastSettings) -> ExitStack | None:
    """Autocast as it was, where it is on now or was on then.

    The cache of cast weights is off, in forward too. A weight that was cast before an optimizer's step would otherwise
    be used there and not in backward, and one that is cast in backward would be used, without a gradient, by the
    user's next forward.
    """
    entered: ExitStack | None = None
    for kind, enabled, dtype in settings:
        if enabled or torch.is_autocast_enabled(kind):
            entered = entered or ExitStack()
            entered.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
    return entered


class Settings(Guard):
    """Everything of the kind, as it was when forward began."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.autocast = autocast_settings(devices)
        self.in_autocast = any(enabled for _, enabled, _ in self.autocast)
        self.values = [get() for get in _GETTERS]
        self.modes = function_modes()

    def step(self, view: StepView, state: State) -> StepGuard:
        return _StepSettings(self)


class _StepSettings(StepGuard):
    def __init__(self, of: Settings) -> None:
        self.of = of
        self.autocast: ExitStack | None = None
        self.undo: tuple[list[Any], list[Any], torch.inference_mode] | None = None

    def enter_first_run(self) -> None:
        if self.of.in_autocast:
            self.autocast = _enter_autocast(self.of.autocast)

    def exit_first_run(self) -> None:
        if self.autocast is not None:
            self.autocast.close()
            self.autocast = None

    def enter_repetition(self) -> None:
        values, modes = [get() for get in _GETTERS], function_modes()
        if values != self.of.values or modes != self.of.modes or torch.is_inference_mode_enabled():
            self.undo = values, modes, torch.inference_mode(False)
            _set(self.of.values, self.of.modes)
            self.undo[2].__enter__()
        self.autocast = _enter_autocast(self.of.autocast)

    def exit_repetition(self) -> None:
        self.exit_first_run()
        if self.undo is not None:
            values, modes, inference_mode = self.undo
            inference_mode.__exit__(None, None, None)
            _set(values, modes)
            self.undo = None


def _set(values: list[Any], modes: list[Any]) -> None:
    for (_, put), value in zip(_GLOBAL, values, strict=True):
        put(value)
    set_function_modes(modes)
