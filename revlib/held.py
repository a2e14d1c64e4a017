"""What the modules of a function held when it ran, and holding it again while it is repeated."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revlib.modules import normalises
from revlib.tensors import DTensor, version_of

__all__ = ["ModuleState"]


class ModuleState:
    """Parameters, buffers and mode of a function's modules as they were when it ran.

    Parameters are bound again by identity (``torch.func.functional_call`` swaps them during forward only) and must not
    have been edited since. So are children, and plain attributes (rates, flags, tensors, schedulers, ``forward`` where
    somebody put a function in its place), as they were before the run. Tensors among them must not have been edited,
    also not by the run. Buffers that the run itself changed (BatchNorm's statistics, spectral norm's vectors) are bound
    again as copies from before it, so that a repetition neither sees nor makes a second update. Forward hooks are those
    that ran, also those of a ``wrapper`` around the function, and torch's for all modules. Attributes that a repetition
    assigns are taken back.
    """

    def __init__(self, modules: Sequence[nn.Module], wrapper: Any = None) -> None:
        self.mode = [(m, m.training) for m in modules]
        self.parameters = [
            (m, k, p, p.requires_grad, version_of(p))
            for m in modules
            for k, p in m._parameters.items()
            if p is not None
        ]
        self.slots = [m.__dict__ for m in (*modules, wrapper) if isinstance(m, nn.Module)]
        self.attributes: list[tuple[dict[str, Any], set[str], dict[str, Any]]] = []
        self.tensors: list[tuple[str, Callable[[], Tensor | None], int]] = []  # among them
        for slots in self.slots:
            names = set(slots)
            plain = {k: slots[k] for k in names - _OF_MODULES}
            for k, a in plain.copy().items():
                if isinstance(a, _STATE):
                    del plain[k]
                elif isinstance(a, Tensor):
                    plain[k] = _alone(a)
                    if not torch._C._functorch.is_functorch_wrapped_tensor(a):
                        self.tensors.append((k, weakref.ref(a), version_of(a)))
            self.attributes.append((slots, names, plain))
        self.hooks = [(slots, keys, _hooks(slots, keys)) for slots, keys in _places(self.slots)]
        self.changed: list[tuple[nn.Module, str, Tensor | None]] = []
        self.constant: list[tuple[nn.Module, str, Tensor, int]] = []
        copies: dict[int, Tensor] = {}  # modules may share a buffer
        self._before: list[tuple[nn.Module, str, Tensor | None, int, Tensor | None]] = []
        for m in modules:
            for k, b in m._buffers.items():
                if b is None:
                    self._before.append((m, k, None, 0, None))
                elif not b.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(b):
                    copy = copies.setdefault(id(b), b.detach().clone())
                    self._before.append((m, k, b, b._version, copy))

    def seal(self) -> None:
        """After the first run: keep copies of the buffers it changed, and the versions of those it did not."""
        for m, k, b, version, copy in self._before:
            if m._buffers.get(k) is not b or (b is not None and b._version != version) or normalises(m):
                self.changed.append((m, k, copy))
            elif b is not None:
                self.constant.append((m, k, b, version))
        del self._before
        self.own = {k for k, t, version in self._attributes() if version_of(t) != version}
        self.children = [(slots["_modules"], tuple(slots["_modules"].items())) for slots in self.slots]

    def check(self, name: str) -> None:
        """Raise where a repetition would not repeat: naive autograd raises there, or would have used stored values."""
        for m, training in self.mode:
            if m.training != training:
                was, now = ("train", "eval") if training else ("eval", "train")
                raise RuntimeError(
                    f"{type(m).__name__} in {name} was in {was}() mode in forward and is in {now}() mode in backward; "
                    "switch modes only after backward."
                )
        parameters = [(k, p, version) for _, k, p, _, version in self.parameters if version >= 0]
        buffers = [(k, b, version) for _, k, b, version in self.constant]
        for key in self.own:
            raise RuntimeError(
                f"{name} edits a tensor in place, its attribute {key!r}, and would edit it again in backward. Make it "
                f"a buffer, which is put back (self.register_buffer({key!r}, ...)), or assign a new tensor to it."
            )
        for kind, advice, versions in (
            ("parameter", "step the optimizer only after backward", parameters),
            ("buffer", "edit buffers only after backward", buffers),
            ("attribute", "edit attributes only after backward", self._attributes()),
        ):
            for k, t, version in versions:
                if version_of(t) != version:
                    raise RuntimeError(
                        f"{kind} {k!r} of {name} was modified by an inplace operation between forward and backward "
                        f"(version {version_of(t)}, expected {version}); {advice}."
                    )

    def _attributes(self) -> list[tuple[str, Tensor, int]]:
        return [(k, t, version) for k, ref, version in self.tensors if (t := ref()) is not None]

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """Around a repetition: the modules hold what they held in forward."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        exchanged: list[tuple[dict[str, Any], dict[str, Any]]] = []
        fresh: dict[int, Tensor] = {}

        def bind(slots: dict[str, Any], key: str, value: Any) -> None:
            if slots.get(key, _ABSENT) is not value:
                undo.append((slots, key, slots.get(key, _ABSENT)))
                _set(slots, key, value)

        attributes = [(slots, slots.copy()) for slots in self.slots]
        try:
            for slots, names, plain in self.attributes:
                for name in slots.keys() - names:
                    del slots[name]
                slots.update(plain)
            for m, k, p, required_grad, _ in self.parameters:
                same = p.requires_grad == required_grad
                if same and m._parameters.get(k) is p:
                    continue
                if isinstance(p, DTensor) or isinstance(m._parameters.get(k), DTensor):
                    continue  # FSDP swaps its own
                bind(m._parameters, k, p if same else p.detach().requires_grad_(required_grad))
            for m, k, b, _ in self.constant:
                # Native batch norm, called as a function, writes statistics without moving their versions.
                spare = m.training and b.is_floating_point()
                bind(m._buffers, k, fresh.setdefault(id(b), b.detach().clone()) if spare else b)
            for m, k, copy in self.changed:
                bind(m._buffers, k, copy if copy is None else fresh.setdefault(id(copy), copy.clone()))
            for slots, keys, hooks in self.hooks:
                if _hooks(slots, keys) != hooks:
                    for k in keys:
                        bind(slots, k, hooks[k].copy() if hooks else type(slots[k])())
            for children, held in self.children:
                if tuple(children.items()) != held:
                    exchanged.append((children, children.copy()))
                    children.clear()
                    children.update(held)
            yield
        finally:
            for children, before in exchanged:
                children.clear()
                children.update(before)
            for slots, key, value in reversed(undo):
                _set(slots, key, value)
            for current, before in attributes:  # what the repetition assigned is of a graph that nobody differentiates
                if current.keys() == before.keys() and all(map(operator.is_, current.values(), before.values())):
                    continue
                for key in current.keys() - before.keys():
                    del current[key]
                for key, value in before.items():
                    if current.get(key) is not value:
                        current[key] = value


_ABSENT: Any = object()
_STATE = (dict, list, set)  # attributes that may change within
_OF_MODULES = frozenset(k for k, a in vars(nn.Module()).items() if isinstance(a, _STATE))


def _alone(t: Tensor) -> Tensor:
    """A tensor without the graph of an earlier pass, which may hold that of this one."""
    return t if t.is_leaf else t.detach().requires_grad_()


def _set(slots: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        slots.pop(key, None)
    else:
        slots[key] = value


_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called"),
)


def _places(hooked: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Where forward hooks are kept: torch's for all modules, and each module's."""
    yield vars(nn.modules.module), _GLOBAL_HOOKS
    for slots in hooked:
        yield slots, _HOOKS


def _hooks(slots: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Copies of what holds forward hooks; nothing where there are none."""
    return {k: slots[k].copy() for k in keys} if slots[keys[0]] or slots[keys[1]] else {}
