"""What a function changes when it runs: layers, containers, statistics, buffers, weights."""

from __future__ import annotations

import array
import collections
import dataclasses
import inspect
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import Lambda, grads, leaves, loss
from scenes import RECOMPUTING, Stage, scene
from situations.base import everything, train
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import ReversibleSequence
from revlib.guards import module_state


def trained(stage: Stage, make: Callable[[], nn.Module], *shape: int, steps: int = 4, **context: Any) -> list[Any]:
    """So many steps with an optimizer that learns what there is when it steps."""
    stack, found = stage.stack(make), []
    for _ in range(steps):
        xs = leaves(*shape)
        outputs = stack(*xs, **context)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
        with torch.no_grad():
            for p in stack.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad)
        stack.zero_grad()
    return [*found, *everything(stack)]


# ---------------------------------------------------------------------------------------------- built by the first call
REGISTERED = "Functional.*parameter"  # what is not there before forward is no argument of it


class Building(nn.Module):
    """Builds what it needs when it first sees its input."""

    def __init__(self, build: Callable[[nn.Module, Tensor], None], use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.build, self.use, self.ready = build, use, False

    def forward(self, x):
        if not self.ready:
            self.build(self, x)
            self.ready = True
        return self.use(self, x)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_that_the_first_forward_builds(stage: Stage):
    class Built(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = None

        def forward(self, x):
            if self.proj is None:
                self.proj = nn.Linear(x.shape[-1], x.shape[-1])
            return self.proj(x)

    return trained(stage, Built)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_parameter_that_the_first_forward_registers(stage: Stage):
    def build(m, x):
        m.register_parameter("scale", nn.Parameter(x.detach().std(0)))

    return trained(stage, lambda: Building(build, lambda m, x: (x * m.scale).tanh()))


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_parameter_assigned_in_forward(stage: Stage):
    class Assigned(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("shift", None)

        def forward(self, x):
            if self.shift is None:
                self.shift = nn.Parameter(-x.detach().mean(0))
            return (x + self.shift).sin()

    return trained(stage, Assigned)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_added_to_a_module_list(stage: Stage):
    def build(m, x):
        m.layers = nn.ModuleList()
        for _ in range(2):
            m.layers.append(nn.Linear(4, 4))

    return trained(stage, lambda: Building(build, lambda m, x: m.layers[1](m.layers[0](x).tanh())))


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_added_to_a_module_dict_by_need(stage: Stage):
    """An adapter for each width, made where it is first met."""

    class Adapters(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.ModuleDict()

        def forward(self, x):
            key = str(x.shape[-1])
            if key not in self.adapters:
                self.adapters[key] = nn.Linear(x.shape[-1], x.shape[-1])
            return self.adapters[key](x).tanh()

    return trained(stage, Adapters)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_added_by_need_before_dropout(stage: Stage):
    """Building draws random numbers, and so the dropout after it draws others the first time."""

    class Adapters(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters, self.drop = nn.ModuleDict(), nn.Dropout(0.4)

        def forward(self, x):
            key = str(x.shape[-1])
            if key not in self.adapters:
                self.adapters[key] = nn.Linear(x.shape[-1], x.shape[-1])
            return self.adapters[key](self.drop(x)).tanh()

    return trained(stage, Adapters)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_with_dropout_built_by_the_first_forward(stage: Stage):
    def build(m, x):
        m.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 4))

    return trained(stage, lambda: Building(build, lambda m, x: m.body(x)))


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_buffer_that_the_first_forward_builds_from_its_input(stage: Stage):
    def build(m, x):
        m.register_buffer("mean", x.detach().mean(0))

    return trained(stage, lambda: Building(build, lambda m, x: (x - m.mean).sin()))


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_that_forward_replaces_each_time(stage: Stage):
    """Grown by one unit at each call, as in progressive networks."""

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 1), nn.Linear(1, 4)

        def forward(self, x):
            n = self.up.out_features + 1
            up, down = nn.Linear(4, n), nn.Linear(n, 4)
            with torch.no_grad():
                up.weight[: n - 1], down.weight[:, : n - 1] = self.up.weight, self.down.weight
            self.up, self.down = up, down
            return self.down(self.up(x).tanh())

    return trained(stage, Growing)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_lazy_layer_beside_another(stage: Stage):
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LazyLinear(4), nn.LazyBatchNorm1d())

    return trained(stage, make)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_hook_that_builds_a_layer(stage: Stage):
    """As parametrizations and adapters that wait for a shape."""

    def make():
        m = nn.Sequential(nn.Linear(4, 4))

        def build(m, args):
            if len(m) == 1:
                m.append(nn.Linear(args[0].shape[-1], 4))

        m.register_forward_pre_hook(build)
        return m

    return trained(stage, make)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_layer_of_a_child_built_by_its_parent(stage: Stage):
    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = None

        def forward(self, x):
            return self.proj(x)

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, x):
            if self.child.proj is None:
                self.child.proj = nn.Linear(x.shape[-1], 4)
            return self.child(x).tanh()

    return trained(stage, Parent)


@scene("2", refusal=REGISTERED, refusing="Functional")
def test_a_parametrization_that_forward_registers(stage: Stage):
    class Scaled(nn.Module):
        def forward(self, w):
            return 0.5 * w

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            if not torch.nn.utils.parametrize.is_parametrized(self.linear):
                torch.nn.utils.parametrize.register_parametrization(self.linear, "weight", Scaled())
            return self.linear(x)

    return trained(stage, Late)


# ---------------------------------------------------------------------------------------------- containers
NAMED = r"\bkept\b|\bcalls\b|\bcache\b|closure"  # restored, or refused by name


class Holding(nn.Module):
    """Computes with a state that lives in ``kept``, as ``use`` says."""

    def __init__(self, kept: Any, use: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.kept, self.use = nn.Linear(4, 4), kept, use

    def forward(self, x):
        return self.use(self, x)


def holding(
    stage: Stage,
    kept: Callable[[], Any],
    use: Callable[[Any, Tensor], Any],
    look: Callable[[Any], Any],
) -> Any:
    """Training, and what its states say at the end."""
    stack = stage.stack(lambda: Holding(kept(), use))
    parts = [f for pair in stack for f in pair]
    found = []
    for _ in range(3):
        xs = leaves()
        outputs = stack(*xs)
        states = [look(f.kept) for f in parts]
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack), *states, *(look(f.kept) for f in parts)]
        stack.zero_grad()
    return found


def scaled(read: Callable[[Any], float]) -> Callable[[Any, Tensor], Tensor]:
    """A function that scales its result by its state, which no saved tensor shows."""

    def use(m, x):
        count = read(m.kept)
        return m.linear(x) * 0.9**count

    return use


def counted(read: Callable[[Any], float]) -> Callable[[Any, Tensor], Tensor]:
    """A function that first reads and changes its state, then computes with it."""

    def use(m, x):
        factor = 0.9 ** read(m.kept)
        return m.linear(x * factor).tanh()

    return use


@scene("3", refusal=NAMED)
def test_a_count_in_a_dict(stage: Stage):
    def read(kept):
        kept["calls"] += 1
        return kept["calls"]

    return holding(stage, lambda: {"calls": 0}, counted(read), lambda kept: kept["calls"])


@scene("3", refusal=NAMED)
def test_a_count_in_a_list(stage: Stage):
    def read(kept):
        kept[0] += 1
        return kept[0]

    return holding(stage, lambda: [0], counted(read), lambda kept: kept[0])


@scene("3", refusal=NAMED)
def test_a_count_in_a_dict_that_scales_the_result(stage: Stage):
    def read(kept):
        kept["calls"] += 1
        return kept["calls"]

    return holding(stage, lambda: {"calls": 0}, scaled(read), lambda kept: kept["calls"])


@scene("3", refusal=NAMED)
def test_a_plain_object_that_scales_the_result(stage: Stage):
    def read(kept):
        kept.calls += 1
        return kept.calls

    return holding(stage, lambda: types.SimpleNamespace(calls=0), scaled(read), lambda kept: kept.calls)


@scene("3", refusal=NAMED)
def test_a_schedule_that_scales_the_result(stage: Stage):
    return holding(stage, lambda: iter(range(1, 99)), scaled(next), lambda kept: kept.__length_hint__())


@scene("3", refusal=NAMED)
def test_a_counter_by_name(stage: Stage):
    def read(kept):
        kept["calls"] += 1
        return kept["calls"]

    return holding(stage, collections.Counter, counted(read), lambda kept: kept["calls"])


@scene("3", refusal=NAMED)
def test_a_default_dict(stage: Stage):
    def read(kept):
        kept["steps"].append(len(kept["steps"]))
        return len(kept["steps"])

    return holding(stage, lambda: collections.defaultdict(list), counted(read), lambda kept: len(kept["steps"]))


@scene("3", refusal=NAMED)
def test_a_plain_object(stage: Stage):
    def read(kept):
        kept.calls += 1
        return kept.calls

    return holding(stage, lambda: types.SimpleNamespace(calls=0), counted(read), lambda kept: kept.calls)


@scene("3", refusal=NAMED)
def test_a_dataclass_with_slots(stage: Stage):
    @dataclasses.dataclass(slots=True)
    class State:
        calls: int = 0

    def read(kept):
        kept.calls += 1
        return kept.calls

    return holding(stage, State, counted(read), lambda kept: kept.calls)


@scene("3", refusal=NAMED)
def test_a_deque_of_recent_means(stage: Stage):
    def use(m, x):
        m.kept.append(x.detach().mean())
        return m.linear(x * (1 + sum(m.kept)))

    return holding(stage, lambda: collections.deque(maxlen=3), use, list)


@scene("3", refusal=NAMED)
def test_a_numpy_array(stage: Stage):
    def read(kept):
        kept += 1
        return float(kept[0])

    return holding(stage, lambda: np.zeros(2), counted(read), lambda kept: float(kept.sum()))


@scene("3", refusal=NAMED)
def test_an_array(stage: Stage):
    def read(kept):
        kept[0] += 1
        return kept[0]

    return holding(stage, lambda: array.array("d", [0.0]), counted(read), lambda kept: kept[0])


@scene("3", refusal=NAMED)
def test_an_iterator(stage: Stage):
    """A schedule that is read once a call."""
    return holding(stage, lambda: itertools.count(1), counted(next), lambda kept: repr(kept))


@scene("3", refusal=NAMED)
def test_a_generator_of_noise_levels(stage: Stage):
    def levels():
        sigma = 1.0
        while True:
            yield sigma
            sigma *= 1.5

    return holding(stage, levels, counted(next), lambda kept: None)


@scene("3", refusal=NAMED)
def test_a_list_of_tensors_from_the_last_call(stage: Stage):
    """Transformer-XL: attends to what it saw last time."""

    def use(m, x):
        old, m.kept[0] = m.kept[0], x.detach()
        return m.linear(x + 0.3 * old)

    return holding(stage, lambda: [torch.zeros(3, 4)], use, lambda kept: kept[0])


@scene("3", refusal=NAMED)
def test_a_dict_of_tensors_that_grows(stage: Stage):
    """A key-value cache."""

    def use(m, x):
        m.kept["k"] = torch.cat([m.kept["k"], x.detach()]) if "k" in m.kept else x.detach()
        return F.scaled_dot_product_attention(m.linear(x), m.kept["k"], m.kept["k"])

    return holding(stage, dict, use, lambda kept: len(kept.get("k", ())))


@scene("3", refusal=NAMED)
def test_a_nested_container(stage: Stage):
    def read(kept):
        kept["a"][0]["calls"] += 1
        return kept["a"][0]["calls"]

    return holding(stage, lambda: {"a": [{"calls": 0}]}, counted(read), lambda kept: kept["a"][0]["calls"])


@scene("3", refusal=NAMED)
def test_a_set_of_what_was_seen(stage: Stage):
    def read(kept):
        kept.add(len(kept))
        return len(kept)

    return holding(stage, set, counted(read), len)


@scene("3", refusal=NAMED)
def test_an_attribute_of_a_parameter(stage: Stage):
    def use(m, x):
        m.linear.weight.calls = getattr(m.linear.weight, "calls", 0) + 1
        return m.linear(x * 0.9**m.linear.weight.calls)

    stack, found = stage.stack(lambda: Holding(None, use)), []
    for _ in range(3):
        xs = leaves()
        loss(stack(*xs)).backward()
        found += [*grads(*xs, stack), *(f.linear.weight.calls for pair in stack for f in pair)]
    return found


class Warmed(nn.Module):
    """A class-level count, shared by all blocks."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        type(self).calls += 1
        return self.linear(x * 0.99**self.calls)


@scene("3", refusal=NAMED)
def test_an_attribute_of_the_class(stage: Stage):
    Warmed.calls = 0
    stack, found = stage.stack(Warmed), []
    for _ in range(3):
        xs = leaves()
        loss(stack(*xs)).backward()
        found += [*grads(*xs, stack), Warmed.calls]
    return found


@scene("3", refusal=NAMED)
def test_a_variable_of_a_closure(stage: Stage):
    def make():
        calls = 0

        def use(linear, x):
            nonlocal calls
            calls += 1
            return linear(x * 0.9**calls)

        return Lambda(use, nn.Linear(4, 4))

    return train(stage.stack(make), steps=3)


CALLS, COUNTS = 0, np.zeros(3)


@scene("3", refusal=NAMED)
def test_a_global_variable(stage: Stage):
    global CALLS
    CALLS = 0

    def use(linear, x):
        global CALLS
        CALLS += 1
        return linear(x * 0.97**CALLS)

    return [*train(stage.stack(lambda: Lambda(use, nn.Linear(4, 4))), steps=3), CALLS]


@scene("3", refusal=NAMED)
def test_a_global_array(stage: Stage):
    """One that is read as well, and one that is only written."""
    COUNTS[:] = 0

    def use(linear, x):
        COUNTS[0] += 1
        COUNTS[1:] += x.detach().numpy().mean()
        return linear(x * 0.97 ** COUNTS[0])

    return [*train(stage.stack(lambda: Lambda(use, nn.Linear(4, 4))), steps=3), torch.from_numpy(COUNTS).clone()]


@scene("3", refusal=NAMED)
def test_a_default_argument(stage: Stage):
    def use(linear, x, calls=[0]):  # noqa: B006
        calls[0] += 1
        return linear(x * 0.97 ** calls[0])

    use.__defaults__[0][0] = 0
    return [
        *train(stage.stack(lambda: Lambda(use, nn.Linear(4, 4))), steps=3),
        use.__defaults__[0][0],
    ]


MEAN = torch.zeros(4, dtype=torch.float64)
FILE: Any = types.ModuleType("settings_of_a_user")
BOTH = torch.zeros(4, dtype=torch.float64), [torch.ones(4, dtype=torch.float64)]


def moved_by(mean: Tensor, x: Tensor) -> Tensor:
    mean.lerp_(x.detach().mean(0), 0.5)
    return x - mean


def by_a_global_tensor():
    return (lambda linear, x: moved_by(MEAN, linear(x)).tanh()), MEAN


def by_a_global_tuple():
    return (lambda linear, x: moved_by(BOTH[0], linear(x)).tanh()), BOTH[0]


def by_a_default(mean):
    return (lambda linear, x, mean=mean: moved_by(mean, linear(x)).tanh()), mean


def by_a_default_in_a_tuple(mean):
    return (lambda linear, x, state=(mean, 3): moved_by(state[0], linear(x)).tanh()), mean


def by_a_keyword(mean):
    return (lambda linear, x, *, mean=mean: moved_by(mean, linear(x)).tanh()), mean


def by_another_file(mean):
    FILE.mean = mean
    return (lambda linear, x: moved_by(FILE.mean, linear(x)).tanh()), mean


def only_written(mean):
    def use(linear, x, mean=mean):
        moved_by(mean, x)
        return linear(x).tanh()

    return use, mean


TENSORS = [by_a_global_tensor, by_a_global_tuple, by_a_default, by_a_default_in_a_tuple, by_a_keyword]


@pytest.mark.parametrize("held", [*TENSORS, by_another_file, only_written])
@scene("3")
def test_a_tensor_that_a_function_moves_wherever_it_finds_it(stage: Stage, held: Any):
    """All functions of the stack move the same one, or each its own. The file holds the last."""
    tensors: list[Tensor] = []

    def make():
        use, mean = held(torch.zeros(4)) if inspect.signature(held).parameters else held()
        tensors.append(mean)
        return Lambda(use, nn.Linear(4, 4))

    MEAN.zero_()
    BOTH[0].zero_()
    return [*train(stage.stack(make), steps=3), *(mean.clone() for mean in tensors)]


@scene("3", refusal="modified by an inplace operation|recovered what enters")
def test_a_tensor_that_one_function_reads_and_a_later_one_moves(stage: Stage):
    mean = torch.ones(4)
    functions = iter([lambda linear, x: linear(x) + mean, *[lambda linear, x: moved_by(mean, linear(x))] * 7])
    return [*train(stage.stack(lambda: Lambda(next(functions), nn.Linear(4, 4))), steps=2), mean]


@scene("3")
def test_not_a_number_among_captured_tensors(stage: Stage):
    """It is not equal to itself, but nobody has changed it."""
    mask, scale = torch.ones(3, 4), torch.ones(3, 4)
    mask[1, 2] = scale[0, 1] = torch.nan
    scale.requires_grad_()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.mask = nn.Linear(4, 4), mask

        def forward(self, x, scale=None):
            return torch.where(self.mask.isnan(), x, self.linear(x)) * kept[0].nan_to_num(0.5)

    kept = [scale]
    return [*train(stage.stack(Masked), scale=scale), scale.grad]


@pytest.mark.parametrize("edit", ["data", "numpy"])
@scene("3", refusal="context tensor|tensor of its context", refusing="Functional")
def test_a_captured_tensor_of_the_context_that_is_edited_unseen(stage: Stage, edit: str):
    scale = torch.ones(4).requires_grad_()
    kept = [scale]

    def use(linear, x, scale=None):
        if edit == "data":
            kept[0].data.mul_(0.9)
        else:
            kept[0].detach().numpy()[:] *= 0.9
        return linear(x) * kept[0]

    functions = iter([use, *[lambda linear, x: linear(x)] * 7])
    stack = stage.stack(lambda: Lambda(next(functions), nn.Linear(4, 4)))
    return [*train(stack, scale=scale), scale.grad, scale]


@scene("3", refusal=NAMED)
def test_an_object_in_the_context(stage: Stage):
    """A cache that the caller hands down, as transformers do with past_key_values."""

    class Cache:
        def __init__(self):
            self.calls = 0

    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, cache):
            cache.calls += 1
            return self.linear(x * 0.97**cache.calls)

    cache = Cache()
    return [*train(stage.stack(Using), steps=3, cache=cache), cache.calls]


@scene("3", refusal=NAMED)
def test_losses_gathered_in_a_list_for_later(stage: Stage):
    """Load-balancing losses of experts, summed up by the training loop. Those of forward are the ones that count."""

    def use(m, x):
        gate = m.linear(x).softmax(-1)
        m.kept.append(gate.square().mean())
        return x * gate

    stack = stage.stack(lambda: Holding([], use))
    parts, found = [f for pair in stack for f in pair], []
    for _ in range(2):
        xs = leaves()
        outputs = stack(*xs)
        (loss(outputs) + sum(sum(f.kept) for f in parts)).backward()
        found += [*grads(*xs, stack), *(len(f.kept) for f in parts)]
        for f in parts:
            f.kept.clear()
    return found


@scene("3", refusal=NAMED)
def test_values_logged_to_a_list(stage: Stage):
    """Nothing is computed with them: but there must be one a call."""

    def use(m, x):
        y = m.linear(x).tanh()
        m.kept.append(float(y.detach().norm()))
        return y

    stack = stage.stack(lambda: Holding([], use))
    found = train(stack, steps=3)
    return [*found, *(len(f.kept) for pair in stack for f in pair)]


@scene("3", refusal=NAMED, tolerance=1e-3)
def test_a_list_of_tensors_under_bfloat16(stage: Stage):
    def use(m, x):
        old, m.kept[0] = m.kept[0], x.detach()
        return m.linear(x + 0.3 * old)

    stack = stage.stack(lambda: Holding([torch.zeros(3, 4, dtype=torch.float32)], use), depth=3).float()
    found = []
    for _ in range(4):
        xs = leaves(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = stack(*xs)
        loss(outputs).backward()
        found += grads(*xs, stack)
    return found


# ---------------------------------------------------------------------------------------------- modules not found
UNKNOWN = "statistic|running_mean|num_batches_tracked|buffer|BatchNorm"


def statistics(stage: Stage, functions: list[Any], tracking: nn.Module, **context: Any) -> list[Any]:
    """One step, and what a norm has counted. Twice is wrong, and a refusal must come before."""
    stack = stage.sequence(*functions)
    xs = leaves(6, 4)
    outputs = stack(*xs, **context)
    stage.intact(lambda: everything(tracking))
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack, tracking), *everything(tracking)]


class Using(nn.Module):
    """A norm that it gets at in some way."""

    def __init__(self, get: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.linear, self.get = nn.Linear(4, 4), get

    def forward(self, x):
        return self.get(self)(self.linear(x)).tanh()


@scene("4", refusal=UNKNOWN)
def test_a_norm_passed_as_context(stage: Stage):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, norm):
            return norm(self.linear(x))

    norm = nn.BatchNorm1d(4)
    return statistics(stage, [(Conditional(), Conditional())], norm, norm=norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_list_of_the_context(stage: Stage):
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, norms):
            return norms["a"][0](self.linear(x))

    norm = nn.BatchNorm1d(4)
    return statistics(stage, [(Conditional(), Conditional())], norm, norms={"a": [norm]})


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_the_dict_of_the_module(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norm)
    f.__dict__["norm"] = norm
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_plain_object(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.box.norm)
    f.box = types.SimpleNamespace(norm=norm)
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_an_ordered_dict(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norms["a"])
    f.norms = collections.OrderedDict(a=norm)
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_behind_a_weak_reference(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norm())
    f.norm = weakref.ref(norm)
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_weak_dictionary(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norms["a"])
    f.norms = weakref.WeakValueDictionary(a=norm)
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_list_of_many(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norms[40])
    f.norms = [nn.Identity() for _ in range(40)] + [norm]
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_norms_of_many_domains(stage: Stage):
    """One norm a domain, as of style transfer, chosen by the context."""

    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = [nn.BatchNorm1d(4) for _ in range(40)]

        def forward(self, x, domain):
            return self.norms[domain](x)

    f = Domains()
    return statistics(stage, [(f, nn.Linear(4, 4))], f.norms[7], domain=7)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_named_tuple(stage: Stage):
    Parts = collections.namedtuple("Parts", "norm")
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.parts.norm)
    f.parts = Parts(norm)
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_in_a_deque(stage: Stage):
    norm, f = nn.BatchNorm1d(4), Using(lambda m: m.norms[0])
    f.norms = collections.deque([norm])
    return statistics(stage, [(f, nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_of_the_class(stage: Stage):
    class Shared(nn.Module):
        norm = nn.BatchNorm1d(4)

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return type(self).norm(self.linear(x))

    return statistics(stage, [(Shared(), nn.Linear(4, 4))], Shared.norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_that_a_property_looks_up(stage: Stage):
    registry = {}

    class Looking(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            registry[id(self)] = norm

        @property
        def norm(self):
            return registry[id(self)]

        def forward(self, x):
            return self.norm(self.linear(x))

    norm = nn.BatchNorm1d(4)
    return statistics(stage, [(Looking(norm), nn.Linear(4, 4))], norm)


@scene("4", refusal=UNKNOWN)
def test_a_norm_of_a_callable_object(stage: Stage):
    class Normalising:
        def __init__(self, norm):
            self.norm = norm

        def __call__(self, x):
            return self.norm(x).tanh()

    norm, xs = nn.BatchNorm1d(4), leaves(6, 4)
    outputs = stage.run([(Normalising(norm), torch.sin)], *xs)
    stage.intact(lambda: everything(norm))
    loss(outputs).backward()
    return [*outputs, *grads(*xs, norm), *everything(norm)]


@scene("4", refusal=UNKNOWN)
def test_a_method_of_an_object_that_holds_a_model(stage: Stage):
    """A trainer, whose methods are the functions."""

    class Trainer:
        def __init__(self):
            self.model = nn.ModuleDict({"norm": nn.BatchNorm1d(4)})

        def mix(self, x):
            return self.model["norm"](x).tanh()

    trainer, xs = Trainer(), leaves(6, 4)
    outputs = stage.run([(trainer.mix, torch.sin)], *xs)
    stage.intact(lambda: everything(trainer.model))
    loss(outputs).backward()
    return [*outputs, *grads(*xs, trainer.model), *everything(trainer.model)]


@scene("4", refusal=UNKNOWN)
def test_statistics_that_are_plain_tensors_elsewhere(stage: Stage):
    """Batch norm as a function, on tensors that no module has."""
    mean, variance = torch.zeros(4), torch.ones(4)

    def normalise(linear, x):
        return F.batch_norm(linear(x), mean, variance, training=True)

    stack, xs = stage.stack(lambda: Lambda(normalise, nn.Linear(4, 4)), depth=1), leaves(6, 4)
    outputs = stack(*xs)
    stage.intact(lambda: [mean, variance])
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack), mean, variance]


# ---------------------------------------------------------------------------------------------- edited buffers
class Codebook(nn.Module):
    """Vector quantisation by moving averages, with a straight-through gradient."""

    def __init__(self, edit: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.linear, self.edit = nn.Linear(4, 4), edit
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("sizes", torch.ones(5))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        x = self.linear(x)
        with torch.no_grad():
            chosen = torch.cdist(x, self.codes).argmin(-1)
            hot = F.one_hot(chosen, 5).to(x.dtype)
        quantised = self.codes[chosen]
        if self.training:
            self.edit(self, x.detach(), hot)
        return x + (quantised - x).detach()


@scene("5")
def test_a_codebook_that_moves_through_data(stage: Stage):
    def edit(m, x, hot):
        m.sizes.data.mul_(0.99).add_(hot.sum(0), alpha=0.01)
        m.codes.data.mul_(0.99).add_(hot.t() @ x, alpha=0.01)

    return train(stage.stack(lambda: Codebook(edit)), 6, 4, steps=3)


@scene("5")
def test_a_codebook_that_moves_hardly_at_all(stage: Stage):
    def edit(m, x, hot):
        m.codes.data.lerp_(hot.t() @ x, 1e-3)

    return train(stage.stack(lambda: Codebook(edit)), 6, 4, steps=3)


@scene("5")
def test_a_codebook_that_is_copied_into(stage: Stage):
    def edit(m, x, hot):
        m.codes.data.copy_(0.9 * m.codes + 0.1 * (hot.t() @ x))

    return train(stage.stack(lambda: Codebook(edit)), 6, 4, steps=3)


@scene("5")
def test_a_codebook_whose_data_is_replaced(stage: Stage):
    def edit(m, x, hot):
        m.codes.data = 0.9 * m.codes.data + 0.1 * (hot.t() @ x)

    return train(stage.stack(lambda: Codebook(edit)), 6, 4, steps=3)


@scene("5")
def test_codes_initialised_from_the_first_batch(stage: Stage):
    """k-means, once."""

    class Initialised(Codebook):
        def forward(self, x):
            if not self.ready:
                self.codes.data.copy_(self.linear(x).detach()[:5])
                self.ready.data.fill_(True)
            return super().forward(x)

    return train(stage.stack(lambda: Initialised(lambda m, x, hot: None)), 6, 4, steps=3)


@scene("5")
def test_codes_that_are_dead_replaced_at_random(stage: Stage):
    def edit(m, x, hot):
        dead = hot.sum(0) == 0
        m.codes.data[dead] = x[torch.randint(len(x), (int(dead.sum()),))]

    return train(stage.stack(lambda: Codebook(edit)), 6, 4, steps=3)


@scene("5")
def test_a_moving_average_that_subtracts(stage: Stage):
    """Centering, as of DINO: computed with before it is updated."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("center", torch.zeros(1, 4))

        def forward(self, x):
            y = self.linear(x) - self.center
            self.center.data = self.center * 0.999 + y.detach().mean(0, keepdim=True) * 0.001
            return y.tanh()

    return train(stage.stack(Centred), 6, 4, steps=3)


@scene("5")
def test_a_metric_that_nobody_computes_with(stage: Stage):
    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("total", torch.zeros(()))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            y = self.linear(x).tanh()
            self.total.data += y.detach().norm()
            self.calls.data += 1
            return y

    return train(stage.stack(Metered), 6, 4, steps=3)


@scene("5")
def test_a_metric_kept_as_a_plain_attribute(stage: Stage):
    """Refused over a tensor that nobody differentiates."""

    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.total = nn.Linear(4, 4), torch.zeros(())

        def forward(self, x):
            y = self.linear(x).tanh()
            self.total += y.detach().norm()
            return y

    stack = stage.stack(Metered)
    return [*train(stack, 6, 4, steps=3), *(f.total for pair in stack for f in pair)]


@scene("5")
def test_a_histogram_by_numpy(stage: Stage):
    """Written through memory that torch and NumPy share: no version moves."""

    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("counts", torch.zeros(4))

        def forward(self, x):
            y = self.linear(x).tanh() * (1 + self.counts / 10)
            self.counts.numpy()[:] += 1
            return y

    return train(stage.stack(Metered), 6, 4, steps=3)


@scene("5")
def test_a_buffer_edited_through_a_view_made_before(stage: Stage):
    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("state", torch.zeros(2, 4))
            self.first = self.state.data[0]

        def forward(self, x):
            y = self.linear(x).tanh() * (1 + self.state[0])
            self.first.add_(0.1)
            return y

    return train(stage.stack(Metered), 6, 4, steps=3)


@scene("5")
def test_running_statistics_by_data(stage: Stage):
    """A norm of the user's own, in training and in eval mode."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x):
            self.mean.data.lerp_(x.detach().mean(0), 0.1)
            self.variance.data.lerp_(x.detach().var(0), 0.1)
            return self.weight * (x - self.mean) * (self.variance + 1e-5).rsqrt()

    return train(stage.stack(Normalised), 6, 4, steps=3)


class Rarely(nn.Module):
    """Adds a bias that it moves in every second call, or in the first call only."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.linear, self.every, self.calls = nn.Linear(4, 4), every, 0
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x):
        y = torch.tanh(self.linear(x) + self.bias)
        self.calls += 1
        if self.every and self.calls % self.every == 0:
            self.bias.add_(y.detach().mean(0))
        return y


MOVED = "buffer 'bias' of .* was modified"


@pytest.mark.parametrize("every", [1, 2, 3])
@scene("5", refusal=MOVED, refusing="Functional")  # whose last step runs without a copy of what it moves
def test_a_function_of_several_steps_that_moves_a_buffer_in_some_calls(stage: Stage, every: int):
    shared = Rarely(every)
    return train(stage.sequence(*[(shared, shared)] * 3), 6, 4, steps=2)


@scene("5", refusal=MOVED, refusing=f"{RECOMPUTING} Functional")
def test_a_buffer_that_moves_in_some_calls_and_by_hand(stage: Stage):
    """What moves it between forward and backward is no run of the function, so nobody has a copy."""
    shared = Rarely(0)
    stack, xs = stage.sequence(*[(shared, shared)] * 2), leaves(6, 4)
    y = stack(*xs)
    shared.bias.add_(1.0)
    loss(y).backward()
    return [*y, *grads(*xs, stack)]


@pytest.mark.parametrize("reverse", [False, True])
@scene("5")
def test_two_forwards_of_which_one_moves_a_buffer(stage: Stage, reverse: bool):
    """The second forward moves what the first only read."""
    stack = stage.stack(lambda: Rarely(2))
    xs, zs = leaves(6, 4), leaves(6, 4)
    losses = [loss(stack(*xs)), loss(stack(*zs))]
    for found in reversed(losses) if reverse else losses:
        found.backward()
    return [*losses, *grads(*xs, *zs, stack), *everything(stack)]


# ---------------------------------------------------------------------------------------------- own weights edited
@scene("10")
def test_an_embedding_with_max_norm(stage: Stage):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4, max_norm=1.0)

        def forward(self, x):
            return x * self.table(torch.arange(6))

    return train(stage.stack(Positions), 6, 4)


@scene("10")
def test_an_embedding_bag_with_max_norm(stage: Stage):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(6, 4, max_norm=1.0, mode="sum")

        def forward(self, x):
            return x * self.table(torch.arange(6).view(3, 2))

    return train(stage.stack(Bags))


@scene("10")
def test_an_initialisation_that_depends_on_data(stage: Stage):
    class ActNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
            self.register_buffer("ready", torch.tensor(False))

        def forward(self, x):
            if not self.ready:
                with torch.no_grad():
                    self.shift.copy_(-x.mean(0))
                    self.scale.copy_(-x.std(0).log())
                    self.ready.fill_(True)
            return (x + self.shift) * self.scale.exp()

    return train(stage.stack(ActNorm), 6, 4)


@scene("10")
def test_an_initialisation_noted_in_a_plain_flag(stage: Stage):
    class Initialised(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.ready = nn.Linear(4, 4), False

        def forward(self, x):
            if not self.ready:
                self.linear.weight.data.div_(self.linear(x).detach().std())
                self.ready = True
            return self.linear(x)

    return train(stage.stack(Initialised), 6, 4)


@scene("10")
def test_weights_clamped_in_forward(stage: Stage):
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.clamp_(-0.2, 0.2)
            return self.linear(x).tanh()

    return train(stage.stack(Clamped))


@scene("10")
def test_weights_clamped_through_data(stage: Stage):
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.linear.weight.data.clamp_(-0.2, 0.2)
            return self.linear(x).tanh()

    return train(stage.stack(Clamped))


@scene("10")
def test_weights_decayed_through_data(stage: Stage):
    """No version moves, and each call sees other values."""

    class Decayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.linear.weight.data.mul_(0.9)
            return self.linear(x).tanh()

    return train(stage.stack(Decayed))


class Decaying(nn.Module):
    """Its weight decays, from some call on or in training only, by an edit that is not the same when made twice."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.linear, self.after, self.calls = nn.Linear(4, 4), after, 0

    @torch.no_grad()
    def decay(self) -> None:
        self.linear.weight.mul_(0.8)

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > self.after:
            self.decay()
        return self.linear(x).tanh()


@pytest.mark.parametrize("after", [1, 2])
@scene("10")
def test_weights_decayed_from_a_later_call_on(stage: Stage, after: int):
    return train(stage.stack(lambda: Decaying(after)), 6, 4, steps=4)


@scene("10")
def test_weights_decayed_in_training_after_a_first_look_in_eval_mode(stage: Stage):
    stack = stage.stack(Decaying).eval()
    return [*train(stack, 6, 4, steps=1), *train(stack.train(), 6, 4, steps=2)]


def test_parameters_of_ordinary_functions_are_copied_in_their_first_call_only(monkeypatch):
    """Such as that of a class with an initialisation of its own, whose operations edit in place by their names."""

    class Ordinary(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.init_weights()

        def init_weights(self):
            with torch.no_grad():
                nn.init.trunc_normal_(self.linear.weight).mul_(0.1)

        def forward(self, x):
            return self.linear(x).tanh()

    copied, can_be_copied = [], module_state._can_be_copied
    monkeypatch.setattr(module_state, "_can_be_copied", lambda p: copied.append(p.shape) or can_be_copied(p))
    stack, editing = (ReversibleSequence([(make(), make()) for _ in range(2)]) for make in (Ordinary, Decaying))
    counts = []
    for _ in range(3):
        for each in (stack, editing):
            copied.clear()
            loss(each(*leaves(6, 4, dtype=torch.float32))).backward()
            counts.append(len(copied))
    assert counts == [8, 8, 0, 8, 0, 8]  # a weight and a bias of four functions


class Bounded(nn.Module):
    """Edits in training by an operation of torch's, of which the user's code has no name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, x):
        self.table.max_norm = 0.5 if self.training else None
        return x * self.table(torch.arange(6) % 8)


@scene("10")
def test_a_table_bounded_in_training_after_a_first_look_in_eval_mode(stage: Stage):
    stack = stage.stack(Bounded).eval()
    return [*train(stack, 6, 4, steps=1), *train(stack.train(), 6, 4, steps=2)]


@scene("10")
def test_weights_of_unit_length(stage: Stage):
    """Magnitude-preserving layers: forced to unit length whenever they train."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.weight.copy_(F.normalize(self.weight, dim=1))
            return F.linear(x, F.normalize(self.weight, dim=1))

    return train(stage.stack(Unit))


@scene("10")
def test_a_momentum_encoder_updated_in_forward(stage: Stage):
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                for p, q in zip(self.online.parameters(), self.target.parameters(), strict=True):
                    q.mul_(0.9).add_(p, alpha=0.1)
                goal = self.target(x)
            return self.online(x) * goal.sigmoid()

    return train(stage.stack(Momentum))


@scene("10")
def test_a_parameter_that_forward_decays(stage: Stage):
    """Each call sees another value than the one before: a temperature, annealed."""

    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.temperature = (
                nn.Linear(4, 4),
                nn.Parameter(torch.ones(()), requires_grad=False),
            )

        def forward(self, x):
            with torch.no_grad():
                self.temperature.mul_(0.9)
            return (self.linear(x) / self.temperature).tanh()

    return train(stage.stack(Annealed), steps=3)


@scene("10")
def test_weights_renormalised_by_a_pre_hook(stage: Stage):
    def make():
        layer = nn.Linear(4, 4)

        def renormalise(m, args):
            with torch.no_grad():
                m.weight.renorm_(2, 0, 0.5)

        layer.register_forward_pre_hook(renormalise)
        return nn.Sequential(layer, nn.Tanh())

    return train(stage.stack(make))


@scene("10")
def test_weights_whose_data_is_replaced(stage: Stage):
    class Orthogonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            self.weight.data = torch.linalg.qr(self.weight.data)[0]
            return (x @ self.weight).tanh()

    return train(stage.stack(Orthogonal))


@scene("10")
def test_a_shared_weight_that_every_step_edits(stage: Stage):
    class Clamped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            with torch.no_grad():
                self.linear.bias.mul_(0.9)
            return self.linear(x.sin())

    linear = nn.Linear(4, 4)
    return train(stage.sequence((Clamped(linear), Clamped(linear)), (Clamped(linear), Clamped(linear))))


@scene("10", refusal="edits its own parameters", refusing="Functional")
def test_second_derivatives_of_functions_that_edit_their_weights(stage: Stage):
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.mul_(0.9)
            return self.linear(x.sin()).tanh()

    stack, xs = stage.stack(Shrinking), leaves()
    learned = [*xs, *stack.parameters()]
    first = torch.autograd.grad(loss(stack(*xs)), learned, create_graph=True)
    sum(g.square().sum() for g in first).backward()
    return [*first, *grads(*xs, stack)]
