"""Which keyword arguments a function takes, looked up behind the wrappers that only hand them on.

A wrapper's own signature says ``**kwargs``, whatever the function behind it takes. So the source of a
function that takes any keyword is read: if it only hands them on, as in ``inner(*args, **kwargs)``, what
counts is the signature of ``inner``. Where that cannot be told, the function is taken at its word, and
gets everything.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Keywords", "keywords_of"]

_KINDS = inspect.Parameter
_BY_POSITION = (_KINDS.POSITIONAL_ONLY, _KINDS.POSITIONAL_OR_KEYWORD)
_DEEPEST = 16  # wrappers around one another


class Keywords(NamedTuple):
    """The names that a function takes besides its streams, and whether it takes any other name as well.

    ``looked_through`` tells whether they are those of a function behind this one, which may be exchanged.
    """

    names: frozenset[str]
    every: bool
    looked_through: bool


def keywords_of(target: Any, streams: int, depth: int = 0) -> Keywords:
    """The keywords of a function that is called with so many streams by position."""
    target, streams, through = _called(target, streams)
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return Keywords(frozenset(), False, through)
    by_position = [p for p in parameters if p.kind in _BY_POSITION]
    rest = [p for p in by_position[streams:] if p.kind is not _KINDS.POSITIONAL_ONLY]
    names = frozenset(
        p.name for p in (*rest, *(p for p in parameters if p.kind is _KINDS.KEYWORD_ONLY))
    )
    if not any(p.kind is _KINDS.VAR_KEYWORD for p in parameters):
        return Keywords(names, False, through)
    behind = _behind(target, max(0, streams - len(by_position))) if depth < _DEEPEST else None
    if behind is None:
        return Keywords(names, True, through)
    every = False
    for inner, count, given in behind:
        found = keywords_of(inner, count, depth + 1)
        names, every = names | (found.names - given), every or found.every
    return Keywords(names, every, True)


class _Inner(NamedTuple):
    """A function that another one hands its keywords to."""

    function: Any
    streams: int  # given to it by position
    given: frozenset[str]  # names that the wrapper sets itself


def _called(target: Any, streams: int) -> tuple[Any, int, bool]:
    """The function that runs when ``target`` is called, whose signature and source can be read; how many streams it is
    given; and whether it lies in a wrapper."""
    through = False
    while True:
        if isinstance(target, functools.partial):
            target, streams = target.func, streams + len(target.args)
        elif isinstance(target, types.MethodType) and target.__func__ in _CALLS:
            target = target.__self__
        elif isinstance(target, nn.Module):
            child = _wrapped_by_torch(target)
            if child is None:
                return target.forward, streams, through
            target, through = child, True
        else:
            return target, streams, through


_CALLS = (nn.Module.__call__, nn.Module._call_impl)


def _wrapped_by_torch(module: nn.Module) -> nn.Module | None:
    """The module in one of torch's own wrappers: compiled, averaged, checkpointed, data-parallel, sharded."""
    children = [m for m in module._modules.values() if m is not None]
    if len(children) != 1 or type(module).__module__.partition(".")[0] != "torch":
        return None
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    any_of_all = [_KINDS.VAR_POSITIONAL, _KINDS.VAR_KEYWORD]
    return children[0] if [p.kind for p in parameters] == any_of_all else None


def _behind(function: Any, extra: int) -> list[_Inner] | None:
    """The functions that this one hands all its keywords to, or None if it may read them itself.

    Args:
        extra: how many streams its ``*args`` hold.
    """
    bound = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    calls = _handed_on(function) if isinstance(function, types.FunctionType) else None
    if calls is None:
        return None
    found = []
    for call in calls:
        try:
            inner = _resolved(call.callee, function, bound)
        except (AttributeError, LookupError, ValueError):
            return None
        found.append(_Inner(inner, call.streams + (extra if call.starred else 0), call.given))
    return found


class _Call(NamedTuple):
    callee: ast.expr
    streams: int
    starred: bool
    given: frozenset[str]


@functools.lru_cache(maxsize=1024)
def _handed_on(function: types.FunctionType) -> tuple[_Call, ...] | None:
    """The calls that get ``**kwargs``, if nothing else is done with them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    body = tree.body[0]
    if not isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef)) or body.args.kwarg is None:
        return None
    name = body.args.kwarg.arg
    rest = body.args.vararg.arg if body.args.vararg is not None else None
    calls, handed = [], set()
    for node in ast.walk(body):
        if isinstance(node, ast.Call):
            for k in node.keywords:
                if k.arg is None and isinstance(k.value, ast.Name) and k.value.id == name:
                    handed.add(k.value)
                    calls.append(_call(node, rest))
    uses = {n for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == name}
    return tuple(calls) if calls and uses == handed else None


def _call(node: ast.Call, rest: str | None) -> _Call:
    starred = [
        isinstance(a, ast.Starred) and isinstance(a.value, ast.Name) and a.value.id == rest
        for a in node.args
    ]
    given = frozenset(k.arg for k in node.keywords if k.arg is not None)
    return _Call(node.func, len(starred) - sum(starred), any(starred), given)


def _resolved(callee: ast.expr, function: types.FunctionType, bound: Any) -> Any:
    """The object that an expression of a function stands for, without running anything but attribute access."""
    if isinstance(callee, ast.Attribute):
        return getattr(_resolved(callee.value, function, bound), callee.attr)
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    if isinstance(callee, ast.Call) and isinstance(callee.func, ast.Name):
        if callee.func.id == "super" and not callee.args and bound is not None:
            return super(cells["__class__"].cell_contents, bound)
    elif isinstance(callee, ast.Name):
        if code.co_varnames[: code.co_argcount][:1] == (callee.id,) and bound is not None:
            return bound
        if callee.id in cells:
            return cells[callee.id].cell_contents
        if callee.id not in code.co_varnames:
            return function.__globals__[callee.id]
    raise LookupError(ast.dump(callee))
