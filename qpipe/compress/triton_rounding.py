"""Rotate activations, round them and note where gradient passes, in one kernel; and its gradient in another.

    y = x H / scale,    scale = multiplier * rms(x),    value = (clamp(floor(y), -top, top - 1) + 1/2) * scale

A program keeps a tile of tokens: it sums the squares of their numbers (the rotation H changes no norm, so before it),
then reads them again, from cache, block by block, and multiplies with the block's H on the tensor cores. Generated
code stores the rotated numbers in between. Backward drops the gradient where the error was more than half a step,
|y| > top, and rotates it back.

As without this kernel, rotated numbers are rounded to the product's precision before they are divided by the scale;
the rest is float32; step and levels are compile-time constants, since compiled blocks would pass them as float64.
Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64
_WARPS = 8


@triton.jit
def _round_rotated(  # type: ignore[no-untyped-def]
    x, hadamard, value, gate, rows,
    multiplier: tl.constexpr, top: tl.constexpr, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    inside = (tl.program_id(0) * tile + tl.arange(0, tile) < rows)[:, None]
    begin = tl.program_id(0).to(tl.int64) * tile * width
    place = tl.arange(0, tile)[:, None] * width + tl.arange(0, block)[None, :]
    squares = tl.zeros((tile, block), tl.float32)
    for start in tl.range(0, width, block, num_stages=4):  # three blocks on their way from memory at a time
        numbers = tl.load(x + begin + place + start, mask=inside, other=0.0).to(tl.float32)
        squares += numbers * numbers
    scale = tl.sqrt(tl.sum(squares, 1) / width)[:, None] * multiplier
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    matrix = tl.load(hadamard + tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :])
    for start in tl.range(0, width, block, num_stages=2):
        numbers = tl.load(x + begin + place + start, mask=inside, other=0.0)
        y = tl.dot(numbers, matrix).to(numbers.dtype).to(tl.float32) * inverse
        level = tl.minimum(tl.maximum(tl.floor(y), -top), top - 1.0) + 0.5
        tl.store(value + begin + place + start, (level * scale).to(value.dtype.element_ty), mask=inside)
        tl.store(gate + begin + place + start, tl.abs(y) <= top, mask=inside)


@triton.jit
def _rotate_gated(  # type: ignore[no-untyped-def]
    gradient, hadamard, gate, out, rows, width: tl.constexpr, block: tl.constexpr, tile: tl.constexpr
):
    inside = (tl.program_id(0) * tile + tl.arange(0, tile) < rows)[:, None]
    begin = tl.program_id(0).to(tl.int64) * tile * width
    place = tl.arange(0, tile)[:, None] * width + tl.arange(0, block)[None, :]
    matrix = tl.load(hadamard + tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :])
    for start in tl.range(0, width, block, num_stages=3):
        numbers = tl.load(gradient + begin + place + start, mask=inside, other=0.0)
        passes = tl.load(gate + begin + place + start, mask=inside, other=0)
        numbers = tl.where(passes != 0, numbers, 0.0).to(matrix.dtype)
        tl.store(out + begin + place + start, tl.dot(numbers, matrix).to(out.dtype.element_ty), mask=inside)


class RotateAndRound(torch.autograd.Function):
    """(x, hadamard, multiplier, top) -> rotated and rounded numbers of the shape of x, (..., width).

    `hadamard` is the matrix of a block that divides the width, in the dtype of x (16 bits); `top` is half the number
    of levels and `multiplier` the step in standard deviations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, hadamard: Tensor, multiplier: float, top: float) -> Tensor:
        """Return the rounded numbers in the rotated basis; keeps a byte per number."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        value, gate = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        _round_rotated[(triton.cdiv(rows, _TILE),)](
            x, hadamard, value, gate, rows,
            multiplier=multiplier, top=top, width=width, block=hadamard.shape[0], tile=_TILE, num_warps=_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(gate, hadamard)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient that passes, rotated back."""
        gate, hadamard = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width = gradient.shape[-1]
        rows, out = gradient.numel() // width, torch.empty_like(gradient)
        _rotate_gated[(triton.cdiv(rows, _TILE),)](
            gradient, hadamard, gate, out, rows,
            width=width, block=hadamard.shape[0], tile=_TILE, num_warps=_WARPS,
        )  # fmt: skip
        return out, None, None, None
