"""Modes and contexts around."""

import functools
import random
import warnings

import torch
from common import Lambda, grads, leaves, loss, mlp
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from situations.base import Setting, situation, train

# bfloat16 has 8 bits: a recovered stream that differs in the last bit of float32 may round to the other side in a
# function, once in some thousand elements, and the gradient inherits that. ExactAdditive and Checkpoint have no such
# difference: there every bit must be plain autograd's.
HALF = 0.05


def float32_net(setting: Setting, make=mlp):
    return setting.stack(make).float(), leaves(8, 4, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- autocast
@situation("autocast around the forward, backward outside", tolerance=HALF)
def autocast(setting: Setting):
    stack, xs = float32_net(setting, lambda: mlp(dropout=0.2))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@situation("autocast around forward and backward, with its cache", tolerance=HALF)
def autocast_around_both(setting: Setting):
    stack, xs = float32_net(setting)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = stack(*xs)
        loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@situation("backward under another autocast than forward", tolerance=HALF)
def other_autocast(setting: Setting):
    found = []
    for around_forward, around_backward in ((torch.bfloat16, torch.float16), (None, torch.bfloat16)):
        stack, xs = float32_net(setting)
        with torch.autocast("cpu", around_forward, enabled=around_forward is not None, cache_enabled=False):
            total = loss(stack(*xs))
        with torch.autocast("cpu", around_backward):
            total.backward()
        found += grads(*xs, stack)
    return found


class Careful(nn.Module):
    """Turns autocast off for a part of itself, and on again inside of that."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", enabled=False):
            x = self.b(x.float()).tanh()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                return self.c(x).float()


@situation("autocast nested, and disabled, inside functions", tolerance=HALF)
def nested_autocast(setting: Setting):
    stack, xs = float32_net(setting, Careful)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@situation("autocast inside functions alone", tolerance=HALF)
def autocast_inside(setting: Setting):
    def low(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float()

    stack, xs = float32_net(setting, lambda: Lambda(low, mlp()))
    outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


class Doubled(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x.square()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        return 4 * g * ctx.saved_tensors[0]


@situation("custom_fwd and custom_bwd under autocast", tolerance=HALF)
def custom_casts(setting: Setting):
    stack, xs = float32_net(setting, lambda: Lambda(lambda m, x: Doubled.apply(m(x)).tanh(), nn.Linear(4, 4)))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = stack(*xs)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


@situation("GradScaler with float16 autocast", tolerance=HALF)
def scaled_autocast(setting: Setting):
    (stack, xs), scaler = float32_net(setting), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        total = loss(stack(*xs))
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    return [scaler.get_scale(), *grads(*xs, stack), *stack.parameters()]


# ---------------------------------------------------------------------------------------------- saved tensors
@situation("activation offload: save_on_cpu")
def offload(setting: Setting):
    stack, xs = setting.stack(), leaves()
    with torch.autograd.graph.save_on_cpu():
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


@situation("activation offload: to files, by hooks of the user's own")
def offload_to_files(setting: Setting):
    stack, xs, disk = setting.stack(lambda: mlp(dropout=0.2)), leaves(), {}

    def pack(t):
        disk[len(disk)] = t.numpy(force=True).copy(order="K")
        return len(disk) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: torch.from_numpy(disk.pop(i))):
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


@situation("activation offload: inside functions")
def offload_inside(setting: Setting):
    def offloading(m, x):
        with torch.autograd.graph.save_on_cpu():
            return m(x)

    return train(setting.stack(lambda: Lambda(offloading, mlp(dropout=0.2))))


@situation("activation offload: torch's offload_wrapper of functions")
def offload_wrapper(setting: Setting):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    return train(setting.stack(lambda: offload_wrapper(mlp())))


@situation("saved-tensor hooks forbidden: disable_saved_tensors_hooks")
def hooks_forbidden(setting: Setting):
    stack, xs = setting.stack(), leaves()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


@situation("allow_mutation_on_saved_tensors, and outputs edited under it")
def mutation_allowed(setting: Setting):
    stack, xs = setting.stack(), leaves()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        outputs = stack(*xs)
        total = loss(outputs)
        with torch.no_grad():
            outputs[0].mul_(2)
        total.backward()
    return grads(*xs, stack)


@situation("torch.utils.checkpoint around a stack: reentrant, and not")
def checkpoint_around(setting: Setting):
    found = []
    for reentrant in (True, False):
        stack, xs = setting.stack(lambda: mlp(dropout=0.3)), leaves()
        outputs = checkpoint(stack, *xs, use_reentrant=reentrant)
        loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@situation("selective checkpoint around a stack")
def selective_checkpoint_around(setting: Setting):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    stack, xs = setting.stack(), leaves()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    outputs = checkpoint(stack, *xs, use_reentrant=False, context_fn=contexts)
    loss(outputs).backward()
    return [*outputs, *grads(*xs, stack)]


# ---------------------------------------------------------------------------------------------- switches
@situation("anomaly mode", only="Additive()")
def anomaly(setting: Setting):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            return train(setting.stack(), steps=1)


@situation("deterministic mode")
def deterministic(setting: Setting):
    class Gathering(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            i = torch.tensor([0, 2, 2])
            return torch.empty_like(x).copy_(self.linear(x)).index_add(0, i, x).tanh()[i]

    torch.use_deterministic_algorithms(True)
    try:
        return train(setting.stack(Gathering))
    finally:
        torch.use_deterministic_algorithms(False)


@situation("deterministic mode around the forward alone")
def deterministic_forward(setting: Setting):
    stack, xs = setting.stack(), leaves()
    torch.use_deterministic_algorithms(True)
    try:
        total = loss(stack(*xs))
    finally:
        torch.use_deterministic_algorithms(False)
    total.backward()
    return grads(*xs, stack)


class Making(nn.Module):
    """Makes tensors of the default dtype, on the default device."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return (self.linear(x) * torch.linspace(0.1, 1, 4).cos()).tanh() + torch.ones(4)


@situation("torch.set_default_device, and a device as a context", only="Additive()")
def default_device(setting: Setting):
    """Every CPU has a second device: meta."""

    def shapes():
        found = train(setting.stack(Making), steps=1)
        assert all(t.is_meta for t in found)
        return [t.shape for t in found]

    torch.set_default_device("meta")
    try:
        found = shapes()
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        found += shapes()
        assert torch.get_default_device().type == "meta"
    assert torch.ones(1).device.type == "cpu"
    return [1.0, found]


@situation("torch.set_default_device in between forward and backward")
def default_device_in_between(setting: Setting):
    stack, xs = setting.stack(Making), leaves()
    total = loss(stack(*xs))
    torch.set_default_device("meta")
    try:
        total.backward()
    finally:
        torch.set_default_device(None)
    return grads(*xs, stack)


# Only the table that the functions make is float32: its rounding is the same each time.
@situation("torch.set_default_dtype in between forward and backward")
def default_dtype_in_between(setting: Setting):
    stack, xs = setting.stack(Making), leaves()
    total = loss(stack(*xs))
    torch.set_default_dtype(torch.float32)
    try:
        total.backward()
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float64)
    return grads(*xs, stack)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@situation("sdpa_kernel around the forward, backward outside")
def attention_kernel(setting: Setting):
    stack, xs = setting.stack(Attention), leaves(2, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        total = loss(stack(*xs))
    total.backward()
    assert torch.backends.cuda.flash_sdp_enabled()
    return grads(*xs, stack)


class Halving(TorchFunctionMode):
    """Changes what torch.tanh returns."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result / 2 if func in (torch.tanh, torch.Tensor.tanh) else result


def tanh_net(setting: Setting):
    return setting.stack(lambda: Lambda(lambda m, x: m(x).tanh(), nn.Linear(4, 4))), leaves()


@situation("a TorchFunctionMode that changes results, around forward and backward")
def function_mode(setting: Setting):
    stack, xs = tanh_net(setting)
    with Halving():
        loss(stack(*xs)).backward()
    return grads(*xs, stack)


@situation("a TorchFunctionMode that changes results, around the forward alone")
def function_mode_forward(setting: Setting):
    stack, xs = tanh_net(setting)
    with Halving():
        total = loss(stack(*xs))
    total.backward()
    return grads(*xs, stack)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@situation("a TorchDispatchMode, a FLOP counter, a profiler around", only="Additive()")
def watched(setting: Setting):
    found = []
    for around in (Watching(), FlopCounterMode(display=False), torch.profiler.profile()):
        stack, xs = setting.stack(lambda: mlp(dropout=0.2), depth=1), leaves()
        with around:
            outputs = stack(*xs)
            loss(outputs).backward()
        found += [*outputs, *grads(*xs, stack)]
    return found


@situation("Python's own generator seeded by the user before each pass")
def seeded_by_user(setting: Setting):
    def noisy(m, x):
        random.seed(1)
        return m(x * random.random()).tanh()

    return train(setting.stack(lambda: Lambda(noisy, nn.Linear(4, 4))))


@situation("torch.export of a stack, for inference", only="Additive()")
def exported(setting: Setting):
    stack, xs = setting.stack(depth=1).eval(), tuple(x.detach() for x in leaves())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(stack, xs)
    return program.module()(*(x.sin() for x in xs))


@situation("torch.compile of a model around a stack", only="Additive()", slow=True)
def compiled_model(setting: Setting):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks, self.head = nn.Linear(3, 8), setting.stack(depth=1), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.cat(self.blocks(*self.stem(x).tanh().chunk(2, -1)), -1)).sin()

    model, x = Model(), torch.randn(5, 3)
    run = model if type(setting.scheduler).__name__ == "ByHand" else torch.compile(model, backend="aot_eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = run(x)
            y.square().sum().backward()
        return [y, *grads(model)]
    finally:
        torch._dynamo.reset()
