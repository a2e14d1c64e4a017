"""Kinds of tensors, as streams."""

import warnings

import torch
from common import Lambda, grads, leaves, loss, mlp
from torch import nn

from situations.base import Setting, situation, train, train_on


def conv():
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 1))


def batches(change, *shape: int):
    return [[change(x.detach()).requires_grad_() for x in leaves(*shape)] for _ in range(2)]


@situation("channels_last")
def channels_last(setting: Setting):
    stack = setting.stack(conv).to(memory_format=torch.channels_last)
    found = train_on(batches(lambda x: x.to(memory_format=torch.channels_last), 2, 4, 5, 5), stack)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    return found


@situation("transposed, strided and expanded streams, views of one tensor")
def views(setting: Setting):
    stack, (base,), (row,), (wide,) = setting.stack(), leaves(4, 3, count=1), leaves(4, count=1), leaves(3, 8, count=1)
    loss(stack(base.t(), row.expand(3, 4))).backward()
    loss(stack(*wide.chunk(2, -1))).backward()
    loss(stack(wide[:, ::2], wide[:, 1::2])).backward()
    return grads(base, row, wide, stack)


@situation("functions that do one thing to streams with gaps, and another to others")
def layouts(setting: Setting):
    def look(m, x):
        return m(x).tanh() if x.stride(-1) == 1 else m(x.sin())

    stack, (a, b) = setting.stack(lambda: Lambda(look, nn.Linear(4, 4))), leaves(3, 8)
    outputs = stack(a[:, ::2], b[:, ::2])
    loss(outputs).backward()
    return [*outputs, *grads(a, b, stack)]


@situation("the same tensor in both streams")
def same(setting: Setting):
    stack, (x, _) = setting.stack(), leaves()
    loss(stack(x, x)).backward()
    return grads(x, stack)


@situation("streams without gradient")
def constant(setting: Setting):
    stack, xs, found = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())), leaves(), []
    for needing in ((), (0,), (1,)):
        for i, x in enumerate(xs):
            x.requires_grad_(i in needing)
        found.append(train_on([xs], stack))
    return found


@situation("a parameter as a stream")
def parameter(setting: Setting):
    stack, tokens = setting.stack(), nn.Parameter(torch.randn(3, 4))
    loss(stack(tokens, tokens.sin())).backward()
    return grads(tokens, stack)


@situation("zero-length batches")
def empty(setting: Setting):
    return [train(setting.stack(), 0, 4), train(setting.stack(), 2, 0, 4)]


@situation("batches of one, of another size each step")
def sizes(setting: Setting):
    return train_on([leaves(n, 4) for n in (1, 5, 1, 3)], setting.stack())


@situation("streams without dimensions")
def scalars(setting: Setting):
    a, xs = nn.Parameter(torch.tensor(0.7)), [torch.tensor(v, requires_grad=True) for v in (0.3, -1.2)]
    loss(setting.run([(lambda x: (a * x).sin(), torch.cos)] * 2, *xs)).backward()
    return grads(*xs, a)


@situation("streams of different widths and ranks")
def widths(setting: Setting):
    stack, pool = setting.sequence(*((mlp(3, 5), mlp(5, 3)) for _ in range(2))), lambda m, x: m(x).mean(1)
    found = train_on([[*leaves(2, 5, count=1), *leaves(2, 3, count=1)] for _ in range(2)], stack)
    spread = lambda m, x: m(x)[:, None].expand(2, 6, 4)  # noqa: E731
    stack = setting.sequence((Lambda(spread, nn.Linear(4, 4)), Lambda(pool, nn.Linear(4, 4))))
    return [found, train_on([[*leaves(2, 6, 4, count=1), *leaves(2, 4, count=1)]], stack)]


@situation("complex streams")
def complex_streams(setting: Setting):
    stack = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex128), nn.Tanh()))
    return train_on([leaves(dtype=torch.complex128) for _ in range(2)], stack)


@situation("complex streams that are lazily conjugated")
def conjugated(setting: Setting):
    stack, xs = (
        setting.stack(lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex128), nn.Tanh())),
        leaves(dtype=torch.complex128),
    )
    loss(stack(xs[0].conj(), xs[1].mT.conj().mT)).backward()
    return grads(*xs, stack)


# 24 bits, of a sum of about ten rounded steps, one of them divided by 0.9 or exp(-1).
@situation("float32 streams", tolerance=1e-5)
def float32(setting: Setting):
    stack = setting.stack().float()
    return train_on([leaves(8, 4, dtype=torch.float32) for _ in range(2)], stack)


# 8 bits. What is lost of the streams is a few roundings of 2**-8, and gradients inherit it.
@situation("bfloat16 parameters and streams", tolerance=0.1)
def bfloat16(setting: Setting):
    stack = setting.stack().bfloat16()
    return train_on([leaves(8, 4, dtype=torch.bfloat16)], stack)


# 11 bits.
@situation("float16 parameters and streams", tolerance=0.02)
def float16(setting: Setting):
    stack = setting.stack().half()
    return train_on([leaves(8, 4, dtype=torch.float16)], stack)


# float32 functions between float64 streams: each repeats its bits wherever its stream comes back to float32's.
@situation("float64 streams through float32 functions", tolerance=1e-6)
def mixed(setting: Setting):
    return train(setting.stack(lambda: Lambda(lambda m, x: m(x.float()).double(), mlp().float())))


@situation("streams of different precision", tolerance=1e-6)
def two_precisions(setting: Setting):
    def f(m, x):
        return m(x.double()).tanh()

    def g(m, x):
        return m(x).tanh().float()

    stack = setting.sequence((Lambda(f, nn.Linear(4, 4)), Lambda(g, nn.Linear(4, 4))))
    outputs = stack(*(xs := [*leaves(count=1), *leaves(count=1, dtype=torch.float32)]))
    loss([y.double() for y in outputs]).backward()
    return [*outputs, *grads(*xs, stack)]


# Of a stream of 1e8 float64 keeps 8 digits behind the point, and the function's gradients feel them.
@situation("streams of magnitude 1e8", tolerance=1e-7)
def huge(setting: Setting):
    (x1, x2), stack = leaves(), setting.stack()
    outputs = stack(1e8 * x1, 1e8 * x2)
    loss([y / 1e8 for y in outputs]).backward()
    return [*outputs, *grads(x1, x2, stack)]


@situation("a stream of 1 under results of 1e18")
def swallowed(setting: Setting):
    xs = leaves(16, 4)
    loss(setting.run([(lambda x: 1e18 * x.sin(), lambda x: x.cos())], *xs)).backward()
    return grads(*xs)


@situation("streams of 1e-300, and of zeros")
def tiny(setting: Setting):
    stack = setting.stack()
    return [train_on(batches(lambda x: 1e-300 * x), stack), train_on(batches(torch.zeros_like), stack)]


def finite_or_not(tensors):
    """NaN equals nothing: where there are any, and the rest."""
    return [(t.isnan(), t.nan_to_num()) for t in tensors if t is not None]


@situation("a NaN, or an infinity, in one sample")
def nan(setting: Setting):
    found = []
    for value in (float("nan"), float("inf")):
        stack, xs = setting.stack(), leaves(8, 4)
        with torch.no_grad():
            xs[0][3, 1] = value
        outputs = stack(*xs)
        loss(outputs).backward()
        found += finite_or_not([*outputs, *grads(*xs, stack)])
    return found


@situation("a NaN that a function makes in a step that goes on")
def nan_inside(setting: Setting):
    stack, xs = setting.stack(lambda: Lambda(lambda m, x: m(x).log(), nn.Linear(4, 4)), depth=1), leaves()
    outputs = stack(*xs)
    loss(outputs).backward()
    return finite_or_not([*outputs, *grads(*xs, stack)])


@situation("integer streams")
def integers(setting: Setting):
    (x,) = leaves(count=1)
    outputs = setting.run([(lambda x: x.sin(), lambda x: x.cos())], torch.arange(12).view(3, 4), x)
    loss(outputs).backward()
    return grads(x)


@situation("a stream that is no tensor")
def no_tensor(setting: Setting):
    return setting.stack()(leaves(count=1)[0], 1.0)


@situation("one stream only")
def one_stream(setting: Setting):
    return setting.stack()(leaves(count=1)[0])


def jagged():
    parts = [torch.randn(n, 4) for n in (2, 3, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, it says
        return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@situation("nested tensors: jagged layout")
def nested_tensors(setting: Setting):
    stack, x = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU())), jagged()
    outputs = stack(x, x.sin())
    loss([y.values() for y in outputs]).backward()
    return [*(y.values() for y in outputs), x.grad.values(), *grads(stack)]


@situation("nested tensors: strided layout")
def strided_nested_tensors(setting: Setting):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3)], requires_grad=True)
    stack = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    outputs = stack(x, x * 2)
    loss([y.to_padded_tensor(0.0) for y in outputs]).backward()
    return [x.grad.to_padded_tensor(0.0), *grads(stack)]


@situation("sparse streams")
def sparse(setting: Setting):
    x, y = (t.detach().relu().to_sparse().requires_grad_() for t in leaves())
    outputs = setting.run([(lambda s: s * 2.0, lambda s: s * 3.0)], x, y)
    sum(t.to_dense().square().sum() for t in outputs).backward()
    return [t.to_dense() for t in (*outputs, x.grad, y.grad)]


class Tagged(torch.Tensor):
    """Keeps its class through operations, by torch's default."""


@situation("a subclass by __torch_function__")
def subclass(setting: Setting):
    stack = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    xs = [x.detach().as_subclass(Tagged).requires_grad_() for x in leaves()]
    outputs = stack(*xs)
    assert all(type(y) is Tagged for y in outputs)
    loss(outputs).backward()
    return [y.as_subclass(torch.Tensor) for y in (*outputs, *grads(*xs, stack))]


@situation("a wrapper subclass by __torch_dispatch__")
def wrapper_subclass(setting: Setting):
    from torch.testing._internal.two_tensor import TwoTensor

    stack = setting.stack(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    xs = [TwoTensor(x.detach(), 2 * x.detach()).requires_grad_() for x in leaves()]
    outputs = stack(*xs)
    loss(outputs).backward()
    return [t for y in (*outputs, *(x.grad for x in xs)) for t in (y.a, y.b)]


@situation("masked tensors")
def masked(setting: Setting):
    from torch.masked import masked_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = torch.randn(3, 4) > 0
        xs = [masked_tensor(x.detach(), mask, requires_grad=True) for x in leaves()]
        outputs = setting.run([(torch.sin, torch.cos)] * 2, *xs)
        outputs[1].sum().backward()
        return [x.grad.get_data().nan_to_num() for x in xs]


@situation("meta tensors: shapes only", only="Additive()")
def meta(setting: Setting):
    with torch.device("meta"):
        stack, xs = setting.stack(), [torch.empty(3, 4, requires_grad=True) for _ in range(2)]
    outputs = stack(*xs)
    loss(outputs).backward()
    assert all(g.is_meta for g in grads(*xs, stack))
    return [1.0, *(g.shape for g in grads(*xs, stack))]


@situation("fake tensors: memory planned without memory", only="Additive()")
def fake(setting: Setting):
    with torch._subclasses.FakeTensorMode():
        stack = setting.stack(lambda: mlp(dropout=0.1))
        loss(stack(*leaves(1000, 4))).backward()
        return [1.0, *(g.shape for g in grads(stack))]


@situation("a model moved to another dtype between steps")
def moved(setting: Setting):
    stack = setting.stack().float()
    loss(stack(*leaves(dtype=torch.float32))).backward()
    stack.zero_grad()
    return train(stack.double())
