"""Module state: a repetition finds the modules as the first run found them, and leaves them as it finds them.

Catches: parameters edited since forward, or exchanged (``torch.func.functional_call``, which swaps them for a moment);
switched modes; attributes, children and forward hooks that were changed by the user or by the run itself; buffers that
the run changed (the statistics of batch norm, the vectors of spectral norm). What must not change is refused, the rest
is put back for the repetition, and afterwards everything is as it was.
Cannot see: state outside of modules, and edits through ``.data``, other than by the recovery check.
Cost: copies of the buffers that a run changes; a comparison of all attributes, three times a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from revlib._torch import is_transformed, normalises, version_of, versions_of
from revlib.core.guard import Guard, StepGuard, StepView
from revlib.guards.modules import ModuleTree, identical, module_tree, requires_grad_of
from revlib.step import BoundStep, State
from revlib.tensors import is_dtensor

__all__ = ["ModuleState", "ModuleStates"]

_ABSENT: Any = object()


class ModuleStates(Guard):
    """The modules of each function of a stack."""

    def step(self, view: StepView, state: State) -> StepGuard:
        return ModuleState(view.step)


class ModuleState(StepGuard):
    """What the modules of one function held when it ran."""

    def __init__(self, step: BoundStep) -> None:
        self.name = step.name
        self.tree = tree = module_tree(step)
        self.parameters = [p for p in tree.parameters if p is not None]
        self.versions = versions_of(self.parameters)
        self.requires_grad = tuple(map(requires_grad_of, self.parameters))
        self.hooks = tree.hooks()
        self.buffers = _Buffers(tree)
        self.tensors: list[tuple[str, Callable[[], Tensor | None], int]] = []  # that are attributes
        self.edited_by_run: set[str] = set()  # of these
        if tree.has_tensors:
            self._look_at_tensors()
        self.holds = True  # whether attributes are what they were, at the last look
        self.undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self.exchanged: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def _look_at_tensors(self) -> None:
        """A tensor among the attributes may belong to the graph of an earlier pass: it is kept without its graph."""
        for keys, values in zip(self.tree.keys, self.tree.values, strict=True):
            for name, value in zip(keys, values, strict=True):
                if isinstance(value, Tensor) and not is_transformed(value):
                    self.tensors.append((name, weakref.ref(value), version_of(value)))
        self.tree.forget_graphs()

    # ------------------------------------------------------------------------------------------ forward
    def exit_first_run(self) -> None:
        self.buffers.sort()
        if not self.tree.assigns and not self.tree.has_run:
            self.tree.has_run, self.tree.assigns = True, not self._is_as_before()
        self.edited_by_run = {
            k for k, t, version in self._alive_tensors() if version_of(t) != version
        }

    def _is_as_before(self) -> bool:
        tree = self.tree
        return tree.holds() and identical(tree.parameters_now(), tree.parameters)

    def _alive_tensors(self) -> list[tuple[str, Tensor, int]]:
        return [(k, t, version) for k, ref, version in self.tensors if (t := ref()) is not None]

    # ------------------------------------------------------------------------------------------ backward
    def check(self) -> None:
        """Raises where naive autograd raises, or would have used stored values that a repetition cannot reproduce."""
        self.holds = self.tree.holds()
        if not self.holds:
            self._check_modes()
        for key in self.edited_by_run:
            raise RuntimeError(
                f"{self.name} edits a tensor in place, its attribute {key!r}, and would edit it again in backward. "
                f"Make it a buffer, which is put back (self.register_buffer({key!r}, ...)), or assign a new tensor to "
                "it."
            )
        if versions_of(self.parameters) != self.versions:
            names = [k for names in self.tree.parameter_names for k in names]
            named = [k for k, p in zip(names, self.tree.parameters, strict=True) if p is not None]
            pairs = list(zip(named, self.parameters, self.versions, strict=True))
            self._refuse_edits("parameter", "step the optimizer only after backward", pairs)
        self._refuse_edits("buffer", "edit buffers only after backward", self.buffers.constant)
        self._refuse_edits(
            "attribute", "edit attributes only after backward", self._alive_tensors()
        )

    def _check_modes(self) -> None:
        for m, training in zip(self.tree.modules, self.tree.training, strict=True):
            if m.training != training:
                was, now = ("train", "eval") if training else ("eval", "train")
                raise RuntimeError(
                    f"{type(m).__name__} in {self.name} was in {was}() mode in forward and is in {now}() mode in "
                    "backward; switch modes only after backward."
                )

    def _refuse_edits(
        self, kind: str, advice: str, versions: list[tuple[str, Tensor, int]]
    ) -> None:
        for k, t, version in versions:
            if version >= 0 and version_of(t) != version:
                raise RuntimeError(
                    f"{kind} {k!r} of {self.name} was modified by an inplace operation between forward and backward "
                    f"(version {version_of(t)}, expected {version}); {advice}."
                )

    def enter_repetition(self) -> None:
        tree = self.tree
        if not self.holds:
            for slots, keys, values in tree.attributes():
                if tuple(slots) != keys or not identical(tuple(slots.values()), values):
                    self._exchange(slots, dict(zip(keys, values, strict=True)))
        flags = tuple(map(requires_grad_of, self.parameters))
        if flags != self.requires_grad or not identical(tree.parameters_now(), tree.parameters):
            for slots, held in self._parameters_of_forward():
                self._exchange(slots, held)
        for slots, key, value in self.buffers.for_repetition():
            self._bind(slots, key, value)
        self._bind_hooks()

    def exit_repetition(self) -> None:
        for slots, key, value in reversed(self.undo):
            if value is _ABSENT:
                slots.pop(key, None)
            else:
                slots[key] = value
        self.undo.clear()
        # What a repetition assigns belongs to a graph that nobody differentiates.
        tree, before = self.tree, {id(slots): (slots, present) for slots, present in self.exchanged}
        if before or (tree.assigns and not self._is_as_before()):
            for slots, keys, values in tree.attributes():
                before.setdefault(id(slots), (slots, dict(zip(keys, values, strict=True))))
            for slots, held in self._parameters_of_forward():
                before.setdefault(id(slots), (slots, held))
            for slots, present in before.values():
                _put(slots, present)
            self.exchanged.clear()

    def _exchange(self, slots: dict[str, Any], wanted: dict[str, Any]) -> None:
        self.exchanged.append((slots, slots.copy()))
        _put(slots, wanted)

    def _bind(self, slots: dict[Any, Any], key: Any, value: Any) -> None:
        present = slots.get(key, _ABSENT)
        if present is not value:
            self.undo.append((slots, key, present))
            slots[key] = value

    def _parameters_of_forward(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Where parameters belong, and what was there in forward; each requires a gradient if it did then."""
        flags, parameters = iter(self.requires_grad), iter(self.tree.parameters)
        for slots, names in zip(self.tree.parameter_slots, self.tree.parameter_names, strict=True):
            held: dict[str, Any] = {}
            for name in names:
                p = next(parameters)
                flag = p is not None and next(flags)
                if p is not None and p.requires_grad != flag:
                    p = p.detach().requires_grad_(flag)
                held[name] = p
            if not any(
                map(is_dtensor, (*held.values(), *slots.values()))
            ):  # FSDP exchanges its parameters itself
                yield slots, held

    def _bind_hooks(self) -> None:
        present = self.tree.hooks()
        if present != self.hooks:
            kept = {(id(slots), name): hooks for slots, name, hooks in self.hooks}
            for slots, name, _ in [*present, *self.hooks]:
                self._bind(slots, name, _like(slots[name], kept.get((id(slots), name), {})))


def _like(present: dict[Any, Any], hooks: dict[Any, Any]) -> dict[Any, Any]:
    copy = type(present)()
    copy.update(hooks)
    return copy


def _put(slots: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Have a dict hold exactly this, in this order where the order matters, which it does for children."""
    if "_modules" in wanted:  # the attributes of a module: it must never be without them
        for key in slots.keys() - wanted.keys():
            del slots[key]
        slots.update(wanted)
    elif tuple(slots) != tuple(wanted) or not identical(
        tuple(slots.values()), tuple(wanted.values())
    ):
        slots.clear()
        slots.update(wanted)


class _Buffers:
    """The buffers of a function's modules: their contents before the run, for those that the run changed."""

    def __init__(self, tree: ModuleTree) -> None:
        self.changed: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self.constant: list[tuple[str, Tensor, int]] = []
        self._constant_slots: list[tuple[dict[str, Any], bool]] = []
        self._before: list[tuple[Any, str, Tensor | None, int, Tensor | None]] = []
        if not any(tree.buffer_slots):
            return
        copies: dict[int, Tensor] = {}  # modules may share a buffer
        for m in tree.modules:
            for k, b in m._buffers.items():
                if b is None:
                    self._before.append((m, k, None, 0, None))
                elif not b.is_inference() and not is_transformed(b):
                    copy = copies.setdefault(id(b), b.detach().clone())
                    self._before.append((m, k, b, version_of(b), copy))

    def sort(self) -> None:
        """After the first run: keep copies of the buffers that it changed, and the versions of the others."""
        for m, k, b, version, copy in self._before:
            if (
                m._buffers.get(k) is not b
                or (b is not None and version_of(b) != version)
                or normalises(m)
            ):
                self.changed.append((m._buffers, k, copy))
            elif b is not None:
                self.constant.append((k, b, version))
                self._constant_slots.append((m._buffers, m.training and b.is_floating_point()))
        self._before = []

    def for_repetition(self) -> list[tuple[dict[str, Any], str, Tensor | None]]:
        """Where which buffer belongs."""
        if not self.changed and not self.constant:
            return []
        fresh: dict[int, Tensor] = {}
        found: list[tuple[dict[str, Any], str, Tensor | None]] = []
        for (k, b, _), (slots, spare) in zip(self.constant, self._constant_slots, strict=True):
            # Native batch norm, called as a function, writes statistics without moving their versions.
            found.append((slots, k, fresh.setdefault(id(b), b.detach().clone()) if spare else b))
        for slots, k, copy in self.changed:
            found.append(
                (slots, k, copy if copy is None else fresh.setdefault(id(copy), copy.clone()))
            )
        return found
