"""Runs that start from other runs: what they inherit, and what neither interruption nor order may change."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from training_cases import make_store, small_run

from qpipe.cli import main
from qpipe.compress import CompressedLinear
from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.formats import resolve
from qpipe.model import Decoder
from qpipe.record import Record, load_record, loss_table
from qpipe.runs import Parent, Run, load_run
from qpipe.train.data import Batches
from qpipe.train.evaluate import evaluate_run
from qpipe.train.pretrain import train_run
from qpipe.train.schedule import run_learning_rate
from qpipe.train.validation import Validation

RESULTS = ("record.json", "model.safetensors")
pytestmark = pytest.mark.usefixtures("untracked")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "tokens", train=20_000)


def trunk(steps: int, **changes: Any) -> Run:
    return small_run(steps=steps, schedule="constant", warmup_steps=5, warmup_fraction=0.0, **changes)


def child(parent: Run, representation: str = "w2-seq", steps: int = 20, **changes: Any) -> Run:
    link = {"optimizer": "kept" if parent.keeps_state else "fresh", "horizon": changes.pop("horizon", None)}
    run = small_run(representation, **{"schedule": "wsd", "warmup_fraction": 0.0, **changes})
    return Run.model_validate({**run.model_dump(), "steps": steps, "parent": Parent(run=parent, **link)})


def train(run: Run, store: TokenStore, runs: Path) -> Record:
    out = runs / run.id
    run.write(out / "run.yaml")
    record = train_run(out / "run.yaml", store.path, out)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def family(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Run]:
    """A trunk of 40 steps and a child of 20 more."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        parent = trunk(40)
        train(parent, store, runs)
        train(child(parent), store, runs)
    return runs, parent, child(parent)


def test_runs_without_a_parent_keep_their_ids() -> None:
    """Ids of runs trained before runs could have parents; retraining them would be a loss of work."""
    assert small_run().id == "n10k-d1x-dense-s0-071cfad7"
    assert small_run("w4a4", steps=9, precision="bf16").id == "n10k-d1x-w4a4-s0-a6da4edd"
    assert "parent" not in small_run().model_dump()
    assert "warmup_steps" not in small_run().model_dump()["training"]


def test_a_child_is_identified_by_its_parents_science_alone(tmp_path: Path) -> None:
    parent = trunk(40)
    one = child(parent)
    relabelled = Run.model_validate({**parent.model_dump(), "size": "other"})
    assert relabelled.id != parent.id
    assert child(relabelled).id == one.id
    others = [child(trunk(41)), child(trunk(40, learning_rate=0.02)), child(parent, horizon=70)]
    assert len({one.id, *(other.id for other in others)}) == 4
    one.write(tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == one
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("optimizer: kept", "optimizer: fresh"))
    with pytest.raises(QpipeError, match="edited by hand"):
        load_run(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0, "parent": None}, "needs at least one step"),
        ({"seed": 3}, "differ in shape, corpus or seed"),
        ({"parent": {"run": child(trunk(9)).model_dump(), "optimizer": "fresh"}}, "a parent is dense"),
        ({"parent": {"run": small_run(steps=9).model_dump(), "optimizer": "kept"}}, "its schedule has ended|has ended"),
        ({"parent": {"run": trunk(40).model_dump(), "optimizer": "kept", "horizon": 59}}, "ends at step 59"),
        ({"parent": {"run": trunk(9, batch_sequences=4).model_dump(), "optimizer": "kept"}}, "tokens per step"),
    ],
)
def test_impossible_families_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run.model_validate({**child(trunk(40)).model_dump(), **fields})


def test_a_child_counts_and_reads_on_where_its_parent_stopped(family: tuple[Path, Run, Run], store: TokenStore) -> None:
    runs, parent, own = family
    record = load_record(runs / own.id / "record.json")
    assert (record.steps, record.d) == (20, 60 * 8 * 16)
    assert record.flops == pytest.approx(3 * own.flops)
    row = loss_table([record, load_record(runs / parent.id / "record.json")]).to_pylist()
    assert {r["trajectory"] for r in row} == {parent.trajectory}
    assert sorted(r["qat_tokens"] for r in row) == [0, 20 * 8 * 16]
    # The first batch of the child is the 41st of the trunk: its loss is that of the trunk's weights, rounded.
    model = Decoder(own.shape, own.format_spec)
    weights = safetensors.torch.load_file(runs / parent.id / "model.safetensors")
    model.load_state_dict(weights, strict=False)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.load_dense_weight(module.weight.detach().clone())
    tokens = torch.from_numpy(Batches(store.train, 16, 8, own.seed).read(40)).long()
    curve = pyarrow.parquet.read_table(runs / own.id / "curve.parquet").to_pylist()
    assert curve[0]["train_loss"] == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-5)
    assert evaluate_run(runs / own.id, store.path).reproduced


def test_a_dense_child_with_a_joint_schedule_is_the_unbroken_run(store: TokenStore, tmp_path: Path) -> None:
    """Trunk, first half of the decay, second half, each its own run: the bits of one run of warm-up, rate and decay."""
    policy = {"schedule": "wsd", "warmup_steps": 5, "warmup_fraction": 0.0, "decay_fraction": 0.5}
    whole = small_run(steps=40, **policy)
    first = trunk(20)
    second = child(first, "dense", 8, horizon=40, **policy)
    third = child(second, "dense", 12, horizon=40, **policy)
    rates = [run_learning_rate(run, step) for run in (first, second, third) for step in range(run.steps)]
    assert rates == [run_learning_rate(whole, step) for step in range(40)]
    assert second.keeps_state
    assert not third.keeps_state
    records = [train(run, store, tmp_path) for run in (whole, first, second, third)]
    ends = [safetensors.torch.load_file(tmp_path / run.id / "model.safetensors") for run in (whole, third)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert records[0].loss == records[-1].loss
    assert records[0].d == records[-1].d


@pytest.mark.parametrize("order", list(itertools.permutations([8, 20, 30]))[1::2])
def test_a_trunk_is_the_same_whatever_it_went_on_from(
    order: tuple[int, ...], store: TokenStore, tmp_path: Path
) -> None:
    """Whether one went on from another or each was trained alone: same records, same weights."""
    for steps in order:
        train(trunk(steps), store, tmp_path / "shared")
        train(trunk(steps), store, tmp_path / f"alone{steps}")
        for name in RESULTS:
            one, other = (tmp_path / f / trunk(steps).id / name for f in ("shared", f"alone{steps}"))
            assert one.read_bytes() == other.read_bytes()
    assert trunk(8).trajectory == trunk(30).trajectory


def test_a_longer_trunk_trains_the_missing_steps_alone(store: TokenStore, tmp_path: Path) -> None:
    train(trunk(20), store, tmp_path)
    train(trunk(30), store, tmp_path)
    runtime = json.loads((tmp_path / trunk(30).id / "runtime.json").read_text())
    assert runtime["resumed_from"] == "state.ckpt"
    rows = pyarrow.parquet.read_table(tmp_path / trunk(30).id / "curve.parquet").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, 31))
    own = tmp_path / trunk(20).id / "state.ckpt"
    own.write_bytes(own.read_bytes()[:-200])
    with pytest.raises(QpipeError, match="of no use"):
        train(trunk(40), store, tmp_path)


def test_moments_are_inherited_and_new_scales_start_afresh(
    family: tuple[Path, Run, Run], store: TokenStore, tmp_path: Path
) -> None:
    """One step by hand: AdamW with the trunk's moments on the weights and none on the scales."""
    runs, parent, _ = family
    run = child(parent, "w2-seq", 1)
    record = train(run, store, runs)
    found = safetensors.torch.load_file(runs / record.id / "model.safetensors")
    state = torch.load(runs / parent.id / "state.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    before = safetensors.torch.load_file(runs / parent.id / "model.safetensors")
    name = "blocks.0.attention.qkv.weight"  # the first parameter with weight decay: index 0
    rate, training = run_learning_rate(run, 0), run.training
    moments = state[0]
    assert int(moments["step"]) == 40
    # With gradient g unknown, the update pins it: both moments move by (1 - beta) g and (1 - beta) g^2.
    model = Decoder(run.shape, run.format_spec)
    model.load_state_dict(before, strict=False)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.load_dense_weight(module.weight.detach().clone())
    tokens = torch.from_numpy(Batches(store.train, 16, 8, run.seed).read(40)).long()
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    gradient = dict(model.named_parameters())[name].grad
    first = training.beta1 * moments["exp_avg"] + (1 - training.beta1) * gradient
    second = training.beta2 * moments["exp_avg_sq"] + (1 - training.beta2) * gradient**2
    first, second = first / (1 - training.beta1**41), second / (1 - training.beta2**41)
    expected = before[name] * (1 - rate * training.weight_decay) - rate * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
    scale = dict(model.named_parameters())["blocks.0.attention.qkv.weight_scale"]
    moved = found["blocks.0.attention.qkv.weight_scale"] - before[name].abs().amax(1, keepdim=True)
    reference = -rate * scale.grad / (scale.grad.abs() + 1e-8)  # Adam's first step has the size of its rate
    torch.testing.assert_close(moved, reference, rtol=1e-3, atol=1e-6)


def test_no_steps_means_plain_rounding(family: tuple[Path, Run, Run], store: TokenStore) -> None:
    runs, parent, _ = family
    run = child(parent, "w4-seq", 0)
    record = train(run, store, runs)
    assert (record.steps, record.d, record.train_loss) == (0, 40 * 8 * 16, None)
    before = safetensors.torch.load_file(runs / parent.id / "model.safetensors")
    after = safetensors.torch.load_file(runs / run.id / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    rounded = dict(before)
    for name in (name for name, value in before.items() if name.startswith("blocks.") and value.dim() == 2):
        step = before[name].abs().amax(1, keepdim=True) / 7
        rounded[name] = (before[name] / step).round().clamp(-8, 7) * step
    model = Decoder(parent.shape, parent.format_spec)
    model.load_state_dict(rounded)
    validation = Validation(store.validation, 16, 8, "fp32", 0)
    assert record.loss == pytest.approx(validation.loss(model, validation.windows), rel=1e-6)
    assert record.loss != load_record(runs / parent.id / "record.json").loss
    assert evaluate_run(runs / run.id, store.path).reproduced


def test_a_killed_child_ends_with_the_same_record(
    family: tuple[Path, Run, Run], store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, parent, own = family
    shutil.copytree(runs / parent.id, tmp_path / parent.id)
    monkeypatch.setenv("QPIPE_CHECKPOINT_SECONDS", "0")
    (tmp_path / own.id / "model.safetensors").mkdir(parents=True)  # in the way of the results
    own.write(tmp_path / own.id / "run.yaml")
    with pytest.raises(QpipeError, match="results cannot be written"):
        train_run(tmp_path / own.id / "run.yaml", store.path, tmp_path / own.id)
    (tmp_path / own.id / "model.safetensors").rmdir()
    newest = max((tmp_path / own.id / "scratch").glob("*.ckpt"))
    assert "00000020" in newest.name
    newest.unlink()  # go on from the one before
    train(own, store, tmp_path)
    for name in RESULTS:
        assert (tmp_path / own.id / name).read_bytes() == (runs / own.id / name).read_bytes()


def test_a_missing_or_wrong_parent_is_one_message(
    family: tuple[Path, Run, Run], store: TokenStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs, parent, own = family
    own.write(tmp_path / "run.yaml")
    arguments = ["train", str(tmp_path / "run.yaml"), str(store.path), str(tmp_path / "out")]
    assert main(arguments) == 2
    assert f"starts from run {parent.id}" in capfd.readouterr().err
    train(small_run(steps=3), store, tmp_path)
    assert main([*arguments, "--parent", str(tmp_path / small_run(steps=3).id)]) == 2
    assert "holds run n10k" in capfd.readouterr().err
    assert main([*arguments, "--parent", str(runs / parent.id)]) == 0
    assert (tmp_path / "out/record.json").read_bytes() == (runs / own.id / "record.json").read_bytes()
    assert resolve("w2-seq").name == own.representation_name


def test_short_master_weights_lose_small_updates(store: TokenStore, tmp_path: Path) -> None:
    """At a rate of 1e-5 Adam moves a weight by 1e-5 at most in a step; bfloat16 rounds that away from 5e-3 on."""
    parent = small_run(steps=40, precision="bf16")
    train(parent, store, tmp_path)
    policy = {"schedule": "cosine", "final_fraction": 0.0, "learning_rate": 1e-5, "weight_decay": 0.0}
    moved = {}
    before = safetensors.torch.load_file(tmp_path / parent.id / "model.safetensors")[
        "blocks.1.feed_forward.down.weight"
    ]
    for kind in ("fp32", "bf16"):
        run = child(parent, "w2-seq", 20, precision="bf16", parameters=kind, **policy)
        record = train(run, store, tmp_path)
        assert evaluate_run(tmp_path / run.id, store.path).found == record.loss
        after = safetensors.torch.load_file(tmp_path / run.id / "model.safetensors")
        assert after["blocks.1.feed_forward.down.weight"].dtype == torch.float32
        start = before if kind == "fp32" else before.bfloat16().float()
        moved[kind] = after["blocks.1.feed_forward.down.weight"] != start
        assert after["blocks.0.attention.qkv.weight_scale"].dtype == torch.float32
    large = before.abs() >= 2e-5 * 2**9
    assert large.float().mean() > 0.5
    assert not moved["bf16"][large].any()
    assert moved["fp32"].float().mean() > 0.8
    assert child(parent, "w2-seq", 20, precision="bf16", **policy).model_dump()["training"].get("parameters") is None
    training = {**parent.training.model_dump(), "parameters": "bf16", "precision": "fp32"}
    with pytest.raises(ValueError, match="need precision bf16"):
        Run.model_validate({**parent.model_dump(), "training": training})


@pytest.mark.slow
def test_two_processes_inherit_and_keep_the_same_state(store: TokenStore, tmp_path: Path) -> None:
    """A trunk, a longer one that goes on from it and a child, by one process and by two: equal up to float sums."""
    runs = [trunk(10), trunk(20), child(trunk(20), "dense", 10)]
    losses: dict[str, list[float]] = {"1": [], "2": []}
    for devices, found in losses.items():
        for run in runs:
            out = tmp_path / devices / run.id
            run.write(out / "run.yaml")
            command = [sys.executable, "-m", "qpipe", "train", str(out / "run.yaml"), str(store.path), str(out)]
            settings = {"QPIPE_DEVICES": devices, "QPIPE_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            found.append(load_record(out / "record.json").loss or 0.0)
        runtime = json.loads((tmp_path / devices / runs[1].id / "runtime.json").read_text())
        assert (runtime["devices"], runtime["resumed_from"]) == (int(devices), "state.ckpt")
    assert losses["2"] == pytest.approx(losses["1"], rel=2e-4)
