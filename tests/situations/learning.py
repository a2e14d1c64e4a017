"""Training, parameters and optimizers."""

import copy

import torch
from common import grads, leaves, loss, mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize, prune
from torch.optim import swa_utils

from situations.base import Setting, everything, situation, train, train_on


@situation("plain training")
def plain(setting: Setting):
    return train(setting.stack(), steps=3)


@situation("accumulating gradients over micro-batches")
def accumulation(setting: Setting):
    stack = setting.stack()
    for _ in range(3):
        loss(stack(*leaves())).backward()
    return grads(stack)


@situation("two forwards before their backwards")
def two_forwards(setting: Setting):
    stack = setting.stack(lambda: nn.Sequential(mlp(dropout=0.3), nn.BatchNorm1d(4, momentum=0.5)))
    found = []
    for first_goes_first in (True, False):
        first, second = leaves(8, 4), leaves(8, 4)
        totals = [loss(stack(*first)), loss(stack(*second))]
        for total in totals if first_goes_first else reversed(totals):
            total.backward()
        found += grads(*first, *second, stack)
    return [*found, *everything(stack)]


@situation("a stack applied twice in one loss")
def applied_twice(setting: Setting):
    stack, xs = setting.stack(), leaves()
    loss(stack(*stack(*xs))).backward()
    return grads(*xs, stack)


@situation("a stack unrolled over time, as a recurrent network")
def recurrent(setting: Setting):
    stack, head, xs = setting.stack(depth=1), nn.Linear(8, 4), leaves()
    state, total = tuple(xs), torch.zeros(())
    for _ in range(4):
        state = stack(*state)
        total = total + head(torch.cat(state, -1)).square().mean()
    total.backward()
    return grads(*xs, stack, head)


@situation("one function in every step")
def shared(setting: Setting):
    f = mlp()
    return train(setting.sequence((f, f), (mlp(), f)))


@situation("weights tied between steps")
def tied_steps(setting: Setting):
    stack = setting.stack()
    stack[1].F[4].weight = stack[0].G[4].weight
    return train(stack)


@situation("weights tied between embedding, stack and head")
def tied_head(setting: Setting):
    embedding, head, stack = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), setting.stack()
    head.weight = embedding.weight
    stack[1].F[1].weight = embedding.weight
    optimizer = torch.optim.Adam([*embedding.parameters(), *stack.parameters()], lr=0.05)
    for _ in range(2):
        x = embedding(torch.tensor([[0, 3, 6], [1, 1, 2]]))
        logits = head(sum(stack(x, x)))
        F.cross_entropy(logits.flatten(0, 1), torch.tensor([1, 2, 3, 4, 5, 6])).backward()
        optimizer.step()
    return [logits, *grads(embedding, stack), *everything(embedding, stack)]


@situation("frozen functions")
def frozen(setting: Setting):
    stack = setting.stack()
    stack[0].F.requires_grad_(False)
    stack[1].G.requires_grad_(False)
    return train(stack)


@situation("frozen below, as when only the last layers are tuned")
def frozen_below(setting: Setting):
    stack, batches = setting.stack(depth=3), [[x.detach() for x in leaves()] for _ in range(2)]
    stack[0].requires_grad_(False)
    stack[1].F.requires_grad_(False)
    return train_on(batches, stack)


@situation("everything frozen but the streams")
def all_frozen(setting: Setting):
    return train(setting.stack().requires_grad_(False))


@situation("everything frozen")
def nothing_learns(setting: Setting):
    outputs = setting.stack().requires_grad_(False)(*(x.detach() for x in leaves()))
    assert not any(y.requires_grad for y in outputs)
    return outputs


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


@situation("LoRA adapters on a frozen base")
def lora(setting: Setting):
    stack = setting.stack().requires_grad_(False)
    for pair in stack:
        for f in pair:
            f[1], f[4] = LoRA(f[1]), LoRA(f[4])
    return train(stack)


@situation("LoRA adapters, merged into the base after training")
def lora_merged(setting: Setting):
    stack = setting.stack(depth=1).requires_grad_(False)
    stack[0].F[1] = LoRA(stack[0].F[1])
    found, adapter = train(stack), stack[0].F[1]
    adapter.base.weight.data += adapter.up.weight @ adapter.down.weight
    stack[0].F[1] = adapter.base.requires_grad_(True)
    return [found, train(stack)]


@situation("unused parameters")
def unused(setting: Setting):
    stack = setting.stack()
    stack[0].F.register_parameter("idle", nn.Parameter(torch.ones(3)))
    found = train(stack)
    assert any(g is None for g in found)
    return found


@situation("a head on one stream only")
def head_on_one_stream(setting: Setting):
    stack, head, xs = setting.stack(), nn.Linear(4, 3), leaves()
    head(stack(*xs)[1]).square().mean().backward()
    return grads(*xs, stack, head)


@situation("a model with stem and head")
def whole_model(setting: Setting):
    stem, stack, head = nn.Linear(3, 8), setting.stack(), nn.Linear(4, 2)
    model = nn.ModuleList([stem, stack, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        head(sum(stack(*stem(torch.randn(5, 3)).chunk(2, -1)))).square().mean().backward()
        optimizer.step()
    return everything(model)


OPTIMIZERS = {
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "Adam, foreach": lambda ps: torch.optim.Adam(ps, lr=0.05, foreach=True),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True),
}


@situation("optimizers: momentum, foreach and fused")
def optimizers(setting: Setting):
    found = []
    for make in OPTIMIZERS.values():
        stack = setting.stack(depth=1)
        optimizer = make(stack.parameters())
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            loss(stack(*leaves())).backward()
            optimizer.step()
        found.append(everything(stack))
    return found


# Its line search compares losses, so that it amplifies rounding by as much as it goes.
@situation("L-BFGS, whose closure runs forward and backward many times", tolerance=1e-7)
def lbfgs(setting: Setting):
    stack, xs = setting.stack(depth=1), leaves()
    optimizer = torch.optim.LBFGS(stack.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        total = loss(stack(*xs))
        total.backward()
        return total

    return [optimizer.step(closure), *everything(stack)]


class Shift(nn.Module):
    """Its gradient needs no saved tensor, so it is complete, and the shift stepped, before anything was recovered."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.shift


@situation("an optimizer that steps inside backward")
def optimizer_in_backward(setting: Setting):
    stack = setting.stack(lambda: nn.Sequential(mlp(), Shift()))
    for p in stack.parameters():
        optimizer = torch.optim.Adam([p], lr=0.05)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss(stack(*leaves())).backward()
    return everything(stack)


@situation("clipping: by norm and by value")
def clipping(setting: Setting):
    stack, found = setting.stack(), []
    for _ in range(2):
        stack.zero_grad()
        loss(stack(*leaves())).backward()
        found += [clip_grad_norm_(stack.parameters(), 0.5), *grads(stack)]
        clip_grad_value_(stack.parameters(), 0.01)
        found += grads(stack)
    return found


@situation("clipping by hooks of parameters")
def clipping_by_hooks(setting: Setting):
    stack = setting.stack()
    for p in stack.parameters():
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return train(stack)


@situation("clipping by hooks of the streams between two stacks")
def clipping_between(setting: Setting):
    first, second, xs = setting.stack(), setting.stack(), leaves()
    between = first(*xs)
    for t in between:
        t.register_hook(lambda g: g / g.norm().clamp(min=1.0))
    loss(second(*between)).backward()
    return grads(*xs, first, second)


@situation("an EMA copy, evaluated beside the model")
def ema(setting: Setting):
    stack = setting.stack()
    average = swa_utils.AveragedModel(stack, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer, found = torch.optim.SGD(stack.parameters(), lr=0.1), []
    for _ in range(3):
        outputs = stack(*leaves())
        with torch.no_grad():
            found += average(*leaves())
        loss(outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(stack)
    return [*found, *everything(stack, average)]


@situation("an EMA teacher that distils, updated between forward and backward")
def teacher(setting: Setting):
    stack, xs = setting.stack(), leaves()
    other = copy.deepcopy(stack).requires_grad_(False)
    outputs = stack(*xs)
    with torch.no_grad():
        targets = other(*xs)
        for t, p in zip(other.parameters(), stack.parameters(), strict=True):
            t.lerp_(p * 2, 0.1)
    loss([y - t.cos() for y, t in zip(outputs, targets, strict=True)]).backward()
    return [*grads(*xs, stack), *everything(other)]


@situation("SWA: averaging, then new statistics of batch norm")
def swa(setting: Setting):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = setting.stack(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))

        def forward(self, x):
            return sum(self.stack(x, x))

    model, found = Model(), []
    average = swa_utils.AveragedModel(model)
    for _ in range(2):
        model(torch.randn(6, 4)).square().sum().backward()
        found += grads(model)
        average.update_parameters(model)
    swa_utils.update_bn([torch.randn(6, 4) for _ in range(3)], average)
    return [*found, *everything(average)]


@situation("GradScaler, and a step that it skips")
def grad_scaler(setting: Setting):
    stack, scaler = setting.stack(), torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
    optimizer, found, scales = torch.optim.SGD(stack.parameters(), lr=0.1), [], []
    for i in range(4):
        optimizer.zero_grad()
        outputs = stack(*(x.detach() for x in leaves()))
        total = loss(outputs) * (float("inf") if i == 1 else 1.0)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        found += everything(stack)
    assert scales == [32.0, 16.0, 32.0, 64.0]
    return [*found, scales]


@situation("spectral norm, weight norm and orthogonal weights")
def parametrized(setting: Setting):
    def make():
        a, b, c = (nn.Linear(4, 4) for _ in range(3))
        parametrizations.spectral_norm(a)
        parametrizations.weight_norm(b)
        parametrizations.orthogonal(c)
        return nn.Sequential(a, nn.Tanh(), b, c)

    return train(setting.stack(make, depth=1))


class Positive(nn.Module):
    def forward(self, w):
        return w.exp()


@situation("a parametrization of the user's own")
def own_parametrization(setting: Setting):
    stack = setting.stack()
    for pair in stack:
        parametrize.register_parametrization(pair.F[1], "weight", Positive())
    return train(stack)


@situation("parametrize.cached around the forward")
def cached_parametrization(setting: Setting):
    shared = nn.Linear(4, 4)
    parametrize.register_parametrization(shared, "weight", Positive())
    stack = setting.sequence(*((nn.Sequential(nn.Tanh(), shared), mlp()) for _ in range(2)))
    found = []
    for _ in range(2):
        xs = leaves()
        with parametrize.cached():
            outputs = stack(*xs)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@situation("pruned weights")
def pruned(setting: Setting):
    stack = setting.stack()
    for pair in stack:
        prune.l1_unstructured(pair.F[1], "weight", 0.3)
    return train(stack)


@situation("sparse gradients of an embedding inside a function")
def sparse_gradients(setting: Setting):
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 4)

        def forward(self, x, i):
            return self.linear(x * self.table(i)).tanh()

    stack, found = setting.stack(Looked), []
    sparse = [p for n, p in stack.named_parameters() if "table" in n]
    optimizer = torch.optim.SparseAdam(sparse, lr=0.1)
    for _ in range(2):
        loss(stack(*leaves(), i=torch.tensor([0, 4, 4]))).backward()
        assert all(p.grad.is_sparse for p in sparse)
        found += [p.grad.to_dense() for p in stack.parameters()]
        optimizer.step()
        stack.zero_grad()
    return [*found, *everything(stack)]


@situation("a hypernetwork: weights that are computed, by functional_call")
def hypernetwork(setting: Setting):
    stack, embedding, xs = setting.stack(), nn.Parameter(torch.randn(3)), leaves()
    makers = nn.ModuleList(nn.Linear(3, p.numel()) for p in stack.parameters())
    weights = {
        k: p.detach() + 0.1 * m(embedding).view(p.shape)
        for (k, p), m in zip(stack.named_parameters(), makers, strict=True)
    }
    outputs = torch.func.functional_call(stack, weights, tuple(xs))
    loss(outputs).backward()
    return [*outputs, *grads(*xs, makers), embedding.grad]


@situation("meta-learning: gradients through a step of an inner optimizer")
def meta_learning(setting: Setting):
    stack, xs, ys = setting.stack(depth=1), leaves(), leaves()
    weights = dict(stack.named_parameters())
    inner = torch.autograd.grad(loss(stack(*xs)), list(weights.values()), create_graph=True)
    fast = {k: p - 0.1 * g for (k, p), g in zip(weights.items(), inner, strict=True)}
    loss(torch.func.functional_call(stack, fast, tuple(ys))).backward()
    return grads(*xs, *ys, stack)


@situation("state_dict saved, loaded, and trained on under another scheduler")
def state_dicts(setting: Setting):
    stack, other = setting.stack(), setting.stack()
    found = train(stack)
    other.load_state_dict(stack.state_dict())
    return [found, train(other)]


@situation("initialised on the meta device, then made real")
def meta_initialisation(setting: Setting):
    with torch.device("meta"):
        stack = setting.stack()
    stack = stack.to_empty(device="cpu")
    for m in stack.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    return train(stack)


@situation("lazy modules, made by the first forward")
def lazy(setting: Setting):
    return train(setting.stack(lambda: nn.Sequential(nn.LazyLinear(8), nn.GELU(), nn.LazyLinear(4)), depth=1), steps=3)


@situation("frozen and thawed between steps")
def thawed(setting: Setting):
    stack, found = setting.stack(), []
    for frozen in (True, False, True):
        stack[0].requires_grad_(not frozen)
        found.append(train(stack, steps=1))
    return found


@situation("requires_grad switched between forward and backward")
def toggled(setting: Setting):
    stack, xs = setting.stack(), leaves()
    stack[0].F.requires_grad_(False)
    total = loss(stack(*xs))
    stack[0].F.requires_grad_(True)
    stack[1].G.requires_grad_(False)
    total.backward()
    return grads(*xs, stack)


@situation("layers added and removed between steps")
def grown(setting: Setting):
    stack = setting.stack()
    found = train(stack)
    stack.append((setting.fit(mlp()), setting.fit(mlp())))
    return [found, train(stack), train(stack[1:])]


@situation("the scheduler exchanged between forward and backward")
def scheduler_exchanged(setting: Setting):
    stack, xs = setting.stack(), leaves()
    total = loss(stack(*xs))
    stack.scheduler = type(stack)().scheduler
    total.backward()
    return grads(*xs, stack)


@situation("an empty stack, one function, an odd number of steps")
def few_steps(setting: Setting):
    found = []
    for steps in (0, 1, 3):
        stack, xs = setting.sequence(*(setting.fit_step(mlp()) for _ in range(steps))), leaves()
        outputs = stack(*xs)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@situation("three streams and more")
def many_streams(setting: Setting):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, *streams):
            return self.linear(torch.cat(streams, -1)).tanh()

    stack = setting.sequence(*(setting.fit_step(Mixed()) for _ in range(5)))
    return train_on([leaves(count=3) for _ in range(2)], stack)


# Each of the 60 steps adds a rounding, and Affine and Scaled scale what has come together.
@situation("thirty blocks", tolerance=1e-9, slow=True)
def deep(setting: Setting):
    def make():
        m = mlp()
        with torch.no_grad():
            m[4].weight.mul_(0.05)  # Affine couplings multiply by thirty scales: what they amplify stays small
        return m

    return train(setting.stack(make, depth=30))
