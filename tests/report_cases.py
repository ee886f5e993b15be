"""Fits to draw and report: losses made by a known law, so that every number on a figure has a closed form."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qpipe.laws import Fit, fit

LAW = {"A": 420.0, "alpha": 0.34, "B": 1600.0, "beta": 0.37, "E": 1.7}
EFF = {"dense": 1.0, "w4": 0.83, "w4a4": 0.6, "2:4": 0.7, "w2": 0.35}


def true_loss(n: Any, d: Any, eff: Any) -> Any:
    """L = A (N eff)^-alpha + B D^-beta + E."""
    return LAW["A"] * (n * eff) ** -LAW["alpha"] + LAW["B"] * d ** -LAW["beta"] + LAW["E"]


def losses(eff: dict[str, float] = EFF, ratios: tuple[float, ...] = (10, 40, 160)) -> pd.DataFrame:
    """Losses of 4 sizes x D/N ratios x representations with 0.1 % of noise."""
    noise = np.random.default_rng(1)
    rows = [
        {"n": n, "d": n * ratio, "representation": name, "loss": true_loss(n, n * ratio, value)}
        for name, value in eff.items()
        for n in (1e7, 3e7, 1e8, 3e8)
        for ratio in ratios
    ]
    table = pd.DataFrame(rows)
    return table.assign(loss=table["loss"] * np.exp(noise.normal(0, 1e-3, len(table))))


def fitted(**options: Any) -> Fit:
    """The compression law fitted to `losses`."""
    return fit(losses(), **{"law": "compression", "bootstrap": 40, "seed": 0} | options)


def made(eff: dict[str, float], message: str = "") -> Fit:
    """A fit that states the true law for any names, without fitting; `message` makes it an unsettled one."""
    rows = losses(eff)
    exact = true_loss(rows["n"], rows["d"], rows["representation"].map(eff))
    rows = rows.assign(fitted=exact, log_residual=np.log(exact / rows["loss"]))
    entries = {
        r: {"eff": v, "low": 0.9 * v, "high": 1.1 * v, "n_runs": 12, "standard_error": 0.05} for r, v in eff.items()
    }
    return Fit(
        law="compression",
        formula="L = A (N eff)^-alpha + B D^-beta + E",
        source="",
        parameters=dict(LAW),
        units=dict.fromkeys(LAW, "1"),
        parameter_intervals={},
        multipliers=entries,
        interval={"level": 0.9, "method": "case bootstrap", "resamples": 100, "seed": 0},
        objective={"name": "log-huber", "delta": 1e-3, "value": 0.0},
        rms_log_residual=math.sqrt((rows["log_residual"] ** 2).mean()),
        status={
            "converged": True,
            "at_bound": [],
            "identified": not message,
            "agreeing_starts": 60,
            "starts": 64,
            "message": message or "settled",
        },
        n_rows=len(rows),
        excluded=[],
        held={},
        priors=[],
        data_digest="0" * 16,
        package_version="0",
        ranges={"n": [1e7, 3e8], "d": [1e8, 4.8e10]},
        rows=rows.to_dict("list"),
        draws={},
        vector={**LAW, **{f"eff[{name}]": value for name, value in eff.items() if name != "dense"}},
    )


def write_capacities(path: Path, names: list[str]) -> Path:
    """A file as `qpipe capacity --json` prints it."""
    import json

    entries = [
        {
            "representation": name,
            "bits_per_weight": 1.5 + k,
            "payload_bits": 1 + k,
            "gmse": 4.0 ** -(k + 1),
            "rho": 0.2 + 0.1 * k,
        }
        for k, name in enumerate(names)
    ]
    path.write_text(json.dumps(entries))
    return path
