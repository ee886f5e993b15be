"""Sums of signs: x ~ v_1 s_1 + ... + v_k s_k with s_i in {-1, 1} and scales v_i found by least squares (2001.02786).

Greedy: v_1 = mean|x|, s_1 = sign(x), and so on with what is left. Optimal 2 bits: v_2 = mean ||x| - v_1|, and v_1 is a
fixed point, half the sum of the means of |x| below and above it; of all fixed points the one with least error.
Zero counts as positive.
"""

import torch
from torch import Tensor

from qpipe.compress.scales import mean_magnitude
from qpipe.formats import Grid


def binary_scales(x: Tensor, grid: Grid) -> Tensor:
    """Scales of each group, shape (..., width) -> (..., bits), largest first."""
    if grid.optimal:
        return _optimal_two(x)
    scales, rest = [], x
    for _ in range(round(grid.bits)):
        scales.append(mean_magnitude(rest))
        rest = rest - scales[-1] * _sign(rest)
    return torch.cat(scales, dim=-1)


def binary_codes(x: Tensor, scales: Tensor) -> Tensor:
    """Code of each number: bit i is set where sign i is positive; shape of `x`, int64."""
    codes, rest = torch.zeros_like(x, dtype=torch.int64), x
    for i, scale in enumerate(scales.split(1, dim=-1)):
        sign = _sign(rest)
        codes = codes | ((sign > 0).long() << i)
        rest = rest - scale * sign
    return codes


def binary_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Numbers that the codes stand for."""
    value = torch.zeros_like(codes, dtype=scales.dtype)
    for i, scale in enumerate(scales.split(1, dim=-1)):
        value = value + scale * (((codes >> i) & 1) * 2 - 1)
    return value


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _optimal_two(x: Tensor) -> Tensor:
    """Best (v_1, v_2): with |x| sorted, every cut into a low and a high part gives a candidate v_1 in closed form."""
    ordered = x.abs().sort(dim=-1).values
    count = x.shape[-1]
    if count == 1:
        return torch.cat([ordered, torch.zeros_like(ordered)], dim=-1)
    below = ordered.cumsum(-1)
    number = torch.arange(1, count, device=x.device, dtype=ordered.dtype)
    low = below[..., :-1] / number
    high = (below[..., -1:] - below[..., :-1]) / (count - number)
    # With levels v_1 -+ v_2 on the two parts and v_2 their common half distance, the error is the variance left over:
    # both parts share one v_2 = (number (v_1 - low) + (count - number) (high - v_1)) / count.
    first = (low + high) / 2
    second = (high - low) / 2
    explained = first**2 + second**2 + 2 * first * second * (1 - 2 * number / count)
    product = (below[..., -1:] - below[..., :-1]) * (first + second) + below[..., :-1] * (first - second)
    error = explained * count - 2 * product
    best = error.argmin(dim=-1, keepdim=True)
    return torch.cat([first.gather(-1, best), second.gather(-1, best)], dim=-1)
