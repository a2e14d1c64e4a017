"""Which modules a function reads, and what they hold apart from the contents of tensors."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revlib._torch import is_transformed, tree_leaves
from revlib.guards.containers import (
    CONTAINERS,
    Holder,
    attributes_of_class,
    attributes_of_module,
    cell_holder,
    container_holder,
    defaults_holders,
    global_holder,
    is_array,
    is_installed,
    is_of_a_user,
    is_of_a_user_module,
    iterator_holder,
    names_of,
    same_contents,
    slots_holder,
    stored_by,
    variable_holder,
)
from revlib.guards.randomness import generator_behind, generator_holder
from revlib.step import BoundStep

__all__ = [
    "Hooks",
    "ModuleTree",
    "current_tree",
    "found_in",
    "identical",
    "module_tree",
    "modules_of",
    "parameters_of",
    "requires_grad_of",
    "without_graph",
]


def modules_of(fn: Any) -> list[nn.Module]:
    """The modules that a function consists of.

    Its own, that of a bound method, those that a closure captures or that its code names in its file, also behind
    other functions; and what such a module holds as a child, in a container, or behind a function.
    """
    found = _Found()
    found.visit(fn)
    return list(found.modules.values())


def found_in(context: Mapping[str, Any]) -> tuple[list[Holder], list[nn.Module]]:
    """What the objects of a context can hold a state in, and the modules with buffers that they lead to."""
    found = _Found()
    for key, value in context.items():
        for leaf in tree_leaves(value):
            found.visit(leaf, key, remote=True)
    return list(found.holders.values()), [m for m in found.remote.values() if m._buffers]


# Every module has these, and they are looked at separately.
_OWN_DICTS = frozenset(("_parameters", "_buffers", "_modules"))
_FUNCTIONS = (partial, types.MethodType, types.FunctionType)
_PLAIN = frozenset(
    (
        *(int, float, complex, str, bytes, bool, type(None), type, type(...), Tensor, nn.Parameter),
        *(torch.dtype, torch.device, torch.Size),
    )
)
_WEAK = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)
_STANDARD = frozenset(vars(nn.Module())) - {"training"}
# Dicts that hold what a module is, and its hooks: another dict in their place would be overlooked. And what torch sets
# when a backward hook is registered, which must outlive a repetition.
_LOOKED_AT = _OWN_DICTS | {"_forward_pre_hooks", "_forward_hooks", "_is_full_backward_hook"}
_UNSEEN = ("data", "numpy", "from_numpy", "from_dlpack", "set_", "untyped_storage", "storage")
# How the names begin of what a function may do and undo without `with` or `finally`, and that no guard puts back.
_TAKING = (
    *("acquire", "disable", "enable", "enter", "push", "register_", "remove", "requires_grad_"),
    *("set_", "start", "use_"),
)
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_UNRECORDED = ("no_grad", "inference_mode", "set_grad_enabled")
_NEVER_RUNS = ("__init__", "__repr__", "extra_repr", "reset_parameters")  # within a forward
_MOST, _DEEPEST = 1 << 13, 64  # things that are looked at; whatever leads to more is data


class _Found:
    """The modules that were found, and whatever else on the way to them can hold a state.

    A module that is a part of the function belongs to it with all that it holds. One that the function merely leads to,
    through an object, a weak reference, its class or its context, may be the whole network with everything in it: of
    such a module only the buffers are looked at, and the attributes where its class is a user's.
    """

    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.remote: dict[int, nn.Module] = {}
        self.containers: dict[int, Any] = {}
        self.functions: dict[int, Any] = {}
        self.holders: dict[Hashable, Holder] = {}
        self.seen: dict[int, Any] = {}
        self.depth = 0
        self.weak = False  # whether a weak reference was followed
        self.names: set[str] = set()  # that the user's functions look up
        self.edits = False  # whether they may edit what they compute with

    def visit(self, value: Any, name: str = "", *, remote: bool = False) -> None:
        kind = type(value)
        if kind is types.ModuleType:  # it may be that of a generator
            value = generator_behind(value, ("random",))
            kind = type(value)
        if kind in _PLAIN:
            return
        if isinstance(value, nn.Module):
            self._visit_module(value, remote=remote)
        elif kind in _FUNCTIONS:
            self._visit_function(value, name, remote=remote)
        elif id(value) not in self.seen and len(self.seen) < _MOST and self.depth < _DEEPEST:
            self.seen[id(value)] = value
            self.depth += 1
            self._visit_thing(value, name, remote=remote)
            self.depth -= 1

    def _visit_module(self, module: nn.Module, *, remote: bool) -> None:
        if id(module) in self.modules or (remote and id(module) in self.remote):
            return
        (self.remote if remote else self.modules)[id(module)] = module
        for child in module._modules.values():
            if child is not None:
                self.visit(child, remote=remote)
        if remote and not is_of_a_user(type(module)):  # type: ignore[arg-type]
            return
        for name, held in list(module.__dict__.items()):
            if type(held) not in _PLAIN and name not in _STANDARD:
                self.visit(held, name, remote=remote or isinstance(held, nn.Module))
        if remote:
            self.holders[id(module)] = attributes_of_module(module, _STANDARD)
            self._visit_class(type(module))
            return
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            self.visit(hook, "a forward hook", remote=True)
        for p in module._parameters.values():
            if type(p) is nn.Parameter:
                self._hold_dict(vars(p))
        self._visit_class(type(module))

    def _visit_function(self, function: Any, name: str, *, remote: bool) -> None:
        known = self.seen if remote else self.functions
        if id(function) in known:
            return
        known[id(function)] = function
        if isinstance(function, partial):
            for part in (function.func, *function.args, *function.keywords.values()):
                self.visit(part, name, remote=remote)
        elif isinstance(function, types.MethodType):
            self.visit(function.__self__, name, remote=remote)
            self.visit(function.__func__, name, remote=remote)
        else:
            users = is_of_a_user_module(function.__module__)
            for key, cell in zip(
                function.__code__.co_freevars, function.__closure__ or (), strict=True
            ):
                if key != "__class__" and id(cell) not in self.seen:
                    self.seen[id(cell)] = cell
                    holder = cell_holder(cell, key)
                    if users:
                        self.holders[id(cell)] = holder
                    for part in holder.read():
                        self.visit(part, key, remote=remote)
            if users:
                self._visit_code(function, remote=remote)
                code = function.__code__
                sets = code.co_name not in _NEVER_RUNS and stored_by(code, "STORE_ATTR")
                if function.__dict__ or sets:  # it may set an attribute of its own
                    self._hold_dict(function.__dict__, function.__name__)
                    for key, part in list(function.__dict__.items()):
                        self.visit(part, key, remote=True)

    def _visit_code(self, function: types.FunctionType, *, remote: bool) -> None:
        code, variables = function.__code__, function.__globals__
        for holder in defaults_holders(function):
            values = holder.read()
            if any(map(_holds_a_tensor, values)):
                self.holders[id(holder.thing), holder.name] = holder
            for default in values:
                self.visit(default, holder.name, remote=remote)
        names = names_of(code)
        if code.co_name not in _NEVER_RUNS:
            self.names.update(names)
            # What initialises may run in a first call, after which one looks anyway.
            self.edits |= "init" not in code.co_name and any(map(_edits, names))
        for name in stored_by(code, "IMPORT_NAME"):
            self._visit_variable(sys.modules.get(name), name, code, names, remote=True)
        for name in names:
            part = variables.get(name)
            if isinstance(part, types.FunctionType) and part.__module__ == function.__module__:
                self.visit(part, name, remote=remote)
            else:
                self._visit_variable(part, name, code, names, remote=remote)
        read = _present(stored_by(code, "LOAD_GLOBAL"), variables)
        held = (*stored_by(code, "STORE_GLOBAL"), *read)
        if held:
            self.holders.setdefault(id(code), global_holder(variables, tuple(dict.fromkeys(held))))

    def _visit_variable(
        self, part: Any, name: str, code: types.CodeType, names: Sequence[str], *, remote: bool
    ) -> None:
        """What a global variable of a function leads to, or one of another file that the function names."""
        generator = generator_behind(part, names)
        if generator_holder(generator, name) is not None:
            self.visit(generator, name, remote=True)
        elif isinstance(part, types.ModuleType):
            self._visit_file(part, code, names)
        elif self._is_state(part):
            inside = isinstance(part, (nn.Module, _FUNCTIONS))
            self.visit(part, name, remote=remote or not inside)

    def _visit_file(
        self, file: types.ModuleType, code: types.CodeType, names: Sequence[str]
    ) -> None:
        """Of a user's file that a function imports: what the function names there."""
        place = id(file) ^ id(code)
        if not is_of_a_user_module(file.__name__) or place in self.seen:
            return
        self.seen[place] = file
        for name in names:
            self._visit_variable(vars(file).get(name), name, code, names, remote=True)
        held = [k for k in stored_by(code, "STORE_ATTR") if k in vars(file)]
        held += _present(names, vars(file))
        if held:
            self.holders[place] = global_holder(vars(file), tuple(dict.fromkeys(held)))

    @staticmethod
    def _is_state(part: Any) -> bool:
        """Whether a global variable may hold a state, or lead to it."""
        if isinstance(part, types.FunctionType):
            file = part.__module__
            return is_of_a_user_module(file) and not is_installed(file)
        kind = type(part)
        known = (nn.Module, ContextVar, partial, tuple)
        held = isinstance(part, known) or kind in CONTAINERS or is_array(part)
        return held or is_of_a_user(kind)  # type: ignore

    def _visit_thing(self, value: Any, name: str, *, remote: bool) -> None:
        holder = container_holder(value, name)
        if holder is not None:
            self.holders[id(value)] = holder
            if holder.put is not None and type(value) in CONTAINERS:
                for part in holder.read():
                    self.visit(part, name, remote=remote)
            elif type(value) is list:
                for part in value:
                    if isinstance(part, nn.Module):
                        self.visit(part, name, remote=remote)
        elif isinstance(value, tuple):
            self.containers[id(value)] = value
            for part in value:
                self.visit(part, name, remote=remote)
        elif isinstance(value, weakref.ref):
            self.weak = True
            self.visit(value(), name, remote=True)
        elif isinstance(value, _WEAK):
            self.weak = True
            for part in list(value.values() if isinstance(value, MutableMapping) else value):
                self.visit(part, name, remote=True)
        elif isinstance(value, types.MappingProxyType):
            for part in list(value.values()):
                self.visit(part, name, remote=remote)
        elif isinstance(value, ContextVar):
            self.holders[id(value)] = variable_holder(value, name)
            self.visit(value.get(None), name, remote=True)
        elif isinstance(value, torch.optim.Optimizer):
            for part in (value.param_groups, value.state):
                self.visit(part, name, remote=True)
        elif isinstance(value, types.BuiltinFunctionType):
            if generator_holder(value.__self__, name) is not None:  # such as a method ``random``
                self.visit(value.__self__, name, remote=True)
        elif isinstance(value, (Tensor, type, Enum)):
            return
        elif (holder := generator_holder(value, name) or iterator_holder(value, name)) is not None:
            self.holders[id(value)] = holder
        elif is_of_a_user(type(value)):  # type: ignore
            self._visit_object(value, name)

    def _visit_object(self, value: Any, name: str) -> None:
        attributes, slots = getattr(value, "__dict__", None), slots_holder(value, name)
        if type(attributes) is dict:
            self._hold_dict(attributes, name)
            for key, part in list(attributes.items()):
                self.visit(part, name or key, remote=True)
        if slots is not None:
            self.holders[id(value)] = slots
            for part in slots.read():
                self.visit(part, name, remote=True)
        if isinstance(value, tuple(CONTAINERS)):  # a subclass of the user's
            kind = next(k for k in CONTAINERS if isinstance(value, k))
            self.holders[-id(value)] = Holder(value, name, *CONTAINERS[kind])
            for part in CONTAINERS[kind][0](value):
                self.visit(part, name, remote=True)
        self._visit_class(type(value))

    def _visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base is object or id(base) in self.seen or not is_of_a_user(base):
                continue
            self.seen[id(base)] = base
            functions = [getattr(v, "__func__", v) for v in vars(base).values()]
            codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
            sets = [stored_by(c, "STORE_ATTR") for c in codes if c.co_name not in _NEVER_RUNS]
            holder = attributes_of_class(base, list(chain.from_iterable(sets)))
            if holder is not None:
                self.holders[id(base)] = holder
                for part in holder.read():
                    self.visit(part, holder.name, remote=True)
            for part in vars(base).values():
                function = getattr(part, "fget", None) or getattr(part, "__func__", part)
                if isinstance(function, types.FunctionType):
                    self._visit_function(function, function.__name__, remote=True)

    def _hold_dict(self, attributes: dict[str, Any], name: str = "") -> None:
        self.holders[id(attributes)] = Holder(
            attributes, name or "an attribute of a parameter", *CONTAINERS[dict]
        )


def _holds_a_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple) and any(map(_holds_a_tensor, value))
    )


def _present(names: Sequence[str], variables: Mapping[str, Any]) -> list[str]:
    """Which names stand for variables that somebody may replace: not for files."""
    found = ((name, variables[name]) for name in names if name in variables)
    return [name for name, value in found if not isinstance(value, types.ModuleType)]


_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called"),
)
# Where a dict of hooks belongs, and a copy of its contents.
Hooks = list[tuple[dict[str, Any], str, dict[Any, Any]]]


class ModuleTree:
    """The modules that a function reads, with their attributes and children, as they were when this was made.

    All values are kept in one flat tuple, so that :meth:`holds` can compare hundreds of them in microseconds. A tree
    that still holds is used again by the next forward.
    """

    def __init__(self, step: BoundStep) -> None:
        found = _Found()
        found.visit(step.owner)
        for name in _GLOBAL_HOOKS[:2]:
            for hook in vars(nn.modules.module)[name].values():
                found.visit(hook, "a forward hook of all modules", remote=True)
        self.modules = list(found.modules.values())
        self.remote = [m for k, m in found.remote.items() if k not in found.modules and m._buffers]
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.modules):
            raise TypeError(
                f"{step.name} contains a module compiled by torch.jit, whose parameters and buffers cannot be watched "
                "or put back; use the module it was made from, or torch.compile, or scheduler=Naive()."
            )
        wrapper = [step.fn] if step.fn is not step.owner and isinstance(step.fn, nn.Module) else []
        self.slots = [m.__dict__ for m in (*self.modules, *wrapper)]
        self.training = [m.training for m in self.modules]
        self.kinds = [type(m) for m in self.modules]
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
        self.is_hooked = any(self._hooks)  # hooks may hold a state as well

        # Whatever is put back for a repetition: attributes, and the children of each module.
        self.restored = [*self.slots, *(slots["_modules"] for slots in self.slots)]
        self.keys = [tuple(slots) for slots in self.restored]
        self.values = [tuple(slots.values()) for slots in self.restored]
        # What is looked at to see whether they are as they were: all but the dozen dicts of hooks
        # that every module has, which are compared elsewhere or do not matter.
        self._own = [
            (itemgetter(*(k for k in slots if k not in _STANDARD or k in _LOOKED_AT)), slots)
            for slots in self.slots
        ]
        children = [slots["_modules"] for slots in self.slots]
        self._dicts = [d for d in children if d]
        self._parameters = [slots for slots in self.parameter_slots if slots]
        holders = list(found.holders.values())
        self.holders = [h for h in holders if h.put is not None]
        self.watched = [h for h in holders if h.put is None]
        empty = [h.thing for h in self.holders if type(h.thing) is dict and not h.thing]
        self._empty = [*(d for d in (*children, *self.parameter_slots) if not d), *empty]
        without = {id(d) for d in empty}
        self._full = [h for h in self.holders if id(h.thing) not in without]
        self.holds_things = bool(self._full)  # whether there are holders that are not empty
        self._sizes = [len(slots) for slots in self.slots]
        self._seen = self._look()
        self.held = [h.read() for h in self.holders]
        entries = chain(*self.values, *self.held, *found.containers.values())
        self.has_tensors = any(map(_holds_a_tensor, entries))
        # Whether edits of tensors may be meant to be unseen by version counters.
        self.edits_unseen = not found.names.isdisjoint(_UNSEEN)
        # Whether a function makes tensors that hold what was in memory before.
        self.leaves_unwritten = not found.names.isdisjoint(_UNWRITTEN)
        # Whether a function may edit what it computes with, where no gradient is recorded or by a name such as mul_.
        self.edits_in_place = found.edits
        # Whether a function takes something that it has to give back, such as a lock, a hook or a setting of torch's.
        self.gives_back = any(name.startswith(_TAKING) for name in found.names)
        self.registers = any(name.startswith("register_") for name in found.names)
        self.assigns = self.has_tensors  # whether a run assigns attributes, children or parameters
        stable = all(_is_stable(f) for f in found.functions.values())
        parameters = [p for p in self.parameters if p is not None]
        self.is_lazy = any(map(is_lazy, parameters))
        odd = self.is_lazy or any(not p.is_leaf or is_transformed(p) for p in parameters)
        # A tree that is used again must not keep alive what is only weakly referred to.
        odd = odd or self.has_tensors or found.weak or self.is_hooked
        self.reusable = isinstance(step.owner, nn.Module) and stable and not odd

    def parameters_now(self) -> tuple[Tensor | None, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._parameters)))

    def _look(self) -> tuple[Any, ...]:
        own = [get(slots) for get, slots in self._own]
        children = chain.from_iterable(map(dict.values, self._dicts))
        if self._full:
            return (*own, *[h.look(h.thing) for h in self._full], *children)
        return (*own, *children)

    def holds(self) -> bool:
        """Whether attributes and children are what they were."""
        if any(self._hooks) != self.is_hooked:
            return False
        if any(self._empty) or [len(slots) for slots in self.slots] != self._sizes:
            return False
        try:
            now = self._look()
            if not self.has_tensors:
                return now == self._seen
        except Exception:  # an attribute is gone, or it cannot be compared, so it is another one
            return False
        own = len(self._own) + len(self._full)  # tensors would be compared by value
        pairs = zip(now[:own], self._seen[:own], strict=True)
        return identical(now[own:], self._seen[own:]) and all(same_contents(a, b) for a, b in pairs)

    def forget_graphs(self) -> None:
        """Hold no tensor that belongs to a graph, such as one that an earlier pass left behind."""
        own = len(self._own) + len(self._full)
        self.values = [tuple(map(without_graph, values)) for values in self.values]
        self.held = [tuple(map(without_graph, values)) for values in self.held]
        mine = [tuple(map(without_graph, values)) for values in self._seen[:own]]
        self._seen = (*mine, *map(without_graph, self._seen[own:]))

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


def without_graph(value: Any) -> Any:
    whole = not isinstance(value, Tensor) or value.is_leaf
    return value if whole else value.detach().requires_grad_()


def identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def _edits(name: str) -> bool:
    """Whether a function that looks up this name may edit a parameter in place."""
    return name in _UNRECORDED or (
        name.endswith("_") and not name.endswith(("__", "requires_grad_"))
    )


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
