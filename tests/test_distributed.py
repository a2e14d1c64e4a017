"""Several processes: gradients, and parameters after optimizer steps, are those of one process on the whole batch.

The processes are real, over gloo. Starting them is what takes time here, so each family of scenes is played in one go.
"""

import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import ByHand, error, mlp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from revlib import Checkpoint, ExactAdditive, Naive, Reversible, ReversibleSequence, Step
from revlib.bijections import ActNorm, Convolution1x1, Permute
from revlib.schedulers import Budget, KeepLast, PaReprop, Scheduler

RANKS, BATCHES, WIDTH = 2, 3, 4
SCHEDULERS = [Reversible(), Naive(), Checkpoint(), KeepLast(1), Budget(fraction=0.5), PaReprop()]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


# The model, and training it


class Model(nn.Module):
    """A stack between two layers, with a part that only rank 1 uses, and only for every second batch."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = mlp,
        steps: bool = False,
        extra: bool = False,
        frozen: bool = False,
        bijections: bool = False,
        **stack: Any,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        functions = [make() for _ in range(4)]
        pairs = list(zip(functions[::2], functions[1::2], strict=True))
        self.blocks = ReversibleSequence(map(Step, functions) if steps else pairs, **stack)
        if bijections:
            for i, bijection in ((1, Convolution1x1(WIDTH)), (2, Permute(1, 0)), (0, ActNorm(WIDTH))):
                self.blocks.insert(i, bijection)
            self.blocks(*torch.randn(2, 8, WIDTH))  # ActNorm takes its parameters from a batch before it is wrapped
        self.head = nn.Linear(WIDTH, 2)
        self.extra = nn.Linear(WIDTH, 2) if extra else None
        if frozen:
            functions[0].requires_grad_(False)

    def forward(self, x: Tensor, use_extra: bool = False) -> Tensor:
        x = self.stem(x)
        y1, y2 = self.blocks(x, x.sin())
        out = self.head(y1 + y2).sin()
        return out + self.extra(y1) if self.extra is not None and use_extra else out


@dataclass(frozen=True)
class Scene:
    """A way to train a model on several processes."""

    wrap: Callable[[Any], nn.Module]
    model: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)  # where one process needs another model
    split: bool = True  # each process has its share of every batch
    by_share: bool = False  # one process takes the shares in turn: they differ in random numbers, or in what they use
    waiting: tuple[int, ...] = ()  # batches after which gradients stay with each process; all make one optimizer step
    tolerance: float = 1e-10
    dtype: torch.dtype = torch.float64
    watch: Callable[[Model, Scheduler], None] | None = None  # a look at the trained model

    def together(self, scheduler: Scheduler) -> list[Tensor]:
        model = self.fresh(scheduler)
        found = self.train(self.wrap(model), [dist.get_rank()] if self.split else [None], wait=self.waiting)
        if self.watch is not None:
            self.watch(model, scheduler)
        return found

    def on_one_process(self) -> list[Tensor]:
        shares = list(range(RANKS)) if self.by_share else [None]
        return self.train(self.fresh(ByHand(), **self.alone), shares, wait=())

    def fresh(self, scheduler: Scheduler, **other: Any) -> Model:
        torch.manual_seed(0)
        return Model(**{**self.model, **other}, scheduler=scheduler).to(self.dtype)

    def train(self, model: nn.Module, shares: list[int | None], wait: tuple[int, ...]) -> list[Tensor]:
        """Train on these shares of each batch. -> the last gradients, parameters and buffers."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i, batch in enumerate(batches(self.dtype)):
            last = i == BATCHES - 1
            with waiting(model) if i in wait else nullcontext():
                for share in shares:
                    torch.manual_seed(10 * i + (share or 0))
                    part = batch if share is None else batch.chunk(RANKS)[share]
                    loss = model(part, share == 1 and i % 2 == 0).square().mean()
                    (loss / len(shares)).backward()
            if last or not self.waiting:
                optimizer.step()
            if not (last or self.waiting):
                optimizer.zero_grad()
        parameters = list(model.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return [whole(t) for t in (*gradients, *parameters, *model.buffers())]


def batches(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCHES, 8, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(5))


@contextmanager
def waiting(model: nn.Module) -> Iterator[None]:
    """Gradients stay with each process, for now."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


# Distributed data parallelism


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return partial(DistributedDataParallel, **options)


EXCHANGES: list[tuple[int, bool]] = []
note_exchange = EXCHANGES.append  # out of sight of the guards, which put lists back for a repetition


class SyncedNorm(nn.Module):
    """Batch norm over the batch of all processes, with running statistics and a note of each exchange."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.together = together
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("running", torch.zeros(WIDTH))

    def mean(self, x: Tensor) -> Tensor:
        x = x.mean(0)
        if not self.together:
            return x
        note_exchange((id(self), torch._C._current_graph_task_id() != -1))
        return all_reduce(x) / RANKS

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        with torch.no_grad():
            self.running.lerp_(mean, 0.1)
        x = x - mean
        return self.weight * x * (self.mean(x.square()) + 1e-5).rsqrt()


def synced(together: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), SyncedNorm(together), nn.Tanh(), SyncedNorm(together))


def check_exchanges(model: Model, scheduler: Scheduler) -> None:
    """Processes that repeat their exchanges in different orders would exchange the wrong things."""
    numbers = {id(m): i for i, m in enumerate(model.modules())}
    mine = [(numbers[norm], again) for norm, again in EXCHANGES]
    EXCHANGES.clear()
    everyones: list[Any] = [None] * RANKS
    dist.all_gather_object(everyones, mine)
    assert everyones[0] == everyones[1], "the exchanges come in different orders"
    assert any(again for _, again in mine) == (not isinstance(scheduler, Naive)), "nothing was repeated"


class Timeline:
    """What happens in which order: forward, functions repeated in backward, buckets of gradients on their way."""

    events: list[str] = []  # noqa: RUF012

    @classmethod
    def wrap(cls, model: Model) -> nn.Module:
        def forward(*_: Any) -> None:
            cls.events = ["forward"]

        def function(*_: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                cls.events.append("repeat")

        def bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            cls.events.append("bucket")
            return allreduce_hook(group, bucket)

        model.register_forward_pre_hook(forward)
        for F, G in model.blocks:
            F.register_forward_pre_hook(function)
            G.register_forward_pre_hook(function)
        together = DistributedDataParallel(model, bucket_cap_mb=1e-5)
        together.register_comm_hook(None, bucket)
        return together

    @classmethod
    def watch(cls, model: Model, scheduler: Scheduler) -> None:
        """Of the last batch: buckets leave while functions are still repeated, and not all of them at the end."""
        events = cls.events
        if isinstance(scheduler, Reversible | Checkpoint):
            repeats = [i for i, event in enumerate(events) if event == "repeat"]
            assert len(repeats) == 2 * len(model.blocks), events
            assert "bucket" in events[: repeats[0]], "the head's gradients wait for the first repetition"
            assert all("bucket" in events[a:b] for a, b in itertools.pairwise(repeats)), events


def dropout() -> nn.Module:
    return mlp(dropout=0.3)


DDP = {
    "plain": Scene(ddp()),
    "find_unused_parameters": Scene(ddp(find_unused_parameters=True), {"extra": True}, by_share=True),
    "static_graph": Scene(ddp(static_graph=True)),
    "static_graph, no_sync": Scene(ddp(static_graph=True), waiting=(1,)),  # torch wants to see the first batch through
    "no_sync": Scene(ddp(), waiting=(0, 1)),
    "no_sync, dropout": Scene(ddp(), {"make": dropout}, waiting=(0, 1), by_share=True),
    "gradient_as_bucket_view": Scene(ddp(gradient_as_bucket_view=True)),
    "small buckets": Scene(ddp(bucket_cap_mb=1e-5)),
    "overlap": Scene(Timeline.wrap, watch=Timeline.watch),
    "dropout": Scene(ddp(), {"make": dropout}, by_share=True),
    "frozen": Scene(ddp(), {"frozen": True}),
    "exchanges inside F": Scene(
        ddp(), {"make": partial(synced, True)}, {"make": partial(synced, False)}, watch=check_exchanges
    ),
    "exact": Scene(ddp(), {"coupling": ExactAdditive()}, dtype=torch.float32, tolerance=1e-4),
    "bijections": Scene(ddp(), {"bijections": True}),
}


# Fully sharded data parallelism


def mesh() -> Any:
    return init_device_mesh("cpu", (RANKS,))


def each_function(model: Model, root: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    for F, G in model.blocks:
        fully_shard(F, mesh=mesh(), **options)
        fully_shard(G, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **(options if root is None else root))


def each_pair_as_a_group(model: Model) -> nn.Module:
    for F, G in model.blocks:
        fully_shard([F, G], mesh=mesh())
    return fully_shard(model, mesh=mesh())


def each_step(model: Model, **options: Any) -> nn.Module:
    for step in model.blocks:
        fully_shard(step, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def the_stack(model: Model, **options: Any) -> nn.Module:
    fully_shard(model.blocks, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def the_root(model: Model, **options: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh(), **options)


BFLOAT16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
FSDP = {
    "F and G": Scene(each_function),
    "F and G, resharded": Scene(partial(each_function, reshard_after_forward=True)),
    "F and G, kept whole": Scene(partial(each_function, reshard_after_forward=False)),
    "F and G, dropout": Scene(each_function, {"make": dropout}, by_share=True),
    "F and G, accumulating": Scene(each_function, waiting=(0, 1)),
    "pairs as groups": Scene(each_pair_as_a_group),
    "steps": Scene(each_step, {"steps": True}),
    "the stack": Scene(partial(the_stack, reshard_after_forward=True)),
    "the root": Scene(the_root),
    "the root, with bijections": Scene(the_root, {"bijections": True}),
    "the stack, with bijections": Scene(partial(the_stack, reshard_after_forward=True), {"bijections": True}),
    "the root, resharded": Scene(partial(the_root, reshard_after_forward=True)),
    "bfloat16": Scene(partial(each_function, **BFLOAT16), tolerance=0.05),
    "bfloat16 functions, exact": Scene(
        partial(each_function, root={}, **BFLOAT16), {"coupling": ExactAdditive()}, dtype=torch.float32, tolerance=0.05
    ),
}


# Tensor parallelism


class Heads(nn.Module):
    """Attention over the rows of a batch, with as many heads as its layers have columns for."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(0, 1) for layer in (self.q, self.k, self.v))
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def in_parts(model: Model) -> nn.Module:
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for function in model.blocks.modules():
        if isinstance(function, Heads):
            parallelize_module(function, mesh(), {"q": columns, "k": columns, "v": columns, "proj": rows})
        elif isinstance(function, nn.Sequential) and len(function) == len(mlp()):
            parallelize_module(function, mesh(), {"1": columns, "4": rows})
    return model


def spread(model: Model) -> nn.Module:
    """Everything is a DTensor, the streams too, each process holding some rows of them."""

    def enter(_: nn.Module, inputs: Any, mesh: Any) -> Any:
        return (distribute_tensor(inputs[0], mesh, [Shard(0)]), *inputs[1:])

    def leave(_: nn.Module, out: Any, mesh: Any) -> Tensor:
        return out.full_tensor()

    return distribute_module(model, mesh(), input_fn=enter, output_fn=leave)


TENSOR_PARALLEL = {
    "MLPs": Scene(in_parts, split=False),
    "attention": Scene(in_parts, {"make": Heads}, split=False),
    "streams": Scene(spread, split=False),
    "streams, exact": Scene(spread, {"coupling": ExactAdditive()}, split=False, dtype=torch.float32, tolerance=1e-4),
    "in steps": Scene(in_parts, {"steps": True}, split=False),
}


# Pipelines


class Stage(nn.Module):
    """One of the halves of a model."""

    def __init__(self, model: Model, index: int) -> None:
        super().__init__()
        half = len(model.blocks) // RANKS
        self.blocks = model.blocks[index * half : (index + 1) * half]
        self.stem, self.head = (model.stem, None) if index == 0 else (None, model.head)

    def forward(self, *streams: Tensor) -> Any:
        if self.stem is not None:
            x = self.stem(*streams)
            return self.blocks(x, x.sin())
        y1, y2 = self.blocks(*streams)
        return self.head(y1 + y2).sin()


@dataclass(frozen=True)
class Pipeline:
    """Each process holds one half of the stack, and passes streams on."""

    schedule: type
    make: Callable[[], nn.Module] = mlp
    parts: int = 4
    tolerance: float = 1e-10

    def together(self, scheduler: Scheduler) -> list[Tensor]:
        rank = dist.get_rank()
        model = self.fresh(scheduler)
        stage = Stage(model, rank)
        # Told the shapes, it makes no trial run on uninitialised memory, which need not invert accurately.
        with torch.random.fork_rng():
            example = next(iter(batches(torch.float64))).chunk(self.parts)[0]
            streams = tuple(y.detach().requires_grad_() for y in Stage(model, 0)(example))
            result = Stage(model, 1)(*streams)
        args = ((example,), streams) if rank == 0 else (streams, (result.detach().requires_grad_(),))
        pipe = PipelineStage(stage, rank, RANKS, torch.device("cpu"), *args)
        schedule = self.schedule(pipe, self.parts, loss_fn=lambda y, target: (y - target).square().mean())
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)
        for batch in batches(torch.float64):
            optimizer.zero_grad()
            schedule.step(*([batch] if rank == 0 else []), target=target(batch) if rank == RANKS - 1 else None)
            optimizer.step()
        return self.everything(stage)

    def on_one_process(self) -> list[Tensor]:
        model = self.fresh(ByHand())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in batches(torch.float64):
            optimizer.zero_grad()
            (model(batch) - target(batch)).square().mean().backward()
            optimizer.step()
        return self.everything(Stage(model, dist.get_rank()))

    def fresh(self, scheduler: Scheduler) -> Model:
        torch.manual_seed(0)
        return Model(self.make, scheduler=scheduler).double()

    def everything(self, stage: Stage) -> list[Tensor]:
        return [whole(t) for p in stage.parameters() for t in (p, p.grad)]


def target(batch: Tensor) -> Tensor:
    return batch[:, :2].cos()


PIPELINE = {"GPipe": Pipeline(ScheduleGPipe), "1F1B": Pipeline(Schedule1F1B)}


# Playing them

FAMILIES: dict[str, dict[str, Any]] = {
    "DDP": DDP,
    "FSDP": FSDP,
    "tensor parallel and pipeline": {**TENSOR_PARALLEL, **PIPELINE},
}


def play(rank: int, store: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=patience)
    try:
        work()
    finally:
        dist.destroy_process_group()
    # Threads of gloo may outlive its process group, and drop the last reference to a tensor while the interpreter is
    # taken down. That aborts the process (https://github.com/pytorch/pytorch/issues/190489), so this one just ends.
    os._exit(0)


def train_as_one(family: str, all_for: int) -> None:
    """The first scenes under all schedulers, the others under the first two; and what is refused."""
    wrong = []
    for i, (name, scene) in enumerate(FAMILIES[family].items()):
        want, bits = scene.on_one_process(), None
        for scheduler in SCHEDULERS if i < all_for else SCHEDULERS[:2]:
            try:
                got = scene.together(scheduler)
            except Exception as problem:
                raise AssertionError(f"{family}, {name}, {scheduler}") from problem
            if (far := error(got, want)) > scene.tolerance:
                wrong.append(f"{family}, {name}, {scheduler}: {far:.1e} from one process")
            if "exact" in name and bits is not None and not all(map(torch.equal, got, bits)):
                wrong.append(f"{family}, {name}, {scheduler}: not the bits of {SCHEDULERS[0]}")
            bits = bits or got
    assert not wrong, "\n".join(wrong)
    REFUSALS.get(family, lambda: None)()


def refuse_sharded_pairs() -> None:
    model = Model()
    for pair in model.blocks:
        fully_shard(pair, mesh=mesh())
    with pytest.raises(TypeError, match=r"block 0 .* use fully_shard\(pair.F\)"):
        fully_shard(model, mesh=mesh())(torch.randn(2, WIDTH))


def refuse_synced_norm_on_cpu() -> None:
    """torch has it for accelerators only, and says so."""
    model = Model(lambda: nn.SyncBatchNorm(WIDTH))
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(model)(torch.randn(2, WIDTH))


REFUSALS = {"DDP": refuse_synced_norm_on_cpu, "FSDP": refuse_sharded_pairs}


@pytest.mark.some(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("all_for", [1, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "all"])
def test_processes_train_as_one(tmp_path, family, all_for):
    spawn(play, (str(tmp_path / "store"), partial(train_as_one, family, all_for)), nprocs=RANKS)


# DataParallel


class Replicas(nn.Module):
    """What DataParallel does on two GPUs: copies whose parameters are no leaves any more, each with its share."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return torch.cat([self.copy()(share) for share in x.chunk(2)])

    def copy(self) -> nn.Module:
        copies = {m: m._replicate_for_data_parallel() for m in self.model.modules()}
        for m, copy in copies.items():
            for name, child in m._modules.items():
                setattr(copy, name, copies[child] if child is not None else None)
            for name, p in m._parameters.items():
                setattr(copy, name, p.view_as(p))
        return copies[self.model]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
@pytest.mark.parametrize("wrap", [nn.DataParallel, Replicas])
def test_data_parallel(wrap, scheduler):
    scene = Scene(wrap)
    got = scene.train(wrap(scene.fresh(scheduler)), [None], wait=())
    assert error(got, scene.on_one_process()) < 1e-10
