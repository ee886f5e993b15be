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


def _pattern(magnitude: Tensor, mask: Mask) -> Tensor:
    """The n of every m units of largest L2 norm."""
    assert mask.n is not None
    assert mask.m is not None
    units = magnitude.unflatten(-1, (-1, mask.m, mask.block))
    norm = units.square().sum(-1) if mask.block > 1 else units.squeeze(-1)
    order = norm.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(norm, dtype=torch.bool).scatter_(-1, order[..., : mask.n], True)
    return keep.unsqueeze(-1).expand_as(units).reshape(magnitude.shape)


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
    by_rms = rms * torch.special.ndtri(rms.new_tensor(0.5 + mask.band))
    if mask.backward == "rms":
        return magnitude > by_rms
    return (magnitude < torch.minimum(by_rms, lowest_kept)) | (magnitude > torch.maximum(by_rms, lowest_kept))


def join_gates(by_estimator: Tensor | None, keep: Tensor, by_mask: Tensor | None) -> Tensor:
    """Join two gradient gates (None: all pass): kept numbers obey both, pruned ones only the mask's backward rule."""
    by_mask = torch.ones_like(keep) if by_mask is None else by_mask.reshape(keep.shape)
    if by_estimator is None:
        return by_mask
    return torch.where(keep, by_estimator & by_mask, by_mask)
