"""Sparsity: which numbers are kept, when, and which of the dropped ones still learn.

Selection is by magnitude and is computed afresh in every forward pass from the dense master weights, so a dropped
weight can come back. Weight decay and the optimizer's moments keep acting on dropped weights: they are ordinary
parameters whose gradient may be zero.
"""

import math

import torch
from torch import Tensor

from qpipe.compress.scales import root_mean_square
from qpipe.formats import Mask


def sparsity_at(mask: Mask, fraction: float) -> float:
    """Share of zeros after `fraction` of training: s (1 - (1 - p)^3) on the cubic ramp, p rising in equal steps."""
    if mask.schedule == "constant":
        return mask.share
    ramp = min(max((fraction - mask.start) / (mask.end - mask.start), 0.0), 1.0)
    stepped = math.floor(ramp * mask.updates + 1e-9) / mask.updates
    return mask.share * (1 - (1 - stepped) ** 3)


def select(x: Tensor, mask: Mask, kept_share: Tensor | None = None) -> Tensor:
    """Keep mask (bool, shape of `x`) over a whole tensor.

    An n:m pattern keeps the n units of largest norm of every m consecutive ones; equal norms prefer the first. An
    unstructured mask keeps the round(kept_share * count) largest magnitudes, and all that tie with the smallest of
    them. On a ramp towards n:m the pattern's own choice ranks first (2309.08520, appendix).
    """
    magnitude = x.abs()
    if mask.n is None:
        return magnitude >= threshold(magnitude.flatten(), 1 - mask.share if kept_share is None else kept_share)
    pattern = _pattern(magnitude, mask)
    if kept_share is None:
        return pattern
    score = torch.where(pattern, magnitude + magnitude.amax() + 1, magnitude)
    return score >= threshold(score.flatten(), kept_share)


def select_per_token(x: Tensor, mask: Mask) -> Tensor:
    """Keep mask of activations: top-k of each token, or n:m along the input dimension."""
    if mask.n is not None:
        return _pattern(x.abs(), mask)
    magnitude = x.abs()
    return magnitude >= threshold(magnitude, 1 - mask.share)


def threshold(magnitude: Tensor, kept_share: float | Tensor) -> Tensor:
    """Smallest kept magnitude over the last dimension (kept as size 1); infinite when nothing is kept."""
    count = magnitude.shape[-1]
    if magnitude.is_cuda and magnitude.numel() == count and magnitude.dtype == torch.float32:
        return _kth_largest(magnitude, kept_share)
    if isinstance(kept_share, Tensor):
        index = count - (kept_share * count).round().long()
        ordered = torch.cat(
            [magnitude.sort(dim=-1).values, magnitude.new_full((*magnitude.shape[:-1], 1), math.inf)], -1
        )
        return ordered.index_select(-1, index.reshape(1))
    kept = round(kept_share * count)
    if kept == 0:
        return magnitude.new_full((*magnitude.shape[:-1], 1), math.inf)
    return magnitude.kthvalue(count - kept + 1, dim=-1, keepdim=True).values


_DIGITS = ((20, 2048), (10, 1024), (0, 1024))
"""Shift and range of the three digits that a non-negative float's 31 bits are read in, the highest first."""


def _kth_largest(magnitude: Tensor, kept_share: float | Tensor) -> Tensor:
    """`threshold` of one long vector on a GPU: three histograms in place of a sort.

    Non-negative floats are ordered as their bits are. The histogram of the highest digit says which digit the number
    sought has, and how many of those that share it are larger; then the same for the next digit among those.
    """
    count = magnitude.numel()
    if isinstance(kept_share, Tensor):
        wanted = (kept_share * count).round().long()
    else:
        wanted = torch.full((), round(kept_share * count), device=magnitude.device)
    bits = magnitude.flatten().view(torch.int32)
    found, remaining = torch.zeros((), dtype=torch.int32, device=magnitude.device), wanted
    for shift, size in _DIGITS:
        digit = (bits >> shift) - found * size  # of numbers that differ in a higher digit: outside the range
        at_least = torch.histc(digit, bins=size, min=0, max=size - 1).flip(0).cumsum(0)
        place = (at_least < remaining).sum()
        before = at_least.gather(0, (place - 1).clamp_min(0).reshape(1))  # indexing would make the host wait
        larger = torch.where(place > 0, before[0], 0)
        found, remaining = (found * size + (size - 1 - place)).int(), remaining - larger
    value = found.view(torch.float32)
    return torch.where(wanted > 0, value, math.inf).reshape((1,) * magnitude.ndim)


def _pattern(magnitude: Tensor, mask: Mask) -> Tensor:
    """The n of every m units of largest L2 norm."""
    assert mask.n is not None
    assert mask.m is not None
    units = magnitude.unflatten(-1, (-1, mask.m, mask.block))
    norm = units.square().sum(-1) if mask.block > 1 else units.squeeze(-1)
    keep = _first_by_rank(norm, mask.n) if norm.is_cuda else _first_by_sort(norm, mask.n)
    return keep.unsqueeze(-1).expand_as(units).reshape(magnitude.shape)


def _first_by_sort(norm: Tensor, count: int) -> Tensor:
    order = norm.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(norm, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _first_by_rank(norm: Tensor, count: int) -> Tensor:
    """The same by counting, for each unit, those before it: all pairs of few units, which a GPU does in one pass."""
    one, other = norm.unsqueeze(-1), norm.unsqueeze(-2)
    place = torch.arange(norm.shape[-1], device=norm.device)
    ahead = (other > one) | ((other == one) & (place < place.unsqueeze(-1)))
    return ahead.sum(-1) < count


def gradient_mask(x: Tensor, keep: Tensor, mask: Mask) -> Tensor | None:
    """Which numbers of the dense `x` receive gradient (2506.01863, section 5.2 and appendix F); None for all.

    With T_k the smallest kept magnitude and T_p = RMS ppf(0.5 + p):
    `rms` |x| > T_p; `banded` (RBBM) outside [min(T_p, T_k), max(T_p, T_k)]; `banded-area` outside [T_a, T_k], where the
    band holds the share a of the area between 0 and T_k: a = 0 lets every weight learn, a = 1 only the kept ones (the
    paper's formula; its prose has the two ends exchanged).
    """
    if mask.backward == "dense":
        return None
    if mask.backward in ("forward", "trust"):
        return keep
    assert mask.band is not None
    magnitude = x.abs()
    rms = root_mean_square(x.reshape(1, -1))
    lowest_kept = torch.where(keep, magnitude, math.inf).amin()
    if mask.backward == "banded-area":
        area = torch.special.ndtr(lowest_kept / rms.clamp_min(1e-30)) - 0.5
        inner = rms * torch.special.ndtri(0.5 + (1 - mask.band) * area)
        return (magnitude < inner) | keep
    by_rms = rms * torch.special.ndtri(torch.full_like(rms, 0.5 + mask.band))
    if mask.backward == "rms":
        return magnitude > by_rms
    return (magnitude < torch.minimum(by_rms, lowest_kept)) | (magnitude > torch.maximum(by_rms, lowest_kept))


def join_gates(by_estimator: Tensor | None, keep: Tensor, by_mask: Tensor | None) -> Tensor:
    """Join two gradient gates (None: all pass): kept numbers obey both, pruned ones only the mask's backward rule."""
    by_mask = torch.ones_like(keep) if by_mask is None else by_mask.reshape(keep.shape)
    if by_estimator is None:
        return by_mask
    return torch.where(keep, by_estimator & by_mask, by_mask)
