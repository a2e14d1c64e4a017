"""State that a function reaches by ways of its own: through objects, tuples, other files, tools of the library."""

from __future__ import annotations

import argparse
import collections
import contextlib
import contextvars
import functools
import random
import types
import weakref
from collections.abc import Callable
from random import uniform
from typing import Any

import numpy as np
import pytest
import torch
from common import grads, leaves, loss
from numpy.random import rand
from scenes import Stage, scene
from situations.base import everything, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

TOO_LARGE = "too large to copy"


def steps(stage: Stage, make: Callable[[], nn.Module], look: Callable[[Any], Any], **context: Any) -> list[Any]:
    """Three steps of training, and what the functions hold in the end."""
    stack, found = stage.stack(make), []
    for _ in range(3):
        xs = leaves(3, 4)
        outputs = stack(*xs, **context)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
        stack.zero_grad()
    functions = [m for m in stack.modules() if isinstance(m, Reaching)]
    return [*found, *everything(stack), *map(look, functions)]


class Reaching(nn.Module):
    """A linear layer, and something else that it ``uses`` on its result."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use
        for name, value in held.items():
            object.__setattr__(self, name, value)

    def forward(self, x):
        return self.use(self, self.layer(x)).tanh()


class Meter(nn.Module):
    """Counts in a number, in a list and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count)
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x + 0.01 * self.count + self.mean


# ---------------------------------------------------------------------------------------------- modules beside the tree
def metered(m: Any, x: Tensor) -> Tensor:
    return m.held()(x)


def in_a_weak_reference(meter: Meter) -> Any:
    return weakref.ref(meter)


def in_an_object(meter: Meter) -> Any:
    return Getter(types.SimpleNamespace(meter=meter))


class Getter:
    """A plain object that leads to a module by another one."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __call__(self) -> Meter:
        return self.of.meter


def in_a_namespace(meter: Meter) -> Any:
    return Getter(argparse.Namespace(meter=meter))


ALIVE: list[Meter] = []


@pytest.mark.parametrize("hold", [in_a_weak_reference, in_an_object, in_a_namespace])
@scene("4")
def test_numbers_of_a_module_that_a_function_only_leads_to(stage: Stage, hold: Any):
    ALIVE.clear()

    def make():
        ALIVE.append(Meter().to(torch.get_default_dtype()))
        return Reaching(metered, held=hold(ALIVE[-1]))

    return steps(stage, make, lambda m: (m.held().count, len(m.held().seen), m.held().mean))


@scene("4")
def test_a_batch_norm_in_a_namespace(stage: Stage):
    def make():
        norm = nn.BatchNorm1d(4, affine=False)
        return Reaching(lambda m, x: m.config.norm(x), config=argparse.Namespace(norm=norm))

    def look(m):
        norm = m.config.norm
        return norm.num_batches_tracked.clone(), norm.running_mean.clone(), norm.running_var.clone()

    return steps(stage, make, look)


# ---------------------------------------------------------------------------------------------- tuples
Statistics = collections.namedtuple("Statistics", "mean variance")


@pytest.mark.parametrize("kind", [tuple, Statistics])
@scene("3")
def test_running_statistics_in_a_tuple(stage: Stage, kind: Any):
    def make():
        both = torch.zeros(4), torch.ones(4)
        return Reaching(
            lambda m, x: F.batch_norm(x, *m.running, training=True),
            running=both if kind is tuple else Statistics(*both),
        )

    return steps(stage, make, lambda m: tuple(t.clone() for t in m.running))


@scene("3")
def test_a_tuple_of_a_closure_whose_tensors_move(stage: Stage):
    kept: list[Any] = []

    def make():
        state = (torch.zeros(4), [torch.ones(4)])

        def use(m, x):
            shifted = x - state[0] * state[1][0]
            state[0].lerp_(x.detach().mean(0), 0.5)
            state[1][0].mul_(0.9)
            return shifted

        kept.append(state)
        return Reaching(use)

    return [*steps(stage, make, lambda m: 0), *(t.clone() for state in kept for t in (state[0], *state[1]))]


# ---------------------------------------------------------------------------------------------- large ones
@scene("3", refusal=TOO_LARGE)
def test_a_long_list_of_counts(stage: Stage):
    def use(m, x):
        m.hits[7] += 1
        return x

    return steps(stage, lambda: Reaching(use, hits=[0] * 5000), lambda m: m.hits[7])


@scene("3", refusal=TOO_LARGE)
def test_a_large_dict_of_counts(stage: Stage):
    def use(m, x):
        m.hits[7] += 1
        return x

    return steps(stage, lambda: Reaching(use, hits=dict.fromkeys(range(5000), 0)), lambda m: m.hits[7])


@pytest.mark.parametrize("kind", [list, collections.deque, dict, set])
@scene("3", refusal=TOO_LARGE)
def test_large_containers_of_numbers_that_take_the_place_of_others(stage: Stage, kind: Any):
    """A number that is made when another has gone may lie where that one lay."""

    def in_a_list(m, x):
        m.values.append(m.values.pop() + 0.5)
        m.values.append(m.values.pop() + 0.5)
        return x

    def in_a_dict(m, x):
        for _ in range(2):
            m.values[7.0] = m.values.pop(7.0) + 0.5
        return x

    def in_a_set(m, x):
        largest = max(m.values)
        m.values.remove(largest)
        m.values.add(largest + 0.5)
        return x

    numbers = [float(i) for i in range(5000)]
    use = {dict: in_a_dict, set: in_a_set}.get(kind, in_a_list)
    make = (lambda: dict(zip(numbers, numbers, strict=True))) if kind is dict else lambda: kind(numbers)
    values = lambda m: sum(m.values.values() if kind is dict else m.values)  # noqa: E731
    return steps(stage, lambda: Reaching(use, values=make()), values)


@scene("3", refusal=TOO_LARGE)
def test_a_large_array(stage: Stage):
    def use(m, x):
        m.hits[77_777] += 1
        return x

    return steps(stage, lambda: Reaching(use, hits=np.zeros(200_000)), lambda m: float(m.hits.sum()))


@pytest.mark.parametrize("unseen", [False, True])
@scene("3", refusal=TOO_LARGE)
def test_a_large_bank_of_features(stage: Stage, unseen: bool):
    def by_data(m, x):
        m.bank.data[:3] += 1
        return x

    def in_place(m, x):
        m.bank[:3] += 1
        return x

    use = by_data if unseen else in_place
    return steps(stage, lambda: Reaching(use, bank=torch.zeros(600_000, 4)), lambda m: m.bank[0, 0].item())


# ---------------------------------------------------------------------------------------------- numbers elsewhere
class Config(collections.UserDict):  # type: ignore[type-arg]
    pass


def counted_in_a_namespace(m, x):
    m.config.step += 1
    return x + 0.01 * m.config.step


def counted_in_a_dict_of_the_users(m, x):
    m.config["step"] += 1
    return x + 0.01 * m.config["step"]


def counted_in_a_variable(m, x):
    m.config.set(m.config.get() + 1)
    return x + 0.01 * m.config.get()


def counted_by_itself(m, x):
    counted_by_itself.step += 1
    return x + 0.01 * counted_by_itself.step


@pytest.mark.parametrize(
    ("use", "make"),
    [
        (counted_in_a_namespace, lambda: argparse.Namespace(step=0)),
        (counted_in_a_dict_of_the_users, lambda: collections.UserDict(step=0)),
        (counted_in_a_dict_of_the_users, lambda: Config(step=0)),
        (counted_in_a_variable, lambda: contextvars.ContextVar("step", default=0)),
    ],
)
@scene("3")
def test_a_count_in_an_open_object(stage: Stage, use: Any, make: Any):
    return steps(stage, lambda: Reaching(use, config=make()), lambda m: 0)


@scene("3")
def test_a_count_among_the_attributes_of_a_function(stage: Stage):
    counted_by_itself.step = 0
    return [*steps(stage, lambda: Reaching(counted_by_itself), lambda m: 0), counted_by_itself.step]


# ---------------------------------------------------------------------------------------------- tools
@scene("3", refusal="Functional", refusing="Functional")
def test_training_at_test_time_by_an_optimizer(stage: Stage):
    """A layer learns fast weights within forward, by an optimizer that holds them."""

    class Fast(Reaching):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(lambda m, x: x)
            self.fast = torch.zeros(4, 4, requires_grad=True)
            self.optimizer = torch.optim.SGD([self.fast], lr=0.1, **kwargs)

        def forward(self, x):
            with torch.enable_grad():
                inner = (x.detach() @ self.fast - 1).square().mean()
            (self.fast.grad,) = torch.autograd.grad(inner, self.fast)
            self.optimizer.step()
            return self.layer(x) + x @ self.fast.detach()

    plain = steps(stage, Fast, lambda m: m.fast.detach().clone())
    return plain + steps(stage, lambda: Fast(momentum=0.9), lambda m: m.fast.detach().clone())


@scene("10")
def test_a_weight_that_is_clamped_through_a_list(stage: Stage):
    class Clamped(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.weights = [self.layer.weight]

        def forward(self, x):
            with torch.no_grad():
                self.weights[0].clamp_(-0.2, 0.2).mul_(0.9)
            return self.layer(x).tanh()

    return steps(stage, Clamped, lambda m: 0)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@scene("5")
def test_averages_that_move_unseen_under_a_dispatch_mode(stage: Stage):
    class Averaging(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.register_buffer("mean", torch.ones(4))

        def forward(self, x):
            y = self.layer(x) * self.mean
            self.mean.data.lerp_(x.detach().mean(0), 0.1)
            return y

    with Watching():
        return steps(stage, Averaging, lambda m: 0)


# ---------------------------------------------------------------------------------------------- contexts
class Writes(Reaching):
    def __init__(self):
        super().__init__(lambda m, x: x)

    def forward(self, x, cache):
        cache["keys"] = self.layer(x)
        return cache["keys"].tanh()


class Reads(Writes):
    def forward(self, x, cache):
        return (self.layer(x) * cache["keys"]).tanh()


@scene("9", refusal="Functional", refusing="Functional")
def test_a_dict_that_one_function_fills_and_the_next_reads(stage: Stage):
    stack, xs = stage.sequence((Writes(), Reads()), (Writes(), Reads())), leaves(3, 4)
    outputs = stack(*xs, cache={})
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@scene("3")
def test_maps_that_are_kept_on_demand_and_taken_before_backward(stage: Stage):
    class Mapped(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.maps: list[Tensor] = []

        def forward(self, x, collect=False):
            y = self.layer(x)
            if collect:
                self.maps.append(y.detach().softmax(-1))
            return y.tanh()

    stack, taken, found = stage.stack(Mapped), [], []
    functions = [m for m in stack.modules() if isinstance(m, Mapped)]
    for step in range(3):
        xs = leaves(3, 4)
        outputs = stack(*xs, collect=step > 0)
        taken.append(sum(len(f.maps) for f in functions))
        for f in functions:
            f.maps.clear()
        loss(outputs).backward()
        found += grads(*xs)
    return [*found, *grads(stack), *taken, *(len(f.maps) for f in functions)]


@scene("2")
def test_a_function_that_sets_the_mode_of_its_own_layers(stage: Stage):
    class Frozen(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.norm, self.dropout, self.calls = nn.BatchNorm1d(4), nn.Dropout(0.5), 0

        def forward(self, x):
            self.norm.eval()
            self.calls += 1
            self.dropout.train(self.calls % 2 == 0)
            return self.norm(self.dropout(self.layer(x)))

    return steps(stage, Frozen, lambda m: (m.norm.training, m.dropout.training, m.calls))


# ---------------------------------------------------------------------------------------------- gradients
@scene("1")
def test_a_loss_of_its_own_that_a_function_differentiates(stage: Stage):
    """Local learning: a probe is trained by a loss within the function."""

    class Probed(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.probe = nn.Linear(4, 1)

        def forward(self, x):
            y = self.layer(x).tanh()
            if self.training:
                self.probe(y.detach()).square().mean().backward()
            return y

    stack, found = stage.stack(Probed), []
    for _ in range(2):  # the second adds to gradients that are there
        xs = leaves(3, 4)
        outputs = stack(*xs)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@scene("1", refusal="freezes or thaws", refusing="Functional")
def test_a_function_that_thaws_its_weights_in_turn(stage: Stage):
    class Alternating(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.other, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            self.calls += 1
            self.layer.requires_grad_(self.calls % 2 == 0)
            self.other.requires_grad_(self.calls % 2 == 1)
            return self.other(self.layer(x).tanh())

    stack, found = stage.stack(Alternating), []
    for _ in range(2):
        xs = leaves(3, 4)
        loss(stack(*xs)).backward()
        found += grads(*xs, stack)
    return found


@scene("4")
def test_a_frozen_parameter_that_moves_from_the_second_call_on(stage: Stage):
    class Used(Reaching):
        def __init__(self):
            super().__init__(lambda m, x: x)
            self.uses = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.warm = True

        def forward(self, x):
            if not self.warm:
                self.uses.data.add_(1)
            return self.layer(x).tanh() + 0.1 * self.uses

    stack, found = stage.stack(Used), []
    for _ in range(3):
        xs = leaves(3, 4)
        loss(stack(*xs)).backward()
        found += grads(*xs, stack)
        for m in stack.modules():
            m.warm = False
    return [*found, *everything(stack)]


# ---------------------------------------------------------------------------------------------- other files
def files(name: str) -> Any:
    """A package with a file in it, as if imported."""
    package, inner = types.ModuleType(name), types.ModuleType(f"{name}.settings")
    inner.step, package.settings = 0, inner
    return package


import_of_a_package = files("somebodys_package")
import_of_a_file = import_of_a_package.settings


def counted_in_a_file(m, x):
    import_of_a_file.step += 1
    return x + 0.01 * import_of_a_file.step


def counted_in_a_file_of_a_package(m, x):
    import_of_a_package.settings.step += 1
    return x + 0.01 * import_of_a_package.settings.step


@pytest.mark.parametrize("use", [counted_in_a_file, counted_in_a_file_of_a_package])
@scene("3")
def test_a_count_in_another_file(stage: Stage, use: Any):
    import_of_a_file.step = 0
    return [*steps(stage, lambda: Reaching(use), lambda m: 0), import_of_a_file.step]


# ---------------------------------------------------------------------------------------------- generators
SHARED = torch.Generator()


def from_torch(m, x):
    return x * torch.rand(x.shape, generator=m.torch)


def from_a_global(m, x):
    return x * torch.rand(x.shape, generator=SHARED)


def from_python(m, x):
    return x * (m.python.random() + random.random() + uniform(0.0, 1.0) + m.drawn())


def from_numpy(m, x):
    return x * torch.from_numpy(m.numpy.random(x.shape) + m.older.rand(*x.shape) + np.random.random_sample(x.shape))


def from_numpy_by_name(m, x):
    return x * rand()


def normal_from_numpy(m, x):  # which draws two at once and keeps one for later
    return x * (m.older.randn(3)[0] + np.random.normal())


DRAWN = functools.partial(torch.rand, generator=SHARED)
PAIRED = SHARED, "cpu"
import_of_a_file.generator = SHARED


def from_a_partial(m, x):
    return x * DRAWN(x.shape)


def from_a_tuple(m, x):
    return x * torch.rand(x.shape, generator=PAIRED[0], device=PAIRED[1])


def from_a_file(m, x):
    return x * torch.rand(x.shape, generator=import_of_a_file.generator)


def from_a_module_as_an_attribute(m, x):
    return x * (m.numbers.rand() + m.numbers.normal())


def from_a_module_as_a_default(m, x, numbers=np.random):
    return x * numbers.rand()


def from_a_module_imported_inside(m, x):
    from random import random

    import numpy

    return x * (numpy.random.rand() + random())


DRAWING = [
    *(from_torch, from_a_global, from_python, from_numpy, from_numpy_by_name, normal_from_numpy, from_a_partial),
    *(from_a_tuple, from_a_file, from_a_module_as_an_attribute, from_a_module_as_a_default),
    from_a_module_imported_inside,
]


@pytest.mark.parametrize("zero", [False, True], ids=["", "before zeros"])
@pytest.mark.parametrize("draw", DRAWING)
@scene("1")
def test_generators_that_a_function_finds(stage: Stage, draw: Any, zero: bool):
    """Also where a last layer starts at zero, so that no stream tells. In the end all stand where naive leaves them."""
    np.random.seed(0)
    SHARED.manual_seed(0)

    def make():
        python = random.Random(2)
        held = {"numpy": np.random.default_rng(0), "older": np.random.RandomState(1), "python": python}
        own = torch.Generator().manual_seed(3)
        noisy = Reaching(draw, torch=own, drawn=python.random, numbers=np.random, **held)
        last = nn.Linear(4, 4)
        if zero:
            nn.init.zeros_(last.weight)
        return nn.Sequential(noisy, last)

    def look(m):
        return [m.python.random(), m.numpy.random(), m.older.rand(), torch.rand(1, generator=m.torch)]

    after = random.random(), np.random.rand(), np.random.normal(), torch.rand(1, generator=SHARED)
    return [steps(stage, make, look), *after]


# ---------------------------------------------------------------------------------------------- numbers by name
TEMPERATURE, ACTIVATION, BOUNDS = 1.0, torch.tanh, (0.9, 1.0)
import_of_a_file.temperature = 1.0


@contextlib.contextmanager
def another_temperature(value):
    global TEMPERATURE, ACTIVATION, BOUNDS
    TEMPERATURE, import_of_a_file.temperature, BOUNDS, ACTIVATION = value, value, (0.9, value), torch.sigmoid
    try:
        yield
    finally:
        TEMPERATURE = import_of_a_file.temperature = 1.0
        ACTIVATION, BOUNDS = torch.tanh, (0.9, 1.0)


def by_a_global_number(m, x):
    return (x * TEMPERATURE).tanh()


def by_a_number_in_a_file(m, x):
    return (x * import_of_a_file.temperature).tanh()


def by_a_global_tuple(m, x):
    return (x * BOUNDS[1]).tanh()


def by_a_global_function(m, x):
    return ACTIVATION(x)


@pytest.mark.parametrize("use", [by_a_global_number, by_a_number_in_a_file, by_a_global_tuple, by_a_global_function])
@scene("3")
def test_a_global_variable_that_is_another_in_backward(stage: Stage, use: Any):
    """Far less than a tolerance, and far more."""
    stack, found = stage.stack(lambda: Reaching(use)), []
    for value in (1 + 1e-9, 0.5):
        xs = leaves(3, 4)
        with another_temperature(value):
            total = loss(stack(*xs))
        total.backward()
        found += [*grads(*xs, stack), TEMPERATURE, import_of_a_file.temperature]
        stack.zero_grad()
    return found


@scene("3")
def test_counts_that_the_first_call_sets(stage: Stage):
    """As attributes of a class, and of a function."""

    class Counted(Reaching):
        def forward(self, x):
            Counted.calls = getattr(Counted, "calls", 0) + 1
            return self.use(self, self.layer(x)) * 0.9**Counted.calls

    def counted(m, x):
        counted.calls = getattr(counted, "calls", 0) + 1
        return x * 0.9**counted.calls

    return [*train(stage.stack(lambda: Counted(counted)), steps=3), Counted.calls, counted.calls]
