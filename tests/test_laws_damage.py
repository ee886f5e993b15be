"""The damage of rounding: recovered from the law's own term, and its break-even checked by root finding."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq

from qpipe.errors import QpipeError
from qpipe.laws import fit
from qpipe.laws.break_even import break_even, compare, statements, worth
from qpipe.laws.damage import NAMES, fit_damage, fit_damages
from qpipe.laws.parts import Design, PostTraining

TRUE = {"C_T": 0.0598, "g_D": 0.5068, "g_N": 0.3439, "gamma_post": 0.5907}  # 2411.04330, table 2
LAW = {"A": 400.0, "alpha": 0.34, "B": 1800.0, "beta": 0.36, "E": 1.7}


def dense_loss(n, d):
    return LAW["A"] * n ** -LAW["alpha"] + LAW["B"] * d ** -LAW["beta"] + LAW["E"]


def rounded(noise: float = 0.0, seed: int = 0, sizes=(3e7, 6e7, 1.1e8), budgets=(20, 100, 400)) -> pd.DataFrame:
    """Rounded models whose damage comes from the law's own part, at the published constants."""
    rows = [(n, n * ratio, bits) for n in sizes for ratio in budgets for bits in (2.5, 3.0, 4.0)]
    n, d, bits = np.array(rows).T
    design = Design(np.log(n), np.log(d), {"representation": np.full(len(n), "x")}, {"ptq_bits": bits})
    values = {name: np.array([[value]]) for name, value in {**TRUE, "A": 1.0}.items()}
    damage = PostTraining()(values, design).value[0]
    damage = damage * np.exp(noise * np.random.default_rng(seed).standard_normal(len(damage)))
    parent = [f"n{a:g}-d{b:g}" for a, b in zip(n, d, strict=True)]
    return pd.DataFrame(
        {
            "n": n, "d": d, "representation": [f"w{b:g}-cvxq" for b in bits], "loss": dense_loss(n, d) + damage,
            "parent": parent, "parent_loss": dense_loss(n, d), "ptq_method": "cvxq", "ptq_bits": bits,
            "bits_per_weight": bits, "trajectory": parent,
        }
    )  # fmt: skip


def trained(effs: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Trained models: name -> (eff, bits)."""
    rows = [
        {
            "n": n,
            "d": n * ratio,
            "representation": name,
            "loss": dense_loss(n * eff, n * ratio),
            "bits_per_weight": bits,
        }
        for name, (eff, bits) in effs.items()
        for n in (3e7, 6e7, 1.1e8)
        for ratio in (20, 100, 400)
    ]
    return pd.DataFrame(rows).assign(a_bits=16.0)


def test_the_term_of_the_precision_law_is_recovered():
    found = fit_damage("cvxq", rounded(), bootstrap=20)
    assert found.parameters == pytest.approx(TRUE, rel=1e-6)
    assert found.rms < 1e-8
    assert (found.rows, found.parents, found.held) == (27, 9, [])
    assert found.predict(6e7, 6e9, 3.0) == pytest.approx(0.0598 * 6e9**0.5068 / 6e7**0.3439 * np.exp(-3 / 0.5907))


def test_intervals_cover_the_truth_and_are_seeded():
    inside = []
    for seed in range(40):
        found = fit_damage("cvxq", rounded(noise=0.2, seed=seed), bootstrap=300, seed=1)
        low, high = found.interval("gamma_post", 0.9)
        inside.append(low <= TRUE["gamma_post"] <= high)
    # 9 clusters: percentile intervals are a little short of 90 %.
    assert 0.7 <= np.mean(inside) <= 1.0
    again = fit_damage("cvxq", rounded(noise=0.2, seed=39), bootstrap=300, seed=1)
    assert np.array_equal(again.draws, found.draws)


def test_what_runs_cannot_tell_is_held_and_said():
    one_size = fit_damage("cvxq", rounded(sizes=(3e7,)), bootstrap=0)
    assert one_size.held == ["g_N"]
    assert one_size.parameters["g_D"] == pytest.approx(TRUE["g_D"])
    ray = fit_damage("cvxq", rounded(budgets=(20,)), bootstrap=0)
    assert ray.held == ["g_N"]
    assert ray.parameters["g_D"] == pytest.approx(TRUE["g_D"] - TRUE["g_N"])  # all that one ray shows
    with pytest.raises(QpipeError, match="at 1 rates"):
        fit_damage("cvxq", rounded().query("ptq_bits == 3"), bootstrap=0)


def test_rounding_that_costs_nothing_is_counted_and_left_out():
    table = rounded()
    table.loc[0, "loss"] = table.loc[0, "parent_loss"] - 0.01
    found = fit_damage("cvxq", table, bootstrap=0)
    assert (found.without_damage, found.rows) == (1, 26)
    assert found.parameters == pytest.approx(TRUE, rel=1e-6)


def with_diverged(table: pd.DataFrame) -> pd.DataFrame:
    """Two more rows, as a dense run that diverged leaves them: no loss before or after, no bits."""
    nothing = dict.fromkeys(("loss", "parent_loss", "ptq_bits", "bits_per_weight"), np.nan)
    more = table.head(2).assign(**nothing, status="diverged", parent="lost")
    return pd.concat([table.assign(status="ok"), more], ignore_index=True)


def test_models_that_diverged_are_counted_and_left_out():
    found = fit_damage("cvxq", with_diverged(rounded()), bootstrap=20)
    assert (found.diverged, found.rows, found.parents, found.without_damage) == (2, 27, 9, 0)
    assert found.parameters == pytest.approx(TRUE, rel=1e-6)
    assert found.to_json(0.9)["rows_diverged"] == 2


def test_a_method_whose_models_all_diverged_is_named_beside_the_others():
    lost = with_diverged(rounded()).query("status == 'diverged'").assign(ptq_method="rtn")
    found, unfitted = fit_damages(pd.concat([rounded(), lost]), bootstrap=0)
    assert [damage.method for damage in found] == ["cvxq"]
    assert "2 models diverged" in unfitted["rtn"]
    assert fit_damages(lost, bootstrap=0) == ([], unfitted)


def test_worth_is_the_dense_model_of_equal_loss():
    n, d, damage = 1e8, 1e10, 0.05
    eff = brentq(lambda x: dense_loss(n * x, d) - dense_loss(n, d) - damage, 0.01, 1)
    assert worth(damage, n, LAW) == pytest.approx(eff, rel=1e-9)


def test_break_even_is_where_the_two_losses_cross():
    found = fit_damage("cvxq", rounded(), bootstrap=0)
    values = np.array([[found.parameters[name] for name in NAMES]])
    n, bits, eff = 6e7, 3.2, 0.8
    crossing = brentq(
        lambda log_d: (
            dense_loss(n, np.exp(log_d)) + found.predict(n, np.exp(log_d), bits) - dense_loss(n * eff, np.exp(log_d))
        ),
        1.0,
        60.0,
    )
    assert break_even(values, n, bits, eff, LAW)[0] == pytest.approx(np.exp(crossing), rel=1e-6)
    assert break_even(values, n, bits, 1.0, LAW)[0] == 0
    flat = np.array([[1e-6, -0.1, 0.3, 0.6]])
    assert np.isinf(break_even(flat, n, bits, eff, LAW)[0])


def test_rounding_stands_beside_training_at_equal_bits():
    effs = {"dense": (1.0, 16.0), "w3": (0.8, 3.02), "w4": (0.95, 4.02)}
    table = pd.concat([trained(effs), rounded()], ignore_index=True)
    law = fit(table[table["ptq_method"].isna()], "compression", bootstrap=0)
    found = compare(fit_damages(table, bootstrap=50)[0], law, table)
    assert set(found["representation"]) == {"w3", "w4"}
    assert len(found) == 4  # smallest and largest size
    for row in found.to_dict("records"):
        eff, bits, n = effs[row["representation"]][0], row["bits_per_weight"], row["n"]
        assert row["eff"] == pytest.approx(eff, rel=0.02)
        d = row["enough_until_d_per_n"] * n
        cost = TRUE["C_T"] * d ** TRUE["g_D"] / n ** TRUE["g_N"] * np.exp(-bits / TRUE["gamma_post"])
        assert dense_loss(n, d) + cost == pytest.approx(dense_loss(n * eff, d), rel=2e-3)
        assert row["eff_rounded_least"] > row["eff_rounded_most"]  # longer training, more damage
    assert all("Rounding is enough up to" in words for words in statements(found))


def test_representations_that_quantize_activations_are_not_compared():
    effs = {"dense": (1.0, 16.0), "w4": (0.95, 4.02), "w4a4": (0.7, 4.02)}
    table = trained(effs)
    table.loc[table["representation"] == "w4a4", "a_bits"] = 4.0
    law = fit(table, "compression", bootstrap=0)
    both = pd.concat([table, rounded()], ignore_index=True)
    assert set(compare(fit_damages(both, bootstrap=0)[0], law, both)["representation"]) == {"w4"}


def test_a_method_that_cannot_be_fitted_is_named_beside_the_others():
    few = rounded().query("ptq_bits == 3").assign(ptq_method="rtn")
    found, unfitted = fit_damages(pd.concat([rounded(), few]), bootstrap=0)
    assert [damage.method for damage in found] == ["cvxq"]
    assert "at 1 rates" in unfitted["rtn"]


def test_tables_without_rounded_models_are_refused():
    with pytest.raises(QpipeError, match="lacks parent, parent_loss"):
        fit_damages(trained({"dense": (1.0, 16.0)}))
    with pytest.raises(QpipeError, match="no row"):
        fit_damages(rounded().assign(ptq_bits=np.nan))
