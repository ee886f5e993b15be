"""Bits per weight, computed from a composition and a matrix shape.

Payload is the codes of the kept weights. The total adds what a file must also hold: scales, mask indices and code
books. Masks are counted twice, because the literature does both: at their entropy and at what hardware or our packed
files spend (n:m: one position index per kept unit; unstructured: a bitmap). Likewise ternary codes: log2 3 bits in
the payload, 8/5 bits when five are packed into a byte.
"""

import math
from typing import NamedTuple

from qpipe.errors import QpipeError
from qpipe.formats.grids import Grid
from qpipe.formats.spec import Mask, Representation, TensorFormat, density_entropy

DENSE_BITS = 16
"""Bits of a weight that is not compressed (bfloat16), also of kept weights under a mask without a grid."""
SCALE_BITS = {"float16": 16, "float32": 32, "e8m0": 8, "e4m3": 8}


class Storage(NamedTuple):
    """Bits per weight of one matrix."""

    payload_bits: float
    """Codes only, at log2(codes) bits."""
    total_bits: float
    """Everything a packed file holds: packed codes, scales, mask at its hardware cost, code book."""
    scale_bits: float = 0.0
    mask_entropy_bits: float = 0.0
    mask_hardware_bits: float = 0.0
    codebook_bits: float = 0.0
    packed_code_bits: float = DENSE_BITS
    """Codes as they are packed: ternary 8/5, other grids the next whole number of bits."""


def storage_bits(representation: Representation, in_features: int, out_features: int) -> Storage:
    """Bits per weight of an `out_features` x `in_features` matrix held in this representation (dense: 16)."""
    part = representation.weights
    if part is None:
        return Storage(DENSE_BITS, DENSE_BITS)
    check_shape(representation, in_features)
    grid = part.parsed_grid
    kept = 1.0 if part.mask is None else 1 - part.mask.share
    code_bits = DENSE_BITS if grid is None else grid.bits
    packed = DENSE_BITS if grid is None else packed_code_bits(grid)
    count = in_features * out_features
    scales = 0.0 if grid is None else _scale_bits(part, grid, in_features, out_features) / count
    book = 0.0 if grid is None else _codebook_bits(grid) / count
    entropy, hardware = mask_bits(part.mask)
    total = kept * packed + scales + hardware + book
    return Storage(kept * code_bits, total, scales, entropy, hardware, book, packed)


def packed_code_bits(grid: Grid) -> float:
    """Bits per number of packed codes: ternary in base 3 (five per byte), noise as stated, others in whole bits."""
    if grid.family == "noise":
        return grid.bits
    return 8 / 5 if grid.codes == 3 else math.ceil(math.log2(grid.codes)) / grid.dimension


def mask_bits(mask: Mask | None) -> tuple[float, float]:
    """Mask cost in bits per number: (entropy, hardware)."""
    if mask is None:
        return 0.0, 0.0
    if mask.n is None or mask.m is None:
        return density_entropy(mask.share), 1.0
    unit = mask.m * mask.block
    return math.log2(math.comb(mask.m, mask.n)) / unit, mask.n * math.ceil(math.log2(mask.m)) / unit


def _scale_bits(part: TensorFormat, grid: Grid, in_features: int, out_features: int) -> float:
    """Bits of all the scales of one matrix."""
    if grid.family == "noise":
        return 0.0
    groups = {"tensor": 1, "row": out_features}.get(str(part.group))
    if groups is None:
        groups = out_features * in_features // int(part.group)
    per_group = round(grid.bits) if grid.family == "binary" else 1  # one scale per bit plane
    tensor_scale = 32 if part.scale_format == "e4m3" else 0
    return groups * per_group * SCALE_BITS[part.scale_format] + tensor_scale


def _codebook_bits(grid: Grid) -> float:
    """Bits of the code vectors, 16 per coordinate; scalar and lattice grids are known by name and cost nothing."""
    return grid.codes * grid.dimension * 16 if grid.family == "vector" else 0.0


def check_shape(representation: Representation, in_features: int) -> None:
    """Raise `QpipeError`, naming every misfit, when the composition cannot tile rows of `in_features` numbers."""
    problems = []
    for side in ("weights", "activations"):
        part: TensorFormat | None = getattr(representation, side)
        if part is None:
            continue
        units = {"group": part.group if isinstance(part.group, int) and part.grid else 1}
        units["vector"] = grid.dimension if (grid := part.parsed_grid) else 1
        units["n:m block"] = part.mask.m * part.mask.block if part.mask and part.mask.m else 1
        problems += [
            f"representation '{representation.name}', {side}: {in_features} input features do not divide into "
            f"{what}s of {size}; choose a width that is a multiple of {size} or another {what}"
            for what, size in units.items()
            if in_features % size
        ]
    if problems:
        raise QpipeError(problems)
