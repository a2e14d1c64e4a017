"""Random numbers: a repetition draws those that the first run drew, and leaves the generators as it found them.

Catches: every draw from the default generator of a device that the stack's tensors are on, and of the CPU. The module
state has the generators that a function leads to itself: a ``torch.Generator``, and those of ``random`` and NumPy.
Cannot see: generators behind other libraries; the recovery check notices those.
Cost: for a function that draws, 5 kB on the CPU and 16 bytes on CUDA; two snapshots and a comparison a step.

This is the one place that touches random generators.
"""

from __future__ import annotations

import itertools
import pickle
import random
import sys
import threading
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from revlib._torch import dispatch_modes_active, no_dispatch_modes
from revlib.core.guard import Guard, StepGuard, StepView
from revlib.guards.containers import Contents, Holder
from revlib.step import State

__all__ = [
    "CpuGeneratorLock",
    "Draws",
    "Randomness",
    "devices_of",
    "generator_behind",
    "generator_holder",
]


class CpuGeneratorLock:
    """Threads draw from the CPU generator one function at a time, since it belongs to the whole process.

    After some seconds a thread goes ahead without the lock, because the function that holds it may be waiting for this
    very thread. Generators of other devices need no lock: autograd runs all of a device's backward on one thread.
    """

    lock = threading.RLock()
    turns = itertools.count()
    patience = 5.0

    def acquire(self) -> None:
        self.taken = self.lock.acquire(timeout=self.patience)
        self.turn = next(self.turns)  # whoever gets the next number knows that nobody came between
        if not self.taken:
            warnings.warn(
                f"a thread has waited {self.patience:.0f} s for another to leave a function of a reversible sequence; "
                "if both draw random numbers, backward may refuse to repeat them",
                stacklevel=3,
            )

    def release(self) -> None:
        if self.taken:
            self.lock.release()

    __enter__ = acquire

    def __exit__(self, *exception: object) -> None:
        self.release()


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices whose default generators a function on these tensors may draw from; always with the CPU."""
    found = {t.device for t in tensors} | {torch.device("cpu")}
    return sorted((d for d in found if d.type != "meta"), key=str)


def _state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _bytes(state: Tensor) -> bytes:
    """The contents of a state, which lies on the host. Comparing these takes a third of the time of torch.equal."""
    if not dispatch_modes_active():
        return state.numpy().tobytes()
    with no_dispatch_modes():  # states are real where the stack's tensors are fake
        return state.numpy().tobytes()


class Generators:
    """The default generators that the functions of one pass may draw from, and their latest known states.

    Nothing of ours draws between two functions, so the state after one serves as the state before the next, unless
    another thread had the generator meanwhile.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        self.lock = CpuGeneratorLock() if len(devices) == 1 else None
        self.turn = -1
        self.states: list[Tensor] = []
        self.contents: list[bytes] = []

    def forget(self) -> None:
        self.turn, self.states, self.contents = -1, [], []

    def look(self) -> None:
        self.states = [_state(d) for d in self.devices]
        self.contents = [_bytes(state) for state in self.states]


class Draws(StepGuard):
    """Of one function: the generators that it draws from, and their states before its first run."""

    def __init__(self, generators: Generators) -> None:
        self.generators, self.lock = generators, generators.lock
        self.drawn: list[tuple[torch.device, Tensor]] = []
        self.present: list[tuple[torch.device, Tensor]] = []

    def enter_first_run(self) -> None:
        known = self.generators
        if self.lock:
            self.lock.acquire()
        if self.lock is None or self.lock.turn != known.turn:
            known.look()

    def exit_first_run(self) -> None:
        known = self.generators
        before, contents = known.states, known.contents
        known.look()
        for device, state, was, now in zip(
            known.devices, before, contents, known.contents, strict=True
        ):
            if was != now:
                self.drawn.append((device, state))
        if self.lock:
            known.turn = self.lock.turn + 1
            self.lock.release()

    def enter_repetition(self) -> None:
        if self.drawn:
            if self.lock:
                self.lock.acquire()
            self.present = [(device, _state(device)) for device, _ in self.drawn]
            for device, state in self.drawn:
                _set_state(device, state)

    def exit_repetition(self) -> None:
        if self.drawn:
            for device, state in self.present:
                _set_state(device, state)
            if self.lock:
                self.lock.release()


class Randomness(Guard):
    """The default generators of a stack's devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.generators = Generators(devices)

    def step(self, view: StepView, state: State) -> StepGuard:
        return Draws(self.generators)

    def forward_done(self, state: State) -> None:
        self.generators.forget()


# ------------------------------------------------------------------------------------------ the user's generators
def generator_holder(thing: Any, name: str) -> Holder | None:
    """Of a generator of torch's, Python's or NumPy's, if it is one: its state as bytes, which can be put back."""
    if isinstance(thing, torch.Generator):
        return Holder(thing, name, _read_torch, _write_torch)
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):
        return Holder(thing, name, _read_python, _write_python)
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is None:
        return None
    if isinstance(thing, numpy.RandomState):  # which keeps every second normal number for later
        return Holder(thing, name, _read_legacy, _write_legacy)
    bits = thing.bit_generator if isinstance(thing, numpy.Generator) else thing
    return (
        Holder(bits, name, _read_bits, _write_bits)
        if isinstance(bits, numpy.BitGenerator)
        else None
    )


def generator_behind(part: Any, names: Iterable[str]) -> Any:
    """The generator that a global variable of a function leads to, if any: itself, or that of which it is a method,
    such as ``random`` imported from ``random``, or that of the module ``random``, ``numpy`` or ``numpy.random``. Of a
    module, the function looks up ``names``."""
    if part is random:
        return random.random.__self__  # type: ignore[attr-defined]
    if isinstance(part, types.ModuleType):
        numpy: Any = sys.modules.get("numpy.random")
        drawn = part is numpy or (part is sys.modules.get("numpy") and "random" in names)
        return numpy.rand.__self__ if numpy is not None and drawn else None
    bound = isinstance(part, (types.BuiltinFunctionType, types.MethodType))
    return part.__self__ if bound else part


def _read_torch(generator: torch.Generator) -> Contents:
    try:
        return (_bytes(generator.get_state()),)
    except RuntimeError:  # within the capture of a CUDA graph
        return ()


def _write_torch(generator: torch.Generator, contents: Contents) -> None:
    if contents:
        generator.set_state(torch.frombuffer(bytearray(contents[0]), dtype=torch.uint8))


def _read_python(generator: random.Random) -> Contents:
    return (generator.getstate(),)


def _write_python(generator: random.Random, contents: Contents) -> None:
    generator.setstate(contents[0])


def _read_legacy(generator: Any) -> Contents:
    return (pickle.dumps(generator.get_state(legacy=False)),)


def _write_legacy(generator: Any, contents: Contents) -> None:
    generator.set_state(pickle.loads(contents[0]))


def _read_bits(bits: Any) -> Contents:
    return (pickle.dumps(bits.state),)


def _write_bits(bits: Any, contents: Contents) -> None:
    bits.state = pickle.loads(contents[0])
