"""Ways to differentiate."""

from concurrent.futures import ThreadPoolExecutor

import torch
from common import grads, leaves, loss, mlp
from torch import Tensor, nn
from torch.autograd import forward_ad, grad
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap

from situations.base import Setting, situation, train


@situation("autograd.grad of streams and parameters")
def autograd_grad(setting: Setting):
    stack, xs = setting.stack(), leaves()
    found = grad(loss(stack(*xs)), [*xs, *stack.parameters()])
    assert all(t.grad is None for t in [*xs, *stack.parameters()])
    return found


@situation("autograd.grad of the streams alone, of one parameter, of an unused tensor")
def some_gradients(setting: Setting):
    stack, xs, idle = setting.stack(), leaves(), torch.ones(2, requires_grad=True)
    return [
        grad(loss(stack(*xs)), xs),
        grad(loss(stack(*xs)), stack[0].G[1].weight),
        grad(loss(stack(*xs)), [idle, xs[1]], allow_unused=True),
    ]


@situation("backward(inputs=…)")
def chosen_inputs(setting: Setting):
    stack, xs = setting.stack(), leaves()
    loss(stack(*xs)).backward(inputs=[xs[1], stack[0].F[1].weight, stack[1].G[4].bias])
    return grads(*xs, stack)


@situation("backward(gradient) of the outputs, without a loss")
def given_gradients(setting: Setting):
    stack, xs = setting.stack(), leaves()
    outputs = stack(*xs)
    torch.autograd.backward(outputs, [torch.randn(3, 4), torch.randn(3, 4)])
    return grads(*xs, stack)


@situation("a loss on one output")
def one_output(setting: Setting):
    stack, xs, found = setting.stack(), leaves(), []
    for used in (0, 1):
        stack(*xs)[used].square().sum().backward()
        found += grads(*xs, stack)
    return found


@situation("a loss on each output, one after the other")
def output_by_output(setting: Setting):
    stack, xs = setting.stack(), leaves()
    y1, y2 = stack(*xs)
    y1.square().sum().backward(retain_graph=True)
    first = grads(*xs, stack)
    y2.sin().sum().backward()
    return [*first, *grads(*xs, stack)]


@situation("retain_graph=True, several times")
def retained(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.3)), leaves()
    total = loss(stack(*xs))
    for keep in (True, True, False):
        total.backward(retain_graph=keep)
    return grads(*xs, stack)


@situation("double backward: a gradient penalty")
def penalty(setting: Setting):
    stack, xs = setting.stack(), leaves()
    total = loss(stack(*xs))
    (total + sum(g.square().sum() for g in grad(total, xs, create_graph=True))).backward()
    return grads(*xs, stack)


# Autograd adds up the many gradients of one tensor in an order that recomputation may change.
@situation("third derivatives", bitwise=False)
def third(setting: Setting):
    stack, xs = setting.stack(depth=1), leaves()
    found = loss(stack(*xs))
    for _ in range(2):
        found = sum(g.square().sum() for g in grad(found, xs, create_graph=True))
    return grad(found, [*xs, *stack.parameters()])


@situation("is_grads_batched")
def batched(setting: Setting):
    stack, xs = setting.stack(), leaves()
    return grad(stack(*xs)[1].sin(), xs, torch.eye(12).view(12, 3, 4), is_grads_batched=True)


@situation("torch.autograd.functional: jacobian, hessian, vhp")
def functional(setting: Setting):
    stack, xs = setting.sequence((mlp(2), mlp(2))), tuple(leaves(2, 2))
    return [
        torch.autograd.functional.jacobian(lambda *x: stack(*x), xs),
        torch.autograd.functional.jacobian(lambda *x: stack(*x)[0], xs, vectorize=True),
        torch.autograd.functional.hessian(lambda *x: loss(stack(*x)), xs),
        torch.autograd.functional.vhp(lambda *x: loss(stack(*x)), xs, xs),
    ]


@situation("gradients inside a tensor hook, a second backward within a first")
def reentrant(setting: Setting):
    outer, inner, xs, zs = setting.stack(), setting.stack(), leaves(), leaves()
    outputs = outer(*xs)
    total = loss(inner(*zs))
    outputs[0].register_hook(lambda g: total.backward())
    loss(outputs).backward()
    return grads(*xs, *zs, outer, inner)


@situation("backward under no_grad")
def under_no_grad(setting: Setting):
    stack, xs = setting.stack(), leaves()
    total = loss(stack(*xs))
    with torch.no_grad():
        total.backward()
    return grads(*xs, stack)


@situation("backward under inference_mode")
def under_inference_mode(setting: Setting):
    stack, xs = setting.stack(), leaves()
    total = loss(stack(*xs))
    with torch.inference_mode():
        total.backward()
    return grads(*xs, stack)


@situation("no_grad and inference_mode around the forward")
def inference(setting: Setting):
    stack, xs, found = setting.stack(lambda: mlp(dropout=0.5)), leaves(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found += stack(*xs)
    assert not any(y.requires_grad for y in found)
    return found


@situation("eval mode, with gradients")
def evaluation(setting: Setting):
    return train(setting.stack(lambda: mlp(dropout=0.5)).eval())


@situation("the inverse, differentiated")
def inverse(setting: Setting):
    stack, ys = setting.stack(depth=1), leaves()
    # As a stack would have left them: on the grid of an exact coupling, which an inverse does not round to.
    xs = stack.inverse(*map(setting.coupling.enter, ys))
    loss(stack(*(2 * x for x in xs))).backward()
    return [*xs, *grads(*ys, stack)]


@situation("forward mode: jvp and dual tensors")
def forward_mode(setting: Setting):
    stack, xs, vs = setting.stack(), leaves(), leaves()
    primals, tangents = tuple(x.detach() for x in xs), tuple(v.detach() for v in vs)
    found = [jvp(lambda *x: stack(*x), primals, tangents)]
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, xs, tangents)
        slopes = [forward_ad.unpack_dual(y).tangent for y in stack(*duals)]
        loss(slopes).backward()
    return [*found, slopes, grads(*xs, stack)]


@situation("torch.func: grad, vjp, grad of grad")
def func(setting: Setting):
    stack, xs = setting.stack(depth=1), [x.detach() for x in leaves()]
    weights = dict(stack.named_parameters())
    outputs, pull = vjp(stack, *xs)

    def smoothness(x1, x2):
        return torch.func.grad(lambda a, b: loss(stack(a, b)))(x1, x2).square().sum()

    return [
        torch.func.grad(lambda p, *x: loss(functional_call(stack, p, x)), argnums=(0, 1, 2))(weights, *xs),
        pull(outputs),
        pull(tuple(y.sin() for y in outputs)),
        torch.func.grad(smoothness, argnums=(0, 1))(*xs),
    ]


@situation("torch.func: jacrev, jacfwd, hessian", only="Additive()")
def jacobians(setting: Setting):
    stack, xs = setting.sequence((mlp(2), mlp(2))), [x.detach() for x in leaves(2, 2)]
    return [
        jacrev(stack, argnums=(0, 1))(*xs),
        jacfwd(stack, argnums=(0, 1))(*xs),
        hessian(lambda *x: loss(stack(*x)), argnums=(0, 1))(*xs),
    ]


@situation("vmap over samples, with dropout that differs")
def vectorised(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.3)), leaves(5, 3, 4)
    outputs = vmap(stack, randomness="different")(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@situation("gradients per sample, by vmap of grad")
def per_sample(setting: Setting):
    stack, xs = setting.stack(), [x.detach() for x in leaves(5, 4)]
    weights = {k: p.detach() for k, p in stack.named_parameters()}
    of_one = torch.func.grad(lambda p, a, b: loss(functional_call(stack, p, (a[None], b[None]))))
    return vmap(of_one, in_dims=(None, 0, 0))(weights, *xs)


@situation("an ensemble, by vmap over stacked parameters")
def ensemble(setting: Setting):
    stacks, xs = [setting.stack() for _ in range(3)], leaves()
    weights, buffers = torch.func.stack_module_state(stacks)
    outputs = vmap(lambda p, b: functional_call(stacks[0], (p, b), tuple(xs)))(weights, buffers)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, *weights.values())]


@situation("functional_call, with backward inside and outside of it")
def functional_calls(setting: Setting):
    stack, xs = setting.stack(), leaves()
    weights = {k: p.detach().clone().requires_grad_() for k, p in stack.named_parameters()}
    first = grad(loss(functional_call(stack, weights, tuple(xs))), [*xs, *weights.values()])
    outputs = functional_call(stack, {k: 2 * p for k, p in weights.items()}, tuple(xs))
    with torch.no_grad():
        for p in stack.parameters():
            p.zero_()
    loss(outputs).backward()
    assert all(p.grad is None for p in stack.parameters())
    return [*first, *outputs, *grads(*xs, *weights.values())]


@situation("hooks of tensors: of streams, outputs, parameters, and inside functions")
def tensor_hooks(setting: Setting):
    seen: dict[str, list[Tensor]] = {}  # in which order the gradients come is not said anywhere

    def hook(of: str):
        def hooked(g):
            seen.setdefault(of, []).append(g.clone())
            return 2 * g

        return hooked

    class Hooked(nn.Module):
        def __init__(self, of: str):
            super().__init__()
            self.linear, self.of = nn.Linear(4, 4), of

        def forward(self, x):
            h = self.linear(x)
            h.register_hook(hook(self.of))
            return h.tanh()

    names = iter("abcdefgh")
    stack, xs = setting.stack(lambda: Hooked(next(names))), leaves()
    for name, t in zip(("left", "right", "weight"), (*xs, stack[1].F.linear.weight), strict=True):
        t.register_hook(hook(name))
    outputs = stack(*xs)
    for name, y in zip(("first", "second"), outputs, strict=True):
        y.register_hook(hook(name))
    loss(outputs).backward()
    assert [len(seen[of]) for of in sorted(seen)] == [1] * (4 + 3 + 2)
    return [*(seen[of] for of in sorted(seen)), *grads(*xs, stack)]


@situation("retain_grad of outputs, and inside functions")
def retained_gradients(setting: Setting):
    inside = []

    class Retaining(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x)
            if h.requires_grad:
                h.retain_grad()
            inside.append(h)
            return h.tanh()

    stack, xs = setting.stack(Retaining), leaves()
    outputs = stack(*xs)
    for y in outputs:
        y.retain_grad()
    first = list(inside)
    loss(outputs).backward()
    return grads(*outputs, *first, *xs, stack)


@situation("forward hooks and pre-hooks that change what passes")
def forward_hooks(setting: Setting):
    stack = setting.stack()
    stack[0].F[1].register_forward_hook(lambda m, args, y: 2 * y)
    stack[1].G[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    stack[1].G.register_forward_pre_hook(lambda m, args, kwargs: ((args[0].sin(),), kwargs), with_kwargs=True)
    stack.register_forward_hook(lambda m, args, ys: tuple(y.exp() for y in ys))
    return train(stack)


@situation("forward hooks that come and go between forward and backward")
def hooks_that_go(setting: Setting):
    stack, xs = setting.stack(), leaves()
    goes = stack[0].F[1].register_forward_hook(lambda m, args, y: 2 * y)
    total = loss(stack(*xs))
    goes.remove()
    stack[1].G[1].register_forward_hook(lambda m, args, y: 3 * y)
    total.backward()
    return grads(*xs, stack)


@situation("full backward hooks and pre-hooks, of functions and of the stack")
def backward_hooks(setting: Setting):
    seen = []

    def hook(module, grad_input, grad_output):
        seen.append([g.clone() for g in (*grad_input, *grad_output)])
        return tuple(2 * g for g in grad_input)

    stack = setting.stack()
    for module in (stack[0].F, stack[1].G[1], stack):
        module.register_full_backward_hook(hook)
    stack[1].F.register_full_backward_pre_hook(lambda m, g: tuple(3 * t for t in g))
    found = train(stack, steps=1)
    assert len(seen) == 3
    return [*seen, *found]


@situation("post-accumulate-grad hooks, once a parameter")
def post_accumulate_hooks(setting: Setting):
    stack, fired, xs = setting.stack(), [], leaves()
    for name, p in stack.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append((name, p.grad.clone())))
    loss(stack(*xs)).backward()
    assert sorted(name for name, _ in fired) == sorted(name for name, _ in stack.named_parameters())
    return [g for _, g in sorted(fired, key=lambda pair: pair[0])]


# Under Functional the outputs have one graph node in common, and its hooks see the gradients of all inputs.
@situation("hooks of graph nodes, multi-grad hooks, gradient edges", without="Functional()")
def graph_hooks(setting: Setting):
    stack, xs, seen = setting.stack(), leaves(), []
    outputs = stack(*xs)
    outputs[0].grad_fn.register_hook(lambda into, outof: seen.extend(g.clone() for g in into))
    outputs[1].grad_fn.register_prehook(lambda g: tuple(2 * t for t in g))
    register_multi_grad_hook([*stack.parameters()], lambda gs: seen.extend(g.clone() for g in gs))
    edge = get_gradient_edge(outputs[0])
    found = grad(loss(outputs), [edge, *xs], retain_graph=True)
    loss(outputs).backward()
    return [*found, *seen, *grads(*xs, stack)]


@situation("an auxiliary loss from inside a function, kept as an attribute")
def auxiliary(setting: Setting):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gate = mlp(), nn.Linear(4, 2)

        def forward(self, x):
            self.aux = self.gate(x).softmax(-1).square().mean()
            return self.inner(x)

    found = []
    for together in (True, False):
        stack, xs = setting.stack(Routed), leaves()
        main = loss(stack(*xs))
        if together:
            (main + 0.3 * sum(f.aux for pair in stack for f in pair)).backward()
        else:
            main.backward(retain_graph=True)
            sum(f.aux for pair in stack for f in pair).backward()
        found += grads(*xs, stack)
    return found


@situation("backward in another thread than forward")
def other_thread(setting: Setting):
    stack, xs = setting.stack(lambda: mlp(dropout=0.4)), leaves()
    total = loss(stack(*xs))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(total.backward).result()
    return grads(*xs, stack)


@situation("set_multithreading_enabled(False)")
def single_threaded_engine(setting: Setting):
    stack, xs = setting.stack(), leaves()
    with torch.autograd.set_multithreading_enabled(False):
        loss(stack(*xs)).backward()
    return grads(*xs, stack)


class WholeStack(torch.autograd.Function):
    """A checkpoint of the user's own: forward without a graph, and everything again in backward."""

    @staticmethod
    def forward(ctx, stack, x1, x2, *weights):
        ctx.stack = stack
        ctx.save_for_backward(x1, x2)
        return stack(x1, x2)

    @staticmethod
    def backward(ctx, *gs):
        xs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            ys = ctx.stack(*xs)
        return (None, *grad(ys, [*xs, *ctx.stack.parameters()], gs))


@situation("a stack inside a custom autograd.Function")
def inside_custom_function(setting: Setting):
    stack, xs = setting.stack(), leaves()
    outputs = WholeStack.apply(stack, *xs, *stack.parameters())
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]
