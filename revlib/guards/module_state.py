"""Module state: a repetition finds the modules as the first run found them, and leaves them as it finds them.

Catches: parameters edited since forward, or exchanged (``torch.func.functional_call``, which swaps them for a moment);
switched modes; attributes, children and forward hooks that were changed by the user or by the run itself; buffers that
the run changed (the statistics of batch norm, the vectors of spectral norm). What must not change is refused, the rest
is put back for the repetition, and afterwards everything is as it was.
A loss that the run differentiates itself adds to gradients; the repetition adds to others, which are dropped.
Cannot see: what containers.py cannot, and edits through ``.data`` on other devices than the CPU, other than by the
recovery check.
Cost: copies of the buffers that a run changes; a comparison of all attributes, three times a step; of a function that
names ``.data``, ``no_grad`` or an operation such as ``mul_``, copies of its parameters while it runs; of one that names
``.data`` or the like, no early stop of its repetition.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revlib._torch import (
    dispatch_modes_active,
    is_fake,
    is_transformed,
    no_dispatch_modes,
    normalises,
    storage_id,
    version_of,
    versions_of,
    view_base,
)
from revlib.core.guard import FirstRun, Guard, StepGuard, StepView
from revlib.guards.containers import Contents, Holder, same_contents
from revlib.guards.modules import (
    ModuleTree,
    found_in,
    identical,
    module_tree,
    requires_grad_of,
    without_graph,
)
from revlib.step import BoundStep, State
from revlib.tensors import has_dense_memory, is_dtensor

__all__ = ["ModuleState", "ModuleStates"]

_ABSENT: Any = object()
_NOTHING: Mapping[str, Any] = {}


class ModuleStates(Guard):
    """The modules of each function of a stack."""

    def step(self, view: StepView, state: State) -> StepGuard:
        return ModuleState(view.step, view.context, view.streams_kept)


class ModuleState(StepGuard):
    """What the modules of one function held when it ran."""

    def __init__(
        self,
        step: BoundStep,
        context: Mapping[str, Any] = _NOTHING,
        may_stop: bool = False,
    ) -> None:
        self.name, self.memory = step.name, step.memory
        # A repetition that stops early leaves undone what the function would do then.
        self.may_stop = may_stop
        self.tree = tree = module_tree(step)
        self.parameters = [p for p in tree.parameters if p is not None]
        self.versions = versions_of(self.parameters)
        self.training = tree.training
        self.gradients = _Gradients(self.parameters, are_leaves=tree.reusable)
        self.requires_grad = tuple(map(requires_grad_of, self.parameters))
        self.hooks = tree.hooks()
        self.extra: list[tuple[Holder, Contents]] = []  # what objects of the context hold
        self.watched = [(h, h.read()) for h in tree.watched] if tree.watched else []
        remote = tree.remote
        if context and not all(isinstance(v, Tensor) for v in context.values()):
            remote = self._look_at_context(context)
        # Tensors that are attributes.
        self.attached: list[tuple[str, weakref.ref[Tensor], int]] = []
        tensors: list[Tensor] = []
        if tree.has_tensors or self.extra:
            attributes = list(self._attributes_that_are_tensors())
            self.attached = [(k, weakref.ref(t), version_of(t)) for k, t in attributes]
            tensors = [t for _, t in attributes]
            tensors += [t for _, held in self._held() for t in tensors_in(held)]
        if tree.has_tensors:
            # One may belong to the graph of an earlier pass: it is kept without its graph.
            tree.forget_graphs()
        self.buffers = _Buffers(tree, remote, tensors)
        self.own_edits = _OwnEdits(step, self.parameters, tree)
        self.spoiled = False  # whether the run edits a parameter that it has computed with
        self.moved = ""  # what the run changed, and what cannot be put back
        self.holds = True  # whether attributes are what they were, at the last look
        self.undo: list[tuple[dict[Any, Any], Any, Any]] = []
        self.exchanged: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.present: list[tuple[Holder, Contents]] = []
        self.kinds: list[tuple[nn.Module, type[nn.Module]]] = []

    def _look_at_context(self, context: Mapping[str, Any]) -> list[nn.Module]:
        holders, modules = found_in(context)
        self.extra = [
            (h, tuple(map(without_graph, h.read()))) for h in holders if h.put is not None
        ]
        self.watched += [(h, h.read()) for h in holders if h.put is None]
        known = {id(m) for m in (*self.tree.modules, *self.tree.remote)}
        return [*self.tree.remote, *(m for m in modules if id(m) not in known)]

    def _attributes_that_are_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for keys, values in zip(self.tree.keys, self.tree.values, strict=True):
            for name, value in zip(keys, values, strict=True):
                for t in tensors_in((value,)):
                    if not is_transformed(t):
                        yield name, t

    def _held(self) -> list[tuple[Holder, Contents]]:
        return [*zip(self.tree.holders, self.tree.held, strict=True), *self.extra]

    # ------------------------------------------------------------------------------------------ forward
    def first_run_done(self, run: FirstRun) -> None:
        """A parameter that the run edits after autograd has saved it is an error under plain autograd too."""
        if versions_of(self.parameters) != self.versions:
            for _, placeholder in run.saved:
                t = placeholder.tensor
                if t is not None and id(view_base(t)) in self.tree.parameter_ids:
                    self.spoiled = self.spoiled or version_of(t) != placeholder.version

    def exit_first_run(self) -> None:
        self.buffers.sort()
        self.memory["put back"] = self.buffers.changed_tensors.keys()
        if not self.tree.assigns:
            self.tree.assigns = not self._is_as_before()
        if self.tree.assigns:
            self.training = [m.training for m in self.tree.modules]
        self.gradients.run_is_over()
        self.versions = self.own_edits.after_run(self.parameters, self.versions)
        if self.watched:
            moved = [h.name for h, held in self.watched if not same_contents(h.read(), held)]
            self.moved, self.watched = moved[0] if moved else "", []
        for name, t, version in self._attached_now():
            if version_of(t) != version and t.nbytes > _LARGEST_ATTRIBUTE:
                self.moved = name

    def needs_end(self) -> bool:
        """Where the run changes a tensor, or may do so unseen, autograd may have saved that tensor before."""
        changes = self.buffers.changed_tensors or self.own_edits.copies
        return bool(changes) or self.tree.edits_unseen or self.tree.gives_back

    def _is_as_before(self) -> bool:
        tree = self.tree
        return tree.holds() and identical(tree.parameters_now(), tree.parameters)

    def _attached_now(self) -> list[tuple[str, Tensor, int]]:
        changed = self.buffers.changed_tensors
        alive = [(k, t, version) for k, ref, version in self.attached if (t := ref()) is not None]
        return [entry for entry in alive if id(entry[1]) not in changed]

    # ------------------------------------------------------------------------------------------ backward
    def check(self) -> None:
        """Raises where naive autograd raises, or would have used stored values that a repetition cannot reproduce."""
        self.holds = self.tree.holds()
        if not self.holds:
            self._check_modes()
        if self.moved:
            raise RuntimeError(
                f"{self.name} changes {self.moved!r} when it runs: an iterator, a generator, or something too large to "
                "copy. That cannot be put back, so the function would not do again in backward what it did. Keep the "
                "state in a number, a list, a dict or a buffer, or use scheduler=Naive()."
            )
        if self.spoiled:
            raise RuntimeError(
                f"a parameter of {self.name} was modified by an inplace operation of the function itself, after "
                "autograd had saved it; edit it before it is used."
            )
        if versions_of(self.parameters) != self.versions:
            names = [k for names in self.tree.parameter_names for k in names]
            named = [k for k, p in zip(names, self.tree.parameters, strict=True) if p is not None]
            put_back = self.own_edits.copies
            pairs = [
                (k, p, version)
                for k, p, version in zip(named, self.parameters, self.versions, strict=True)
                if id(p) not in put_back
            ]
            self._refuse_edits("parameter", "step the optimizer only after backward", pairs)
        self.buffers.take_from_other_runs()
        self._refuse_edits("buffer", "edit buffers only after backward", self.buffers.constant)
        if self.attached:
            self._refuse_edits(
                "attribute", "edit attributes only after backward", self._attached_now()
            )

    def _check_modes(self) -> None:
        for m, training in zip(self.tree.modules, self.training, strict=True):
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
        tree, fresh = self.tree, self.buffers.fresh()
        # A function that edits its own parameters edits copies of them, which are as they were before it ran.
        own = self.own_edits.for_repetition(self.parameters)
        fresh.update(own)
        self.gradients.put_aside()
        reads = bool(self.extra) or (tree.has_tensors and bool(fresh))
        if not self.holds or reads:
            for slots, keys, values in tree.attributes():
                values = _with(values, fresh)
                if tuple(slots) != keys or not identical(tuple(slots.values()), values):
                    self._exchange(slots, dict(zip(keys, values, strict=True)))
        if not self.holds or reads or tree.assigns or (self.may_stop and tree.holds_things):
            held = self._held()
            self.present = [(h, h.read()) for h, _ in held]
            for (h, wanted), (_, now) in zip(held, self.present, strict=True):
                wanted = _with(wanted, fresh)
                if not same_contents(now, wanted):
                    h.write(wanted)
        if not self.holds or reads or tree.assigns:
            for m, kind in zip(tree.modules, tree.kinds, strict=True):
                if type(m) is not kind:  # as parametrizations do
                    self.kinds.append((m, type(m)))
                    m.__class__ = kind
        flags = tuple(map(requires_grad_of, self.parameters))
        same = self.holds and identical(tree.parameters_now(), tree.parameters)
        if flags != self.requires_grad or not same:
            for slots, parameters in self._parameters_of_forward():
                self._exchange(slots, parameters)
        for slots, key, value in self.buffers.for_repetition(fresh):
            self._bind(slots, key, value)
        if own:
            for slots in self.tree.parameter_slots:
                for key, p in list(slots.items()):
                    if id(p) in own:
                        self._bind(slots, key, own[id(p)])
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
        if before or ((tree.assigns or self.may_stop) and not self._is_as_before()):
            for slots, keys, values in tree.attributes():
                before.setdefault(id(slots), (slots, dict(zip(keys, values, strict=True))))
            for slots, held in self._parameters_of_forward():
                before.setdefault(id(slots), (slots, held))
            for slots, present in before.values():
                _put(slots, present)
            self.exchanged.clear()
        for m, kind in self.kinds:
            m.__class__ = kind
        self.kinds = []
        for h, contents in self.present:
            if not same_contents(h.read(), contents):
                h.write(contents)
        self.present = []
        self.gradients.put_back()
        self.own_edits.repetition_is_over()

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
            # FSDP exchanges its parameters itself.
            if not any(map(is_dtensor, (*held.values(), *slots.values()))):
                yield slots, held

    def _bind_hooks(self) -> None:
        present = self.tree.hooks()
        if present != self.hooks:
            kept = {(id(slots), name): hooks for slots, name, hooks in self.hooks}
            for slots, name, _ in [*present, *self.hooks]:
                self._bind(slots, name, _like(slots[name], kept.get((id(slots), name), {})))


def _with(values: Contents, fresh: dict[int, Tensor]) -> Contents:
    """The same values, with copies in place of some tensors, also within tuples."""
    return tuple(_replaced(v, fresh) for v in values) if fresh else values


def _replaced(value: Any, fresh: dict[int, Tensor]) -> Any:
    if isinstance(value, tuple):
        parts = [_replaced(part, fresh) for part in value]
        if identical(parts, value):
            return value
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return fresh.get(id(value), value)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, also within tuples, which cannot be edited but hold what can be."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)


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


_LARGEST_BUFFER = 1 << 20  # bytes, of a buffer that is copied in case that its edits cannot be seen
_LARGEST_PARAMETER = 1 << 28  # bytes, of a parameter that is copied while its function first runs
_LARGEST_ATTRIBUTE = 1 << 24  # bytes, of a tensor among the attributes, while its function runs
_LARGEST_UNSEEN = 1 << 28  # the same, where its function may edit it without a trace


class _Seen:
    """A buffer at some version, for as long as a run is recorded that found it so and left it so.

    A later run that moves the buffer on puts here what it held before.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # alive, so that nothing else gets its identity
        self.copy: Tensor | None = None


_seen: weakref.WeakValueDictionary[tuple[int, int], _Seen] = weakref.WeakValueDictionary()


class _Buffers:
    """Buffers, and other tensors without gradient that a function leads to: their contents before the run, for those
    that the run changed.

    On a CPU contents are compared. On other devices that would wait for them: there, versions tell, and copies are kept
    of floating-point buffers of modules in training mode, up to 1 MiB each, whose edits a version may not show.
    """

    def __init__(self, tree: ModuleTree, remote: list[nn.Module], attributes: list[Tensor]) -> None:
        self.changed: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]] = []
        self._constant_slots: list[tuple[dict[str, Any], str, Tensor]] = []
        self.changed_tensors: dict[int, tuple[Tensor, Tensor]] = {}  # and what they held
        self.constant: list[tuple[str, Tensor, int]] = []
        self._seen: dict[int, _Seen] = {}  # of these
        self._before: list[tuple[Any, str, Tensor | None, int, Tensor | None]] = []
        self._attributes: list[tuple[Tensor, int, Tensor]] = []
        if not (attributes or remote or any(tree.buffer_slots)):
            return
        copies: dict[int, Tensor] = {}  # modules may share a buffer
        for m in (*tree.modules, *remote):
            for k, b in m._buffers.items():
                if b is None:
                    self._before.append((m, k, None, 0, None))
                elif not b.is_inference() and not is_transformed(b):
                    copy = copies.setdefault(id(b), b.detach().clone())
                    self._before.append((m, k, b, version_of(b), copy))
        largest = _LARGEST_UNSEEN if tree.edits_unseen else _LARGEST_ATTRIBUTE
        for t in attributes:
            if id(t) not in copies and _is_plain_data(t, largest):
                copies[id(t)] = copy = t.detach().clone()
                self._attributes.append((t, version_of(t), copy))

    def sort(self) -> None:
        """After the first run: keep copies of the buffers that it changed, and the versions of the others."""
        for m, k, b, version, copy in self._before:
            if b is None or copy is None or m._buffers.get(k) is not b:
                self.changed.append((m._buffers, k, b, copy))
            elif _is_changed(b, version, copy) or normalises(m) or _may_be_changed(m, b):
                self.changed.append((m._buffers, k, b, copy))
                self.changed_tensors[id(b)] = b, copy
                if (seen := _seen.get((id(b), version))) is not None and version_of(b) != version:
                    seen.copy = copy
            else:
                self.constant.append((k, b, version))
                self._constant_slots.append((m._buffers, k, b))
                self._seen[id(b)] = _seen.setdefault((id(b), version), _Seen(b))
        for t, version, copy in self._attributes:
            if _is_changed(t, version, copy):
                self.changed_tensors[id(t)] = t, copy
        self._before, self._attributes = [], []

    def take_from_other_runs(self) -> None:
        """Before a repetition: a buffer that this run left alone may have been moved by a later run of the same
        function, which then holds a copy of what it was before."""
        for entry in [e for e in self.constant if version_of(e[1]) != e[2]]:
            b, copy = entry[1], self._seen[id(entry[1])].copy
            if copy is not None:
                self.constant.remove(entry)
                self.changed_tensors[id(b)] = b, copy
                for place in [p for p in self._constant_slots if p[2] is b]:
                    self._constant_slots.remove(place)
                    self.changed.append((*place, copy))

    def fresh(self) -> dict[int, Tensor]:
        """For each tensor that the run changed, by identity, a copy for one repetition to change."""
        if not self.changed_tensors:
            return {}
        found: dict[int, Tensor] = {}
        bases: dict[int, Tensor] = {}  # those that share memory must share it again
        largest = sorted(self.changed_tensors.values(), key=lambda pair: -pair[0].numel())
        for t, copy in largest:
            base = bases.get(storage_id(t))
            if base is None or base.dtype != t.dtype:
                found[id(t)] = base = copy.clone().requires_grad_(t.requires_grad)
                if t.is_contiguous() and t.nbytes == t.untyped_storage().nbytes():
                    bases[storage_id(t)] = base
            else:
                found[id(t)] = base.as_strided(t.shape, t.stride(), t.storage_offset())
        return found

    def for_repetition(
        self, fresh: dict[int, Tensor]
    ) -> list[tuple[dict[str, Any], str, Tensor | None]]:
        """Where which buffer belongs."""
        found: list[tuple[dict[str, Any], str, Tensor | None]] = [
            (slots, k, b) for slots, k, b in self._constant_slots
        ]
        spare: dict[int, Tensor] = {}
        for slots, k, b, copy in self.changed:
            if b is not None and id(b) in fresh:
                found.append((slots, k, fresh[id(b)]))
            else:
                found.append(
                    (slots, k, copy if copy is None else spare.setdefault(id(copy), copy.clone()))
                )
        return found


def _is_plain_data(t: Tensor, largest: int) -> bool:
    """Whether a tensor can be copied and compared: not a parameter, nor a part of a graph."""
    return (
        type(t) is Tensor
        and t.is_leaf
        and not is_transformed(t)
        and not t.is_inference()
        and has_dense_memory(t)
        and t.nbytes <= largest
    )


def _is_changed(t: Tensor, version: int, before: Tensor) -> bool:
    if version_of(t) != version or t.shape != before.shape or t.dtype != before.dtype:
        return True
    if not _is_comparable(t) or is_fake(before):
        return False
    # The comparison is not the user's, and no mode of his needs to see it.
    with no_dispatch_modes() if dispatch_modes_active() else nullcontext():
        # NaN is not equal to itself.
        same = torch.equal(t, before) or bool(((t == before) | (t.isnan() & before.isnan())).all())
        return not same


def _is_comparable(t: Tensor) -> bool:
    """Whether two such tensors can be compared at once. Sparse and quantised ones cannot, nor those without values."""
    return (
        type(t) in (Tensor, nn.Parameter, nn.Buffer)
        and t.is_cpu
        and has_dense_memory(t)
        and not is_fake(t)
        and not t.is_quantized
    )


def _may_be_changed(m: nn.Module, b: Tensor) -> bool:
    return m.training and not b.is_cpu and b.is_floating_point() and b.nbytes <= _LARGEST_BUFFER


_gradient_of: Callable[[Tensor], Tensor | None] = attrgetter("grad")


class _Gradients:
    """The gradients of parameters, where a function differentiates a loss of its own and adds to them.

    The repetition adds to other ones, which are dropped.
    """

    def __init__(self, parameters: list[Tensor], *, are_leaves: bool) -> None:
        self.leaves = parameters if are_leaves else [p for p in parameters if p.is_leaf]
        self.before, self.versions = self._now()
        self.moves = False  # whether the run adds to gradients
        self.aside: tuple[Tensor | None, ...] | None = None

    def _now(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        gradients = tuple(map(_gradient_of, self.leaves))
        found = [g for g in gradients if g is not None]
        return gradients, versions_of(found) if found else ()

    def run_is_over(self) -> None:
        now, versions = self._now()
        self.moves = versions != self.versions or not identical(now, self.before)
        self.before = ()  # they belong to the user, who may free them

    def put_aside(self) -> None:
        if self.moves:
            self.aside = tuple(map(_gradient_of, self.leaves))
            for p in self.leaves:
                p.grad = None

    def put_back(self) -> None:
        if self.aside is not None:
            for p, gradient in zip(self.leaves, self.aside, strict=True):
                p.grad = gradient
            self.aside = None


class _OwnEdits:
    """The parameters that a function edits itself, as layers do that keep their weights in range.

    Whether it does is found out when it first runs in each mode, by versions and on a CPU by contents; copies are taken
    then, and whenever a function runs that is known to edit, or whose code names what editing takes. Another function
    that edits only later, such as one of a library, repeats from its edited parameters once.
    """

    def __init__(self, step: BoundStep, parameters: list[Tensor], tree: ModuleTree) -> None:
        self.memory, self.key = step.memory, (_OwnEdits, *tree.training)
        self.copies: dict[int, Tensor] = {}  # by identity, of what was edited: before the run
        self._before: list[Tensor | None] = []
        self._fresh: dict[int, Tensor] = {}
        always = tree.edits_unseen or tree.edits_in_place
        if always or self.memory.get(self.key) is not False:
            self._before = [p.detach().clone() if _can_be_copied(p) else None for p in parameters]

    def after_run(self, parameters: list[Tensor], versions: tuple[int, ...]) -> tuple[int, ...]:
        """-> the versions after the run."""
        now = versions_of(parameters)
        if self._before:
            for p, then, before in zip(parameters, versions, self._before, strict=True):
                if before is not None and _is_changed(p, then, before):
                    self.copies[id(p)] = before
            self._before = []
        if now != versions and not self.copies:
            self.copies = {
                id(p): p.detach().clone()
                for p, then, after in zip(parameters, versions, now, strict=True)
                if then != after and _can_be_copied(p)
            }
        if self.memory.get(self.key) is not True:
            self.memory[self.key] = bool(self.copies)
        return now

    def for_repetition(self, parameters: list[Tensor]) -> dict[int, Tensor]:
        """Copies for the next repetition to edit, by the identity of what they stand for."""
        if self.copies and not self._fresh:
            self._fresh = {
                id(p): nn.Parameter(self.copies[id(p)].clone(), p.requires_grad)
                for p in parameters
                if id(p) in self.copies
            }
        return self._fresh

    def repetition_is_over(self) -> None:
        self._fresh = {}


def _can_be_copied(p: Tensor) -> bool:
    return (
        type(p) is nn.Parameter
        and not p.is_inference()
        and not is_lazy(p)
        and has_dense_memory(p)
        and p.nbytes <= _LARGEST_PARAMETER
    )
