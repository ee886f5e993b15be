"""Colours, axes and labels: what figures are drawn with."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from qpipe.report.axes import format_number, linear_ticks, log_ticks, numeric_axis
from qpipe.report.palette import DARKEST, INK, LIGHTEST, looks, oklch
from qpipe.report.static import spread

QUEST = [
    "dense",
    *(f"w{b}-quest" for b in (1, 2, 3, 4)),
    *(f"w{b}a{b}-quest" for b in (1, 2, 3, 4, 8)),
    *(f"w{b}a{b}-quest-norotation" for b in (1, 2, 3, 4, 8)),
    "fp4-quest",
    "2:4+w4a4-quest",
]


@pytest.mark.parametrize(
    ("coordinates", "color"),
    [  # sRGB primaries in OKLCH as CSS Color Module Level 4 gives them
        ((1.0, 0.0, 0.0), "#ffffff"),
        ((0.0, 0.0, 0.0), "#000000"),
        ((0.62796, 0.25768, 29.234), "#ff0000"),
        ((0.86644, 0.29483, 142.495), "#00ff00"),
        ((0.45201, 0.31321, 264.052), "#0000ff"),
    ],
)
def test_oklch_agrees_with_css(coordinates, color):
    assert oklch(*coordinates) == color


def test_looks_tell_representations_apart():
    chosen = looks(QUEST)
    assert chosen["dense"].color == INK
    assert len(set(chosen.values())) == len(QUEST)
    colors = {name: np.array([int(look.color[i : i + 2], 16) for i in (1, 3, 5)]) for name, look in chosen.items()}
    for one, two in itertools.combinations(QUEST, 2):
        different_marker = chosen[one].marker != chosen[two].marker
        assert different_marker or np.abs(colors[one] - colors[two]).max() > 40, (one, two)


def test_looks_depend_on_the_set_of_names_only():
    assert looks(QUEST) == looks(reversed(QUEST))
    assert looks(["w4", "w2", "dense"])["w4"] == looks(["dense", "s50", "w2", "w4"])["w4"]  # families keep their hue


def test_looks_of_a_hundred_families():
    names = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(100)]
    assert len(set(looks(names).values())) == 101


@pytest.mark.parametrize("lightness", [LIGHTEST, DARKEST])
@pytest.mark.parametrize("background", ["#ffffff", "#15171a"])
def test_every_hue_has_wcag_contrast_on_both_pages(lightness, background):
    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for hue in range(0, 360, 5):
        light, dark = sorted((luminance(oklch(lightness, 0.15, hue)), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (30_482_560, "count", "30.5M"),
        (822_151_168, "count", "822M"),
        (999_999_999, "count", "1B"),
        (2.5e9, "count", "2.5B"),
        (80e12, "count", "80T"),
        (950, "count", "950"),
        (-0.5, "number", "−0.5"),
    ],
)
def test_format_number(value, style, text):
    assert format_number(value, style) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 9))
def test_linear_ticks_are_equally_spaced_and_inside(low, span, most):
    ticks = linear_ticks(low, low + span, most)
    assert 1 <= len(ticks) <= most + 1
    assert low - 1e-6 * span <= ticks[0]
    assert ticks[-1] <= low + span * (1 + 1e-6)
    if len(ticks) > 2:
        assert np.diff(ticks) == pytest.approx(np.full(len(ticks) - 1, ticks[1] - ticks[0]), rel=1e-4)


@given(st.floats(-6, 12), st.floats(0.01, 12), st.integers(4, 9))
def test_log_ticks_are_few_sorted_and_inside(exponent, decades, most):
    low, high = 10**exponent, 10 ** (exponent + decades)
    ticks = log_ticks(low, high, most)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= most + 1
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert len(ticks) >= (2 if decades > 1 else 1)


def test_axis_of_one_value_and_of_none():
    low, high = numeric_axis("N", [5e6], log=True).limits
    assert low < 5e6 < high
    low, high = numeric_axis("residual", [float("nan"), float("inf")]).limits
    assert np.isfinite([low, high]).all()
    assert low < high


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=6), st.floats(0.01, 0.16))
def test_spread_is_the_least_squares_solution(positions, separation):
    places = np.array(spread(positions, separation))
    order = np.argsort(positions, kind="stable")
    assert (np.diff(places[order]) >= separation - 1e-9).all()
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9
    wishes = np.array(positions)[order]
    gaps = {"type": "ineq", "fun": lambda p: np.diff(p) - separation}
    start = np.arange(len(wishes)) * separation
    best = minimize(
        lambda p: ((p - wishes) ** 2).sum(), start, method="SLSQP", bounds=[(0, 1)] * len(wishes),
        constraints=[gaps] if len(wishes) > 1 else [], options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert ((places[order] - wishes) ** 2).sum() <= best.fun + 1e-6


def test_spread_of_more_labels_than_fit_keeps_them_apart():
    places = spread([0.5] * 30, 0.05)
    assert np.diff(sorted(places)) == pytest.approx(np.full(29, 0.05))
