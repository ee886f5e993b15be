"""Levenberg-Marquardt for thousands of small robust fits at once, on plain numpy.

Every search (a start, a bootstrap resample, a point of a profile) is one row of the batch. One iteration evaluates
the law for all unfinished searches, in blocks that fit the processor's cache, and solves their damped normal equations
together. Three things make it fast and robust:

- The grouped family (one eff per representation) is eliminated: its block of the normal equations is diagonal, so a
  Schur complement leaves a system of the size of the shared parameters, whatever the number of representations.
- Huber's objective is handled by iteratively reweighted curvature. With a small threshold (1e-3 on log loss) nearly
  all residuals lie in its linear part, where plain reweighting overestimates curvature and crawls; the weight of those
  residuals in the curvature (never in the gradient) is therefore another damped quantity, lowered while steps succeed.
- Bounds are an active set: a parameter at its bound with the gradient pointing outward is frozen for that step.

Resamples are weights on rows, never copies of rows.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qpipe.laws.model import Model
from qpipe.laws.parameters import Array

BLOCK_CELLS = 1 << 16
"""Numbers per block of an array of the Jacobian's size: about half a megabyte."""
STATE_CELLS = 1 << 24
"""Numbers of normal equations held at a time: bounds the memory of a batch at a few hundred megabytes."""

CREEP, PATIENCE = 1e-8, 6
"""A search also ends when that many accepted steps in a row each lower the objective by less than this share."""

ObjectiveName = Literal["log-huber", "log-l2", "huber", "l2"]


@dataclass(frozen=True)
class Objective:
    """Sum over rows of weight * rho(residual), residual = log(predicted / observed) or predicted - observed.

    rho(r) = r^2/2 up to `delta`, then delta (|r| - delta/2); infinite delta is least squares.
    """

    name: ObjectiveName = "log-huber"
    delta: float = 1e-3

    @property
    def logarithmic(self) -> bool:
        """Whether residuals are of log loss (dimensionless) instead of loss (nats/token)."""
        return self.name.startswith("log")

    @property
    def threshold(self) -> float:
        """Huber's delta, infinite for least squares."""
        return self.delta if self.name.endswith("huber") else float("inf")

    def cost(self, residual: Array) -> Array:
        """Return rho(residual), elementwise."""
        size = np.abs(residual)
        inside = np.minimum(size, self.threshold)
        return inside * (size - 0.5 * inside)

    def influence(self, residual: Array) -> Array:
        """Return rho'(residual), elementwise."""
        return np.clip(residual, -self.threshold, self.threshold)


@dataclass
class Problem:
    """What is minimised: a model on observed losses, row weights, held parameters and priors."""

    model: Model
    loss: Array
    """Observed losses (R,), nats/token."""
    weights: Array
    """Row weights (W, R); every search names one of the W sets."""
    objective: Objective
    prior_mean: Array
    """Centres (P,) on the internal scale (geometric-mean units)."""
    prior_precision: Array
    """Precisions (P,) in units of the objective; 0 for no prior."""

    def residual(self, prediction: Array) -> Array:
        """Return residuals (S, R)."""
        if self.objective.logarithmic:
            return np.log(prediction / self.loss)
        return prediction - self.loss

    def values(self, theta: Array, weight_index: np.ndarray) -> Array:
        """Return the objective (S,) of internal parameters (S, P), in blocks."""
        result = np.empty(theta.shape[0])
        for block in _blocks(np.arange(theta.shape[0]), self.loss.size):
            with np.errstate(all="ignore"):
                cost = self.objective.cost(self.residual(self.model.predict(theta[block])))
                total = np.einsum("sr,sr->s", cost, self.weights[weight_index[block]])
            total += 0.5 * ((theta[block] - self.prior_mean) ** 2 @ self.prior_precision)
            result[block] = np.where(np.isfinite(total), total, np.inf)
        return result


@dataclass
class Solution:
    """Where each search ended: parameters (S, P), objective (S,), whether it converged (S,), iterations used."""

    theta: Array
    value: Array
    converged: np.ndarray
    iterations: int

    def joined(self, other: "Solution") -> "Solution":
        """Return these searches and others of the same problem."""
        return Solution(
            np.concatenate([self.theta, other.theta]),
            np.concatenate([self.value, other.value]),
            np.concatenate([self.converged, other.converged]),
            max(self.iterations, other.iterations),
        )


@dataclass
class _State:
    """Normal equations of every search at its current point."""

    theta: Array
    value: Array
    gradient: Array
    shared: Array
    cross: Array
    groups: Array
    damping: Array
    tail: Array


def _blocks(active: np.ndarray, row_cells: int) -> list[np.ndarray]:
    size = max(1, BLOCK_CELLS // max(row_cells, 1))
    return [active[i : i + size] for i in range(0, active.size, size)]


class _Searches:
    """A batch of searches under way."""

    def __init__(self, problem: Problem, theta: Array, weight_index: np.ndarray) -> None:
        self.problem, self.index = problem, weight_index
        model = problem.model
        self.p, self.g = model.shared, model.groups
        count = theta.shape[0]
        self.held = np.array([p.fixed is not None for p in model.parameters])
        self.order, self.first = _group_order(model.members, self.g)
        self.state = _State(
            theta.copy(),
            np.full(count, np.inf),
            np.zeros_like(theta),
            np.zeros((count, self.p, self.p)),
            np.zeros((count, self.p, self.g)),
            np.zeros((count, self.g)),
            np.full(count, 1e-3),
            np.ones(count),
        )
        self.settled = np.zeros(count, dtype=bool)
        self.quiet = np.zeros(count, dtype=np.int64)
        self.converged = np.zeros(count, dtype=bool)

    def evaluate(self, rows: np.ndarray, theta: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Return value, gradient and the three blocks of the curvature for searches `rows` at `theta`."""
        problem = self.problem
        with np.errstate(all="ignore"):
            prediction, jacobian, grouped = problem.model.linearise(theta)
            residual = problem.residual(prediction)
            if problem.objective.logarithmic:
                inverse = 1.0 / prediction
                jacobian *= inverse[:, None, :]
                grouped = None if grouped is None else grouped * inverse
            weights = problem.weights[self.index[rows]]
            value = np.einsum("sr,sr->s", problem.objective.cost(residual), weights)
            slope = problem.objective.influence(residual) * weights
            curvature = self._curvature(residual, weights, self.state.tail[rows])
            weighted = jacobian * curvature[:, None, :]
            shared = weighted @ jacobian.transpose(0, 2, 1)
            gradient = np.zeros_like(theta)
            gradient[:, : self.p] = (jacobian @ slope[:, :, None])[:, :, 0]
            cross, groups = np.zeros((rows.size, self.p, self.g)), np.zeros((rows.size, self.g))
            if grouped is not None and self.g:
                by = grouped[:, self.order]
                gradient[:, self.p :] = np.add.reduceat(by * slope[:, self.order], self.first, axis=1)
                groups = np.add.reduceat(by * by * curvature[:, self.order], self.first, axis=1)
                cross = np.add.reduceat(weighted[:, :, self.order] * by[:, None, :], self.first, axis=2)
        return self._with_priors(theta, value, gradient, shared, cross, groups)

    def _curvature(self, residual: Array, weights: Array, tail: Array) -> Array:
        """Return rho'(r)/r, with residuals beyond the threshold scaled down by the search's `tail`."""
        threshold = self.problem.objective.threshold
        if not np.isfinite(threshold):
            return weights
        size = np.abs(residual)
        outside = size > threshold
        return np.where(outside, tail[:, None] * threshold / np.maximum(size, threshold), 1.0) * weights

    def _with_priors(
        self, theta: Array, value: Array, gradient: Array, shared: Array, cross: Array, groups: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        precision = self.problem.prior_precision
        if precision.any():
            offset = theta - self.problem.prior_mean
            value = value + 0.5 * (offset**2 @ precision)
            gradient += offset * precision
            shared[:, np.arange(self.p), np.arange(self.p)] += precision[: self.p]
            groups = groups + precision[self.p :]
        return np.where(np.isfinite(value), value, np.inf), gradient, shared, cross, groups

    def start(self) -> None:
        """Evaluate all searches at their starts."""
        for rows in self.blocks(np.arange(self.settled.size)):
            self._store(rows, self.state.theta[rows], *self.evaluate(rows, self.state.theta[rows]))
        self.settled |= ~np.isfinite(self.state.value)

    def blocks(self, active: np.ndarray) -> list[np.ndarray]:
        """Return `active` in pieces whose Jacobians fit the cache."""
        return _blocks(active, self.problem.loss.size * (self.p + 2))

    def _store(self, rows: np.ndarray, theta: Array, value: Array, gradient: Array, *blocks: Array) -> None:
        state = self.state
        state.theta[rows], state.value[rows], state.gradient[rows] = theta, value, gradient
        state.shared[rows], state.cross[rows], state.groups[rows] = blocks

    def iterate(self, tolerance: float) -> None:
        """Take one damped step in every unfinished search."""
        for rows in self.blocks(np.flatnonzero(~self.settled)):
            step, decrement = self._step(rows)
            small = decrement <= tolerance * (self.state.value[rows] + 1e-30)
            trial = np.clip(self.state.theta[rows] + step, self.problem.model.lower, self.problem.model.upper)
            found = self.evaluate(rows, trial)
            better = found[0] < self.state.value[rows]
            gain = np.where(better, self.state.value[rows] - found[0], 0.0)
            creeping = better & (gain <= max(CREEP, tolerance) * self.state.value[rows])
            self.quiet[rows] = np.where(creeping, self.quiet[rows] + 1, np.where(better, 0, self.quiet[rows]))
            self._store(rows[better], trial[better], *(array[better] for array in found))
            self._adapt(rows, better, small)

    def _adapt(self, rows: np.ndarray, better: np.ndarray, small: np.ndarray) -> None:
        state = self.state
        state.damping[rows] = np.where(better, np.maximum(state.damping[rows] * 0.2, 1e-12), state.damping[rows] * 8.0)
        state.tail[rows] = np.where(better, np.maximum(state.tail[rows] * 0.5, 0.02), 1.0)
        done = (small & (better | (state.damping[rows] > 1e-2))) | (self.quiet[rows] >= PATIENCE)
        stuck = state.damping[rows] > 1e12
        self.converged[rows] |= done
        self.settled[rows] |= done | stuck

    def _step(self, rows: np.ndarray) -> tuple[Array, Array]:
        """Return damped steps (S, P) and the decrease (S,) that the undamped quadratic promises at least."""
        state, p = self.state, self.p
        theta, gradient = state.theta[rows], state.gradient[rows]
        model = self.problem.model
        frozen = self.held | ((theta <= model.lower) & (gradient > 0)) | ((theta >= model.upper) & (gradient < 0))
        gradient = np.where(frozen, 0.0, gradient)
        free, free_groups = ~frozen[:, :p], ~frozen[:, p:]
        shared = state.shared[rows] * (free[:, :, None] & free[:, None, :])
        cross = state.cross[rows] * (free[:, :, None] & free_groups[:, None, :])
        damp = 1.0 + state.damping[rows, None]
        diagonal = np.einsum("sii->si", shared)
        diagonal[...] = np.where(free, diagonal * damp + 1e-300, 1.0)
        groups = np.where(free_groups, state.groups[rows] * damp + 1e-300, 1.0)
        step = np.empty_like(theta)
        eliminated = cross / groups[:, None, :]
        reduced = shared - eliminated @ cross.transpose(0, 2, 1)
        right = -gradient[:, :p] + (eliminated @ gradient[:, p:, None])[:, :, 0]
        step[:, :p] = _solve(reduced, right)
        step[:, p:] = -(gradient[:, p:] + (cross.transpose(0, 2, 1) @ step[:, :p, None])[:, :, 0]) / groups
        np.clip(step, -model.longest_step, model.longest_step, out=step)
        return step, -0.5 * np.einsum("sp,sp->s", gradient, step)


def _solve(matrix: Array, right: Array) -> Array:
    """Solve (S, p, p) systems after scaling rows and columns to unit diagonals; singular ones get no step."""
    scale = 1.0 / np.sqrt(np.maximum(np.einsum("sii->si", matrix), 1e-300))
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    scaled[:, np.arange(matrix.shape[1]), np.arange(matrix.shape[1])] += 1e-14
    usable = np.isfinite(scaled).all(axis=(1, 2)) & np.isfinite(right).all(axis=1)
    scaled[~usable] = np.eye(matrix.shape[1])
    solved = np.linalg.solve(scaled, np.where(usable[:, None], right * scale, 0.0)[:, :, None])[:, :, 0]
    return solved * scale


def _group_order(members: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that belong to a group, sorted by group, and where each group begins."""
    order = np.argsort(members, kind="stable")
    order = order[members[order] >= 0]
    return order, np.searchsorted(members[order], np.arange(groups))


def minimise(
    problem: Problem,
    theta: Array,
    weight_index: np.ndarray | None = None,
    iterations: int = 300,
    tolerance: float = 1e-9,
) -> Solution:
    """Minimise from many starts at once.

    Parameters
    ----------
    problem
        What to minimise.
    theta
        Starts (S, P) on the internal scale, within the bounds.
    weight_index
        For each start the row of `problem.weights` that it uses, shape (S,); all use row 0 when left out.
    iterations
        Most steps per search.
    tolerance
        A search ends when its quadratic model promises a decrease below this share of the objective.
    """
    index = np.zeros(theta.shape[0], dtype=np.int64) if weight_index is None else weight_index
    cells = problem.model.shared * (problem.model.shared + problem.model.groups + 4)
    size = max(1, STATE_CELLS // cells)
    solution = Solution(theta[:0], np.empty(0), np.empty(0, dtype=bool), 0)
    for i in range(0, theta.shape[0], size):
        searches = _Searches(problem, theta[i : i + size], index[i : i + size])
        searches.start()
        used = 0
        while used < iterations and not searches.settled.all():
            searches.iterate(tolerance)
            used += 1
        solution = solution.joined(Solution(searches.state.theta, searches.state.value, searches.converged, used))
    return solution
