"""The benchmark: what it counts, what it writes, how it goes on, and what it refuses."""

import gc
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from research import benchmark, gpu
from research.benchmarking import contenders, instruments, libraries, pareto
from research.benchmarking.contenders import CONTENDERS, SCHEDULERS, Contender, vit
from research.benchmarking.instruments import cost, loss_of
from research.benchmarking.points import Point, Record, table
from research.settings.config import RECIPES, Config, flags
from research.studies import figures, jobs
from revlib import ReversibleSequence
from revlib.models import RevMViT, RevSwin
from revlib.schedulers import Checkpoint, Naive, Reversible
from revlib.testing import footprint

TINY = "--width 8 --heads 2 --tokens 3 --depths 1 --batch-sizes 1 --repeats 1".split()
FEW = ["--contenders", "reversible,torch-checkpoint,one-stream"]
SWEEP = [*FEW, "--depths", "1,3", "--batch-sizes", "1,2"]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """The instrument collects garbage first, among all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch):
    """They are slow; tests of them undo this."""
    for name in ("draw_memory", "draw_pareto", "draw_limits"):
        monkeypatch.setattr(benchmark, name, lambda *args: None)


def run(out: Path, *args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(benchmark.app, [*TINY, "--out", str(out), *(str(arg) for arg in args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[\s─-╿]", "", result.output)


def points_of(out: Path) -> list[Point]:
    return Record.read(out / "points.json").points


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    code, output = run(out, *SWEEP)
    assert code == 0, output
    return out


# What it measures


def test_a_point_a_contender_and_cell(finished):
    points = points_of(finished)
    names = ["naive", "reversible", "torch-checkpoint", "one-stream"]
    assert [(p.contender, p.depth, p.batch) for p in points] == [
        (name, depth, batch) for depth in (1, 3) for batch in (1, 2) for name in names
    ]
    assert all(p.error is None and 0 < p.held <= p.peak and p.unit == 4 * 3 * 8 * p.batch for p in points)
    assert all(p.allocated is None and p.reserved is None for p in points)  # these are CUDA's
    weights = sum(w.numel() for f in vit(8, 2) for w in f.parameters())
    assert all(p.parameters == weights * p.depth for p in points)


def test_times_are_ratios_within_rounds(finished):
    points = {(p.contender, p.depth, p.batch): p for p in points_of(finished)}
    for (name, depth, batch), p in points.items():
        assert p.images_per_second == pytest.approx(batch / p.seconds)
        # A single round was timed, so that the median of ratios is the ratio.
        assert p.to_naive == pytest.approx(p.seconds / points["naive", depth, batch].seconds), name
        assert p.to_checkpoint == pytest.approx(p.seconds / points["torch-checkpoint", depth, batch].seconds), name


def test_ratios_are_medians_of_those_of_rounds_after_the_first(monkeypatch):
    points = [Point(name, "vit", 1, 6, False, 1, 1) for name in ("naive", "reversible")]
    seconds = {"naive": [50.0, 1.0, 2.0, 4.0], "reversible": [1.0, 2.0, 6.0, 16.0]}
    monkeypatch.setattr(benchmark, "step_seconds", lambda name, x, clock: seconds[name].pop(0))
    benchmark.time_rounds(points, {"naive": "naive", "reversible": "reversible"}, None, 3, lambda: None)
    naive, reversible = points
    assert (naive.seconds, naive.to_naive, naive.images_per_second) == (2.0, 1.0, 3.0)
    assert (reversible.seconds, reversible.to_naive, reversible.to_checkpoint) == (6.0, 3.0, None)


def test_contenders_of_the_same_function_have_its_gradients(finished):
    for p in points_of(finished):
        if p.contender == "one-stream":
            assert p.gradient_error is None
        else:
            assert p.gradient_error < 1e-5 and (p.contender != "naive" or p.gradient_error == 0)


def test_a_wrong_gradient_shows(tmp_path, monkeypatch):
    build = CONTENDERS["naive"].build

    def detached(blocks: Any, compiled: bool) -> Any:
        return lambda x: [build(blocks, compiled)(x)[0], x]

    monkeypatch.setitem(CONTENDERS, "wrong", Contender(detached))
    assert run(tmp_path, "--contenders", "wrong", "--depths", 1, "--repeats", 0)[0] == 0
    assert all(p.gradient_error > 1e-2 for p in points_of(tmp_path) if p.contender == "wrong")


@pytest.mark.parametrize("scheduler", [Naive(), Reversible(), Checkpoint()])
def test_the_instrument_equals_footprint_to_the_byte(scheduler):
    torch.manual_seed(0)
    stack = ReversibleSequence([vit(8, 2) for _ in range(3)], scheduler=scheduler)
    x = torch.randn(2, 5, 8, requires_grad=True)
    found = cost(lambda x: stack(x, x), x, list(stack.parameters()))
    assert (found.held, found.peak) == footprint(lambda x: stack(x, x), [x], list(stack.parameters()))


def test_the_instrument_sees_a_storage_that_is_emptied():
    """As other libraries do to free what the caller still holds."""

    def emptied(x: torch.Tensor) -> list[torch.Tensor]:
        held.append(x.detach() + 1)
        held[0].untyped_storage().resize_(0)
        return [x.sum()]

    held: list[torch.Tensor] = []
    found = cost(emptied, torch.randn(1000, requires_grad=True), [])
    assert held and found.held < 500


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [[], ["--compiled"]])
def test_compiled_contenders(tmp_path, compiled):
    names = "reversible,torch-checkpoint,torch-selective-matmul,torch-compile,torch-compile-budget-0.2"
    code, output = run(tmp_path, "--contenders", names, "--depths", 2, "--batch-sizes", 2, *compiled)
    assert code == 0, output
    found = {p.contender: p for p in points_of(tmp_path)}
    assert all(p.compiled == bool(compiled or "compile" in name) for name, p in found.items())
    assert all(p.gradient_error < 1e-5 for p in found.values())
    assert found["torch-compile-budget-0.2"].held < 0.5 * found["torch-compile"].held


@pytest.mark.slow
def test_the_instrument_counts_what_compiled_code_allocates():
    x = torch.randn(64, 1000, requires_grad=True)
    chain = torch.compile(lambda x: (x.sin().cos().tanh(),), dynamic=False)
    loss_of(chain(x)).backward()
    held = cost(chain, x, []).held / (4 * x.numel())
    assert 0.9 < held < 2.1  # the output, and an intermediate at most, where eager code stores three


def test_every_scheduler_is_a_contender():
    assert all(name in CONTENDERS for name in SCHEDULERS) and next(iter(CONTENDERS)) == "naive"
    assert set(contenders.DEFAULT) <= set(CONTENDERS)


def test_selective_checkpointing_keeps_what_it_says(tmp_path):
    names = "torch-checkpoint,torch-selective-attention,torch-selective-matmul"
    args = ["--contenders", names, "--depths", 3, "--batch-sizes", 2, "--repeats", 0, "--tokens", 40]
    assert run(tmp_path, *args)[0] == 0
    naive, plain, attention, matmul = (p.held / p.unit for p in points_of(tmp_path))
    assert plain < attention < matmul < naive
    assert attention - plain >= 3  # the output of the attention of three blocks
    assert matmul - attention >= 3 * (3 + 1 + 4 + 1)  # of qkv, of projection, of both layers of the MLP


# Other libraries


def test_libraries_that_are_not_installed_are_left_out(tmp_path, monkeypatch):
    gone = Contender(CONTENDERS["memcnn"].build, package="no_such_library")
    monkeypatch.setitem(CONTENDERS, "memcnn", gone)
    code, output = run(tmp_path, "--contenders", "memcnn,save-on-cpu,one-stream", "--repeats", 0)
    assert code == 0 and "withoutmemcnn:no_such_libraryisnotinstalled;pipinstall" in output
    assert "withoutsave-on-cpu" in output
    assert {p.contender for p in points_of(tmp_path)} == {"naive", "one-stream"}


def test_libraries_that_fail_are_noted_and_ours_raise(tmp_path, monkeypatch):
    def broken(blocks: Any, compiled: bool) -> Any:
        raise RuntimeError("it is too old\nfor this")

    monkeypatch.setitem(CONTENDERS, "memcnn", Contender(broken, package="torch"))
    code, output = run(tmp_path / "theirs", "--contenders", "memcnn")
    assert code == 0 and "memcnn(RuntimeError:itistooold)" in output
    theirs = [p for p in points_of(tmp_path / "theirs") if p.contender == "memcnn"]
    assert len(theirs) == 1 and all(p.peak is None and p.to_naive is None for p in theirs)
    monkeypatch.setitem(CONTENDERS, "one-stream", Contender(broken))
    with pytest.raises(RuntimeError, match="too old"):
        run(tmp_path / "ours", "--contenders", "one-stream")


@pytest.mark.parametrize("name", ["memcnn", "revtorch", "invtorch"])
def test_other_libraries_have_naives_gradients(tmp_path, name):
    pytest.importorskip(name)
    assert run(tmp_path, "--contenders", name, "--depths", 3, "--batch-sizes", 2, "--tokens", 40)[0] == 0
    naive, other = points_of(tmp_path)
    assert other.error is None and other.gradient_error < 1e-5 and other.held < naive.held


def test_running_out_of_memory_costs_one_contender(tmp_path, monkeypatch):
    def too_large(blocks: Any, compiled: bool) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setitem(CONTENDERS, "naive", Contender(too_large))
    code, output = run(tmp_path, *FEW)
    assert code == 0 and "naive(OutOfMemoryError:" in output
    rest = [p for p in points_of(tmp_path) if p.contender != "naive"]
    assert all(p.peak and p.to_naive is None and p.gradient_error is None and p.to_checkpoint for p in rest)


# What it writes


def test_tables_and_plots_are_written(finished):
    assert {f.name for f in finished.iterdir()} == {"points.json", "table.md", "memory.png", "pareto.png", "limits.png"}
    rows = [line.split("|") for line in (finished / "table.md").read_text().splitlines() if line.startswith("| ")]
    head = [cell.strip() for cell in rows[0][1:-1]]
    assert head == ["blocks", "batch", "how", "compiled", "held", "peak", "peak MB", "gradient error", "s / step",
                    "/ naive", "/ torch checkpoint", "images / s"]  # fmt: skip
    cells = [[cell.strip() for cell in row[1:4]] for row in rows[1:17]]
    assert cells == [[str(p.depth), str(p.batch), p.contender] for p in points_of(finished)]
    for name in ("memory", "pareto", "limits"):
        assert len(Image.open(finished / f"{name}.png").getcolors(1 << 20)) > 50  # lines of several colours


def test_memory_only(tmp_path, monkeypatch):
    monkeypatch.undo()
    code, output = run(tmp_path, *FEW, "--repeats", 0)
    assert code == 0 and "images/s" not in output and "Most" not in output  # no time, and nothing to extrapolate
    assert {f.name for f in tmp_path.iterdir()} == {"points.json", "table.md", "memory.png"}
    assert all(p.seconds is None and p.to_naive is None for p in points_of(tmp_path))


def test_plot_only_measures_nothing(finished, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(benchmark, "measure", None)
    (tmp_path / "points.json").write_bytes((finished / "points.json").read_bytes())
    assert run(tmp_path, "--plot-only")[0] == 0
    for name in ("memory", "pareto", "limits"):
        assert (tmp_path / f"{name}.png").read_bytes() == (finished / f"{name}.png").read_bytes()
    assert (tmp_path / "table.md").read_text() == (finished / "table.md").read_text()
    code, output = run(tmp_path / "none", "--plot-only")
    assert code == 2 and "holdsnopoints" in output


def test_several_models_have_a_plot_each(tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.BLOCKS, "vit2", contenders.BLOCKS["vit"])
    drawn = []
    monkeypatch.setattr(benchmark, "draw_memory", lambda points, path: drawn.append((path.name, len(points))))
    assert run(tmp_path, *FEW, "--models", "vit,vit2", "--repeats", 0)[0] == 0
    assert len(points_of(tmp_path)) == 8 and drawn == [("memory-vit.png", 4), ("memory-vit2.png", 4)]
    assert "| model |" in (tmp_path / "table.md").read_text()


def test_blocks_of_all_three_models(tmp_path):
    sizes = ["--tokens", 16, "--depths", "2,4", "--batch-sizes", 2, "--repeats", 0]
    code, output = run(tmp_path, *FEW, "--models", "vit,swin,mvit", *sizes)
    assert code == 0, output
    points = {(p.model, p.contender, p.depth): p for p in points_of(tmp_path)}
    assert len(points) == 3 * 4 * 2 and all(p.error is None for p in points.values())
    for model in ("vit", "swin", "mvit"):
        for how in ("naive", "reversible", "torch-checkpoint"):
            assert points[model, how, 4].gradient_error < 1e-5
        held = {how: points[model, how, 4].held - points[model, how, 2].held for how in ("naive", "reversible")}
        # Two more blocks: all that they save, or samples of a stream and of an activation of each step to compare.
        assert held["naive"] > 20 * 2 * 16 * 8 * 4 and held["reversible"] <= 4 * (128 + 16) * 4


def test_blocks_are_those_of_the_models():
    torch.manual_seed(0)
    x, images = torch.randn(2, 64, 8), torch.randn(2, 3, 8, 8)
    for name, cls, sizes in [
        ("swin", RevSwin, {"num_heads": (2,), "window_size": 7}),
        ("mvit", RevMViT, {"num_heads": 2, "kv_stride": 2}),
    ]:
        model = cls(8, 1, embed_dim=8, depths=(3,), parts=1, **sizes).eval()
        blocks = contenders.BLOCKS[name](3, 8, 2, 64)
        stack = ReversibleSequence(blocks).eval()
        (own,) = [m for m in model.modules() if isinstance(m, ReversibleSequence)]
        for mine, theirs in zip(stack.parameters(), own.parameters(), strict=True):
            mine.data = theirs.data
        seen: list[Any] = []
        own.register_forward_hook(lambda module, args, streams, seen=seen, note=seen.append: note((args[0], streams)))
        model(images)
        ((entered, left),) = seen
        got = stack(*[entered.reshape(x.shape)] * 2)
        assert all(torch.equal(a, b.reshape(x.shape)) for a, b in zip(got, left, strict=True))


def exact(name: str, depth: int, batch: int, per_block: int, per_image: int, speed: float = 1.0) -> Point:
    peak = batch * (per_block * depth + per_image)
    return Point(name, "vit", depth, batch, False, 1000 * depth, 1, peak, peak, images_per_second=speed)


def test_what_fits_is_extrapolated():
    cells = [(d, b) for d in (2, 4) for b in (1, 3)]
    points = [exact("naive", d, b, 10_000, 500) for d, b in cells] + [exact("flat", d, b, 0, 500) for d, b in cells]
    depths, batches = pareto.depth_limits(points, False), pareto.batch_limits(points, False)
    assert depths["naive"](3 * 500 + 3 * 10_000 * 7) == pytest.approx(7)  # at the larger batch size
    assert depths["flat"](3 * 500) == math.inf and depths["flat"](3 * 500 - 1) == 0
    assert batches["naive"](9 * (4 * 10_000 + 500)) == pytest.approx(9)  # at the larger depth
    depths, batches = pareto.depth_limits(points, True), pareto.batch_limits(points, True)
    assert depths["flat"](3 * 500 + 7 * 16 * 1000) == pytest.approx(7)  # 16 bytes a parameter, 1000 a block
    assert depths["naive"](3 * 500 + 7 * (16 * 1000 + 3 * 10_000)) == pytest.approx(7)
    assert batches["flat"](9 * 500 + 4 * 16 * 1000) == pytest.approx(9)
    assert "extrapolated" in pareto.limits_table(points, True)
    assert "| flat | any |" in pareto.limits_table(points, False)


def test_depths_are_compared_where_there_are_most():
    points = [exact("naive", d, b, 1, 1) for d, b in [(2, 1), (4, 1), (6, 1), (2, 3), (4, 3), (2, 9)]]
    assert pareto.fixed_batch(points) == 1 and pareto.fixed_depth(points) == 2
    assert pareto.fixed_batch(points[:2] + points[3:5]) == 3  # of equals the largest
    assert set(pareto.depth_limits(points, False)) == {"naive"} and not pareto.depth_limits(points[-1:], False)


def test_the_front_is_what_nothing_beats_in_both():
    fast, slow = exact("fast", 1, 1, 0, 90, speed=9.0), exact("slow", 1, 1, 0, 10, speed=3.0)
    beaten, equal = exact("beaten", 1, 1, 0, 20, speed=2.0), exact("equal", 1, 1, 0, 95, speed=9.0)
    assert pareto.front([slow, beaten, equal, fast]) == [fast, slow]
    assert pareto.front([slow, replace(beaten, peak=5)]) == [slow, replace(beaten, peak=5)]


def test_a_table_has_no_empty_columns():
    assert "allocated" not in table([exact("naive", 1, 1, 1, 1)])
    assert "| 2.0 | 3.0 |" in table([replace(exact("naive", 1, 1, 1, 1), allocated=2_000_000, reserved=3_000_000)])


# How it goes on


def test_finished_cells_are_not_measured_again(finished, tmp_path, monkeypatch):
    (tmp_path / "points.json").write_bytes((finished / "points.json").read_bytes())
    measured = []
    original = benchmark.measure

    def watched(points: list[Point], *args: Any) -> None:
        measured.append(points[0].cell)
        original(points, *args)

    monkeypatch.setattr(benchmark, "measure", watched)
    code, output = run(tmp_path, *SWEEP)
    assert code == 0 and not measured and points_of(tmp_path) == points_of(finished) and "0togo" in output
    assert run(tmp_path, *SWEEP, "--depths", "1,2")[0] == 0
    assert measured == [("vit", 2, 1), ("vit", 2, 2)]
    assert points_of(tmp_path)[:16] == points_of(finished) and len(points_of(tmp_path)) == 24
    assert run(tmp_path, *SWEEP, "--overwrite", "--depths", 1)[0] == 0
    assert len(measured) == 4 and len(points_of(tmp_path)) == 8


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    original, calls = benchmark.measure, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise InterruptedError
        original(*args)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    with pytest.raises(InterruptedError):
        run(tmp_path, *SWEEP)
    before = points_of(tmp_path)
    assert len(before) == 8 and {f.name for f in tmp_path.iterdir()} == {"points.json"}
    assert run(tmp_path, *SWEEP)[0] == 0
    assert len(calls) == 5 and points_of(tmp_path)[:8] == before and len(points_of(tmp_path)) == 16


def test_points_of_another_setting_are_not_mixed_in(finished, tmp_path, monkeypatch):
    before = (finished / "points.json").read_bytes()
    code, output = run(finished, *SWEEP, "--width", 16, "--compiled")
    assert code == 2 and "widthwas8,is16;compiledwasFalse,isTrue" in output and "--overwrite" in output
    code, output = run(finished, "--contenders", "reversible")
    assert code == 2 and "contenderswas" in output
    monkeypatch.setattr(benchmark, "environment", lambda place: {"torch": "1.0"})
    code, output = run(finished, *SWEEP)
    assert code == 2 and f"torchwas{torch.__version__},is1.0" in output
    assert (finished / "points.json").read_bytes() == before
    (tmp_path / "points.json").write_text(json.dumps({"points": []}))
    code, output = run(tmp_path, *SWEEP)
    assert code == 2 and "holdsnopoints" in output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--contenders magic,reversible", ["--contenders", "gotmagic", *CONTENDERS]),
        ("--models resnet", ["--models", "vit", "gotresnet"]),
        ("--depths 4,many", ["--depths", "4,many"]),
        ("--batch-sizes 0", ["--batch-sizes", "atleast1"]),
        ("--heads 3", ["--heads", "divisor"]),
        ("--models vit,swin --tokens 197", ["--tokens", "squarenumber", "got197;try196", "swin"]),
        ("--models mvit --tokens 3", ["--tokens", "squarenumber", "got3;try1", "mvit"]),
        ("--device gpu", ["--device", "gpuisnone"]),
        ("--graphs", ["--graphs", "needs--devicecuda,thisoneiscpu"]),
    ],
)
def test_a_bad_flag_is_named_with_what_to_do(tmp_path, args, words):
    code, output = run(tmp_path, *args.split())
    assert code == 2 and all(word in output for word in words), output
    assert not list(tmp_path.iterdir())


class Rerun:
    """A captured step, where there is nothing to capture with. Checkpointing cannot be captured here."""

    pools: ClassVar[list[Any]] = []

    def __init__(self, run: Any, x: torch.Tensor, parameters: list[Any], warm_up: int, pool: Any) -> None:
        assert warm_up >= 3
        self.pools.append(pool)
        if len(self.pools) == 3:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.step = instruments.eager(run)
        self.cost = cost(run, x, parameters)
        self.graph = self

    def __call__(self, x: torch.Tensor) -> None:
        self.step(x)

    def pool(self) -> str:
        return f"of {len(self.pools)}"


def test_a_step_that_cannot_be_captured_costs_one_contender(monkeypatch):
    monkeypatch.setattr(benchmark, "Replay", Rerun)
    names = ["naive", "reversible", "torch-checkpoint", "one-stream"]
    points = [Point(name, "vit", 1, 2, False, 0, 96) for name in names]
    x = torch.randn(2, 3, 8, requires_grad=True)
    benchmark.measure(points, x, 2, False, False, True, 1, lambda: None)
    assert points[2].error == "RuntimeError: operation not permitted when stream is capturing"
    assert points[2].seconds is None and all(p.seconds and p.peak for p in points if p.error is None)
    assert points[1].gradient_error < 1e-5
    assert Rerun.pools == [None, "of 1", "of 2", None]  # shared, but not with one that failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [[], ["--amp"]], ids=["float32", "amp"])
def test_captured_contenders(tmp_path, amp):
    """One of which fails in the middle of the capture."""
    names = "save-on-cpu,reversible,reversible-exact,pareprop-always,torch-checkpoint"
    sizes = ["--depths", 3, "--batch-sizes", "2,4", "--tokens", 40, "--width", 64]
    code, output = run(tmp_path, "--device", "cuda", "--graphs", "--contenders", names, *sizes, *amp)
    assert code == 0, output
    found = points_of(tmp_path)
    print(*(f"{p.contender}, {p.batch}: {p.error}, {p.gradient_error}, {p.peak}" for p in found), sep="\n")
    for p in found:
        if p.contender not in ("save-on-cpu", "torch-checkpoint"):
            assert p.error is None and p.gradient_error < (0.1 if amp else 1e-3) and p.seconds and 0 < p.held <= p.peak


# The jobs for a GPU


def test_a_job_that_takes_too_long_is_not_started_again(tmp_path):
    slow = jobs.Job("slow", [sys.executable, "-c", "import time; time.sleep(60)"], minutes=0.01)
    assert "stopped" in gpu.run(slow, tmp_path / "slow", 100.0) and gpu.ended(tmp_path / "slow") == "stopped"
    assert "run this again" in gpu.run(slow, tmp_path / "cut", 0.1) and gpu.ended(tmp_path / "cut") is None
    for code, end in ((0, "done"), (1, None)):
        quick = jobs.Job("quick", [sys.executable, "-c", f"raise SystemExit({code})"])
        gpu.run(quick, tmp_path / str(code), 100.0)
        assert gpu.ended(tmp_path / str(code)) == end


def test_jobs_are_listed_and_chosen(tmp_path):
    def call(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(gpu.app, ["--device", "cpu", "--out", str(tmp_path), *args])
        return result.exit_code, re.sub(r"[\s─-╿]", "", result.output)

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "stopped.json").touch()
    assert call("--list", "--only", "tests,tests-of-streams") == (0, "tests-of-streams:todotests:stopped")
    code, output = call("--list", "--only", "magic,tests")
    assert code == 2 and "gotmagic" in output and "tests-of-streams" in output
    code, output = call("--list", "--only", "minrev-vit-naive")
    assert code == 2 and "alltrainingswant--data" in output
    with_data = [job.name for job in jobs.jobs("cuda", Path("cifar10"), tmp_path, False)]
    assert len(set(with_data)) == len(with_data) == 37 and with_data[0] == "tests-of-streams"


def test_the_trainings_for_a_gpu_are_understood(tmp_path):
    seen: list[Config] = []
    app = typer.Typer()
    app.command()(flags(seen.append))
    *trainings, study = jobs.trainings("cuda", tmp_path, tmp_path, False)
    for job in trainings:
        arguments = job.command[job.command.index("research.train") + 1 :]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len({(c.recipe, c.model, c.scheduler, c.coupling, c.amp) for c in seen}) == len(trainings) == 15
    assert all(c.graph and c.dataset == "cifar10" and not c.deterministic for c in seen)
    assert all(c.epochs == (200 if c.recipe.startswith("tuned") else 100) for c in seen)
    assert {c.recipe for c in seen} == set(RECIPES)
    assert "research.parity" in study.command


@pytest.mark.parametrize("tiny", [True, False])
def test_the_commands_for_a_gpu_are_understood(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(benchmark, "measure", lambda *args: None)
    monkeypatch.setattr(benchmark.torch, "randn", lambda *shape, generator: torch.empty(1))
    commands = [job for job in jobs.jobs("cpu", None, tmp_path, tiny) if "research.benchmark" in job.command]
    assert len(commands) == 18
    for job in commands:
        flags = job.command[job.command.index("research.benchmark") + 1 :]
        assert CliRunner().invoke(benchmark.app, flags).exit_code == 0
        assert points_of(tmp_path / job.name)


@pytest.mark.parametrize("library", ["memcnn", "revtorch", "invtorch"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore")
def test_other_libraries_with_dropout(library, rate):
    """What the README says of them, as they come."""
    pytest.importorskip(library)

    def function():
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(rate), nn.Linear(32, 16))

    torch.manual_seed(0)
    stack = ReversibleSequence([(function(), function()) for _ in range(3)], scheduler=Naive())
    x, found = torch.randn(4, 5, 16, requires_grad=True), []
    for run in (lambda x: stack(x, x), getattr(libraries, library)([tuple(pair) for pair in stack], False)):
        stack.zero_grad()
        torch.manual_seed(1)
        sum((y.sin() * y).sum() for y in run(x)).backward()
        found.append([p.grad.clone() for p in stack.parameters()])
    errors = [((got - want).norm() / want.norm()).item() for got, want in zip(found[1], found[0], strict=True)]
    assert max(errors) > 0.3 if rate else max(errors) < 1e-5


def test_the_front_of_the_second_figure_has_no_spot_that_another_beats():
    spots = {"naive": (900.0, 1.0), "reversible": (20.0, 1.36), "keep-last-1": (20.0, 1.35), "memcnn": (30.0, 1.68)}
    assert figures._front(spots) == [
        (20.0, 1.35, ["Reversible()", "KeepLast(1)"]),
        (900.0, 1.0, ["plain autograd"]),
    ]
    assert figures._apart([100.0, 20.0, 19.0], factor=1.25) == [100.0, 20.0, 16.0]
