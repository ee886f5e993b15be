"""Squared gradients by random probes against the explicit sum; rounding with error feedback against its definition."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import small_shape

from qpipe.formats import resolve
from qpipe.model import Decoder
from qpipe.ptq.feedback import inverse_factor, round_with_feedback
from qpipe.ptq.fitting import decode, encode, fit_groups, tables
from qpipe.ptq.groups import clustered_layout, largest_divisor, plain_layout
from qpipe.ptq.linearity import divergence, layer_coefficients
from qpipe.ptq.network import Network, set_weight, wrap_decoder
from qpipe.ptq.sensitivity import Sensitivity, accumulate, hidden_probe, loss_probe, principal_basis
from qpipe.ptq.streaming import _Moments, stream
from qpipe.ptq.text import activation_bytes, tokens_at_once
from qpipe.recipe import ModelShape


def small_network(seed: int = 0, **shape) -> Network:
    model = Decoder(
        small_shape(width=8, heads=2, kv_heads=2, feed_forward=12, vocab_size=11, context=6, **shape), resolve("dense")
    )
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # larger weights than at the start of training: a less linear network
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return wrap_decoder(model, bf16=False).eval()


def explicit_sum(network: Network, tokens: torch.Tensor, name: str, basis: torch.Tensor) -> torch.Tensor:
    """Sum over sequences, positions and directions of squared gradients, one backward pass each, in float64."""
    weight = network.linears()[name].weight
    total = torch.zeros(weight.shape, dtype=torch.float64)
    weight.requires_grad_(True)
    for row in tokens:
        outputs = network.hidden(row[None])[0] @ basis.T
        for value in outputs.flatten():
            (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
            total += gradient.double().square()
    weight.requires_grad_(False)
    return total


@pytest.mark.parametrize("basis", [None, 3], ids=["all directions", "3 components"])
def test_one_backward_of_random_signs_is_the_explicit_sum_in_expectation(basis):
    network = small_network()
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    directions = None if basis is None else principal_basis(network, [tokens], basis)
    found, generator = Sensitivity(), torch.Generator().manual_seed(2)
    rounds = 1500
    for _ in range(rounds // 100):  # a hundred copies at once: every sequence has its own signs
        accumulate(network, tokens.repeat(100, 1), found, hidden_probe(directions), generator)
    assert found.tokens == rounds * 10
    for name in ("blocks.0.attention.qkv", "blocks.1.feed_forward.down"):
        exact = explicit_sum(network, tokens, name, torch.eye(8) if directions is None else directions) / 10
        estimate = found.mean(name).double()
        # A squared sign sum has a relative deviation of at most sqrt2: 1500 of them leave 3.7 %, here per weight.
        assert float((estimate / exact).mean()) == pytest.approx(1, abs=0.02)
        assert float((estimate / exact - 1).abs().max()) < 6 * 2**0.5 / rounds**0.5


def test_subsampled_positions_keep_the_expectation():
    network = small_network()
    tokens = torch.randint(0, 11, (1, 6), generator=torch.Generator().manual_seed(1))
    found, generator = Sensitivity(), torch.Generator().manual_seed(2)
    for _ in range(10):
        accumulate(network, tokens.repeat(150, 1), found, hidden_probe(), generator, positions=2)
    exact = explicit_sum(network, tokens, "blocks.0.feed_forward.gate_up", torch.eye(8)) / 6
    assert float((found.mean("blocks.0.feed_forward.gate_up").double() / exact).mean()) == pytest.approx(1, abs=0.03)


def test_loss_probe_is_the_fisher_information():
    """Against the sum over all outcomes: E_y (d log p(y) / dW)^2, one backward pass per outcome."""
    network = small_network()
    tokens = torch.randint(0, 11, (1, 3), generator=torch.Generator().manual_seed(3))
    name = "blocks.1.attention.out"
    weight = network.linears()[name].weight
    weight.requires_grad_(True)
    log_p = torch.log_softmax(network.head(network.hidden(tokens))[0], dim=-1)
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for position in range(3):
        for outcome in range(11):
            (gradient,) = torch.autograd.grad(log_p[position, outcome], weight, retain_graph=True)
            exact += log_p[position, outcome].exp().item() * gradient.double().square()
    weight.requires_grad_(False)
    found, generator = Sensitivity(), torch.Generator().manual_seed(4)
    for _ in range(10):
        accumulate(network, tokens.repeat(300, 1), found, loss_probe(network), generator)
    assert float((found.mean(name).double() / (exact / 3)).mean()) == pytest.approx(1, abs=0.03)


def test_tiny_gradients_do_not_underflow():
    """Squares below float16's smallest number (6e-8) still count."""
    network = small_network()
    with torch.no_grad():
        network.model.norm.weight.mul_(1e-6)
    found = Sensitivity()
    accumulate(network, torch.zeros(1, 4, dtype=torch.int64), found, hidden_probe(), torch.Generator().manual_seed(0))
    for name, total in found.sums.items():
        assert total.dtype == torch.float32
        assert 0 < float(total.max()) < 6e-8, name


def test_principal_basis_is_centred_sorted_and_orthonormal():
    network = small_network()
    batches = list(torch.randint(0, 11, (6, 6), generator=torch.Generator().manual_seed(5)).split(2))
    states = torch.cat([network.hidden(batch).flatten(0, 1) for batch in batches]).double().numpy()
    basis = principal_basis(network, batches, 4).double().numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-5)
    explained = np.einsum("ki,ij,kj->k", basis, np.cov(states.T, bias=True), basis)
    singular = np.linalg.svd(states - states.mean(0), compute_uv=False)[:4]
    np.testing.assert_allclose(explained, singular**2 / len(states), rtol=1e-4)


def test_statistics_follow_their_rows():
    """Clustering sorts rows; what is known of a row moves with it, and everything comes back in its place."""
    weight = (
        torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 1, 12)[torch.randperm(12)][:, None]
    )
    layout = clustered_layout(weight, torch.ones_like(weight), rows=4, columns=1)
    tagged = torch.arange(72.0).view(12, 6)
    groups = layout.gather(tagged)
    assert torch.equal(layout.scatter(groups), tagged)
    columns = groups.view(3, 6, 4) % 6
    assert torch.equal(columns, torch.arange(6.0)[None, :, None].expand(3, 6, 4))  # a group is one input column
    deviations = layout.gather(weight.var(dim=1, keepdim=True).expand(12, 6).contiguous()).view(3, -1)
    assert (deviations[:-1].amax(dim=1) <= deviations[1:].amin(dim=1)).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 6), (2, 3), (12, 1), (4, 2)])
def test_groups_cut_and_rebuild(rows, columns):
    layout = plain_layout(12, 6, rows, columns)
    matrix = torch.arange(72.0).view(12, 6)
    groups = layout.gather(matrix)
    assert groups.shape == (72 // (rows * columns), rows * columns)
    assert torch.equal(layout.scatter(groups), matrix)
    assert torch.equal(groups[0], matrix[:rows, :columns].flatten())
    assert layout.index_bits() == 0
    assert largest_divisor(12, 5) == 4


def correlated_inputs(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -1, width)
    x = torch.randn(4000, width, generator=generator) @ mixing.T
    return x.T @ x / len(x)


def test_inverse_factor():
    h = correlated_inputs(16, 0)
    h[3], h[:, 3] = 0, 0  # an input that is never there
    factor = inverse_factor(h, 0.01).double()
    damped = h.double() + 0.01 * h.double().diagonal()[h.diagonal() > 0].mean() * torch.eye(16)
    damped[3, 3] += 1
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(16, dtype=torch.float64), atol=1e-4, rtol=0)
    assert torch.equal(factor, factor.triu())


def reference_feedback(weight, h, fit_of, columns):
    """Optimal brain quantization in fixed order, straight from its definition, in float64.

    After fixing column i, the remaining columns are the exact minimiser of the output error given all errors so far.
    """
    width = weight.shape[1]
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    current, value = weight.double().clone(), torch.empty(weight.shape, dtype=torch.float64)
    for i in range(width):
        if i % columns == 0:
            rounding = fit_of(i, current)
        value[:, i] = rounding(i, current[:, i])
        rest = damped[i + 1 :, i + 1 :]
        if i + 1 < width:
            error = weight.double()[:, : i + 1] - value[:, : i + 1]
            current[:, i + 1 :] = weight.double()[:, i + 1 :] + error @ damped[: i + 1, i + 1 :] @ torch.linalg.inv(
                rest
            )
    return value


def test_error_feedback_is_the_least_squares_solution():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    h = correlated_inputs(16, 2)
    layout, depth = plain_layout(6, 16, 1, 16), torch.full((6,), 3)
    book = tables("uniform", torch.device("cpu"))
    fit, codes = round_with_feedback(weight, h, layout, depth, "uniform", False)
    found = layout.scatter(decode(codes, depth, fit.scale, fit.offset, book))

    def fit_of(start, current):
        scale = fit_groups(weight, depth, "uniform", False).scale

        def rounding(i, column):
            y = (column.float() / scale)[:, None]
            return (scale * book.levels[3][torch.searchsorted(book.borders[3, :7], y).squeeze(1)]).double()

        return rounding

    torch.testing.assert_close(found.double(), reference_feedback(weight, h, fit_of, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (1, 8), (16, 1), (4, 1)])
def test_error_feedback_lowers_the_output_error(rows, columns):
    """For every shape of groups and mixed depths."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    h = correlated_inputs(32, 4)
    layout = plain_layout(16, 32, rows, columns)
    depth = 2 + torch.arange(layout.groups) % 3
    book = tables("lloyd-max", torch.device("cpu"))
    plain = fit_groups(layout.gather(weight), depth, "lloyd-max", False)
    nearest = layout.scatter(decode(encode(layout.gather(weight), plain, book), depth, plain.scale, plain.offset, book))
    fit, codes = round_with_feedback(weight, h, layout, depth, "lloyd-max", False)
    fed_back = layout.scatter(decode(codes, depth, fit.scale, fit.offset, book))

    def output_error(value):
        return float(((value - weight) @ h * (value - weight)).sum())

    assert output_error(fed_back) < 0.6 * output_error(nearest)


def test_streaming_gives_each_layer_its_real_inputs():
    """Against hooks on the whole network, after earlier blocks have been changed."""
    network = small_network()
    batches = list(torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(6)).split(2))
    seen = {}
    for number, block, inputs in stream(network, batches, second_moments=True):
        for name, found in inputs.items():
            caught: list[torch.Tensor] = []
            handle = network.linears()[name].register_forward_hook(
                lambda m, i, o, c=caught: c.append(i[0].flatten(0, -2))
            )
            for batch in batches:
                network.hidden(batch)
            handle.remove()
            x = torch.cat(caught).double()
            torch.testing.assert_close(found.mean.double(), x.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.second_moment.double(), x.T @ x / len(x), atol=1e-5, rtol=1e-4)
            seen[name] = number
        for linear in network.block_linears(block).values():
            set_weight(linear, linear.weight * 0.5)
    assert list(seen) == list(network.linears())


def test_layer_coefficients_are_second_order_in_the_noise():
    """alpha_l t^2 predicts the divergence of independent noise of another size (linearity in t^2)."""
    network = small_network(seed=7)
    tokens = torch.randint(0, 11, (8, 6), generator=torch.Generator().manual_seed(8))
    runs = [layer_coefficients(network, tokens, seed, lambda message: None) for seed in range(12)]
    name = "blocks.0.feed_forward.down"
    weight = network.linears()[name].weight
    exact, reference = weight.data.clone(), network.hidden(tokens).flatten(0, 1)
    generator, smaller = torch.Generator().manual_seed(99), []
    for _ in range(12):
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(exact + noise * exact.norm() * (0.002 / exact.numel()) ** 0.5)
        smaller.append(divergence(network, reference, network.hidden(tokens).flatten(0, 1)) / 0.002)
    weight.data.copy_(exact)
    assert np.mean(smaller) == pytest.approx(np.mean([run[name] for run in runs]), rel=0.35)


def test_what_a_token_leaves_for_the_backward_pass_is_estimated_well():
    """Against every distinct tensor that autograd keeps; and a model of 1B parameters goes through in small batches."""
    shape = small_shape(width=128, heads=2, kv_heads=2, feed_forward=352, vocab_size=11, context=64, layers=3)
    network = wrap_decoder(Decoder(shape, resolve("dense")), bf16=False)
    network.model.initialize(0)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other tensor gets its place
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    tokens = torch.randint(0, 11, (8, 64), generator=torch.Generator().manual_seed(0))
    network.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.hidden(tokens)
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert found / tokens.numel() == pytest.approx(activation_bytes(network), rel=0.3)
    large = ModelShape(layers=20, width=2048, heads=16, kv_heads=16, feed_forward=5632, vocab_size=32000, context=2048)
    with torch.device("meta"):
        batch = tokens_at_once(wrap_decoder(Decoder(large, resolve("dense")), bf16=True))
    assert 2048 <= batch < 4096


@pytest.mark.parametrize("width", [7, 256, 700, 2500])
def test_second_moments_are_summed_block_by_block(width):
    """Over several batches, for widths of one block, of whole blocks and of a part of one."""
    moments = _Moments(second=True)
    batches = torch.randn(3, 2, 5, width, generator=torch.Generator().manual_seed(width))
    for x in batches:
        moments.take(x)
    rows = batches.double().flatten(0, 2)
    found = moments.result().second_moment
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


class Operations(TorchDispatchMode):
    """Counts what would be kernels on a GPU, and what would wait for it."""

    VIEWS = ("view", "slice", "select", "unsqueeze", "squeeze", "t", "transpose", "expand", "detach", "empty", "split")
    WAITS = ("_local_scalar_dense", "nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.kernels = self.waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        self.kernels += name not in self.VIEWS
        self.waits += name in self.WAITS
        return function(*arguments, **(named or {}))


def test_rounding_a_column_takes_few_kernels_and_waits_for_none():
    """A column costs its launches on a GPU, about 10 us each, whatever its length: two widths give the slope."""
    found = []
    for width in (256, 512):
        weight, layout = torch.randn(4, width), plain_layout(4, width, 1, width)
        with Operations() as counted:
            round_with_feedback(weight, torch.eye(width), layout, torch.tensor([2, 3, 3, 4]), "lloyd-max", False)
        found.append((counted.kernels, counted.waits))
    (few, before), (many, after) = found
    assert before == after
    assert (many - few) / 256 < 18


def test_second_moments_stay_exact_while_the_model_runs_in_bfloat16():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    moments = _Moments(second=True)
    with torch.autocast("cpu", torch.bfloat16):
        moments.take(x)
    rows = x.double().flatten(0, 1)
    assert torch.allclose(moments.result().second_moment.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
