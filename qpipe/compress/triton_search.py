"""Searches over many candidates per number, on a GPU: of scales with the least error, and of E8 lattice points.

What a compiler makes of such a search stores or reads its numbers once per candidate, and is a dozen kernels that take
eight seconds to compile. Here a warp stays with a row, or a thread with its lattice vectors, while it goes through all
candidates, and nothing is stored but the answer. To a compiler either search is one operation that it leaves alone.
Imported only where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.compress.grids import exponent_range
from qpipe.formats import Grid
from qpipe.triton_launch import launch

_NUMBERS = 256
"""Numbers of a row that a warp handles at a time."""

_LONGEST_ROW = 2**15
"""A row belongs to one warp, so longer ones would be slow."""

_VECTORS = 64
"""Lattice vectors of a program, which is one warp."""


def searches_scale(x: Tensor, grid: Grid) -> bool:
    """Whether `search_scale` can find the scales of the rows of `x` for this grid."""
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] <= _LONGEST_ROW
        and (grid.uniform or grid.family == "float")
    )


@triton.jit
def _nearest_integer(y):  # type: ignore[no-untyped-def]
    """Round half to even, |y| < 2^22: no fraction is left beside 1.5 * 2^23, and sums are faster than conversions."""
    return (y + 12582912.0) - 12582912.0


@triton.jit
def _nearest_float(y, top: tl.constexpr, smallest: tl.constexpr, mantissa: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to a floating-point grid; the exponent field alone is the power of two below a number."""
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    exponent = tl.maximum(power, smallest).to(tl.int32, bitcast=True) - (mantissa << 23)  # of a step
    step, inverse = exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(_nearest_integer(y * inverse) * step, -top), top)


@triton.jit
def _search_scale(  # type: ignore[no-untyped-def]
    x, shares, out,
    width: tl.constexpr, low: tl.constexpr, high: tl.constexpr, offset: tl.constexpr, mantissa: tl.constexpr,
    smallest: tl.constexpr, candidates: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row: its largest magnitude, then the error under each candidate."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    x += row * width
    largest = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        numbers = tl.load(x + start + column, mask=start + column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(numbers))
    unit = tl.div_rn(tl.max(largest, 0), high)
    best, least = unit, float("inf")
    for candidate in range(candidates):
        scale = unit * tl.load(shares + candidate)
        inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
        squares = tl.zeros((block,), tl.float32)
        for start in range(0, width, block):
            numbers = tl.load(x + start + column, mask=start + column < width, other=0.0).to(tl.float32)
            y = numbers * inverse
            if mantissa is not None:
                level = _nearest_float(y, high, smallest, mantissa)
            else:
                level = tl.minimum(tl.maximum(_nearest_integer(y - offset), low - offset), high - offset) + offset
            error = level * scale - numbers
            if width % block != 0 and offset != 0:  # beyond the row's end 0 has an error, too
                error = tl.where(start + column < width, error, 0.0)
            squares += error * error
        total = tl.sum(squares, 0)
        better = total < least
        best = tl.where(better, scale, best)
        least = tl.where(better, total, least)
    tl.store(out + row, best)


@torch.library.custom_op("qpipe::search_scale", mutates_args=())
def _scale_operation(
    x: Tensor, shares: Tensor, low: float, high: float, offset: float, mantissa: int, smallest: float
) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    block = min(_NUMBERS, triton.next_power_of_2(width))
    while width % block and block > 128:  # a shorter last part would do the work of a whole one
        block //= 2
    launch(
        _search_scale, (out.numel(),),
        x, shares, out, width=width, low=low, high=high, offset=offset, mantissa=None if mantissa < 0 else mantissa,
        smallest=smallest, candidates=len(shares), block=block, num_warps=1,
    )  # fmt: skip
    return out


@_scale_operation.register_fake
def _(x: Tensor, shares: Tensor, low: float, high: float, offset: float, mantissa: int, smallest: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def search_scale(x: Tensor, shares: Tensor, grid: Grid, low: float, high: float) -> Tensor:
    """Scale of each row with the least squared error, the first of equals: (..., width) -> (..., 1), float32.

    Parameters
    ----------
    shares : candidates as shares of the absolute-maximum scale, float32
    low, high : the grid's outermost levels
    """
    if grid.family == "float":
        smallest, _ = exponent_range(grid.exponent, grid.mantissa)
        return _scale_operation(x, shares, low, high, 0.0, grid.mantissa, 2.0**smallest)
    return _scale_operation(x, shares, low, high, 0.5 if grid.family == "rise" else 0.0, -1, 0.0)


@triton.jit
def _nearest_e8(vectors, patterns, out, count, block: tl.constexpr, patterns_count: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each shift and magnitude pattern the best signs' score; then the code of the best of all.

    A thread has all eight coordinates of its vectors, each a variable, and sums them without asking others.
    """
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = row < count
    vectors += row * 8
    numbers = (
        tl.load(vectors, mask=inside, other=0.0), tl.load(vectors + 1, mask=inside, other=0.0),
        tl.load(vectors + 2, mask=inside, other=0.0), tl.load(vectors + 3, mask=inside, other=0.0),
        tl.load(vectors + 4, mask=inside, other=0.0), tl.load(vectors + 5, mask=inside, other=0.0),
        tl.load(vectors + 6, mask=inside, other=0.0), tl.load(vectors + 7, mask=inside, other=0.0),
    )  # fmt: skip
    highest = tl.full((block,), float("-inf"), tl.float32)
    code = tl.zeros((block,), tl.int32)
    for shift in tl.static_range(2):
        offset = 0.25 - 0.5 * shift
        negatives, square = tl.zeros((block,), tl.int32), tl.zeros((block,), tl.float32)
        for k in tl.static_range(8):
            negatives += (numbers[k] < offset).to(tl.int32)
            square += (numbers[k] - offset) * (numbers[k] - offset)
        best = tl.full((block,), float("-inf"), tl.float32)
        pattern = tl.zeros((block,), tl.int32)
        for index in range(patterns_count):
            product, smallest = tl.zeros((block,), tl.float32), tl.full((block,), float("inf"), tl.float32)
            norm, total = 0.0, 0.0
            for k in tl.static_range(8):
                level = tl.load(patterns + index * 8 + k)
                part = tl.abs(numbers[k] - offset) * level
                product += part
                smallest = tl.minimum(smallest, part)
                norm += level * level
                total += level
            # Flipping the sign of coordinate k adds 2 p_k, an odd number, to the sum: it repairs the parity.
            odd = (negatives + tl.cast(total, tl.int32)) & 1
            score = 2 * (product - tl.where(odd == 1, 2 * smallest, 0.0)) - norm
            pattern = tl.where(score > best, index, pattern)
            best = tl.maximum(best, score)
        flip, levels_sum = tl.zeros((block,), tl.int32), tl.zeros((block,), tl.float32)
        smallest = tl.full((block,), float("inf"), tl.float32)
        for k in tl.static_range(8):
            levels = tl.load(patterns + pattern * 8 + k)
            part = tl.abs(numbers[k] - offset) * levels
            flip = tl.where(part < smallest, k, flip)
            smallest = tl.minimum(smallest, part)
            levels_sum += levels
        odd = (negatives + tl.cast(levels_sum, tl.int32)) & 1
        found = pattern + 32768 * shift
        for k in tl.static_range(7):
            sign = (numbers[k] < offset).to(tl.int32) ^ tl.where(flip == k, odd, 0)
            found += sign << (8 + k)
        score = best - square
        code = tl.where(score > highest, found, code)
        highest = tl.maximum(score, highest)
    tl.store(out + row, code.to(tl.int64), mask=inside)


@torch.library.custom_op("qpipe::nearest_e8", mutates_args=())
def nearest_e8(vectors: Tensor, patterns: Tensor) -> Tensor:
    """Code of the nearest point of the E8 ball of each of `vectors`, (n, 8), float32 -> (n), int64.

    Parameters
    ----------
    patterns : magnitudes of the ball's points, (256, 8)
    """
    vectors, count = vectors.contiguous(), len(vectors)
    out = torch.empty(count, dtype=torch.int64, device=vectors.device)
    launch(
        _nearest_e8, (triton.cdiv(count, _VECTORS),),
        vectors, patterns, out, count, block=_VECTORS, patterns_count=len(patterns), num_warps=1,
    )  # fmt: skip
    return out


@nearest_e8.register_fake
def _(vectors: Tensor, patterns: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0], dtype=torch.int64)
