"""Scale and offset of each group, its codes, and what each depth would cost it.

A group w is represented by m + s * level[code]. Seven scales around the one that is best for Gaussian numbers are
tried, then a pattern search moves scale and offset by steps that shrink fourfold, and keeps what lowers the error. With
23 trials this beats 33 scales and 33 offsets on a fixed grid (2409.02026) by 1 to 10 %; alternating least squares
between codes and (s, m) was tried instead and gets stuck up to 20 % above it. Scales and
offsets are rounded to float16, as the file keeps them, in every trial. Errors are plain squares: weighting them by
sensitivities inside a group was tried and made models worse, because estimates of single weights are noisy and errors
that are correlated add up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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
_APART = 1024.0
"""Distance of the borders of neighbouring depths where all are joined."""


@dataclass(frozen=True)
class Tables:
    """Code books of all depths, padded to one shape, on a device.

    Attributes
    ----------
    levels, borders
        Shapes (9, 256) and (9, 255) in units of the standard deviation; borders beyond a depth's own are infinite.
    joined, before
        Borders of all depths in one sorted row, those of depth B moved by B * 1024, float64, shape (502,); borders of
        lesser depths, shape (9,): numbers of any depths are looked up together, without a row of borders for each.
    best
        Multiplier of the standard deviation that is best for Gaussian numbers at each depth (9 numbers).
    """

    levels: Tensor
    borders: Tensor
    joined: Tensor
    before: Tensor
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
    depths = np.arange(MAX_DEPTH + 1)
    joined = np.concatenate([row[np.isfinite(row)].astype(np.float64) + _APART * d for d, row in enumerate(borders)])
    return Tables(
        torch.tensor(levels, device=device),
        torch.tensor(borders, device=device),
        torch.tensor(joined, device=device),
        torch.tensor(2**depths - 1 - depths, device=device),
        tuple(best),
    )


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
    for bits, part in _by_depth(depth, _groups_at_once(weights)):
        found = _fit_at_depth(_Sorted.of(weights[part]), bits, book, offset)
        fit.scale[part], fit.offset[part], fit.error[part] = found.scale, found.offset, found.error.float()
    return fit


def _by_depth(depth: Tensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each depth with groups that have it, at most so many together."""
    for bits in depth.unique().tolist():
        for part in torch.nonzero(depth == bits).squeeze(1).split(at_once):
            yield bits, part


def depth_costs(weights: Tensor, kind: Kind, offset: bool) -> Tensor:
    """Measure the squared error of every group at every depth, shape (groups, 9), not increasing in depth."""
    book = tables(kind, weights.device)
    rows = []
    for part in weights.split(_groups_at_once(weights)):
        groups = _Sorted.of(part)
        errors = [_fit_at_depth(groups, bits, book, offset).error for bits in range(MAX_DEPTH + 1)]
        rows.append(torch.stack(errors, dim=1))
    return torch.cat(rows).float().cummin(dim=1).values


def _groups_at_once(weights: Tensor) -> int:
    return max(1, ELEMENTS_AT_ONCE[weights.device.type] // (weights.shape[1] + 2**MAX_DEPTH))


@dataclass(frozen=True)
class _Sorted:
    """Groups sorted by size, with running sums: the error of any cells and levels follows from the cells' ends.

    With x_1 <= ... <= x_n, running sums s_i = x_1 + ... + x_i and a level v_k for the numbers i_k < i <= i_{k+1},

        sum_i (x_i - v_k)^2 = sum_i x_i^2 - sum_k v_k (2 (s_{i_{k+1}} - s_{i_k}) - v_k (i_{k+1} - i_k))

    so a trial costs a search per border instead of one per weight. Sums are float64: differences of large numbers.

    Attributes
    ----------
    values
        Shape (groups, size), float32.
    sums
        s_0 ... s_n, shape (groups, size + 1), float64.
    squares
        Shape (groups,), float64.
    """

    values: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> "_Sorted":
        """Sort groups (groups, size)."""
        if weights.device.type == "cpu":  # numpy's sort is vectorised and keeps no indices: a seventh of the time
            values = torch.from_numpy(np.sort(weights.contiguous().numpy(), axis=1))
        else:
            values = weights.sort(dim=1).values
        sums = torch.zeros(len(values), values.shape[1] + 1, dtype=torch.float64, device=values.device)
        torch.cumsum(values, dim=1, dtype=torch.float64, out=sums[:, 1:])
        return cls(values, sums, values.double().square_().sum(dim=1))

    def error(self, scale: Tensor, offset: Tensor, levels: Tensor, borders: Tensor) -> Tensor:
        """Return the squared error (groups,), float64, of levels (2^B,) between borders (2^B - 1,)."""
        groups, size = self.values.shape
        ends = torch.zeros(groups, len(levels) + 1, dtype=torch.int64, device=scale.device)
        ends[:, -1] = size
        edges = torch.addcmul(offset[:, None], scale[:, None], borders)
        ends[:, 1:-1] = torch.searchsorted(self.values, edges, right=True)
        value = torch.addcmul(offset[:, None], scale[:, None], levels).double()
        sums, counts = self.sums.gather(1, ends).diff(dim=1), ends.diff(dim=1)
        return (self.squares - (value * (2 * sums - value * counts)).sum(dim=1)).clamp_min_(0.0)


class _Candidate(NamedTuple):
    """Scale, offset and error of groups, each (groups,); the error in float64."""

    scale: Tensor
    offset: Tensor
    error: Tensor


def _fit_at_depth(groups: _Sorted, bits: int, book: Tables, offset: bool) -> _Candidate:
    """Return scale, offset and error of groups of one depth."""
    size = groups.values.shape[1]
    mean = groups.sums[:, -1] / size if offset else torch.zeros_like(groups.squares)
    deviation = (groups.squares / size - mean.square()).clamp_min_(0.0).sqrt_().float()
    mean = to_half(mean.float())
    best = _tried(groups, torch.zeros_like(mean), mean, 0, book)
    if bits == 0:
        return best
    best = best._replace(error=torch.full_like(best.error, torch.inf))
    for factor in _TRIED:
        best = _better(best, groups, deviation * (book.best[bits] * float(factor)), mean, bits, book)
    for step in _STEPS:
        for sign in (1, -1):
            best = _better(best, groups, best.scale * 2.0 ** (sign * step), best.offset, bits, book)
        if offset:
            for sign in (1, -1):
                best = _better(best, groups, best.scale, best.offset + sign * step * best.scale, bits, book)
    return best


def _better(old: _Candidate, groups: _Sorted, scale: Tensor, offset: Tensor, bits: int, book: Tables) -> _Candidate:
    """Return, group by group, the old scale and offset or the new ones, whichever have the smaller error."""
    new = _tried(groups, to_half(scale), to_half(offset), bits, book)
    won = new.error < old.error
    return _Candidate(*(torch.where(won, a, b) for a, b in zip(new, old, strict=True)))


def _tried(groups: _Sorted, scale: Tensor, offset: Tensor, bits: int, book: Tables) -> _Candidate:
    count = 2**bits
    error = groups.error(scale, offset, book.levels[bits, :count], book.borders[bits, : count - 1])
    return _Candidate(scale, offset, error)


def encode(weights: Tensor, fit: Fit, book: Tables) -> Tensor:
    """Return the codes of groups, shape (groups, size), uint8."""
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    for bits, part in _by_depth(fit.depth, _groups_at_once(weights)):
        y = standardise(weights[part], fit.scale[part, None], fit.offset[part, None])
        codes[part] = torch.searchsorted(book.borders[bits, : 2**bits - 1], y).to(torch.uint8)
    return codes


def decode(codes: Tensor, depth: Tensor, scale: Tensor, offset: Tensor, book: Tables) -> Tensor:
    """Return the values of codes (groups, size), float32; depth, scale and offset are (groups,)."""
    level = book.levels.flatten()[codes.int() + depth[:, None].int() * book.levels.shape[1]]
    return offset[:, None] + scale[:, None] * level


class Rounder:
    """Rounds one number of each of many groups at a time; what depends on the groups alone is prepared once.

    Parameters
    ----------
    depth, scale, offset
        Of the numbers' groups, shape (numbers,).
    book
        Code books.
    """

    def __init__(self, depth: Tensor, scale: Tensor, offset: Tensor, book: Tables) -> None:
        self.scale, self.offset, self.book = scale, offset, book
        self.inverse = torch.where(scale > 0, 1 / scale, 0.0)
        self.moved, self.before = _APART * depth.double(), book.before[depth]
        self.levels, self.row = book.levels.flatten(), depth * book.levels.shape[1]

    def codes(self, numbers: Tensor) -> Tensor:
        """Return the codes of numbers (numbers,), int64."""
        # float64 holds number and depth side by side to 1e-12; no border lies beyond 12 deviations.
        place = ((numbers - self.offset) * self.inverse).double().clamp_(-_APART / 4, _APART / 4)
        return torch.searchsorted(self.book.joined, place.add_(self.moved)).sub_(self.before)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes (numbers,) stand for."""
        return torch.addcmul(self.offset, self.scale, self.levels[codes + self.row])


def standardise(weights: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return (weights - offset) / scale, and 0 where the scale is 0."""
    return (weights - offset) * torch.where(scale > 0, 1 / scale, 0.0)


def to_half(x: Tensor) -> Tensor:
    """Round to float16 as the file does, saturating instead of overflowing."""
    return x.clamp(-65504, 65504).half().float()
