"""Depths under a budget, against brute force, exact programs and closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from qpipe.errors import QpipeError
from qpipe.ptq.allocation import (
    allocate,
    allocate_exactly,
    closed_form_depths,
    partition_gain,
    spread_evenly,
)

DEPTHS = np.arange(9)


def random_problem(seed: int, groups: int, menu: int = 5, unit: int = 1):
    """Costs that fall along the menu but need not be convex, and whole rates that rise."""
    generator = np.random.default_rng(seed)
    costs = np.sort(generator.exponential(size=(groups, menu)), axis=1)[:, ::-1].copy()
    rates = np.cumsum(generator.integers(1, 6, (groups, menu)) * unit, axis=1)
    return costs, rates


def brute_force(costs, rates, budget):
    rows = np.arange(len(costs))
    found = [
        costs[rows, list(choice)].sum()
        for choice in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if rates[rows, list(choice)].sum() <= budget
    ]
    return min(found)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_exact_allocation_is_brute_force(seed, share):
    costs, rates = random_problem(seed, 4)
    low, high = rates[:, 0].sum(), rates[:, -1].sum()
    budget = int(low + share * (high - low))
    choice = allocate_exactly(costs, rates, budget)
    rows = np.arange(4)
    assert rates[rows, choice].sum() <= budget
    assert costs[rows, choice].sum() == pytest.approx(brute_force(costs, rates, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_exact_allocation_is_the_integer_program_of_scipy(seed):
    costs, rates = random_problem(seed, 40, menu=9, unit=64)
    budget = int(rates.sum(axis=0).mean())
    groups, menu = costs.shape
    one_each = LinearConstraint(np.kron(np.eye(groups), np.ones(menu)), 1, 1)
    within = LinearConstraint(rates.ravel()[None], -np.inf, budget)
    solved = milp(costs.ravel(), integrality=np.ones(costs.size), bounds=Bounds(0, 1), constraints=[one_each, within])
    choice = allocate_exactly(costs, rates, budget)
    assert costs[np.arange(groups), choice].sum() == pytest.approx(solved.fun, rel=1e-9)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_lagrangian_keeps_its_promises(seed, share):
    costs, rates = random_problem(seed, 5)
    low, high = rates[:, 0].sum(), rates[:, -1].sum()
    budget = int(low + share * (high - low))
    found = allocate(costs, rates.astype(float), budget)
    best = brute_force(costs, rates, budget)
    assert found.rate <= budget
    assert best <= found.cost + 1e-12
    assert found.cost <= best * (1 + found.gap) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_lagrangian_bound_is_the_linear_program(seed):
    costs, rates = random_problem(seed, 60, menu=6)
    budget = float(rates.sum(axis=0).mean())
    relaxed = linprog(
        costs.ravel(),
        A_ub=rates.ravel()[None],
        b_ub=[budget],
        A_eq=np.kron(np.eye(60), np.ones(6)),
        b_eq=np.ones(60),
        bounds=(0, 1),
    )
    found = allocate(costs, rates.astype(float), budget)
    assert found.cost / (1 + found.gap) == pytest.approx(relaxed.fun, rel=1e-7)


def test_the_whole_budget_is_spent():
    generator = np.random.default_rng(0)
    size, groups = 256, 40_000
    scores = 2.0 ** (2 * generator.normal(size=groups))
    rates = np.broadcast_to(size * DEPTHS + 16 * (DEPTHS > 0), (groups, 9)).astype(float)
    for bits in (0.3, 2.1, 2.5, 3.0, 3.51, 7.9):
        found = allocate(scores[:, None] * 4.0**-DEPTHS, rates, bits * size * groups)
        assert bits - 0.001 < found.rate / (size * groups) <= bits
        assert found.gap < 1e-3


def test_rounding_the_closed_form_is_the_lagrangian_of_its_model():
    """round(1/2 log2(score / lambda)) and the marginal rule for score 4^-B are one staircase, shifted in lambda."""
    generator = np.random.default_rng(1)
    scores = 2.0 ** (3 * generator.normal(size=2000))
    half_logs = 0.5 * np.log2(scores)
    for level in (-2.0, -1.1, 0.4):
        rounded = np.clip(np.round(half_logs - level), 0, 8)
        found = allocate(
            scores[:, None] * 4.0**-DEPTHS, np.broadcast_to(DEPTHS, (2000, 9)).astype(float), rounded.sum()
        )
        np.testing.assert_array_equal(found.choice, rounded)


@pytest.mark.parametrize("rate", [0.4, 2.1, 3.0, 7.5])
def test_closed_form_meets_its_rate_and_equal_slopes(rate):
    generator = np.random.default_rng(2)
    scores, sizes = 2.0 ** (4 * generator.normal(size=5000)), generator.choice([64.0, 128.0], 5000)
    depths = closed_form_depths(scores, sizes, rate)
    assert np.average(depths, weights=sizes) == pytest.approx(rate, abs=1e-9)
    inside = (depths > 0) & (depths < 8)
    slopes = np.log2(scores * 4.0**-depths)
    assert np.ptp(slopes[inside]) < 1e-9  # equal distortion per weight wherever the clamp is not active
    assert slopes[depths == 0].max(initial=-np.inf) <= slopes[inside].min()
    assert slopes[depths == 8].min(initial=np.inf) >= slopes[inside].max()


def test_equal_sensitivities_give_uniform_bits():
    rates = np.broadcast_to(512.0 * DEPTHS, (100, 9))
    found = allocate(np.broadcast_to(4.0**-DEPTHS, (100, 9)), rates, 3.0 * 512 * 100)
    assert set(found.choice) == {3}
    fractional = allocate(np.broadcast_to(4.0**-DEPTHS, (100, 9)), rates, 3.25 * 512 * 100)
    assert sorted(fractional.choice) == [3] * 75 + [4] * 25


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_partition_gain_is_never_negative(scores):
    assert partition_gain(np.array(scores), np.ones(len(scores))) >= -1e-9


def test_partition_gain_is_the_rate_saved():
    """Without clamps, gamma fewer bits reach the distortion of one depth for all (reverse water-filling)."""
    scores = 2.0 ** np.random.default_rng(3).normal(size=4000)
    sizes = np.ones(4000)
    gain = partition_gain(scores, sizes)
    depths = closed_form_depths(scores, sizes, 5.0 - gain, deepest=20)
    assert depths.min() > 0
    assert (scores * 4.0**-depths).sum() == pytest.approx(scores.sum() * 4.0**-5, rel=1e-9)
    assert partition_gain(np.full(7, 3.0), np.ones(7)) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 1000), st.floats(0, 8))
@settings(max_examples=60, deadline=None)
def test_even_spread_uses_two_neighbouring_depths_and_fits(seed, bits):
    sizes = np.random.default_rng(seed).choice([32.0, 64.0, 128.0], 300)
    rates = sizes[:, None] * DEPTHS
    choice = spread_evenly(rates, bits * sizes.sum())
    spent = rates[np.arange(300), choice].sum()
    assert spent <= bits * sizes.sum() + 1e-6
    assert bits * sizes.sum() - spent <= 128
    assert set(choice) <= {int(bits), int(bits) + 1}


def test_too_small_budgets_are_refused():
    costs, rates = random_problem(0, 3)
    with pytest.raises(QpipeError, match="does not even hold"):
        allocate(costs, rates.astype(float), float(rates[:, 0].sum() - 1))
    with pytest.raises(QpipeError, match="does not hold"):
        allocate_exactly(costs, rates, int(rates[:, 0].sum() - 1))
    with pytest.raises(QpipeError, match="does not hold"):
        spread_evenly(rates.astype(float), float(rates[:, 0].sum() - 1))
    with pytest.raises(QpipeError, match="too large"):
        allocate_exactly(np.zeros((100_000, 2)), np.tile([0, 1], (100_000, 1)), 100_000)
