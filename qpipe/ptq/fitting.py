"""Scale and offset of each group, its codes, and what each depth would cost it.

A group w is represented by m + s * level[code]. Seven scales around the one that is best for Gaussian numbers are
tried, then a pattern search moves scale and offset by steps that shrink fourfold, and keeps what lowers the error. With
23 trials this beats 33 scales and 33 offsets on a fixed grid (2409.02026) by 1 to 10 %; alternating least squares
between codes and (s, m) was tried instead and gets stuck up to 20 % above it. Scales and
offsets are rounded to float16, as the file keeps them, in every trial. Errors are plain squares: weighting them by
sensitivities inside a group was tried and made models worse, because estimates of single weights are noisy and errors
that are correlated add up.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qpipe.ptq.codebooks import MAX_DEPTH, code_book, searched_distortion
from qpipe.ptq_methods import Kind

ELEMENTS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""Weights whose temporaries are held together."""
_TRIED = 2.0 ** np.linspace(-0.75, 0.75, 7)
_STEPS = (0.2, 0.1, 0.05, 0.025)
"""Steps of the pattern search: of log2 s, and of m in units of s."""


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
        Squared error, shape (groups,), float32.
    """

    depth: Tensor
    scale: Tensor
    offset: Tensor
    error: Tensor


def fit_groups(weights: Tensor, depth: Tensor, kind: Kind, offset: bool) -> Fit:
    """Find scale and offset of groups of given depths.

    Parameters
    ----------
    weights
        Groups, shape (groups, size), float32.
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
            found = _fit_at_depth(weights[part], bits, book, offset)
            fit.scale[part], fit.offset[part], fit.error[part] = found
    return fit


def depth_costs(weights: Tensor, kind: Kind, offset: bool) -> Tensor:
    """Measure the squared error of every group at every depth, shape (groups, 9), not increasing in depth."""
    columns = [
        fit_groups(weights, torch.full((len(weights),), bits, device=weights.device), kind, offset).error
        for bits in range(MAX_DEPTH + 1)
    ]
    return torch.stack(columns, dim=1).cummin(dim=1).values


_Candidate = tuple[Tensor, Tensor, Tensor]
"""scale, offset and error (groups,)"""


def _fit_at_depth(w: Tensor, bits: int, book: Tables, offset: bool) -> _Candidate:
    """Return scale, offset and error of groups of one depth."""
    mean = w.mean(dim=1) if offset else torch.zeros(len(w), device=w.device)
    if bits == 0:
        nothing = torch.zeros_like(mean), to_half(mean)
        return *nothing, _error(w, *nothing, bits, book)
    deviation = (w - mean[:, None]).square().mean(dim=1).sqrt()
    best = torch.zeros_like(mean), mean, torch.full_like(mean, torch.inf)
    for factor in _TRIED:
        best = _better(best, w, deviation * (book.best[bits] * float(factor)), mean, bits, book)
    for step in _STEPS:
        for sign in (1, -1):
            best = _better(best, w, best[0] * 2.0 ** (sign * step), best[1], bits, book)
        if offset:
            for sign in (1, -1):
                best = _better(best, w, best[0], best[1] + sign * step * best[0], bits, book)
    return best


def _better(old: _Candidate, w: Tensor, scale: Tensor, offset: Tensor, bits: int, book: Tables) -> _Candidate:
    """Return, group by group, the old scale and offset or the new ones, whichever have the smaller error."""
    scale, offset = to_half(scale), to_half(offset)
    error = _error(w, scale, offset, bits, book)
    won = error < old[2]
    return torch.where(won, scale, old[0]), torch.where(won, offset, old[1]), torch.where(won, error, old[2])


def _error(w: Tensor, scale: Tensor, offset: Tensor, bits: int, book: Tables) -> Tensor:
    """Return the squared error of each group."""
    codes = torch.searchsorted(book.borders[bits, : 2**bits - 1], standardise(w, scale[:, None], offset[:, None]))
    value = book.levels[bits][codes].mul_(scale[:, None]).add_(offset[:, None])
    return value.sub_(w).square_().sum(dim=1)


def encode(weights: Tensor, fit: Fit, book: Tables) -> Tensor:
    """Return the codes of groups, shape (groups, size), uint8."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    borders = book.borders[:, : 2 ** int(fit.depth.max())].contiguous()
    at_once = max(1, ELEMENTS_AT_ONCE[weights.device.type] // (weights.shape[1] + 256))
    for part in torch.arange(len(weights), device=weights.device).split(at_once):
        y = standardise(weights[part], fit.scale[part, None], fit.offset[part, None])
        codes[part] = torch.searchsorted(borders[fit.depth[part]], y).to(torch.uint8)
    return codes


def decode(codes: Tensor, depth: Tensor, scale: Tensor, offset: Tensor, book: Tables) -> Tensor:
    """Return the values of codes (groups, size), float32; depth, scale and offset are (groups,)."""
    level = book.levels.flatten()[codes.int() + depth[:, None].int() * book.levels.shape[1]]
    return offset[:, None] + scale[:, None] * level


def standardise(weights: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return (weights - offset) / scale, and 0 where the scale is 0."""
    return (weights - offset) * torch.where(scale > 0, 1 / scale, 0.0)


def to_half(x: Tensor) -> Tensor:
    """Round to float16 as the file does, saturating instead of overflowing."""
    return x.clamp(-65504, 65504).half().float()
