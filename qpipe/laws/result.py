"""The result of a fit: what FIT.json holds, and predictions from it alone.

FIT.json carries everything that later steps need (parameters, intervals, bootstrap draws, the fitted rows with
residuals), so tables, figures and predictions never read the losses again.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError, nearest
from qpipe.files import write_text
from qpipe.laws.catalogue import get_law
from qpipe.laws.model import Model
from qpipe.laws.parameters import Array
from qpipe.laws.prepare import make_design

FORMAT = 1


@dataclass
class Fit:
    """A fitted law. Field by field as in FIT.json; see docs/laws.md."""

    law: str
    formula: str
    source: str
    parameters: dict[str, float]
    """Natural units: L = A (N eff)^-alpha + B D^-beta + E with N and D in counts, L in nats/token."""
    units: dict[str, str]
    parameter_intervals: dict[str, list[float]]
    """[low, high] by parameter, at the interval's level; empty without bootstrap."""
    multipliers: dict[str, dict[str, Any]]
    """By representation: eff, low, high, n_runs, standard_error."""
    interval: dict[str, Any]
    """level, method, resamples, seed."""
    objective: dict[str, Any]
    """name, delta (null for least squares), value."""
    rms_log_residual: float
    status: dict[str, Any]
    """converged, at_bound, identified, agreeing_starts, message, and the grades behind them."""
    n_rows: int
    excluded: list[dict[str, Any]]
    held: dict[str, float]
    priors: list[dict[str, Any]]
    data_digest: str
    package_version: str
    ranges: dict[str, list[float]]
    """Smallest and largest fitted n and d."""
    rows: dict[str, list[Any]]
    """Fitted rows: n, d, representation, loss, fitted, log_residual, and the columns that the law used."""
    draws: dict[str, Any]
    """Bootstrap draws of the solver's vector: `names` and `values` (resamples x names), natural units."""
    vector: dict[str, float]
    """Every number of the law by name, natural units (what `draws` are draws of)."""
    checks: dict[str, Any] = field(default_factory=dict)
    """Profiles, influence, trends, hold-outs, information criteria: filled by `qpipe.laws.checks`."""
    format: int = FORMAT

    def to_json(self, path: Path | str) -> None:
        """Write FIT.json atomically; not-a-number becomes null."""
        write_text(Path(path), _readable_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as FIT.json holds it."""
        return dict(_plain(asdict(self)))

    @classmethod
    def from_json(cls, path: Path | str) -> Self:
        """Read FIT.json (errors: missing, not a fit, written by a newer qpipe)."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise QpipeError(f"{path}: no such fit; write one with qpipe fit LOSSES --law LAW --out {path}") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise QpipeError(f"{path}: not a fit: {error}") from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "fit") -> Self:
        """Make a fit from plain data (errors: fields missing or unknown)."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or not {"law", "parameters", "vector", "rows"} <= set(data):
            raise QpipeError(f"{source}: not a FIT.json; it is written by qpipe fit LOSSES --law LAW --out FIT.json")
        if data.get("format", FORMAT) > FORMAT or set(data) - known:
            raise QpipeError(f"{source}: written by a newer qpipe ({data.get('package_version')}); update qpipe")
        if missing := known - set(data) - {"checks", "format"}:
            raise QpipeError(f"{source}: fields {', '.join(sorted(missing))} are missing; fit again")
        return cls(**data)

    def table(self) -> pd.DataFrame:
        """Return the fitted rows."""
        return pd.DataFrame(self.rows)

    def predict(self, n: Any, d: Any, representation: Any = "dense", covariates: dict[str, Any] | None = None) -> Array:
        """Return predicted losses (nats/token) for broadcastable sizes, tokens and representations.

        Parameters
        ----------
        n, d
            Non-embedding parameters and training tokens (counts), scalars or arrays.
        representation
            Name or array of names among the fitted ones; for laws with covariates (gmse, sparsity, ...) any name, when
            `covariates` gives them.
        covariates
            Columns of the law that differ from those of the fitted rows, by name.
        """
        model, shape = self.bind(n, d, representation, covariates)
        return model.predict(self._internal(model, [self.vector])).reshape(shape)

    def predict_draws(
        self, n: Any, d: Any, representation: Any = "dense", covariates: dict[str, Any] | None = None
    ) -> Array:
        """Return predictions of every bootstrap draw, shape (resamples, ...)."""
        model, shape = self.bind(n, d, representation, covariates)
        return model.predict(self._draw_matrix(model)).reshape(-1, *shape)

    def effective_multiplier(self, representation: str, covariates: dict[str, Any] | None = None) -> float:
        """Return eff of a representation (dense = 1)."""
        model, _ = self.bind(1.0, 1.0, representation, covariates)
        return float(model.size_multiplier(self._internal(model, [self.vector]))[0, 0])

    def bind(
        self, n: Any, d: Any, representation: Any, covariates: dict[str, Any] | None = None
    ) -> tuple[Model, tuple[int, ...]]:
        """Return the law bound to requested points, and the shape of the request (errors: unknown representation)."""
        n, d, names = np.broadcast_arrays(
            np.asarray(n, float), np.asarray(d, float), np.asarray(representation, dtype=str)
        )
        if not ((n > 0) & np.isfinite(n)).all() or not ((d > 0) & np.isfinite(d)).all():
            raise QpipeError("n and d must be positive counts, as in --n 1e9 --d 2e10")
        table = pd.DataFrame({"n": n.ravel(), "d": d.ravel(), "representation": names.ravel()})
        law = get_law(self.law)
        by_name = {p.name: p for p in law.parameters(make_design(self.table(), law))}
        # every number is held, so that the model works in counts instead of in units of these points' means
        parameters = [replace(by_name[name], fixed=value) for name, value in self.vector.items()]
        design = make_design(self._with_covariates(table, covariates or {}), law)
        if unseen := sorted({p.name for p in law.parameters(design)} - set(self.vector)):
            raise QpipeError(f"the fit has no {', '.join(unseen)}: no fitted run needed them; fit again with such runs")
        return Model(law, design, parameters), n.shape

    def _with_covariates(self, table: pd.DataFrame, covariates: dict[str, Any]) -> pd.DataFrame:
        """Add the law's columns from the fitted rows of the same representation, or from `covariates`."""
        law, fitted = get_law(self.law), self.table()
        columns = [name for name in (*law.columns, *law.optional) if name in fitted]
        first = fitted.drop_duplicates("representation").set_index("representation")
        known = sorted(set(fitted["representation"]) | {"dense"})
        unknown = [name for name in dict.fromkeys(table["representation"]) if name not in known]
        described = bool(columns) and not law.grouped and set(law.columns) <= set(covariates)
        if unknown and not described:
            raise QpipeError(
                [
                    f"the fit has no representation '{name}'{nearest(name, known)}; it has {', '.join(known)}"
                    for name in unknown
                ]
            )
        for column in columns:
            own = table["representation"].map(first[column]) if column in first else np.nan
            table[column] = covariates.get(column, own)
            if column in ("family", "backward"):
                table[column] = table[column].fillna("")
        return table

    def _internal(self, model: Model, vectors: list[dict[str, float]]) -> Array:
        return self.to_internal(model, np.array([[v[name] for name in model.names] for v in vectors]))

    def _draw_matrix(self, model: Model) -> Array:
        if not self.draws.get("values"):
            raise QpipeError("the fit has no bootstrap draws, so no intervals; fit again with --bootstrap 1000")
        order = [self.draws["names"].index(name) for name in model.names]
        return self.to_internal(model, np.array(self.draws["values"])[:, order])

    @staticmethod
    def to_internal(model: Model, natural: Array) -> Array:
        """Return internal values (S, P) of natural ones, for a model in counts."""
        logarithmic = np.array([p.transform == "log" for p in model.parameters])
        return np.where(logarithmic, np.log(np.where(logarithmic, np.maximum(natural, 1e-300), 1.0)), natural)


def _plain(value: Any) -> Any:
    """Return JSON data: numpy numbers become Python's, not-a-number null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _readable_json(data: dict[str, Any]) -> str:
    """Return JSON with one line per column of `rows` and `draws` and everything else indented."""
    entries = []
    for key, value in data.items():
        if key in ("rows", "draws"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
            entries.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            body = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).replace("\n", "\n ")
            entries.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
