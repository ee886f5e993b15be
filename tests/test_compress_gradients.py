"""Gradient estimators and masks against the rules as their papers write them, in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from qpipe.compress.linear import CompressedLinear, make_linear
from qpipe.compress.masks import gradient_mask, select, sparsity_at
from qpipe.compress.prepare import prepare
from qpipe.compress.quantize import compress
from qpipe.compress.trained import gradient_factor
from qpipe.errors import QpipeError
from qpipe.formats import Mask, TensorFormat, parse_grid, resolve

DOUBLE = torch.float64


def run(
    part: TensorFormat, x: Tensor, scale: Tensor | None = None, count: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, and gradients of sum(g * value) with g = 1, 2, 3, ..., to x and scale."""
    x = x.clone().requires_grad_()
    scale = None if scale is None else scale.clone().requires_grad_()
    value = compress(x, prepare(part), scale=scale, scale_count=count, training=True)
    (value * upstream(x)).sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad, None if scale is None else scale.grad


def upstream(x: Tensor) -> Tensor:
    return torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)


def test_straight_through_passes_everything_and_clip_only_the_range():
    x = torch.tensor([[-9.0, -1.0, 0.1, 0.9, 2.0, 9.0]], dtype=DOUBLE)
    part = TensorFormat(grid="ternary", scale="absmean", gradient="ste")
    _, gradient, _ = run(part, x)
    assert torch.equal(gradient, upstream(x))
    _, gradient, _ = run(part.model_copy(update={"gradient": "clip"}), x)
    assert torch.equal(gradient, upstream(x) * (x.abs() <= x.abs().mean()))


def test_trust_on_floating_point_uses_half_of_the_largest_gap():
    x = torch.randn(4, 64, dtype=DOUBLE) * 2
    value, gradient, _ = run(TensorFormat(grid="e2m1", scale="gaussian", gradient="trust"), x)
    unit = 0.4870795 * x.square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(gradient, upstream(x) * ((value - x).abs() <= unit))  # E2M1's largest gap is 2 units


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lsq_follows_its_paper(bits: int):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.randn(6, 50, dtype=DOUBLE)
    s = torch.rand(6, 1, dtype=DOUBLE) * 0.3 + 0.2
    value, to_x, to_s = run(resolve(f"w{bits}-lsq").weights, x, s, count=x.numel())  # type: ignore[arg-type]
    y = x / s
    torch.testing.assert_close(value, s * y.clamp(low, high).round())
    inside = (y >= low) & (y <= high)
    assert torch.equal(to_x, upstream(x) * inside)
    slope = torch.where(inside, y.round() - y, y.clamp(low, high))
    torch.testing.assert_close(to_s, (upstream(x) * slope).sum(-1, keepdim=True) / math.sqrt(x.numel() * high))


def test_lsq_scale_slope_is_the_true_derivative_where_rounding_is_fixed_or_saturated():
    # Outside the range value = s * end: the written slope must equal a finite difference.
    x = torch.tensor([[10.0, -10.0]], dtype=DOUBLE)
    part = resolve("w3-lsq").weights
    assert part is not None
    s = torch.tensor([[0.7]], dtype=DOUBLE)
    _, _, to_s = run(part, x, s)
    step = 1e-6
    plus, minus = (compress(x, prepare(part), scale=s + d) for d in (step, -step))
    difference = ((plus - minus) / (2 * step) * upstream(x)).sum()
    assert float(to_s) == pytest.approx(float(difference) * gradient_factor(parse_grid("int3-tread"), 1), rel=1e-6)


def test_pact_clips_and_learns_only_from_saturated_numbers():
    x = torch.tensor([[-3.0, -0.4, 0.2, 0.9, 5.0]], dtype=DOUBLE)
    alpha = torch.tensor([[1.0]], dtype=DOUBLE)
    value, to_x, to_alpha = run(resolve("w4-pact").weights, x, alpha)  # type: ignore[arg-type]
    torch.testing.assert_close(value, (x.clamp(-1, 1) * 7).round() / 7)
    assert to_x.tolist() == [[0, 2, 3, 4, 0]]
    assert float(to_alpha) == pytest.approx((-1 * 1 + 1 * 5) / math.sqrt(7))


# Vectors of the stretched-elastic quantizer, computed by hand from the authors' definition (2502.02631).
SEQ2 = {-1: -0.75, -0.6: -0.75, -0.5001: -0.75, -0.4: -0.25, -0.1: -0.25, 0.1: 0.25, 0.4: 0.25, 0.6: 0.75, 1: 0.75}
SEQ3 = {0.33: 0.0, 0.34: 2 / 3, 1: 2 / 3, -0.34: -2 / 3, -5.0: -2 / 3}
SEQ1 = {-0.2: -1.0, 0.3: 1.0, 4.0: 1.0}


@pytest.mark.parametrize(("name", "vectors"), [("w2-seq", SEQ2), ("w1.58-seq", SEQ3), ("w1-seq", SEQ1)])
@pytest.mark.parametrize("alpha", [1.0, 0.37])
def test_stretched_elastic_values(name: str, vectors: dict[float, float], alpha: float):
    x = torch.tensor([list(vectors)], dtype=DOUBLE) * alpha
    value, _, _ = run(resolve(name).weights, x, torch.tensor([[alpha]], dtype=DOUBLE))  # type: ignore[arg-type]
    torch.testing.assert_close(value / alpha, torch.tensor([list(vectors.values())], dtype=DOUBLE))


@pytest.mark.parametrize(("name", "top"), [("w2-seq", 0.75), ("w1.58-seq", 2 / 3), ("w1.58-seq-published", 1.0)])
def test_stretched_elastic_gradients(name: str, top: float):
    x = torch.randn(5, 30, dtype=DOUBLE)
    alpha = torch.rand(5, 1, dtype=DOUBLE) + 0.3
    value, to_x, to_alpha = run(resolve(name).weights, x, alpha, count=x.numel())  # type: ignore[arg-type]
    y = x / alpha
    inside = y.abs() <= 0.99
    assert torch.equal(to_x, upstream(x) * inside)
    slope = torch.where(inside, value / alpha - y, y.sign() * top)
    expected = (upstream(x) * slope).sum(-1, keepdim=True) / math.sqrt(x.numel())
    torch.testing.assert_close(to_alpha, expected)


def test_one_bit_elastic_scale_learns_from_signs():
    x = torch.tensor([[-2.0, -0.5, 0.25, 3.0]], dtype=DOUBLE)
    _, to_x, to_alpha = run(resolve("w1-seq").weights, x, torch.tensor([[1.0]], dtype=DOUBLE))  # type: ignore[arg-type]
    assert to_x.tolist() == [[0, 2, 3, 0]]
    assert float(to_alpha) == -1 - 2 + 3 + 4


@pytest.mark.parametrize(("bits", "factor"), [(1, 4.8828e-4), (2, 4.8828e-4), (3, 2.8191e-4), (4, 1.8455e-4)])
def test_gradient_factor_of_a_1024_by_4096_matrix(bits: int, factor: float):
    assert gradient_factor(parse_grid(f"int{bits}"), 1024 * 4096) == pytest.approx(factor, rel=3e-5)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("w1-seq", lambda w: w.abs().mean(-1, keepdim=True)),
        ("w1.58-seq", lambda w: w.abs().amax(-1, keepdim=True)),
        ("w2-seq", lambda w: w.abs().amax(-1, keepdim=True)),
        ("w3-seq", lambda w: w.abs().amax(-1, keepdim=True) / 3),
        ("w4-seq", lambda w: w.abs().amax(-1, keepdim=True) / 7),
        ("w4-lsq", lambda w: 2 * w.abs().mean(-1, keepdim=True) / math.sqrt(7)),
    ],
)
def test_trained_scales_start_where_their_papers_start_them(name: str, rule: object):
    layer = CompressedLinear(64, 8, resolve(name))
    layer(torch.randn(2, 64))
    torch.testing.assert_close(layer.weight_scale, rule(layer.weight).detach())  # type: ignore[operator]


def test_loaded_scales_are_not_started_again():
    layer = CompressedLinear(64, 8, resolve("w4a4-lsq"))
    layer(torch.randn(2, 64))
    with torch.no_grad():
        layer.weight_scale.mul_(3)  # type: ignore[union-attr]
        layer.activation_scale.mul_(3)  # type: ignore[union-attr]
    copy = CompressedLinear(64, 8, resolve("w4a4-lsq"))
    copy.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(copy(x), layer(x))


def test_powerpropagation_differentiates_its_reparameterisation():
    layer = make_linear(6, 1, resolve({"name": "p", "weights": {"power": 2.5}}), dtype=DOUBLE)
    stored = layer.weight.detach().clone()
    layer(torch.ones(1, 6, dtype=DOUBLE)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2.5 * stored.abs() ** 1.5)
    dense = torch.randn(1, 6, dtype=DOUBLE)
    layer.load_dense_weight(dense)  # type: ignore[operator]
    torch.testing.assert_close(layer.compressed_weight(), dense)  # type: ignore[operator]


def test_quant_noise_leaves_half_exact_in_training_and_nothing_in_evaluation():
    torch.manual_seed(0)
    layer = make_linear(100, 100, resolve("w2-quantnoise"))
    full = layer.eval().compressed_weight()
    some = layer.train().compressed_weight()
    exact = torch.isclose(some, layer.weight) & ~torch.isclose(full, layer.weight)
    assert 0.4 < float(exact.float().mean()) < 0.6
    assert bool((exact | torch.isclose(some, full)).all())


def test_uniform_noise_has_the_variance_of_a_step_and_rounds_in_evaluation():
    torch.manual_seed(0)
    layer = make_linear(512, 512, resolve("w4-diffq"))
    step = layer.weight.detach().abs().amax(-1, keepdim=True) / 7.5
    noise = (layer.train().compressed_weight() - layer.weight.detach()) / step
    assert float(noise.abs().max()) <= 0.5 + 1e-5
    assert float(noise.var()) == pytest.approx(1 / 12, rel=0.01)
    levels = layer.eval().compressed_weight() / step
    torch.testing.assert_close(levels - 0.5, (levels - 0.5).round(), atol=1e-3, rtol=0)


def test_injected_noise_has_its_ideal_error_in_evaluation_too():
    torch.manual_seed(0)
    layer = make_linear(512, 512, resolve("noise3")).eval()
    relative = (layer.compressed_weight() - layer.weight.detach()).var() / layer.weight.detach().var()
    assert float(relative) == pytest.approx(4**-3, rel=0.02)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("backward", ["rms", "banded", "banded-area"])
def test_backward_masks_follow_the_paper(backward: str, share: float):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 50))) * 0.02
    mask = Mask(sparsity=share, backward=backward, band=0.2)  # type: ignore[arg-type]
    keep = select(x, mask)
    magnitude, rms = x.abs().numpy(), math.sqrt(float(x.square().mean()))
    t_k = np.sort(magnitude.flatten())[round(share * x.numel())]
    t_p = rms * norm.ppf(0.7)
    expected = {
        "rms": magnitude > t_p,
        "banded": (magnitude < min(t_p, t_k)) | (magnitude > max(t_p, t_k)),
        "banded-area": (magnitude < rms * norm.ppf(0.5 + 0.8 * (norm.cdf(t_k / rms) - 0.5))) | (magnitude >= t_k),
    }[backward]
    found = gradient_mask(x, keep, mask)
    assert found is not None
    assert np.array_equal(found.numpy(), expected)
    assert int(keep.sum()) == round((1 - share) * x.numel())


def test_end_points_of_the_banded_area_rule():
    x = torch.randn(30, 30, dtype=DOUBLE)
    whole = Mask(sparsity=0.5, backward="banded-area", band=1.0)
    none = Mask(sparsity=0.5, backward="banded-area", band=0.0)
    keep = select(x, whole)
    assert torch.equal(gradient_mask(x, keep, whole), keep)
    assert bool(gradient_mask(x, keep, none).all())  # type: ignore[union-attr]


def test_forward_mask_of_a_vanishing_band_is_magnitude_pruning():
    x = torch.randn(30, 30, dtype=DOUBLE)
    mask = Mask(sparsity=0.5, backward="banded", band=1e-12)
    keep = select(x, mask)
    strictly_above = keep & (x.abs() > x.abs()[keep].min())  # the paper's rule leaves out the threshold itself
    assert torch.equal(gradient_mask(x, keep, mask), strictly_above)


def test_cubic_schedule_follows_its_formula():
    mask = Mask(sparsity=0.8, schedule="cubic", start=0.2, end=0.6, updates=40)
    for fraction in (0, 0.2, 0.3, 0.5, 0.6, 1):
        p = min(max((fraction - 0.2) / 0.4, 0), 1)
        assert sparsity_at(mask, fraction) == pytest.approx(0.8 * (1 - (1 - p) ** 3), abs=1e-9)


def test_ramp_towards_a_pattern_ends_in_the_pattern():
    x = torch.randn(16, 64)
    mask = Mask(n=2, m=4, schedule="cubic")
    final = select(x, mask)
    assert torch.equal(select(x, mask, torch.tensor(0.5)), final)
    early = select(x, mask, torch.tensor(0.75))
    assert int(early.sum()) == 768
    assert bool((early | ~final).all())


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
def test_patterns_keep_the_largest_of_each_block(pattern: str):
    n, m = map(int, pattern.split(":"))
    x = torch.randn(8, 64)
    keep = select(x, resolve(pattern).weights.mask)  # type: ignore[union-attr, arg-type]
    for block, kept in zip(x.reshape(-1, m), keep.reshape(-1, m), strict=True):
        assert set(block.abs().topk(n).indices.tolist()) == set(kept.nonzero().flatten().tolist())


def test_top_k_activations_are_chosen_per_token():
    layer = make_linear(100, 100, resolve("as50"), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(100))
    x = torch.randn(7, 100) * torch.logspace(-3, 3, 7).unsqueeze(-1)
    y = layer(x)
    assert (y != 0).sum(-1).tolist() == [50] * 7
    for row, out in zip(x, y, strict=True):
        assert torch.equal(out, torch.where(row.abs() >= row.abs().sort().values[50], row, 0))


def test_nothing_is_ever_nan_for_zeros_and_refused_for_wrong_progress():
    from qpipe.compress import set_progress

    with pytest.raises(QpipeError, match="progress"):
        set_progress(torch.nn.Linear(2, 2), 1.5)
    for name in ("w4a4", "w2-mse", "mxfp4", "nvfp4", "w2-binary-optimal", "bitnet", "w4-lsq", "w2-seq", "s50-rbbm"):
        layer = make_linear(64, 8, resolve(name))
        with torch.no_grad():
            layer.weight.zero_()
        y = layer(torch.zeros(2, 64))
        y.sum().backward()
        assert torch.isfinite(y).all(), name
        assert torch.isfinite(layer.weight.grad).all(), name
