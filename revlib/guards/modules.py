"""Which modules a function reads, and what they hold apart from the contents of tensors."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revlib._torch import is_transformed
from revlib.step import BoundStep

__all__ = [
    "Hooks",
    "ModuleTree",
    "current_tree",
    "identical",
    "module_tree",
    "modules_of",
    "parameters_of",
    "requires_grad_of",
]


def modules_of(fn: Any) -> list[nn.Module]:
    """The modules whose state a function reads.

    Its own, that of a bound method, those that a closure captures or that its code names in its file, also behind
    other functions; and what such a module holds as a child, in a plain list or dict, or behind a function.
    """
    found = _Found()
    found.visit(fn)
    return list(found.modules.values())


_CONTAINERS = (list, tuple, dict)
_FUNCTIONS = (partial, types.MethodType, types.FunctionType)
_OWN_DICTS = frozenset(
    ("_parameters", "_buffers", "_modules")
)  # of every module, and looked at separately
_MANY = 32  # a longer list or dict is data, and no list of modules


class _Found:
    """The modules that were found, and the containers on the way to them."""

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.containers: dict[int, Any] = {}
        self.functions: dict[int, Any] = {}

    def visit(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, nn.Module):
            if id(value) not in self.modules:
                self.modules[id(value)] = value
                for child in value._modules.values():
                    if child is not None:
                        self.visit(child)
                for name, held in value.__dict__.items():
                    if (
                        type(held) in _CONTAINERS or type(held) in _FUNCTIONS
                    ) and name not in _OWN_DICTS:
                        self.visit(held)
        elif kind in _CONTAINERS:
            if id(value) not in self.containers and 0 < len(value) <= _MANY:
                self.containers[id(value)] = value
                for part in value.values() if kind is dict else value:
                    self.visit(part)
        elif kind in _FUNCTIONS and id(value) not in self.functions:
            self.functions[id(value)] = value
            for part in _parts(value):
                self.visit(part)


def _parts(function: Any) -> Iterator[Any]:
    """What a function may hold modules in."""
    if isinstance(function, partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, types.MethodType):
        yield from (function.__self__, function.__func__)
    else:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that is not assigned yet
                yield cell.cell_contents
        for name in function.__code__.co_names:
            part = function.__globals__.get(name)
            if (
                isinstance(part, nn.Module)
                or getattr(part, "__module__", None) == function.__module__
            ):
                yield part


_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called"),
)
Hooks = list[
    tuple[dict[str, Any], str, dict[Any, Any]]
]  # where a dict of hooks belongs, and a copy of its contents


_STANDARD = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}


class ModuleTree:
    """The modules that a function reads, with their attributes and children, as they were when this was made.

    All values are kept in one flat tuple, so that :meth:`holds` can compare hundreds of them in microseconds. A tree
    that still holds is used again by the next forward.
    """

    def __init__(self, step: BoundStep) -> None:
        found = _Found()
        found.visit(step.owner)
        self.modules = list(found.modules.values())
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.modules):
            raise TypeError(
                f"{step.name} contains a module compiled by torch.jit, whose parameters and buffers cannot be watched "
                "or put back; use the module it was made from, or torch.compile, or scheduler=Naive()."
            )
        wrapper = [step.fn] if step.fn is not step.owner and isinstance(step.fn, nn.Module) else []
        self.slots = [m.__dict__ for m in (*self.modules, *wrapper)]
        self.training = [m.training for m in self.modules]
        self.parameter_slots = [m._parameters for m in self.modules]
        self.parameter_names = [tuple(slots) for slots in self.parameter_slots]
        self.buffer_slots = [m._buffers for m in self.modules]
        self._parameters = self.parameter_slots
        self.parameters = self.parameters_now()
        self.parameter_ids = frozenset(id(p) for p in self.parameters if p is not None)
        self.hook_slots = [
            (vars(nn.modules.module), _GLOBAL_HOOKS),
            *((slots, _HOOKS) for slots in self.slots),
        ]
        self._hooks = [slots[name] for slots, names in self.hook_slots for name in names[:2]]

        # Whatever is put back for a repetition: attributes, and the children of each module.
        self.restored = [*self.slots, *(slots["_modules"] for slots in self.slots)]
        self.keys = [tuple(slots) for slots in self.restored]
        self.values = [tuple(slots.values()) for slots in self.restored]
        # What is looked at to see whether they are as they were: all but the dozen dicts of hooks
        # that every module has, which are compared elsewhere or do not matter.
        self._own = [
            (itemgetter(*(k for k in slots if k not in _STANDARD)), slots) for slots in self.slots
        ]
        containers = list(found.containers.values())
        children = [slots["_modules"] for slots in self.slots]
        self._dicts = [d for d in (*children, *(c for c in containers if type(c) is dict)) if d]
        self._lists = [c for c in containers if type(c) is not dict]
        self._parameters = [slots for slots in self.parameter_slots if slots]
        self._empty = [d for d in (*children, *self.parameter_slots) if not d]
        self._sizes = [len(slots) for slots in self.slots]
        self._seen = self._look()
        entries = chain(*self.values, *map(_entries, containers))
        self.has_tensors = any(isinstance(v, Tensor) for v in entries)
        self.has_run = False  # whether somebody has looked at what a run leaves behind
        self.assigns = self.has_tensors  # whether a run assigns attributes, children or parameters
        stable = all(_is_stable(f) for f in found.functions.values())
        parameters = [p for p in self.parameters if p is not None]
        self.is_lazy = any(map(is_lazy, parameters))
        odd = self.is_lazy or any(not p.is_leaf or is_transformed(p) for p in parameters)
        self.reusable = (
            isinstance(step.owner, nn.Module) and stable and not self.has_tensors and not odd
        )

    def parameters_now(self) -> tuple[Tensor | None, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._parameters)))

    def _look(self) -> tuple[Any, ...]:
        children = chain.from_iterable(chain(map(dict.values, self._dicts), self._lists))
        return (*[get(slots) for get, slots in self._own], *children)

    def holds(self) -> bool:
        """Whether attributes and children are what they were."""
        if any(self._empty) or [len(slots) for slots in self.slots] != self._sizes:
            return False
        try:
            now = self._look()
            if not self.has_tensors:
                return now == self._seen
        except Exception:  # an attribute is gone, or it cannot be compared, so it is another one
            return False
        own = len(self._own)  # tensors would be compared by value
        pairs = zip(now[:own], self._seen[:own], strict=True)
        return identical(now[own:], self._seen[own:]) and all(identical(a, b) for a, b in pairs)

    def forget_graphs(self) -> None:
        """Hold no tensor that belongs to a graph, such as one that an earlier pass left behind."""
        own = len(self._own)
        self.values = [tuple(map(_without_graph, values)) for values in self.values]
        mine = [tuple(map(_without_graph, values)) for values in self._seen[:own]]
        self._seen = (*mine, *map(_without_graph, self._seen[own:]))

    def hooks(self) -> Hooks:
        """The forward hooks of the modules, and torch's for all modules; nothing where there are none."""
        if not any(self._hooks):
            return []
        full = [
            (slots, names) for slots, names in self.hook_slots if slots[names[0]] or slots[names[1]]
        ]
        return [(slots, name, slots[name].copy()) for slots, names in full for name in names]

    def attributes(self) -> Iterator[tuple[dict[str, Any], tuple[str, ...], tuple[Any, ...]]]:
        """The dicts that are put back, each with its keys and values."""
        return zip(self.restored, self.keys, self.values, strict=True)


def _without_graph(value: Any) -> Any:
    whole = not isinstance(value, Tensor) or value.is_leaf
    return value if whole else value.detach().requires_grad_()


def _entries(container: Any) -> Any:
    return container.values() if type(container) is dict else container


def identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def _is_stable(function: Any) -> bool:
    """Whether a function will lead to the same modules for as long as it exists."""
    if isinstance(function, types.FunctionType):
        return (
            function.__module__.partition(".")[0] in ("torch", "timm") and not function.__closure__
        )
    return True


def module_tree(step: BoundStep) -> ModuleTree:
    """The tree of a step's function as it is now."""
    known = step.memory.get(ModuleTree)
    if (
        known is None
        or not known.holds()
        or not identical(known.parameters, known.parameters_now())
    ):
        known = ModuleTree(step)
        step.memory.pop(ModuleTree, None)
        if known.reusable:
            step.memory[ModuleTree] = known
    step.memory["tree"] = weakref.ref(known)
    return known


def current_tree(step: BoundStep) -> ModuleTree:
    """The tree that another guard of the same step has just made, if there is one."""
    latest = step.memory.get("tree", lambda: None)()
    return module_tree(step) if latest is None else latest


def parameters_of(step: BoundStep) -> tuple[Tensor | None, ...]:
    """The parameters that a step's function reads."""
    known = step.memory.get(ModuleTree)
    return module_tree(step).parameters if known is None else known.parameters_now()


requires_grad_of: Callable[[Tensor], bool] = attrgetter("requires_grad")
