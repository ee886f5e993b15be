"""`qpipe ptq` from checkpoint to packed file and export, for every method, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ptq_cases import CPU, quantize, refused, save_run, save_tokens
from training_cases import small_run

from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.ptq.measure import measure_distortion
from qpipe.ptq.network import Network, load_network
from qpipe.ptq.packed import build, read_packed
from qpipe.ptq.result import PtqResult, load_result
from qpipe.ptq.text import choose_text
from qpipe.ptq_methods import METHODS
from qpipe.record import LOSS_SCHEMA
from qpipe.train.results import file_digest


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ptq")
    save_run(folder / "run")
    save_tokens(folder / "tokens")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_promises(place, tmp_path, method):
    """Bits, the file that holds them, and the loss that the file gives."""
    result = quantize(place, tmp_path / "out", method, bits=3.3)
    packed = read_packed(tmp_path / "out" / "packed.safetensors")
    assert 3.3 - 0.02 < result.bits_per_weight <= 3.3
    counted = sum(
        t.numel() * t.element_size() for name, t in _tensors(tmp_path / "out").items() if _quantized(name, packed)
    )
    weights = sum(layer.weights for layer in result.layers.values())
    assert counted * 8 / weights == pytest.approx(result.bits_per_weight, abs=0.02)  # whole bytes per tensor
    assert counted * 8 / weights >= result.bits_per_weight
    network = build(packed, CPU)
    assert result.loss == pytest.approx(_loss(network, place), abs=2e-6)
    assert result.dense_loss == pytest.approx(_loss(load_network(place / "run", CPU)[0], place), abs=2e-6)
    assert result.perplexity == pytest.approx(np.exp(result.loss))
    assert load_result(tmp_path / "out" / "ptq.json") == result
    assert not (tmp_path / "out" / "scratch").exists()


def _tensors(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "packed.safetensors")


def _quantized(name: str, packed) -> bool:
    return name.rpartition(".")[0] in packed.layers


def _loss(network: Network, place: Path) -> float:
    """Cross-entropy of every validation token but the first, each window of 16 from its own start, in float64."""
    split = np.fromfile(next((place / "tokens").glob("validation-00000.bin")), "<u2").astype(np.int64)
    total, context = 0.0, 16
    for start in range(0, len(split) - 1, context):
        stop = min(start + context, len(split) - 1)
        first = max(0, stop - context)
        tokens = torch.from_numpy(split[first : stop + 1])[None]
        with torch.no_grad():
            logits = network.head(network.hidden(tokens[:, :-1])).double()
        losses = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
        total += float(losses[start - first :].sum())
    return total / (len(split) - 1)


@pytest.mark.parametrize("bits", [1.7, 2.1, 3.0, 4.5])
def test_cvxq_meets_any_rate(place, tmp_path, bits):
    """As near as its smallest step: one bit more for one group of 32 weights."""
    result = quantize(place, tmp_path / "out", bits=bits)
    weights = sum(layer.weights for layer in result.layers.values())
    assert bits - 2 * 48 / weights < result.bits_per_weight <= bits


def test_payload_only_counts_codes(place, tmp_path):
    result = quantize(place, tmp_path / "out", bits=2.5, payload_only=True)
    weights = sum(layer.weights for layer in result.layers.values())
    assert 2.5 - 96 / weights < result.payload_bits <= 2.5 < result.bits_per_weight


def test_eight_bits_are_lossless_to_rounding(place, tmp_path):
    result = quantize(place, tmp_path / "out", bits=8.0, payload_only=True)
    assert abs(result.loss - result.dense_loss) < 5e-3
    assert result.zero_bit_share == 0


def test_allocation_lowers_the_output_error(place, tmp_path):
    """On identical quantizers, with columns of unequal size and sensitivity; the prediction is of the right size."""
    common = {"bits": 2.5, "payload_only": True, "feedback": False, "sequences": 16, "iterations": 1}
    common |= {"rows": 512, "columns": 1, "clustered": True, "probe": "hidden", "tempered": False}
    found = {
        name: quantize(place, tmp_path / name, allocation=name, **common)
        for name in ("variance", "closed-form", "table", "measured", "exact")
    }
    error = {name: result.measured_distortion for name, result in found.items() if name != "variance"}
    assert found["exact"].predicted_distortion <= found["measured"].predicted_distortion * (1 + 1e-9)
    assert found["measured"].predicted_distortion <= found["exact"].predicted_distortion * (
        1 + found["measured"].allocation_gap + 1e-9
    )
    dense = load_network(place / "run", CPU)[0]
    text = choose_text(TokenStore.open(place / "tokens"), dense, 16, seed=0)
    stored = build(read_packed(tmp_path / "variance" / "packed.safetensors"), CPU)
    blind = measure_distortion(stored, dense, text, "hidden")
    assert max(error.values()) < 0.8 * blind
    assert max(error.values()) < 1.5 * min(error.values())
    assert 0.3 < found["measured"].measured_distortion / found["measured"].predicted_distortion < 3
    assert found["measured"].partition_gain > 0.3


def test_sizes_hold_for_the_whole_file(place, tmp_path):
    roomy = quantize(place, tmp_path / "a", bits=4.0)
    asked = roomy.file_bytes + 1500
    result = quantize(place, tmp_path / "b", size=asked)
    assert asked - 8000 < (tmp_path / "b" / "packed.safetensors").stat().st_size <= asked
    with pytest.raises(QpipeError, match="ask for more"):
        quantize(place, tmp_path / "c", size=10_000)
    assert 1 < result.bits_per_weight < 6


def test_a_largest_loss_increase_is_kept_on_held_out_text(place, tmp_path):
    result = quantize(place, tmp_path / "out", max_loss_increase=0.05, feedback=False, iterations=1)
    dense = quantize(place, tmp_path / "dense", bits=8.5, feedback=False, iterations=1)
    assert result.selection_loss - dense.selection_loss < 0.055
    assert result.bits_per_weight < 7
    assert result.target.bits is None


def test_bias_correction_keeps_the_mean_of_every_output(place, tmp_path):
    """Mean outputs of the first block's layers on calibration text, dense against quantized."""
    result = quantize(place, tmp_path / "out", bits=2.0, bias_correction=True, feedback=False, sequences=64)
    assert result.bits["biases"] == 16 * sum(layer.group[0] and shape for layer, shape in _rows(result, place))
    stored, dense = (
        build(read_packed(tmp_path / "out" / "packed.safetensors"), CPU),
        load_network(place / "run", CPU)[0],
    )
    tokens = torch.from_numpy(np.fromfile(place / "tokens" / "train-00000.bin", "<u2").astype(np.int64)[:1600]).view(
        -1, 16
    )
    means = []
    for network in (dense, stored):
        seen: list[torch.Tensor] = []
        handle = network.linears()["blocks.0.attention.qkv"].register_forward_hook(lambda m, i, o, s=seen: s.append(o))
        network.hidden(tokens)
        handle.remove()
        means.append((seen[0].mean((0, 1)), seen[0].std()))
    stored_linear = stored.linears()["blocks.0.attention.qkv"]
    uncorrected = means[1][0] - stored_linear.bias - means[0][0]
    assert float((means[1][0] - means[0][0]).norm()) < 0.5 * float(uncorrected.norm())


def _rows(result: PtqResult, place: Path):
    linears = load_network(place / "run", CPU)[0].linears()
    return [(layer, linears[name].out_features) for name, layer in result.layers.items()]


def test_results_are_deterministic_and_seeds_differ(place, tmp_path):
    first, again, other = (quantize(place, tmp_path / str(k), bits=2.2, seed=k // 2) for k in range(3))
    assert first == again
    assert (tmp_path / "0" / "packed.safetensors").read_bytes() == (tmp_path / "1" / "packed.safetensors").read_bytes()
    assert other.loss != first.loss


def test_the_row_of_the_loss_table_has_its_columns(place, tmp_path):
    result = quantize(place, tmp_path / "out", "rtn", bits=3.5)
    row = result.loss_row()
    assert set(row) == set(LOSS_SCHEMA.names)
    assert row["representation"] == "w3.5-rtn"
    assert row["ptq_bits"] == result.bits_per_weight
    assert row["w_bits"] == 16  # what training knew of
    assert (row["parent"], row["parent_loss"]) == (result.record.id, result.dense_loss)
    assert row["loss"] == result.loss
    assert row["n_compressed"] == result.record.run.parameters.blocks_linear


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_and_nothing_is_written(place, tmp_path, capsys):
    run, tokens, out = place / "run", place / "tokens", tmp_path / "out"
    assert "more than 0" in refused(capsys, run, out, "--bits", 0, "--method", "rtn")
    assert "nan" in refused(capsys, run, out, "--bits", "nan", "--method", "rtn")
    assert "needs text" in refused(capsys, run, out, "--bits", 3)
    assert "did you mean 'cvxq'" in refused(capsys, run, out, "--bits", 3, "--method", "cvqx")
    assert "did you mean 'rows'" in refused(capsys, run, out, "--bits", 3, "--set", "row=3")
    assert "greater than or equal to 1" in refused(capsys, run, out, "--bits", 3, "--set", "rows=0")
    assert "mixes the input columns" in refused(capsys, run, out, "--bits", 3, "--set", "rotation=32")
    assert "no checkpoint" in refused(capsys, tmp_path, out, "--bits", 3, "--method", "rtn")
    assert "not a token store" in refused(capsys, run, out, "--bits", 3, "--tokens", tmp_path)
    assert "alone take" in refused(
        capsys, run, out, "--bits", 0.4, "--method", "rtn", "--set", "columns=16", "--set", "offset=true"
    )
    message = refused(capsys, run, out, "--bits", 3, "--tokens", tokens, "--set", "sequences=4000")
    assert "too short" in message
    assert "8064 sequences" in message
    assert not out.exists()


def test_checkpoints_that_are_no_model_are_refused(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "changed")
    data = bytearray((tmp_path / "changed" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed" / "model.safetensors").write_bytes(data)
    arguments = (tmp_path / "out", "--bits", 3, "--method", "rtn")
    assert "digest differs" in refused(capsys, tmp_path / "changed", *arguments)
    save_run(tmp_path / "compressed", small_run())
    record = json.loads((tmp_path / "compressed" / "record.json").read_text())
    other = small_run("w4")
    record |= {"id": other.id, "run": other.model_dump(mode="json")}
    (tmp_path / "compressed" / "record.json").write_text(json.dumps(record))
    assert "trained as 'w4'" in refused(capsys, tmp_path / "compressed", *arguments)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    assert "known types: llama, opt" in refused(capsys, tmp_path / "foreign", *arguments)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    record = save_run(tmp_path / "run")
    state = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    state["blocks.1.feed_forward.down.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, tmp_path / "run" / "model.safetensors")
    digest = file_digest(tmp_path / "run" / "model.safetensors")
    record.model_copy(update={"weights_digest": digest}).write(tmp_path / "run" / "record.json")
    message = refused(capsys, tmp_path / "run", tmp_path / "out", "--bits", 3, "--method", "rtn")
    assert "blocks.1.feed_forward.down.weight" in message


def test_a_folder_in_use_is_refused_and_a_finished_one_is_left(place, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    arguments = ("--bits", 3, "--method", "rtn", "--tokens", place / "tokens")
    assert "notes.txt" in refused(capsys, place / "run", tmp_path / "used", *arguments)
    quantize(place, tmp_path / "out", "rtn", bits=3.0)
    before = (tmp_path / "out" / "ptq.json").stat().st_mtime_ns
    quantize(place, tmp_path / "out", "rtn", bits=3.0)
    assert (tmp_path / "out" / "ptq.json").stat().st_mtime_ns == before
    with pytest.raises(QpipeError, match="another result"):
        quantize(place, tmp_path / "out", "rtn", bits=3.1)


def test_damaged_packed_files_are_refused(place, tmp_path):
    quantize(place, tmp_path / "out", "rtn", bits=3.0)
    path = tmp_path / "out" / "packed.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(QpipeError, match="not a packed model"):
        read_packed(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(QpipeError, match="not a packed model"):
        read_packed(path)


def test_killed_work_goes_on_and_ends_with_the_same_file(place, tmp_path):
    """`kill -9` after the first round is kept, then the same command again; against an undisturbed run."""
    command = [sys.executable, "-m", "qpipe", "ptq", str(place / "run"), str(tmp_path / "killed"), "--bits", "2.5",
               "--tokens", str(place / "tokens"), "--set", "iterations=12", "--set", "sequences=4"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "killed" / "scratch" / "rounds.safetensors"
    deadline = time.monotonic() + 120
    while not kept.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert kept.exists()
    assert not (tmp_path / "killed" / "ptq.json").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "round 1:" not in again.stderr
    quantize(place, tmp_path / "undisturbed", bits=2.5, iterations=12, sequences=4)
    for name in ("ptq.json", "packed.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_finished_blocks_are_not_rounded_again(place, tmp_path, monkeypatch):
    """Interrupted between blocks: the second attempt reads the first block from scratch and ends the same."""
    import qpipe.ptq.rounding as rounding

    quantize(place, tmp_path / "whole", "gptq", bits=3.0)
    rounded, real = [], rounding.round_layer

    def failing(task, depth, method, inputs=None):
        rounded.append(1)
        if len(rounded) == 6:
            raise KeyboardInterrupt
        return real(task, depth, method, inputs)

    monkeypatch.setattr(rounding, "round_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(place, tmp_path / "out", "gptq", bits=3.0)
    assert not (tmp_path / "out" / "ptq.json").exists()
    rounded.clear()
    rounded.extend([1] * 10)
    result = quantize(place, tmp_path / "out", "gptq", bits=3.0)
    assert len(rounded) == 14  # the second block's four layers
    assert (tmp_path / "out" / "packed.safetensors").read_bytes() == (
        tmp_path / "whole" / "packed.safetensors"
    ).read_bytes()
    assert result == load_result(tmp_path / "whole" / "ptq.json")


def test_help_does_not_load_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qpipe", "ptq", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "example:" in done.stdout
    assert " torch" not in done.stderr


def test_tempering_never_raises_the_held_out_loss(place, tmp_path):
    """The plan that trusts sensitivities fully is among the candidates, on the text that selects."""
    common = {"bits": 2.2, "feedback": False, "iterations": 1}
    full = quantize(place, tmp_path / "full", tempered=False, **common)
    chosen = quantize(place, tmp_path / "tempered", tempered=True, **common)
    assert chosen.selection_loss <= full.selection_loss + 1e-6
    assert chosen.power in (1.0, 0.5, 0.0)
    if chosen.power != 1.0:
        assert chosen.predicted_distortion >= full.predicted_distortion  # no other plan has a smaller prediction


def test_evenly_spread_depths_compete_once_errors_are_fed_back(place, tmp_path):
    """On the same calibration text, so even depths alone are one of the two candidates."""
    common = {"bits": 2.2, "iterations": 1}
    even = quantize(place, tmp_path / "even", allocation="uniform", tempered=False, **common)
    chosen = quantize(place, tmp_path / "chosen", tempered=True, **common)
    assert chosen.selection_loss <= even.selection_loss + 1e-6
    if chosen.power is None:
        assert chosen.selection_loss == pytest.approx(even.selection_loss, abs=1e-6)
        assert chosen.allocation_gap is None
    assert chosen.predicted_distortion > 0
    assert 2.2 - 0.02 < chosen.bits_per_weight <= 2.2
