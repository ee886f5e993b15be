"""A law bound to the rows of a loss table: predictions and Jacobians for many parameter vectors at once.

Parameter vectors are rows of an array (S, P) on the internal scale. The first `shared` columns are ordinary
parameters; the last `groups` columns are one family with a member per representation (eff, or k of the QAT gap).
A row of the table depends on at most one member of it, so the Jacobian is stored as a dense part (S, shared, R) and
one more number per row (S, R): cost and memory grow with rows, not with rows times representations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qpipe.laws.parameters import Array, Parameter, internal_bounds
from qpipe.laws.parts import Design, Part, Term

LONGEST_STEP = 5.0
"""Largest change of a logarithm in one step of the solver."""


def base_parameters() -> list[Parameter]:
    """Return A, alpha, B, beta, E of the Chinchilla form (2203.15556 eq. 2)."""
    return [
        Parameter("A", "nats/token", "size coefficient", 1e-60, 1e60, shifts=(("alpha", "n", 1.0),)),
        Parameter("alpha", "1", "size exponent", 1e-3, 4.0),
        Parameter("B", "nats/token", "data coefficient", 1e-60, 1e60, shifts=(("beta", "d", 1.0),)),
        Parameter("beta", "1", "data exponent", 1e-3, 4.0),
        Parameter("E", "nats/token", "irreducible loss", 0.0, 1e6, transform="identity"),
    ]


@dataclass(frozen=True)
class Law:
    """A scaling law: formula, source, and the parts that fill its places (see `qpipe.laws.parts`)."""

    name: str
    formula: str
    source: str
    size: Part | None = None
    data: Part | None = None
    penalty: Part | None = None
    has_gamma: bool = False
    columns: tuple[str, ...] = ()
    """Loss-table columns that the law needs beside n, d, representation and loss."""
    optional: tuple[str, ...] = ()
    """Loss-table columns that the law uses when they are present."""
    grouped: str = ""
    """Family with one member per representation, solved by elimination."""
    dense_only: bool = False
    """Fitted to dense runs alone."""

    def parameters(self, design: Design) -> list[Parameter]:
        """Return all parameters that the rows call for, the grouped family last."""
        result = base_parameters()
        if self.has_gamma:
            result.append(Parameter("gamma", "1", "outer exponent", 0.02, 5.0, (1.0, 0.5, 0.25, 3.0)))
        for part in (self.size, self.data, self.penalty):
            result += part.parameters(design) if part else []
        return sorted(result, key=lambda p: bool(self.grouped) and p.family == self.grouped)


class _Values(Mapping[str, Array]):
    """Natural values (S, 1) by name, and `grouped`: logarithms (S, R) of the row's member of the grouped family."""

    def __init__(self, natural: Array, index: dict[str, int], grouped: Array | None) -> None:
        self._natural, self._index, self._grouped = natural, index, grouped

    def __getitem__(self, name: str) -> Array:
        if name == "grouped" and self._grouped is not None:
            return self._grouped
        position = self._index[name]
        return self._natural[:, position : position + 1]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class Model:
    """A law for given rows.

    Parameters
    ----------
    law, design
        The law, and rows in any order.
    parameters
        What `law.parameters(design)` returned, with parameters held or released.
    counts
        Measure N and D in counts, as a prior on a coefficient needs, instead of in geometric means.
    """

    def __init__(self, law: Law, design: Design, parameters: list[Parameter], counts: bool = False) -> None:
        self.law, self.design, self.parameters = law, design, parameters
        self.names = [p.name for p in parameters]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.groups = sum(p.family == law.grouped for p in parameters) if law.grouped else 0
        self.shared = len(parameters) - self.groups
        self.lower, self.upper = internal_bounds(parameters)
        self._logarithmic = np.array([p.transform == "log" for p in parameters[: self.shared]])
        self.longest_step = np.where([p.transform == "log" for p in parameters], LONGEST_STEP, np.inf)
        self.members = self._members()
        self.unit_n = 0.0 if counts else self._unit("n", design.log_n)
        self.unit_d = 0.0 if counts else self._unit("d", design.log_d)
        self._centred = Design(design.log_n - self.unit_n, design.log_d - self.unit_d, design.labels, design.numbers)

    def _members(self) -> np.ndarray:
        """Return the position (R,) of each row's member within the grouped family, -1 for none."""
        positions = {name: i for i, name in enumerate(self.names[self.shared :])}
        labels = self.design.labels["representation"]
        return np.array([positions.get(f"{self.law.grouped}[{label}]", -1) for label in labels], dtype=np.int64)

    def _unit(self, axis: str, logarithm: Array) -> float:
        """Return log of the unit of N or D: the geometric mean, or 1 when a held coefficient refers to counts."""
        held = [p for p in self.parameters if p.fixed is not None and any(s[1] == axis for s in p.shifts)]
        return 0.0 if held else float(logarithm.mean())

    def shift(self, internal: Array, to_counts: bool) -> Array:
        """Convert coefficients (..., P) between geometric-mean units and counts."""
        result = internal.copy()
        for position, parameter in enumerate(self.parameters):
            for exponent, axis, sign in parameter.shifts:
                unit = self.unit_n if axis == "n" else self.unit_d
                step = sign * np.exp(internal[..., self.index[exponent]]) * unit
                result[..., position] += step if to_counts else -step
        return result

    def _values(self, theta: Array) -> _Values:
        natural = theta[:, : self.shared].copy()
        natural[:, self._logarithmic] = np.exp(natural[:, self._logarithmic])
        if not self.groups:
            none = np.zeros((theta.shape[0], self.members.size)) if self.law.grouped else None
            return _Values(natural, self.index, none)
        padded = np.concatenate([theta[:, self.shared :], np.zeros((theta.shape[0], 1))], axis=1)
        return _Values(natural, self.index, padded[:, self.members])

    def _terms(self, values: _Values) -> tuple[Array, Array, dict[str, Term]]:
        """Return size and data terms (S, R) and the parts' terms by place."""
        design, law = self._centred, self.law
        places = {"size": law.size, "data": law.data, "penalty": law.penalty}
        terms = {place: part(values, design) for place, part in places.items() if part}
        size = np.log(values["A"]) - values["alpha"] * design.log_n
        data = np.log(values["B"]) - values["beta"] * design.log_d
        if "size" in terms:
            size += terms["size"].value
        if "data" in terms:
            data += terms["data"].value
        return np.exp(size, out=size), np.exp(data, out=data), terms

    def unit_terms(self, theta: Array) -> tuple[Array, Array]:
        """Return the size and the data term (S, R) of the law, before the outer exponent."""
        return self._terms(self._values(theta))[:2]

    def predict(self, theta: Array) -> Array:
        """Return losses (S, R) in nats/token for internal parameters (S, P) in geometric-mean units."""
        values = self._values(theta)
        size, data, terms = self._terms(values)
        core = size + data
        if self.law.has_gamma:
            core = core ** values["gamma"]
        core = core + values["E"]
        return core + terms["penalty"].value if "penalty" in terms else core

    def size_multiplier(self, theta: Array) -> Array:
        """Return eff (S, R) of every row: N eff is the size that a dense model would need in the size term."""
        values = self._values(theta)
        if self.law.size is None:
            return np.ones((theta.shape[0], self.design.log_n.size))
        return np.exp(-self.law.size(values, self._centred).value / values["alpha"])

    def linearise(self, theta: Array) -> tuple[Array, Array, Array | None]:
        """Return losses (S, R), their Jacobian (S, shared, R) and the derivative (S, R) by the grouped member."""
        values = self._values(theta)
        size, data, terms = self._terms(values)
        jacobian = np.zeros((theta.shape[0], self.shared, self.design.log_n.size))
        self._fill_base(jacobian, values, size, data)
        grouped = self._fill_part(jacobian, terms.get("size"), size)
        second = self._fill_part(jacobian, terms.get("data"), data)
        grouped = second if grouped is None else grouped
        prediction = size + data
        if self.law.has_gamma:
            prediction, grouped = self._outer(jacobian, values, prediction, grouped)
        if "penalty" in terms:
            prediction = prediction + terms["penalty"].value
            penalty_grouped = self._fill_part(jacobian, terms["penalty"], None)
            grouped = penalty_grouped if grouped is None else grouped
        jacobian[:, self.index["E"]] = 1.0
        self._to_internal(jacobian, values)
        return prediction + values["E"], jacobian, grouped

    def _fill_base(self, jacobian: Array, values: _Values, size: Array, data: Array) -> None:
        np.divide(size, values["A"], out=jacobian[:, self.index["A"]])
        np.multiply(size, -self._centred.log_n, out=jacobian[:, self.index["alpha"]])
        np.divide(data, values["B"], out=jacobian[:, self.index["B"]])
        np.multiply(data, -self._centred.log_d, out=jacobian[:, self.index["beta"]])

    def _fill_part(self, jacobian: Array, term: Term | None, factor: Array | None) -> Array | None:
        """Add a part's derivatives, times `factor` when the part is the logarithm of a multiplier."""
        if term is None:
            return None
        for name, gradient in term.gradients.items():
            jacobian[:, self.index[name]] += gradient if factor is None else gradient * factor
        if term.grouped is None:
            return None
        return term.grouped if factor is None else term.grouped * factor

    def _outer(
        self, jacobian: Array, values: _Values, core: Array, grouped: Array | None
    ) -> tuple[Array, Array | None]:
        """Apply the outer exponent gamma to the sum of the terms and, by the chain rule, to its derivatives."""
        powered = core ** values["gamma"]
        chain = values["gamma"] * powered / core
        jacobian *= chain[:, None, :]
        jacobian[:, self.index["gamma"]] = powered * np.log(core)
        return powered, None if grouped is None else grouped * chain

    def _to_internal(self, jacobian: Array, values: _Values) -> None:
        for position, name in enumerate(self.names[: self.shared]):
            if self._logarithmic[position]:
                jacobian[:, position] *= values[name]
