"""Kernels for GPUs that a compiler does not find: each touches its memory once where generated code does so twice.

* The softmax gradient goes over a row of logits twice, the second time writing the gradient over it: a row of 32,000
  numbers stays in cache between the two, and no second array of logits is needed.
* SwiGLU's backward pass writes the gradients of gate and up side by side as one array, which is what the fused
  gate-and-up product wants; generated code computes both halves for each place and throws one away.
* The embedding's gradient is added token by token where it belongs; the library sorts the tokens first.
* Arrays times one number on the device: usually that number is 1, and the arrays need not be touched.

This module imports Triton, so it is imported only where there is a GPU. Arithmetic is float32 inside.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.triton_launch import launch

_LANES, _NUMBERS = 1024, 8
"""Logits read at a time: so many runs of eight neighbours; the numbers of a run lie in one thread."""

_WARPS = 16
_BLOCK = 1024

_SWIGLU_NUMBERS, _SWIGLU_PER_WARP = 1024, 256
"""Numbers that a program handles at a time, and a warp of it."""


@triton.jit
def _softmax_gradient(  # type: ignore[no-untyped-def]
    logits, targets, losses, scale, columns: tl.constexpr, lanes: tl.constexpr, numbers: tl.constexpr
):
    """First the normaliser, every run of numbers for itself until the end; then the gradient over the logits.

    Largest numbers and sums of a run stay in its thread, so that threads wait for each other twice in a row.
    """
    base2: tl.constexpr = 1.4426950408889634  # log2 e: 2^(base2 x) is e^x, one multiplication less
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    correct = tl.load(logits + target).to(tl.float32)
    run = tl.arange(0, lanes)[:, None] * numbers + tl.arange(0, numbers)[None, :]
    largest = tl.full((lanes,), -1e30, tl.float32)
    total = tl.zeros((lanes,), tl.float32)
    for start in range(0, columns, lanes * numbers):
        place = start + run
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32) * base2
        larger = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(x - larger[:, None]), 1)
        largest = larger
    top = tl.max(largest)
    normaliser = top + tl.log2(tl.sum(total * tl.exp2(largest - top)))
    tl.store(losses + row, normaliser / base2 - correct)
    shift = normaliser - tl.log2(scale)
    tl.debug_barrier()  # everyone has read the correct token's logit before anyone overwrites it
    for start in range(0, columns, lanes * numbers):
        place = start + run
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        gradient = tl.exp2(x * base2 - shift)
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < columns)
    tl.debug_barrier()
    gradient = tl.exp2(correct * base2 - shift) - scale
    tl.store(logits + target, gradient.to(logits.dtype.element_ty))


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float, losses: Tensor) -> None:
    """Put the cross-entropies of logits (M, V) and classes (M) into `losses` (M), float32, and over the logits `scale`
    times their gradient.
    """
    rows, columns = logits.shape
    lanes = min(_LANES, max(32, triton.next_power_of_2(columns) // _NUMBERS))
    launch(
        _softmax_gradient, (rows,),
        logits, targets, losses, scale, columns=columns, lanes=lanes, numbers=_NUMBERS,
        num_warps=max(1, min(_WARPS, lanes // 64)),
    )  # fmt: skip


@triton.jit
def _swiglu_forward(gate_up, out, mean_square, rows, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    place = row.to(tl.int64)[:, None] * width + column
    start = place + row.to(tl.int64)[:, None] * width
    gate = tl.load(gate_up + start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + start + width, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)
    if mean_square is not None:
        tl.store(mean_square + row, tl.sum(product * product, 1) / width, mask=row < rows)


@triton.jit
def _swiglu_backward(gate_up, gradient, out, rows, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < width)
    start = row * 2 * width + column
    gate = tl.load(gate_up + start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + start + width, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(gradient + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = incoming * up * share * (1.0 + gate * (1.0 - share))
    tl.store(out + start, to_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + start + width, (incoming * gate * share).to(out.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """(gate and up, measured) -> silu(gate) * up, (..., 2 F) -> (..., F), and its mean square, (...).

    The second result has no gradient, and no numbers unless it is to be `measured`.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
        """Return the product and its mean square per token; keeps its input."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        mean_square = gate_up.new_empty(gate_up.shape[:-1] if measured else 0, dtype=torch.float32)
        rows, (block, tile, warps) = out.numel() // width, row_tiles(width, _SWIGLU_NUMBERS, _SWIGLU_PER_WARP)
        launch(
            _swiglu_forward, (triton.cdiv(rows, tile),),
            gate_up, out, mean_square if measured else None, rows, width=width, block=block, tile=tile, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(gate_up)
        ctx.mark_non_differentiable(mean_square)
        return out, mean_square

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradients of gate and up side by side."""
        (gate_up,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width = gradient.shape[-1]
        out = torch.empty_like(gate_up)
        rows, (block, tile, warps) = gradient.numel() // width, row_tiles(width, _SWIGLU_NUMBERS, _SWIGLU_PER_WARP)
        launch(
            _swiglu_backward, (triton.cdiv(rows, tile),),
            gate_up, gradient, out, rows, width=width, block=block, tile=tile, num_warps=warps,
        )  # fmt: skip
        return out, None


def row_tiles(width: int, numbers: int, per_warp: int) -> tuple[int, int, int]:
    """Return the padded width of a row, the rows and the warps of a program that handles `numbers` as whole rows."""
    block = triton.next_power_of_2(width)
    tile = max(1, numbers // block)
    return block, tile, min(32, max(1, tile * block // per_warp))


@triton.jit
def _add_rows(gradient, tokens, total, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    numbers = tl.load(gradient + row * width + place, mask=inside).to(tl.float32)
    tl.atomic_add(total + tl.load(tokens + row) * width + place, numbers, mask=inside, sem="relaxed")


class Embedding(torch.autograd.Function):
    """(weight, tokens) -> the tokens' rows, (..., width); their gradients are summed in no fixed order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        """Return the rows; keeps the tokens."""
        ctx.save_for_backward(tokens)
        ctx.words, ctx.dtype = weight.shape[0], weight.dtype
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the weight, summed in float32."""
        (tokens,) = ctx.saved_tensors
        gradient, tokens = gradients[0].contiguous(), tokens.contiguous()
        width = gradient.shape[-1]
        total = torch.zeros(ctx.words, width, dtype=torch.float32, device=gradient.device)
        grid = (tokens.numel(), triton.cdiv(width, _BLOCK))
        launch(_add_rows, grid, gradient, tokens, total, width, block=min(_BLOCK, triton.next_power_of_2(width)))
        return total.to(ctx.dtype), None


@triton.jit
def _times(numbers, factor, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        product = tl.load(numbers + place, mask=place < count).to(tl.float32) * by
        tl.store(numbers + place, product.to(numbers.dtype.element_ty), mask=place < count)


def times_(numbers: Tensor, factor: Tensor) -> Tensor:
    """Multiply contiguous numbers of any shape, in place, by a factor () that stays on the device; return them.

    With a factor of 1, which is that of a loss taken in one go, nothing is read or written.
    """
    launch(_times, (triton.cdiv(numbers.numel(), 4 * _BLOCK),), numbers, factor, numbers.numel(), block=4 * _BLOCK)
    torch.autograd.graph.increment_version(numbers)  # a second backward pass is told, as after any change in place
    return numbers
