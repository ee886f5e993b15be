"""Representations in training: they learn, they leave what export can pack, devices and compilers agree."""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import make_store, markov_tokens, small_run, small_shape

from qpipe.cli import export
from qpipe.compress import make_linear
from qpipe.compress.model_file import save_packed
from qpipe.compress.rotation import rotate
from qpipe.errors import QpipeError
from qpipe.formats import catalogue_names, resolve
from qpipe.model import Decoder
from qpipe.train.pretrain import train_run

QUICK = ["w1a1", "w1.58", "w4e2m1", "2:4", "s75-rbbm", "s50-gradual", "w3a8-lsq", "w2-seq", "mxfp4", "vq2x16", "noise2"]
MASKED = ["s50", "s50-dense-gradient", "s50-rms", "s50-area", "2:4-gradual", "2:4+w4a4", "s50+w4", "s50-rbbm+w3-lsq"]
COMPILED = ["w4a4", "w1.58", "w4e2m1a4e2m1", "2:4+w4a4", "s50-rbbm", "w3a8-lsq", "mxfp4", "vq2x256"]


def losses_of_training(name: str, steps: int, width: int) -> list[float]:
    """Losses of a small decoder on a Markov chain whose entropy, ln 4, is far below the uniform ln 64."""
    torch.manual_seed(0)
    shape = small_shape(width=width, heads=2, kv_heads=2, feed_forward=width)
    model = Decoder(shape, resolve(name))
    model.initialize(0)
    tokens = torch.from_numpy(markov_tokens(steps * 8 * 17).astype("int64")).view(steps, 8, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(tokens):
        model.set_progress(step / steps)
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", QUICK)
def test_training_learns(name: str):
    losses = losses_of_training(name, steps=60, width=32)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*catalogue_names(), *MASKED}))
def test_every_preset_learns(name: str):
    losses = losses_of_training(name, steps=60, width=128)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.7


@pytest.mark.parametrize("name", ["w4a4", "2:4", "w2-seq"])
def test_exported_runs_reproduce_their_loss_from_packed_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    store = make_store(tmp_path / "tokens")
    run = small_run(name, steps=10)
    (tmp_path / "out").mkdir()
    run.write(tmp_path / "out" / "run.yaml")
    train_run(tmp_path / "out" / "run.yaml", store.path, tmp_path / "out")
    capsys.readouterr()
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    arguments = [str(tmp_path / "out"), str(tmp_path / "packed.safetensors"), "--tokens", str(store.path), "--json"]
    assert export.run(parser.parse_args(arguments)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reproduced"]
    assert result["bits_per_weight"] == pytest.approx(result["computed_bits_per_weight"], rel=0.01)


def test_a_weight_only_run_opens_in_transformers(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    run = small_run("w3-group32", steps=1)
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    save_packed(model, tmp_path / "m.safetensors", {})
    record = SimpleNamespace(run=run, id="x")
    folder = export.write_llama(export.packed_decoder(tmp_path / "m.safetensors", record), record, tmp_path / "llama")
    tokens = torch.randint(64, (2, 16))
    theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(theirs, model(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises(QpipeError, match="exists already"):
        export.write_llama(model, record, folder)
    record.run = small_run("w4a4")
    with pytest.raises(QpipeError, match="compresses activations"):
        export.write_llama(model, record, tmp_path / "other")


@pytest.mark.parametrize("name", ["w4-absmax", "w4-group32", "w3-mse", "w8-lsq", "w8e4m3-absmax"])
def test_a_quantized_folder_opens_in_transformers(name: str, tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    run = small_run(name, steps=1)
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    tokens = torch.randint(64, (2, 16))
    expected = model(tokens)
    folder = export.write_quantized(model, SimpleNamespace(run=run, id="x"), tmp_path / "llama")
    stored = load_file(folder / "model.safetensors")[
        "model.layers.0.mlp.down_proj.weight" + "_packed" * ("e4m3" not in name)
    ]
    assert stored.element_size() * stored.numel() <= 32 * 64  # a byte per weight at most
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("w4", "rotated"),
        ("2:4", "no grid"),
        ("s50+w4-absmax", "sparse"),
        ("w4a4-absmax", "activations"),
        ("mxfp4", "e2m1"),
    ],
)
def test_what_the_quantized_folder_cannot_hold_is_refused(name: str, reason: str, tmp_path: Path):
    run = small_run(name, steps=1)
    model = Decoder(run.shape, run.format_spec)
    with pytest.raises(QpipeError, match=reason):
        export.write_quantized(model, SimpleNamespace(run=run, id="x"), tmp_path / "llama")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    for name in catalogue_names():
        torch.manual_seed(0)
        layer = make_linear(256, 128, resolve(name)).eval()
        if name.startswith("noise") or isinstance(layer, torch.nn.Linear):
            continue
        layer(torch.randn(4, 256))
        on_cpu = layer.compressed_weight().clone()  # moving a layer moves what it shares
        on_gpu = layer.cuda().compressed_weight().cpu()
        # Sums in another order may carry a number over the border of its cell, seen in the basis of the cells.
        assert (rotate(on_cpu - on_gpu, layer.block).abs() > 1e-5 * on_cpu.abs().max()).float().mean() < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_step_equals_the_eager_one(name: str):
    torch.manual_seed(0)
    layer = make_linear(128, 64, resolve(name))
    x = torch.randn(32, 128)
    layer(x)
    expected = layer(x)
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in layer.named_parameters()}
    layer.zero_grad()
    result = torch.compile(layer)(x)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for parameter_name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["2:4", "mxfp4", "w2-lsq", "s50-gradual", "nvfp4", "s75-rbbm", "noise2", "w4e2m1a4e2m1"]
)
def test_layers_that_compile_their_parts_equal_plain_ones_and_are_evaluated_plainly(name: str):
    counter, needed = CompileCounterWithBackend("aot_eager"), 0
    for number, (inputs, outputs) in enumerate([(256, 64), (384, 96), (512, 160)]):
        x, incoming = torch.randn(2, 5, inputs), torch.randn(2, 5, outputs)
        plain, layer = (make_linear(inputs, outputs, resolve(name)) for _ in range(2))
        plain(x)  # finds trained scales
        layer.load_state_dict(plain.state_dict())
        for module in (plain, layer):
            module.set_progress(0.7)
        layer.compile(backend=counter)
        compiled = counter.frame_count
        if "noise" not in name:
            assert torch.equal(layer.eval()(x), plain.eval()(x))
        assert counter.frame_count == compiled
        gradients = []
        for module in (plain.train(), layer.train()):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(number)
            result = module(leaf)
            result.backward(incoming)
            gradients.append((result, leaf.grad, *(parameter.grad for parameter in module.parameters())))
        for found, expected in zip(*gradients, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        # Other shapes compile nothing anew, but where the scale of inputs is a token's. Noise is not compiled.
        needed = counter.frame_count if number == 0 else needed
        assert counter.frame_count == needed + (number if name == "w4e2m1a4e2m1" else 0)
        assert (needed == 0) == name.startswith("noise")
