"""Where searches start: the linear parameters are eliminated, only exponents are gridded.

For given alpha, beta and given parameters of the law's own parts, the loss is linear in A (one coefficient per
representation when eff is free), B and E. On residuals relative to the observed loss, which approximate log
residuals, these follow from one small non-negative least-squares problem per pair of exponents (variable projection,
Golub & Pereyra 1973). A grid over (alpha, beta) then covers what usual grids cover in five dimensions.
"""

import itertools

import numpy as np

from qpipe.laws.model import Model
from qpipe.laws.parameters import Array
from qpipe.laws.solve import Problem

ALPHAS = np.geomspace(0.02, 1.6, 16)
BETAS = np.geomspace(0.02, 1.6, 16)
MAX_COMBINATIONS = 48
"""Most combinations of starts of the law's own parameters; more are thinned evenly."""
FEWEST = 8
"""With held exponents the grid shrinks to a point; this many starts around it still show agreement."""
BASE = ("A", "alpha", "B", "beta", "E")


def grid_starts(problem: Problem, weights: Array) -> Array:
    """Return starts (S, P), internal scale, within bounds; held parameters have their held values.

    Parameters
    ----------
    problem
        The fit.
    weights
        Row weights (R,) of the sample that the starts are for.
    """
    model = problem.model
    own = _own_combinations(model)
    starts = [_starts_for(model, problem.loss, _base_weights(model, weights), point) for point in own]
    theta = np.concatenate(starts)
    if model.law.has_gamma:
        theta = _apply_gamma(model, theta)
    if len(theta) < FEWEST:
        noise = np.random.default_rng(0).normal(0.0, 0.2, (FEWEST, theta.shape[1]))
        theta = np.concatenate([theta, theta[np.arange(FEWEST) % len(theta)] + noise])
    held = [(i, p.to_internal(p.fixed)) for i, p in enumerate(model.parameters) if p.fixed is not None]
    for position, value in held:
        theta[:, position] = value
    return np.clip(theta, model.lower, model.upper)


def _own_combinations(model: Model) -> list[dict[str, float]]:
    """Return combinations of start values of the parameters beside the base and the grouped family."""
    own = [p for p in model.parameters[: model.shared] if p.name not in BASE]
    product = list(itertools.product(*((p.fixed,) if p.fixed is not None else p.starts for p in own)))
    keep = np.unique(np.linspace(0, len(product) - 1, min(len(product), MAX_COMBINATIONS)).astype(int))
    return [dict(zip((p.name for p in own), product[i], strict=True)) for i in keep]


def _base_weights(model: Model, weights: Array) -> Array:
    """Return the weights of dense rows alone where the law adds a penalty to a dense law."""
    dense = model.design.labels["representation"] == "dense"
    return weights * dense if model.law.penalty and (weights * dense > 0).sum() >= 5 else weights


def _starts_for(model: Model, loss: Array, weights: Array, own: dict[str, float]) -> Array:
    """Return one start (rows) for every pair of exponents, at one combination of the law's own parameters."""
    exponents = {name: model.parameters[model.index[name]].fixed for name in ("alpha", "beta")}
    alphas = ALPHAS if exponents["alpha"] is None else np.array([exponents["alpha"]])
    betas = BETAS if exponents["beta"] is None else np.array([exponents["beta"]])
    root = np.sqrt(weights) / loss
    template = _template(model, own)
    theta = np.tile(template, (alphas.size, betas.size, 1))
    for i, alpha in enumerate(alphas):
        theta[i, :, model.index["alpha"]] = np.log(alpha)
        theta[i, :, model.index["beta"]] = np.log(betas)
        _eliminate(model, theta[i], loss, root)
    return theta.reshape(-1, len(model.parameters))


def _template(model: Model, own: dict[str, float]) -> Array:
    """Return a vector (P,) with the law's own parameters set; coefficients start in geometric-mean units."""
    template = np.zeros(len(model.parameters))
    for position, parameter in enumerate(model.parameters):
        value = own.get(parameter.name, parameter.fixed if parameter.fixed is not None else parameter.starts[0])
        template[position] = parameter.to_internal(value)
    offsets = {"n": model.design.log_n.mean() - model.unit_n, "d": model.design.log_d.mean() - model.unit_d}
    for position, parameter in enumerate(model.parameters):
        if parameter.fixed is None and parameter.name not in BASE:
            for exponent, axis, sign in parameter.shifts:
                if exponent not in BASE:
                    template[position] += sign * np.exp(template[model.index[exponent]]) * offsets[axis]
    return template


def _eliminate(model: Model, theta: Array, loss: Array, root: Array) -> None:
    """Set A, B, E and the grouped family in `theta` (J, P), whose rows share alpha and differ in beta."""
    base = {name: model.index[name] for name in BASE}
    theta[:, base["A"]] = theta[:, base["B"]] = 0.0
    if model.law.grouped == "eff":
        theta[:, model.shared :] = 0.0
    size, data = model.unit_terms(theta)
    size, data = size[0] * root, data * root
    free = model.law.grouped == "eff" and any(p.fixed is None for p in model.parameters[model.shared :])
    groups = model.members + 1 if free else np.zeros(loss.size, dtype=np.int64)
    linear = _Projection(size, groups)
    b, e = _non_negative_pair(linear, data, root, loss * root)
    rest = loss * root - b[:, None] * data - e[:, None] * root
    coefficients = np.maximum(linear.coefficients(rest), 1e-6 * loss.min())
    theta[:, base["A"]] = np.log(coefficients[:, 0])
    theta[:, base["B"]] = np.log(np.maximum(b, 1e-6 * loss.min()))
    theta[:, base["E"]] = e
    if free:
        alpha = np.exp(theta[:, base["alpha"]])[:, None]
        reference = coefficients[:, :1]
        theta[:, model.shared :] = (np.log(reference) - np.log(coefficients[:, 1:])) / alpha


class _Projection:
    """Least squares on one column whose coefficient differs by group."""

    def __init__(self, column: Array, groups: np.ndarray) -> None:
        self.column, self.groups, self.count = column, groups, int(groups.max()) + 1
        self.norm = np.maximum(np.bincount(groups, column * column, self.count), 1e-300)

    def coefficients(self, vectors: Array) -> Array:
        """Return the coefficient of every group (J, G) for vectors (J, R)."""
        products = vectors * self.column
        sums = np.stack([np.bincount(self.groups, row, self.count) for row in products])
        return sums / self.norm

    def remove(self, vectors: Array) -> Array:
        """Return vectors (J, R) less their projection."""
        return vectors - self.coefficients(vectors)[:, self.groups] * self.column


def _non_negative_pair(linear: _Projection, data: Array, ones: Array, target: Array) -> tuple[Array, Array]:
    """Return B (J,) and E (J,) >= 0 that minimise the squares of the target's remainder."""
    x, (one, goal) = linear.remove(data), linear.remove(np.stack([ones, target]))
    xx, xo, xy = (x * x).sum(1), x @ one, x @ goal
    oo, oy = one @ one, one @ goal
    determinant = np.maximum(xx * oo - xo**2, 1e-14 * xx * oo + 1e-300)
    b, e = (oo * xy - xo * oy) / determinant, (xx * oy - xo * xy) / determinant
    alone_b, alone_e = np.maximum(xy / np.maximum(xx, 1e-300), 0), np.full_like(b, max(oy / max(oo, 1e-300), 0))
    b_wins = alone_b * xy > alone_e * oy
    inside = (b >= 0) & (e >= 0)
    return np.where(inside, b, np.where(b_wins, alone_b, 0)), np.where(inside, e, np.where(b_wins, 0, alone_e))


def _apply_gamma(model: Model, theta: Array) -> Array:
    """Turn starts of the law with gamma = 1 into starts at their gamma that agree with them near the centre."""
    result = theta.copy()
    index = model.index
    gamma = np.exp(theta[:, index["gamma"]])
    offset_n, offset_d = model.design.log_n.mean() - model.unit_n, model.design.log_d.mean() - model.unit_d
    size = np.exp(theta[:, index["A"]] - np.exp(theta[:, index["alpha"]]) * offset_n)
    data = np.exp(theta[:, index["B"]] - np.exp(theta[:, index["beta"]]) * offset_d)
    core = (size + data) ** (1 / gamma)
    # near the centre d core^gamma = gamma core^(gamma-1) d core: keep both terms' shares and both local slopes
    result[:, index["alpha"]] -= np.log(gamma)
    result[:, index["beta"]] -= np.log(gamma)
    share = size / (size + data)
    result[:, index["A"]] = np.log(core * share) + np.exp(result[:, index["alpha"]]) * offset_n
    result[:, index["B"]] = np.log(core * (1 - share)) + np.exp(result[:, index["beta"]]) * offset_d
    return result
