"""Causal attention of small heads, forward and backward, between rotary positions and back.

The query-key-value product is one array of heads (B, T, H + 2 K, head_dim); rotated queries and keys are a second one
(B, T, H + K, head_dim). Library attention hands back three gradients in arrays of its own, which have to be rotated
back and joined, and its kernels are made for larger heads: at heads of 32 or 64 numbers its backward pass converts and
adds up longer than it computes. Here a program takes a tile of queries and the keys up to the diagonal (forward and
gradient of queries), or a tile of keys and the queries from the diagonal on (gradient of keys and values), rotates its
gradient back, and writes it where it belongs in the gradient of the product.

As in FlashAttention-2 (2307.08691) scores are recomputed in the backward pass from the logarithm of their sum, here to
base 2. Products take 16-bit numbers, everything else is float32. Imported only where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.triton_launch import launch
from qpipe.triton_rotary import rotated_copy

_BASE_2 = 1.4426950408889634
"""log2 e: 2^(_BASE_2 x) is e^x."""

_FORWARD = (64, 64, 4, 3)
"""Queries of a program, keys that it reads at a time, its warps, and tiles of keys on their way from memory."""

_TO_QUERIES = (64, 32, 4, 3)
"""The same for the gradient of queries."""

_TO_KEYS = (64, 64, 4, 1)
"""Keys of a program, queries that it reads at a time, warps and tiles: the gradient of keys and values."""


@triton.jit
def _load(start, token, length, pitch: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a head's numbers (tokens, width)."""
    place = start + token[:, None] * pitch + tl.arange(0, width)[None, :]
    return tl.load(place, mask=token[:, None] < length, other=0.0)


@triton.jit
def _store_rotated_back(  # type: ignore[no-untyped-def]
    start, gradient, cosine, sine, token, length, pitch: tl.constexpr, width: tl.constexpr
):
    half: tl.constexpr = width // 2
    first, second = tl.split(tl.permute(tl.reshape(gradient, (token.shape[0], 2, half)), (0, 2, 1)))
    column = tl.arange(0, half)[None, :]
    inside = token[:, None] < length
    cos = tl.load(cosine + token[:, None] * width + column, mask=inside, other=0.0)
    sin = tl.load(sine + token[:, None] * width + column, mask=inside, other=0.0)
    place = start + token[:, None] * pitch + column
    tl.store(place, (first * cos + second * sin).to(start.dtype.element_ty), mask=inside)
    tl.store(place + half, (second * cos - first * sin).to(start.dtype.element_ty), mask=inside)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    rotated, qkv, out, logarithm, length,
    scale: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    pitch: tl.constexpr = (heads + kv_heads) * width
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # longest first
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    kv_head = heads + head * kv_heads // heads
    keys = rotated + batch * length * pitch + kv_head * width
    values = qkv + (batch * length * (heads + 2 * kv_heads) + kv_head + kv_heads) * width
    row = tile * rows + tl.arange(0, rows)
    query = _load(rotated + batch * length * pitch + head * width, row, length, pitch, width)
    largest = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    sums = tl.zeros((rows, width), tl.float32)
    for diagonal in tl.static_range(2):  # first the tiles that need no mask
        for start in tl.range(diagonal * tile * rows, (tile + diagonal) * rows, columns, num_stages=stages):
            column = start + tl.arange(0, columns)
            score = tl.dot(query, _load(keys, column, length, pitch, width).T)
            if diagonal:
                score = tl.where(row[:, None] >= column[None, :], score, -1e30)
            larger = tl.maximum(largest, tl.max(score, 1) * scale)
            share = tl.exp2(score * scale - larger[:, None])
            shrunk = tl.exp2(largest - larger)
            total = total * shrunk + tl.sum(share, 1)
            value = _load(values, column, length, pitch + kv_heads * width, width)
            sums = tl.dot(share.to(value.dtype), value, sums * shrunk[:, None])
            largest = larger
    place = (batch * length + row[:, None]) * heads * width + head * width + tl.arange(0, width)[None, :]
    tl.store(out + place, (sums / total[:, None]).to(out.dtype.element_ty), mask=row[:, None] < length)
    place = (batch * heads + head) * length + row
    tl.store(logarithm + place, largest + tl.log2(total), mask=row < length)


@triton.jit
def _to_queries(  # type: ignore[no-untyped-def]
    rotated, qkv, cosine, sine, out, logarithm, gradient, along, to_qkv, length,
    scale: tl.constexpr, root: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and for `_to_keys` the product of out and its gradient, token by token."""
    pitch: tl.constexpr = (heads + kv_heads) * width
    whole: tl.constexpr = (heads + 2 * kv_heads) * width
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    kv_head = heads + head * kv_heads // heads
    keys = rotated + batch * length * pitch + kv_head * width
    values = qkv + batch * length * whole + (kv_head + kv_heads) * width
    row = tile * rows + tl.arange(0, rows)
    query = _load(rotated + batch * length * pitch + head * width, row, length, pitch, width)
    own = batch * length * heads * width + head * width
    incoming = _load(gradient + own, row, length, heads * width, width)
    result = _load(out + own, row, length, heads * width, width)
    product = tl.sum(incoming.to(tl.float32) * result.to(tl.float32), 1)
    place = (batch * heads + head) * length + row
    tl.store(along + place, product, mask=row < length)
    normaliser = tl.load(logarithm + place, mask=row < length, other=0.0)
    to_query = tl.zeros((rows, width), tl.float32)
    for diagonal in tl.static_range(2):
        for start in tl.range(diagonal * tile * rows, (tile + diagonal) * rows, columns, num_stages=stages):
            column = start + tl.arange(0, columns)
            key = _load(keys, column, length, pitch, width)
            share = tl.exp2(tl.dot(query, key.T) * scale - normaliser[:, None])
            if diagonal:
                share = tl.where(row[:, None] >= column[None, :], share, 0.0)
            value = _load(values, column, length, whole, width)
            to_score = share * (tl.dot(incoming, value.T) - product[:, None])
            to_query = tl.dot(to_score.to(key.dtype), key, to_query)
    target = to_qkv + batch * length * whole + head * width
    _store_rotated_back(target, to_query * root, cosine, sine, row, length, whole, width)


@triton.jit
def _to_keys(  # type: ignore[no-untyped-def]
    rotated, qkv, cosine, sine, logarithm, gradient, along, to_qkv, length,
    scale: tl.constexpr, root: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of `rows` keys and of their values; arrays of scores are (keys, queries) here."""
    pitch: tl.constexpr = (heads + kv_heads) * width
    whole: tl.constexpr = (heads + 2 * kv_heads) * width
    shared: tl.constexpr = heads // kv_heads
    tile = tl.program_id(1)
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    row = tile * rows + tl.arange(0, rows)
    key = _load(rotated + batch * length * pitch + (heads + kv_head) * width, row, length, pitch, width)
    begin = batch * length * whole + (heads + kv_head) * width
    value = _load(qkv + begin + kv_heads * width, row, length, whole, width)
    to_key = tl.zeros((rows, width), tl.float32)
    to_value = tl.zeros((rows, width), tl.float32)
    for head in range(kv_head * shared, (kv_head + 1) * shared):
        queries = rotated + batch * length * pitch + head * width
        incoming_head = gradient + batch * length * heads * width + head * width
        numbers = (batch * heads + head) * length
        for rest in tl.static_range(2):  # first the tiles that need a mask
            last = length if rest else (tile + 1) * rows
            for start in tl.range((tile + rest) * rows, last, columns, num_stages=stages):
                column = start + tl.arange(0, columns)
                query = _load(queries, column, length, pitch, width)
                incoming = _load(incoming_head, column, length, heads * width, width)
                normaliser = tl.load(logarithm + numbers + column, mask=column < length, other=0.0)
                product = tl.load(along + numbers + column, mask=column < length, other=0.0)
                share = tl.exp2(tl.dot(key, query.T) * scale - normaliser[None, :])
                if not rest:
                    share = tl.where(column[None, :] >= row[:, None], share, 0.0)
                to_value = tl.dot(share.to(incoming.dtype), incoming, to_value)
                to_score = share * (tl.dot(value, incoming.T) - product[None, :])
                to_key = tl.dot(to_score.to(query.dtype), query, to_key)
    _store_rotated_back(to_qkv + begin, to_key * root, cosine, sine, row, length, whole, width)
    place = begin + kv_heads * width + row[:, None] * whole + tl.arange(0, width)[None, :]
    tl.store(to_qkv + place, to_value.to(to_qkv.dtype.element_ty), mask=row[:, None] < length)


class RotaryAttention(torch.autograd.Function):
    """(heads, cosine, sine, H, K) -> causal attention's output, (B, T, H, head_dim).

    Heads (B, T, H + 2 K, head_dim) of 16-bit numbers, queries, keys and values side by side; tables (T, 1, head_dim) in
    float32; head_dim 16 or a larger power of two.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> Tensor:
        """Return the output; keeps it, the product, rotated queries and keys and a number per query."""
        qkv, cosine, sine = qkv.contiguous(), cosine.contiguous(), sine.contiguous()
        batch, length, _, width = qkv.shape
        rotated = rotated_copy(qkv, cosine, sine, heads, kv_heads)
        out = qkv.new_empty(batch, length, heads, width)
        logarithm = qkv.new_empty(batch, heads, length, dtype=torch.float32)
        rows, columns, warps, stages = _FORWARD
        launch(
            _forward, (batch * heads, triton.cdiv(length, rows)),
            rotated, qkv, out, logarithm, length,
            scale=width**-0.5 * _BASE_2, heads=heads, kv_heads=kv_heads, width=width,
            rows=rows, columns=columns, stages=stages, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(rotated, qkv, cosine, sine, out, logarithm)
        ctx.heads, ctx.kv_heads = heads, kv_heads
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the heads."""
        rotated, qkv, cosine, sine, out, logarithm = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        batch, length, _, width = qkv.shape
        along, to_qkv = torch.empty_like(logarithm), torch.empty_like(qkv)
        rows, columns, warps, stages = _TO_QUERIES
        launch(
            _to_queries, (batch * ctx.heads, triton.cdiv(length, rows)),
            rotated, qkv, cosine, sine, out, logarithm, gradient, along, to_qkv, length,
            scale=width**-0.5 * _BASE_2, root=width**-0.5, heads=ctx.heads, kv_heads=ctx.kv_heads, width=width,
            rows=rows, columns=columns, stages=stages, num_warps=warps,
        )  # fmt: skip
        rows, columns, warps, stages = _TO_KEYS
        launch(
            _to_keys, (batch * ctx.kv_heads, triton.cdiv(length, rows)),
            rotated, qkv, cosine, sine, logarithm, gradient, along, to_qkv, length,
            scale=width**-0.5 * _BASE_2, root=width**-0.5, heads=ctx.heads, kv_heads=ctx.kv_heads, width=width,
            rows=rows, columns=columns, stages=stages, num_warps=warps,
        )  # fmt: skip
        return to_qkv, None, None, None, None
