"""GMSE and capacity against published tables, closed forms and sampling."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from qpipe.cli import main
from qpipe.compress.capacity import SCALAR, capacity, capacity_of_error
from qpipe.compress.gaussian import cell_error, maximum_error, optimal_multiplier, sphere_error
from qpipe.compress.gmse import closed_form, gmse, monte_carlo, sparsity_error
from qpipe.compress.grids import levels
from qpipe.formats import TensorFormat, resolve

# 2506.01863 and the code it builds on; floating-point and sparse rows re-derived from the definitions.
PUBLISHED = {
    "w1": 0.363380,
    "w1.58": 0.190174,
    "w2": 0.118846,
    "w3": 0.0374397,
    "w4": 0.0115429,
    "w5": 0.00349521,
    "w6": 0.00104005,
    "w7": 3.04366e-4,
    "w8": 8.782e-5,
    "w4e2m1": 0.0126849,
    "w6e3m2": 2.766e-3,
    "w6e2m3": 8.29e-4,
    "w6e4m1": 1.064e-2,
    "w8e5m2": 2.766e-3,
    "w8e4m3": 6.99e-4,
    "w8e3m4": 1.752e-4,
    "w8e2m5": 5.41e-5,
    "w4e1m2": 0.01289,
    "w2-lloyd": 0.117482,
    "w3-lloyd": 0.0345478,
    "w4-lloyd": 0.00950101,
    "w5-lloyd": 0.00250467,
    "w8-lloyd": 4.119e-5,
    "noise4": 0.00390625,
    "s10": 5.253e-4,
    "s25": 8.347e-3,
    "s50": 0.071326,
    "s75": 0.276393,
    "s90": 0.560714,
}


@pytest.mark.parametrize(("name", "value"), PUBLISHED.items())
def test_integrals_reproduce_published_errors(name: str, value: float):
    digits = len(f"{value:.10e}".split("e")[0].rstrip("0").replace(".", ""))
    found = gmse(resolve(name).weights)
    assert found.standard_error is None
    assert found.value == pytest.approx(value, rel=0.6 * 10 ** (1 - digits) / float(f"{value:e}".split("e")[0]))


@pytest.mark.parametrize(
    ("name", "value", "published_error"),
    [
        ("1:2", 0.1815, 2e-4),
        ("2:4", 0.1323, 2e-4),
        ("4:8", 0.1032, 2e-4),
        ("8:16", 0.0876, 2e-4),
        ("3:4", 0.0302, 2e-4),
        ("1:4", 0.3825, 2e-4),
        ("2:4-pairs", 0.2085, 2e-4),
        ("2:4+w2", 0.2097, 2e-4),
        ("2:4+w4", 0.1397, 2e-4),
        ("2:4-pairs+w4", 0.2157, 2e-4),
        ("s50+w2", 0.1567, 2e-4),
        ("s50+w4", 0.0782, 2e-4),
        ("s75+w4", 0.2808, 2e-4),
    ],
)
def test_sampled_errors_reproduce_published_ones(name: str, value: float, published_error: float):
    found = gmse(resolve(name).weights, samples=2**21)
    assert found.standard_error is not None
    assert abs(found.value - value) < 4 * math.hypot(found.standard_error, published_error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vq2x16", 0.1078),
        ("vq2x64", 0.02966),
        ("vq2x256", 0.007760),
        ("vq4x16", 0.3421),
        ("vq4x256", 0.09616),
        ("vq8x256", 0.3170),
    ],
)
def test_our_code_books_are_no_worse_than_published_ones(name: str, value: float):
    found = gmse(resolve(name).weights, samples=2**21)
    assert found.standard_error is not None
    assert found.value < value * 1.002 + 3 * found.standard_error  # the published errors are known to 0.2 %
    bits = resolve(name).weights.parsed_grid.bits  # type: ignore[union-attr]
    assert found.value > 4**-bits


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "nf4", "w4-group32", "w3-absmax", "bitnet", "w4-lsq", "w2-seq"])
def test_integrals_agree_with_sampling(name: str):
    part = resolve(name).weights
    assert part is not None
    sampled = monte_carlo(part, width=2048, samples=2**21, seed=3)
    exact = closed_form(part, 2048)
    assert exact is not None
    assert sampled.standard_error is not None
    assert abs(exact - sampled.value) < 4 * sampled.standard_error + 5e-4 * exact  # long-row limits at width 2048


def test_small_groups_know_their_own_scale():
    part = TensorFormat(grid="int2", scale="gaussian", gradient="ste", group=8)
    sampled = monte_carlo(part, width=1024, samples=2**21, seed=3)
    assert abs(closed_form(part, 1024) - sampled.value) < 4 * sampled.standard_error  # type: ignore[operator]


def test_group_errors_converge_to_the_row_limit_from_below():
    values = levels("int4") * optimal_multiplier("int4")
    errors = [sphere_error(values, count) for count in (8, 32, 128, 2**20)]
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(cell_error(values), rel=1e-5)


def test_cell_error_equals_adaptive_quadrature():
    from scipy.integrate import quad

    values = levels("e2m1") * 0.487
    borders = (values[1:] + values[:-1]) / 2

    def integrand(x: float) -> float:
        return float(np.min((values - x) ** 2)) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    cuts = [-12.0, *borders, 12.0]
    brute = sum(quad(integrand, a, b, epsabs=1e-13)[0] for a, b in itertools.pairwise(cuts))
    assert cell_error(values) == pytest.approx(brute, rel=1e-9)


def test_maximum_of_one_number_has_no_error():
    assert maximum_error(levels("int4-narrow"), 1, lambda m: m / 7) == pytest.approx(0, abs=1e-15)


def test_sparsity_error_is_the_second_moment_of_the_small_numbers():
    x = np.random.default_rng(0).standard_normal(2**22)
    dropped = np.abs(x) <= np.quantile(np.abs(x), 0.6)
    assert sparsity_error(0.6) == pytest.approx(float((x**2 * dropped).mean()), rel=5e-3)


def test_capacity_reproduces_the_published_curve():
    # 2506.01863 table 3 with the integer errors: 1, 2, 3, 4 and 8 bits.
    assert [round(capacity(resolve(f"w{b}"))["rho"], 3) for b in (1, 2, 3, 4, 8)] == [0.180, 0.444, 0.670, 0.820, 0.989]
    assert capacity_of_error(0.0, SCALAR) == 1
    assert capacity_of_error(1.0, SCALAR) == 0


def test_capacity_of_parts_multiplies():
    product = capacity(resolve("s50"))["rho"] * capacity(resolve("w4"))["rho"] * capacity(resolve("a8"))["rho"]
    joined = resolve({"name": "all", **_merge(resolve("s50+w4").canonical(), resolve("a8").canonical())})
    assert capacity(joined)["rho"] == pytest.approx(product, rel=1e-12)


def _merge(a: dict[str, object], b: dict[str, object]) -> dict[str, object]:
    return {**b, **a}


def test_no_preset_beats_the_rate_distortion_bound():
    for name in ("w1", "w4", "w4-lloyd", "nf4", "mxfp4", "w4-group32", "e8x65536"):
        found = capacity(resolve(name), samples=2**14)
        assert found["effective_bits"] < found["bits_per_weight"], name


def test_command_prints_json_that_follows_the_contract(capsys: pytest.CaptureFixture[str]):
    assert main(["capacity", "dense", "w4a4", "2:4", "--json", "--samples", "100000"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["representation"] for row in rows] == ["dense", "w4a4", "2:4"]
    for row in rows:
        assert {"bits_per_weight", "payload_bits", "gmse", "activation_gmse", "effective_bits", "rho"} <= set(row)
    assert rows[0]["rho"] == 1
    assert rows[0]["effective_bits"] is None
    assert "gmse_standard_error" in rows[2]
    assert "gmse_standard_error" not in rows[1]


def test_command_refuses_unknown_names_with_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert main(["capacity", "mxfp5"]) == 2
    assert "did you mean 'mxfp" in capsys.readouterr().err
    assert main(["capacity"]) == 2


def test_command_draws_effective_bits_and_says_when_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ["w2-quest", "w2-lloyd", "w4a4-quest", "mxfp4", "dense"]
    assert main(["capacity", *names, "--figure", str(tmp_path / "bits.svg")]) == 0
    drawn = (tmp_path / "bits.svg").read_text()
    assert all(label in drawn for label in ("mxfp4", "quest", "lloyd", "rate-distortion"))
    assert "rho is a prior" in capsys.readouterr().out
    assert main(["capacity", *names, "--figure", str(tmp_path / "bits.xyz")]) == 2
    assert "svg" in capsys.readouterr().err


def test_capacity_of_a_study_knows_its_own_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    smoke = Path(__file__).parent / "studies" / "smoke.yaml"
    own = "{name: w3g64, weights: {grid: int3-narrow, group: 64, scale: absmax, scale_format: float16, gradient: ste}}"
    study = smoke.read_text(encoding="utf-8").replace("[dense, w4]", f"[dense, {own}]")
    (tmp_path / "study.yaml").write_text(study, encoding="utf-8")
    assert main(["capacity", "--study", str(tmp_path / "study.yaml"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["representation"] for row in rows] == ["dense", "w3g64"]
    assert rows[1]["bits_per_weight"] == pytest.approx(3 + 16 / 64)
    assert main(["capacity", "w3g64", "--study", str(tmp_path / "study.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows[1:]
