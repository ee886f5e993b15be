"""Rotary positions on the heads of a fused query-key-value product, forward and backward without copies.

The product is one array of heads (B, T, H + 2 K, head_dim). Forward rotates its queries and keys into a second array
and leaves the values where they are. Backward takes the gradients of queries, keys and values as attention wrote them,
rotates the first two back and writes all three side by side, which is the gradient of the product: generated code
first rotates into arrays of their own and then joins those.

Rotation in float32, angles as the tables have them. Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.triton_launch import launch

_NUMBERS = 512
"""Numbers per half of a head that a program handles at a time."""


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    source, batch_stride, token_stride, head_stride, target, target_pitch, batch, position, inside, place, cosine, sine,
    heads: tl.constexpr, half: tl.constexpr,
):  # fmt: skip
    """Rotate `heads` heads of a tile of tokens; shapes (tokens, half)."""
    source += batch * batch_stride + position * token_stride + place
    target += target_pitch + place
    for head in range(heads):
        start, goal = source + head * head_stride, target + head * 2 * half
        first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(goal, (first * cosine - second * sine).to(target.dtype.element_ty), mask=inside)
        tl.store(goal + half, (second * cosine + first * sine).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(  # type: ignore[no-untyped-def]
    query, query_batch, query_token, query_head, key, key_batch, key_token, key_head,
    value, value_batch, value_token, value_head, out, cosine, sine, tokens, length,
    heads: tl.constexpr, kv_heads: tl.constexpr, out_heads: tl.constexpr, half: tl.constexpr, block: tl.constexpr,
    tile: tl.constexpr, back: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * tile + tl.arange(0, tile)[:, None]
    place = tl.arange(0, block)[None, :]
    inside = (token < tokens) & (place < half)
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    cos = tl.load(cosine + position * 2 * half + place, mask=inside, other=0.0)
    sin = tl.load(sine + position * 2 * half + place, mask=inside, other=0.0)
    if back:
        sin = -sin
    pitch = token.to(tl.int64) * out_heads * 2 * half
    _rotate_heads(
        query, query_batch, query_token, query_head, out, pitch, batch, position, inside, place, cos, sin, heads, half
    )
    pitch += heads * 2 * half
    _rotate_heads(
        key, key_batch, key_token, key_head, out, pitch, batch, position, inside, place, cos, sin, kv_heads, half
    )
    if back:
        source = value + batch * value_batch + position * value_token + place
        target = out + pitch + kv_heads * 2 * half + place
        for head in range(kv_heads):
            start, goal = source + head * value_head, target + head * 2 * half
            tl.store(goal, tl.load(start, mask=inside), mask=inside)
            tl.store(goal + half, tl.load(start + half, mask=inside), mask=inside)


def _launch(parts: list[Tensor], out: Tensor, cosine: Tensor, sine: Tensor, *, back: bool) -> None:
    """Rotate query and key heads into `out`, with `back` by the opposite angle and with the values beside them."""
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in parts)
    batch, length, heads, width = query.shape
    block = triton.next_power_of_2(width // 2)
    tile = max(1, _NUMBERS // block)
    launch(
        _rotary, (triton.cdiv(batch * length, tile),),
        query, query.stride(0), query.stride(1), query.stride(2),
        key, key.stride(0), key.stride(1), key.stride(2),
        value, value.stride(0), value.stride(1), value.stride(2),
        out, cosine, sine, batch * length, length,
        heads=heads, kv_heads=key.shape[2], out_heads=out.shape[2], half=width // 2, block=block, tile=tile, back=back,
    )  # fmt: skip


def rotated_copy(qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return rotated queries and keys (B, T, H + K, head_dim) of contiguous heads (B, T, H + 2 K, head_dim)."""
    rotated = qkv.new_empty(*qkv.shape[:2], heads + kv_heads, qkv.shape[3])
    _launch(list(qkv.split([heads, kv_heads, kv_heads], dim=2)), rotated, cosine, sine, back=False)
    return rotated


class Rotary(torch.autograd.Function):
    """(heads, cosine, sine, H, K) -> rotated queries, rotated keys, values.

    Heads (B, T, H + 2 K, head_dim), tables (T, 1, head_dim) in float32; results (B, T, H or K, head_dim).
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts; the values are those of the input itself."""
        qkv, cosine, sine = qkv.contiguous(), cosine.contiguous(), sine.contiguous()
        ctx.save_for_backward(cosine, sine)
        query, key = rotated_copy(qkv, cosine, sine, heads, kv_heads).split([heads, kv_heads], dim=2)
        return query, key, qkv[:, :, heads + kv_heads :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the heads."""
        cosine, sine = ctx.saved_tensors
        query, key, _ = gradients
        batch, length, heads, width = query.shape
        out = query.new_empty(batch, length, heads + 2 * key.shape[2], width)
        _launch(list(gradients), out, cosine, sine, back=True)
        return out, None, None, None, None
