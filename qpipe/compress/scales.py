"""Scale rules: how a group of numbers finds the unit in which its grid is laid over it.

A group is the last dimension of the tensor that `grouped` returns; a scale has size 1 there. All rules treat an
all-zero group alike: its scale is 0 and everything in it is represented by exactly 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qpipe.compress.prepare import Prepared
from qpipe.compress.rounding import round_to_grid
from qpipe.compress.tables import constant
from qpipe.formats import parse_grid

if torch.cuda.is_available():
    from qpipe.compress import triton_search

_E4M3 = parse_grid("e4m3")
SEARCH_STEPS = 81
"""Candidates of the MSE search: 10 % to 110 % of the absolute-maximum scale, evenly spaced."""


def grouped(x: Tensor, group: str | int) -> Tensor:
    """View `x`, shape (..., width), with its groups along the last dimension."""
    if group == "row":
        return x
    return x.reshape(1, -1) if group == "tensor" else x.unflatten(-1, (-1, int(group)))


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 data: scales are never found in 16 bits."""
    return torch.promote_types(x.dtype, torch.float32)


def root_mean_square(x: Tensor) -> Tensor:
    """RMS over the last dimension, kept as size 1, in float32 or better."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)) / math.sqrt(x.shape[-1])


def absolute_maximum(x: Tensor) -> Tensor:
    """Largest magnitude over the last dimension, kept as size 1, in float32 or better."""
    return x.abs().amax(dim=-1, keepdim=True).to(_wide(x))


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean magnitude over the last dimension, kept as size 1, in float32 or better."""
    return x.abs().mean(dim=-1, keepdim=True, dtype=_wide(x))


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def _gaussian(x: Tensor, prepared: Prepared) -> Tensor:
    return root_mean_square(x) * prepared.multiplier


def _absmax(x: Tensor, prepared: Prepared) -> Tensor:
    return absolute_maximum(x) / prepared.high


def _absmean(x: Tensor, prepared: Prepared) -> Tensor:
    """Outermost level at the mean magnitude: BitNet's ternary rule, and the best 1-bit level."""
    return mean_magnitude(x) / prepared.high


def _search(x: Tensor, prepared: Prepared) -> Tensor:
    """Scale with the least squared error among `SEARCH_STEPS` shares of the absolute-maximum scale."""
    assert prepared.grid is not None
    if x.is_cuda and triton_search.searches_scale(x, prepared.grid):
        shares = _shares(x.new_empty(0, dtype=torch.float32))
        return triton_search.search_scale(x, shares, prepared.grid, prepared.low, prepared.high)
    largest = absolute_maximum(x) / prepared.high
    if torch.compiler.is_compiling():  # it would write the loop out
        return _search_at_once(x, largest, prepared)
    best, best_error = largest, torch.full_like(largest, math.inf)
    for share in _shares(largest):
        scale = largest * share
        value = round_to_grid(x * reciprocal(scale), prepared.grid) * scale
        error = (value - x).square().mean(dim=-1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def _shares(like: Tensor) -> Tensor:
    """Candidates as shares of the absolute-maximum scale, kept on the device: a captured step can copy none to it."""
    shares = [0.1 + step / (SEARCH_STEPS - 1) for step in range(SEARCH_STEPS)]
    return constant("shares", lambda: torch.tensor(shares, dtype=torch.float64), like.device, like.dtype)


def _search_at_once(x: Tensor, largest: Tensor, prepared: Prepared) -> Tensor:
    """The same scale from all candidates side by side: a compiler makes one loop over them, and stores no array."""
    assert prepared.grid is not None
    scales = largest * _shares(largest)  # (..., candidates)
    wide, numbers = scales.unsqueeze(-1), x.unsqueeze(-2)
    value = round_to_grid(numbers * reciprocal(wide), prepared.grid) * wide
    error = (value - numbers).square().mean(dim=-1)
    # The least error's first place; an argmin may choose any.
    place = torch.arange(SEARCH_STEPS, device=x.device)
    first = torch.where(error == error.amin(-1, keepdim=True), place, SEARCH_STEPS - 1).amin(-1, keepdim=True)
    return scales.gather(-1, first)


_RULES: dict[str, Callable[[Tensor, Prepared], Tensor]] = {
    "gaussian": _gaussian,
    "absmax": _absmax,
    "absmean": _absmean,
    "mse": _search,
}


def find_scale(x: Tensor, prepared: Prepared) -> Tensor:
    """Scale of each group of `x`, shape (..., width of a group) -> (..., 1), as it is stored."""
    scale = exact_scale(x, prepared)
    if prepared.part.scale_format == "float16":
        return scale.clamp(max=65504.0).to(torch.float16).to(scale.dtype)
    if prepared.part.scale_format == "e8m0":
        return _power_of_two(scale, x, prepared)
    if prepared.part.scale_format == "e4m3":
        stored, tensor_scale = two_level(scale)
        return stored * tensor_scale
    return scale


def exact_scale(x: Tensor, prepared: Prepared) -> Tensor:
    """Scale of each group before it is rounded to its storage format."""
    assert prepared.part.scale is not None
    return _RULES[prepared.part.scale](x, prepared)


def two_level(scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4: group scales in E4M3, and one factor per tensor that maps the largest of them to 448, E4M3's top."""
    tensor_scale = scale.amax() / 448.0
    return round_to_grid(scale * reciprocal(tensor_scale), _E4M3), tensor_scale


def _power_of_two(scale: Tensor, x: Tensor, prepared: Prepared) -> Tensor:
    """E8M0 scale of a block.

    With scale absmax the rule of the OCP MX specification: 2^(floor(log2 max|x|) - emax), emax the exponent of the
    grid's top level, so that the largest numbers may saturate. With other rules the nearest power of two in log2.
    """
    if prepared.part.scale == "absmax":
        _, exponent = torch.frexp(absolute_maximum(x))  # max = m 2^exponent with m in [0.5, 1)
        exponent = exponent - 1 - math.floor(math.log2(prepared.high))
    else:
        exponent = torch.where(scale > 0, scale.log2(), 0.0).round().to(torch.int32)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent.clamp(-127, 127)), 0.0)
