"""Functions of a CPU's training step against autograd in float64, and the compiled step against the plain one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_cases import small_run, small_shape

from qpipe import cpu_functions
from qpipe.attention import attention_in_pieces, rotary_tables, rotated_parts
from qpipe.formats import resolve
from qpipe.model import Decoder, add_norm
from qpipe.train import step


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum of results, each number weighted differently, so that none can stand for another."""
    loss = sum((result * torch.arange(result.numel()).view_as(result).sin()).sum() for result in results)
    return list(torch.autograd.grad(loss, leaves))


def assert_float32_of(found: list[Tensor], exact: list[Tensor]) -> None:
    for number, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(number.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("numbers", [30, 100, 10_000])
def test_joined_norm_equals_float64(numbers: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_functions, "NUMBERS", numbers)  # parts of one token, of four, and all at once
    values = [torch.randn(3, 7, 24), torch.randn(3, 7, 24), 1 + torch.rand(24)]
    found, exact = [], []
    for leaves, into in ((values, found), ([value.double() for value in values], exact)):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        total, normed, _ = add_norm(*leaves, 1e-2, False)
        read = (normed,) if last else (total, normed)
        into += [total, normed, *gradients(read, leaves)]
    assert found[0].grad_fn.name() == "AddNormBackward"
    assert "AddNorm" not in exact[0].grad_fn.name()
    assert_float32_of(found, exact)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("numbers", [1, 2000, 100_000])
def test_rotary_equals_float64(numbers: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_functions, "NUMBERS", numbers)
    cosine, sine = (table[:13] for table in rotary_tables(small_shape(width=32, heads=4, kv_heads=kv_heads)))
    qkv = torch.randn(5, 13, 4 + 2 * kv_heads, 8)
    found, exact = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, exact)):
        leaf = qkv.to(dtype).requires_grad_()
        parts = rotated_parts(leaf, cosine.to(dtype), sine.to(dtype), 4, kv_heads)
        into += [*parts, *gradients(parts, [leaf])]
    assert "Rotary" in found[0].grad_fn.name()
    assert "Rotary" not in exact[0].grad_fn.name()
    assert_float32_of(found, exact)


@pytest.mark.parametrize("length", [5, 64, 100, 300])
def test_attention_in_pieces_equals_float64(length: int) -> None:
    values = [torch.randn(2, 3, length, 8) for _ in range(3)]
    leaves = [value.requires_grad_() for value in values]
    exact_leaves = [value.detach().double().requires_grad_() for value in values]
    result = attention_in_pieces(*leaves)
    exact = torch.nn.functional.scaled_dot_product_attention(*exact_leaves, is_causal=True)
    found = [result, *gradients((result,), leaves)]
    assert_float32_of(found, [exact, *gradients((exact,), exact_leaves)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("representation", "length"), [("dense", 16), ("w4", 16), ("2:4", 16), ("dense", 130), ("dense", 600)]
)
def test_compiled_step_equals_the_plain_one(representation: str, length: int) -> None:
    tokens = torch.randint(0, 64, (4, length + 1))
    results = []
    for compiled in (False, True):
        decoder = Decoder(small_shape(context=length), resolve(representation))
        decoder.initialize(0)
        if compiled:
            step.compile_model(decoder)
        loss = decoder.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in decoder.parameters())])
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


_THREE_STEPS = """
import logging
import sys
import torch
import qpipe.train.step
from qpipe.model import Decoder
from qpipe.train.step import TrainingStep, make_optimizer
from training_cases import small_run

logging.basicConfig()
qpipe.train.step.LONG_RUN = float(sys.argv[1])
run = small_run("w4", steps=3)
model = Decoder(run.shape, run.format_spec)
model.initialize(0)
step, optimizer = TrainingStep(model, run, 4, single=True), make_optimizer(model, run.training)
print(step.compiling)
for number in range(3):
    generator = torch.Generator().manual_seed(number)
    loss, norm = step(torch.randint(0, 64, (8, 17), generator=generator), number, optimizer)
    print(loss.item(), norm.item())
"""


def three_steps(long_run: float, **environment: str) -> tuple[bool, list[float], str]:
    """Whether a run is compiled where a long one has so many FLOPs, its losses and norms, and what it says."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    known = {key: value for key, value in os.environ.items() if not key.startswith("QPIPE_")}
    command = [sys.executable, "-c", _THREE_STEPS, str(long_run)]
    done = subprocess.run(
        command, env={**known, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=True
    )
    first, *numbers = done.stdout.split()
    return first == "True", [float(number) for number in numbers], done.stderr


@pytest.fixture(scope="module")
def plain_steps() -> list[float]:
    compiled, found, said = three_steps(1e30)
    assert not compiled
    assert "without compiling" not in said
    return found


@pytest.mark.parametrize("body", [None, "exit 1", "echo 14.0"], ids=["missing", "broken", "only a version"])
def test_a_long_run_without_a_compiler_is_trained_as_a_short_one(
    tmp_path: Path, plain_steps: list[float], body: str | None
) -> None:
    compiler = tmp_path / "compiler"
    if body is not None:
        compiler.write_text(f"#!/bin/sh\n{body}\n")
        compiler.chmod(0o755)
    compiled, found, said = three_steps(0, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert not compiled
    assert found == plain_steps
    assert re.search(r"training without compiling, which for a run this long would be faster: .*\w{3}", said)


@pytest.mark.parametrize("name", ["w4a4", "noise4", "w4-diffq", "w4-quantnoise"])
def test_compressed_activations_and_random_numbers_are_not_compiled_by_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QPIPE_COMPILE", raising=False)
    monkeypatch.setattr(step, "LONG_RUN", 0)
    run = small_run(name, steps=3)
    assert not step.TrainingStep(Decoder(run.shape, run.format_spec), run, 4, single=True).compiling


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_long_run_is_compiled(plain_steps: list[float]) -> None:
    compiled, found, said = three_steps(0)
    assert compiled
    assert "without compiling" not in said
    assert found == pytest.approx(plain_steps, rel=1e-3)
