"""Predicted GPU memory against what autograd and AdamW keep, counted tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from training_cases import small_run

from qpipe.cli.plan import _row
from qpipe.compress.tables import _KEPT
from qpipe.formats import resolve
from qpipe.memory import activation_bytes, sequences_at_once, step_memory, weight_gate_bytes
from qpipe.model import Decoder
from qpipe.recipe import QUEST, ModelShape
from qpipe.runs import Run
from qpipe.train.step import make_optimizer

WIDE = {"width": 128, "heads": 2, "kv_heads": 2, "feed_forward": 256, "context": 64, "precision": "bf16"}
H200_GIB = 139


def bytes_kept(run: Run, sequences: int, device: str = "cpu") -> int:
    """Bytes of the distinct tensors that a forward pass keeps for backward, without parameters and constants."""
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    model.to(device)
    tokens = torch.zeros(sequences, run.shape.context, dtype=torch.long, device=device)
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            model.hidden(tokens)  # trained scales start from data
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = model.hidden(tokens)
    assert result.requires_grad
    others = [*model.parameters(), *model.buffers(), *_KEPT.values(), tokens]
    for tensor in others:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize(
    "name", ["w4", "w4a4", "w3-lsq", "w3a8-lsq", "w2-seq", "s50", "2:4+w4a4", "mxfp4", "w1a1", "noise4", "vq2x256"]
)
def test_what_compression_keeps(name: str):
    dense, run = small_run(**WIDE), small_run(name, **WIDE)
    few, many = (bytes_kept(run, count) - bytes_kept(dense, count) for count in (2, 6))
    activations, weights = (many - few) / 4, few - (many - few) / 2
    # Here, without a GPU, nothing is rotated and rounded in one kernel, as if nothing were rotated.
    spec = run.format_spec.model_copy(update={"rotation": None})
    per_token = run.shape.layers * activation_bytes(run.shape, spec, 2)
    assert activations == pytest.approx(run.shape.context * per_token, rel=0.01, abs=1)
    expected = run.shape.layers * weight_gate_bytes(run.shape, spec)
    assert weights == pytest.approx(expected, rel=0.02, abs=0.01 * run.parameters.blocks_linear)


@pytest.mark.parametrize(
    ("name", "weight_gate", "input_gate"),
    [("w4a4", 1 / 8, 1 / 8), ("w4", 1 / 8, 0), ("w4a4-unrotated", 1, 1), ("w1a1", 1, 1), ("2:4+w4a4", 1, 1 / 8)],
)
def test_a_gate_is_a_bit_where_a_kernel_rotates_and_rounds(name: str, weight_gate: float, input_gate: float):
    run = small_run(name, **WIDE)
    width, inner = run.shape.width, run.shape.feed_forward
    assert weight_gate_bytes(run.shape, run.format_spec) == weight_gate * (4 * width**2 + 3 * width * inner)
    rounded_copy = 2 * width if input_gate else 0
    assert activation_bytes(run.shape, run.format_spec, 2) == rounded_copy + input_gate * (3 * width + inner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["dense", "w4", "w4a4"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_what_a_step_keeps_on_a_gpu(name: str, kv_heads: int):
    run = small_run(name, **{**WIDE, "width": 256, "feed_forward": 768, "context": 256, "kv_heads": kv_heads})
    expected = step_memory(run, 16)
    assert bytes_kept(run, 16, "cuda") == pytest.approx(expected.activations + expected.compression, rel=0.03)


@pytest.mark.parametrize("name", ["dense", "w4"])
def test_weights_gradients_and_moments(name: str):
    run = small_run(name)
    model = Decoder(run.shape, run.format_spec)
    model.initialize(0)
    optimizer = make_optimizer(model, run.training)
    tokens = torch.zeros(1, run.shape.context, dtype=torch.long)
    model.loss(tokens, tokens).backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    tensors += [tensor for p in model.parameters() for tensor in (p, p.grad)]
    assert step_memory(run).end == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("size", QUEST.rungs)
@pytest.mark.parametrize("name", ["dense", "w4", "w4a4", "w3a8-lsq"])
def test_the_ladder_fits_on_one_gpu(size: str, name: str):
    resolved = resolve(name)
    run = small_run(name).model_copy(
        update={
            "shape": QUEST.shape(size, 32_000),
            "training": QUEST.training(size),
            "representation": resolved.canonical(),
        }
    )
    memory = step_memory(run)
    assert memory.end < memory.total < H200_GIB * 2**30
    assert run.training.batch_sequences % sequences_at_once(run.shape, run.training.batch_sequences) == 0
    # More than the weights, gradients and moments of the published size, 16 bytes per parameter.
    assert memory.total > 16 * QUEST.rungs[size].nominal


def test_a_larger_micro_batch_needs_more():
    run = small_run(**WIDE)
    sizes = [step_memory(run, count).total for count in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_the_plan_names_the_memory(tmp_path: Path):
    row = json.loads(json.dumps(_row(small_run(), tmp_path, 1.0)))
    assert row["gpu_gib"] == pytest.approx(step_memory(small_run()).total / 2**30)


def test_micro_batches_shrink_with_width_and_divide_the_batch():
    shape = QUEST.shape("30M", 32_000)
    wide: ModelShape = QUEST.shape("800M", 32_000)
    assert sequences_at_once(shape, 512) * shape.context == 32_768
    assert sequences_at_once(wide, 512) * wide.context == 16_384
    assert 48 % sequences_at_once(shape, 48) == 0
