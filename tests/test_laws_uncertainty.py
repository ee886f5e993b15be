"""Intervals: resamples against scipy, profiles against brute force, coverage of the truth."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from laws_cases import EFFS, SCARCE_EFFS, TRUTH, chinchilla_rows, compression_world, quest, scarce_world, t5
from scipy.optimize import least_squares

from qpipe.errors import QpipeError
from qpipe.laws import fit, get_law
from qpipe.laws.bootstrap import resample
from qpipe.laws.checks import influence, trends
from qpipe.laws.prepare import select_rows
from qpipe.laws.profile import covariance, noise_of, profile
from qpipe.laws.resample import row_weights
from qpipe.laws.search import Fitted, Options, fit_point
from qpipe.laws.solve import Objective, minimise


def point(table: pd.DataFrame, law: str, **options: object) -> Fitted:
    return fit_point(select_rows(table, get_law(law)), get_law(law), Options(**options))  # type: ignore[arg-type]


def least_squares_chinchilla(table: pd.DataFrame, weights: np.ndarray, held_e: float | None = None) -> float:
    """Half the weighted squares of log residuals at scipy's optimum, from the truth."""
    log_n, log_d = np.log(table["n"] / 1e9), np.log(table["d"] / 1e10)

    def residual(x: np.ndarray) -> np.ndarray:
        loss = np.exp(x[0] - x[1] * log_n) + np.exp(x[2] - x[3] * log_d) + (x[4] if held_e is None else held_e)
        return np.asarray(np.sqrt(weights) * np.log(np.maximum(loss, 1e-9) / table["loss"]))

    start = [np.log(482 * 1e9**-0.348), 0.348, np.log(2085.4 * 1e10**-0.366), 0.366, 1.817][: 4 if held_e else 5]
    return float(least_squares(residual, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).cost)


def test_every_resample_is_at_least_as_good_as_scipy_from_the_truth() -> None:
    table = chinchilla_rows(60)
    fitted = point(table, "chinchilla", objective="log-l2")
    weights = row_weights(table, 25, seed=3, smooth=False)
    batch = dataclasses.replace(fitted.problem, weights=weights)
    found = minimise(batch, np.tile(fitted.theta, (25, 1)), np.arange(25), tolerance=1e-8)
    for row, value in zip(weights, found.value, strict=True):
        assert value <= least_squares_chinchilla(table, row) * (1 + 1e-6)


@pytest.mark.parametrize("smooth", [True, False])
def test_strata_keep_their_total_and_trajectories_stay_together(smooth: bool) -> None:
    table = quest()
    weights = row_weights(table, 200, seed=0, smooth=smooth)
    for _, rows in table.groupby("representation"):
        np.testing.assert_allclose(weights[:, rows.index].sum(axis=1), len(rows))
    table["trajectory"] = [f"t{i // 2}" for i in range(len(table))]
    table.loc[:3, "trajectory"] = ""
    weights = row_weights(table, 50, seed=0, smooth=smooth)
    same = table.groupby(["representation", "trajectory"]).indices
    for (_, name), rows in same.items():
        if name:
            assert np.ptp(weights[:, rows], axis=1).max() == 0
    assert np.ptp(weights[:, same["2:4+w4a4-quest", ""]], axis=1).max() > 0


def test_smooth_weights_have_the_moments_of_the_flat_dirichlet() -> None:
    """Mean 1 and variance (n - 1) / (n + 1) for n units (Rubin 1981)."""
    weights = row_weights(chinchilla_rows(8), 40000, seed=1, smooth=True)
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.02)
    np.testing.assert_allclose(weights.var(axis=0), 7 / 9, atol=0.03)


def test_profile_is_scipys_conditional_optimum() -> None:
    table = chinchilla_rows(80)
    fitted = point(table, "chinchilla", objective="log-l2")
    found = profile(fitted, "E", 0.9)
    scale = noise_of(fitted.residual, fitted.problem.objective, 5).scale
    assert scale == pytest.approx(2 * fitted.value / (80 - 5), rel=1e-9)
    ones = np.ones(80)
    for value, rise in list(zip(found["values"], found["rise"], strict=True))[6:-6:4]:
        expected = 2 * (least_squares_chinchilla(table, ones, held_e=value) - fitted.value) / scale
        assert rise == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for end in (found["low"], found["high"]):
        cost = least_squares_chinchilla(table, ones, held_e=end)
        assert 2 * (cost - fitted.value) / scale == pytest.approx(2.7055, rel=0.02)  # chi-square, 1 degree, 90%


def test_covariance_is_that_of_scipys_jacobian() -> None:
    table = chinchilla_rows(80)
    fitted = point(table, "chinchilla", objective="log-l2")
    natural = fitted.natural(fitted.theta)

    def residual(x: np.ndarray) -> np.ndarray:
        a, alpha, b, beta, e = np.append(np.exp(x[:4]), x[4])
        return np.asarray(np.log((a * table["n"] ** -alpha + b * table["d"] ** -beta + e) / table["loss"]))

    x = np.append(np.log(natural[:4]), natural[4])
    steps = 1e-6 * np.eye(5)
    jacobian = np.stack([(residual(x + s) - residual(x - s)) / 2e-6 for s in steps], axis=1)
    expected = np.linalg.inv(jacobian.T @ jacobian) * np.sum(residual(x) ** 2) / 75
    found = covariance(fitted)
    for name in ("alpha", "beta", "E"):
        i = fitted.model.index[name]
        assert found[i, i] == pytest.approx(expected[i, i], rel=1e-3)


def test_noise_of_a_huber_fit_turns_rises_into_likelihood_ratios() -> None:
    """For Gaussian residuals, E[rho'^2] / E[rho''] from their distribution, threshold a tenth of their spread."""
    residual = np.random.default_rng(0).standard_normal(200_000) * 0.01
    found = noise_of(residual, Objective("log-huber", 1e-3), 5)
    inside = 0.0796557  # P(|z| < 0.1)
    influence_squared = 1e-6 * (1 - inside) + 1e-4 * (inside - 2 * 0.1 * 0.3969525)
    assert found.influence == pytest.approx(influence_squared, rel=0.01)
    assert found.curvature == pytest.approx(inside, rel=0.03)


def test_open_profile_of_a_parameter_that_the_runs_do_not_determine() -> None:
    found = profile(point(t5(), "compression"), "E", 0.9)
    assert found["open_low"]
    assert not found["open_high"]
    assert found["grade"] == "none"
    with pytest.raises(QpipeError, match="did you mean 'alpha'"):
        profile(point(t5(), "compression"), "alpa", 0.9)


def test_trend_of_a_multiplier_that_does_drift_is_found_and_its_size_right() -> None:
    table = compression_world(0, noise=0.0)
    eff = table["representation"].map(EFFS) * np.where(table["representation"] == "f2", (table["n"] / 1e8) ** -0.1, 1)
    clean = 60.0 * (table["n"] * eff) ** -0.25 + 800.0 * table["d"] ** -0.32 + 1.6
    noise = np.exp(5e-4 * np.random.default_rng(0).standard_normal(len(table)))
    entries = trends(point(table.assign(loss=clean * noise), "compression", objective="log-l2"))
    drift = {(e["representation"], e["axis"]): e for e in entries}
    assert drift["f2", "n"]["slope"] == pytest.approx(-0.1, abs=4 * drift["f2", "n"]["standard_error"] + 0.02)
    assert drift["f2", "n"]["p_adjusted"] < 1e-4


def test_trends_of_a_law_that_holds_are_rarely_significant() -> None:
    """Holm's adjustment keeps the chance of any false alarm below 5% per fit; 3 of 20 would be a defect."""
    alarms = [
        any(e["p_adjusted"] < 0.05 for e in trends(point(compression_world(seed), "compression", objective="log-l2")))
        for seed in range(20)
    ]
    assert sum(alarms) <= 3


def test_influence_names_the_run_that_was_spoilt_and_its_refit() -> None:
    table = compression_world(0)
    spoilt = table.index[table["representation"] == "f3"][4]
    table.loc[spoilt, "loss"] *= 1.05
    fitted = point(table, "compression", objective="log-l2")
    top = influence(fitted)[0]
    assert top["row"] == spoilt
    without = point(table.drop(index=spoilt), "compression", objective="log-l2")
    moved = fitted.natural(fitted.theta) - without.natural(without.theta)
    i = fitted.model.index[top["parameter"]]
    error = np.sqrt(covariance(fitted)[i, i]) * fitted.natural(fitted.theta)[i]
    assert abs(moved[i]) / error == pytest.approx(top["change"], rel=0.1)


def test_hold_outs_are_fits_of_the_rest_and_predictions_of_what_was_left_out() -> None:
    table = compression_world(0)
    result = fit(table, bootstrap=0, compare=["dense"])
    errors = {(e["law"], e["held_out"]): e for e in result.checks["hold_outs"]}
    largest = table["n"] == table["n"].max()
    rest = fit(table[~largest], bootstrap=0)
    rows = table[largest]
    miss = np.log(rest.predict(rows["n"], rows["d"], rows["representation"]) / rows["loss"])
    found = errors["compression", "largest n"]
    assert (found["n_train"], found["n_test"]) == (48, 16)
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(miss**2)), rel=1e-3)
    assert found["bias"] == pytest.approx(miss.mean(), rel=1e-3, abs=1e-6)
    assert errors["dense", "largest n"]["rms"] > 5 * found["rms"]


def test_hold_outs_that_leave_too_little_say_so() -> None:
    entries = fit(compression_world(0, sizes=3), bootstrap=0).checks["hold_outs"]
    problem = {e["held_out"]: e.get("problem") for e in entries}
    assert problem["largest n"] == "2 different n would be left, which do not determine an exponent"
    assert problem["largest d"] is None


def test_bad_options_are_refused_together() -> None:
    with pytest.raises(QpipeError) as caught:
        Options(level=90, delta=0, bootstrap=5)
    assert len(caught.value.problems) == 3


def test_more_noise_gives_wider_intervals_in_proportion() -> None:
    widths = []
    for noise in (0.002, 0.004):
        entry = fit(compression_world(0, noise), bootstrap=300).multipliers["f2"]
        widths.append(entry["high"] - entry["low"])
    assert widths[1] / widths[0] == pytest.approx(2.0, rel=0.25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("world", "effs", "objective"),
    [
        (compression_world, EFFS, "log-huber"),
        (compression_world, EFFS, "log-l2"),
        (scarce_world, SCARCE_EFFS, "log-huber"),
    ],
)
def test_ninety_percent_intervals_cover_the_truth(
    world: Callable[[int], pd.DataFrame], effs: dict[str, float], objective: str
) -> None:
    """Over 300 replicates the 90% interval of every parameter and multiplier covers in 85 to 95 of 100, in percent."""
    truth = {**TRUTH["compression"], **{f"eff[{name}]": value for name, value in effs.items()}}
    hits = []
    for seed in range(300):
        fitted = point(world(10_000 + seed), "compression", objective=objective, bootstrap=400, seed=seed)
        draws = resample(fitted)
        assert draws is not None
        low, high = np.quantile(fitted.natural(draws), [0.05, 0.95], axis=0)
        true = np.array([truth[name] for name in fitted.model.names])
        hits.append((low <= true) & (true <= high))
    coverage = dict(zip(fitted.model.names, np.round(np.mean(hits, axis=0), 2).tolist(), strict=True))
    assert all(0.85 <= share <= 0.95 for share in coverage.values()), coverage
