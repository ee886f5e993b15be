"""Rotate numbers, round them and note where gradient passes, in one kernel; and its gradient in another.

    y = x H / scale,    scale = multiplier * rms(x),    value = (clamp(floor(y), -top, top - 1) + 1/2) * scale

Activations (16 bits) and weights (float32) both have one scale per row. A program keeps a tile of rows and multiplies
it block by block with the block's H on the tensor cores; generated code stores the rotated numbers in between. The
rotation changes no norm, so the scale is known before it: whoever wrote the numbers gives their mean square, and
otherwise a program reads its rows twice, the second time from cache. Backward drops the gradient where the error was
more than half a step, |y| > top, and rotates it back. What passes is kept as one bit per number.

Sums, scales and rounding are float32: rotated activations are not rounded to 16 bits before they are divided by the
scale, as they are without this kernel. A weight is the sum of three bfloat16 numbers and the signs of H are such
numbers, so three products of the tensor cores add up to the float32 one. Step and levels are compile-time constants,
since compiled blocks would pass them as float64. Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.triton_kernels import row_tiles
from qpipe.triton_launch import launch

BITS = 16
"""Numbers whose gates make a word: one of every so many neighbours, so that they lie in one thread after a product."""

_TILE, _WARPS, _STAGES = 64, 4, 3
"""Rows of activations that a program rounds, its warps, and blocks on their way from memory at a time."""

_BACK_TILE, _BACK_WARPS, _BACK_STAGES = 64, 4, 3
"""The same where gradients are rotated back."""

_WEIGHT_TILE, _WEIGHT_WARPS = 64, 4
"""Weights have fewer rows: a program takes one block of so many."""

_MEAN_NUMBERS, _MEAN_PER_WARP = 2048, 512
"""Numbers of whole rows that a program squares, and a warp of it."""


@triton.jit
def _product(numbers, matrix):  # type: ignore[no-untyped-def]
    """Return numbers H: with 16 bits, of H itself; in float32, of its signs."""
    if numbers.dtype == tl.float32:
        high = numbers.to(tl.bfloat16)
        rest = numbers - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(high, matrix, tl.dot(middle, matrix, tl.dot(low, matrix)))
    else:
        product = tl.dot(numbers, matrix)
    return product


@triton.jit
def _rotated(numbers, matrix, root: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return numbers H; the signs of H are H times the root of its size."""
    product = _product(numbers, matrix)
    return product * root if numbers.dtype == tl.float32 else product


@triton.jit
def _floor_of_product(x, y):  # type: ignore[no-untyped-def]
    """Return 1.5 * 2^23 + the largest integers up to x y, |x y| < 2^22.

    One multiplication and addition, rounded down, after which no fraction is left. An instruction that rounds down
    there is, too, at an eighth of the rate of sums.
    """
    return tl.inline_asm_elementwise(
        "fma.rm.f32 $0, $1, $2, 0f4B400000;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def load_matrix(hadamard, block: tl.constexpr, signs: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return H, or its signs in bfloat16."""
    matrix = tl.load(hadamard + tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :])
    return tl.where(matrix > 0, 1.0, -1.0).to(tl.bfloat16) if signs else matrix


@triton.jit
def round_blocks(  # type: ignore[no-untyped-def]
    x, matrix, scale, value, gate, row, inside, first, last, pitch,
    top: tl.constexpr, block: tl.constexpr, back: tl.constexpr, stages: tl.constexpr, bits: tl.constexpr,
    root: tl.constexpr,
):  # fmt: skip
    """Rotate and round blocks `first` to `last` of rows of `pitch` numbers with a scale each; note the gates."""
    signs: tl.constexpr = x.dtype.element_ty == tl.float32  # the product is then a root of the block's size too large
    step = scale / root if signs else scale
    inverse = tl.where(scale > 0, 1.0 / step, 0.0)
    limit = step * top
    whole: tl.constexpr = 12582912.0
    place = row[:, None] * pitch + tl.arange(0, block)[None, :]
    words = row[:, None] * (pitch // bits) + tl.arange(0, block // bits)[None, :]
    for start in tl.range(first, last, block, num_stages=stages):
        product = _product(tl.load(x + place + start, mask=inside, other=0.0), matrix)
        level = tl.minimum(tl.maximum(_floor_of_product(product, inverse), whole - top), whole + top - 1.0)
        rounded = (level - whole) * scale + 0.5 * scale
        if back:
            rounded = _rotated(rounded, matrix, root)
        tl.store(value + place + start, rounded.to(value.dtype.element_ty), mask=inside)
        passes = tl.reshape(tl.abs(product) <= limit, (row.shape[0], bits, block // bits))
        word = tl.sum(tl.where(passes, (1 << tl.arange(0, bits))[None, :, None], 0), 1)
        tl.store(gate + words + start // bits, word.to(gate.dtype.element_ty), mask=inside)


@triton.jit
def rotate_gated_blocks(  # type: ignore[no-untyped-def]
    gradient, matrix, gate, out, row, inside, first, last, pitch,
    dtype: tl.constexpr, block: tl.constexpr, back: tl.constexpr, stages: tl.constexpr, bits: tl.constexpr,
    root: tl.constexpr,
):  # fmt: skip
    """Rotate back what passes of the gradients of blocks `first` to `last`, in `dtype`; `out` may be `gradient`."""
    place = row[:, None] * pitch + tl.arange(0, block)[None, :]
    words = row[:, None] * (pitch // bits) + tl.arange(0, block // bits)[None, :]
    for start in tl.range(first, last, block, num_stages=stages):
        numbers = tl.load(gradient + place + start, mask=inside, other=0.0).to(dtype)
        if back:
            numbers = _rotated(numbers, matrix, root)
        word = tl.load(gate + words + start // bits, mask=inside, other=0).to(tl.int32)
        gates = (word[:, None, :] & (1 << tl.arange(0, bits))[None, :, None]) != 0
        numbers = tl.where(tl.reshape(gates, (row.shape[0], block)), numbers, 0.0).to(dtype)
        tl.store(out + place + start, _rotated(numbers, matrix, root).to(out.dtype.element_ty), mask=inside)


@triton.jit
def mean_of_squares(x, row, inside, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mean square of rows of `width` numbers, block by block."""
    place = row[:, None] * width + tl.arange(0, block)[None, :]
    squares = tl.zeros((row.shape[0], block), tl.float32)
    for start in tl.range(0, width, block, num_stages=4):  # three blocks on their way from memory at a time
        numbers = tl.load(x + place + start, mask=inside, other=0.0).to(tl.float32)
        squares += numbers * numbers
    return tl.sum(squares, 1) / width


@triton.jit
def _round_rotated(  # type: ignore[no-untyped-def]
    x, hadamard, mean_square, value, gate, rows,
    multiplier: tl.constexpr, top: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
    span: tl.constexpr, back: tl.constexpr, stages: tl.constexpr, bits: tl.constexpr, root: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    inside = (row < rows)[:, None]
    if mean_square is None:
        mean = mean_of_squares(x, row, inside, width, block)
    else:
        mean = tl.load(mean_square + row, mask=row < rows, other=0.0)
    scale = tl.sqrt(mean)[:, None] * multiplier
    matrix = load_matrix(hadamard, block, hadamard.dtype.element_ty == tl.float32)
    first = tl.program_id(1) * span
    round_blocks(
        x, matrix, scale, value, gate, row, inside, first, first + span, width, top, block, back, stages, bits, root
    )


@triton.jit
def _rotate_gated(  # type: ignore[no-untyped-def]
    gradient, hadamard, gate, out, rows,
    width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr, span: tl.constexpr, back: tl.constexpr,
    stages: tl.constexpr, bits: tl.constexpr, root: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    inside = (row < rows)[:, None]
    dtype: tl.constexpr = hadamard.dtype.element_ty
    matrix = load_matrix(hadamard, block, dtype == tl.float32)
    first = tl.program_id(1) * span
    rotate_gated_blocks(
        gradient, matrix, gate, out, row, inside, first, first + span, width, dtype, block, back, stages, bits, root
    )


@triton.jit
def _mean_squares(x, out, rows, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    numbers = tl.load(x + row.to(tl.int64)[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(numbers * numbers, 1) / width, mask=row < rows)


def mean_squares(x: Tensor) -> Tensor:
    """Return the mean square of each row of a contiguous array (rows, width), in float32."""
    rows, width = x.shape
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, tile, warps = row_tiles(width, _MEAN_NUMBERS, _MEAN_PER_WARP)
    launch(
        _mean_squares, (triton.cdiv(rows, tile),), x, out, rows, width=width, block=block, tile=tile, num_warps=warps
    )
    return out


class RotateAndRound(torch.autograd.Function):
    """(x, hadamard, multiplier, top, mean_square, dtype, back) -> rotated and rounded numbers, shape of x (..., width).

    `hadamard` is the matrix of a block that divides the width, in the dtype of x (16 bits, or float32 for weights);
    `top` is half the number of levels and `multiplier` the step in standard deviations; `mean_square`, shape (...), is
    that of each row of x, or None, where it is found here; `dtype` is the result's. With `back` the result is in the
    basis of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hadamard: Tensor,
        multiplier: float,
        top: float,
        mean_square: Tensor | None,
        dtype: torch.dtype,
        back: bool = False,
    ) -> Tensor:
        """Return the rounded numbers; keeps a bit per number."""
        x = x.contiguous()
        width, block = x.shape[-1], hadamard.shape[0]
        rows = x.numel() // width
        value = torch.empty_like(x, dtype=dtype)
        gate = torch.empty(*x.shape[:-1], width // BITS, dtype=torch.int16, device=x.device)
        weights = x.dtype == torch.float32
        tile, warps, span = (_WEIGHT_TILE, _WEIGHT_WARPS, block) if weights else (_TILE, _WARPS, width)
        if weights and mean_square is None:  # several programs share a row
            mean_square = mean_squares(x)
        launch(
            _round_rotated, (triton.cdiv(rows, tile), width // span),
            x, hadamard, mean_square, value, gate, rows,
            multiplier=multiplier, top=top, width=width, block=block, tile=tile,
            span=span, back=back, stages=_STAGES, bits=BITS, root=block**-0.5,
            num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(gate, hadamard)
        ctx.dtype, ctx.back = x.dtype, back
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        """Return the gradient that passes, rotated back."""
        gate, hadamard = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width, block = gradient.shape[-1], hadamard.shape[0]
        rows, out = gradient.numel() // width, torch.empty_like(gradient, dtype=ctx.dtype)
        weights = ctx.dtype == torch.float32
        tile, warps, span = (_WEIGHT_TILE, _WEIGHT_WARPS, block) if weights else (_BACK_TILE, _BACK_WARPS, width)
        launch(
            _rotate_gated, (triton.cdiv(rows, tile), width // span),
            gradient, hadamard, gate, out, rows,
            width=width, block=block, tile=tile, span=span, back=ctx.back, stages=_BACK_STAGES, bits=BITS,
            root=block**-0.5, num_warps=warps,
        )  # fmt: skip
        return out, None, None, None, None, None, None
