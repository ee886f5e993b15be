"""Which group gets how many bits: least total distortion under a budget of bits.

Every group n offers a menu of depths b; depth b costs r[n, b] stored bits and causes distortion c[n, b]. Wanted is the
choice with the least sum of c under sum of r <= budget: a multiple-choice knapsack. Its Lagrangian

    min_b  c[n, b] + lambda r[n, b]        for every group on its own

walks, as lambda falls, along the lower convex hull of each group's points (r, c). The total rate as a function of
lambda is therefore a staircase whose steps are the hulls' segments in the order of their slopes: bisection on lambda
finds the step that crosses the budget. What is left below that step is handed out by marginal repair: the single moves
that still fit, best saving per bit first, hull points or not. The Lagrangian's own value bounds from below what any
choice can reach, so how far from optimal a result can be is known (`Allocation.gap`).

Costs come from a measured table, from exact measurement of every group, or from a model (`closed_form_depths`): the
allocator is the same for all, so that an ablation changes one thing at a time.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qpipe.errors import QpipeError

Array = NDArray[np.float64]
Depths = NDArray[np.int64]


class Allocation(NamedTuple):
    """A choice of depths."""

    choice: Depths
    """index into the menu, shape (groups,)"""
    rate: float
    """stored bits of the choice"""
    cost: float
    """total distortion of the choice"""
    price: float
    """lambda: distortion that one more bit would save"""
    gap: float
    """the cost is at most this share above the best possible one"""


class Allocator:
    """Chooses one menu entry per group, at any budget; the hulls are found once.

    Parameters
    ----------
    costs
        Distortion of each entry, shape (groups, menu), finite, not negative.
    rates
        Stored bits of each entry, same shape, increasing along the menu.
    """

    def __init__(self, costs: Array, rates: Array) -> None:
        self.costs, self.rates = costs, rates
        self.slopes = hull_slopes(costs, rates)
        self.prices = np.unique(self.slopes[np.isfinite(self.slopes) & (self.slopes > 0)])
        self._rows = np.arange(len(costs))

    def choose(self, budget: float) -> Allocation:
        """Return the choice for a budget of bits in total (error: less than the cheapest entries take)."""
        least = float(self.rates[:, 0].sum())
        if budget < least:
            raise QpipeError(
                f"a budget of {budget:,.0f} bits does not even hold the smallest choice of {least:,.0f} bits; "
                "ask for more bits, or for larger groups, which need fewer scales"
            )
        price = self._bisect(budget)
        # At the price itself several segments may end; the walk takes none of them, so that it always fits.
        bound = self._dual_value(price, budget)
        choice = _repair(_walk(self.slopes, price), self.costs, self.rates, budget)
        cost = float(self.costs[self._rows, choice].sum())
        gap = 0.0 if cost <= bound else (cost - bound) / bound if bound > 0 else math.inf
        return Allocation(choice, self._rate(choice), cost, price, gap)

    def _rate(self, choice: Depths) -> float:
        return float(self.rates[self._rows, choice].sum())

    def _bisect(self, budget: float) -> float:
        """Return the lowest price at which the walk stays within the budget (0: everything fits)."""
        if self._rate(_walk(self.slopes, 0.0)) <= budget:
            return 0.0
        low, high = -1, len(self.prices) - 1  # above the largest slope only first entries remain, and they fit
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._rate(_walk(self.slopes, float(self.prices[middle]))) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return float(self.prices[high])

    def _dual_value(self, price: float, budget: float) -> float:
        """Return the Lagrangian's minimum, a lower bound on the cost of every choice within the budget."""
        if price == 0.0:
            return float(self.costs.min(axis=1).sum())
        return float((self.costs + price * self.rates).min(axis=1).sum() - price * budget)


def allocate(costs: Array, rates: Array, budget: float) -> Allocation:
    """Choose one menu entry per group for one budget; see `Allocator`."""
    return Allocator(costs, rates).choose(budget)


def hull_slopes(costs: Array, rates: Array) -> Array:
    """Return, for each entry, the price below which the walk along the hull has reached it or gone beyond.

    Shape (groups, menu), not increasing along the menu; infinite for the first entry, 0 where no further entry saves
    anything. Entry b is chosen at the prices between slopes[b + 1] and slopes[b]; entries off the hull share the slope
    of the next one on it, so that the interval is empty.
    """
    groups, menu = costs.shape
    slopes = np.zeros((groups, menu))
    slopes[:, 0] = np.inf
    here = np.zeros(groups, np.int64)
    rows = np.arange(groups)
    for _ in range(menu - 1):
        saved = costs[rows, here][:, None] - costs
        extra = rates - rates[rows, here][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(np.arange(menu) > here[:, None], saved / extra, -np.inf)
        # Of equal slopes the farthest: reversed, argmax finds the last one.
        target = menu - 1 - np.argmax(slope[:, ::-1], axis=1)
        best = slope[rows, target]
        move = best > 0
        between = (np.arange(menu) > here[:, None]) & (np.arange(menu) <= target[:, None]) & move[:, None]
        slopes = np.where(between, best[:, None], slopes)
        here = np.where(move, target, here)
        if not move.any():
            break
    return slopes


def _walk(slopes: Array, price: float) -> Depths:
    """Return the entry each hull has reached at a price (segments of exactly this price not taken)."""
    return np.asarray((slopes > price).sum(axis=1) - 1, dtype=np.int64)


def _repair(choice: Depths, costs: Array, rates: Array, budget: float) -> Depths:
    """Spend what is left of the budget on single moves, best saving per bit first, until none fits."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    while True:
        left = budget - float(rates[rows, choice].sum())
        moves = _best_moves(choice, costs, rates, left)
        if not len(moves[0]):
            return choice
        order = np.argsort(-moves[2], kind="stable")
        group, target = moves[0][order], moves[1][order]
        extra = rates[group, target] - rates[group, choice[group]]
        taken = np.cumsum(extra) <= left
        # The first always fits; the rest of the prefix are other groups, so their moves stay valid.
        stop = len(taken) if taken.all() else int(np.argmin(taken))
        choice[group[:stop]] = target[:stop]


def _best_moves(choice: Depths, costs: Array, rates: Array, left: float) -> tuple[Depths, Depths, Array]:
    """Return groups with a saving move that fits alone, its target, and its saving per bit."""
    rows = np.arange(len(choice))
    saved = costs[rows, choice][:, None] - costs
    extra = rates - rates[rows, choice][:, None]
    fits = (extra > 0) & (extra <= left) & (saved > 0)
    worth = np.where(fits, saved / np.where(fits, extra, 1.0), 0.0)
    target = worth.argmax(axis=1)
    best = worth[rows, target]
    found = np.flatnonzero(best > 0)
    return found, target[found], best[found]


def allocate_exactly(costs: Array, rates: NDArray[np.int64], budget: int) -> Depths:
    """Return the optimal choice by dynamic programming over whole bits, shape (groups,).

    Time and memory grow as groups x budget / unit, where unit is the greatest common divisor of all rates: for small
    models and for per-layer menus only.

    Raises
    ------
    QpipeError
        The budget is too small, or the table would not fit in 2^31 entries.
    """
    base = rates.min(axis=1)
    extra = rates - base[:, None]
    left = int(budget - base.sum())
    if left < 0:
        raise QpipeError(f"a budget of {budget:,} bits does not hold the smallest choice of {base.sum():,} bits")
    unit = int(np.gcd.reduce(extra.ravel())) or 1
    extra, left = extra // unit, min(left // unit, int(extra.max(axis=1).sum()) // unit)
    if len(costs) * (left + 1) > 2**31:
        raise QpipeError(
            f"the exact allocation of {len(costs):,} groups over {left:,} units of rate is too large; "
            "use the table allocation, whose distance from the optimum is reported"
        )
    return _knapsack(costs, extra, left)


def _knapsack(costs: Array, extra: NDArray[np.int64], left: int) -> Depths:
    best = np.zeros(left + 1)
    picked = np.empty((len(costs), left + 1), np.int8)
    for group in range(len(costs)):
        totals = np.full((costs.shape[1], left + 1), np.inf)
        for entry, step in enumerate(extra[group].tolist()):
            if step <= left:
                totals[entry, step:] = best[: left + 1 - step] + costs[group, entry]
        picked[group] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    choice, place = np.zeros(len(costs), np.int64), left
    for group in reversed(range(len(costs))):
        choice[group] = picked[group, place]
        place -= int(extra[group, choice[group]])
    return choice


def spread_evenly(rates: Array, budget: float) -> Depths:
    """Return uniform depths: every group the deepest entry that all can have, some one deeper, evenly spread.

    What a quantizer without an allocator does when the average is no whole number. Ignores distortion.
    """
    totals = rates.sum(axis=0)
    if budget < totals[0]:
        raise QpipeError(f"a budget of {budget:,.0f} bits does not hold the smallest choice of {totals[0]:,.0f} bits")
    floor = int(np.flatnonzero(totals <= budget)[-1])
    choice = np.full(len(rates), floor, np.int64)
    if floor == rates.shape[1] - 1:
        return choice
    extra = rates[:, floor + 1] - rates[:, floor]
    share = (budget - totals[floor]) / extra.sum()
    due = np.floor(np.cumsum(extra) * share / extra.mean() + 1e-9)
    promoted = np.diff(due, prepend=0.0) > 0
    # Groups of unequal size make the count a little wrong either way: drop from the end, then fill from the front.
    over = float(extra[promoted].sum() - (budget - totals[floor]))
    if over > 0:
        last_first = np.flatnonzero(promoted)[::-1]
        promoted[last_first[: int(np.searchsorted(np.cumsum(extra[last_first]), over)) + 1]] = False
    others = np.flatnonzero(~promoted)
    left = budget - totals[floor] - extra[promoted].sum()
    promoted[others[np.cumsum(extra[others]) <= left]] = True
    choice[promoted] += 1
    return choice


def closed_form_depths(scores: Array, sizes: Array, rate: float, deepest: int = 8) -> Array:
    """Return real-valued depths clamp(1/2 log2(score / lambda), 0, deepest) of mean `rate` bits per weight.

    Reverse water-filling: the optimum for the model distortion score * 4^-B (2409.02026, eq. 6).

    Parameters
    ----------
    scores
        Squared sensitivity x variance of each group (any unit), shape (groups,).
    sizes
        Weights per group (count), shape (groups,).
    rate
        Wanted mean depth (bits per weight), 0 to `deepest`.
    """
    with np.errstate(divide="ignore"):
        half_logs = 0.5 * np.log2(scores)
    low, high = float(half_logs[np.isfinite(half_logs)].min()) - deepest - 1, float(half_logs.max()) + 1
    for _ in range(200):
        level = (low + high) / 2
        depths = np.clip(half_logs - level, 0, deepest)
        low, high = (level, high) if np.average(depths, weights=sizes) > rate else (low, level)
    return depths


def partition_gain(scores: Array, sizes: Array) -> float:
    """Return the bits per weight that groups of their own depths save against one depth for all.

    gamma = 1/2 [log2 mean(score) - mean log2(score)], weighted by sizes: not negative by Jensen's inequality, 0 for
    equal scores (2409.02026, eq. 9). Groups of score 0 need no bits and are left out.
    """
    used = scores > 0
    weights = sizes[used]
    mean = np.average(scores[used], weights=weights)
    return float(0.5 * (np.log2(mean) - np.average(np.log2(scores[used]), weights=weights)))
