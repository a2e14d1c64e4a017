"""Reversible stacks: a module that composes steps, and its form without modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from revlib.bijections import Bijection
from revlib.couplings import Coupling, DefaultAdditive
from revlib.schedulers import Reversible, Scheduler
from revlib.schedulers.base import checked as _checked_scheduler
from revlib.step import BoundStep, Pair, State, Step, apart, given, layouts, numbered
from revlib.step import checked as _checked_coupling

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ReversibleSequence", "invert", "reversible"]

# What a sequence holds, what may be made of modules, and what may be made of any functions.
Item = Step | Pair | Bijection
Modules = Item | tuple[nn.Module, nn.Module]
Functions = Item | tuple[Callable[..., Any], Callable[..., Any]]


def _bind(items: Iterable[Functions], coupling: Coupling) -> list[BoundStep]:
    steps = []
    for i, item in enumerate(items):
        if isinstance(item, Step):
            steps.append(item.bind(f"step {i} ({_name(item.fn)})"))
        elif isinstance(item, Bijection):
            steps.append(item.bind(f"bijection {i} ({_name(item)})"))
        else:
            F, G = _pair(item, i)
            if isinstance(item, Pair) and type(item) is not Pair:
                _refuse_sharded(item, i)
            steps.append(BoundStep(F, coupling, f"F of block {i} ({_name(F)})"))
            steps.append(BoundStep(G, coupling, f"G of block {i} ({_name(G)})"))
            if isinstance(item, Pair):
                steps[-2].begins = steps[-1].ends = item
    return steps


def _refuse_sharded(pair: Pair, i: int) -> None:
    # The class is known by its name, since few have imported it.
    if any(kind.__name__ == "FSDPModule" for kind in type(pair).__mro__):
        raise TypeError(
            f"block {i} was given to fully_shard, but a pair is never called, only its F and G, so nothing would "
            "gather its parameters; use fully_shard(pair.F) and fully_shard(pair.G), or both as one: "
            "fully_shard([pair.F, pair.G])"
        )


def _name(fn: Callable[..., Any]) -> str:
    return (
        type(fn).__name__
        if isinstance(fn, nn.Module)
        else getattr(fn, "__name__", type(fn).__name__)
    )


def checked_streams(streams: State, least: int = 2) -> State:
    for i, stream in enumerate(streams):
        if not isinstance(stream, Tensor):
            raise TypeError(
                f"stream {i} must be a tensor, got {type(stream).__name__}; {_instead_of(stream)}"
            )
        if not (stream.is_floating_point() or stream.is_complex()):
            advice = "call its dequantize()" if stream.is_quantized else "cast or embed it"
            context = ", or pass it by keyword, seq(x, x, mask=mask), if it is no stream"
            raise TypeError(
                f"stream {i} must be floating-point, got {stream.dtype}; {advice} first{context if i else ''}"
            )
        if stream.is_floating_point() and stream.dtype.itemsize == 1:
            raise TypeError(
                f"stream {i} must be of a dtype that can be added up, got {stream.dtype}; cast it to bfloat16 or "
                "float32, and to 8 bits only inside of the functions"
            )
        _check_kind(i, stream)
    if len(streams) < least:
        raise TypeError(
            f"a reversible sequence runs on at least two streams, got {len(streams)}; "
            "duplicate the input, seq(x, x), or split it, seq(*x.chunk(2, dim=-1))"
        )
    return streams


def _instead_of(stream: object) -> str:
    """Advice on what to pass instead of something that is no tensor."""
    if isinstance(stream, (tuple, list)):
        return "unpack the streams, as in seq(*streams), and pass context by keyword"
    if type(stream).__module__ == "torch.fx.proxy":
        return "torch.fx cannot trace what a sequence does: make ReversibleSequence a leaf module of the tracer"
    if hasattr(stream, "__array__"):
        return "convert it by torch.from_numpy first"
    return "pass context by keyword, as in seq(x, x, scale=scale)"


def _check_kind(i: int, stream: Tensor) -> None:
    if stream.layout is torch.strided and type(stream) is Tensor and not stream.is_nested:
        return  # nearly always
    if stream.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"stream {i} must be dense, got {stream.layout}; call its to_dense() first")
    if stream.is_nested and stream.layout is torch.strided:
        raise TypeError(
            f"stream {i} is a nested tensor that has no views; make it with layout=torch.jagged"
        )
    if isinstance(stream, torch.masked.MaskedTensor):
        raise TypeError(
            f"stream {i} is a masked tensor, which has no views; pass its data, and the mask as context"
        )


def entered(steps: list[BoundStep], streams: State) -> tuple[list[BoundStep], State]:
    """The steps with the couplings that they have for such streams, and the streams as they enter: each is made fit
    for the coupling that will merge it away first."""
    checked_streams(streams, 1 if steps and steps[0].merge_reads else 2)
    dtype = streams[0].dtype
    if all(s.dtype is dtype for s in streams):
        steps = [step.for_streams(dtype) for step in steps]
    state, m = list(streams), len(streams)
    found = layouts(steps, m)
    for k, (layout, numbers) in enumerate(zip(found, numbered(found, m), strict=False)):
        # What a bijection takes is made fit for the couplings behind it.
        law = next((step for step in steps[k:] if not step.merge_reads), steps[k])
        for i in apart(numbers, layout.taken)[0]:
            if i < m:
                state[i] = law.enter(state[i])
        if min(numbers) >= m:
            break
    return steps, tuple(state)


def _left(steps: list[BoundStep], streams: State, state: State) -> State:
    """The streams as they leave the sequence: in their own dtype, if a coupling widened them unasked."""
    if not any(step.leaves_as_entered for step in steps):
        return state
    return tuple(s.to(streams[0].dtype) for s in state)


def _pair(item: Any, i: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        if isinstance(item, nn.Sequential):
            raise TypeError  # of two layers, one function: the second sees what the first returns
        F, G = item
    except (TypeError, ValueError):
        got = f"{len(item)} functions" if isinstance(item, (tuple, list)) else given(item)
        raise TypeError(
            f"expected a pair (F, G) or a Step as block {i}, got {got}; give functions two by two, or wrap each as "
            "Step(fn); to pass one pair, put it into a list: [(F, G)]; a map with an inverse of its own is a Bijection"
        ) from None
    for name, fn in (("F", F), ("G", G)):
        if not callable(fn):
            raise TypeError(f"{name} of block {i} must be callable, got {given(fn)}")
        if isinstance(fn, type) and issubclass(fn, nn.Module):
            raise TypeError(f"{name} of block {i} must be an nn.Module, got {given(fn)}")
    return F, G


def _item(item: Modules, i: int) -> Item:
    if isinstance(item, (Step, Pair, Bijection)):
        return item
    F, G = _pair(item, i)
    return Pair(_module(f"F of block {i}", F), _module(f"G of block {i}", G))


def _module(name: str, fn: Callable[..., Any]) -> nn.Module:
    if not isinstance(fn, nn.Module):
        raise TypeError(
            f"{name} must be an nn.Module, got {given(fn)}; for plain functions use revlib.reversible(...)"
        )
    return fn


def _is_one_function(items: object) -> bool:
    """Whether what is given for the items of a sequence are the layers of one function."""
    kinds = (Step, Pair, Bijection)
    return isinstance(items, nn.Sequential) and not all(isinstance(item, kinds) for item in items)


class ReversibleSequence(nn.Module):
    r"""Reversible steps in order, trained in the memory of one.

    A pair $(F, G)$ computes $y_1 = x_1 + F(x_2)$, $y_2 = x_2 + G(y_1)$, with the coupling in place of the sums. It is
    two steps of the recurrence $(s_1, \dots, s_m) \mapsto (s_2, \dots, s_m, s_1 \oplus f(s_2, \dots, s_m))$, and
    :class:`~revlib.Step` gives any other. After an odd number of steps the streams come out rotated.

    Args:
        items: pairs ``(F, G)`` of modules, Steps, and :class:`~revlib.bijections.Bijection` s, in any order.
        coupling: the law of the pairs; Steps carry their own.
        scheduler: how backward gets activations back; swap it at any time by assignment. Parameters, ``state_dict``
            and outputs do not depend on it.

    Like :class:`torch.nn.Sequential`, it takes ``append``, ``extend``, ``insert``, ``pop``, ``del``, ``+`` and slices.

    Shapes: streams of any shape, not necessarily the same; what F returns must merge into the first stream, what G
    returns into the second. Bijections may change shapes, and the number of streams.
    ``seq(x1, x2, **context) -> (y1, y2)``; ``seq.inverse(y1, y2, **context) -> (x1, x2)``.
    A context argument reaches the functions whose signature names it, and gradients flow to tensors among them.

    Functions must be deterministic given their streams, context, parameters and the default random generators: backward
    runs them a second time. Tensors that a custom ``autograd.Function`` puts on ``ctx`` by attribute, instead of by
    ``ctx.save_for_backward``, stay in memory: correct, at their cost.

    Cost in units of one forward, under the default ``Reversible()``: time 4, against 3 with stored activations; memory
    the last state and the activations of one step, at any depth.

    Raises:
        TypeError: an item, a stream or a context name of the wrong kind.
        ValueError: a function's result that does not fit its stream.
        RuntimeError: in backward, where its gradients would be wrong: an output, parameter, buffer or context tensor
            edited in place since forward, a mode switched, a function that does not repeat, a stream that did not
            invert accurately.

    Source: Gomez et al. 2017 (RevNet); Mangalam et al. 2022 (Reversible Vision Transformers).

    Example:
        >>> def mlp():
        ...     return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        >>> seq = ReversibleSequence([(mlp(), mlp()) for _ in range(4)])
        >>> x = torch.randn(2, 5, 8)
        >>> y1, y2 = seq(x, x)
        >>> (y1.square().mean() + y2.mean()).backward()
        >>> y1.shape, len(seq), all(p.grad is not None for p in seq.parameters())
        (torch.Size([2, 5, 8]), 4, True)
    """

    def __init__(
        self,
        items: Iterable[Modules] = (),
        coupling: Coupling | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Make a stack of pairs, Steps and Bijections; the docstring of the class explains the arguments."""
        super().__init__()
        self.coupling = coupling or DefaultAdditive()
        self.scheduler = scheduler or Reversible()
        if not isinstance(items, Iterable) or _is_one_function(items):
            raise TypeError(
                f"expected a list of pairs (F, G), Steps and Bijections, got {type(items).__name__}; put it into a "
                "list, in a pair with another function, [(F, G)], or as a step, [Step(F)]"
            )
        for item in items:
            self.append(item)

    def append(self, item: Modules) -> Self:
        """Add a pair ``(F, G)``, a Step or a Bijection at the end, and return the stack.

        Raises:
            TypeError: if the item is none of these, or if a function of the pair is no ``nn.Module``.
        """
        self.add_module(str(len(self)), _item(item, len(self)))
        return self

    def extend(self, items: Iterable[Modules]) -> Self:
        """Add several items at the end, and return the stack."""
        for item in list(items):
            self.append(item)
        return self

    def insert(self, index: int, item: Modules) -> Self:
        """Add an item before the one at ``index``, and return the stack. Items behind it are numbered anew.

        Raises:
            IndexError: if there is no such place.
        """
        if not -len(self) <= index <= len(self):
            raise IndexError(f"a stack of {len(self)} items has no place {index} to insert at")
        items = list(self)
        items.insert(index, _item(item, index if index >= 0 else index + len(self)))
        return self._hold(items)

    def pop(self, index: int = -1) -> Item:
        """Take an item out, the last unless given, and return it. Items behind it are numbered anew."""
        item = self[index]
        del self[index]
        return item

    def __delitem__(self, index: int | slice) -> None:
        items = list(self)
        del items[index]
        self._hold(items)

    def __add__(self, other: ReversibleSequence) -> Self:
        """A stack of the items of both, under the coupling and the scheduler of the first."""
        if not isinstance(other, ReversibleSequence):
            return NotImplemented
        if other.coupling != self.coupling and any(isinstance(item, Pair) for item in other):
            raise ValueError(
                f"the pairs of both stacks would have to have one coupling, and have {self.coupling} and "
                f"{other.coupling}; assign one of them, or use Steps, which carry their own"
            )
        return type(self)([*self, *other], self.coupling, self.scheduler)

    def _hold(self, items: list[Item]) -> Self:
        self._modules.clear()
        return self.extend(items)

    @property
    def coupling(self) -> Coupling:
        """The law by which pairs merge results into their streams; assign another one at any time.

        Steps have laws of their own. Assigning anything but a :class:`~revlib.Coupling` raises a TypeError.
        """
        return self._coupling

    @coupling.setter
    def coupling(self, coupling: Coupling) -> None:
        self._coupling = _checked_coupling(coupling)

    @property
    def scheduler(self) -> Scheduler:
        """What forward keeps for backward; assign another one at any time, which changes no gradient.

        A backward follows the scheduler that its own forward had. Assigning anything but a value of
        :mod:`revlib.schedulers` raises a TypeError.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._scheduler = _checked_scheduler(scheduler, "scheduler")

    @property
    def bound_steps(self) -> list[BoundStep]:
        """The steps as the engine sees them. They are made again only when the items or the couplings have changed."""
        if torch.compiler.is_compiling():  # compiled code would have to guard what is remembered
            return _bind(self, self.coupling)
        key: list[Any] = [self.coupling]
        for item in self:
            key += (
                item,
                *item._modules.values(),
                item.__dict__.get("fn"),
                item.__dict__.get("coupling"),
            )
        known = self.__dict__.get("_bound")
        if known is None or len(known[0]) != len(key) or not all(map(is_, known[0], key)):
            known = self.__dict__["_bound"] = key, _bind(self, self.coupling)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy: without what is remembered of functions, which a copy finds out for itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_bound", "_backwards")}

    def forward(self, *streams: Tensor, **context: Any) -> State:
        """Run the steps in order: ``y1, y2 = seq(x1, x2, **context)``.

        Args:
            streams: two tensors or more, as many as the functions expect; one where a bijection such as ``Split`` comes
                first.
            context: keyword arguments for the functions. Each function receives those that its signature names.

        Returns:
            As many streams, of the same shapes and dtypes unless bijections change them, differentiable in everything
            that the functions use.

        Raises:
            TypeError: for a stream that is no dense floating-point tensor, fewer than two streams, or context that no
                function names.
            ValueError: for a result that does not fit its stream.
        """
        steps, state = entered(self.bound_steps, streams)
        return _left(steps, streams, self.scheduler.run(steps, state, context))

    if TYPE_CHECKING:  # nn.Module declares that a call returns Any

        def __call__(self, *streams: Tensor, **context: Any) -> State: ...

    def inverse(self, *streams: Tensor, **context: Any) -> State:
        """The inputs that give these outputs, by undoing the steps in reverse order.

        Functions that draw random numbers do not draw the same ones again here: invert in ``eval()`` mode. Pass the
        context that forward had. The result is the input up to rounding, or to the last bit with ``ExactAdditive``.

        Shapes: the outputs of the stack to its inputs.
        Cost: the time of one forward. Gradients flow through it, in the memory that the scheduler takes in forward:
        its backward runs the steps forwards. With ``ExactAdditive`` their bits are those of ``Naive`` if the streams
        lie on its grid, as the outputs of a stack do; others are rounded by the sums.

        Raises:
            TypeError: as :meth:`forward`.

        Example:
            >>> seq = ReversibleSequence([(nn.Tanh(), nn.Tanh())] * 3)
            >>> x = torch.randn(2, 4)
            >>> with torch.no_grad():
            ...     r1, r2 = seq.inverse(*seq(x, x))
            >>> torch.allclose(r1, x, atol=1e-5), torch.allclose(r2, x, atol=1e-5)
            (True, True)
        """
        steps, state = _at_the_end(self.bound_steps, streams)
        known = self.__dict__.get("_backwards")
        if known is None or len(known[0]) != len(steps) or not all(map(is_, known[0], steps)):
            known = self.__dict__["_backwards"] = steps, _backwards(steps)
        return _left(steps, streams, self.scheduler.run(known[1], state, context))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Item]:
        items: Any = self._modules.values()
        return iter(list(items))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item | Self:
        items = list(self)
        return (
            type(self)(items[index], self.coupling, self.scheduler)
            if isinstance(index, slice)
            else items[index]
        )

    def extra_repr(self) -> str:
        """The coupling and the scheduler, as ``print(seq)`` shows them above the items."""
        return f"coupling={self.coupling}, scheduler={self.scheduler}"


def _at_the_end(steps: list[BoundStep], streams: State) -> tuple[list[BoundStep], State]:
    """The steps with the couplings that they have for such streams, and the streams as the last of them left them."""
    checked_streams(streams, 1 if steps and steps[-1].merge_reads else 2)
    dtype = streams[0].dtype
    if all(s.dtype is dtype for s in streams):
        steps = [step.for_streams(dtype) for step in steps]
    if any(step.leaves_as_entered for step in steps):
        return steps, tuple(s.float() for s in streams)
    return steps, streams


def _backwards(steps: list[BoundStep]) -> list[BoundStep]:
    return [step.inverse() for step in reversed(steps)]


def reversible(
    functions: Iterable[Functions],
    *streams: Tensor,
    coupling: Coupling | None = None,
    scheduler: Scheduler | None = None,
    context: Mapping[str, Any] | None = None,
) -> State:
    """:class:`ReversibleSequence` without modules: ``y1, y2 = reversible([(f, g), ...], x1, x2)``.

    Args:
        functions: pairs of callables, Steps and Bijections, in any order. Gradients flow to everything that
            they capture.
        streams: two tensors or more.
        coupling: the law of the pairs, additive unless given.
        scheduler: what forward keeps, ``Reversible()`` unless given.
        context: keyword arguments for the functions that name them.

    What plain functions capture cannot be checked for edits since forward, other than by comparing what backward
    recovers with what forward had.

    Shapes, cost and errors are those of :class:`ReversibleSequence`.

    Example:
        >>> w = torch.randn(4, 4, requires_grad=True)
        >>> x = torch.randn(2, 4)
        >>> y1, y2 = reversible([(lambda s: torch.tanh(s @ w), torch.sin)] * 3, x, x)
        >>> (y1.sum() + y2.sum()).backward()
        >>> y1.shape, w.grad.shape
        (torch.Size([2, 4]), torch.Size([4, 4]))
    """
    steps = _bind(functions, _checked_coupling(coupling or DefaultAdditive()))
    law = _checked_scheduler(scheduler or Reversible(), "scheduler")
    steps, state = entered(steps, streams)
    return _left(steps, streams, law.run(steps, state, context or {}))


def invert(
    functions: Iterable[Functions],
    *streams: Tensor,
    coupling: Coupling | None = None,
    scheduler: Scheduler | None = None,
    context: Mapping[str, Any] | None = None,
) -> State:
    """The inverse of :func:`reversible`: ``x1, x2 = invert([(f, g), ...], y1, y2)``.

    Pass the same functions, coupling and context. The result is the input up to rounding, or to the last bit with
    ``ExactAdditive``. Gradients flow through it in the memory that the scheduler takes.

    Shapes, and errors in forward, are those of :class:`ReversibleSequence`. Cost: the time of one forward.

    Example:
        >>> functions = [(torch.sin, torch.tanh)] * 3
        >>> x = torch.randn(2, 4)
        >>> r1, r2 = invert(functions, *reversible(functions, x, x))
        >>> torch.allclose(r1, x, atol=1e-5)
        True
    """
    steps = _bind(functions, _checked_coupling(coupling or DefaultAdditive()))
    law = _checked_scheduler(scheduler or Reversible(), "scheduler")
    steps, state = _at_the_end(steps, streams)
    return _left(steps, streams, law.run(_backwards(steps), state, context or {}))
