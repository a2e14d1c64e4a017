"""The sum on a grid as one CUDA kernel, in the memory traffic of a plain addition; bit for bit the same result."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from revlib._torch import forward_mode_active, transforming

__all__ = ["add_on_grid", "serves"]


def serves(s: Tensor, t: Tensor) -> bool:
    """Whether the kernel can add these: dense tensors on CUDA, while no compiler or transform follows operations."""
    return (
        s.is_cuda
        and type(s) is type(t) is Tensor  # neither fake, nor distributed, nor a user's own
        and s.is_contiguous()
        and t.is_contiguous()
        and not torch.compiler.is_compiling()
        and not transforming()
        and not forward_mode_active()
        and _works(s.device)
    )


def add_on_grid(s: Tensor, t: Tensor, grid: float, sign: int) -> Tensor:
    """s + sign [t], with t rounded to multiples of the grid, half to even."""
    y = torch.empty_like(s)
    if y.numel():
        block = 1024
        # From here on all floating-point numbers are whole.
        half = 2.0**23 if s.dtype == torch.float32 else 2.0**52
        with torch.get_device_module(s.device).device_of(s):
            _kernel()[(-(-y.numel() // block),)](
                s, t, y, y.numel(), 1 / grid, sign * grid, half, BLOCK=block
            )
    return y


@functools.cache
def _works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        add_on_grid(torch.ones(1, device=device), torch.ones(1, device=device), 1.0, 1)
        return True
    except Exception as error:  # Triton compiles on first use, and wants a C compiler for it
        warnings.warn(
            f"ExactAdditive runs without its fused kernel, since Triton failed: {error}",
            stacklevel=2,
        )
        return False


@functools.cache
def _kernel() -> Any:
    import triton  # only here, since its import is slow, and it is installed for CUDA only
    import triton.language as tl

    @triton.jit
    def kernel(s, t, y, n, inverse, step, half, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < n
        total = tl.load(s + places, inside)
        steps = tl.load(t + places, inside).to(total.dtype) * inverse
        size = tl.abs(steps)
        # Adding and subtracting `half` rounds to whole numbers, and ties to even ones.
        size = tl.where(size < half, (size + half) - half, size)
        steps = tl.where(steps < 0, -size, size)
        tl.store(y + places, total + steps * step, inside)

    return kernel
