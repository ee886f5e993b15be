"""Whole trainings: what they write, when they refuse, how they end when things go wrong."""

import json
import logging
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
from training_cases import make_store, markov_tokens, small_run

from qpipe.cli import main
from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.record import Record, load_record
from qpipe.runs import Run
from qpipe.train.data import Batches
from qpipe.train.evaluate import evaluate_run
from qpipe.train.pretrain import train_run
from qpipe.train.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("untracked")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "tokens", train=40_000)


def train(run: Run, store: TokenStore, out: Path) -> Record:
    out.mkdir(parents=True, exist_ok=True)
    run.write(out / "run.yaml")
    return train_run(out / "run.yaml", store.path, out)


@pytest.fixture(scope="module")
def trained(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(small_run("w4a4", steps=300), store, out)
    return out


def test_learns_what_there_is_to_learn(trained: Path, store: TokenStore) -> None:
    """Tokens are uniform and each is followed by one of four: the loss must come down from ln 64 to near ln 4."""
    record = load_record(trained / "record.json")
    assert math.log(4) - 0.02 < record.loss < math.log(4) + 0.15
    curve = pyarrow.parquet.read_table(trained / "curve.parquet").to_pandas()
    assert curve["train_loss"][0] == pytest.approx(math.log(64), abs=0.1)
    tail = curve["train_loss"][curve["step"] > 285]
    assert record.train_loss == pytest.approx(tail.mean(), rel=1e-6)


def test_record_counts_exactly(trained: Path, store: TokenStore) -> None:
    record = load_record(trained / "record.json")
    run = record.run
    weights = safetensors.torch.load_file(trained / "model.safetensors")
    blocks = sum(value.numel() for name, value in weights.items() if name.startswith("blocks.") and value.dim() == 2)
    norms = sum(value.numel() for value in weights.values() if value.dim() == 1)
    assert (record.n, record.n_compressed, record.n_embedding) == (blocks + norms, blocks, 2 * 64 * 32)
    assert (record.d, record.steps) == (300 * 8 * 16, 300)
    assert record.validation_tokens == len(store.validation) - 1
    assert record.bits_per_byte == pytest.approx(record.loss / math.log(2) / 4)  # the store has 4 bytes per token
    assert record.tokens_digest == store.digest
    assert (record.payload_bits, record.flops) == (4.0, run.flops)
    runtime = json.loads((trained / "runtime.json").read_text())
    assert runtime["epochs"] == pytest.approx(300 * 8 / (40_000 // 17))
    assert not (trained / "scratch").exists()


def test_curve_has_a_row_per_interval_with_units(trained: Path) -> None:
    table = pyarrow.parquet.read_table(trained / "curve.parquet")
    curve = table.to_pandas()
    assert curve["step"].tolist() == list(range(1, 301))
    assert curve["tokens"].tolist() == [128 * step for step in range(1, 301)]
    run = load_record(trained / "record.json").run
    assert curve["learning_rate"].tolist() == [learning_rate(run.training, step, 300) for step in range(300)]
    validated = curve.dropna()["step"].tolist()
    assert validated == list(range(30, 301, 30))
    assert table.schema.field("train_loss").metadata[b"unit"].startswith(b"nats/token")


def test_first_loss_and_gradient_are_those_of_the_initial_model(trained: Path, store: TokenStore) -> None:
    import torch

    from qpipe.model import Decoder

    run = load_record(trained / "record.json").run
    decoder = Decoder(run.shape, run.format_spec)
    decoder.initialize(run.seed)
    tokens = torch.from_numpy(Batches(store.train, 16, 8, run.seed).read(0)).long()
    logits = decoder(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in decoder.parameters()]).norm()
    row = pyarrow.parquet.read_table(trained / "curve.parquet").to_pylist()[0]
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_evaluate_reproduces_the_loss_to_the_last_bit(
    trained: Path, store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_run(trained, store.path / "manifest.json")
    assert result.found == result.recorded == load_record(trained / "record.json").loss
    assert main(["evaluate", str(trained), str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reproduced"] is True


def test_evaluate_notices_a_loss_that_is_not_the_models(
    trained: Path, store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = load_record(trained / "record.json")
    record.model_copy(update={"loss": record.loss + 1e-3}).write(tmp_path / "record.json")
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    assert main(["evaluate", str(tmp_path), str(store.path)]) == 1
    assert "NOT reproduced" in capsys.readouterr().out


def test_evaluate_refuses_foreign_weights_and_tokens(trained: Path, store: TokenStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "tokens", validation=800)
    with pytest.raises(QpipeError, match="not the token store"):
        evaluate_run(trained, other.path)
    (tmp_path / "record.json").write_bytes((trained / "record.json").read_bytes())
    with pytest.raises(QpipeError, match=r"model\.safetensors is missing"):
        evaluate_run(tmp_path, store.path)
    weights = bytearray((trained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(QpipeError, match="digest"):
        evaluate_run(tmp_path, store.path)


def test_a_finished_run_is_left_alone(trained: Path, store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with caplog.at_level(logging.INFO, "qpipe.train"):
        train_run(trained / "run.yaml", store.path, trained)
    assert "already finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_results_that_cannot_be_written_cost_no_training(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, undisturbed, out = small_run("w4a4", steps=20), tmp_path / "undisturbed", tmp_path / "out"
    train(run, store, undisturbed)
    monkeypatch.setenv("QPIPE_CHECKPOINT_SECONDS", "0")
    (out / "model.safetensors").mkdir(parents=True)  # in the way of the weights
    with pytest.raises(QpipeError, match="results cannot be written"):
        train(run, store, out)
    assert not (out / "record.json").exists()
    (out / "model.safetensors").rmdir()
    with caplog.at_level(logging.INFO, "qpipe.train"):
        train(run, store, out)
    assert "resumes from step-00000020" in caplog.text
    for name in ("record.json", "model.safetensors", "curve.parquet"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_another_runs_folder_is_refused(trained: Path, store: TokenStore, tmp_path: Path) -> None:
    small_run(steps=5).write(tmp_path / "run.yaml")
    with pytest.raises(QpipeError, match="holds the record of run"):
        train_run(tmp_path / "run.yaml", store.path, trained)


def test_wrong_input_exits_with_2(store: TokenStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_run(vocab_size=128).write(tmp_path / "run.yaml")
    small_run().model_copy(update={"corpus": "0" * 12}).write(tmp_path / "other.yaml")
    for arguments, message in (
        ([tmp_path / "run.yaml", store.path], "embedding of 128 rows"),
        ([tmp_path / "other.yaml", store.path], "belongs to corpus 000000000000"),
        ([tmp_path / "run.yaml", tmp_path], "not a token store"),
        ([tmp_path / "none.yaml", store.path], "no such file"),
    ):
        assert main(["train", *map(str, arguments), str(tmp_path / "out")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["QPIPE_CHECKPOINT_SECONDS", "WANDB_MODE"])
def test_wrong_environment_is_refused(
    name: str, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "onlin")
    with pytest.raises(QpipeError, match="onlin"):
        train(small_run(steps=3), store, tmp_path)


def test_divergence_is_a_result(store: TokenStore, tmp_path: Path) -> None:
    record = train(small_run(steps=200, learning_rate=10.0), store, tmp_path)
    assert (record.status, record.loss, record.train_loss) == ("diverged", None, None)
    assert "above 8.32 (2 ln V) at step 21 of 200" in record.message  # a tenth of the steps is for settling
    assert record.steps == 21
    assert load_record(tmp_path / "record.json") == record
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert evaluate_run(tmp_path, store.path).reproduced


def test_not_a_number_names_its_first_step(store: TokenStore, tmp_path: Path) -> None:
    """Overflow on purpose: at a rate of 1e38 the weights leave float32 in the first steps."""
    record = train(small_run(steps=400, learning_rate=1e38, warmup_fraction=0.0), store, tmp_path)
    assert record.status == "diverged"
    assert "not finite at step 2 of 400" in record.message
    assert record.steps == 2


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"schedule": "wsd"}, {"tied_embeddings": True}])
def test_other_policies_train_and_evaluate(changes: dict[str, object], store: TokenStore, tmp_path: Path) -> None:
    record = train(small_run(steps=150, **changes), store, tmp_path)
    assert record.loss < 3.0
    assert evaluate_run(tmp_path, store.path).found == record.loss


def test_micro_batches_sum_to_the_same_gradient(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for micro in (8, 3):
        monkeypatch.setattr("qpipe.train.module.sequences_at_once", lambda shape, batch, micro=micro: micro)
        train(small_run(steps=10), store, tmp_path / str(micro))
        curves.append(pyarrow.parquet.read_table(tmp_path / str(micro) / "curve.parquet").to_pandas())
    assert np.allclose(curves[0]["train_loss"], curves[1]["train_loss"], rtol=1e-5)
    assert np.allclose(curves[0]["gradient_norm"], curves[1]["gradient_norm"], rtol=1e-3)


def test_all_representations_see_the_same_tokens(store: TokenStore, tmp_path: Path) -> None:
    orders = [Batches(store.train, 16, 8, small_run(name).seed).order(7) for name in ("dense", "w4a4")]
    assert np.array_equal(*orders)
    assert not np.array_equal(markov_tokens(100), markov_tokens(100, seed=1))


def _limit_file_size(size: int) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk(store: TokenStore, tmp_path: Path) -> None:
    """No file may grow beyond 40 kB: checkpoints (300 kB) fail, training goes on; weights (100 kB) fail."""
    small_run(steps=100).write(tmp_path / "run.yaml")
    out = tmp_path / "out"
    environment = {**os.environ, "QPIPE_CHECKPOINT_SECONDS": "0.05", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qpipe", "train", str(tmp_path / "run.yaml"), str(store.path), str(out)]
    limited = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: _limit_file_size(40_000),
        check=False,
    )
    assert limited.returncode == 2, limited.stderr
    assert "could not be written, training goes on" in limited.stderr
    assert "results cannot be written" in limited.stderr
    assert [path.name for path in out.iterdir()] == ["scratch"]
    assert not list((out / "scratch").glob("*.ckpt"))
    assert not list((out / "scratch").glob(".*.tmp"))
