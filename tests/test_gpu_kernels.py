"""Kernels of our own against float64 or a CPU, one by one."""

import pytest
import torch

from qpipe.attention import causal_attention, has_kernel, rotated_parts
from qpipe.compress.dense import DenseLinear
from qpipe.compress.prepare import prepare
from qpipe.compress.rotation import hadamard
from qpipe.compress.rounding import round_to_grid
from qpipe.compress.scales import find_scale, reciprocal
from qpipe.compress.vectors import decode_vectors, nearest_codes
from qpipe.cross_entropy import CHUNK_ELEMENTS, linear_cross_entropy
from qpipe.formats import parse_grid, resolve
from qpipe.model import embed, embed_norm, swiglu

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(12, 50), (3000, 1000), (700, 32_000), (12, 40_000)])
def test_softmax_gradient(dtype: torch.dtype, rows: int, classes: int):
    from qpipe.triton_kernels import softmax_gradient_

    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device="cuda").to(dtype)
    target = torch.randint(classes, (rows, 1), device="cuda")
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, target[:, 0], reduction="none")
    expected.sum().backward()
    losses = torch.empty(rows, device="cuda")
    softmax_gradient_(logits, target, 0.25, losses)
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    assert torch.allclose(logits.double(), leaf.grad * 0.25, atol=1e-6 if dtype == torch.float32 else 1e-3)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [6, 160, 640, 1500])
def test_embedding(dtype: torch.dtype, width: int):
    torch.manual_seed(0)
    weight, tokens = torch.randn(50, width).to(dtype), torch.randint(0, 50, (3, 700))
    tokens[0, :300] = 7  # many times the same word
    incoming = torch.randn(3, 700, width).to(dtype)
    leaf, exact = weight.cuda().requires_grad_(), weight.double().requires_grad_()
    found, expected = embed(tokens.cuda(), leaf), embed(tokens, exact)
    found.backward(incoming.cuda())
    expected.backward(incoming.double())
    assert torch.equal(found.cpu().double(), expected)
    coarse = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(leaf.grad.cpu().double(), exact.grad, rtol=coarse, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("width", [6, 1500])
def test_swiglu(width: int):
    torch.manual_seed(0)
    gate_up = torch.randn(3, 5, 2 * width, requires_grad=True)
    on_device = gate_up.detach().cuda().requires_grad_()
    incoming = torch.randn(3, 5, width)
    (expected, _), (found, mean_square) = swiglu(gate_up, True), swiglu(on_device, True)
    assert mean_square is not None
    expected.backward(incoming)
    found.backward(incoming.cuda())
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
    assert torch.allclose(mean_square.cpu(), expected.square().mean(-1), rtol=1e-4)
    assert swiglu(on_device, False)[1] is None
    assert torch.allclose(on_device.grad.cpu(), gate_up.grad, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [6, 160, 640, 5000])
@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("read", ["both", "sum", "normed"])
def test_sum_and_norm(dtype: torch.dtype, width: int, updated: bool, read: str):
    from qpipe.triton_norm import AddNorm

    torch.manual_seed(0)
    given = [torch.randn(3, 700, width), torch.randn(3, 700, width).to(dtype), torch.rand(width) + 0.5]
    incoming = [torch.randn(3, 700, width), torch.randn(3, 700, width).to(dtype)]
    leaves = [tensor.cuda().requires_grad_() for tensor in given]
    results = AddNorm.apply(leaves[0], leaves[1] if updated else None, leaves[2], 1e-5, dtype, True)
    of = {"both": slice(2), "sum": slice(1), "normed": slice(1, 2)}[read]
    torch.autograd.backward(results[of], [gradient.cuda() for gradient in incoming[of]])
    exact = [tensor.double().requires_grad_() for tensor in given]
    total = exact[0] + exact[1] if updated else exact[0]
    expected = total, torch.nn.functional.rms_norm(total, (width,), exact[2], 1e-5)
    torch.autograd.backward(expected[of], [gradient.double() for gradient in incoming[of]])
    exact[2].grad = torch.zeros_like(exact[2]) if exact[2].grad is None else exact[2].grad
    coarse = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(results[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(results[1].cpu().double(), expected[1], rtol=coarse, atol=1e-5)
    assert torch.allclose(results[2].cpu().double(), expected[1].square().mean(-1), rtol=1e-4)
    assert torch.allclose(leaves[0].grad.cpu().double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(leaves[2].grad.cpu().double(), exact[2].grad, rtol=1e-4, atol=1e-3)
    if updated:
        assert torch.allclose(leaves[1].grad.cpu().double(), exact[1].grad, rtol=coarse, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [6, 160, 640, 5000])
def test_embedding_and_norm(dtype: torch.dtype, width: int):
    torch.manual_seed(0)
    table, weight, tokens = torch.randn(50, width), torch.rand(width) + 0.5, torch.randint(0, 50, (3, 700))
    tokens[0, :300] = 7  # many times the same word
    incoming = [torch.randn(3, 700, width), torch.randn(3, 700, width).to(dtype)]
    leaves = [tensor.cuda().requires_grad_() for tensor in (table, weight)]
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        rows, normed, mean_square = embed_norm(leaves[0], tokens.cuda(), leaves[1], 1e-5, True)
    torch.autograd.backward([rows, normed], [gradient.cuda() for gradient in incoming])
    exact = [tensor.double().requires_grad_() for tensor in (table, weight)]
    embedded = embed(tokens, exact[0])
    expected = torch.nn.functional.rms_norm(embedded, (width,), exact[1], 1e-5)
    torch.autograd.backward([embedded, expected], [gradient.double() for gradient in incoming])
    coarse = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.equal(rows.cpu().double(), embedded)
    assert normed.dtype == dtype
    assert torch.allclose(normed.cpu().double(), expected, rtol=coarse, atol=1e-5)
    assert torch.allclose(mean_square.cpu().double(), expected.square().mean(-1), rtol=1e-4)
    for leaf, reference in zip(leaves, exact, strict=True):
        assert torch.allclose(leaf.grad.cpu().double(), reference.grad, rtol=1e-4, atol=1e-3)


def random_angles(length: int, width: int) -> torch.Tensor:
    """Rotary angles (length, 1, width) of random frequencies."""
    angles = torch.outer(torch.arange(float(length)), torch.rand(width // 2))
    return torch.cat([angles, angles], dim=-1)[:, None]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 9, 3, 1, 10), (3, 70, 5, 5, 32), (1, 300, 4, 2, 128)])
def test_rotary_positions(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]):
    batch, length, heads, kv_heads, width = sizes
    torch.manual_seed(0)
    angles = random_angles(length, width)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, width).to(dtype)
    exact, leaf = qkv.double().requires_grad_(), qkv.cuda().requires_grad_()
    expected = rotated_parts(exact, angles.double().cos(), angles.double().sin(), heads, kv_heads)
    found = rotated_parts(leaf, angles.cos().cuda(), angles.sin().cuda(), heads, kv_heads)
    # Attention hands the gradients back in orders of its own.
    incoming = [torch.randn(batch, part.shape[2], length, width).to(dtype).transpose(1, 2) for part in found]
    incoming[1] = incoming[1].contiguous()
    torch.autograd.backward(expected, [gradient.double() for gradient in incoming])
    torch.autograd.backward(found, [gradient.cuda() for gradient in incoming])
    coarse = 1e-5 if dtype == torch.float32 else 2**-7
    for part, reference in zip((*found, leaf.grad), (*expected, exact.grad), strict=True):
        assert torch.allclose(part.cpu().double(), reference, rtol=coarse, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 70, 3, 1, 32), (3, 512, 5, 5, 32), (2, 300, 4, 2, 64), (1, 1000, 2, 2, 64)])
def test_attention_of_small_heads(dtype: torch.dtype, sizes: tuple[int, int, int, int, int]):
    batch, length, heads, kv_heads, width = sizes
    torch.manual_seed(0)
    angles = random_angles(length, width)
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, width).to(dtype)
    incoming = torch.randn(batch, length, heads, width).to(dtype)
    exact, leaf = qkv.double().requires_grad_(), qkv.cuda().requires_grad_()
    expected = causal_attention(exact, angles.double().cos(), angles.double().sin(), heads, kv_heads)
    assert has_kernel(leaf)
    found = causal_attention(leaf, angles.cos().cuda(), angles.sin().cuda(), heads, kv_heads)
    torch.autograd.backward([expected, found], [incoming.double(), incoming.cuda()])
    coarse = 2**-7 if dtype == torch.bfloat16 else 2**-10
    for part, reference in ((found, expected), (leaf.grad, exact.grad)):
        error = (part.cpu().double() - reference).abs()
        assert error.max() < 4 * coarse * max(1.0, reference.abs().max().item() / 4)
        assert error.norm() < coarse * reference.norm()


@on_gpu
def test_the_gradient_of_a_dense_weight_is_not_rounded_to_16_bits():
    torch.manual_seed(0)
    layer, x = DenseLinear(64, 48, bias=False, device="cuda"), torch.randn(2, 500, 64, device="cuda")
    incoming = torch.randn(2, 500, 48, device="cuda").bfloat16()
    given = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        found = layer(given)
    found.backward(incoming)
    exact, weight = x.bfloat16().double(), layer.weight.detach().bfloat16().double()
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact @ weight.T, rtol=2**-7, atol=1e-3)
    assert torch.allclose(given.grad.double(), incoming.double() @ weight, rtol=2**-7, atol=1e-3)
    to_weight = incoming.double().flatten(0, 1).T @ exact.flatten(0, 1)
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad.double(), to_weight, rtol=1e-4, atol=1e-3)


def exactly_rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    """x H in float64."""
    matrix = hadamard(block, torch.device("cpu"), torch.float64)
    return (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "block"), [(7, 48, 16), (300, 640, 128), (33, 160, 32)])
@pytest.mark.parametrize("name", ["w4a4", "w2a2"])
@pytest.mark.parametrize("given", [False, True])
def test_rotated_and_rounded_activations(dtype: torch.dtype, rows: int, width: int, block: int, name: str, given: bool):
    from qpipe.compress.triton_rounding import RotateAndRound

    part = resolve(name).activations
    assert part is not None
    multiplier, top = prepare(part).multiplier, {"w4a4": 8, "w2a2": 2}[name]
    torch.manual_seed(0)
    x, incoming = torch.randn(2, rows, width).to(dtype), torch.randn(2, rows, width).to(dtype)
    x[0, 0] = 0
    leaf = x.cuda().requires_grad_()
    mean_square = leaf.detach().float().square().mean(-1) if given else None
    matrix = hadamard(block, leaf.device, dtype)
    found = RotateAndRound.apply(leaf, matrix, multiplier, float(top), mean_square, dtype)
    found.backward(incoming.cuda())
    scale = x.double().square().mean(-1, keepdim=True).sqrt() * multiplier
    y = torch.where(scale > 0, exactly_rotated(x, block) / scale, 0.0)
    expected = (y.floor().clamp(-top, top - 1) + 0.5) * scale
    gradient = exactly_rotated(incoming.double() * (y.abs() <= top), block)
    steps = (found.cpu().double() - expected).abs() / scale.clamp(min=1e-9)
    assert (steps > 0.5).double().mean() < 0.02  # numbers that rounding to 16 bits moves over a border
    assert steps.max() < 1.1
    assert steps[steps <= 0.5].max() < 0.05
    # At the border of what passes, rounding to 16 bits decides.
    assert (leaf.grad.cpu().double() - gradient).norm() < 0.05 * gradient.norm()


@on_gpu
@pytest.mark.parametrize(("rows", "width", "block"), [(7, 48, 16), (300, 640, 128), (33, 160, 32)])
@pytest.mark.parametrize("back", [False, True])
def test_rotated_and_rounded_weights(rows: int, width: int, block: int, back: bool):
    """In float32 nothing but the sums' order differs from float64, so almost no weight takes another level."""
    from qpipe.compress.triton_rounding import RotateAndRound

    part = resolve("w3").weights
    assert part is not None
    multiplier, top = prepare(part).multiplier, 4
    torch.manual_seed(0)
    weight, incoming = torch.randn(rows, width), torch.randn(rows, width)
    leaf = weight.cuda().requires_grad_()
    matrix = hadamard(block, leaf.device, torch.float32)
    found = RotateAndRound.apply(leaf, matrix, multiplier, float(top), None, torch.float32, back)
    found.backward(incoming.cuda())
    scale = weight.double().square().mean(-1, keepdim=True).sqrt() * multiplier
    y = exactly_rotated(weight, block) / scale
    expected = (y.floor().clamp(-top, top - 1) + 0.5) * scale
    gradient = exactly_rotated(incoming, block) if back else incoming.double()
    gradient = exactly_rotated(gradient * (y.abs() <= top), block)
    if back:
        expected = exactly_rotated(expected, block)
    near = 1e-4 if back else 1e-5
    assert ((found.cpu().double() - expected).abs() > near).double().mean() < (2 * block * 1e-5 if back else 1e-5)
    assert (leaf.grad.cpu().double() - gradient).norm() < 1e-3 * gradient.norm()
    assert ((leaf.grad.cpu().double() - gradient).abs() > near).double().mean() < 2 * block * 1e-5


@on_gpu
@pytest.mark.parametrize(("block", "shapes"), [(32, [(70, 64), (33, 96), (5, 32)]), (128, [(70, 256), (130, 128)])])
@pytest.mark.parametrize("back", [False, True])
def test_weights_rounded_together_and_their_gradients(block: int, shapes: list[tuple[int, int]], back: bool):
    from qpipe.compress.triton_weights import RoundedWeights

    part = resolve("w3").weights
    assert part is not None
    multiplier, top = prepare(part).multiplier, 4.0
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    incoming = [torch.randn_like(weight) for weight in weights]
    together = RoundedWeights(weights, block, (multiplier, top, back), torch.float16)
    for weight, gradient in zip(weights, incoming, strict=True):
        weight.grad = gradient.clone()
    together.fill()
    together.round()
    together.finish()
    for weight, copy, given in zip(weights, together.copies, incoming, strict=True):
        number = weight.detach().cpu()
        scale = number.double().square().mean(-1, keepdim=True).sqrt() * multiplier
        y = exactly_rotated(number, block) / scale
        expected = (y.floor().clamp(-top, top - 1) + 0.5) * scale
        gradient = exactly_rotated(given.cpu(), block) if back else given.cpu().double()
        gradient = exactly_rotated(gradient * (y.abs() <= top), block)
        if back:
            expected = exactly_rotated(expected, block)
        # One weight in 10^5 may be so near a border that sums in another order decide.
        assert ((copy.cpu().double() - expected).abs() > 3e-3).double().mean() < 2 * block * 1e-5
        assert weight.grad is not None
        assert (weight.grad.cpu().double() - gradient).norm() < 1e-3 * gradient.norm()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [6, 130, 640])
@pytest.mark.parametrize("name", ["w4-mse", "w1-mse", "w1.58-mse", "w4e2m1-mse", "w8e4m3-mse"])
def test_searched_scale_has_the_least_error(name: str, width: int, dtype: torch.dtype):
    part = resolve(name).weights
    assert part is not None
    prepared = prepare(part)
    assert prepared.grid is not None
    torch.manual_seed(0)
    x = torch.randn(40, width).to(dtype)
    x[3], x[5] = 0, torch.linspace(-1, 4, width)

    def error(scale: torch.Tensor) -> torch.Tensor:
        assert prepared.grid is not None
        return (round_to_grid(x * reciprocal(scale), prepared.grid) * scale - x).square().sum(-1)

    found = find_scale(x.cuda(), prepared).cpu().double()
    x = x.double()
    expected = find_scale(x, prepared)
    assert torch.allclose(error(found), error(expected), rtol=1e-4, atol=0)
    assert (found - expected).abs().le(1e-6 * expected).double().mean() > 0.9  # errors of two may be nearly equal


@on_gpu
@pytest.mark.parametrize("count", [1, 5000])
def test_nearest_points_of_the_e8_ball(count: int):
    grid = parse_grid("e8x65536")
    points = decode_vectors(torch.arange(65536).unsqueeze(-1), grid, torch.zeros(1, dtype=torch.float64))
    torch.manual_seed(0)
    x = 1.2 * torch.randn(count, 8)
    codes = nearest_codes(x.cuda(), grid).cpu()
    found = points[codes[:, 0]] - x.double()
    assert torch.allclose(found.norm(dim=-1), torch.cdist(x.double(), points).amin(-1), rtol=1e-5)


@on_gpu
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_head_is_told_by_what_its_loss_is_multiplied(factor: float):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(30, 16), torch.randn(50, 16), torch.randint(0, 50, (30,))
    leaves = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, targets.cuda()) * factor
    loss.backward(retain_graph=True)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    (torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets) * factor).backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        assert torch.allclose(leaf.grad.cpu().double(), expected.grad, atol=1e-5)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()  # the gradients were multiplied where they lay


@on_gpu
def test_the_loss_on_a_gpu_is_that_on_a_cpu():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(100, 32), torch.randint(0, 100, (64,))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, targets.to(device))
        (loss * 0.3).backward()
        results.append([loss.cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@on_gpu
def test_the_head_sums_its_gradient_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cuda", 16 * 100)
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(100, 32).bfloat16()
    targets = torch.randint(0, 100, (64,))
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    expected.backward()
    leaves = [hidden.cuda().requires_grad_(), weight.float().cuda().requires_grad_()]
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets.cuda())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for leaf, reference in zip(leaves, exact, strict=True):  # logits are rounded to 8 bits of mantissa
        error = (leaf.grad.cpu().double() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.02
    assert leaves[1].grad.dtype == torch.float32
