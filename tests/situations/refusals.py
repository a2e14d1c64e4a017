"""Changes between forward and backward, and misuse."""

import copy
import operator

import torch
from common import Lambda, grads, leaves, loss, mlp
from torch import nn
from torch.nn.utils import parametrize

from situations.base import Setting, situation, train


def changed(setting: Setting, change, make=mlp, **context):
    """Gradients, where ``change(stack, streams, outputs)`` happens between forward and backward."""
    stack, xs = setting.stack(make), leaves()
    parameters = list(stack.parameters())
    streams = [x * 1 for x in xs]
    outputs = stack(*streams, **context)
    total = sum((i + 1) * y.sum() for i, y in enumerate(outputs))  # a loss that keeps no output itself
    if setting.meddle:
        with torch.no_grad():
            change(stack, streams, outputs)
    total.backward()
    return [g.clone() if g is not None else None for g in (t.grad for t in (*xs, *parameters))]


# ---------------------------------------------------------------------------------------------- edits in place
@situation("the first output edited in place")
def first_output(setting: Setting):
    return changed(setting, lambda stack, xs, ys: ys[0].add_(1))


@situation("the last output edited in place")
def last_output(setting: Setting):
    return changed(setting, lambda stack, xs, ys: ys[1].add_(1))


@situation("an output edited in place as part of the graph: y.relu_()")
def output_in_the_graph(setting: Setting):
    stack, xs = setting.stack(), leaves()
    y1, y2 = stack(*xs)
    loss([y1.mul_(2), y2.sigmoid_()]).backward()
    return grads(*xs, stack)


@situation("a computed input edited in place")
def computed_input(setting: Setting):
    return changed(setting, lambda stack, xs, ys: xs[0].zero_())


@situation("an input that the first function sees edited in place")
def seen_input(setting: Setting):
    return changed(setting, lambda stack, xs, ys: xs[1].zero_())


@situation("a weight edited in place")
def weight(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[0].G[4].weight.mul_(1.1))


@situation("a bias edited in place, which no gradient needs")
def bias(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[0].F[4].bias.add_(1))


@situation("an optimizer's step before backward")
def early_step(setting: Setting):
    stack, xs = setting.stack(), leaves()
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    first, second = loss(stack(*xs)), loss(stack(*xs))
    first.backward()
    optimizer.step()
    second.backward()
    return grads(*xs, stack)


@situation("load_state_dict before backward")
def early_load(setting: Setting):
    def load(stack, xs, ys):
        stack.load_state_dict({k: 2 * v for k, v in stack.state_dict().items()})

    return changed(setting, load)


@situation("load_state_dict(assign=True) before backward")
def early_assignment(setting: Setting):
    def load(stack, xs, ys):
        stack.load_state_dict({k: 2 * v for k, v in stack.state_dict().items()}, assign=True)

    return changed(setting, load)


@situation("a weight edited behind autograd's back, through .data")
def data_edited(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[1].F[1].weight.data.mul_(1.5))


@situation("the last weight of a function edited through .data")
def last_data_edited(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[1].F[4].weight.data.mul_(1.5))


@situation("a weight's .data replaced, as by offloading libraries")
def data_replaced(setting: Setting):
    def replace(stack, xs, ys):
        stack[1].F[4].weight.data = stack[1].F[4].weight.data * 1.5

    return changed(setting, replace)


@situation("weights freed after forward, and back before backward")
def data_away(setting: Setting):
    def there_and_back(stack, xs, ys):
        for p in stack.parameters():
            home, p.data = p.data, torch.empty(0)
            p.data = home.clone()

    return changed(setting, there_and_back)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("gain", torch.ones(4))

    def forward(self, x):
        return self.linear(x).tanh() * self.gain


@situation("a buffer edited in place")
def buffer(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[1].F.gain.mul_(2), Buffered)


@situation("a buffer replaced")
def buffer_replaced(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[1].F, "gain", 2 * stack[1].F.gain), Buffered)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale):
        return (self.linear(x) * scale["a"]).tanh()


@situation("a context tensor edited in place")
def context_edited(setting: Setting):
    scale = {"a": torch.ones(4)}
    return changed(setting, lambda stack, xs, ys: scale["a"].mul_(2), Conditioned, scale=scale)


@situation("a context dict given other tensors")
def context_replaced(setting: Setting):
    scale = {"a": torch.ones(4)}
    return changed(setting, lambda stack, xs, ys: scale.update(a=torch.zeros(4)), Conditioned, scale=scale)


@situation("a captured tensor edited in place")
def captured(setting: Setting):
    scale = torch.ones(4)
    make = lambda: Lambda(lambda m, x: (m(x) * scale).tanh(), nn.Linear(4, 4))  # noqa: E731
    return changed(setting, lambda stack, xs, ys: scale.mul_(2), make)


@situation("a captured tensor edited in place, of many that a function sums")
def captured_of_many(setting: Setting):
    scales = [torch.ones(4) for _ in range(5)]
    make = lambda: Lambda(lambda m, x: sum(m(x) * s for s in scales), nn.Linear(4, 4))  # noqa: E731
    return changed(setting, lambda stack, xs, ys: scales[0].mul_(2), make)


@situation("a captured tensor replaced, of many that a function sums")
def captured_replaced(setting: Setting):
    scales = [torch.ones(4) for _ in range(5)]
    make = lambda: Lambda(lambda m, x: sum(m(x) * s for s in scales), nn.Linear(4, 4))  # noqa: E731
    return changed(setting, lambda stack, xs, ys: operator.setitem(scales, 0, 2 * scales[0]), make)


@situation("a function that edits its stream in place")
def stream_edited(setting: Setting):
    class Editing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                x.mul_(2)
            return self.linear(x)

    (a, b), stack = leaves(), setting.stack(Editing)
    loss(stack(a * 1, b * 1)).backward()
    return grads(a, b, stack)


@situation("a function that edits its own saved tensors in place")
def saved_edited(setting: Setting):
    def edits(m, x):
        h = m(x).tanh()
        h.add_(x)
        return h.sin()

    return train(setting.stack(lambda: Lambda(edits, nn.Linear(4, 4))))


# ---------------------------------------------------------------------------------------------- modules exchanged
@situation("modes switched: train() to eval()")
def mode(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack.eval(), lambda: mlp(dropout=0.5))


@situation("a layer of a function replaced: stack[0].F[1] = other")
def layer_replaced(setting: Setting):
    other = nn.Linear(4, 8)
    return changed(setting, lambda stack, xs, ys: stack[0].F.__setitem__(1, other))


@situation("the last layer of a function replaced")
def last_layer_replaced(setting: Setting):
    other = nn.Linear(8, 4)
    return changed(setting, lambda stack, xs, ys: stack[1].F.__setitem__(4, other))


@situation("a layer appended to a function")
def layer_appended(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[1].F.append(nn.Tanh()))


@situation("a whole function replaced: stack[0].F = other")
def function_replaced(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[0], "F", nn.Tanh()))


@situation("a forward method monkey-patched")
def patched(setting: Setting):
    def patch(stack, xs, ys):
        stack[1].F[4].forward = lambda x: x[:, :4] * 3

    return changed(setting, patch)


@situation("a forward method monkey-patched before forward, and restored")
def unpatched(setting: Setting):
    stack, xs = setting.stack(), leaves()
    linear = stack[1].F[4]
    linear.forward = lambda x: x[:, :4] * linear.weight[:, :4].sum(0)
    total = loss(stack(*xs))
    del linear.forward
    total.backward()
    return grads(*xs, stack)


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.activation = nn.Linear(4, 4), 1.0, torch.tanh

    def forward(self, x):
        return self.linear(self.activation(self.scale * x))


@situation("a plain attribute changed: F.scale = 2.0")
def attribute(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[1].F, "scale", 2.0), Configured)


class Shifted(nn.Module):
    def __init__(self, step: float = 0.0):
        super().__init__()
        self.linear, self.shift, self.step = nn.Linear(4, 4), torch.ones(4), step

    def forward(self, x):
        h = (self.linear(x) + self.shift).tanh()
        if self.step:
            self.shift += self.step
        return h


@situation("a tensor attribute replaced: F.shift = torch.zeros(4)")
def tensor_attribute(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[1].F, "shift", torch.zeros(4)), Shifted)


@situation("a tensor attribute edited in place, by less than is tolerated")
def tensor_attribute_edited(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack[1].F.shift.mul_(1 + 1e-8), Shifted)


@situation("a function that edits its tensor attribute in place")
def tensor_attribute_updated(setting: Setting):
    return train(setting.stack(lambda: Shifted(1e-8)))


@situation("an attribute that is a function changed: F.activation = torch.sin")
def attribute_function(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[1].F, "activation", torch.sin), Configured)


@situation("dropout's p changed")
def dropout_changed(setting: Setting):
    return changed(setting, lambda stack, xs, ys: setattr(stack[1].F[3], "p", 0.1), lambda: mlp(dropout=0.5))


@situation("a parametrization registered")
def parametrization_registered(setting: Setting):
    def register(stack, xs, ys):
        parametrize.register_parametrization(stack[1].F[1], "weight", nn.Tanh())

    return changed(setting, register)


@situation("steps removed from the stack, the coupling exchanged")
def stack_changed(setting: Setting):
    def change(stack, xs, ys):
        del stack._modules["0"]
        stack.coupling = type(stack)().coupling

    return changed(setting, change)


@situation("the model moved to another dtype")
def moved(setting: Setting):
    return changed(setting, lambda stack, xs, ys: stack.float())


@situation("a copy made, trained and thrown away")
def copied(setting: Setting):
    def copy_and_train(stack, xs, ys):
        with torch.enable_grad():
            train(copy.deepcopy(stack))

    return changed(setting, copy_and_train)


@situation("another forward and backward of the same stack")
def another_pass(setting: Setting):
    def go(stack, xs, ys):
        with torch.enable_grad():
            loss(stack(*leaves())).backward()

    return changed(setting, go, lambda: mlp(dropout=0.3))


# ---------------------------------------------------------------------------------------------- misuse
@situation("a second backward without retain_graph")
def second_backward(setting: Setting):
    total = loss(setting.stack()(*leaves()))
    total.backward()
    total.backward()


@situation("a function whose result does not fit its stream")
def misfit(setting: Setting):
    return train(setting.stack(lambda: nn.Linear(4, 5)))


@situation("a function that returns integers")
def integer_result(setting: Setting):
    (x, y) = leaves()
    loss(setting.run([(lambda x: x.round().long(), lambda x: x.sin())], x, y)).backward()
    return grads(x, y)


@situation("a function that returns nothing")
def no_result(setting: Setting):
    return setting.run([(lambda x: None, lambda x: x.sin())], *leaves())


@situation("a function that returns complex numbers into a real stream")
def complex_result(setting: Setting):
    xs = leaves()
    outputs = setting.run([(lambda x: x * 1j, lambda x: x.real.sin())], *xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs)]
