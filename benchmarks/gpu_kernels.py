"""Kernels of our own on one GPU, one by one: time, share of memory speed, and the generated code that they replace.

Shapes are those of a 30M model (64 x 512 tokens, width 640, 5 heads of 128, 32,000 words). Times are those of the GPU
alone, from the profiler; TB/s counts the numbers that have to be read and written once. Lines with `as` name other
choices of tile, warps, programs or stages than the ones in use (marked *).

    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py softmax norm swiglu rotary attention rounding weights adamw
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from qpipe import triton_adamw, triton_attention, triton_kernels, triton_norm, triton_rotary
from qpipe.attention import SMALL_HEADS, rotated_parts
from qpipe.attention import rotate as rotate_heads
from qpipe.compress import triton_rounding
from qpipe.compress.prepare import prepare
from qpipe.compress.quantize import compress
from qpipe.compress.rotation import hadamard, rotate
from qpipe.compress.triton_rounding import RotateAndRound
from qpipe.formats import resolve

TOKENS, WIDTH, INNER, HEADS, WORDS = 64 * 512, 640, 1792, 5, 32000
NARROW, NARROW_INNER = 160, 448
"""Widths of a 1M model."""

BF16, FP32 = 2, 4


def microseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """GPU time of one call."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as result:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in result.key_averages()) / repeats


def show(name: str, size: float, work: Callable[[], object]) -> None:
    try:
        time = microseconds(work)
        print(f"{name:<58}{time:8.1f} us {size / time / 1e6:6.2f} TB/s", flush=True)
    except Exception as error:
        print(f"{name:<58}{type(error).__name__}: {str(error)[:150]}", flush=True)


def context() -> Any:
    """What an autograd function keeps, without autograd."""
    kept = SimpleNamespace(
        saved_tensors=(), mark_non_differentiable=lambda *_: None, set_materialize_grads=lambda _: None
    )
    kept.save_for_backward = lambda *tensors: setattr(kept, "saved_tensors", tensors)
    return kept


def with_constants(module: Any, work: Callable[[], object], **constants: Any) -> Callable[[], object]:
    """`work` with some of the module's constants replaced."""

    def changed() -> object:
        before = {name: getattr(module, name) for name in constants}
        try:
            for name, value in constants.items():
                setattr(module, name, value)
            return work()
        finally:
            for name, value in before.items():
                setattr(module, name, value)

    return changed


def both_ways(name: str, size: float, back: float, function: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Generated code: forward with gradient on, then backward."""
    compiled: Any = torch.compile(function, dynamic=False)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = compiled(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    incoming = [torch.randn_like(result) for result in results]
    show(f"{name} generated", size, lambda: compiled(*leaves))
    show(f"{name} back generated", back, lambda: torch.autograd.grad(results, leaves, incoming, retain_graph=True))


def softmax() -> None:
    rows = 8192
    logits = torch.randn(rows, WORDS, device="cuda", dtype=torch.bfloat16)
    targets, size = torch.randint(WORDS, (rows, 1), device="cuda"), 2 * BF16 * rows * WORDS
    losses = torch.empty(rows, device="cuda")

    def work() -> object:
        return triton_kernels.softmax_gradient_(logits, targets, 1e-4, losses)

    show("softmax *", size, work)
    for lanes, warps in ((256, 4), (512, 8), (1024, 8), (2048, 16), (2048, 32)):
        choice: dict[str, int] = {"_LANES": lanes, "_WARPS": warps}
        show(f"softmax as {8 * lanes} numbers, {warps} warps", size, with_constants(triton_kernels, work, **choice))


def norm() -> None:
    for width in (WIDTH, NARROW):
        _norm(width)


def _norm(width: int) -> None:
    residual = torch.randn(TOKENS, width, device="cuda")
    update, weight = residual.bfloat16(), torch.ones(width, device="cuda")
    numbers, kept = TOKENS * width, context()
    size, back = numbers * (2 * FP32 + 2 * BF16), numbers * (3 * FP32 + 2 * BF16)

    def forward() -> object:
        return triton_norm.AddNorm.forward(kept, residual, update, weight, 1e-5, torch.bfloat16, False)

    def backward() -> object:
        return triton_norm.AddNorm.backward(kept, residual, update)

    show(f"norm {width} *", size, forward)
    show(f"norm {width} back *", back, backward)
    block = triton.next_power_of_2(width)
    for rows, warps, programs, stages in (
        (2, 4, 1024, 2), (2, 4, 2112, 2), (1, 1, 2112, 1), (1, 1, 2112, 2), (1, 1, 2112, 3), (1, 2, 2112, 2),
        (1, 1, 4224, 1), (1, 1, 4224, 2), (1, 2, 4224, 1), (4, 4, 1056, 2), (4, 1, 2112, 1), (2, 1, 2112, 2),
        (8, 4, 528, 2),
    ):  # fmt: skip
        choice = (rows * block, rows * block // warps, programs, stages)
        name = f"{rows} rows, {warps} warps, {programs} programs, {stages} stages"
        changed = with_constants(triton_norm, backward, _BACK_NARROW=choice, _BACK_WIDE=choice)
        show(f"norm {width} back as {name}", back, changed)

    def plain(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + update
        return total, F.rms_norm(total, (width,), weight, 1e-5).to(update.dtype)

    both_ways(f"norm {width}", size, back, plain, [residual, update, weight])


def swiglu() -> None:
    for width in (INNER, NARROW_INNER):
        gate_up = torch.randn(TOKENS, 2 * width, device="cuda", dtype=torch.bfloat16)
        incoming, kept = gate_up[:, :width].contiguous(), context()

        def forward(gate_up: Tensor = gate_up, kept: Any = kept) -> object:
            return triton_kernels.SwiGLU.forward(kept, gate_up, False)

        def backward(incoming: Tensor = incoming, kept: Any = kept) -> object:
            return triton_kernels.SwiGLU.backward(kept, incoming)

        size = TOKENS * width * BF16
        show(f"swiglu {width} *", 3 * size, forward)
        show(f"swiglu {width} back *", 5 * size, backward)
        for numbers, per_warp in ((1024, 256), (2048, 256), (4096, 512), (4096, 1024)):
            choice = {"_SWIGLU_NUMBERS": numbers, "_SWIGLU_PER_WARP": per_warp}
            name = f"{width} as {numbers} numbers, {per_warp} per warp"
            show(f"swiglu {name}", 3 * size, with_constants(triton_kernels, forward, **choice))
            show(f"swiglu back {name}", 5 * size, with_constants(triton_kernels, backward, **choice))


def rotary() -> None:
    qkv = torch.randn(64, 512, 3 * HEADS, 128, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(512, 1, 128, device="cuda")
    cosine, sine, kept = angles.cos(), angles.sin(), context()
    gradients = [torch.randn(64, HEADS, 512, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(3)]
    size, back = 2 * BF16 * TOKENS * 2 * WIDTH, 2 * BF16 * TOKENS * 3 * WIDTH

    def forward() -> object:
        return triton_rotary.Rotary.forward(kept, qkv, cosine, sine, HEADS, HEADS)

    def backward() -> object:
        return triton_rotary.Rotary.backward(kept, *gradients)

    show("rotary *", size, forward)
    show("rotary back *", back, backward)
    for count in (512, 2048, 4096):
        show(f"rotary as {count} numbers", size, with_constants(triton_rotary, forward, _NUMBERS=count))
        show(f"rotary back as {count} numbers", back, with_constants(triton_rotary, backward, _NUMBERS=count))

    def plain(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_key, value = qkv.split([2 * HEADS, HEADS], dim=2)
        query, key = rotate_heads(query_key, cosine, sine).split([HEADS, HEADS], dim=2)
        return query, key, value

    both_ways("rotary", size, back, plain, [qkv])


def attention() -> None:
    """From the fused product to its gradient: the library between rotated copies, and our own kernels."""
    for heads, width in ((5, 32), (4, 64), (HEADS, 128)):
        qkv = torch.randn(64, 512, 3 * heads, width, device="cuda").bfloat16().requires_grad_()
        incoming = torch.randn(64, 512, heads, width, device="cuda").bfloat16()
        angles, size = torch.rand(512, 1, width, device="cuda"), BF16 * TOKENS * heads * width
        cosine, sine = angles.cos(), angles.sin()

        def own(qkv: Tensor = qkv, cosine: Tensor = cosine, sine: Tensor = sine, heads: int = heads) -> Tensor:
            result: Tensor = triton_attention.RotaryAttention.apply(qkv, cosine, sine, heads, heads)
            return result

        def library(qkv: Tensor = qkv, cosine: Tensor = cosine, sine: Tensor = sine, heads: int = heads) -> Tensor:
            parts = (part.transpose(1, 2) for part in rotated_parts(qkv, cosine, sine, heads, heads))
            return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)

        small = width in SMALL_HEADS
        for name, work in (("ours" + " *" * small, own), ("the library's" + " *" * (not small), library)):

            def both(work: Callable[[], Tensor] = work, qkv: Tensor = qkv, incoming: Tensor = incoming) -> None:
                qkv.grad = None
                work().backward(incoming)

            with torch.no_grad():
                show(f"attention, {heads} heads of {width}, {name}", 4 * size, work)
            show(f"attention, {heads} heads of {width}, both ways, {name}", 12 * size, both)


def rounding() -> None:
    part = resolve("w4a4").activations
    assert part is not None
    prepared = prepare(part)
    for width in (WIDTH, INNER):
        x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        squares = x.float().square().mean(-1)
        matrix, kept, size = hadamard(128, x.device, x.dtype), context(), int(TOKENS * width * (2 * BF16 + 1 / 8))

        def forward(x: Tensor = x, matrix: Tensor = matrix, kept: Any = kept, squares: Any = squares) -> object:
            return RotateAndRound.forward(kept, x, matrix, prepared.multiplier, 8.0, squares, x.dtype)

        def alone(x: Tensor = x, matrix: Tensor = matrix, kept: Any = kept) -> object:
            return RotateAndRound.forward(kept, x, matrix, prepared.multiplier, 8.0, None, x.dtype)

        def backward(x: Tensor = x, kept: Any = kept) -> object:
            return RotateAndRound.backward(kept, x)

        show(f"rounding {width}, mean squares not given *", size, alone)
        show(f"rounding {width} *", size, forward)
        show(f"rounding {width} back *", size, backward)
        for tile, warps, stages in (
            (64, 8, 1), (64, 8, 3), (64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3), (32, 2, 3), (128, 8, 2),
        ):  # fmt: skip
            choice = {"_TILE": tile, "_WARPS": warps, "_STAGES": stages}
            choice |= {f"_BACK{key}": value for key, value in choice.items()}
            name = f"{tile} tokens, {warps} warps, {stages} stages"
            show(f"rounding {width} as {name}", size, with_constants(triton_rounding, forward, **choice))
            show(f"rounding {width} back as {name}", size, with_constants(triton_rounding, backward, **choice))

        def plain(x: Tensor) -> Tensor:
            return compress(rotate(x, 128), prepared, per_token=True, training=True)

        both_ways(f"rounding {width}", size, size, plain, [x])


def matrices(layers: int, width: int, inner: int) -> list[Tensor]:
    """Parameters with the shapes of a model's: embedding, head, and a block's products and norms."""
    block = [(3 * width, width), (width, width), (2 * inner, width), (width, inner), (width,), (width,)]
    shapes = [(WORDS, width), (WORDS, width), (width,), *block * layers]
    return [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]


def adamw() -> None:
    """Norm, clipping and step: 28 bytes per parameter and 4 for the norm."""
    for name, layers, width, inner in (("71M", 6, WIDTH, INNER), ("2.6M", 4, 32, 128)):
        parameters = matrices(layers, width, inner)
        rate = torch.full((), 1e-4, device="cuda")
        optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        size = 8 * FP32 * sum(parameter.numel() for parameter in parameters)

        def plain(parameters: list[Tensor] = parameters, optimizer: torch.optim.AdamW = optimizer) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        def made(parameters: list[Tensor] = parameters, optimizer: torch.optim.AdamW = optimizer) -> Any:
            update, graph = triton_adamw.CapturedAdamW(optimizer, 1.0), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                update.launch()
            update.fill()
            return update, graph  # the graph reads the table

        show(f"adamw {name}, torch's clipping and step", size, plain)
        for numbers, warps in ((2048, 4), (1024, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)):
            choice: dict[str, int] = {"_NUMBERS": numbers, "_WARPS": warps}
            kept: Any = with_constants(triton_adamw, made, **choice)()
            used = (numbers, warps) == (triton_adamw._NUMBERS, triton_adamw._WARPS)
            show(f"adamw {name} as {numbers} numbers, {warps} warps{' *' * used}", size, kept[1].replay)


def weights() -> None:
    part = resolve("w4").weights
    assert part is not None
    prepared = prepare(part)
    for rows, width in ((2 * INNER, WIDTH), (WIDTH, WIDTH), (WIDTH, INNER)):
        weight = torch.randn(rows, width, device="cuda")
        incoming, matrix, kept = weight.bfloat16(), hadamard(128, weight.device, weight.dtype), context()
        size = rows * width * (FP32 + BF16)

        def forward(back: bool, weight: Tensor = weight, matrix: Tensor = matrix, kept: Any = kept) -> object:
            return RotateAndRound.forward(kept, weight, matrix, prepared.multiplier, 8.0, None, torch.bfloat16, back)

        def backward(incoming: Tensor = incoming, kept: Any = kept) -> object:
            return RotateAndRound.backward(kept, incoming)

        for back in (False, True):
            name = f"weights {rows} x {width}{' and rotated back' * back}"
            show(f"{name} *", size, lambda back=back: forward(back))  # type: ignore[misc]
            show(f"{name} back *", size, backward)
            for tile, warps in ((16, 2), (32, 4), (32, 8), (64, 4)):
                choice = {"_WEIGHT_TILE": tile, "_WEIGHT_WARPS": warps}
                changed = with_constants(triton_rounding, lambda back=back: forward(back), **choice)  # type: ignore[misc]
                show(f"{name} as {tile} rows, {warps} warps", size, changed)
                changed = with_constants(triton_rounding, backward, **choice)
                show(f"{name} back as {tile} rows, {warps} warps", size, changed)

        def plain(weight: Tensor) -> Tensor:
            return compress(rotate(weight, 128), prepared, training=True).bfloat16()

        both_ways(f"weights {rows} x {width}", size, size, plain, [weight])


def main() -> None:
    functions = (softmax, norm, swiglu, rotary, attention, rounding, weights, adamw)
    groups = {function.__name__: function for function in functions}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=[*groups])
    for name in parser.parse_args().groups:
        groups[name]()


if __name__ == "__main__":
    main()
