"""Kernels of our own on one GPU, one by one: time, share of memory speed, and the generated code that they replace.

Shapes are those of a 30M model (64 x 512 tokens, width 640, 5 heads of 128, 32,000 words). Times are those of the GPU
alone, from the profiler; TB/s counts the numbers that have to be read and written once. Lines with `as` name other
choices of tile, warps, programs or stages than the ones in use (marked *).

    python benchmarks/kernels.py
    python benchmarks/kernels.py softmax norm rotary rounding adamw
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpipe import triton_adamw, triton_kernels, triton_norm, triton_rotary
from qpipe.compress import triton_rounding
from qpipe.compress.prepare import prepare
from qpipe.compress.quantize import compress
from qpipe.compress.rotation import hadamard, rotate
from qpipe.formats import resolve
from qpipe.model import rotate as rotate_heads

TOKENS, WIDTH, INNER, HEADS, WORDS = 64 * 512, 640, 1792, 5, 32000
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
    kept = SimpleNamespace(saved_tensors=())
    kept.save_for_backward = lambda *tensors: setattr(kept, "saved_tensors", tensors)
    return kept


def with_constants(module: Any, work: Callable[[], object], **constants: int) -> Callable[[], object]:
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

    def work() -> object:
        return triton_kernels.softmax_gradient_(logits, targets, 1e-4)

    show("softmax *", size, work)
    for lanes, warps in ((256, 4), (512, 8), (1024, 8), (2048, 16), (2048, 32)):
        choice: dict[str, int] = {"_LANES": lanes, "_WARPS": warps}
        show(f"softmax as {8 * lanes} numbers, {warps} warps", size, with_constants(triton_kernels, work, **choice))


def norm() -> None:
    residual = torch.randn(TOKENS, WIDTH, device="cuda")
    update, weight = residual.bfloat16(), torch.ones(WIDTH, device="cuda")
    numbers, kept = TOKENS * WIDTH, context()
    size, back = numbers * (2 * FP32 + 2 * BF16), numbers * (3 * FP32 + 2 * BF16)

    def forward() -> object:
        return triton_norm.AddNorm.forward(kept, residual, update, weight, 1e-5, torch.bfloat16)

    def backward() -> object:
        return triton_norm.AddNorm.backward(kept, residual, update)

    show("norm *", size, forward)
    show("norm back *", back, backward)
    for count in (1024, 4096, 8192):
        show(f"norm as {count} numbers", size, with_constants(triton_norm, forward, _NUMBERS=count))
        show(f"norm back as {count} numbers", back, with_constants(triton_norm, backward, _NUMBERS=count))
    for programs in (528, 2048, 4096):
        show(f"norm back as {programs} programs", back, with_constants(triton_norm, backward, _PROGRAMS=programs))
    for per_warp in (256, 1024):
        show(f"norm back as {per_warp} per warp", back, with_constants(triton_norm, backward, _PER_WARP=per_warp))

    def plain(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + update
        return total, F.rms_norm(total, (WIDTH,), weight, 1e-5).to(update.dtype)

    both_ways("norm", size, back, plain, [residual, update, weight])


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


def rounding() -> None:
    part = resolve("w4a4").activations
    assert part is not None
    prepared = prepare(part)
    for width in (WIDTH, INNER):
        x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16)
        matrix, kept, size = hadamard(128, x.device, x.dtype), context(), TOKENS * width * (2 * BF16 + 1)

        def forward(x: Tensor = x, matrix: Tensor = matrix, kept: Any = kept) -> object:
            return triton_rounding.RotateAndRound.forward(kept, x, matrix, prepared.multiplier, 8.0)

        def backward(x: Tensor = x, kept: Any = kept) -> object:
            return triton_rounding.RotateAndRound.backward(kept, x)

        show(f"rounding {width} *", size, forward)
        show(f"rounding {width} back *", size, backward)
        for tile, warps in ((16, 4), (32, 4), (64, 4), (128, 8)):
            choice: dict[str, int] = {"_TILE": tile, "_WARPS": warps}
            name = f"{tile} tokens, {warps} warps"
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
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            update, graph = triton_adamw.CapturedAdamW(optimizer, 1.0), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                update.launch(torch.nn.utils.get_total_norm(gradients))
            update.fill()
            return update, graph  # the graph reads the table

        show(f"adamw {name}, torch's clipping and step", size, plain)
        for numbers, warps in ((2048, 4), (1024, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)):
            choice: dict[str, int] = {"_NUMBERS": numbers, "_WARPS": warps}
            kept: Any = with_constants(triton_adamw, made, **choice)()
            used = (numbers, warps) == (triton_adamw._NUMBERS, triton_adamw._WARPS)
            show(f"adamw {name} as {numbers} numbers, {warps} warps{' *' * used}", size, kept[1].replay)


def main() -> None:
    groups = {function.__name__: function for function in (softmax, norm, rotary, rounding, adamw)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=[*groups])
    for name in parser.parse_args().groups:
        groups[name]()


if __name__ == "__main__":
    main()
