"""Mutable things that are no modules and no tensors, but that a function may keep a state in.

Catches: lists, dicts, sets, deques and their kin, byte arrays and NumPy arrays, the attributes of plain objects,
namespaces, parameters, functions and classes, default arguments, variables of closures and contexts, and those that a
function reads or assigns globally or in another file. What they hold is copied one level deep, and can be put back.
Iterators, generators, and whatever is too large to copy can only be watched.
Cannot see: objects of the standard library and of other packages that keep a state of their own, such as loggers.
"""

from __future__ import annotations

import argparse
import array
import dis
import itertools
import sys
import threading
import types
import zlib
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = [
    "ABSENT",
    "CONTAINERS",
    "Contents",
    "Holder",
    "attributes_of_class",
    "attributes_of_module",
    "cell_holder",
    "container_holder",
    "defaults_holders",
    "global_holder",
    "is_array",
    "is_installed",
    "is_of_a_user",
    "is_of_a_user_module",
    "iterator_holder",
    "names_of",
    "same_contents",
    "slots_holder",
    "stored_by",
    "variable_holder",
]

ABSENT: Any = object()
LARGEST = 1 << 12  # entries of a container that is copied
LARGEST_LOOK = 1 << 18  # and of one that is looked at as a whole
LARGEST_ARRAY = 1 << 20  # bytes of an array that is copied
LARGEST_SUM = 1 << 28  # and of one whose check sum is taken

Contents = tuple[Any, ...]


class Holder(NamedTuple):
    """Something mutable, with how to read and write what it holds."""

    thing: Any
    name: str  # of the attribute or variable that leads to it
    look: Callable[[Any], Contents]
    put: Callable[[Any, Contents], None] | None  # None: it can only be watched

    def read(self) -> Contents:
        return self.look(self.thing)

    def write(self, contents: Contents) -> None:
        assert self.put is not None
        self.put(self.thing, contents)


# ------------------------------------------------------------------------------------------ containers
def _write_list(held: list[Any], contents: Contents) -> None:
    held[:] = contents


def _write_by_extending(held: deque[Any], contents: Contents) -> None:
    held.clear()
    held.extend(contents)


def _write_set(held: set[Any], contents: Contents) -> None:
    held.clear()
    held.update(contents)


def _read_dict(held: dict[Any, Any]) -> Contents:
    return (*held, *held.values())


def _write_dict(held: dict[Any, Any], contents: Contents) -> None:
    half = len(contents) // 2
    held.clear()
    for key, value in zip(contents[:half], contents[half:], strict=True):
        held[key] = value


def _read_bytes(held: Any) -> Contents:
    return (bytes(held),)


def _write_bytes(held: bytearray, contents: Contents) -> None:
    held[:] = contents[0]


def _write_array(held: array.array[Any], contents: Contents) -> None:
    del held[:]
    held.frombytes(contents[0])


_DICT = (_read_dict, _write_dict)
CONTAINERS: dict[type, tuple[Callable[[Any], Contents], Callable[[Any, Contents], None]]] = {
    list: (tuple, _write_list),
    deque: (tuple, _write_by_extending),
    set: (tuple, _write_set),
    dict: _DICT,
    OrderedDict: _DICT,
    defaultdict: _DICT,
    Counter: _DICT,
    bytearray: (_read_bytes, _write_bytes),
    array.array: (_read_bytes, _write_array),
}


def _look_at_large(held: Any) -> Contents:
    """What shows that a container too large to keep a copy of has changed; of the very largest the size and the ends.

    It is held while the function runs. Identities would not do, since what is made anew may lie where another lay.
    """
    if isinstance(held, bytearray):
        return len(held), zlib.crc32(held)
    if len(held) <= LARGEST_LOOK:
        if isinstance(held, set):
            return (frozenset(held),)
        return _read_dict(held) if isinstance(held, dict) else tuple(held)
    if isinstance(held, (list, deque)):
        return len(held), id(held[0]), id(held[-1])
    return (len(held),)


def container_holder(held: Any, name: str) -> Holder | None:
    """Of a container or an array, if it is one."""
    kind = type(held)
    if kind in CONTAINERS:
        if len(held) > (LARGEST_ARRAY if kind is bytearray else LARGEST):
            return Holder(held, name, _look_at_large, None)
        return Holder(held, name, *CONTAINERS[kind])
    if is_array(held) and held.flags.writeable:
        if held.nbytes > LARGEST_ARRAY or held.dtype.hasobject:
            return Holder(held, name, _read_some_numpy, None)
        return Holder(held, name, _read_numpy, _write_numpy)
    return None


def is_array(thing: Any) -> bool:
    """Whether a thing is an array of NumPy, which need not be imported."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and type(thing) is numpy.ndarray


def _read_numpy(held: Any) -> Contents:
    return (held.tobytes(),)


def _read_some_numpy(held: Any) -> Contents:
    if held.dtype.hasobject or held.nbytes > LARGEST_SUM:
        return (held.reshape(-1)[:: held.size // 1024 | 1].tobytes(),)
    return (zlib.crc32(held if held.flags.c_contiguous else held.tobytes()),)


def _write_numpy(held: Any, contents: Contents) -> None:
    numpy: Any = sys.modules["numpy"]
    held[...] = numpy.frombuffer(contents[0], held.dtype).reshape(held.shape)


# ------------------------------------------------------------------------------------------ objects
_LIBRARIES = frozenset(
    ("revlib", "torch", "torchvision", "timm", "einops", "numpy", "builtins", "pytest", "_pytest")
) | (sys.stdlib_module_names - {"__main__"})


# Classes of the standard library whose objects hold what a user puts there.
_OPEN = (types.SimpleNamespace, argparse.Namespace, threading.local, UserDict, UserList)


@lru_cache(maxsize=4096)
def is_of_a_user(kind: type) -> bool:
    """Whether the objects of a class hold a state of whoever uses this library."""
    return kind in _OPEN or is_of_a_user_module(kind.__module__)


def is_of_a_user_module(name: str | None) -> bool:
    """Whether a file was written by whoever uses this library."""
    return name is None or name.partition(".")[0] not in _LIBRARIES


@lru_cache(maxsize=4096)
def is_installed(name: str) -> bool:
    """Whether a file belongs to an installed package, whose functions lead to all the others of that package."""
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def slots_holder(thing: Any, name: str) -> Holder | None:
    """Of an object's ``__slots__``, if it has any."""
    names = [
        k
        for kind in type(thing).__mro__
        for k, v in vars(kind).items()
        if isinstance(v, types.MemberDescriptorType)
    ]
    return _named(thing, names, name) if names else None


def attributes_of_class(kind: type, assigned: Sequence[str] = ()) -> Holder | None:
    """Of the values among a class's attributes, if there are any: not its methods and descriptors. And of those that
    its methods may assign, to the class or to its objects."""
    names = [
        k
        for k, v in vars(kind).items()
        if not (k.startswith("__") or k.startswith("_abc_") or hasattr(type(v), "__get__"))
        and not isinstance(v, type)
    ]
    names += [k for k in dict.fromkeys(assigned) if k not in vars(kind)]
    return _named(kind, names, ", ".join(names)) if names else None


def attributes_of_module(module: nn.Module, standard: frozenset[str]) -> Holder:
    """Of a module's own attributes: not of those that every module has."""

    def read(module: Any) -> Contents:
        own = {k: v for k, v in vars(module).items() if k not in standard}
        return (*own, *own.values())

    def put(module: Any, contents: Contents) -> None:
        half, attributes = len(contents) // 2, vars(module)
        own = dict(zip(contents[:half], contents[half:], strict=True))
        for key in [k for k in attributes if k not in standard and k not in own]:
            del attributes[key]
        attributes.update(own)

    return Holder(module, type(module).__name__, read, put)


def _named(thing: Any, names: list[str], name: str) -> Holder:
    write = type.__setattr__ if isinstance(thing, type) else object.__setattr__
    erase = type.__delattr__ if isinstance(thing, type) else object.__delattr__
    own = vars(thing) if isinstance(thing, type) else None

    def read(thing: Any) -> Contents:
        if own is not None:
            return tuple(own.get(k, ABSENT) for k in names)
        return tuple(getattr(thing, k, ABSENT) for k in names)

    def put(thing: Any, contents: Contents) -> None:
        for k, value, now in zip(names, contents, read(thing), strict=True):
            if value is ABSENT and now is not ABSENT:
                erase(thing, k)
            elif value is not now:
                write(thing, k, value)

    return Holder(thing, name, read, put)


# ------------------------------------------------------------------------------------------ variables
def _read_cell(cell: Any) -> Contents:
    try:
        return (cell.cell_contents,)
    except ValueError:  # a variable that is not assigned yet
        return ()


def _write_cell(cell: Any, contents: Contents) -> None:
    if contents:
        cell.cell_contents = contents[0]
    else:
        del cell.cell_contents


def cell_holder(cell: Any, name: str) -> Holder:
    return Holder(cell, f"{name} of a closure", _read_cell, _write_cell)


@lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function looks up globally, or as attributes, and those of functions inside of it."""
    inner = (names_of(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(dict.fromkeys(itertools.chain(code.co_names, *inner)))


@lru_cache(maxsize=4096)
def stored_by(code: types.CodeType, opname: str) -> tuple[str, ...]:
    """The global variables, or the attributes, that a function assigns, or a function inside of it."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname == opname]
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names += stored_by(part, opname)
    return tuple(dict.fromkeys(names))


def global_holder(variables: dict[str, Any], names: tuple[str, ...]) -> Holder:
    def read(variables: Any) -> Contents:
        return tuple(variables.get(k, ABSENT) for k in names)

    def put(variables: Any, contents: Contents) -> None:
        for k, value in zip(names, contents, strict=True):
            if value is ABSENT:
                variables.pop(k, None)
            else:
                variables[k] = value

    return Holder(variables, ", ".join(names), read, put)


def defaults_holders(function: types.FunctionType) -> list[Holder]:
    """Of a function's default arguments."""

    def read(function: Any) -> Contents:
        return function.__defaults__ or ()

    def put(function: Any, contents: Contents) -> None:
        function.__defaults__ = contents or None

    def read_keywords(function: Any) -> Contents:
        return _read_dict(function.__kwdefaults__ or {})

    def put_keywords(function: Any, contents: Contents) -> None:
        if function.__kwdefaults__ is not None:
            _write_dict(function.__kwdefaults__, contents)

    name = f"{function.__name__} (a default argument of a closure)"
    return [
        Holder(function, name, read, put),
        Holder(function, f"{name} by keyword", read_keywords, put_keywords),
    ]


def variable_holder(variable: ContextVar[Any], name: str) -> Holder:
    def read(variable: ContextVar[Any]) -> Contents:
        try:
            return (variable.get(),)
        except LookupError:
            return (ABSENT,)

    def put(variable: ContextVar[Any], contents: Contents) -> None:
        if contents[0] is not ABSENT:
            variable.set(contents[0])

    return Holder(variable, name, read, put)


# ------------------------------------------------------------------------------------------ iterators
_ITERATORS = (
    *(type(iter(c)) for c in ([], (), {}, set(), "", b"", range(0), range(1 << 99))),  # type: ignore
    *(type(reversed([])), type(iter({}.items())), type(iter({}.values()))),
    *(itertools.count, itertools.cycle, itertools.repeat, itertools.chain, itertools.islice),
    *(enumerate, zip, map, filter),
)


def _read_iterator(held: Any) -> Contents:
    hint = getattr(held, "__length_hint__", None)
    return (repr(held), None if hint is None else hint())


def _read_generator(held: Any) -> Contents:
    frame = held.gi_frame
    return () if frame is None else (frame.f_lasti, *frame.f_locals.items())


def iterator_holder(held: Any, name: str) -> Holder | None:
    """Of an iterator or generator, whose state cannot be put back."""
    if isinstance(held, types.GeneratorType):
        return Holder(held, name, _read_generator, None)
    return Holder(held, name, _read_iterator, None) if isinstance(held, _ITERATORS) else None  # type: ignore


# ------------------------------------------------------------------------------------------ comparing
def same_contents(a: Contents, b: Contents) -> bool:
    """Whether two readings are equal. Tensors and modules are equal only to themselves."""
    if len(a) != len(b):
        return False
    try:
        return all(
            x is y or (_is_value(x) and _is_value(y) and bool(x == y))
            for x, y in zip(a, b, strict=True)
        )
    except Exception:  # values that cannot be compared are taken for different ones
        return False


def _is_value(x: Any) -> bool:
    return not isinstance(x, (Tensor, nn.Module))
