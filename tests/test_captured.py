"""Captured training steps, as far as a CPU shows: buffers, sizes, resuming, and that warming up leaves no trace."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from research_cases import small
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from research.data import readers
from research.data.augment import mixer
from research.data.batches import Batches, Normalizer
from research.settings.config import Config
from research.shared.captured import CUDA, WARM_UPS, Captured, Step
from research.training import checkpoint, loop
from research.training.build import build
from research.training.checkpoint import Run
from research.training.inputs import Inputs
from research.training.log import Log

OFF = torch.autocast("cpu", enabled=False)


class Rerun(CUDA):
    """As strict as a graph: it does nothing until it is replayed, and then knows no tensor that is new."""

    def __init__(self):
        self.warmed, self.seen = 0, []

    def warm_up(self, work, times=WARM_UPS):
        for _ in range(times):
            work()
        self.warmed += times

    def capture(self, work):
        def step() -> None:
            result.copy_(work())

        result = torch.full((3,), torch.nan)
        self.seen = places(self.run)
        return step, result

    def watching(self, run: Run) -> "Rerun":
        self.run = run
        return self


def places(run: Run) -> list[int]:
    """Where what a step reads and writes lies."""
    states = [t for p in run.model.parameters() for t in run.optimizer.state[p].values()]
    tensors = [*run.model.parameters(), *run.model.buffers(), *states, run.optimizer.param_groups[0]["lr"]]
    tensors += run.ema.module.parameters() if run.ema else []
    return [t.data_ptr() for t in tensors]


def make(device: Rerun | None = None, seed: int = 0, tuned: bool = False) -> tuple[Run, Step]:
    """``tuned``: with an average of the weights, short gradients and smoothed labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    ema = ModelEmaV3(model, 0.5) if tuned else None
    run = Run(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), torch.Generator(), ema)
    step = loop.train_step(run, OFF, smoothing=0.1, longest=0.2) if tuned else loop.train_step(run, OFF)
    changed = [model, *([ema.module] if ema else [])]
    return run, step if device is None else Captured(step, changed, optimizer, device.watching(run))


def epoch(soft: bool = False) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    if soft:  # as mixup makes them
        return [(images, F.one_hot(labels, 3) * 0.75 + 0.25 / 3) for images, labels in epoch()]
    return [(torch.randn(n, 1, 2, 2, generator=draws), torch.randint(3, (n,), generator=draws)) for n in (8, 8, 5)]


def same(a: Run, b: Run) -> bool:
    states = [[t for p in run.model.parameters() for t in run.optimizer.state[p].values()] for run in (a, b)]
    tensors = [[*run.model.state_dict().values(), *state] for run, state in zip((a, b), states, strict=True)]
    for run, found in zip((a, b), tensors, strict=True):
        found += run.ema.state_dict().values() if run.ema else []
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("tuned", [False, True])
def test_a_captured_step_trains_bit_for_bit_as_an_eager_one(tuned):
    means, runs, numbers = [], [], []
    device = Rerun()
    for chosen in (None, device):
        run, step = make(chosen, tuned=tuned)
        means.append([loop.train_epoch(run, epoch(soft=tuned), step) for _ in range(3)])
        runs.append(run)
        numbers.append(torch.rand(1))
    assert means[0] == means[1] and numbers[0] == numbers[1] and same(*runs)
    assert device.warmed == 2 * WARM_UPS  # for batches of 8 and of 5
    assert places(runs[1]) == device.seen  # also the learning rate, which the schedule has changed
    assert runs[1].optimizer.param_groups[0]["lr"].item() < 0.1


def test_scores_stay_when_the_next_batch_comes():
    _, step = make(Rerun())
    (first, labels), (second, others), _ = epoch()
    score = step(first, labels)
    before = score.clone()
    step(second, others)
    assert torch.equal(score, before) and not score.isnan().any()
    assert torch.equal(first, epoch()[0][0])  # the buffers are its own


def test_what_warming_up_raises_comes_through():
    run, step = make(Rerun())
    run.model.append(nn.Linear(7, 7))
    with pytest.raises(RuntimeError):
        step(*epoch()[0])


@pytest.mark.parametrize("tuned", [False, True])
def test_resuming_goes_on_where_a_captured_run_was(tmp_path: Path, tuned):
    straight, step = make(Rerun(), tuned=tuned)
    for number in range(4):
        loop.train_epoch(straight, epoch(), step)
        if number == 1:
            checkpoint.save(tmp_path / "last.pt", straight, Log({"config": Config().as_json(), "environment": {}}, []))
    resumed, step = make(Rerun(), seed=1, tuned=tuned)
    inputs = Inputs.of(small((1, 2, 2)), Normalizer.of([0.5], [0.25]))
    checkpoint.resume(tmp_path / "last.pt", resumed, Config(), inputs, {})
    for _ in range(2):
        loop.train_epoch(resumed, epoch(), step)
    assert same(straight, resumed)
    assert resumed.optimizer.param_groups[0]["lr"].device == next(resumed.model.parameters()).device


def test_what_the_flag_builds():
    for graph in (False, True):
        config = Config(graph=graph)
        run = build(config, readers.digits(None, config.cache_dir), torch.device("cpu"))
        (group,) = run.optimizer.param_groups
        assert group["capturable"] == graph and isinstance(group["lr"], Tensor) == graph
        assert float(run.schedule.get_last_lr()[0]) == pytest.approx(config.lr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("scheduler", ["naive", "reversible", "pareprop"])
def test_on_a_gpu(tmp_path: Path, scheduler, amp):
    """The same run eager, captured, and captured in two halves; with random numbers and a smaller last batch."""
    config, device = Config(graph=True, scheduler=scheduler, drop_path=0.3), torch.device("cuda", 0)
    images = readers.digits(None, config.cache_dir).prepare(100, 40, device)
    autocast, found = torch.autocast("cuda", torch.bfloat16, enabled=amp), []
    log, last = Log({"config": config.as_json(), "environment": {}}, []), tmp_path / "last.pt"
    for way in ("eager", "captured", "resumed"):
        torch.manual_seed(0)
        run = build(config, images, device)
        step = loop.train_step(run, autocast)
        step = step if way == "eager" else Captured(step, [run.model], run.optimizer)
        if way == "resumed":
            torch.manual_seed(1)
            checkpoint.resume(last, run, config, Inputs.of(images, Batches(images, 32).normalize), {})
        for number in range(2 if way == "resumed" else 0, 4):
            means = loop.train_epoch(run, Batches(images, 32).train(run.draws, ""), step)
            if way == "captured" and number == 1:
                checkpoint.save(last, run, log)
        found.append((means[0], loop.evaluate(run.model, Batches(images, 32).test(""), autocast)[0]))
    assert found[1] == pytest.approx(found[0], rel=0.05 if amp else 1e-2)
    assert found[2] == pytest.approx(found[1], rel=0.05 if amp else 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tuned", [False, True])
def test_the_host_never_waits_within_an_epoch(tuned):
    config, device = Config(graph=True, drop_path=0.3), torch.device("cuda", 0)
    if tuned:
        config = replace(config, optimizer="adamw", weight_decay=0.05, ema=0.9, mixup=0.8, cutmix=1.0, rand_augment=9)
    images = readers.digits(None, config.cache_dir).prepare(100, 40, device)
    run = build(config, images, device)
    step = loop.train_step(run, torch.autocast("cuda", enabled=False), longest=float(tuned))
    step = Captured(step, [run.model, *([run.ema.module] if run.ema else [])], run.optimizer)
    loader = Batches(images, 32, magnitude=config.rand_augment, mix=mixer(config.mixup, config.cutmix, 10))
    loop.train_epoch(run, loader.train(run.draws, ""), step)
    batches = loader.train(run.draws, "")
    step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
