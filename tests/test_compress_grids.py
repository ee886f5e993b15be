"""Grids and rounding against standards, other libraries and brute force."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from qpipe.compress.binary import binary_codes, binary_scales, binary_values
from qpipe.compress.codebooks import code_book, e8_magnitudes
from qpipe.compress.grids import levels
from qpipe.compress.prepare import prepare
from qpipe.compress.quantize import compress
from qpipe.compress.rotation import rotate
from qpipe.compress.rounding import decode, encode, round_to_grid
from qpipe.compress.scales import _search_at_once, absolute_maximum, find_scale
from qpipe.compress.vectors import decode_vectors, nearest_codes
from qpipe.formats import TensorFormat, parse_grid, resolve

SCALAR = ["int1", "int2", "int4", "int8", "int3-tread", "int8-tread", "int4-narrow", "ternary"]
SCALAR += ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2", "e1m2", "e2m5", "nf4", "gauss3", "gauss16"]


def nearest_by_brute_force(x: Tensor, word: str) -> Tensor:
    table = torch.from_numpy(levels(word).copy())
    return table[(x.unsqueeze(-1) - table).abs().argmin(-1)]


@pytest.mark.parametrize("word", SCALAR)
def test_rounding_is_nearest_and_idempotent(word: str):
    top = levels(word)[-1]
    x = torch.linspace(-1.3 * top, 1.3 * top, 20011, dtype=torch.float64)
    rounded = round_to_grid(x.clone(), parse_grid(word))
    torch.testing.assert_close(rounded, nearest_by_brute_force(x, word))
    assert torch.equal(round_to_grid(rounded.clone(), parse_grid(word)), rounded)


@pytest.mark.parametrize("word", SCALAR)
def test_codes_name_the_values(word: str):
    grid = parse_grid(word)
    values = round_to_grid(3 * torch.randn(1000), grid)
    codes = encode(values, grid)
    assert 0 <= int(codes.min()) <= int(codes.max()) < grid.codes
    assert torch.equal(decode(codes, grid, values), values)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("int1", [-0.5, 0.5]),
        ("int2", [-1.5, -0.5, 0.5, 1.5]),
        ("int2-tread", [-2, -1, 0, 1]),
        ("int2-narrow", [-1, 0, 1]),
        ("ternary", [-1, 0, 1]),
        ("e2m1", [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),  # OCP Microscaling 1.0
    ],
)
def test_levels_are_the_documented_ones(word: str, expected: list[float]):
    assert levels(word).tolist() == expected


@pytest.mark.parametrize(("word", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_levels_are_those_of_torch(word: str, dtype: torch.dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = torch.unique(every[torch.isfinite(every)])
    assert levels(word).tolist() == finite.tolist()
    x = torch.linspace(-levels(word)[-1], levels(word)[-1], 30001, dtype=torch.float32)
    assert torch.equal(round_to_grid(x.clone(), parse_grid(word)), x.to(dtype).float())


def test_nf4_levels_are_the_published_ones():
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    np.testing.assert_allclose(levels("nf4"), published, atol=2e-6)


def test_ties_go_where_documented():
    assert round_to_grid(torch.tensor([0.0, 1.0, -1.0]), parse_grid("int2")).tolist() == [0.5, 1.5, -0.5]
    assert round_to_grid(torch.tensor([0.5, 1.5, -0.5]), parse_grid("int4-tread")).tolist() == [0, 2, 0]
    assert round_to_grid(torch.tensor([2.5, 5.0, 0.25]), parse_grid("e2m1")).tolist() == [2, 4, 0]


@pytest.mark.parametrize("count", [3, 8, 256])
def test_lloyd_max_levels_are_the_means_of_their_cells(count: int):
    values = levels(f"gauss{count}")
    x = np.random.default_rng(0).standard_normal(2**20)
    cell = np.searchsorted((values[1:] + values[:-1]) / 2, x)
    size = np.bincount(cell, minlength=count)
    mean = np.bincount(cell, weights=x, minlength=count) / np.maximum(size, 1)
    heavy = size > 200
    spread = np.gradient(values)[heavy] / np.sqrt(12 * size[heavy])
    assert np.all(np.abs(mean - values)[heavy] < 5 * np.maximum(spread, 1e-6))
    assert np.all(np.diff(values) > 0)


def test_e8_ball_is_made_of_lattice_points_and_searched_exactly():
    grid = parse_grid("e8x65536")
    points = decode_vectors(torch.arange(65536).unsqueeze(-1), grid, torch.zeros(1, dtype=torch.float64))
    assert len(torch.unique(points, dim=0)) == 65536
    shift = torch.where(torch.arange(65536) < 32768, 0.25, -0.25).unsqueeze(-1)
    doubled = (2 * (points - shift)).round()
    assert torch.equal(doubled / 2, points - shift)
    assert bool((doubled % 2 == 1).all())
    assert bool(((points - shift).sum(-1) % 2 == 0).all())
    assert sorted(set((e8_magnitudes() ** 2).sum(1).tolist())) == [2, 4, 6, 8, 10, 12]
    x = torch.randn(200, 8, dtype=torch.float64)
    found = decode_vectors(nearest_codes(x, grid), grid, x)
    torch.testing.assert_close((found - x).norm(dim=-1), torch.cdist(x, points).amin(-1))


@pytest.mark.parametrize("word", ["vq2x16", "vq4x256"])
def test_code_books_are_searched_exactly(word: str):
    grid = parse_grid(word)
    book = torch.from_numpy(code_book(grid.dimension, grid.codes)).double()
    x = torch.randn(32, 64, dtype=torch.float64)
    codes = nearest_codes(x, grid)
    flat = x.reshape(-1, grid.dimension)
    assert torch.equal(codes.flatten(), torch.cdist(flat, book).argmin(-1))
    assert torch.equal(decode_vectors(codes, grid, x).reshape(-1, grid.dimension), book[codes.flatten()])


def test_greedy_binary_codes_follow_the_recursion():
    x = torch.randn(3, 40, dtype=torch.float64)
    scales = binary_scales(x, parse_grid("binary3"))
    rest, expected = x, torch.zeros_like(x)
    for _ in range(3):
        v = rest.abs().mean(-1, keepdim=True)
        expected = expected + v * rest.sign()
        rest = x - expected
    torch.testing.assert_close(binary_values(binary_codes(x, scales), scales), expected)


def test_optimal_two_bit_codes_are_optimal():
    x = torch.randn(7, dtype=torch.float64)
    scales = binary_scales(x[None], parse_grid("binary2-optimal"))
    ours = (binary_values(binary_codes(x[None], scales), scales) - x).square().sum()
    best = np.inf
    signs = list(itertools.product([-1.0, 1.0], repeat=7))
    for first, second in itertools.combinations(signs, 2):  # least squares over every pair of sign vectors
        basis = np.array([first, second]).T
        best = min(best, np.linalg.lstsq(basis, x.numpy(), rcond=None)[1].sum() or np.inf)
    assert float(ours) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("block", [2, 16, 128])
def test_rotation_equals_the_hadamard_matrix_and_is_its_own_inverse(block: int):
    from scipy.linalg import hadamard

    x = torch.randn(3, 2 * block, dtype=torch.float64)
    expected = x.unflatten(-1, (2, block)) @ torch.from_numpy(hadamard(block) / np.sqrt(block))
    torch.testing.assert_close(rotate(x, block), expected.flatten(-2))
    torch.testing.assert_close(rotate(rotate(x, block), block), x)


def test_mx_scales_and_values_equal_torchao():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(64, 128) * torch.logspace(-3, 3, 64).unsqueeze(-1)
    for name, element in (("mxfp8", torch.float8_e4m3fn), ("mxfp4", torch.float4_e2m1fn_x2)):
        theirs = mx.MXTensor.to_mx(x, element, 32).dequantize(torch.float32)
        ours = compress(x, prepare(resolve(name).weights))
        assert torch.equal(ours, theirs), name


def test_nvfp4_equals_torchao():
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(64, 128)
    tensor_scale = x.abs().max() / (448.0 * 6.0)
    theirs = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize(torch.float32)
    ours = compress(x, prepare(resolve("nvfp4").weights))
    differs = (ours - theirs).abs() > 1e-5 * theirs.abs()
    assert differs.float().mean() < 1e-3  # products in another order may fall to the other side of a border


def test_integer_groups_equal_torchao():
    quant = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(16, 256)
    scale = x.unflatten(-1, (-1, 32)).abs().amax(-1) / 7
    zero = torch.zeros_like(scale, dtype=torch.int32)
    arguments = ((1, 32), scale, zero, torch.int8)
    codes = quant.quantize_affine(x, *arguments, quant_min=-7, quant_max=7)
    theirs = quant.dequantize_affine(codes, *arguments, quant_min=-7, quant_max=7)
    ours = TensorFormat(grid="int4-narrow", group=32, scale="absmax", gradient="ste")
    torch.testing.assert_close(compress(x, prepare(ours)), theirs)


def test_float16_scales_are_rounded_before_they_are_used():
    x = torch.randn(16, 256)
    scale = (x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 7).half().float()
    expected = (x.unflatten(-1, (-1, 32)) / scale).round().clamp(-7, 7) * scale
    torch.testing.assert_close(compress(x, prepare(resolve("w4-group32").weights)), expected.flatten(-2))


def test_searched_scale_is_no_worse_than_any_other_on_the_list():
    part = prepare(resolve("w3-mse").weights)
    x = torch.randn(4, 300, dtype=torch.float64)
    scale = find_scale(x, part)
    error = (compress(x, part) - x).square().mean(-1)
    for share in np.linspace(0.1, 1.1, 81):
        other = x.abs().amax(-1, keepdim=True) / 3 * share
        value = (x / other).round().clamp(-4, 3) * other
        assert bool(((value - x).square().mean(-1) >= error - 1e-12).all())
    assert scale.shape == (4, 1)


@pytest.mark.parametrize("name", ["w3-mse", "w1.58-mse"])
def test_candidates_searched_at_once_and_one_by_one_give_the_same_scale(name: str):
    part = prepare(resolve(name).weights)
    x = torch.randn(40, 96, dtype=torch.float64)
    x[3], x[7] = 0, torch.arange(96) % 2  # all zero; and where many candidates are equally good
    assert part.high is not None
    found = _search_at_once(x, absolute_maximum(x) / part.high, part)
    torch.testing.assert_close(found, find_scale(x, part), rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_search_finds_the_scale_too():
    part = prepare(resolve("w3-mse").weights)
    x = torch.randn(40, 96)
    found = torch.compile(find_scale, dynamic=False)(x, part)
    torch.testing.assert_close(found, find_scale(x, part))
