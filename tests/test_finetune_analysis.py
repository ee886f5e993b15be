"""What is read from finetuned runs: best splits with their noise, and how far weights moved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
from scipy import stats
from test_train_parent import child, train, trunk
from training_cases import make_store, small_run

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.report.finetune_figures import split_charts
from qpipe.splits import split_curves

SHARES = [0.0, 0.5, 0.9, 1.0]


def table(
    losses: np.ndarray, name: str = "w2-seq", word: str = "branch", shares: list[float] = SHARES, d: float = 1000
) -> pd.DataFrame:
    """A loss table of one curve; `losses` has a row per share and a column per seed."""
    labels = {
        share: f"{name}:{'wsd' if word != 'finished' and share in (0, 1) else word}{100 * share:g}" for share in shares
    }
    if word == "finished":
        labels[0.0] = name
    return pd.DataFrame(
        [
            {
                "n": 50,
                "d": d,
                "representation": labels[share],
                "loss": losses[i, seed],
                "qat_tokens": 0 if name == "dense" else round((1 - share) * d),
                "seed": seed,
                "trajectory": "dense run" if word == "finished" else f"n50-trunk-s{seed}-x",
            }
            for i, share in enumerate(shares)
            for seed in range(losses.shape[1])
        ]
    )


def test_seeds_shift_curves_and_are_no_noise() -> None:
    """Losses = share effect + seed effect + known residuals that are orthogonal to both."""
    effect = np.array([3.0, 2.8, 2.5, 2.9])[:, None]
    seeds = np.array([0.0, 1.0])
    pattern = 0.01 * np.array([[1, -1], [-1, 1], [1, -1], [-1, 1]])
    (curve,), noise, freedom = split_curves(table(effect + seeds + pattern))
    assert freedom == 3
    assert noise == pytest.approx(0.01 * np.sqrt(8 / 3))
    assert curve.at.tolist() == SHARES
    assert np.allclose(curve.loss, effect[:, 0] + 0.5)
    assert curve.optimum == 0.9
    assert curve.as_good == [0.9]
    assert curve.best_share[2] > 0.999


def test_intervals_have_the_width_of_students_t() -> None:
    effect = np.array([3.0, 2.8, 2.5, 2.9])[:, None]
    pattern = 0.01 * np.array([[1, -1], [-1, 1], [1, -1], [-1, 1]])
    (curve,), noise, _ = split_curves(table(effect + pattern), draws=100_000)
    half = stats.t.ppf(0.95, df=3) * noise * np.sqrt(2 / 2)  # of a difference of two means of two runs
    assert np.allclose(curve.high - curve.low, np.where(curve.at == 0.9, 0, 2 * half), rtol=0.02)
    assert np.allclose((curve.high + curve.low) / 2, curve.loss - 2.5, atol=1e-3)


def test_equal_splits_share_the_probability() -> None:
    generator = np.random.default_rng(0)
    (curve,), *_ = split_curves(table(2.0 + 0.01 * generator.standard_normal((4, 200))))
    assert curve.best_share.sum() == pytest.approx(1)
    assert len(curve.as_good) >= 2


def test_curves_are_told_apart_by_their_labels() -> None:
    losses = np.array([[3.0], [2.8], [2.5], [2.9]])
    rows = pd.concat(
        [
            table(losses),
            table(losses + 1, word="finished"),
            table(losses[1:], name="dense", shares=SHARES[1:]),
            table(losses, d=2000),
        ]
    )
    curves, noise, freedom = split_curves(rows)
    assert np.isnan(noise)
    assert freedom == 0
    found = {(c.representation, c.mode, c.d): (c.at.tolist(), c.loss.min()) for c in curves}
    assert found == {
        ("w2-seq", "branch", 1000): (SHARES, 2.5),
        ("w2-seq", "branch", 2000): (SHARES, 2.5),
        ("w2-seq", "finished", 1000): (SHARES, 3.5),
        ("dense", "branch", 1000): (SHARES[1:], 2.5),
    }
    assert np.isnan(curves[0].low).all()


def test_lengths_of_finetuning_make_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two bits, three times as long per label, and a dense control whose tokens stand in its label alone."""
    rows = pd.DataFrame(
        [
            {
                "n": 50,
                "d": 1000 + factor * asked,
                "representation": f"{name}:matched+{asked}",
                "loss": 3 - asked / 1000 + factor + 0.001 * seed * (-1) ** (asked // 100),
                "qat_tokens": 0 if name == "dense" else factor * asked,
                "seed": seed,
                "trajectory": "dense run",
            }
            for name, factor in (("w4-seq", 1), ("w2-seq", 3), ("dense", 1))
            for asked in (100, 200, 400)
            for seed in (0, 1)
        ]
    )
    curves, _, freedom = split_curves(rows)
    assert freedom == 6
    assert {(c.representation, c.axis, c.d): c.at.tolist() for c in curves} == {
        ("w4-seq", "qat_tokens", 1000): [100, 200, 400],
        ("w2-seq", "qat_tokens", 1000): [300, 600, 1200],
        ("dense", "qat_tokens", 1000): [100, 200, 400],
    }
    assert {c.optimum for c in curves} == {400, 1200}
    rows.to_csv(tmp_path / "l.csv", index=False)
    assert main(["splits", str(tmp_path / "l.csv"), "--out", str(tmp_path)]) == 0
    assert "best 1,200 tokens" in capsys.readouterr().out
    assert (tmp_path / "saturation-matched.svg").exists()


def test_tables_without_splits_are_refused() -> None:
    rows = table(np.ones((4, 1)))
    with pytest.raises(QpipeError, match="no column qat_tokens"):
        split_curves(rows.drop(columns="qat_tokens"))
    with pytest.raises(QpipeError, match="two splits of one budget"):
        split_curves(rows[rows["representation"] == "w2-seq:branch50"])


def test_splits_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = np.array([[3.0, 3.1], [2.8, 2.9], [2.5, 2.61], [2.9, 3.0]])
    pd.concat([table(losses), table(losses, word="finished")]).to_csv(tmp_path / "l.csv", index=False)
    assert main(["splits", str(tmp_path / "l.csv"), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "splits.json").read_text())
    assert [curve["optimum"] for curve in result["curves"]] == [0.9, 0.9]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"splits-branch.svg", "splits-finished.svg"}
    assert main(["splits", str(tmp_path / "l.csv")]) == 0
    assert "best 90.0% dense" in capsys.readouterr().out


def test_changes_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("QPIPE_SCRATCH", raising=False)
    store = make_store(tmp_path / "tokens")
    parent = trunk(10)
    train(parent, store, tmp_path / "runs")
    runs: dict[str, Any] = {
        name: child(parent, "w3-seq", steps, learning_rate=1e-3) for name, steps in (("rounded", 0), ("tuned", 5))
    }
    for run in runs.values():
        train(run, store, tmp_path / "runs")
    folders = [str(tmp_path / "runs" / run.id) for run in runs.values()]
    assert main(["changes", *folders, "--out", str(tmp_path / "out"), "--json"]) == 0
    rounded, tuned = json.loads(capsys.readouterr().out)
    before = safetensors.torch.load_file(tmp_path / "runs" / parent.id / "model.safetensors")
    after = safetensors.torch.load_file(Path(folders[1]) / "model.safetensors")

    def by_hand(ours: str, rows: slice, matrix: str) -> None:
        old, new = before[f"{ours}.weight"][rows], after[f"{ours}.weight"][rows]
        scale, first = after[f"{ours}.weight_scale"][rows], old.abs().amax(1, keepdim=True) / 3
        quantized = (new / scale).round().clamp(-4, 3) * scale
        plain = (old / first).round().clamp(-4, 3) * first
        size = old.abs().sum()
        expected = [float((w - old).abs().sum() / size) for w in (new, quantized, plain)]
        assert tuned["matrices"][matrix] == pytest.approx(expected, rel=1e-5)
        assert rounded["matrices"][matrix] == pytest.approx([0, expected[2], expected[2]], rel=1e-5)

    by_hand("blocks.0.attention.qkv", slice(32, 64), "model.layers.0.self_attn.k_proj.weight")
    by_hand("blocks.1.feed_forward.gate_up", slice(64, 128), "model.layers.1.mlp.up_proj.weight")
    assert len(tuned["matrices"]) == 14
    assert (tmp_path / "out/weight-changes.png").stat().st_size > 5000
    assert main(["changes", str(tmp_path / "runs" / parent.id)]) == 2
    assert "starts from random weights" in capsys.readouterr().err
    assert small_run().parent is None


def test_a_model_that_is_only_rounded_does_not_squeeze_the_figure():
    losses = np.array([[3.2, 3.21], [3.0, 3.01], [3.1, 3.11], [9.0, 9.01]])
    near = np.array([[3.2, 3.21], [3.0, 3.01], [3.1, 3.11], [3.15, 3.16]])
    curves, noise, _ = split_curves(pd.concat([table(losses), table(near, "w4-seq")]))
    (chart,) = split_charts(curves, noise)
    top = chart.panels[0].y.limits[1]
    assert 0.2 < top < 1.0  # all splits that train are on the axis, 6 nats are not
    assert "off the axis: w2-seq only rounded" in chart.subtitle
    (chart,) = split_charts([curve for curve in curves if curve.representation == "w4-seq"], noise)
    assert "off the axis" not in chart.subtitle
