"""Add to the residual and norm it in one kernel; gradient of both in one.

    out = residual + update,    normed = out / rms(out) * weight

The first residual is the tokens' rows of the embedding: forward reads them there, and backward adds to the rows of its
gradient instead of writing the residual's.

Forward reads residual and update and writes both results and, for whoever rounds it next, the mean square of each
normed token. Backward reads what was summed and the gradients of both results, and writes the
gradient of the residual and, rounded to the update's precision, of the update: generated code reads the residual's
gradient once more to round it, and is far from memory speed where it sums the weight's gradient.
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

from qpipe.triton_kernels import row_tiles
from qpipe.triton_launch import launch

_NUMBERS, _PER_WARP = 2048, 512
"""Numbers that a program handles at a time, as whole rows where they are shorter, and a warp of it: forward."""

_BACK_NARROW = (1024, 1024, 1056, 2)
_BACK_WIDE = (1024, 512, 2112, 2)
"""Backward, rows of at most `_NARROW` numbers and longer ones: the same two, programs, and rows that are on their way
from memory at a time. Programs are some for each multiprocessor of any GPU; each leaves a row of sums."""

_NARROW = 256

_SUM_ROWS, _SUM_COLUMNS = 1024, 8
"""Numbers that a program adds up at a time."""


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    residual, tokens, update, weight, out, normed, mean_square, rows,
    epsilon: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None] * width + column
    source = place
    if tokens is not None:
        source = tl.load(tokens + row, mask=row < rows, other=0).to(tl.int64)[:, None] * width + column
    x = tl.load(residual + source, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        x += tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
    if out is not None:
        tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)[:, None]
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    x *= scale * gain
    tl.store(normed + place, x.to(normed.dtype.element_ty), mask=inside)
    if mean_square is not None:
        tl.store(mean_square + row, tl.sum(x * x, 1) / width, mask=row < rows)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    summed, tokens, weight, to_out, to_normed, to_residual, to_update, to_weight, rows,
    epsilon: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)[None, :]
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros((tile, block), tl.float32)
    for start in tl.range(tl.program_id(0) * tile, rows, tl.num_programs(0) * tile, num_stages=stages):
        row = start + tl.arange(0, tile)[:, None]
        inside = (row < rows) & (column < width)
        place = row.to(tl.int64) * width + column
        x = tl.load(summed + place, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(to_normed + place, mask=inside, other=0.0).to(tl.float32)
        if to_out is not None:
            passed = tl.load(to_out + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / width + epsilon)[:, None]
        x *= scale
        total += incoming * x
        incoming *= gain
        along = tl.sum(incoming * x, 1)[:, None] / width
        gradient = (incoming - x * along) * scale
        if to_out is not None:
            gradient += passed
        if tokens is not None:
            source = tl.load(tokens + row, mask=row < rows, other=0).to(tl.int64) * width + column
            tl.atomic_add(to_residual + source, gradient, mask=inside, sem="relaxed")
        else:
            tl.store(to_residual + place, gradient.to(to_residual.dtype.element_ty), mask=inside)
        if to_update is not None:
            tl.store(to_update + place, gradient.to(to_update.dtype.element_ty), mask=inside)
    tl.store(to_weight + tl.program_id(0) * width + column, tl.sum(total, 0)[None, :], mask=column < width)


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    parts, total, rows, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    column = tl.program_id(0) * block + tl.arange(0, block)[None, :]
    numbers = tl.zeros((tile, block), tl.float32)
    for start in tl.range(0, rows, tile, num_stages=stages):
        row = start + tl.arange(0, tile)[:, None]
        numbers += tl.load(parts + row * width + column, mask=(row < rows) & (column < width), other=0.0)
    tl.store(total + column, tl.sum(numbers, 0)[None, :].to(total.dtype.element_ty), mask=column < width)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of contiguous rows (programs, width): the library's takes several times as long for so few."""
    rows, width = parts.shape
    total = torch.empty(width, dtype=dtype, device=parts.device)
    launch(
        _sum_rows, (triton.cdiv(width, _SUM_COLUMNS),),
        parts, total, rows, width=width, block=_SUM_COLUMNS, tile=_SUM_ROWS, stages=2, num_warps=8,
    )  # fmt: skip
    return total


def _add_and_norm(
    residual: Tensor,
    tokens: Tensor | None,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum, its norm and mean square; of rows of `residual` itself or, if given, of those of `tokens`."""
    width = residual.shape[-1]
    shape = residual.shape if tokens is None else (*tokens.shape, width)
    alone = tokens is None and update is None
    out = residual.view_as(residual) if alone else residual.new_empty(shape)
    normed = residual.new_empty(shape, dtype=dtype)
    mean_square = residual.new_empty(shape[:-1] if measured else 0, dtype=torch.float32)
    rows = normed.numel() // width
    block, tile, warps = row_tiles(width, _NUMBERS, _PER_WARP)
    launch(
        _forward, (triton.cdiv(rows, tile),),
        residual, tokens, update, weight, None if alone else out, normed, mean_square if measured else None, rows,
        epsilon=epsilon, width=width, block=block, tile=tile, num_warps=warps,
    )  # fmt: skip
    return out, normed, mean_square


def _gradients(
    out: Tensor,
    tokens: Tensor | None,
    weight: Tensor,
    to_out: Tensor | None,
    to_normed: Tensor | None,
    to_residual: Tensor,
    to_update: Tensor | None,
    epsilon: float,
) -> Tensor:
    """Write the gradient of the residual (with `tokens`, add it to their rows) and of the update; return the weight's.

    None for a gradient that nobody has, and for an update that there was not.
    """
    to_out = None if to_out is None else to_out.contiguous()
    to_normed = torch.zeros_like(out) if to_normed is None else to_normed.contiguous()
    width = out.shape[-1]
    rows = out.numel() // width
    numbers, per_warp, most, stages = _BACK_NARROW if width <= _NARROW else _BACK_WIDE
    block, tile, warps = row_tiles(width, numbers, per_warp)
    programs = min(most, triton.cdiv(rows, tile))
    to_weight = torch.empty(programs, width, dtype=torch.float32, device=out.device)
    launch(
        _backward, (programs,),
        out, tokens, weight, to_out, to_normed, to_residual, to_update, to_weight, rows,
        epsilon=epsilon, width=width, block=block, tile=tile, stages=stages, num_warps=warps,
    )  # fmt: skip
    return _summed(to_weight, weight.dtype)


def _keep(ctx: Any, mean_square: Tensor) -> None:
    """What both functions tell autograd: nobody reads what the last norm adds up, so no zeros are to be made for it."""
    ctx.mark_non_differentiable(mean_square)
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class AddNorm(torch.autograd.Function):
    """(residual, update, weight, epsilon, dtype, measured) -> (residual + update, that normed, its mean square).

    Shapes (..., width) and, for the weight, (width,); the first result has the residual's dtype, the second, the root-
    mean-square norm times the weight, has `dtype`; the third, the mean square of the second, (...), is float32 and has
    no gradient, and no numbers unless it is to be `measured`. Without an update (None) the first result is the residual
    itself, so that its two gradients meet in the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        update: Tensor | None,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        measured: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all results; keeps the sum."""
        residual = residual.contiguous()
        update = None if update is None else update.contiguous()
        out, normed, mean_square = _add_and_norm(residual, None, update, weight, epsilon, dtype, measured)
        ctx.save_for_backward(out, weight)
        ctx.epsilon, ctx.update_dtype = epsilon, None if update is None else update.dtype
        _keep(ctx, mean_square)
        return out, normed, mean_square

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        """Return the gradients of residual, update and weight."""
        out, weight = ctx.saved_tensors
        to_residual = torch.empty_like(out)
        to_update = None if ctx.update_dtype is None else torch.empty_like(out, dtype=ctx.update_dtype)
        to_weight = _gradients(out, None, weight, gradients[0], gradients[1], to_residual, to_update, ctx.epsilon)
        return to_residual, to_update, to_weight, None, None, None


class EmbedNorm(torch.autograd.Function):
    """(embedding, tokens, weight, epsilon, dtype, measured) -> (rows of the tokens, those normed, their mean square).

    Shapes (V, width), (...) and (width,); results as those of `AddNorm`. The embedding's gradient is summed in no fixed
    order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        tokens: Tensor,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        measured: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all results; keeps the rows and the tokens."""
        tokens = tokens.contiguous()
        out, normed, mean_square = _add_and_norm(embedding, tokens, None, weight, epsilon, dtype, measured)
        ctx.save_for_backward(out, tokens, weight)
        ctx.epsilon, ctx.words = epsilon, embedding.shape[0]
        _keep(ctx, mean_square)
        return out, normed, mean_square

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, Tensor, None, None, None]:
        """Return the gradients of embedding and weight."""
        out, tokens, weight = ctx.saved_tensors
        to_embedding = torch.zeros(ctx.words, out.shape[-1], dtype=torch.float32, device=out.device)
        to_weight = _gradients(out, tokens, weight, gradients[0], gradients[1], to_embedding, None, ctx.epsilon)
        return to_embedding.to(out.dtype), None, to_weight, None, None, None
