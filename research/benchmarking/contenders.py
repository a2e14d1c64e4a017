"""What the benchmark compares: the schedulers of revlib, and what users have today, on the same blocks.

A new scheduler is a line of SCHEDULERS, a new block a line of BLOCKS, anything else a line of CONTENDERS.
"""

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from research.benchmarking.instruments import Run
from research.benchmarking.libraries import Block, invtorch, memcnn, revtorch
from revlib import Coupling, ExactAdditive, Functional, ReversibleSequence, Step, positionwise
from revlib.models import RevMViT, RevSwin
from revlib.schedulers import Anchored, Budget, Checkpoint, KeepLast, Naive, PaReprop, Reversible, Scheduler

Law = Callable[..., tuple[Tensor, ...]]  # of F, G and the streams -> the streams after the block

SCHEDULERS: dict[str, Scheduler] = {
    "naive": Naive(),
    "reversible": Reversible(),
    "pareprop": PaReprop(),
    "pareprop-always": PaReprop(trials=0),
    "keep-last-1": KeepLast(1),
    "anchored-4": Anchored(4),
    "checkpoint": Checkpoint(),
    "checkpoint-2": Checkpoint(every=2),
    "functional": Functional(),
    "budget-0.25": Budget(fraction=0.25),
    "budget-0.5": Budget(fraction=0.5),
    "budget-0.75": Budget(fraction=0.75),
}


def vit(width: int, heads: int) -> Block:
    """Attention and MLP of a pre-norm ViT block, from timm."""
    return (
        nn.Sequential(nn.LayerNorm(width), Attention(width, heads, qkv_bias=True)),
        nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)),
    )


def vits(depth: int, width: int, heads: int, tokens: int) -> list[Block]:
    return [vit(width, heads) for _ in range(depth)]


def swins(depth: int, width: int, heads: int, tokens: int) -> list[Block]:
    """RevSwin's pairs on a square map, in windows of 7x7, which every other block shifts."""
    side = side_of(tokens)
    model = RevSwin(side, 1, embed_dim=width, depths=(depth,), num_heads=(heads,), window_size=7)
    return [(nn.Sequential(nn.Unflatten(1, (side, side)), F, nn.Flatten(1, 2)), G) for F, G in model.stages[0]]


def mvits(depth: int, width: int, heads: int, tokens: int) -> list[Block]:
    """RevMViT's pairs on a square map, with keys and values pooled by 2."""
    model = RevMViT(side_of(tokens), 1, embed_dim=width, depths=(depth,), num_heads=heads, kv_stride=2)
    return [(F, G) for F, G in model.stages[0].pairs]


def side_of(tokens: int) -> int:
    """The side of a square map of so many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"tokens must be a square number, as blocks see maps, got {tokens}; try {side * side}")
    return side


BLOCKS: dict[str, Callable[[int, int, int, int], list[Block]]] = {"vit": vits, "swin": swins, "mvit": mvits}


@dataclass(frozen=True)
class Contender:
    """``build(blocks, compiled)`` makes the run of a stack, where ``compiled`` says whether F and G are.

    ``package``: what must be installed for it, and may fail. ``compiles``: it compiles whole blocks by itself.
    ``warm_up``: steps on CUDA before anything is measured; PaReprop needs some to decide. ``torch_from``: the version
    of torch that it takes.
    """

    build: Callable[[Sequence[Block], bool], Run]
    warm_up: int = 1
    streams: int = 2
    package: str | None = None
    on_cuda_only: bool = False
    compiles: bool = False
    torch_from: str = ""

    def why_not(self, device: torch.device) -> str | None:
        """The reason why it cannot run here, and what to do."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed; pip install --no-deps {self.package}"
        if torch.__version__ < self.torch_from:
            return f"it takes torch {self.torch_from}, this is {torch.__version__}"
        if self.on_cuda_only and device.type != "cuda":
            return f"it says something on CUDA only, not on {device.type}"
        return None


# ---------------------------------------------------------------------------------------------- block by block
def two_streams(F: nn.Module, G: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    y1 = x1 + F(x2)
    return y1, x2 + G(y1)


def one_stream(F: nn.Module, G: nn.Module, x: Tensor) -> tuple[Tensor]:
    x = x + F(x)
    return (x + G(x),)


def scheduled(scheduler: Scheduler, coupling: Coupling | None = None, compiles: bool = False) -> Contender:
    """A stack under a scheduler. If it ``compiles``, F and G are in wrappers of their own: other contenders run the
    same modules uncompiled, in the same rounds."""

    def build(blocks: Sequence[Block], compiled: bool) -> Run:
        if compiles:
            blocks = [(torch.compile(F, dynamic=False), torch.compile(G, dynamic=False)) for F, G in blocks]
        stack = ReversibleSequence(blocks, coupling, copy.deepcopy(scheduler))  # some measure
        return lambda x: stack(x, x)

    warm_up = 20 if isinstance(scheduler, PaReprop) and scheduler.trials else 1
    return Contender(build, warm_up=warm_up, compiles=compiles)


def in_one_graph(blocks: Sequence[Block], compiled: bool) -> Run:
    """The whole stack compiled, forward and backward as a graph each."""
    stack = ReversibleSequence(blocks, scheduler=Functional())
    return torch.compile(lambda x: stack(x, x), fullgraph=True, dynamic=False)


def in_parts(chunks: int) -> Contender:
    """Reversible, with each G run on a part of the positions at a time."""

    def build(blocks: Sequence[Block], compiled: bool) -> Run:
        stack = ReversibleSequence(item for F, G in blocks for item in (Step(F), *positionwise(G, chunks)))
        return lambda x: stack(x, x)

    return Contender(build)


def blockwise(law: Law, around: Callable[[Law, bool], Law] = lambda law, compiled: law, **facts: Any) -> Contender:
    """Blocks one after another, each called by ``around(law, compiled)``."""
    streams = 1 if law is one_stream else 2

    def build(blocks: Sequence[Block], compiled: bool) -> Run:
        call = around(law, compiled)

        def run(x: Tensor) -> Sequence[Tensor]:
            state = tuple(x.view_as(x) for _ in range(streams))  # a compiler would treat one tensor twice apart
            for F, G in blocks:
                state = call(F, G, *state)
            return state

        return run

    return Contender(build, streams=streams, **facts)


def checkpointed(law: Law, compiled: bool) -> Law:
    return partial(checkpoint, law, use_reentrant=False)


ATTENTION = [
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
]
MATMUL = ["mm", "addmm", "bmm", "baddbmm"]


def keeping(names: Sequence[str]) -> Callable[[Law, bool], Law]:
    """Selective checkpointing that keeps what these operations return.

    It cannot see operations inside compiled functions, so with those it is compiled as well, around them.
    """
    operations = [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]

    def around(law: Law, compiled: bool) -> Law:
        contexts = partial(create_selective_checkpoint_contexts, operations)
        call = partial(checkpoint, law, use_reentrant=False, context_fn=contexts)
        return torch.compile(call, dynamic=False) if compiled else call

    return around


def budgeted(budget: float) -> Callable[[Law, bool], Law]:
    """Blocks compiled one by one, where backward may store this share of a block's activations."""

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._functorch import config  # the setting has no other address, and importing the compiler is slow
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return lambda law, compiled: torch.compile(law, backend=backend, dynamic=False)


def offloaded(law: Law, compiled: bool) -> Law:
    def call(*args: Any) -> tuple[Tensor, ...]:
        with save_on_cpu(pin_memory=True):
            return law(*args)

    return call


WITH_COMPILED = ["naive", "reversible", "checkpoint-2", "checkpoint"]

CONTENDERS: dict[str, Contender] = {
    **{name: scheduled(scheduler) for name, scheduler in SCHEDULERS.items()},
    **{f"{name}-compiled": scheduled(SCHEDULERS[name], compiles=True) for name in WITH_COMPILED},
    "functional-in-one-graph": Contender(in_one_graph, compiles=True, torch_from="2.12"),
    "reversible-exact": scheduled(Reversible(), ExactAdditive()),
    "reversible-in-2-parts": in_parts(2),
    "torch-checkpoint": blockwise(two_streams, checkpointed),
    "torch-selective-attention": blockwise(two_streams, keeping(ATTENTION)),
    "torch-selective-matmul": blockwise(two_streams, keeping([*ATTENTION, *MATMUL])),
    "torch-compile": blockwise(two_streams, budgeted(1.0), compiles=True),
    "torch-compile-budget-0.5": blockwise(two_streams, budgeted(0.5), compiles=True),
    "torch-compile-budget-0.2": blockwise(two_streams, budgeted(0.2), compiles=True),
    "save-on-cpu": blockwise(two_streams, offloaded, on_cuda_only=True),
    "one-stream": blockwise(one_stream),
    "one-stream-checkpoint": blockwise(one_stream, checkpointed),
    "one-stream-selective-attention": blockwise(one_stream, keeping(ATTENTION)),
    "one-stream-selective-matmul": blockwise(one_stream, keeping([*ATTENTION, *MATMUL])),
    "one-stream-compile": blockwise(one_stream, budgeted(1.0), compiles=True),
    "one-stream-compile-budget-0.5": blockwise(one_stream, budgeted(0.5), compiles=True),
    "memcnn": Contender(memcnn, package="memcnn"),
    "revtorch": Contender(revtorch, package="revtorch"),
    "invtorch": Contender(invtorch, package="invtorch"),
}
DEFAULT = [
    *("naive", "reversible", "reversible-in-2-parts", "checkpoint-2", "checkpoint"),
    *("budget-0.25", "budget-0.5", "budget-0.75", "torch-checkpoint", "one-stream", "one-stream-checkpoint"),
]
