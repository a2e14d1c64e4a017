"""Which modules a function reads, and what kinds of them there are."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["modules_of", "normalises", "refuse_scripted"]


def modules_of(fn: Any) -> list[nn.Module]:
    """The modules whose state a function reads.

    Its own, that of a bound method, those that a closure captures or that its code names in its file, also behind
    other functions; and what such a module holds, as its child, in a plain list or dict, or behind a function.
    """
    found: dict[int, nn.Module] = {}
    _collect(fn, found, set())
    return list(found.values())


def _collect(value: Any, found: dict[int, nn.Module], seen: set[int]) -> None:
    if isinstance(value, nn.Module):
        if id(value) not in found:
            found[id(value)] = value
            for child in value._modules.values():
                if child is not None:
                    _collect(child, found, seen)
            for held in value.__dict__.values():
                if type(held) in _HOLDERS and held:
                    _collect(held, found, seen)
        return
    if type(value) in _HOLDERS and id(value) not in seen:
        seen.add(id(value))
        for part in _parts(value):
            _collect(part, found, seen)


_HOLDERS = {list, tuple, dict, functools.partial, types.MethodType, types.FunctionType}
_MANY = 32  # entries of a list or dict that is data, and no list of modules


def _parts(value: Any) -> Iterator[Any]:
    """What a function, or a list or dict, may hold modules in."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that is not assigned yet
                yield cell.cell_contents
        for name in value.__code__.co_names:
            part = value.__globals__.get(name)
            if isinstance(part, nn.Module) or getattr(part, "__module__", None) == value.__module__:
                yield part
    elif len(value) <= _MANY:
        yield from value.values() if isinstance(value, dict) else value


def refuse_scripted(modules: Sequence[nn.Module], name: str) -> None:
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise TypeError(
            f"{name} contains a module compiled by torch.jit, whose parameters and buffers cannot be watched or put "
            "back; use the module it was made from, or torch.compile, or scheduler=Naive()."
        )


def normalises(m: nn.Module) -> bool:
    """Native batch norm writes its running statistics without moving their version counters."""
    return m.training and isinstance(m, nn.modules.batchnorm._NormBase)
