"""Causal attention over rotary positions (Su et al., 2104.09864).

Shapes: B sequences, T tokens, H query heads, K key and value heads; a fused product holds the heads of queries, keys
and values side by side, (B, T, H + 2 K, head_dim).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe import cpu_functions
from qpipe.recipe import ModelShape, RopeScaling

if torch.cuda.is_available():
    from qpipe import triton_attention, triton_rotary

SMALL_HEADS = (32, 64)
"""Sizes of heads (numbers) for which our own kernels are faster than the library's."""

_LONGEST_KEPT = 512
"""Tokens up to which compiled attention keeps its scores on a CPU; of longer sequences they would need much memory."""

_SHORTEST_PIECE, _MOST_PIECES = 64, 4
"""Queries of a piece and pieces of a sequence there: more pieces skip more of the future, and have smaller products."""


def causal_attention(qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return the mixed values (B, T, H, head_dim) of heads that are not yet rotated.

    Parameters
    ----------
    qkv
        Queries, keys and values, shape (B, T, H + 2 K, head_dim).
    cosine, sine
        Tables of `rotary_tables`, cut to T.
    heads, kv_heads
        H and K; K divides H.
    """
    if has_kernel(qkv):
        mixed: Tensor = triton_attention.RotaryAttention.apply(qkv, cosine, sine, heads, kv_heads)
        return mixed
    query, key, value = (part.transpose(1, 2) for part in rotated_parts(qkv, cosine, sine, heads, kv_heads))
    if _keeps_scores(query, key):
        return attention_in_pieces(query, key, value).transpose(1, 2)
    gqa = heads != kv_heads
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def has_kernel(qkv: Tensor) -> bool:
    """Whether attention of these heads has a kernel of our own, which compiled blocks do not use."""
    small = qkv.dtype.itemsize == 2 and qkv.shape[-1] in SMALL_HEADS
    return small and qkv.is_cuda and not torch.compiler.is_compiling()


def _keeps_scores(query: Tensor, key: Tensor) -> bool:
    """Whether `attention_in_pieces` is faster than the library: compiled, on a CPU, in float32."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    return on_cpu and torch.compiler.is_compiling() and query.shape == key.shape and query.shape[2] <= _LONGEST_KEPT


def attention_in_pieces(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention (B, H, T, head_dim) as batched products: each piece of queries with the keys up to its end.

    Probabilities are kept for the gradient, which the library works out again, and up to three quarters of the future
    are never touched.
    """
    batch, heads, length, head_dim = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query * (1 / math.sqrt(head_dim)), key, value))
    size = max(_SHORTEST_PIECE, math.ceil(length / _MOST_PIECES))
    mixed = []
    for start in range(0, length, size):
        end = min(start + size, length)
        scores = torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2))
        later = torch.arange(end, device=query.device) > torch.arange(start, end, device=query.device)[:, None]
        mixed.append(torch.bmm(torch.softmax(scores.masked_fill(later, -math.inf), dim=-1), value[:, :end]))
    return torch.cat(mixed, dim=1).unflatten(0, (batch, heads))


def rotary_tables(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (context, 1, head_dim) of the rotary angles, theta^(-2i/head_dim) per position.

    The angle of pair i stands at features i and i + head_dim/2, the order in which Llama checkpoints are stored.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device="cpu") / shape.head_dim
    frequencies = scaled_frequencies(shape.rope_theta**-exponents, shape.rope_scaling)
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32, device="cpu"), frequencies)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Divide low rotary frequencies by a factor, keep high ones and blend between (Llama 3.1's released code)."""
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)  # that a pair makes over the old context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each head (B, T, H, head_dim) by its position's angles."""
    half = heads.shape[-1] // 2  # for both halves of a head the angles are the same
    cosine, sine = cosine[..., :half].to(heads.dtype), sine[..., :half].to(heads.dtype)
    first, second = heads.unflatten(-1, (2, half)).unbind(-2)
    # Stacked, not concatenated: compiled code then has no choice to make between neighbours.
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-2).flatten(-2)


def rotated_parts(
    qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys and values of heads (B, T, heads + 2 kv_heads, head_dim)."""
    if qkv.is_cuda:
        parts: tuple[Tensor, Tensor, Tensor] = triton_rotary.Rotary.apply(qkv, cosine, sine, heads, kv_heads)
        return parts
    if cpu_functions.fits(qkv):
        parts = cpu_functions.Rotary.apply(qkv, cosine, sine, heads, kv_heads)
        return parts
    query_key, value = qkv.split([heads + kv_heads, kv_heads], dim=2)
    query, key = rotate(query_key, cosine, sine).split([heads, kv_heads], dim=2)
    return query, key, value
