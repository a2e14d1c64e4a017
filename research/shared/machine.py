"""The machine a run is on: its device, its determinism, and how the log names it."""

import os
import platform
import time
from typing import Any

import torch
import typer


def pick_device(name: str) -> torch.device:
    """The device that a name stands for. An error says so if it does not work here."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"expected auto or a device that torch can use here, such as cpu; {name} is none ({reason}).",
            param_hint="--device",
        ) from error


def make_reproducible(seed: int, deterministic: bool) -> None:
    """Seed torch, and keep it to kernels that give the same bits in every run."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is slow


def slowdown(dtype: torch.dtype, device: torch.device) -> float:
    """How much longer a matrix product takes in this format than in float32, measured on a CPU in a moment.

    A processor without instructions for a format emulates it, up to a hundred times as slowly. Accelerators have them.
    """
    if device.type != "cpu":
        return 1.0

    def fastest(kind: torch.dtype, repetitions: int = 3) -> float:
        a, times = torch.ones(192, 192, dtype=kind), []
        for _ in range(repetitions):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        return min(times)

    return fastest(dtype) / fastest(torch.float32)


def environment(device: torch.device) -> dict[str, Any]:
    """What a log must tell besides its settings. Runs of equal settings that agree in it have equal numbers."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }
