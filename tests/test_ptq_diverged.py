"""Quantizing what has no finite loss: a result that says so, and no model."""

import json

import numpy as np
import pandas as pd
import safetensors.torch
from ptq_cases import quantize, refused, save_run, save_tokens

from qpipe.cli import main
from qpipe.ptq.result import load_result
from qpipe.train.results import file_digest


def test_a_dense_run_that_diverged_is_a_result_without_a_model(tmp_path, capsys):
    """Read from disk with the plain tools that a user has: one row of status diverged, and no packed file."""
    save_run(tmp_path / "run", status="diverged", loss=None, bits_per_byte=None, message="loss is not finite at step 3")
    store, out = tmp_path / "tokens", tmp_path / "out"
    save_tokens(store)
    command = ["ptq", str(tmp_path / "run"), str(out), "--tokens", str(store), "--bits", "3"]
    assert main(command) == 0
    assert "diverged" in capsys.readouterr().out
    written = (out / "ptq.json").read_bytes()
    content = json.loads(written)
    assert (content["status"], content["loss"], content["bits_per_weight"]) == ("diverged", None, None)
    assert "loss is not finite at step 3" in content["message"]
    assert not (out / "packed.safetensors").exists()
    assert main(command) == 0  # finished, and left as it is
    assert (out / "ptq.json").read_bytes() == written
    capsys.readouterr()
    assert main([*command, "--export"]) == 2
    assert "no model to export" in capsys.readouterr().err
    assert main(["collect", str(out / "ptq.json"), "--out", str(tmp_path / "losses.parquet")]) == 0
    (row,) = pd.read_parquet(tmp_path / "losses.parquet").to_dict("records")
    assert (row["status"], row["representation"], row["ptq_method"]) == ("diverged", "w3-cvxq", "cvxq")
    assert np.isnan([row["loss"], row["parent_loss"], row["ptq_bits"], row["bits_per_weight"]]).all()


def test_what_is_asked_of_a_diverged_run_is_checked_all_the_same(tmp_path, capsys):
    save_run(tmp_path / "run", status="diverged", loss=None, message="loss is not finite at step 3")
    assert "more than 0" in refused(capsys, tmp_path / "run", tmp_path / "out", "--bits", 0, "--method", "rtn")
    assert "needs text" in refused(capsys, tmp_path / "run", tmp_path / "out", "--bits", 3)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_without_a_finite_loss_is_a_row_too(tmp_path):
    """An output head whose products overflow: finite weights, a loss that is not."""
    record = save_run(tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["head.weight"] *= 3e38 / state["head.weight"].abs().max()
    safetensors.torch.save_file(state, path)
    record.model_copy(update={"weights_digest": file_digest(path)}).write(tmp_path / "run" / "record.json")
    save_tokens(tmp_path / "tokens")
    result = quantize(tmp_path, tmp_path / "out", "rtn", bits=3.0)
    row = result.loss_row()
    assert (row["status"], row["loss"]) == ("diverged", None)
    assert 2.9 < row["ptq_bits"] <= 3.0
    assert load_result(tmp_path / "out" / "ptq.json") == result
