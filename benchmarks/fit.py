"""How long fits take: CPU seconds, median of five, one BLAS thread, same process.

    python benchmarks/fit.py [LOSSES.csv]

Cases: (1) a 5-parameter fit of 240 runs, against the usual loop of scipy's L-BFGS-B with finite differences over a grid
of 4,500 starts (a sample of the starts is timed and the total scaled up, since the whole loop takes a minute), and
against vpnls (github.com/Open-Athena/vpnls, Apache-2.0) where it is installed: its objective is Huber on raw loss, so
both minimise that here, and the gap is how far above our optimum it stops; (2) 4,000 bootstrap resamples of it, several
starts each; (3) a whole fit with 1,000 resamples, profiles and checks of a loss table, default the 104 QuEST runs among
the tests' data; (4) growth with runs and representations.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from qpipe.laws import fit, get_law, read_losses
from qpipe.laws.bootstrap import resample
from qpipe.laws.prepare import select_rows
from qpipe.laws.search import Fitted, Options, fit_point
from qpipe.laws.solve import ObjectiveName
from qpipe.laws.threads import single_blas_thread

SAMPLE = 45
GRID = ([0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25], [-1, -0.5, 0, 0.5, 1], [0, 0.5, 1, 1.5, 2], [0, 0.5, 1, 1.5, 2])


def cpu_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def chinchilla_runs(rows: int = 240, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    n = np.exp(generator.uniform(np.log(5e7), np.log(1e10), rows))
    d = np.exp(generator.uniform(np.log(5e8), np.log(4e11), rows))
    loss = (482.0 * n**-0.348 + 2085.4 * d**-0.366 + 1.817) * np.exp(0.006 * generator.standard_t(3, rows))
    return pd.DataFrame({"n": n, "d": d, "representation": "dense", "loss": loss})


def many_representations(rows: int, representations: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    n = np.exp(generator.uniform(17, 22, rows))
    d = n * np.exp(generator.uniform(3, 6, rows))
    code = np.arange(rows) % representations
    eff = np.append(1.0, generator.uniform(0.05, 1, representations - 1))[code]
    loss = (60 * (n * eff) ** -0.25 + 800 * d**-0.32 + 1.6) * np.exp(0.004 * generator.standard_normal(rows))
    names = np.where(code == 0, "dense", np.char.add("r", code.astype(str)))
    return pd.DataFrame({"n": n, "d": d, "representation": names, "loss": loss})


def naive_loop(table: pd.DataFrame) -> tuple[float, float]:
    """Return CPU seconds of the 4,500-start scipy loop, scaled up from a sample, and the best objective it found."""
    log_n, log_d, log_loss = (np.log(table[c].to_numpy()) for c in ("n", "d", "loss"))

    def objective(x: np.ndarray) -> float:
        terms = np.stack([x[0] - x[3] * log_n, x[1] - x[4] * log_d, np.full_like(log_n, x[2])])
        size = np.abs(np.logaddexp.reduce(terms) - log_loss)
        return float(np.sum(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4))))

    starts = list(itertools.product(*GRID))
    chosen = np.random.default_rng(0).choice(len(starts), SAMPLE, replace=False)
    start = time.process_time()
    best = min(minimize(objective, np.array(starts[i]), method="L-BFGS-B").fun for i in chosen)
    return (time.process_time() - start) * len(starts) / SAMPLE, float(best)


def point(table: pd.DataFrame, law: str, bootstrap: int = 0, objective: ObjectiveName = "log-huber") -> Fitted:
    options = Options(objective=objective, bootstrap=bootstrap)
    return fit_point(select_rows(table, get_law(law)), get_law(law), options)


def against_vpnls(table: pd.DataFrame) -> dict[str, Any]:
    """Return CPU seconds and objectives of vpnls's grid of exponents and of qpipe, both for Huber on raw loss."""
    try:
        from vpnls.api import fit_vpnls, huber
    except ImportError:
        return {"vpnls": "not installed"}
    n, d, loss = (table[c].to_numpy() for c in ("n", "d", "loss"))
    ours = point(table, "chinchilla", objective="huber").value
    theirs = fit_vpnls(n, d, loss, loss=huber(1e-3), resolution=0.01).loss_value * len(table)
    return {
        "raw Huber, qpipe": cpu_seconds(lambda: point(table, "chinchilla", objective="huber")),
        "raw Huber, vpnls at resolution 0.01": cpu_seconds(
            lambda: fit_vpnls(n, d, loss, loss=huber(1e-3), resolution=0.01)
        ),
        "raw Huber, objective of qpipe": ours,
        "raw Huber, objective of vpnls above it": theirs / ours - 1,
    }


def main(losses: Path) -> dict[str, Any]:
    table = chinchilla_runs()
    fitted = point(table, "chinchilla", 4000)
    loop_seconds, loop_best = naive_loop(table)
    single = cpu_seconds(lambda: point(table, "chinchilla"))
    result: dict[str, Any] = {
        "fit of 240 runs": single,
        "objective": fitted.value,
        "starts at the optimum": int((fitted.polished.value <= fitted.value * (1 + 1e-6)).sum()),
        "scipy loop, 4500 starts (scaled)": loop_seconds,
        "scipy loop, best objective of the sample": loop_best,
        "speed-up": loop_seconds / single,
        **against_vpnls(table),
        "4000 resamples": cpu_seconds(lambda: resample(fitted)),
    }
    runs = read_losses(losses)
    result[f"whole fit of {losses.name} ({len(runs)} runs, 1000 resamples)"] = cpu_seconds(lambda: fit(runs))
    for rows, representations in ((1000, 20), (2500, 50), (10000, 200)):
        big = many_representations(rows, representations)
        name = f"{rows} runs, {representations} representations"
        result[f"{name}: point"] = cpu_seconds(lambda big=big: point(big, "compression"), 1)
        big_fit = point(big, "compression", 100)
        result[f"{name}: 100 resamples"] = cpu_seconds(lambda big_fit=big_fit: resample(big_fit), 1)
    return result


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "tests" / "data" / "quest_losses.csv"
    with single_blas_thread():
        print(json.dumps(main(Path(sys.argv[1]) if len(sys.argv) > 1 else default), indent=1))
