"""Add to the residual and norm it in one kernel; gradient of both in one.

    out = residual + update,    normed = out / rms(out) * weight

Forward reads residual and update and writes both results. Backward reads what was summed and the gradients of both
results, and writes the gradient of the residual and, rounded to the update's precision, of the update: generated code
reads the residual's gradient once more to round it, and is far from memory speed where it sums the weight's gradient.
Here each program sums the weight's gradient over the rows it sees, and those sums are added up after.

The residual keeps its own precision (float32 in training); the normed numbers have the update's, which is what the
next product reads. Arithmetic is float32 inside; numbers that are no arrays are compile-time constants, since compiled
blocks would pass them as float64. Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Numbers that a program handles at a time, as whole rows where they are shorter."""

_PER_WARP = 512

_PROGRAMS = 1024
"""Programs of the backward pass, some for each multiprocessor of any GPU; each leaves a row of sums."""


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    residual, update, weight, out, normed, rows,
    epsilon: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < width)
    place = row.to(tl.int64) * width + column
    x = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        x += tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)[:, None]
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(normed + place, (x * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    summed, weight, to_out, to_normed, to_residual, to_update, to_weight, rows,
    epsilon: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)[None, :]
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((tile, block), tl.float32)
    for start in range(tl.program_id(0) * tile, rows, tl.num_programs(0) * tile):
        row = start + tl.arange(0, tile)[:, None]
        inside = (row < rows) & (column < width)
        place = row.to(tl.int64) * width + column
        x = tl.load(summed + place, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(to_normed + place, mask=inside, other=0.0).to(tl.float32)
        passed = tl.load(to_out + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)[:, None]
        x *= scale
        total += incoming * x
        incoming *= gain
        along = tl.sum(incoming * x, 1)[:, None] / width
        gradient = passed + (incoming - x * along) * scale
        tl.store(to_residual + place, gradient.to(to_residual.dtype.element_ty), mask=inside)
        if to_update is not None:
            tl.store(to_update + place, gradient.to(to_update.dtype.element_ty), mask=inside)
    tl.store(to_weight + tl.program_id(0) * width + column, tl.sum(total, 0)[None, :], mask=column < width)


def _sizes(width: int) -> tuple[int, int, int]:
    """Return the padded width, the rows at a time and the warps for them."""
    block = triton.next_power_of_2(width)
    tile = max(1, _NUMBERS // block)
    return block, tile, max(4, tile * block // _PER_WARP)


class AddNorm(torch.autograd.Function):
    """(residual, update, weight, epsilon, dtype) -> (residual + update, its root-mean-square norm times the weight).

    Shapes (..., width) and, for the weight, (width,); the first result has the residual's dtype, the second `dtype`.
    Without an update (None) the first result is the residual itself, so that its two gradients meet in the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return both results; keeps the sum."""
        residual = residual.contiguous()
        update = None if update is None else update.contiguous()
        width = residual.shape[-1]
        rows = residual.numel() // width
        out = residual.view_as(residual) if update is None else torch.empty_like(residual)
        normed = torch.empty_like(residual, dtype=dtype)
        block, tile, warps = _sizes(width)
        _forward[(triton.cdiv(rows, tile),)](
            residual, update, weight, out, normed, rows,
            epsilon=epsilon, width=width, block=block, tile=tile, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(out, weight)
        ctx.epsilon, ctx.update_dtype = epsilon, None if update is None else update.dtype
        return out, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        """Return the gradients of residual, update and weight."""
        out, weight = ctx.saved_tensors
        to_out, to_normed = (gradient.contiguous() for gradient in gradients)
        width = out.shape[-1]
        rows = out.numel() // width
        block, tile, warps = _sizes(width)
        programs = min(_PROGRAMS, triton.cdiv(rows, tile))
        to_residual = torch.empty_like(out)
        to_update = None if ctx.update_dtype is None else torch.empty_like(out, dtype=ctx.update_dtype)
        to_weight = torch.empty(programs, width, dtype=torch.float32, device=out.device)
        _backward[(programs,)](
            out, weight, to_out, to_normed, to_residual, to_update, to_weight, rows,
            epsilon=ctx.epsilon, width=width, block=block, tile=tile, num_warps=warps,
        )  # fmt: skip
        return to_residual, to_update, to_weight.sum(0).to(weight.dtype), None, None
