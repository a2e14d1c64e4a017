# %% [markdown]
# # Reversible networks, from scratch
#
# For those who know PyTorch and nothing of reversibility. We build a network that trains without storing its
# activations, in fewer than 100 lines, find out what is wrong with it, and end with revlib, which mends that.
#
# 1. The idea, in three equations
# 2. From scratch, and the traps
# 3. Memory
# 4. Floats, and how exactness comes back
# 5. PaReprop: what backward can do at the same time
# 6. The same with revlib
# 7. The architectures
#
# `python -m research.tutorial --out FOLDER` runs all of it in less than a minute on one CPU core and draws the
# pictures. The cells are those of a notebook: VS Code shows them as such, and `jupytext --to ipynb` makes one. What the
# text says of these networks is asserted by the code next to it; what it has from elsewhere, it says from where.

# %%
import argparse
import math
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from matplotlib.patches import FancyBboxPatch
from timm.models.mvitv2 import MultiScaleBlock
from timm.models.swin_transformer import PatchMerging
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from revlib import ExactAdditive, ReversibleSequence
from revlib.models import RevMViT, RevSwin, RevViT
from revlib.models.fusion import Mean
from revlib.schedulers import Checkpoint, KeepLast, Naive, PaReprop, Reversible
from revlib.testing import RaceChecker, footprint

if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # a script opens no windows
import matplotlib.pyplot as plt

parser = argparse.ArgumentParser(description="Reversible networks, from scratch: runs the lesson, draws its pictures.")
parser.add_argument("--out", type=Path, default=Path("runs/tutorial"), help="folder for the pictures [%(default)s]")
out = parser.parse_known_args()[0].out  # a notebook's kernel has arguments of its own
out.mkdir(parents=True, exist_ok=True)

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6B6B6B"  # Okabe and Ito's, for all eyes


def save(figure, name):
    figure.savefig(out / name, dpi=100)
    print(f"drawn: {out / name}")


def mlp(width, dropout=0.0, dtype=torch.float64):
    layers = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    return nn.Sequential(*layers, nn.Dropout(dropout)).to(dtype)


# %% [markdown]
# ## 1. The idea, in three equations
#
# Backpropagation through a layer needs the layer's input, so training stores the inputs of all layers, and memory
# grows with depth. A layer whose input can be computed *from its output* needs no such store: backward begins with the
# last output, and gets back one input after the other on its way down.
#
# Few layers can be inverted. The trick of RevNets is to cut the features into two streams, and to let each be
# changed by a function of the other one only:
#
# $$y_1 = x_1 + F(x_2) \qquad\qquad y_2 = x_2 + G(y_1)$$
#
# What was added can be taken away again, because what it was computed from is still there:
#
# $$x_2 = y_2 - G(y_1), \quad x_1 = y_1 - F(x_2)$$
#
# $F$ and $G$ are evaluated once more, never inverted. They may be anything: attention, convolutions, MLPs. Below, $G$
# squeezes 16 numbers through 2 and a ReLU, which nothing could undo.
#
# ![A reversible block, forward and inverse](results/tutorial/block.png)
#
# Source: Gomez, Ren, Urtasun and Grosse, *The Reversible Residual Network*, NeurIPS 2017; additive coupling itself is
# from Dinh, Krueger and Bengio, *NICE*, 2014.

# %%
torch.manual_seed(0)
F, G = mlp(16), nn.Sequential(nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 16)).double()
x1, x2 = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)

y1 = x1 + F(x2)
y2 = x2 + G(y1)

r2 = y2 - G(y1)
r1 = y1 - F(r2)
assert_close((r1, r2), (x1, x2))
print(f"one block, inverted in float64: off by {max((r1 - x1).abs().max(), (r2 - x2).abs().max()):.0e} at most")

# %% [markdown]
# ## 2. From scratch, and the traps
#
# Both lines of a block do the same: they add a function of one stream to the other. With the streams swapped each time,
# one step says it all, and a block is two of them, with $F$ and with $G$:
#
# $$(x_1, x_2) \mapsto (x_2,\; x_1 + f(x_2))$$
#
# Forward runs the steps without a graph, and keeps the last two streams. Backward undoes them one by one. It evaluates
# $f$ once, with a graph, for two ends: $f$'s value inverts the step, and $f$'s graph takes the gradient through it.
# The gradient $d_2$ that arrives at $x_1 + f(x_2)$ goes unchanged to $x_1$, and through $f$ to $x_2$. This is algorithm
# 1 of Gomez et al., for one step instead of two. (`replay` is for later. Read it as False.)


# %% from scratch
class Undo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, functions, replay, x1, x2, *parameters):
        ctx.functions, ctx.states = functions, []
        for f in functions:  # in here, autograd records nothing
            ctx.states.append(torch.get_rng_state() if replay else None)
            x1, x2 = x2, x1 + f(x2)
        ctx.save_for_backward(x1, x2)  # of all activations, the last two streams
        return x1, x2

    @staticmethod
    def backward(ctx, d1, d2):
        y1, y2 = ctx.saved_tensors
        gradients = []
        for f, state in zip(reversed(ctx.functions), reversed(ctx.states), strict=True):
            with torch.enable_grad(), same_dice(state):
                x = y1.detach().requires_grad_()
                fx = f(x)
            dx, *own = torch.autograd.grad(fx, [x, *f.parameters()], d2)
            y1, y2 = y2 - fx.detach(), x.detach()  # the state before the step
            d1, d2 = d2, d1 + dx  # and its gradient
            gradients = own + gradients
        return None, None, d1, d2, *gradients


@contextmanager
def same_dice(state):
    """Random numbers as from this state on, unless it is None; afterwards the generator is where it was."""
    with torch.random.fork_rng(devices=[], enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state)
        yield


class Stack(nn.Module):
    """Blocks of pairs (F, G), reversible."""

    def __init__(self, pairs, replay=False):
        super().__init__()
        self.functions = nn.ModuleList(f for pair in pairs for f in pair)
        self.replay = replay

    def forward(self, x1, x2):
        return Undo.apply(self.functions, self.replay, x1, x2, *self.functions.parameters())


# %% [markdown]
# Plain autograd on the same functions is the judge: of all gradients, in float64.


# %% from scratch
class Plain(Stack):
    """The same function, whose activations autograd stores as usual."""

    def forward(self, x1, x2):
        for f in self.functions:
            x1, x2 = x2, x1 + f(x2)
        return x1, x2


def inputs():
    return [torch.randn(32, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def loss_of(y1, y2):
    return y1.square().mean() + y2.sin().mean()


blocks = [(mlp(16), mlp(16)) for _ in range(12)]
xs = inputs()
found, expected = (
    torch.autograd.grad(loss_of(*stack(*xs)), [*xs, *stack.parameters()]) for stack in (Stack(blocks), Plain(blocks))
)
assert_close(found, expected)
print(f"12 blocks: all {len(found)} gradients are plain autograd's")

# %% [markdown]
# That works for functions that do the same whenever they are called. **Whatever makes the second evaluation differ from
# the first makes gradients wrong, and nothing says so.** Here are training steps with a trap each, and what they leave
# (gradients, and the statistics of batch norm), against what plain autograd leaves where nobody interferes.
#
# - *Dropout*: the second evaluation draws another mask, and the inverse subtracts what was never added. With
#   `replay=True` forward keeps the state of the random generator before each function, and backward draws the same
#   mask.
# - *A weight is edited* before backward, as by an optimizer that steps between two losses: autograd counts the edits of
#   what it saved, and raises an error. Our stack saved no weights, so nobody counts.
# - *An output is edited* before backward: noticed, because `save_for_backward` counts the edits of the two streams.
# - *`eval()`* before backward: without dropout it is another function.
# - *Batch norm*: its gradient is right, but its running statistics are updated twice.
# - *Second derivatives*: our backward differentiates on a side track of its own, which autograd does not see.
#
# revlib is right or raises an error in each. And beyond our stack it has generators of other devices, autocast around
# the forward only, frozen and shared parameters, context such as masks, hooks, several processes: the guide's section
# *What is supported* leads to the test of each.


# %%
def pair(dropout=0.0):
    return mlp(16, dropout), mlp(16, dropout)


def batch_norms():
    return [nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Tanh()).double() for _ in range(2)]


@torch.no_grad()
def edit_weight(stack, y1, y2):
    next(stack.parameters()).mul_(1.5)


@torch.no_grad()
def edit_output(stack, y1, y2):
    y1.mul_(1.5)


TRAPS = {
    "none": {},
    "dropout": {"make": lambda: pair(dropout=0.1)},
    "a weight is edited": {"before_backward": edit_weight},
    "an output is edited": {"before_backward": edit_output},
    "eval() before backward": {"make": lambda: pair(dropout=0.1), "before_backward": lambda stack, *_: stack.eval()},
    "batch norm": {"make": batch_norms},
    "second derivatives": {"twice": True},
}
STACKS = {
    "plain autograd": Plain,
    "ours": Stack,
    "ours, replay=True": lambda blocks: Stack(blocks, replay=True),
    "revlib": ReversibleSequence,
}


def train(make_stack, make=pair, before_backward=lambda stack, *_: None, twice=False):
    """What a training step leaves: gradients, and buffers."""
    torch.manual_seed(0)
    stack, xs = make_stack([make() for _ in range(3)]), inputs()
    ys = stack(*xs)
    before_backward(stack, *ys)
    loss = loss_of(*ys)
    if twice:
        (slope,) = torch.autograd.grad(loss, xs[0], create_graph=True)
        loss = loss + 100 * slope.square().sum()
    loss.backward()
    return [t.grad for t in (*xs, *stack.parameters())], [b.double() for b in stack.buffers()]


def relative(found, expected):
    """Error in the norm, of all tensors together."""
    found, expected = (torch.cat([t.flatten().double() for t in ts]) for ts in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def verdict(make_stack, trap):
    undisturbed = {name: value for name, value in trap.items() if name != "before_backward"}
    gradients, buffers = train(Plain, **undisturbed)
    try:
        found_gradients, found_buffers = train(make_stack, **trap)
    except RuntimeError as error:
        return f"error: {error}"
    if relative(found_gradients, gradients) > 1e-9:
        return f"gradients wrong by {relative(found_gradients, gradients):.0%}"
    return "right" if not buffers or relative(found_buffers, buffers) < 1e-9 else "buffers wrong"


verdicts = {name: [verdict(make_stack, trap) for make_stack in STACKS.values()] for name, trap in TRAPS.items()}
print(f"{'trap':24}", *(f"{name:24}" for name in STACKS))
for name, row in verdicts.items():
    print(f"{name:24}", *(f"{word.split(':')[0]:24}" for word in row))
for name, (*_, word) in verdicts.items():
    if word.startswith("error"):
        print(f"revlib, {name}: {word}")

assert {name: [re.split(":| by ", word)[0] for word in row] for name, row in verdicts.items()} == {
    "none": ["right"] * 4,
    "dropout": ["right", "gradients wrong", "right", "right"],
    "a weight is edited": ["error", "gradients wrong", "gradients wrong", "error"],
    "an output is edited": ["error"] * 4,
    "eval() before backward": ["right", "gradients wrong", "gradients wrong", "error"],
    "batch norm": ["right", "buffers wrong", "buffers wrong", "right"],
    "second derivatives": ["right", "gradients wrong", "gradients wrong", "right"],
}

# %% [markdown]
# ## 3. Memory
#
# What does an MLP of ours make autograd keep? Its input (1 stream: the sum that the step before it made), the norm's
# mean and deviation (2 numbers a row), its result (1), and what enters and leaves the GELU, four times as wide (4 + 4).
# So with $w$ the width, $n$ blocks keep between forward and backward, in streams and up to a constant,
#
# $$\underbrace{2n \, (10 + 2/w)}_{\text{stored}} \qquad \underbrace{2n}_{\text{checkpointed}}
# \qquad \underbrace{2}_{\text{reversible}}$$
#
# Checkpointing keeps the input of each function, and repeats the function from it. A reversible stack keeps the last
# two streams. In backward, both have the activations of one function at a time besides, whatever the depth.
#
# Below, every byte is counted that a training step made and that is still alive. One thing grows in our stack after
# all, though it is no activation: an `autograd.Function` gives back its gradients all at once, so those of all
# parameters are held to the end. revlib has no custom backward: it builds the ordinary graph, in which each gradient is
# added where it belongs as soon as it is there. What little grows in revlib are samples of the streams, by which
# backward checks what it recovers.


# %%
class Checkpointed(Stack):
    def forward(self, x1, x2):
        for f in self.functions:
            x1, x2 = x2, x1 + checkpoint(f, x2, use_reentrant=False, preserve_rng_state=False)
        return x1, x2


WIDTH, ROWS, DEPTHS = 32, 1024, [1, 4, 8, 16, 32]
KINDS = {"stored": Plain, "checkpointed": Checkpointed, "reversible, ours": Stack, "revlib": ReversibleSequence}

streams = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
stream_bytes, weight_bytes = (4 * sum(t.numel() for t in ts) for ts in (streams[:1], mlp(WIDTH).parameters()))
held, peak = {name: [] for name in KINDS}, {name: [] for name in KINDS}
for depth in DEPTHS:
    blocks = [(mlp(WIDTH).float(), mlp(WIDTH).float()) for _ in range(depth)]
    for name, kind in KINDS.items():
        stack = kind(blocks)
        measured = footprint(stack, streams, stack.parameters())
        held[name].append(measured.held / stream_bytes)
        peak[name].append(measured.peak / stream_bytes)

print(f"{'streams, by blocks':38}", *(f"{depth:7}" for depth in DEPTHS))
for name in KINDS:
    print(f"{name + ', held after forward':38}", *(f"{value:7.1f}" for value in held[name]))
    print(f"{name + ', peak of backward':38}", *(f"{value:7.1f}" for value in peak[name]))


def a_block(values):
    """What one more adds."""
    return (values[-1] - values[-2]) / (DEPTHS[-1] - DEPTHS[-2])


assert_close(a_block(held["stored"]), 2 * (10 + 2 / WIDTH))
assert_close(a_block(held["checkpointed"]), 2.0)
assert a_block(held["reversible, ours"]) == 0 and int(held["reversible, ours"][-1]) == 2
assert_close(a_block(peak["stored"]), a_block(held["stored"]))
assert_close(a_block(peak["checkpointed"]), a_block(held["checkpointed"]))
assert_close(a_block(peak["reversible, ours"]), 2 * weight_bytes / stream_bytes)
assert a_block(peak["revlib"]) < 0.02

figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, values), colour, marker in zip(peak.items(), (GREY, ORANGE, GREEN, BLUE), "osD^", strict=True):
    for axes in panels:
        axes.plot(DEPTHS, values, color=colour, marker=marker, markersize=5, label=name)
panels[0].set(title="Peak of backward, in streams", ylim=(0, None))
panels[1].set(title="The lowest part, enlarged", ylim=(0, 1.15 * peak["checkpointed"][-1]))
panels[0].legend(frameon=False)
for axes in panels:
    axes.set(xlabel="blocks", xlim=(0, None))
    axes.grid(alpha=0.3)
save(figure, "memory.png")

# %% [markdown]
# ## 4. Floats, and how exactness comes back
#
# In real numbers $(a + b) - b = a$. In floats the sum is rounded: float32 has 24 binary digits, and where $b$ is larger
# than $a$, the last digits of $a$ fall off the end of the sum. So an inverted step returns *almost* what went in.
# The next step is inverted from that, and errors build up with depth.
#
# How fast depends on the functions, which backward evaluates on the recovered streams instead of the original ones. In
# float32 a difference in the last digit stays about as small. But with **functions in bfloat16**, of 8 digits, a tiny
# difference decides now and then whether a number is rounded up or down, and becomes a difference in the eighth digit.
# (In a stack so shallow that no number is rounded the other way, bfloat16 inverts as well as float32.)

# %%
torch.manual_seed(0)
a, b = torch.tensor(0.1), torch.tensor(1.0)
print(f"(0.1 + 1) - 1 = {((a + b) - b).item()!r} in float32, and 0.1 is {a.item()!r}")
assert (a + b) - b != a

a, b = torch.randn(2, 100_000)
print(f"of random pairs, {((a + b) - b != a).float().mean():.0%} do not come back")
assert ((a + b) - b != a).float().mean() > 0.25

f, x = mlp(64).float(), torch.randn(4096, 64)
nudged = x * (1 + torch.finfo(torch.float32).eps * torch.randint(2, x.shape))  # every other number, in its last digit
with torch.no_grad():
    in_float32 = (f(nudged) - f(x)).abs().max().item()
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = (f(nudged) - f(x)).abs().max().item()
print(f"last digits of x change, f(x) changes by up to {in_float32:.0e} in float32, by {in_bfloat16:.0e} in bfloat16")
assert in_float32 < 1e-5 and in_bfloat16 > 100 * in_float32
assert torch.finfo(torch.float32).eps == 2**-23 and torch.finfo(torch.bfloat16).eps == 2**-7  # 24 digits, and 8

# %% [markdown]
# The cure is older than floats: count in whole pennies. Let every stream be a multiple of $2^{-14}$. A function may
# return anything, in any precision: what it returns is rounded to the grid *before* it is added. Then a sum is
# $k \cdot 2^{-14}$ with a whole number $k$, and float32 has every whole number up to $2^{24}$. So nothing is
# rounded, as long as
#
# $$|k| < 2^{24}, \quad \text{that is} \quad |\text{value}| < 2^{24 - 14} = 1024$$
#
# and subtracting the same rounded number gives back every bit. With $b$ digits after the point the bound is
# $2^{24 - b}$: a finer grid buys resolution with range. Integers for reversible sums: Maclaurin, Duvenaud and Adams,
# *Gradient-based Hyperparameter Optimization through Reversible Learning*, 2015.

# %%
DIGITS = 14


def on_grid(t):
    return torch.round(t * 2**DIGITS) / 2**DIGITS  # multiplying by powers of two rounds nothing


def run(functions, x1, x2, rounded):
    for f in functions:
        x1, x2 = x2, x1 + rounded(f(x2).float())
    return x1, x2


def undo(functions, y1, y2, rounded):
    for f in reversed(functions):
        y1, y2 = y2 - rounded(f(y1).float()), y1
    return y1, y2


limit = torch.tensor(2.0 ** (24 - DIGITS))
assert limit == 1024
assert limit + 2**-DIGITS == limit  # at the limit the grid is too fine for float32
assert (limit - 2**-DIGITS) + 2**-DIGITS == limit and limit - 2**-DIGITS != limit  # below it is not

torch.manual_seed(0)
functions = [mlp(64).float() for _ in range(2 * 200)]
xs = [torch.randn(256, 64) for _ in range(2)]


@torch.no_grad()
def inversion_error(blocks, rounded, bfloat16):
    """How far off the input is that comes back."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        before = [rounded(x) for x in xs]
        after = run(functions[: 2 * blocks], *before, rounded)
        assert all(y.abs().max() < limit for y in after)
        return relative(undo(functions[: 2 * blocks], *after, rounded), before)


WAYS = {
    "functions in float32, sums as they are": {"rounded": lambda t: t, "bfloat16": False},
    "functions in bfloat16, sums as they are": {"rounded": lambda t: t, "bfloat16": True},
    "functions in float32, sums on the grid": {"rounded": on_grid, "bfloat16": False},
    "functions in bfloat16, sums on the grid": {"rounded": on_grid, "bfloat16": True},
}
BLOCKS = [1, 3, 10, 30, 100, 200]
drift = {name: [inversion_error(blocks, **way) for blocks in BLOCKS] for name, way in WAYS.items()}

print(f"{'recovered input is off by, at blocks':40}", *(f"{n:8}" for n in BLOCKS))
for name, errors in drift.items():
    print(f"{name:40}", *(f"{error:8.1e}" if error else "       0" for error in errors))

float32, bfloat16, *grids = drift.values()
assert float32[-1] > 2 * float32[0] and bfloat16[-1] > 2 * bfloat16[0]
assert all(much > 50 * little for much, little in zip(bfloat16[-3:], float32[-3:], strict=True))
assert all(error == 0 for errors in grids for error in errors)

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
FLOOR = 1e-9  # where a logarithmic axis can show no error
for (name, errors), (colour, marker, width) in zip(
    drift.items(), ((BLUE, "o", 2), (ORANGE, "s", 2), (GREEN, "D", 5), (RED, "^", 1.5)), strict=True
):
    axes.plot(BLOCKS, [max(e, FLOOR) for e in errors], color=colour, marker=marker, linewidth=width, label=name)
axes.set(xscale="log", yscale="log", ylim=(FLOOR / 3, 1), xlabel="blocks", title="How far off the recovered input is")
axes.set_xticks(BLOCKS, map(str, BLOCKS))
axes.set_yticks([FLOOR, 1e-7, 1e-5, 1e-3, 1e-1], ["none: every\nbit is back", "1e-7", "1e-5", "1e-3", "1e-1"])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False, loc="upper left")
save(figure, "drift.png")

# %% [markdown]
# ## 5. PaReprop: what backward can do at the same time
#
# Backward does two things with step $k$: it **recovers** it ($R_k$: evaluate $f_k$, subtract), and takes the
# **gradient** through it ($D_k$). Three rules say what must wait for what:
#
# - $R_k$ needs the state that $R_{k+1}$ has recovered.
# - $D_k$ needs the activations that $R_k$ has made, and the gradient that $D_{k+1}$ hands down.
# - Activations must not pile up, or memory is lost again: $R_{k-1}$ begins when $D_k$ does, no earlier.
#
# Neither $D_k$ nor $R_{k-1}$ needs the other, so they can run side by side: on a GPU, in two streams (CUDA's, queues of
# work; they have nothing to do with our $x_1$ and $x_2$). If recovering takes 1 and a gradient takes 2, then $n$ steps
# take $2n + 1$ instead of $3n$: all recoveries but the first are hidden. That is the idea of Zhu and Mangalam,
# *PaReprop: Fast Parallelized Reversible Backpropagation*, 2023. The price is a second step's activations.


# %%
def duration(steps, recovering, gradient):
    """Of backward, by the three rules."""
    recovered = recovering
    done = 0
    for _ in range(steps):
        begins = max(recovered, done)  # a gradient, and next to it the recovery of the step below
        recovered, done = begins + recovering, begins + gradient
    return done


assert all(duration(n, 1, 2) == 2 * n + 1 for n in range(1, 100))

# %% [markdown]
# What does a real backward do? revlib can be run on a *model* of a device with streams, which its tests use to find
# races: CPU tensors, and for each operation a record of which stream got it, and of what on the other stream had to
# come before. Such a record has an order, but no time. So we time each operation on this CPU, and let it start, in the
# model, as soon as its stream is free and what it waits for has ended.


# %%
class Recorder(TorchDispatchMode):
    """Operations of backward: stream, what for, seconds, and how many operations of each stream must be over."""

    def __init__(self, checker):
        super().__init__()
        self.checker, self.operations, self.doing = checker, [], {}

    def here(self):
        return self.checker.driver.stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - began
        if not func.is_view:  # a view gives a device nothing to do
            known = {stream.name: count for stream, count in self.here().known.items()}
            self.operations.append((self.here().name, self.doing.get(self.here().name), seconds, known))
        return result

    def follow(self, stack):
        """Learn from hooks what is being done: a function begins to recover its step, or its gradient arrives.

        Revlib puts back what the hooks of a function that runs again have changed. It does not look into built-in
        methods, so they note what they see by one.
        """
        note, driver = self.doing.__setitem__, self.checker.driver
        for k, branch in enumerate(stack.bound_steps, start=1):

            def recovers(module, args, k=k):
                note(driver.stream.name, f"R{k}")

            def differentiates(module, args, output, k=k):
                def arrives(gradient):
                    note("main", f"D{k}")
                    note("side of main", f"R{k - 1}")

                if output.requires_grad:
                    output.register_hook(arrives)

            yield branch.fn.register_forward_pre_hook(recovers)
            yield branch.fn.register_forward_hook(differentiates)


def record(stack, scheduler):
    """One backward pass, in the order in which the device gets its work."""
    stack.scheduler = scheduler
    for t in (*wide, *stack.parameters()):
        t.grad = None  # else gradients would be added to it
    checker = RaceChecker()
    recorder = Recorder(checker)
    hooks = list(recorder.follow(stack))
    with recorder, checker:
        y1, y2 = stack(*wide)
        gradient = torch.ones_like(y1)
        recorder.operations.clear()
        torch.autograd.backward([y1, y2], [gradient, gradient])
    assert not checker.races and bool(checker.on_side) == isinstance(scheduler, PaReprop)
    for hook in hooks:
        hook.remove()
    return recorder.operations


def simulate(records):
    """The spans (stream, what for, start, end) of a device that does what the records say, each operation as fast as in
    the fastest of them."""
    ends, free, spans = {}, {}, []
    for repeats in zip(*records, strict=True):
        stream, doing, _, known = repeats[0]
        ready = [ends.get((other, count), 0.0) for other, count in known.items() if other != stream]
        start = max([free.get(stream, 0.0), *ready])
        free[stream] = end = start + min(seconds for _, _, seconds, _ in repeats)
        ends[stream, known[stream] + 1] = end
        last = next((span for span in reversed(spans) if span[0] == stream), None)
        if last and last[1] == doing and last[3] == start:
            last[3] = end
        else:
            spans.append([stream, doing, start, end])
    return spans


STEPS = 8
wide = [torch.randn(512, 64, requires_grad=True) for _ in range(2)]
stack = ReversibleSequence([(mlp(64).float(), mlp(64).float()) for _ in range(STEPS // 2)])
unchecked = Reversible(tolerance=math.inf)  # the check of what came back is left out of the picture
alone = simulate([record(stack, unchecked) for _ in range(20)])
side_by_side = simulate([record(stack, PaReprop(unchecked, trials=0)) for _ in range(20)])


# %%
def bars(axes, spans, rows):
    for stream, doing, start, end in spans:
        kind = "recover" if doing[0] == "R" else "gradient"
        axes.barh(
            rows[stream], 1e3 * (end - start), left=1e3 * start, height=0.8, color=COLOURS[kind], edgecolor="white"
        )
        axes.text(1e3 * (start + end) / 2, rows[stream], subscript(doing), ha="center", va="center", color="white")
    axes.set_yticks(list(rows.values()), ["one stream"] if len(rows) == 1 else ["main stream", "side stream"])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def subscript(name):
    return f"${name[0]}_{{{name[1:]}}}$"


COLOURS = {"recover": RED, "gradient": BLUE}
figure, (rules, *timelines) = plt.subplots(
    3, 1, figsize=(10, 5.6), layout="constrained", gridspec_kw={"height_ratios": [1.9, 1, 1.8]}
)
places = {f"R{k}": (4 - k, 1) for k in range(1, 5)} | {f"D{k}": (5 - k, 0) for k in range(1, 5)}
needs = [(f"{kind}{k + 1}", f"{kind}{k}") for kind in "RD" for k in range(1, 4)] + [
    (f"R{k}", f"D{k}") for k in range(1, 5)
]
for name, (x, y) in places.items():
    colour = COLOURS["recover" if name[0] == "R" else "gradient"]
    box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"}
    rules.text(x, y, subscript(name), ha="center", va="center", color="white", bbox=box)
for first, then in needs:
    style = {"arrowstyle": "-|>", "color": "black", "shrinkA": 14, "shrinkB": 14}
    rules.annotate("", places[then], places[first], arrowprops=style)
rules.text(4.5, 1, "$R_k$: recover step $k$ (evaluate $f_k$, subtract)", color=COLOURS["recover"], va="center")
rules.text(4.5, 0, "$D_k$: take the gradient through step $k$", color=COLOURS["gradient"], va="center")
rules.text(4.5, 0.5, "arrows: what must come before; one column runs side by side", va="center")
rules.set(xlim=(-0.5, 8.8), ylim=(-0.5, 1.5), title="What waits for what")
rules.axis("off")
bars(timelines[0], alone, {"main": 0})
bars(timelines[1], side_by_side, {"main": 0, "side of main": 1})
length = 1e3 * alone[-1][3]
for axes, scheduler, spans in zip(timelines, ("Reversible()", "PaReprop()"), (alone, side_by_side), strict=True):
    took = 1e3 * max(end for *_, end in spans)
    axes.set(xlim=(0, 1.01 * length), title=f"{scheduler}: {took:.1f} ms in the simulation")
timelines[0].set_xticks([])
timelines[0].spines["bottom"].set_visible(False)
timelines[1].set_xlabel("ms, on a simulated device with two streams that do not slow each other")
save(figure, "pareprop.png")

# %% [markdown]
# ![What waits for what, and two timelines](results/tutorial/pareprop.png)
#
# *The order and the waits are revlib's, recorded operation by operation. The lengths are those of the same operations
# on one CPU core. That two streams do not slow each other, and that handing out work takes no time, is assumed: the
# picture shows what could overlap, and is no measurement of a GPU.*
#
# On a real one, streams share the device, and the gain is what single kernels leave idle. From the table of results
# (H100, 12 ViT blocks of width 384, bfloat16 autocast, captured as CUDA graphs), time over that of storing everything:
# with 1 image a step 1.31 under `Reversible()` and 1.12 under `PaReprop(trials=0)`; with 256 images, which fill the
# device, 1.26 and 1.24. PaReprop therefore measures which is faster, and keeps to it.

# %%
ends = {doing: end for _, doing, _, end in side_by_side}
starts = {doing: start for _, doing, start, _ in side_by_side}
for k in range(1, STEPS + 1):
    assert starts[f"D{k}"] >= ends[f"R{k}"] and (k == STEPS or starts[f"D{k}"] >= ends[f"D{k + 1}"])
    assert k == STEPS or starts[f"R{k}"] >= ends[f"R{k + 1}"]
    assert k == STEPS or starts[f"R{k}"] < ends[f"D{k + 1}"]  # side by side
assert {stream for stream, doing, *_ in side_by_side if doing[0] == "D"} == {"main"}
assert max(ends.values()) < sum(end - start for *_, start, end in side_by_side)  # than all of it in a row

peaks = []
for scheduler in (unchecked, PaReprop(unchecked, trials=0)):
    stack.scheduler = scheduler
    with RaceChecker():
        peaks.append(footprint(stack, wide, stack.parameters()).peak / (4 * wide[0].numel()))
print(f"peak of backward: {peaks[0]:.1f} streams, side by side {peaks[1]:.1f}")
assert_close(peaks[1] - peaks[0], 10 + 2 / 64)  # what one function keeps, see section 3

# %% [markdown]
# ## 6. The same with revlib
#
# Five lines: a stack, forward, backward, the inverse, and another scheduler, which decides what forward keeps.

# %%
torch.manual_seed(0)
blocks, xs = [pair() for _ in range(12)], inputs()

seq = ReversibleSequence(blocks)
y1, y2 = seq(*xs)
loss_of(y1, y2).backward()
r1, r2 = seq.inverse(y1, y2)
seq.scheduler = Checkpoint()

# %% [markdown]
# The scheduler can be swapped at any time, and changes memory and time only.

# %%
assert_close((r1, r2), tuple(xs))
gradients = torch.autograd.grad(loss_of(*Stack(blocks)(*xs)), [*xs, *seq.parameters()])
assert_close([t.grad for t in (*xs, *seq.parameters())], list(gradients))

kept = {}
print(f"{'scheduler':56} streams held after forward")
for scheduler in (Naive(), KeepLast(8), Checkpoint(), Checkpoint(every=2), Reversible(), PaReprop()):
    seq.scheduler = scheduler
    assert_close(torch.autograd.grad(loss_of(*seq(*xs)), [*xs, *seq.parameters()]), gradients)
    weighed = ReversibleSequence([(mlp(WIDTH).float(), mlp(WIDTH).float()) for _ in range(12)], scheduler=scheduler)
    kept[scheduler] = footprint(weighed, streams, weighed.parameters()).held / stream_bytes
    print(f"{scheduler!s:56} {kept[scheduler]:6.1f}")
assert kept[Naive()] > kept[KeepLast(8)] > kept[Checkpoint()] > kept[Checkpoint(every=2)] > kept[Reversible()]

# %% [markdown]
# And the grid of section 4 is a coupling, with the gradient of plain addition: dropout, bfloat16 and 100 blocks
# notwithstanding, recovered gradients are those of stored activations in every bit.

# %%
found = []
for scheduler in (Naive(), Reversible()):
    torch.manual_seed(0)
    exact = ReversibleSequence([pair(dropout=0.1) for _ in range(100)], ExactAdditive(limit=1024), scheduler).float()
    xs = [x.detach().float().requires_grad_() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = exact(*xs)
    found.append(torch.autograd.grad(loss_of(y1, y2), [*xs, *exact.parameters()]))
assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
print(f"{len(found[0])} gradients of 100 blocks under bfloat16 autocast, recovered and stored: equal in every bit")

# %% [markdown]
# Where to go on, in the guide (the README of the folder revlib): *Your own block*, *Schedulers*, *Exactness*, *When
# backward refuses*, *Models*, and, on the front page, *When not to use it*.

# %% [markdown]
# ## 7. The architectures
#
# All three, as revlib builds them, are the same idea around the blocks of a known network. A block's $F$ is attention
# and its $G$ an MLP, each behind a norm. What differs is what stands between the stages, where sides halve and widths
# double. A sum needs streams of one size, so a transition is no reversible step: the streams become one, an ordinary
# layer resizes it, and it is copied into two again.
#
# - **RevViT** (Mangalam et al., *Reversible Vision Transformers*, CVPR 2022) has no transitions. Two copies of the
#   patches enter the blocks, and the head sees both streams side by side.
# - **RevSwin** (Zhu and Mangalam, 2023) merges the patches of the streams' mean two by two, as Swin does.
# - **RevMViT** (Mangalam et al., section 3.3) resizes the mean by an ordinary block of MViTv2, which pools its queries,
#   and which is checkpointed. Its last stage ends in a mean too.
#
# ![Data flow of RevViT, RevSwin and RevMViT](results/tutorial/architectures.png)
#
# First the claims of the picture, checked on the models.


# %%
def seen_by(module, run):
    """The arguments that a module gets, and what it returns, while something runs."""
    seen = []
    hook = module.register_forward_hook(lambda _, args, result, note=seen.append: note((args, result)))
    run()
    hook.remove()
    (call,) = seen
    return call


images = torch.randn(2, 3, 32, 32)
vit = RevViT(depth=2, embed_dim=32, num_heads=2)
swin = RevSwin(embed_dim=16, depths=(1, 1), num_heads=(1, 2))
mvit = RevMViT(embed_dim=16, depths=(1, 2), parts=1)

for model, stages in ((vit, [vit.blocks]), (swin, list(swin.stages)), (mvit, [stage.pairs for stage in mvit.stages])):
    for stage in stages:
        (first, second), ys = seen_by(stage, lambda model=model: model(images))
        assert first is second and len(ys) == 2  # a stage begins with two copies
for model, stage in ((vit, vit.blocks), (swin, swin.stages[-1])):
    _, ys = seen_by(stage, lambda model=model: model(images))
    (joined,), _ = seen_by(model.norm, lambda model=model: model(images))
    assert joined.shape[-1] == 2 * ys[0].shape[-1]  # both streams side by side
assert [type(fusion) for fusion in swin.fusions] == [Mean]
assert [type(layer) for layer in swin.downsamples] == [PatchMerging]
assert [type(stage.fusion) for stage in mvit.stages] == [Mean, Mean]
assert mvit.stages[0].transition is None and isinstance(mvit.stages[1].transition, MultiScaleBlock)
_, (before, _) = seen_by(mvit.stages[0], lambda: mvit(images))
_, (after, _) = seen_by(mvit.stages[1].transition, lambda: mvit(images))
assert before.shape[1] == 4 * after.shape[1] and 2 * before.shape[2] == after.shape[2]


def evaluations(module):
    """How often a training step evaluates a module: twice if it is checkpointed."""
    calls = []
    hook = module.register_forward_pre_hook(lambda *_, note=calls.append: note(1))
    model = swin if module in set(swin.modules()) else mvit
    model(images).sum().backward()
    hook.remove()
    return len(calls)


assert evaluations(swin.downsamples[0]) == 1
assert evaluations(mvit.stages[1].transition) == 2

# %% [markdown]
# And the drawing of it, with which the lesson ends.


# %%
def box(axes, x, y, text, width, height, colour="#E8E8E8", edge="none", style="-", layer=3, fontsize=9):
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12")
    shape.set(facecolor=colour, edgecolor=edge, linestyle=style, linewidth=1.3, zorder=layer)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize, zorder=4)


def arrow(axes, start, end, colour=BLUE, dashed=False):
    style = {"arrowstyle": "-|>", "color": colour, "linestyle": "--" if dashed else "-", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "linewidth": 1.5, "mutation_scale": 11}, zorder=2)


def sign(axes, x, y, text, colour):
    disc = {"boxstyle": "circle,pad=0.12", "facecolor": colour, "edgecolor": "none"}
    axes.text(x, y, text, ha="center", va="center", color="white", fontsize=10, weight="bold", bbox=disc, zorder=5)


def blank(axes, left, right, low, high):
    axes.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    axes.axis("off")


def draw_block(axes, forward):
    """Streams at heights 1 and 0; from left to right forward, from right to left back."""
    colour, symbol = (BLUE, "+") if forward else (RED, "−")
    for y, (left, right) in ((1, ("$x_1$", "$y_1$")), (0, ("$x_2$", "$y_2$"))):
        axes.text(0.25, y, left, ha="center", va="center", fontsize=13)
        axes.text(5.75, y, right, ha="center", va="center", fontsize=13)
        arrow(axes, *(((0.55, y), (5.45, y)) if forward else ((5.45, y), (0.55, y))), colour, dashed=not forward)
    for x, name, start, end in ((1.9, "F", 0, 1), (4.1, "G", 1, 0)):
        arrow(axes, (x, start), (x, end + (0.16 if end < start else -0.16)), colour, dashed=not forward)
        box(axes, x, 0.5, f"${name}$", 0.6, 0.4, colour="white", edge=colour, fontsize=12)
        sign(axes, x, end, symbol, colour)
    first, second = ("$F$ first: $y_1 = x_1 + F(x_2)$", "then $G$: $y_2 = x_2 + G(y_1)$")
    if not forward:
        first, second = ("$G$ first: $x_2 = y_2 - G(y_1)$", "then $F$: $x_1 = y_1 - F(x_2)$")
    axes.text(3, -0.6, f"{first},   {second}", ha="center", va="center", fontsize=11)
    axes.text(3, 1.6, "forward" if forward else "inverse, in backward", ha="center", fontsize=12, color=colour)
    blank(axes, 0, 6, -0.8, 1.8)


figure, panels = plt.subplots(1, 2, figsize=(10, 2.5), layout="constrained")
draw_block(panels[0], forward=True)
draw_block(panels[1], forward=False)
save(figure, "block.png")


# %%
PALE = "#DCEBF5"


def draw_stage(axes, left, F, title):
    """A reversible stage, 4.4 wide: two streams at heights 1 and -1, and beside each the way back."""
    box(axes, left + 2.2, 0, "", 4.4, 3.1, colour=PALE, layer=1)
    for y in (1, -1):
        arrow(axes, (left - 0.1, y), (left + 4.5, y))
        outside = y * 1.28
        arrow(axes, (left + 4.2, outside), (left + 0.2, outside), RED, dashed=True)
    for x, name, start, end in ((1.2, F, -1, 1), (3.2, "MLP", 1, -1)):
        arrow(axes, (left + x, start), (left + x, end * 0.8))
        box(axes, left + x, 0, name, 1.65, 0.75, colour="white", edge=BLUE)
        sign(axes, left + x, end, "+", BLUE)
    axes.text(left + 2.2, 1.75, title, ha="center", fontsize=9)
    return left + 4.4


def draw_fork(axes, left):
    for y in (1, -1):
        arrow(axes, (left, 0), (left + 0.55, y))
    axes.text(left + 0.1, 1.2, "copy", ha="center", fontsize=9)
    return left + 0.65


def draw_join(axes, left, text):
    for y in (1, -1):
        arrow(axes, (left + 0.1, y), (left + 0.55, 0.25 * y))
    box(axes, left + 1.1, 0, text, 1.1, 0.9, edge=GREY)
    return left + 1.65


def draw_layer(axes, left, text, width, dashed=False):
    if left:
        arrow(axes, (left, 0), (left + 0.35, 0))
        left += 0.35
    box(axes, left + width / 2, 0, text, width, 1.35, edge=GREY, style="--" if dashed else "-")
    return left + width


def draw_model(axes, name, F, stages, last, transition=None, dashed=False):
    axes.text(0.6, 0, "image", ha="right", va="center", fontsize=9)
    x = draw_layer(axes, 0.65, "patches,\npositions" if name == "RevViT" else "patches", 1.35)
    for stage in range(1, stages + 1):
        x = draw_stage(axes, draw_fork(axes, x), F, f"stage {stage}: blocks such as this")
        if stage < stages:
            x = draw_join(axes, x, "mean")
            axes.text(x + 1.32, -1.15, "half the sides,\ntwice the width", ha="center", va="center", fontsize=9)
            x = draw_layer(axes, x, transition, 1.95, dashed)
    draw_layer(axes, draw_join(axes, x, last), "head", 0.9)
    axes.text(-0.3, 1.55, name, fontsize=13, fontweight="bold")
    blank(axes, -0.4, 20.2, -1.7, 2)


def draw_legend(axes, left):
    lines = [
        "forward",
        "inverse: in backward, the input of every block, from the last two streams",
        "reversible: of its activations, the two streams that come out are kept",
        "ordinary layers: what backward needs of them is stored",
        "an ordinary layer, checkpointed: its input is stored",
    ]
    for y, text in zip((1.3, 0.65, 0, -0.65, -1.3), lines, strict=True):
        axes.text(left + 1.2, y, text, va="center", fontsize=9)
    arrow(axes, (left, 1.3), (left + 0.9, 1.3))
    arrow(axes, (left + 0.9, 0.65), (left, 0.65), RED, dashed=True)
    box(axes, left + 0.45, 0, "", 0.9, 0.4, colour=PALE)
    box(axes, left + 0.45, -0.65, "", 0.9, 0.4, edge=GREY)
    box(axes, left + 0.45, -1.3, "", 0.9, 0.4, edge=GREY, style="--")


figure, panels = plt.subplots(3, 1, figsize=(11, 7.2), layout="constrained")
draw_model(panels[0], "RevViT", "attention", 1, "concat")
draw_model(panels[1], "RevSwin", "window\nattention", 2, "concat", "merge 2 × 2\npatches")
transition = "MViTv2 block\nwith pooled\nqueries"
draw_model(panels[2], "RevMViT", "pooled\nattention", 2, "mean", transition, dashed=True)
draw_legend(panels[0], 11.2)
save(figure, "architectures.png")
