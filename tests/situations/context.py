"""Context and captured tensors."""

import torch
from common import Lambda, grads, leaves, loss
from torch import nn
from torch.nn import functional as F

from situations.base import Setting, situation, train


class Conditioned(nn.Module):
    """Passes a linear layer's result and the context to a function."""

    def __init__(self, use):
        super().__init__()
        self.linear, self.use = nn.Linear(4, 4), use

    def forward(self, x, context):
        return self.use(self.linear(x), context).tanh()


@situation("a context tensor that is learned, or computed")
def learned_context(setting: Setting):
    stack, (raw,) = setting.stack(lambda: Conditioned(torch.mul)), leaves(4, count=1)
    return [train(stack, context=raw), train(stack, steps=1, context=raw.exp()), *grads(raw)]


@situation("context in nested lists and dicts, with numbers, text and None")
def nested_context(setting: Setting):
    scale, shift = leaves(4, count=2)
    context = {"deep": {"scale": scale}, "list": [shift, None, "text", 3]}
    use = lambda h, c: h * c["deep"]["scale"] + c["list"][0] ** c["list"][3]  # noqa: E731
    return [train(setting.stack(lambda: Conditioned(use)), context=context), *grads(scale, shift)]


@situation("context that only some functions name, and defaults")
def routed_context(setting: Setting):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, *, scale, times=2):
            return (self.linear(x) * scale * times).tanh()

    (scale,) = leaves(4, count=1)
    stack = setting.sequence((Scaled(), nn.Tanh()), (nn.Linear(4, 4), Scaled()))
    return [train(stack, scale=scale), train(stack, scale=scale, times=3), *grads(scale)]


@situation("a context name that no function takes")
def unknown_context(setting: Setting):
    stack = setting.stack(lambda: Conditioned(torch.mul))
    if type(setting.scheduler).__name__ == "ByHand":  # which passes what is named, and no more
        stack(*leaves(), contxt=torch.ones(4))
    return train(stack, contxt=torch.ones(4))


@situation("integer context: class labels, positions, indices")
def integer_context(setting: Setting):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, x, labels):
            x = self.linear(x) + self.table(labels)
            return x.gather(1, labels[:, None].expand(3, 4) % 4).tanh() + F.one_hot(labels % 4, 4) * x.sin()

    return train(setting.stack(Labelled), labels=torch.tensor([0, 4, 2]))


@situation("masks: boolean, and minus infinity")
def masks(setting: Setting):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x, allowed, bias):
            q, k, v = self.qkv(x).chunk(3, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            y = y.masked_fill(~allowed[:, :1], 0.0) + F.scaled_dot_product_attention(k, q, v, attn_mask=bias)
            return y.tanh()

    causal = torch.ones(3, 3).tril()
    return train(setting.stack(Masked), 2, 3, 4, allowed=causal.bool(), bias=causal.log())


@situation("complex context, learned: rotary phases")
def complex_context(setting: Setting):
    phases = torch.polar(torch.ones(2), torch.randn(2)).requires_grad_()
    use = lambda h, c: torch.view_as_real(torch.view_as_complex(h.view(3, 2, 2)) * c).flatten(1)  # noqa: E731
    return [train(setting.stack(lambda: Conditioned(use)), context=phases), *grads(phases)]


@situation("sparse context: the adjacency of a graph")
def sparse_context(setting: Setting):
    adjacency = torch.eye(3).roll(1, 0).to_sparse()
    return train(setting.stack(lambda: Conditioned(lambda h, c: torch.sparse.mm(c, h))), context=adjacency)


@situation("context made in inference mode")
def inference_context(setting: Setting):
    with torch.inference_mode():
        scale = torch.randn(4)
    return train(setting.stack(lambda: Conditioned(torch.add)), context=scale)


@situation("context that is also a stream, or a parameter of the stack")
def doubled_context(setting: Setting):
    stack, xs = setting.stack(lambda: Conditioned(torch.mul)), leaves()
    loss(stack(*xs, context=xs[0])).backward()
    loss(stack(*xs, context=stack[0].F.linear.bias)).backward()
    return grads(*xs, stack)


@situation("a context tensor edited after backward, between steps")
def context_between_steps(setting: Setting):
    stack, scale, found = setting.stack(lambda: Conditioned(torch.mul)), torch.ones(4), []
    for _ in range(3):
        found.append(train(stack, steps=1, context=scale))
        scale.mul_(1.5)
    return found


@situation("a list in the context that functions append to")
def appended_context(setting: Setting):
    told: list = []

    def use(h, c):
        c.append(h.square().mean())
        return h

    stack, xs = setting.stack(lambda: Conditioned(use)), leaves()
    main = loss(stack(*xs, context=told))
    (main + sum(told)).backward()
    return [len(told), *grads(*xs, stack)]


@situation("tensors captured by closure, learned or computed")
def closures(setting: Setting):
    (w,), (bias, raw), xs = leaves(4, 4, count=1), leaves(4), leaves()
    scale = raw.exp()
    functions = [(lambda x: (x @ w).tanh() * scale, lambda x: (x @ w.t() + bias).sin())] * 2
    loss(setting.run(functions, *xs)).backward()
    return grads(*xs, w, bias, raw)


@situation("modules captured by closure: batch norm, dropout")
def captured_modules(setting: Setting):
    norm, drop, linear, xs = nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 4), leaves(6, 4)
    loss(setting.run([(lambda x: drop(linear(norm(x))), torch.sin)] * 2, *xs)).backward()
    return [*grads(*xs, norm, linear), norm.running_mean, norm.num_batches_tracked]


@situation("modules that a function keeps in a plain list, unregistered")
def unregistered(setting: Setting):
    norm = nn.BatchNorm1d(4)

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.hidden = nn.Linear(4, 4), [norm]

        def forward(self, x):
            return self.hidden[0](self.linear(x)).tanh()

    return [train(setting.stack(Hiding), 6, 4), norm.running_mean, norm.num_batches_tracked]


@situation("a module whose function, an attribute, captures a module")
def captured_by_attribute(setting: Setting):
    norm = nn.BatchNorm1d(4)
    stack = setting.stack(lambda: Lambda(lambda m, x: norm(m(x)).tanh(), nn.Linear(4, 4)))
    return [train(stack, 6, 4), norm.running_mean, norm.num_batches_tracked]


@situation("the outputs of another stack as context, trained with it")
def stack_as_context(setting: Setting):
    encoder, decoder, xs, ys = setting.stack(depth=1), setting.stack(lambda: Conditioned(torch.mul)), leaves(), leaves()
    loss(decoder(*ys, context=sum(encoder(*xs)))).backward()
    return grads(*xs, *ys, encoder, decoder)
