"""What a function may not do where it must be pure, noticed as it runs: operation by operation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from revlib._torch import is_transformed, tree_leaves, version_of

__all__ = ["PurityMode", "TracingPurityMode"]

CAPTURED = (
    "a function of a stack with scheduler=Functional() uses a tensor that needs a gradient, or is mapped over, and is "
    "neither a stream, nor a parameter or buffer of the function, nor in its context. Pass it as context, make it a "
    "parameter, or use scheduler=Reversible()."
)
_OF_A_GRAPH = (Tensor.register_hook, Tensor.retain_grad, Tensor.backward, torch.autograd.grad)


class PurityMode(TorchFunctionMode):
    """Sees to it that no gradient is lost: a tensor that needs one must come in as argument, and leave as result.

    Args:
        known: the arguments, and buffers, which others watch.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(t) for t in known}
        self.carrying = {id(t) for t in known if t.requires_grad}
        self.made: list[weakref.ref[Tensor]] = []  # out of those
        self.captured: dict[
            int, weakref.ref[Tensor]
        ] = {}  # what functions read besides, or make out of sight
        self.versions: list[
            tuple[weakref.ref[Tensor], int]
        ] = []  # of what is left of that after forward

    def over(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function, watched; its streams and context come from elsewhere."""

        def watched(*streams: Tensor, **context: Any) -> Any:
            for t in tree_leaves((streams, context)):
                if isinstance(t, Tensor):
                    self.known.add(id(t))
            self.carrying.update(id(s) for s in streams)
            with self:
                result = fn(*streams, **context)
            self._seen([t for t in tree_leaves(result) if isinstance(t, Tensor)])
            return result

        return watched

    def _seen(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if id(t) in self.known:
                continue
            if t.requires_grad or is_transformed(t):
                raise RuntimeError(f"{CAPTURED} Its shape is {tuple(t.shape)}.")
            self.captured[id(t)] = weakref.ref(t)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._seen(tensors)
        if func in _OF_A_GRAPH and not tensors[0].requires_grad:
            raise RuntimeError(
                f"a function of a stack with scheduler=Functional() calls {func.__name__}() on a tensor that it "
                "computes; its functions run without a graph in forward. Use scheduler=Reversible()."
            )
        carries = func is not Tensor.detach and any(id(t) in self.carrying for t in tensors)
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                if (ref := self.captured.get(id(t))) is None or ref() is not t:
                    self.known.add(id(t))
                (self.carrying.add if carries else self.carrying.discard)(id(t))
                if carries and not any(t is a for a in tensors):
                    self.made.append(weakref.ref(t))
        return result

    def close(self) -> None:
        """After forward. Raise if something that needs a gradient is still there: a loss on it would have none."""
        if any(ref() is not None for ref in self.made):
            gc.collect()  # it may be in a cycle that nobody holds
        for ref in self.made:
            t = ref()
            if t is not None:
                raise RuntimeError(
                    f"a function of a stack with scheduler=Functional() keeps a tensor of shape {tuple(t.shape)} that "
                    "it computed (in an attribute, a list, a forward hook), through which no gradient would flow. Keep "
                    "t.detach(), or use scheduler=Reversible()."
                )
        left = ((ref, ref()) for ref in self.captured.values())
        self.versions = [(ref, version_of(t)) for ref, t in left if t is not None]

    def check(self, name: str) -> None:
        """Before a repetition. Raise where a tensor was edited that functions read unasked."""
        for ref, version in self.versions:
            t = ref()
            if t is not None and version_of(t) != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} that {name}, or another function of its stack, reads was "
                    "modified by an inplace operation between forward and backward; edit a clone of it instead."
                )


_ALWAYS = (
    *(
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randint_like,
        torch.randperm,
        torch.normal,
        torch.poisson,
    ),
    *(
        torch.bernoulli,
        torch.multinomial,
        Tensor.bernoulli,
        Tensor.bernoulli_,
        Tensor.multinomial,
        Tensor.normal_,
    ),
    *(
        Tensor.cauchy_,
        Tensor.exponential_,
        Tensor.geometric_,
        Tensor.log_normal_,
        Tensor.random_,
        Tensor.uniform_,
    ),
    *(F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d),
)
# p, training
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
)


class TracingPurityMode(TorchFunctionMode):
    """The same while the compiler traces, and no random numbers: compiled code would draw others in a repetition.

    Of these the compiler does not show ``torch.rand_like`` and ``torch.randn_like``.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for arg in (*args, *kwargs.values()):
            for t in (
                arg if isinstance(arg, (list, tuple)) else (arg,)
            ):  # written for the compiler, as all of this
                if (
                    isinstance(t, Tensor)
                    and t.requires_grad
                    and not any(t is k for k in self.known)
                ):
                    raise RuntimeError(
                        f"{CAPTURED} Or the compiler broke its graph: fullgraph=True says where."
                    )
        draws = func in _ALWAYS
        if func in _DROPOUTS:
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = (
                args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
            )
            draws = p > 0 and training
        elif func is F.scaled_dot_product_attention:
            draws = (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
        elif func is F.rrelu:
            draws = args[3] if len(args) > 3 else kwargs.get("training", False)
        if draws:
            raise RuntimeError(
                "a function of a stack with scheduler=Functional() draws random numbers in a whole compiled graph, "
                "which would draw others when it repeats the function; compile the functions alone, or use "
                "scheduler=Reversible()."
            )
        return func(*args, **kwargs)
