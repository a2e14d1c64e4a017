"""Every private interface of torch that revlib uses, one small function each.

Torch may change these without notice. Each function says why it is needed and what would break without it; unless it
says otherwise, it was seen to work on torch 2.11 and 2.14. :func:`missing` lists what the installed torch lacks, and a
stack reports that as an error which names the version, instead of an AttributeError in the middle of a backward pass.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = [
    "TorchDispatchMode",
    "TreeSpec",
    "assert_on_device",
    "at_end_of_backward",
    "bypass_compiler",
    "dispatch_modes_active",
    "exporting",
    "forward_mode_active",
    "function_modes",
    "graph_is_kept",
    "graph_task",
    "has_storage",
    "in_transform",
    "is_fake",
    "is_opaque_wrapper",
    "is_traceable_wrapper_subclass",
    "is_transformed",
    "keep_alive",
    "missing",
    "no_dispatch_modes",
    "normalises",
    "raised_by_forbidding_hooks",
    "saved_by",
    "saved_tensor_hooks",
    "saved_tensor_hooks_allowed",
    "saved_unwritten",
    "set_function_modes",
    "storage_id",
    "tracing",
    "transforming",
    "transforms",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unwrapped",
    "version_of",
    "versions_of",
    "view_base",
]

_F = TypeVar("_F", bound=Callable[..., Any])


# ------------------------------------------------------------------------------------------ tensors
def version_of(t: Tensor) -> int:
    """How often a tensor was edited in place, or -1 for an inference tensor, which does not count its edits.

    Autograd compares these counters before it uses a saved tensor. Placeholders bypass that comparison, so without the
    counters an edited parameter would give a wrong gradient.
    """
    try:
        return t._version
    except RuntimeError:
        return -1


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """:func:`version_of` each."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:
        return tuple(map(version_of, tensors))


_version = attrgetter("_version")


def view_base(t: Tensor) -> Tensor:
    """The tensor that ``t`` is a view of, or ``t`` itself. A function may read a user's tensor through a fresh view."""
    base = t._base
    return t if base is None else base


def keep_alive(t: Tensor) -> None:
    """Makes a tensor that came out of a weak reference safe to use after its last python reference was dropped.

    Torch may keep the C++ tensor while its python object is being finalised; without this call such an object can
    crash the interpreter.
    """
    t._fix_weakref()  # type: ignore[attr-defined]


def storage_id(t: Tensor) -> int:
    """A number that two tensors share if they share memory; negative where a tensor has no memory of its own."""
    try:
        return t.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(t)


def has_storage(t: Tensor) -> bool:
    """Whether a tensor has memory of its own at all; sparse tensors and some wrappers have none."""
    return torch._C._has_storage(t)


def is_fake(t: Tensor) -> bool:
    """Whether a tensor only pretends to have values. Its class is not imported here, since that takes seconds, and a
    tensor cannot be of a class that nobody has imported."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return type(t) is not Tensor and fakes is not None and isinstance(t, fakes.FakeTensor)


def is_opaque_wrapper(t: Tensor) -> bool:
    """Whether a tensor is of a wrapper subclass that does not say which tensors are inside. It has no memory itself."""
    wraps = type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if not wraps or is_traceable_wrapper_subclass(t) or is_fake(t):
        return False
    try:
        return not has_storage(t) or (t.numel() > 0 and t.untyped_storage().data_ptr() == 0)
    except RuntimeError:  # there is nothing that a pointer could point to
        return True


def normalises(module: Any) -> bool:
    """Whether this is a batch norm that updates its running statistics, which native kernels do without a trace in the
    version counters. The common base class of batch norms is private."""
    return isinstance(module, _NormBase) and module.training


# ------------------------------------------------------------------------------------------ autograd
def graph_task() -> int:
    """The number of the backward pass that is running on this thread, or -1.

    Activations are recovered for one pass; without the number, two passes through one graph would mix theirs.
    """
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Whether the running backward pass keeps its graph (``retain_graph=True``). Without knowing, either memory would
    not be released on the way, or a second pass would find nothing."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Has the autograd engine call this when the running pass ends, as distributed training does; it is the only
    moment at which everything that the pass recovers is there to be compared."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def saved_tensor_hooks(*, ignore_disabled: bool = True) -> Any:
    """The innermost pair of saved-tensor hooks in force, or None. It tells a nested stack which stack it is in."""
    return torch._C._autograd._top_saved_tensors_default_hooks(ignore_disabled)  # type: ignore[attr-defined]


def saved_tensor_hooks_allowed() -> bool:
    """False within ``torch.autograd.graph.disable_saved_tensors_hooks``, where placeholders are impossible."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]


def raised_by_forbidding_hooks(error: BaseException) -> bool:
    """Whether an error says that ``disable_saved_tensors_hooks`` was entered while hooks were in force.

    All ``torch.func`` transforms that differentiate enter it, each with a message of its own, so the message does not
    tell.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = None if trace is None else trace.tb_frame.f_code
    return code is not None and code is inspect.unwrap(disable_saved_tensors_hooks).__code__


_UNWRITTEN = {"RreluWithNoise": "_raw_saved_noise", "CtcLoss": "_raw_saved_result1"}


def saved_unwritten(node: Any) -> Any:
    """What stands for a tensor that an operation saves and whose kernel does not write all of it, or None.

    RReLU does not write its noise in eval mode, and CTC loss not all of its table, so that these differ from one run to
    the next; comparing them would refuse right functions.
    """
    name = node.name().rstrip("01").removesuffix("Backward")
    return getattr(node, _UNWRITTEN[name]).data if name in _UNWRITTEN else None


def saved_by(node: Any) -> Iterator[Any]:
    """What an operation saves: tensors, or what hooks put in their place, or None. Always as many, in the same order.

    The public attributes would call hooks, of which one repeats what a checkpoint has run.
    """
    if isinstance(node, BackwardCFunction):
        for saved in node._raw_saved_tensors or ():  # type: ignore[attr-defined]
            yield saved.data
    else:
        for name in _raw_names(type(node)):  # type: ignore[arg-type]
            yield getattr(getattr(node, name), "data", None)


@functools.cache
def _raw_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation is under way. It keeps nothing, so there is nothing to replace."""
    return forward_ad._current_level >= 0


# ------------------------------------------------------------------------------------------ torch.func
_functorch = torch._C._functorch


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is active. Transforms refuse saved-tensor hooks."""
    return _functorch.peek_interpreter_stack() is not None


def transforms() -> list[str]:
    """The names of the active ``torch.func`` transforms, outermost first: "Vmap", "Grad", "Jvp", ..."""
    return [i.key().name for i in _functorch.get_interpreter_stack() or ()]


def transforming() -> bool:
    """The same as :func:`in_transform`, in the form that the compiler understands while it traces."""
    return torch._C._are_functorch_transforms_active()


def is_transformed(t: Tensor) -> bool:
    """Whether a transform has wrapped this tensor; such a wrapper must not outlive the transform."""
    return _functorch.is_functorch_wrapped_tensor(t)


def unwrapped(t: Tensor) -> Tensor:
    """The values of a tensor that transforms have wrapped."""
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


# ------------------------------------------------------------------------------------------ modes
def dispatch_modes_active() -> bool:
    """Whether any TorchDispatchMode is active, such as FakeTensorMode."""
    return bool(torch._C._len_torch_dispatch_stack())


def no_dispatch_modes() -> AbstractContextManager[Any]:
    """A context without such modes. The states of random generators are real even where a stack's tensors are fake."""
    return _disable_current_modes()


def function_modes() -> list[Any]:
    """The TorchFunctionModes in force, such as a default device. Autograd runs backward without them."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)] if count else []


def set_function_modes(modes: Sequence[Any]) -> None:
    """Puts these modes in force. A mode that is entered again through ``with`` would forget how to leave."""
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


# ------------------------------------------------------------------------------------------ the compiler
def exporting() -> bool:
    """Whether a program is being exported. The public ``torch.compiler.is_exporting()`` is true throughout under
    ``torch.compile`` on torch 2.11, so that every compiled stack would store its activations."""
    return torch.compiler._is_exporting_flag


def tracing() -> bool:
    """Whether ``torch.jit`` records operations, as ``torch.jit.trace``, the older ONNX exporter and the graphs of
    tensorboard do. They run a function several times and compare what they recorded, placeholders included."""
    return torch._C._get_tracing_state() is not None


def bypass_compiler(fn: _F) -> _F:
    """Marks a function that autograd calls, so that ``torch.compile`` neither compiles it nor what it calls.

    A compiled frame cannot be recompiled while backward runs. ``torch.compiler.disable`` would do the same, at the
    price of loading the compiler when revlib is imported and of a wrapper around every call.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    strategy = frames._FrameExecStrategy(skip, skip)  # of the function itself, and of what it calls
    code = fn.__code__ if isinstance(fn, FunctionType) else fn.__func__.__code__  # type: ignore[attr-defined]
    frames.set_code_exec_strategy(code, strategy)
    return fn


def assert_on_device(condition: Tensor, message: str) -> None:
    """An assertion inside a compiled graph, without waiting for the device."""
    torch._assert_async(condition, message)


# ------------------------------------------------------------------------------------------ all of it
_NEEDED = (
    "_current_graph_task_id",
    "_autograd._get_current_graph_task_keep_graph",
    "_autograd._top_saved_tensors_default_hooks",
    "_autograd._saved_tensors_hooks_is_enabled",
    "_functorch.peek_interpreter_stack",
    "_functorch.get_interpreter_stack",
    "_functorch.is_functorch_wrapped_tensor",
    "_functorch.get_unwrapped",
    "_get_tracing_state",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_get_function_stack_at",
    "_pop_torch_function_stack",
    "_push_on_torch_function_stack",
    "_dynamo.eval_frame.set_code_exec_strategy",
)


@functools.cache
def missing() -> tuple[str, ...]:
    """The names among torch's private interfaces that the installed version lacks."""

    def exists(path: str) -> bool:
        found: Any = torch._C
        for name in path.split("."):
            found = getattr(found, name, None)
        return found is not None

    return tuple(f"torch._C.{path}" for path in _NEEDED if not exists(path))
