"""The compressed linear layer against float64 references written from the papers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from qpipe.compress import CompressedLinear, make_linear, set_progress
from qpipe.formats import resolve

QUEST_CLIP = {1: 0.79788456, 2: 1.49353462, 3: 2.05106835, 4: 2.51393058, 8: 3.88493868}  # authors' table


def block_hadamard(width: int, block: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return torch.block_diag(*[h / math.sqrt(block)] * (width // block))


def quest_reference(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Value and trust mask of 2502.05003, in float64."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    step = 2 * QUEST_CLIP[bits] * rms / (2**bits - 1)
    grid = (torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2) * step.unsqueeze(-1)
    value = grid.expand(*x.shape, -1).gather(-1, (x.unsqueeze(-1) - grid).abs().argmin(-1, keepdim=True)).squeeze(-1)
    if bits == 1:
        return value, x.abs() <= 1.3 * QUEST_CLIP[1] * rms
    return value, (value - x).abs() <= QUEST_CLIP[bits] * rms / (2**bits - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("width", "block"), [(256, 128), (192, 64), (40, 8)])
def test_quest_layer_equals_a_float64_reference_forward_and_backward(bits: int, width: int, block: int):
    generator = torch.Generator().manual_seed(bits)
    layer = make_linear(width, 48, resolve(f"w{bits}a{bits}-quest"), dtype=torch.float64)
    x = torch.randn(5, width, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 48, generator=generator, dtype=torch.float64)
    y = layer(x)
    y.backward(upstream)
    h = block_hadamard(width, block)
    xq, x_trust = quest_reference(x.detach() @ h, bits)
    wq, w_trust = quest_reference(layer.weight.detach() @ h, bits)
    torch.testing.assert_close(y, xq @ wq.T)
    torch.testing.assert_close(x.grad, ((upstream @ wq) * x_trust) @ h)
    torch.testing.assert_close(layer.weight.grad, ((upstream.T @ xq) * w_trust) @ h)


def test_weight_only_folds_the_rotation_into_the_weight():
    layer = make_linear(256, 64, resolve("w3"), dtype=torch.float64)
    x = torch.randn(7, 256, dtype=torch.float64)
    h = block_hadamard(256, 128)
    wq, _ = quest_reference(layer.weight.detach() @ h, 3)
    torch.testing.assert_close(layer(x), x @ h @ wq.T)
    torch.testing.assert_close(layer.compressed_weight(), wq @ h)


def test_two_of_four_keeps_the_two_largest_and_trains_only_them():
    layer = make_linear(8, 1, resolve("2:4"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]]))
    layer(torch.ones(1, 8)).sum().backward()
    expected = torch.tensor([[0.0, -3.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0]])  # equal magnitudes: the first two
    assert torch.equal(layer.compressed_weight(), expected)
    assert torch.equal(layer.weight.grad, (expected != 0).float())


def test_sparse_then_quantized_trusts_pruned_weights_near_zero():
    layer = make_linear(128, 16, resolve("2:4+w4"), dtype=torch.float64)
    layer(torch.eye(128, dtype=torch.float64)).sum().backward()
    h = block_hadamard(128, 128)
    rotated = layer.weight.detach() @ h
    value, _ = quest_reference(rotated, 4)
    order = rotated.abs().unflatten(-1, (-1, 4)).argsort(-1)
    keep = (order.argsort(-1) >= 2).flatten(-2)
    value = value * keep
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    trust = (value - rotated).abs() <= QUEST_CLIP[4] * rms / 15
    torch.testing.assert_close(layer.compressed_weight(), value @ h)
    torch.testing.assert_close(layer.weight.grad, (torch.ones(16, 128, dtype=torch.float64) @ h * trust) @ h)
    assert (trust & ~keep).any()
    assert (~trust & ~keep).any()


def test_unstructured_mask_keeps_the_exact_count():
    layer = make_linear(100, 30, resolve("s70"))
    assert int((layer.compressed_weight() != 0).sum()) == 900


def test_dense_is_a_plain_linear_layer():
    layer, x = make_linear(8, 4, resolve("dense")), torch.randn(3, 8)
    assert isinstance(layer, torch.nn.Linear)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", ["w4a4", "2:4", "s50", "w1.58", "w4e2m1", "2:4+w2"])
def test_evaluation_and_training_agree_and_a_zero_row_stays_zero(name: str):
    layer = make_linear(64, 16, resolve(name))
    with torch.no_grad():
        layer.weight[3] = 0
    x = torch.randn(4, 64)
    x[0] = 0
    trained = layer.train()(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)
    assert torch.isfinite(trained).all()
    assert (layer.compressed_weight()[3] == 0).all()
    assert (trained[0] == 0).all()


@pytest.mark.parametrize("name", ["w4a4", "2:4+w4", "s50"])
def test_meta_device_needs_no_memory_and_counts_parameters(name: str):
    layer = make_linear(640, 1792, resolve(name), device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 640 * 1792
    assert layer(torch.empty(3, 640, device="meta")).shape == (3, 1792)


def test_autocast_quantizes_the_weight_in_float32():
    torch.manual_seed(0)
    layer = make_linear(256, 64, resolve("w4a4"))
    x = torch.randn(32, 256)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: rotated inputs near a cell border may change cell, the rest is rounding of products.
    assert (rounded.float() - exact).norm() / exact.norm() < 0.04


def test_cubic_schedule_ends_at_the_final_sparsity():
    mask = {"sparsity": 0.8, "schedule": "cubic", "updates": 1000}
    layer = make_linear(100, 50, resolve({"name": "ramp", "weights": {"mask": mask}}))
    zeros = []
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        set_progress(layer, fraction)
        zeros.append(int((layer.compressed_weight() == 0).sum()))
    assert zeros == [0, 0, round(5000 * 0.8 * (1 - 0.5**3)), 4000, 4000]


@pytest.mark.parametrize("name", ["2:4+w4a4", "s50+w4a4-lsq", "w2-seq", "w4a4-pact"])
def test_compiled_layer_gives_the_same_result(name: str):
    layer = make_linear(64, 32, resolve(name))
    x = torch.randn(16, 64, requires_grad=True)
    layer(x)  # finds trained scales
    leaves = {"input": x, **dict(layer.named_parameters())}
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        result = call(x)
        result.square().sum().backward()
        results.append({"result": result.detach(), **{key: leaf.grad for key, leaf in leaves.items()}})
        layer.zero_grad()
        x.grad = None
    plain, compiled = results
    for key, expected in plain.items():
        torch.testing.assert_close(compiled[key], expected, msg=lambda said, key=key: f"{key}: {said}")


def test_bad_width_is_refused_when_the_layer_is_built():
    with pytest.raises(ValueError, match="n:m block"):
        CompressedLinear(30, 8, resolve("2:4"))
