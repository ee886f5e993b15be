"""Packed weights: the bits a compressed matrix really needs, and back, exactly.

A matrix is stored as a few flat tensors (names in brackets):

- codes [`codes`], bit-packed little-endian: ceil(log2 n) bits per code, ternary five to a byte in base 3. Under a mask
  only kept numbers have codes, in row-major order.
- scales [`scales`] in their own format: float32, float16, E8M0 as the biased exponent, E4M3 with one float32 per tensor
  [`tensor_scale`].
- the mask [`mask`]: a bitmap, or for n:m the positions of the kept units.
- without a grid, kept numbers as bfloat16 [`values`]: the precision they are multiplied in.

Unpacking gives bit for bit what the layer computed with (`CompressedLinear.compressed_weight`), without a grid after
rounding to bfloat16.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qpipe.compress.binary import binary_codes, binary_scales, binary_values
from qpipe.compress.masks import select
from qpipe.compress.prepare import Prepared
from qpipe.compress.rounding import decode, encode, round_to_grid
from qpipe.compress.scales import exact_scale, find_scale, grouped, reciprocal, two_level
from qpipe.compress.trained import SMALLEST_SCALE, unit_per_scale
from qpipe.compress.vectors import decode_vectors, nearest_codes
from qpipe.errors import QpipeError
from qpipe.formats import Grid, Mask


def pack_codes(codes: Tensor, count: int) -> Tensor:
    """Pack integers in [0, count), any shape, into a flat uint8 tensor."""
    flat = codes.flatten().to(torch.int64)
    if count == 3:
        digits = torch.nn.functional.pad(flat, (0, -len(flat) % 5)).reshape(-1, 5)
        return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(-1).to(torch.uint8)
    bits = _width(count)
    stream = ((flat.unsqueeze(-1) >> torch.arange(bits)) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (stream << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, count: int, number: int) -> Tensor:
    """Inverse of `pack_codes` for `number` codes, int64, shape (number,)."""
    wide = packed.to(torch.int64).unsqueeze(-1)
    if count == 3:
        return (wide // torch.tensor([1, 3, 9, 27, 81]) % 3).flatten()[:number]
    bits = _width(count)
    stream = ((wide >> torch.arange(8)) & 1).flatten()[: number * bits]
    return (stream.reshape(number, bits) << torch.arange(bits)).sum(-1)


def _width(count: int) -> int:
    return max(math.ceil(math.log2(count)), 1)


@torch.no_grad()
def pack(weight: Tensor, prepared: Prepared, scale: Tensor | None = None) -> dict[str, Tensor]:
    """Pack a dense matrix, shape (out, in), rotated already if the representation rotates.

    Parameters
    ----------
    scale : the trained scale, where the representation has one
    """
    weight = weight.cpu()
    keep = None if prepared.mask is None else select(weight, prepared.mask)
    packed = {} if keep is None or prepared.mask is None else {"mask": _pack_mask(keep, prepared.mask)}
    kept = slice(None) if keep is None else keep.flatten()
    if prepared.grid is None:
        return packed | {"values": weight.flatten()[kept].to(torch.bfloat16)}
    if prepared.grid.family == "noise":
        raise QpipeError(f"grid '{prepared.grid.word}' adds noise and has no codes to pack; use an integer grid")
    groups = grouped(weight, prepared.part.group)
    codes, scales = _codes_and_scales(groups, prepared, prepared.grid, None if scale is None else scale.cpu())
    return packed | scales | {"codes": pack_codes(codes.flatten()[kept], prepared.grid.codes)}


def _codes_and_scales(
    groups: Tensor, prepared: Prepared, grid: Grid, trained: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    if grid.family == "binary":
        scales = binary_scales(groups, grid)
        return binary_codes(groups, scales), {"scales": scales}
    if trained is not None:
        unit = torch.where(trained > SMALLEST_SCALE, trained, SMALLEST_SCALE) * unit_per_scale(prepared)
        return encode(round_to_grid(groups / unit, grid), grid), {"scales": unit}
    unit = find_scale(groups, prepared)
    y = groups * reciprocal(unit)
    codes = nearest_codes(y, grid) if grid.dimension > 1 else encode(round_to_grid(y, grid), grid)
    if prepared.part.scale_format == "e4m3":
        stored, tensor_scale = two_level(exact_scale(groups, prepared))
        return codes, {
            "scales": stored.to(torch.float8_e4m3fn).view(torch.uint8),
            "tensor_scale": tensor_scale.reshape(1),
        }
    return codes, _pack_scales(unit, prepared.part.scale_format)


def _pack_scales(unit: Tensor, scale_format: str) -> dict[str, Tensor]:
    if scale_format == "float16":
        return {"scales": unit.to(torch.float16)}
    if scale_format == "e8m0":
        exponent = torch.where(unit > 0, torch.frexp(unit).exponent - 1 + 127, 255)  # 255 marks an all-zero block
        return {"scales": exponent.to(torch.uint8)}
    return {"scales": unit}


def _unpack_scales(packed: Mapping[str, Tensor], scale_format: str) -> Tensor:
    scales = packed["scales"]
    if scale_format == "e8m0":
        unit = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127)
        return torch.where(scales == 255, 0.0, unit)
    if scale_format == "e4m3":
        return scales.view(torch.float8_e4m3fn).float() * packed["tensor_scale"]
    return scales.float() if scale_format == "float16" else scales


@torch.no_grad()
def unpack(packed: Mapping[str, Tensor], prepared: Prepared, shape: tuple[int, int]) -> Tensor:
    """Dequantized matrix of `shape` (out, in), still rotated if the representation rotates; float32."""
    keep = None if prepared.mask is None else _unpack_mask(packed["mask"], prepared.mask, shape)
    if prepared.grid is None:
        return _scatter(packed["values"].float(), keep, shape)
    grid = prepared.grid
    scales = _unpack_scales(packed, prepared.part.scale_format)
    if grid.dimension > 1:
        codes = unpack_codes(packed["codes"], grid.codes, shape[0] * shape[1] // grid.dimension)
        values = decode_vectors(codes.reshape(shape[0], -1), grid, scales)
        return (grouped(values, prepared.part.group) * scales).reshape(shape)
    number = shape[0] * shape[1] if keep is None else int(keep.sum())
    codes = _scatter(unpack_codes(packed["codes"], grid.codes, number), keep, shape)
    groups = grouped(codes, prepared.part.group)
    value = binary_values(groups, scales) if grid.family == "binary" else decode(groups, grid, scales) * scales
    return value.reshape(shape) if keep is None else value.reshape(shape) * keep


def _scatter(flat: Tensor, keep: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Kept entries back in their places, zeros elsewhere."""
    if keep is None:
        return flat.reshape(shape)
    result = torch.zeros(shape, dtype=flat.dtype)
    result[keep] = flat
    return result


def _pack_mask(keep: Tensor, mask: Mask) -> Tensor:
    if mask.n is None or mask.m is None:
        return pack_codes(keep.long(), 2)
    units = keep.unflatten(-1, (-1, mask.m, mask.block))[..., 0]
    return pack_codes(units.nonzero()[:, -1], mask.m)


def _unpack_mask(packed: Tensor, mask: Mask, shape: tuple[int, int]) -> Tensor:
    if mask.n is None or mask.m is None:
        return unpack_codes(packed, 2, shape[0] * shape[1]).bool().reshape(shape)
    blocks = shape[0] * shape[1] // (mask.m * mask.block)
    positions = unpack_codes(packed, mask.m, blocks * mask.n).reshape(blocks, mask.n)
    units = torch.zeros(blocks, mask.m, dtype=torch.bool).scatter_(1, positions, True)
    return units.unsqueeze(-1).expand(-1, -1, mask.block).reshape(shape)


def packed_bits(packed: Mapping[str, Tensor]) -> int:
    """Bits that the tensors of a packed matrix occupy."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in packed.values())
