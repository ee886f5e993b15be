"""Building blocks of the laws: what a compressed representation does to the size term, the data term or the loss.

Every law here is one composition (2502.16440, 2506.01863, 2309.08520, 2411.04330, 2505.14669, 2505.14302, 2501.02423):

    L = [ A (N eff)^-alpha + B (D eff_D)^-beta ]^gamma + E + penalty

A *part* fills one of the three places `eff`, `eff_D` or `penalty`. Called with parameter values it returns a `Term`:
its values for every search (S) and row (R), and derivatives with respect to the natural values of its parameters.
`eff` parts return the logarithm of the factor on the size term, log(eff^-alpha), because two of the laws (sparsity
and compression at its best conditioning) are simpler there; eff itself is exp(-value / alpha).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from qpipe.laws.parameters import Array, Parameter

LN4 = float(np.log(4.0))
_GAP = (("g_D", "d", -1.0), ("g_N", "n", 1.0))
Values = Mapping[str, Array]
"""Natural parameter values by name, each of shape (S, 1)."""


@dataclass
class Design:
    """Rows of a loss table as arrays of shape (R,), in the order in which the solver wants them."""

    log_n: Array
    log_d: Array
    labels: dict[str, np.ndarray]
    """Text columns: `representation`, and where given `backward` and `family`."""
    numbers: dict[str, Array]
    """Numeric columns that the law uses: sparsity, gmse, w_bits, ..."""


@dataclass
class Term:
    """Values (S, R) of a part, and derivatives (S, R) by parameter name.

    `grouped` is the derivative with respect to the logarithm of the one member of the grouped family that the row
    belongs to: a family with a member per representation would otherwise need a dense Jacobian, a column for each.
    `values["grouped"]` holds that logarithm, of shape (S, R).
    """

    value: Array
    gradients: dict[str, Array] = field(default_factory=dict)
    grouped: Array | None = None


class Part(Protocol):
    """What fills a place in a law."""

    def parameters(self, design: Design) -> list[Parameter]:
        """Return the parameters that the rows call for."""

    def __call__(self, values: Values, design: Design) -> Term:
        """Return the term and its derivatives."""


def members(design: Design, column: str) -> list[str]:
    """Return the labels of a column other than `dense`, sorted."""
    return sorted(set(design.labels[column].tolist()) - {"dense"})


@dataclass(frozen=True)
class FreeMultiplier:
    """One free multiplier per label of a column; eff(dense) = 1 (2502.16440).

    `name` is the family, `exponent` the parameter whose term it scales. The family of a law's size term is grouped.
    """

    name: str = "eff"
    column: str = "representation"
    exponent: str = "alpha"
    grouped: bool = True

    def parameters(self, design: Design) -> list[Parameter]:
        """Return one parameter per label, e.g. `eff[w4a4]`."""
        return [
            Parameter(f"{self.name}[{label}]", "1", f"effective multiplier of {label}", 1e-8, 1e4, (0.5,))
            for label in members(design, self.column)
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return log(eff^-exponent)."""
        exponent = values[self.exponent]
        if self.grouped:
            log_eff = values["grouped"]
            return Term(-exponent * log_eff, {self.exponent: -log_eff}, np.broadcast_to(-exponent, log_eff.shape))
        log_eff = np.zeros((exponent.shape[0], design.log_n.size))
        gradients: dict[str, Array] = {}
        for label in members(design, self.column):
            eff, rows = values[f"{self.name}[{label}]"], design.labels[self.column] == label
            log_eff = log_eff + np.log(eff) * rows
            gradients[f"{self.name}[{label}]"] = -exponent / eff * rows
        return Term(-exponent * log_eff, {self.exponent: -log_eff, **gradients})


@dataclass(frozen=True)
class Capacity:
    """eff = L tanh(F log_{1/4} GMSE)^C, constants once per family of representations (2506.01863 eq. 3).

    With `activation_gmse` the weight and activation factors multiply (the paper's product rule); activations are
    then a family of their own.
    """

    def _factors(self, design: Design) -> list[tuple[str, Array, np.ndarray]]:
        """Return (family, ideal bits, rows) of each factor; rows that keep 16 bits have factor 1."""
        family = design.labels.get("family")
        dense = design.labels["representation"] == "dense"
        weights = ~dense & (design.numbers["gmse"] > 0)
        names = np.full(dense.size, "all") if family is None else family
        factors = [
            (name, design.numbers["gmse"], weights & (names == name)) for name in sorted(set(names[weights].tolist()))
        ]
        if "activation_gmse" in design.numbers:
            rows = ~dense & (design.numbers["activation_gmse"] > 0)
            factors.append(("activations", design.numbers["activation_gmse"], rows))
        return [(name, np.log(np.where(rows, mse, 0.5)) / -LN4, rows) for name, mse, rows in factors if rows.any()]

    def parameters(self, design: Design) -> list[Parameter]:
        """Return L (held at 1 unless freed), F and C of every family."""
        result = []
        for name, _, _ in self._factors(design):
            result += [
                Parameter(f"L[{name}]", "1", "eff at vanishing error", 1e-2, 2.0, (1.0,), fixed=1.0),
                Parameter(f"F[{name}]", "1/bit", "slope in ideal bits", 1e-3, 10.0, (0.3, 0.45, 0.8)),
                Parameter(f"C[{name}]", "1", "curvature near GMSE = 1", 1e-2, 20.0, (0.6, 1.4, 3.0)),
            ]
        return result

    def __call__(self, values: Values, design: Design) -> Term:
        """Return log(eff^-alpha)."""
        alpha = values["alpha"]
        log_eff = np.zeros((alpha.shape[0], design.log_n.size))
        gradients: dict[str, Array] = {}
        for name, bits, rows in self._factors(design):
            limit, slope, curve = (values[f"{letter}[{name}]"] for letter in "LFC")
            hyperbolic = np.tanh(slope * bits)
            log_eff = log_eff + (np.log(limit) + curve * np.log(hyperbolic)) * rows
            gradients[f"L[{name}]"] = -alpha / limit * rows
            gradients[f"F[{name}]"] = -alpha * curve * bits * (1 - hyperbolic**2) / hyperbolic * rows
            gradients[f"C[{name}]"] = -alpha * np.log(hyperbolic) * rows
        return Term(-alpha * log_eff, {"alpha": -log_eff, **gradients})


@dataclass(frozen=True)
class SparseFactor:
    """(a_S (1-S)^b_S + c_S) N_nonzero^-alpha with a_S = A (1 - floor), c_S = A floor (2309.08520 eq. of section 3).

    N of the loss table counts all parameters, so N_nonzero = N (1-S).
    """

    def parameters(self, design: Design) -> list[Parameter]:
        """Return the exponent b_S and the share c_S / (a_S + c_S) that remains as S -> 1."""
        return [
            Parameter("b_S", "1", "how fast sparsity helps at equal non-zeros", 1e-2, 20.0, (0.4, 0.8, 2.0)),
            Parameter(
                "floor",
                "1",
                "c_S / (a_S + c_S): share of the size term left as S -> 1",
                0.0,
                1.0,
                (0.5, 0.8),
                "identity",
            ),
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return log of the factor on A N^-alpha."""
        alpha, exponent, floor = values["alpha"], values["b_S"], values["floor"]
        log_kept = np.log1p(-design.numbers["sparsity"])
        power = np.exp(exponent * log_kept)
        share = (1 - floor) * power + floor
        gradients = {
            "alpha": np.broadcast_to(-log_kept, share.shape),
            "b_S": (1 - floor) * power * log_kept / share,
            "floor": (1 - power) / share,
        }
        return Term(np.log(share) - alpha * log_kept, gradients)


@dataclass(frozen=True)
class BitProduct:
    """eff = prod_x (1 - exp(-P_x / gamma_x)) over weights, activations and KV cache (2411.04330 eq. 3).

    Only the columns that vary take part; 16 bits is not exactly 1 in this law.
    """

    names: ClassVar[dict[str, str]] = {"w_bits": "gamma_w", "a_bits": "gamma_a", "kv_bits": "gamma_kv"}

    def parameters(self, design: Design) -> list[Parameter]:
        """Return one gamma (bits) for every kind of tensor whose width varies."""
        return [
            Parameter(gamma, "bit", "e-folding width", 0.05, 30.0, (1.0, 2.5))
            for column, gamma in self.names.items()
            if column in design.numbers and np.ptp(design.numbers[column]) > 0
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return log(eff^-alpha)."""
        alpha = values["alpha"]
        log_eff = np.zeros((alpha.shape[0], design.log_n.size))
        gradients: dict[str, Array] = {}
        for column, name in self.names.items():
            if name not in values:
                continue
            bits = design.numbers[column]
            decay = np.exp(-bits / values[name])
            log_eff = log_eff + np.log1p(-decay)
            gradients[name] = alpha * decay * bits / values[name] ** 2 / (1 - decay)
        return Term(-alpha * log_eff, {"alpha": -log_eff, **gradients})


@dataclass(frozen=True)
class PostTraining:
    """C_T D^g_D / N^g_N exp(-P_post / gamma_post): rounding a finished model to P_post bits (2411.04330 eq. 2).

    Rows without `ptq_bits` (zero in the design) have no such term; a table without the column has none at all.
    """

    def _rows(self, design: Design) -> np.ndarray:
        return design.numbers.get("ptq_bits", np.zeros(design.log_n.size)) > 0

    def parameters(self, design: Design) -> list[Parameter]:
        """Return C_T, g_D, g_N and gamma_post when some run was quantized after training."""
        if not self._rows(design).any():
            return []
        return [
            Parameter("C_T", "nats/token", "size of the post-training term", 1e-60, 1e60, (0.05, 1.0), shifts=_GAP),
            Parameter("g_D", "1", "growth with tokens", 1e-3, 3.0, (0.3, 0.6)),
            Parameter("g_N", "1", "decay with parameters", 1e-3, 3.0, (0.35,)),
            Parameter("gamma_post", "bit", "e-folding width", 0.05, 30.0, (0.6, 1.5)),
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return the additive penalty (nats/token)."""
        rows = self._rows(design)
        if "C_T" not in values:
            return Term(np.zeros((values["A"].shape[0], rows.size)))
        bits = np.where(rows, design.numbers["ptq_bits"], 1.0)
        penalty = rows * np.exp(
            np.log(values["C_T"])
            + values["g_D"] * design.log_d
            - values["g_N"] * design.log_n
            - bits / values["gamma_post"]
        )
        gradients = {
            "C_T": penalty / values["C_T"],
            "g_D": penalty * design.log_d,
            "g_N": -penalty * design.log_n,
            "gamma_post": penalty * bits / values["gamma_post"] ** 2,
        }
        return Term(penalty, gradients)


@dataclass(frozen=True)
class QatGap:
    """k_R D^g_D (log2 G)^g_G / N^g_N added to the dense loss (2505.14302 eq. 5); G = group size.

    k is free per representation; without a varying `group_size` the factor in G is part of k.
    """

    def _log_groups(self, design: Design) -> Array:
        """Return log log2 of the group size (R,); 0 for dense rows."""
        rows = design.labels["representation"] != "dense"
        sizes = design.numbers.get("group_size", np.full(rows.size, 2.0))
        return np.log(np.log2(np.where(rows, sizes, 2.0)))

    def parameters(self, design: Design) -> list[Parameter]:
        """Return k per representation (grouped) and the shared exponents."""
        shared = [
            Parameter("g_D", "1", "growth of the gap with tokens", 1e-4, 3.0, (0.08, 0.3)),
            Parameter("g_N", "1", "decay of the gap with parameters", 1e-4, 3.0, (0.2, 0.5)),
        ]
        if np.unique(self._log_groups(design)[design.labels["representation"] != "dense"]).size > 1:
            shared.append(Parameter("g_G", "1", "growth of the gap with log2 of the group size", 1e-4, 5.0, (0.8,)))
        return shared + [
            Parameter(f"k[{label}]", "nats/token", f"gap of {label} at N = D = 1", 1e-60, 1e60, (0.1,), shifts=_GAP)
            for label in members(design, "representation")
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return the additive penalty (nats/token)."""
        rows = design.labels["representation"] != "dense"
        exponent = values["grouped"] + values["g_D"] * design.log_d - values["g_N"] * design.log_n
        if "g_G" in values:
            exponent = exponent + values["g_G"] * self._log_groups(design)
        penalty = rows * np.exp(exponent)
        gradients = {"g_D": penalty * design.log_d, "g_N": -penalty * design.log_n}
        if "g_G" in values:
            gradients["g_G"] = penalty * self._log_groups(design)
        return Term(penalty, gradients, penalty)


@dataclass(frozen=True)
class FloatGap:
    """D^beta / N^alpha log2(block) / (g_F (E + 1/2)^delta_F (M + 1/2)^nu_F) (2501.02423 eq. 9).

    E and M are exponent and mantissa bits, block the numbers that share a scale.
    """

    def parameters(self, design: Design) -> list[Parameter]:
        """Return the constant and the exponents of exponent and mantissa bits."""
        return [
            Parameter(
                "g_F",
                "token^beta/nat",
                "inverse size of the penalty",
                1e-60,
                1e60,
                (1e2, 1e4),
                shifts=(("beta", "d", 1.0), ("alpha", "n", -1.0)),
            ),
            Parameter("delta_F", "1", "gain from exponent bits", 1e-3, 20.0, (1.0, 3.0)),
            Parameter("nu_F", "1", "gain from mantissa bits", 1e-3, 20.0, (1.0, 3.0)),
        ]

    def __call__(self, values: Values, design: Design) -> Term:
        """Return the additive penalty (nats/token)."""
        rows = design.labels["representation"] != "dense"
        exponent_bits, mantissa_bits, block = (
            np.where(rows, design.numbers[name], 1.0) for name in ("exponent_bits", "mantissa_bits", "block_size")
        )
        log_e, log_m = np.log(exponent_bits + 0.5), np.log(mantissa_bits + 0.5)
        scale = values["beta"] * design.log_d - values["alpha"] * design.log_n
        penalty = (
            rows
            * np.log2(np.maximum(block, 1.0))
            * np.exp(scale - np.log(values["g_F"]) - values["delta_F"] * log_e - values["nu_F"] * log_m)
        )
        gradients = {
            "alpha": -penalty * design.log_n,
            "beta": penalty * design.log_d,
            "g_F": -penalty / values["g_F"],
            "delta_F": -penalty * log_e,
            "nu_F": -penalty * log_m,
        }
        return Term(penalty, gradients)
