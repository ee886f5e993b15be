"""Kernels for GPUs that a compiler does not find: each touches its memory once where generated code does so twice.

* The softmax gradient goes over a row of logits twice, the second time writing the gradient over it: a row of 32,000
  numbers stays in cache between the two, and no second array of logits is needed.
* SwiGLU's backward pass writes the gradients of gate and up side by side as one array, which is what the fused
  gate-and-up product wants; generated code computes both halves for each place and throws one away.
* Rotating activations, rounding them and noting where gradient passes is one kernel; generated code stores the rotated
  numbers in between. The scale is taken before the rotation, which changes no norm.

This module imports Triton, so it is imported only where there is a GPU. Arithmetic is float32 inside.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS_AT_ONCE = 8192
_BLOCK = 1024
_TILE = 64


@triton.jit
def _softmax_gradient_kernel(logits, targets, losses, scale, columns: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, block):
        place = start + tl.arange(0, block)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
        largest = larger
    normaliser = largest + tl.log(total)
    tl.store(losses + row, normaliser - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # everyone has read the correct token's logit before anyone overwrites it
    for start in range(0, columns, block):
        place = start + tl.arange(0, block)
        x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - normaliser) - tl.where(place == target, 1.0, 0.0)) * scale
        tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=place < columns)


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Return the summed cross-entropy of logits (M, V) against classes (M,); put `scale` times its gradient there."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(_COLUMNS_AT_ONCE, triton.next_power_of_2(columns))
    warps = max(4, block // 512)
    _softmax_gradient_kernel[(rows,)](logits, targets, losses, scale, columns=columns, block=block, num_warps=warps)
    return losses.sum()


@triton.jit
def _swiglu_forward(gate_up, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    gate = tl.load(gate_up + row * 2 * width + place, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + place, mask=inside).to(tl.float32)
    tl.store(out + row * width + place, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, gradient, out, width, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < width
    start = row * 2 * width + place
    gate = tl.load(gate_up + start, mask=inside).to(tl.float32)
    up = tl.load(gate_up + start + width, mask=inside).to(tl.float32)
    incoming = tl.load(gradient + row * width + place, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = incoming * up * share * (1.0 + gate * (1.0 - share))
    tl.store(out + start, to_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + start + width, (incoming * gate * share).to(out.dtype.element_ty), mask=inside)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of the two halves of the last dimension, (..., 2 F) -> (..., F)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Return the product; keeps its input."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        _swiglu_forward[(out.numel() // width, triton.cdiv(width, _BLOCK))](gate_up, out, width, block=_BLOCK)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradients of gate and up side by side."""
        (gate_up,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width = gradient.shape[-1]
        out = torch.empty_like(gate_up)
        grid = (gradient.numel() // width, triton.cdiv(width, _BLOCK))
        _swiglu_backward[grid](gate_up, gradient, out, width, block=_BLOCK)
        return out


@triton.jit
def _signs(size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sylvester's matrix without its normalisation: (-1)^popcount(i & j), for sizes up to 256."""
    both = tl.arange(0, size)[:, None] & tl.arange(0, size)[None, :]
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return 1 - 2 * (both & 1)


@triton.jit
def _round_rotated(x, scales, value, gate, rows, width, top, block: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    place = row[:, None] * width + tl.program_id(1) * block + tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None]
    numbers = tl.load(x + place, mask=inside, other=0.0)
    rotated = tl.dot(numbers, _signs(block).to(numbers.dtype), input_precision="ieee") * (1.0 / tl.sqrt(block * 1.0))
    scale = tl.load(scales + row, mask=row < rows, other=0.0)[:, None]
    y = rotated * tl.where(scale > 0, 1.0 / scale, 0.0)
    level = tl.minimum(tl.maximum(tl.floor(y), -top), top - 1.0) + 0.5
    tl.store(value + place, (level * scale).to(value.dtype.element_ty), mask=inside)
    tl.store(gate + place, (tl.abs(y) <= top).to(tl.int8), mask=inside)


@triton.jit
def _rotate_gated(gradient, gate, out, rows, width, block: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    place = row[:, None] * width + tl.program_id(1) * block + tl.arange(0, block)[None, :]
    inside = (row < rows)[:, None]
    passes = tl.load(gate + place, mask=inside, other=0)
    incoming = tl.load(gradient + place, mask=inside, other=0.0) * passes.to(gradient.dtype.element_ty)
    rotated = tl.dot(incoming, _signs(block).to(incoming.dtype), input_precision="ieee") * (1.0 / tl.sqrt(block * 1.0))
    tl.store(out + place, rotated.to(out.dtype.element_ty), mask=inside)


class RotateAndRound(torch.autograd.Function):
    """Rotate the last dimension in Hadamard blocks and round to 2 top mid-rise levels; gradient by trust.

    Forward takes numbers (..., width), their scales (rows, 1), `top` = half the number of levels and the block's size
    (16 to 128). Gradient passes where the error is at most half a step, |y| <= top, and is rotated back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, top: float, block: int) -> Tensor:
        """Return the rounded numbers in the rotated basis; keeps a byte per number."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        value, gate = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
        grid = (triton.cdiv(rows, _TILE), width // block)
        _round_rotated[grid](x, scale, value, gate, rows, width, top, block=block, tile=_TILE)
        ctx.save_for_backward(gate)
        ctx.block = block
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient that passes, rotated back."""
        (gate,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        width = gradient.shape[-1]
        rows, out = gradient.numel() // width, torch.empty_like(gradient)
        grid = (triton.cdiv(rows, _TILE), width // ctx.block)
        _rotate_gated[grid](gradient, gate, out, rows, width, block=ctx.block, tile=_TILE)
        return out, None, None, None
