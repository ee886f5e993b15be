"""What differs on a GPU from the plain path: captured steps and their AdamW, selection without a sort."""

import contextlib

import pytest
import torch
from training_cases import small_run, small_shape

from qpipe.compress.masks import _first_by_rank, _first_by_sort, _kth_largest
from qpipe.formats import catalogue_names, resolve
from qpipe.model import Decoder
from qpipe.ptq.network import wrap_decoder
from qpipe.ptq.sensitivity import Sensitivity, accumulate, hidden_probe
from qpipe.train.start import shorten
from qpipe.train.step import TrainingStep, make_optimizer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

COMPILED = ("dense", "w4", "w4a4", "w2-lsq", "w2-seq", "w1", "2:4", "s50", "s75-rbbm", "s50-gradual", "mxfp4", "nvfp4")


def train(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    capture: bool,
    compiled: bool,
    steps: int = 8,
    parameters: str = "fp32",
    precision: str = "bf16",
) -> list[float]:
    monkeypatch.setenv("QPIPE_COMPILE", str(int(compiled)))
    monkeypatch.setenv("QPIPE_CAPTURE", str(int(capture)))
    run = small_run(name, steps=steps, width=128, feed_forward=256, precision=precision)
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    if parameters == "bf16":
        shorten(model)
    step = TrainingStep(model.cuda(), run, 4, single=True)
    optimizer = make_optimizer(model, run.training)
    losses = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, run.shape.vocab_size, (8, run.shape.context + 1), generator=generator).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss, norm = step(tokens, number, optimizer)
        losses += [loss.item(), norm.item()]
    assert (optimizer.graph is not None) == capture
    step.release()
    return losses


def assert_alike(found: list[float], expected: list[float], loss: float, norm: float) -> None:
    """Compare what `train` returns, with relative tolerances of losses and gradient norms."""
    assert found[::2] == pytest.approx(expected[::2], rel=loss)
    assert found[1::2] == pytest.approx(expected[1::2], rel=norm)


@on_gpu
@pytest.mark.parametrize("name", catalogue_names())
def test_captured_steps_equal_plain_steps(name: str, monkeypatch: pytest.MonkeyPatch):
    """In float32, where little is near a border: the step that is captured does not know the precision."""
    plain = train(name, monkeypatch, capture=False, compiled=False, precision="fp32")
    captured = train(name, monkeypatch, capture=True, compiled=False, precision="fp32")
    # The embedding's gradient is summed in no fixed order, and clipping and AdamW in one launch round otherwise than in
    # two. A number that takes another level changes all that it is multiplied with: on a CPU, weights moved by 1e-7 of
    # themselves after each step moved losses by up to 0.3% and norms by up to 3% where activations are rounded.
    spec = resolve(name)
    rounded = spec.activations is not None or (spec.weights is not None and spec.weights.grid is not None)
    assert_alike(captured, plain, *((2e-2, 2e-1) if rounded else (1e-3, 1e-3)))


@on_gpu
@pytest.mark.parametrize("name", COMPILED)
def test_captured_steps_equal_plain_steps_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch):
    """Two plain steps, the first replay, and one after its update.

    Rounding to 8 bits of mantissa moves many more numbers: on a CPU, weights of w4a4 moved by 1e-7 of themselves after
    each step moved gradient norms by 1% in the fourth step, and by half in the eighth.
    """
    plain = train(name, monkeypatch, capture=False, compiled=False, steps=4)
    captured = train(name, monkeypatch, capture=True, compiled=False, steps=4)
    assert_alike(captured, plain, 5e-3, 5e-2)


@on_gpu
def test_captured_steps_of_bfloat16_parameters_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    plain = train("w2-seq", monkeypatch, capture=False, compiled=False, parameters="bf16")
    captured = train("w2-seq", monkeypatch, capture=True, compiled=False, parameters="bf16")
    assert captured[::2] == pytest.approx(plain[::2], rel=1e-2)


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("capture", [True, False], ids=["captured", "blocks"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_equal_plain_steps(name: str, capture: bool, monkeypatch: pytest.MonkeyPatch):
    plain = train(name, monkeypatch, capture=False, compiled=False)
    compiled = train(name, monkeypatch, capture=capture, compiled=True)
    # A fused kernel rounds to bfloat16 less often, and a number near a border may take the other level.
    assert compiled[::2] == pytest.approx(plain[::2], rel=1e-2)
    assert compiled[1] == pytest.approx(plain[1], rel=5e-2)  # the norm before anything is updated: no gradient is lost


@on_gpu
def test_a_rehearsed_step_runs_no_kernel_and_leaves_none_to_compile():
    import triton

    from qpipe.triton_kernels import times_
    from qpipe.triton_launch import Rehearsal

    def compiled_by(model: Decoder, tokens: torch.Tensor, *, take: bool) -> int:
        names: list[object] = []
        triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: names.append(kwargs)
        try:
            how = contextlib.nullcontext() if take else Rehearsal(torch.device("cuda", 0))
            with torch.autocast("cuda", torch.bfloat16), how:
                model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
        return len(names)

    for name in ("dense", "w4a4", "w4", "w4a4-mse"):  # each has kernels that those before it have not
        run = small_run(name, width=256, feed_forward=512)  # of no other test: nothing is compiled yet
        model = Decoder(run.shape, run.format_spec)
        model.initialize(0)
        model.cuda()
        tokens = torch.randint(0, run.shape.vocab_size, (3, run.shape.context + 1)).cuda()
        assert compiled_by(model, tokens, take=False) > 0, name
        assert compiled_by(model, tokens, take=True) == 0, name
    numbers, factor = torch.ones(100, device="cuda"), torch.full((), 3.0, device="cuda")
    with Rehearsal(torch.device("cuda", 0)):
        times_(numbers, factor)
    assert numbers.sum().item() == 100
    times_(numbers, factor)
    assert numbers.sum().item() == 300


@on_gpu
@pytest.mark.parametrize("count", [1, 7, 1000, 300_000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_histograms_find_the_number_that_sorting_finds(count: int, share: float):
    torch.manual_seed(count)
    for magnitude in (torch.randn(count).abs(), torch.randint(0, 3, (count,)).float(), torch.zeros(count)):
        kept = round(share * count)
        expected = magnitude.sort().values[count - kept].item() if kept else float("inf")
        assert _kth_largest(magnitude.cuda(), share).item() == expected
        assert _kth_largest(magnitude.cuda(), torch.tensor(share, device="cuda")).item() == expected


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (8, 16)])
def test_ranks_choose_what_sorting_chooses(n: int, m: int):
    torch.manual_seed(0)
    for norm in (torch.rand(50, m), torch.randint(0, 3, (50, m)).float()):
        assert torch.equal(_first_by_rank(norm, n), _first_by_sort(norm, n))


SIZES = (1, 3, 130, 100_003, 2048, 4097)


def two_groups(dtype: torch.dtype, device: str, sizes: tuple[int, ...] = SIZES) -> torch.optim.AdamW:
    """AdamW of vectors, every other one with weight decay."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    groups = [{"params": vectors[::2], "weight_decay": 0.1}, {"params": vectors[1::2], "weight_decay": 0.0}]
    on_device = device == "cuda"
    rate = torch.zeros((), device=device) if on_device else 0.0
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_device, capturable=on_device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def vectors_of(optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    return [vector for group in optimizer.param_groups for vector in group["params"]]


@on_gpu
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_captured_adamw(clip: float):
    from qpipe.triton_adamw import CapturedAdamW, fits

    exact, found = two_groups(torch.float64, "cpu"), two_groups(torch.float32, "cuda")
    silent = 2  # gets no gradient
    incoming = [torch.zeros_like(vector) for vector in vectors_of(found)]
    for optimizer in (exact, found):  # the state of a first step
        for number, vector in enumerate(vectors_of(optimizer)):
            vector.grad = None if number == silent else torch.zeros_like(vector)
        optimizer.step()
        optimizer.zero_grad()
    assert fits(found)
    first = vectors_of(found)[0]
    copy = first.detach().bfloat16()
    update, graph = CapturedAdamW(found, clip, {first: copy}), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = [None if n == silent else gradient * 1.0 for n, gradient in enumerate(incoming)]
        for vector, gradient in zip(vectors_of(found), gradients, strict=True):
            vector.grad = gradient
        norm = update.launch()
    update.fill()
    for step in range(5):
        rate = 0.01 * (step + 1)
        torch.manual_seed(step)
        for number, (vector, gradient) in enumerate(zip(vectors_of(exact), incoming, strict=True)):
            gradient.copy_(torch.randn(gradient.shape) * 0.01)
            vector.grad = None if number == silent else gradient.cpu().double()
        for group in exact.param_groups:
            group["lr"] = rate
        found.param_groups[0]["lr"].fill_(rate)
        expected_norm = torch.nn.utils.clip_grad_norm_(vectors_of(exact), clip)
        exact.step()
        graph.replay()
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
        assert torch.equal(copy, vectors_of(found)[0].bfloat16())
    for number, (vector, reference) in enumerate(zip(vectors_of(found), vectors_of(exact), strict=True)):
        assert torch.allclose(vector.detach().cpu().double(), reference.detach(), rtol=1e-5, atol=1e-5)
        if number != silent:
            assert found.state[vector]["step"].item() == exact.state[reference]["step"].item() == 6
            for name, least in (("exp_avg", 1e-8), ("exp_avg_sq", 1e-12)):
                moment, expected = found.state[vector][name].cpu().double(), exact.state[reference][name]
                assert torch.allclose(moment, expected, rtol=1e-4, atol=least)
    # The state is torch's: another optimizer goes on from it.
    other = two_groups(torch.float32, "cuda")
    other.load_state_dict(found.state_dict())
    for name in ("step", "exp_avg", "exp_avg_sq"):
        for one, two in zip(vectors_of(found), vectors_of(other), strict=True):
            if one in found.state:
                assert torch.equal(found.state[one][name], other.state[two][name])


@on_gpu
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_captured_adamw_spreads_what_is_not_finite_as_torch_does(poison: float):
    from qpipe.triton_adamw import CapturedAdamW

    plain, captured = two_groups(torch.float32, "cuda"), two_groups(torch.float32, "cuda")
    for optimizer in (plain, captured):
        for vector in vectors_of(optimizer):
            vector.grad = torch.zeros_like(vector)
        optimizer.step()
        vectors_of(optimizer)[0].grad[0] = poison
    torch.nn.utils.clip_grad_norm_(vectors_of(plain), 1.0)
    plain.step()
    update, graph = CapturedAdamW(captured, 1.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update.launch()
    update.fill()
    graph.replay()
    for one, two in zip(vectors_of(plain), vectors_of(captured), strict=True):
        assert torch.equal(one.isnan(), two.isnan())


@on_gpu
def test_captured_adamw_reads_gradients_that_lie_otherwise():
    from qpipe.triton_adamw import CapturedAdamW

    weights = [torch.randn(64, 33, device="cuda").requires_grad_() for _ in range(2)]
    rate = torch.full((), 0.01, device="cuda")
    optimizer = torch.optim.AdamW(weights, lr=rate, fused=True, capturable=True)
    exact = [weight.detach().cpu().double().requires_grad_() for weight in weights]
    reference = torch.optim.AdamW(exact, lr=0.01)
    for weight in (*weights, *exact):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    reference.step()
    numbers = torch.randn(64 * 33 + 1, device="cuda")
    gradients = [numbers[1:].view(64, 33), numbers[:-1].view(33, 64).t()]  # not at 16 bytes; transposed
    for weight, double, gradient in zip(weights, exact, gradients, strict=True):
        weight.grad, double.grad = None, gradient.cpu().double()
        weight.grad = gradient
    torch.nn.utils.clip_grad_norm_(exact, 1.0)
    reference.step()
    update, graph = CapturedAdamW(optimizer, 1.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update.launch()
    update.fill()
    graph.replay()
    for weight, double in zip(weights, exact, strict=True):
        assert torch.allclose(weight.detach().cpu().double(), double.detach(), rtol=1e-5, atol=1e-6)


@on_gpu
def test_captured_adamw_wants_float32_and_state():
    from qpipe.errors import QpipeError
    from qpipe.triton_adamw import CapturedAdamW, fits

    assert fits(two_groups(torch.float32, "cuda", (3, 5)))
    assert not fits(two_groups(torch.bfloat16, "cuda", (3, 5)))
    optimizer = two_groups(torch.float32, "cuda", (3, 5))
    update = CapturedAdamW(optimizer, 1.0)
    for vector in vectors_of(optimizer):
        vector.grad = torch.ones_like(vector)
    with pytest.raises(QpipeError, match="first gradient"):
        update.launch()


@on_gpu
def test_sensitivities_on_a_gpu_are_those_on_a_cpu():
    found = []
    for device in ("cpu", "cuda"):
        decoder = Decoder(small_shape(width=128, feed_forward=256), resolve("dense"))
        decoder.initialize(0)
        network = wrap_decoder(decoder, bf16=False).to(device)
        tokens = torch.randint(0, decoder.shape.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
        found.append(Sensitivity())
        accumulate(network, tokens.to(device), found[-1], hidden_probe(), torch.Generator().manual_seed(2))
    assert set(found[0].sums) == set(network.linears()) == set(found[1].sums)
    for name, expected in found[0].sums.items():
        assert (found[1].sums[name].cpu() - expected).norm() < 0.02 * expected.norm(), name
