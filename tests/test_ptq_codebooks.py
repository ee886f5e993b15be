"""Levels, distortion tables, and the fit of scale and offset."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from qpipe.ptq.codebooks import KINDS, SEARCH, code_book, distortion, searched_distortion
from qpipe.ptq.fitting import Rounder, decode, depth_costs, encode, fit_groups, tables

# Sampled with 2e6 numbers by an independent script: distortion of the Laplace compander without and with scale search.
NOTED = {
    "gauss": {1: (0.816, 0.364), 2: (0.307, 0.144), 3: (0.0631, 0.0541), 4: (0.0153, 0.0134), 5: (0.0038, 0.0033)},
    "laplace": {1: (1.082, 0.502), 2: (0.276, 0.196), 3: (0.0697, 0.0633), 4: (0.0175, 0.0172), 5: (0.0044, 0.0044)},
}


@pytest.mark.parametrize("density", ["gauss", "laplace"])
@pytest.mark.parametrize("depth", range(1, 6))
def test_compander_reproduces_sampled_distortions(density, depth):
    plain, searched = NOTED[density][depth]
    book = code_book("laplace", depth)
    tolerance = max(0.005 * plain, 5e-5)
    assert distortion(book, density) == pytest.approx(plain, abs=tolerance)
    assert searched_distortion(book, density)[0] == pytest.approx(searched, abs=tolerance)


@pytest.mark.parametrize("density", ["gauss", "laplace"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_distortion_is_the_integral(kind, depth, density):
    book = code_book(kind, depth)
    law = stats.norm() if density == "gauss" else stats.laplace(scale=np.sqrt(0.5))
    edges = np.concatenate([[-40], book.borders, [40]])
    pieces = [
        integrate.quad(lambda x, v=v: (x - v) ** 2 * law.pdf(x), a, b, points=[0] if a < 0 < b else None, limit=200)[0]
        for v, a, b in zip(book.levels, edges[:-1], edges[1:], strict=True)
    ]
    assert distortion(book, density) == pytest.approx(sum(pieces), rel=1e-6)


def test_high_rate_constants():
    """Panter-Dite: 9/2 for the compander matched to Laplace, sqrt3 pi / 2 for the one matched to Gauss."""
    assert distortion(code_book("laplace", 8), "laplace") * 4**8 == pytest.approx(4.5, rel=0.01)
    assert distortion(code_book("gauss", 8), "gauss") * 4**8 == pytest.approx(np.sqrt(3) * np.pi / 2, rel=0.01)
    assert distortion(code_book("laplace", 8), "gauss") * 4**8 == pytest.approx(3.87, rel=0.01)


@pytest.mark.parametrize(("depth", "published"), [(1, 0.36338), (2, 0.117482), (3, 0.0345478), (4, 0.00950101)])
def test_lloyd_max_has_the_published_error(depth, published):
    """Max 1960, table I: 0.3634, 0.1175, 0.03454, 0.009497; more digits from the grids of HIGGS."""
    assert distortion(code_book("lloyd-max", depth), "gauss") == pytest.approx(published, rel=2e-5)


@pytest.mark.parametrize(("depth", "published"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_tuned_uniform_has_the_published_error(depth, published):
    """Max 1960, table II."""
    assert distortion(code_book("uniform", depth), "gauss") == pytest.approx(published, rel=4e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_fall_and_stay_above_the_rate_distortion_bound(kind):
    table = np.array([searched_distortion(code_book(kind, depth), "gauss")[0] for depth in range(9)])
    assert table[0] == 1
    assert (np.diff(table) < 0).all()
    assert (table >= 4.0 ** -np.arange(9)).all()


def groups_of(law, count=64, size=512, seed=0, shift=0.0):
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(count, size)) if law == "gauss" else generator.laplace(size=(count, size)) / 2**0.5
    return torch.tensor(0.02 * numbers + shift, dtype=torch.float32)


def grid_search(weights, depth, kind):
    """CVXQ's own search: 33 scales, then 33 offsets, by plain squared error, in float64."""
    book = code_book(kind, depth)
    w = weights.double().numpy()
    center, deviation = np.median(w, axis=1), np.sqrt(((w - np.median(w, axis=1, keepdims=True)) ** 2).mean(axis=1))

    def error(scale, offset):
        y = (w - offset[:, None]) / scale[:, None]
        value = offset[:, None] + scale[:, None] * book.levels[np.searchsorted(book.borders, y)]
        return ((w - value) ** 2).sum(axis=1)

    errors = np.stack([error(deviation * c, center) for c in SEARCH])
    scale = deviation * SEARCH[errors.argmin(axis=0)]
    return np.stack([error(scale, center + shift * scale) for shift in np.linspace(-2, 2, 33)]).min(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", ["gauss", "laplace"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_fit_is_no_worse_than_the_searched_grid(kind, law, depth):
    weights = groups_of(law, shift=0.004)
    fit = fit_groups(weights, torch.full((64,), depth), kind, offset=True)
    assert float(fit.error.double().sum()) <= grid_search(weights, depth, kind).sum()


def half(x):
    return x.astype(np.float16).astype(np.float64)


def plain_search(weights, depth, kind, offset):
    """The documented search with a code for every weight, in float64: least squared error of each group."""
    book = code_book(kind, depth)
    w = weights.double().numpy()
    mean = half(w.mean(axis=1)) if offset else np.zeros(len(w))
    deviation = w.std(axis=1) if offset else np.sqrt((w**2).mean(axis=1))
    best = np.zeros(len(w)), mean, np.full(len(w), np.inf)

    def attempt(scale, shift):
        nonlocal best
        scale, shift = half(scale), half(shift)
        code = np.searchsorted(book.borders, (w - shift[:, None]) / scale[:, None])
        error = ((w - shift[:, None] - scale[:, None] * book.levels[code]) ** 2).sum(axis=1)
        won = error < best[2]
        best = tuple(np.where(won, new, old) for new, old in zip((scale, shift, error), best, strict=True))

    start = searched_distortion(book, "gauss")[1]
    for factor in 2.0 ** np.linspace(-0.75, 0.75, 7):
        attempt(deviation * start * factor, mean)
    for step in (0.2, 0.1, 0.05, 0.025):
        for sign in (1, -1):
            attempt(best[0] * 2.0 ** (sign * step), best[1])
        for sign in (1, -1) if offset else ():
            attempt(best[0], best[1] + sign * step * best[0])
    return best[2]


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_running_sums_find_what_coding_every_weight_finds(kind, depth, offset):
    weights = groups_of("laplace", count=32, size=200, shift=0.003)
    fit = fit_groups(weights, torch.full((32,), depth), kind, offset)
    # A trial that ends in a tie can go either way; what is found is equally good.
    np.testing.assert_allclose(fit.error.numpy(), plain_search(weights, depth, kind, offset), rtol=1e-3)
    total = plain_search(weights, depth, kind, offset).sum()
    assert float(fit.error.double().sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_depth_are_looked_up_together(kind):
    """Among them borders themselves, and numbers far outside."""
    generator = np.random.default_rng(0)
    book = tables(kind, torch.device("cpu"))
    numbers = [generator.normal(size=2000) * 3, [0.0, -0.0, 1e30, -1e30, 1e-8, np.inf, -np.inf]]
    numbers += [code_book(kind, depth).borders.astype(np.float32) for depth in range(9)]
    y = np.concatenate(numbers).astype(np.float32)
    for depth in range(9):
        expected = np.searchsorted(book.borders[depth, : 2**depth - 1].numpy(), y)
        depths, ones = torch.full((len(y),), depth), torch.ones(len(y))
        found = Rounder(depths, ones, 0 * ones, book).codes(torch.from_numpy(y))
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("offset", [True, False])
def test_stated_errors_are_those_of_the_codes(offset):
    """Whatever depth, the error that allocation sees is the error that decoding the stored numbers gives."""
    weights = groups_of("laplace")
    depth = torch.arange(64) % 9
    fit = fit_groups(weights, depth, "lloyd-max", offset)
    book = tables("lloyd-max", torch.device("cpu"))
    values = decode(encode(weights, fit, book), depth, fit.scale, fit.offset, book)
    error = ((weights.double() - values.double()) ** 2).sum(dim=1)
    torch.testing.assert_close(fit.error.double(), error, rtol=1e-4, atol=1e-12)
    assert torch.equal(fit.scale, fit.scale.half().float())
    assert torch.equal(fit.offset, fit.offset.half().float())


def test_zero_bits_keep_the_mean():
    weights = groups_of("gauss", shift=0.01)
    fit = fit_groups(weights, torch.zeros(64, dtype=torch.int64), "laplace", offset=True)
    torch.testing.assert_close(fit.offset, weights.double().mean(1).half().float(), rtol=1e-3, atol=0)
    assert (fit.scale == 0).all()
    assert (fit_groups(weights, torch.zeros(64, dtype=torch.int64), "laplace", offset=False).offset == 0).all()


def test_eight_bits_are_lossless_to_rounding_and_costs_fall():
    weights = groups_of("gauss")
    costs = depth_costs(weights, "lloyd-max", offset=True)
    assert (costs.diff(dim=1) <= 0).all()
    assert float(costs[:, 8].sum() / weights.square().sum()) < 6e-5


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_groups_are_exact(kind):
    """Constant groups, all zeros, and evenly spaced weights."""
    weights = torch.stack([torch.full((64,), 0.25), torch.zeros(64), torch.linspace(-1, 1, 64)])
    fit = fit_groups(weights, torch.full((3,), 3), kind, offset=True)
    book = tables(kind, torch.device("cpu"))
    values = decode(encode(weights, fit, book), fit.depth, fit.scale, fit.offset, book)
    assert torch.equal(values[:2], weights[:2])
    assert torch.isfinite(values).all()
    assert float((values[2] - weights[2]).square().mean()) < 0.1 * float(weights[2].var())
