"""Scale and offset of each group, its codes, and what each depth would cost it.

A group w is represented by m + s * level[code]. Given codes, the best s and m are a weighted least-squares line through
(level, w); given s and m, the best codes are the nearest levels. A few scales around the one that is best for Gaussian
numbers are tried first, then the two steps alternate. Every step is kept only where it lowers the error, so the result
is at least as good as the best scale tried. Errors are weighted by squared sensitivities: what counts is the damage at
the output, not in the weights. Scales and offsets are rounded to float16, as the file keeps them, before codes are
chosen for the last time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qpipe.ptq.codebooks import MAX_DEPTH, Kind, code_book, searched_distortion

ELEMENTS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""Weights whose temporaries are held together."""
_TRIED = 2.0 ** np.array([-0.75, -0.375, 0.0, 0.375])
_ALTERNATIONS = 3


@dataclass(frozen=True)
class Tables:
    """Code books of all depths, padded to one shape, on a device.

    Attributes
    ----------
    levels, borders
        Shapes (9, 256) and (9, 255) in units of the standard deviation; borders beyond a depth's own are infinite.
    best
        Multiplier of the standard deviation that is best for Gaussian numbers at each depth (9 numbers).
    """

    levels: Tensor
    borders: Tensor
    best: tuple[float, ...]


@lru_cache
def tables(kind: Kind, device: torch.device) -> Tables:
    """Return the padded code books of a family."""
    levels = np.zeros((MAX_DEPTH + 1, 2**MAX_DEPTH), np.float32)
    borders = np.full((MAX_DEPTH + 1, 2**MAX_DEPTH - 1), np.inf, np.float32)
    best = []
    for depth in range(MAX_DEPTH + 1):
        book = code_book(kind, depth)
        levels[depth, : 2**depth], borders[depth, : 2**depth - 1] = book.levels, book.borders
        best.append(searched_distortion(book, "gauss")[1])
    return Tables(torch.tensor(levels, device=device), torch.tensor(borders, device=device), tuple(best))


@dataclass
class Fit:
    """Quantized groups.

    Attributes
    ----------
    depth
        Bits per weight, shape (groups,), int64.
    scale, offset
        Rounded to float16, held as float32, shape (groups,). Depth 0 has scale 0.
    error
        Weighted squared error, shape (groups,), float32.
    """

    depth: Tensor
    scale: Tensor
    offset: Tensor
    error: Tensor


def fit_groups(weights: Tensor, importance: Tensor, depth: Tensor, kind: Kind, offset: bool) -> Fit:
    """Find scale and offset of groups of given depths.

    Parameters
    ----------
    weights, importance
        Groups and the weight of each error in them, both (groups, size), float32, importance not negative.
    depth
        Bits per weight, 0 to 8, shape (groups,), int64.
    kind, offset
        Family of code books; whether groups have an offset.
    """
    book = tables(kind, weights.device)
    fit = Fit(depth, *(torch.zeros(len(depth), device=weights.device) for _ in range(3)))
    at_once = max(1, ELEMENTS_AT_ONCE[weights.device.type] // weights.shape[1])
    for bits in depth.unique().tolist():
        members = torch.nonzero(depth == bits).squeeze(1)
        for part in members.split(at_once):
            found = _fit_at_depth(weights[part], importance[part], bits, book, offset)
            fit.scale[part], fit.offset[part], fit.error[part] = found
    return fit


def depth_costs(weights: Tensor, importance: Tensor, kind: Kind, offset: bool) -> Tensor:
    """Measure the weighted error of every group at every depth, shape (groups, 9), not increasing in depth."""
    columns = [
        fit_groups(weights, importance, torch.full((len(weights),), bits, device=weights.device), kind, offset).error
        for bits in range(MAX_DEPTH + 1)
    ]
    return torch.stack(columns, dim=1).cummin(dim=1).values


def _fit_at_depth(w: Tensor, g: Tensor, bits: int, book: Tables, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, offset and error of groups of one depth."""
    g = torch.where(g.sum(dim=1, keepdim=True) > 0, g, 1.0)  # insensitive groups: plain squared error
    total = g.sum(dim=1)
    mean = (g * w).sum(dim=1) / total if offset else torch.zeros_like(total)
    deviation = ((g * (w - mean[:, None]).square()).sum(dim=1) / total).sqrt()
    best = _evaluate(w, g, torch.zeros_like(mean), mean, 0, book)
    if bits == 0:
        return best[:3]
    for factor in _TRIED:
        best = _better(best, _evaluate(w, g, deviation * (book.best[bits] * factor), mean, bits, book))
    for _ in range(_ALTERNATIONS):
        best = _better(best, _evaluate(w, g, *_regress(w, g, best[3], best, offset), bits, book))
    return best[:3]


_Candidate = tuple[Tensor, Tensor, Tensor, Tensor]
"""scale, offset, error (groups,) and levels (groups, size)"""


def _evaluate(w: Tensor, g: Tensor, scale: Tensor, offset: Tensor, bits: int, book: Tables) -> _Candidate:
    scale, offset = to_half(scale), to_half(offset)
    codes = torch.searchsorted(book.borders[bits, : 2**bits - 1], standardise(w, scale[:, None], offset[:, None]))
    level = book.levels[bits][codes]
    error = (g * (w - offset[:, None] - scale[:, None] * level).square()).sum(dim=1)
    return scale, offset, error, level


def _better(old: _Candidate, new: _Candidate) -> _Candidate:
    won = new[2] < old[2]
    scale, offset, error = (torch.where(won, n, o) for n, o in zip(new[:3], old[:3], strict=True))
    return scale, offset, error, torch.where(won[:, None], new[3], old[3])


def _regress(w: Tensor, g: Tensor, level: Tensor, old: _Candidate, offset: bool) -> tuple[Tensor, Tensor]:
    """Weighted least squares of w on level; where levels do not vary the old line stays."""
    gl = g * level
    sum_g, sum_l, sum_ll = g.sum(dim=1), gl.sum(dim=1), (gl * level).sum(dim=1)
    sum_w, sum_lw = (g * w).sum(dim=1), (gl * w).sum(dim=1)
    if not offset:
        usable = sum_ll > 0
        return torch.where(usable, sum_lw / sum_ll, old[0]), old[1]
    spread = sum_g * sum_ll - sum_l.square()
    usable = spread > 1e-6 * sum_g * sum_ll
    scale = torch.where(usable, (sum_g * sum_lw - sum_l * sum_w) / spread, old[0])
    return scale, torch.where(usable, (sum_w - scale * sum_l) / sum_g, old[1])


def encode(weights: Tensor, fit: Fit, book: Tables) -> Tensor:
    """Return the codes of groups, shape (groups, size), uint8."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    at_once = max(1, ELEMENTS_AT_ONCE[weights.device.type] // (weights.shape[1] + 256))
    for part in torch.arange(len(weights), device=weights.device).split(at_once):
        y = standardise(weights[part], fit.scale[part, None], fit.offset[part, None])
        codes[part] = torch.searchsorted(book.borders[fit.depth[part]], y).to(torch.uint8)
    return codes


def decode(codes: Tensor, depth: Tensor, scale: Tensor, offset: Tensor, book: Tables) -> Tensor:
    """Return the values of codes (groups, size), float32; depth, scale and offset are (groups,)."""
    level = book.levels.flatten()[codes.int() + depth[:, None].int() * book.levels.shape[1]]
    return offset[:, None] + scale[:, None] * level


def standardise(weights: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return (weights - offset) / scale, and 0 where the scale is 0."""
    return torch.where(scale > 0, (weights - offset) / torch.where(scale > 0, scale, 1.0), 0.0)


def to_half(x: Tensor) -> Tensor:
    """Round to float16 as the file does, saturating instead of overflowing."""
    return x.clamp(-65504, 65504).half().float()
