"""Gradients that share memory, and gradients of parameters that a function reaches otherwise."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Lambda, grads, leaves, loss
from scenes import Stage, scene, share_no_storage
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import ExactAdditive

# ---------------------------------------------------------------------------------------------- one memory, two leaves
Pass = Callable[[], Any]


def edited(run: Pass, *holders: Tensor | nn.Module, stepped: Sequence[Tensor] | None = None) -> list[Any]:
    """What becomes of the gradients of one micro-batch: added up, clipped, and edited by hooks in place.

    Those ``stepped`` are also edited themselves when their gradient is there; all, unless told.
    """
    learned = [t for h in holders for t in (h.parameters() if isinstance(h, nn.Module) else [h]) if t.requires_grad]

    def fresh() -> None:
        for t in learned:
            t.grad = None

    found: list[Any] = []
    for _ in range(3):
        loss(run()).backward()
        found += [*grads(*learned), share_no_storage(*learned)]

    fresh()
    loss(run()).backward()
    found += [torch.nn.utils.clip_grad_norm_(learned, 1.0), *grads(*learned)]
    found.append(torch.stack([t.grad.norm() for t in learned if t.grad is not None]).norm())

    def halve(t: Tensor) -> None:
        t.grad.mul_(0.5)

    stepping = {id(t) for t in (learned if stepped is None else stepped)}

    def step(t: Tensor) -> None:  # as optimizers that free gradients inside backward
        if id(t) in stepping:
            with torch.no_grad():
                t.sub_(0.01 * t.grad)
        t.grad.zero_()

    for hook in (halve, step):
        for chosen in (learned[:1], learned[-1:], learned):
            fresh()
            handles = [t.register_post_accumulate_grad_hook(hook) for t in chosen]
            loss(run()).backward()
            for handle in handles:
                handle.remove()
            found += [*grads(*learned), *(t.detach().clone() for t in learned)]
    return found


def frozen(*shape: int) -> nn.Linear:
    return nn.Linear(*(shape or (3, 3))).requires_grad_(False)


class Offset(nn.Module):
    """A learned offset of the stream's own shape on a frozen body, as in tuning of prompts and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.offset = frozen(), nn.Parameter(torch.randn(1, 4, 3))

    def forward(self, x):
        return self.body(x) + self.offset


@scene("0")
def test_an_offset_on_a_frozen_body(stage: Stage):
    stack, table, x = stage.stack(Offset), nn.Parameter(torch.randn(1, 4, 3)), torch.randn(1, 4, 3)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_an_offset_where_the_streams_are_leaves(stage: Stage):
    stack, xs = stage.stack(Offset), leaves(1, 4, 3)
    return edited(lambda: stack(*xs), *xs, stack, stepped=list(stack.parameters()))


@scene("0")
def test_a_function_that_returns_a_parameter(stage: Stage):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return self.value

    stack, table, x = stage.stack(Constant), nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_a_context_tensor_of_the_streams_shape(stage: Stage):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = frozen(4, 4)

        def forward(self, x, prompt):
            return self.body(x) + prompt

    stack = stage.stack(Conditioned)
    prompt, table, x = (
        nn.Parameter(torch.randn(3, 4)),
        nn.Parameter(torch.randn(3, 4)),
        torch.randn(3, 4),
    )
    return edited(lambda: stack(x + table, x - table, prompt=prompt), prompt, table)


@scene("0")
def test_biases_alone_on_streams_of_one_sample(stage: Stage):
    """BitFit: of a stream of one dimension, the gradient of a bias is the gradient that came."""

    def make():
        layer = nn.Linear(4, 4)
        layer.weight.requires_grad_(False)
        return layer

    stack, table, x = stage.stack(make), nn.Parameter(torch.randn(4)), torch.randn(4)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_positions_added_to_the_stream_inside(stage: Stage):
    """The body is the identity at first, as of an adapter, so that F returns what it was given and a table."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x + self.table

    stack, xs = stage.stack(Positions), leaves(4, 3)
    return edited(lambda: stack(*xs), *xs, stack, stepped=list(stack.parameters()))


@scene("0")
def test_a_sum_of_two_tables(stage: Stage):
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns = (
                nn.Parameter(torch.randn(4, 3)),
                nn.Parameter(torch.randn(4, 3)),
            )

        def forward(self, x):
            return self.rows + self.columns + x.detach().sin()

    stack, table, x = stage.stack(Tables), nn.Parameter(torch.randn(4, 3)), torch.randn(4, 3)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_a_view_of_a_parameter(stage: Stage):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return self.table.t() + x.detach()

    stack, table, x = stage.stack(Turned), nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_an_offset_among_three_streams(stage: Stage):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.randn(3, 4))

        def forward(self, x, y):
            return (x * y).detach() + self.offset

    stack = stage.sequence(*(stage.fit_step(Both()) for _ in range(4)))
    table, x = nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    return edited(lambda: stack(x + table, x, x + table), table, stack)


@scene("0")
def test_an_offset_in_a_stack_within_a_function(stage: Stage):
    def make():
        inner = stage.stack(lambda: Offset2d(2), depth=1)
        return Lambda(lambda inner, x: torch.cat(inner(*x.chunk(2, -1)), -1), inner)

    class Offset2d(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.offset = nn.Parameter(torch.randn(3, width))

        def forward(self, x):
            return x.detach().sin() + self.offset

    stack, table, x = stage.stack(make), nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0", coupling=ExactAdditive())
def test_an_offset_with_an_exact_coupling(stage: Stage):
    stack, table, x = stage.stack(Offset), nn.Parameter(torch.randn(1, 4, 3)), torch.randn(1, 4, 3)
    return edited(lambda: stack(x + table, x), table, stack)


@scene("0")
def test_gradients_by_autograd_grad_edited_afterwards(stage: Stage):
    stack, table, x = stage.stack(Offset), nn.Parameter(torch.randn(1, 4, 3)), torch.randn(1, 4, 3)
    learned = [table, *(p for p in stack.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss(stack(x + table, x)), learned)
    for i, g in enumerate(found):
        g.mul_(i + 1)
    return list(found)


@scene("0")
def test_a_gradient_that_the_user_gives(stage: Stage):
    """It stays the user's: what accumulates must not lie in its memory."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x.detach().sin() + self.offset

    stack, xs, found = stage.stack(Moved, depth=1), leaves(), []
    given = [torch.ones(3, 4, requires_grad=True), torch.full((3, 4), 2.0, requires_grad=True)]
    for _ in range(2):
        torch.autograd.backward(stack(*xs), [g.detach() for g in given])
        found += [*(g.detach().clone() for g in given), *grads(*xs, stack)]
    for g in given:
        g.grad = g.detach()
    return [*found, share_no_storage(*xs, stack, *given)]


# Plain autograd itself lets gradients share memory here, and so adds up wrongly; Functional() does so for other leaves.
@scene("0", without="Functional")
def test_a_function_that_returns_a_view_of_its_parameter(stage: Stage):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.randn(12))

        def forward(self, x):
            return self.value.view(3, 4)

    stack, xs = stage.stack(Constant), leaves()
    return edited(lambda: stack(*xs), *xs, stack, stepped=list(stack.parameters()))


@scene("0")
def test_a_parameter_returned_to_streams_of_several_stacks(stage: Stage):
    """Two stacks in a row: what leaves one enters the other."""
    first, second = stage.stack(Offset, depth=1), stage.stack(Offset, depth=1)
    table, x = nn.Parameter(torch.randn(1, 4, 3)), torch.randn(1, 4, 3)
    return edited(lambda: second(*first(x + table, x)), table, first, second)


# ---------------------------------------------------------------------------------------------- reached by another way
def gradients_of(stage: Stage, make: Callable[[], nn.Module], *shape: int) -> list[Any]:
    stack, xs = stage.stack(make), leaves(*shape)
    outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


BOUND = "Functional.*(parameter|reach|bound|register)"


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_list_beside_the_registration(stage: Stage):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.randn(4, 4))
            self.ws = [self.w]

        def forward(self, x):
            return torch.tanh(x @ self.ws[0])

    return gradients_of(stage, Listed)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_dict_of_layers_beside_their_registration(stage: Stage):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.by_name = {"first": self.first.weight, "second": self.second.weight}

        def forward(self, x):
            return F.linear(F.linear(x, self.by_name["first"]).tanh(), self.by_name["second"])

    return gradients_of(stage, Chosen)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_closure_over_a_registered_weight(stage: Stage):
    class Closing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = w = nn.Parameter(torch.randn(4, 4))
            self.mix = lambda x: (x @ w).tanh()

        def forward(self, x):
            return self.mix(x)

    return gradients_of(stage, Closing)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_partial_over_a_registered_weight(stage: Stage):
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.mix = functools.partial(F.linear, weight=self.w)

        def forward(self, x):
            return self.mix(x).tanh()

    return gradients_of(stage, Partial)


@scene("1", refusal=BOUND, refusing="Functional")
def test_an_object_that_holds_the_registered_weights(stage: Stage):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
            self.bag = types.SimpleNamespace(w=self.w, b=self.b)

        def forward(self, x):
            return F.linear(x, self.bag.w, self.bag.b).tanh()

    return gradients_of(stage, Bag)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_weight_that_another_module_holds_as_an_attribute(stage: Stage):
    """Tied, and not registered twice, so that state dicts stay small."""

    class Untied(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.__dict__["w"] = w

        def forward(self, x):
            return (x @ self.w).tanh()

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.head = Untied(self.w)

        def forward(self, x):
            return self.head(x)

    return gradients_of(stage, Tied)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_bound_method_kept_beside_the_module(stage: Stage):
    class Methods(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.heads = (self.layer.forward,)

        def forward(self, x):
            return self.heads[0](x).tanh()

    return gradients_of(stage, Methods)


class Again(torch.autograd.Function):
    """Evaluates its module once more in backward, as hand-written checkpoints do."""

    @staticmethod
    def forward(ctx, x, module, *weights):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        weights = list(ctx.module.parameters())
        with torch.enable_grad():
            found = torch.autograd.grad(ctx.module(x), [x, *weights], g)
        return found[0], None, *found[1:]


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_custom_function_whose_backward_evaluates_the_module_again(stage: Stage):
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Again.apply(x, self.layer, *self.layer.parameters())

    return gradients_of(stage, Recomputed)


class Accumulating(torch.autograd.Function):
    """The same, which adds to the gradients of its parameters by itself."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), g)
        return x.grad, None


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_custom_function_whose_backward_adds_to_gradients(stage: Stage):
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Accumulating.apply(x, self.layer)

    return gradients_of(stage, Recomputed)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_custom_function_that_is_not_given_the_weights(stage: Stage):
    """Its weights are read from the module in forward, and their gradients are added by hand in backward."""

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x, layer.weight)
            return x @ layer.weight.t()

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            grad = g.t() @ x
            ctx.layer.weight.grad = grad if ctx.layer.weight.grad is None else ctx.layer.weight.grad + grad
            return g @ w, None

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return ByHand.apply(x, self.layer).tanh()

    return gradients_of(stage, Layer)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_weight_captured_when_the_module_was_built(stage: Stage):
    """Flattened weights, as of fused kernels: views made once of what is registered."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Parameter(torch.randn(20))

        def forward(self, x):
            return F.linear(x, *self.parts()).tanh()

        def parts(self):
            if not hasattr(self, "_parts"):
                flat = self.flat
                self._parts = lambda: (flat[:16].view(4, 4), flat[16:])
            return self._parts()

    return gradients_of(stage, Flat)


@scene("1", refusal=BOUND, refusing="Functional")
def test_a_parameter_list_read_once(stage: Stage):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.weights = [e.weight for e in self.experts]

        def forward(self, x):
            return sum(F.linear(x, w).tanh() for w in self.weights)

    return gradients_of(stage, Experts)
