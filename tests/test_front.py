"""Sizes against published ones, and fronts whose answer is known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qpipe.accounting import count_parameters, model_mib
from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.front import front, on_front
from qpipe.recipe import ModelShape

MOBILELLM_125M = ModelShape(
    layers=30, width=576, heads=9, kv_heads=3, feed_forward=1536, vocab_size=32000, context=2048, tied_embeddings=True
)
LLAMA_1B = ModelShape(layers=16, width=2048, heads=32, kv_heads=8, feed_forward=8192, vocab_size=128256, context=2048,
                      tied_embeddings=True)  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "embedding_bits", "published"),
    [(1, 4, 21.4), (1.58, 4, 28.8), (2, 4, 34.1), (3, 4, 46.8), (4, 4, 59.4),
     (2, 16, 60.5), (4, 16, 85.8), (16, 16, 237.7)],
)  # fmt: skip
def test_sizes_of_mobilellm_125m(bits: float, embedding_bits: float, published: float) -> None:
    """Sizes read off the figures of 2502.02631 (MiB)."""
    count = count_parameters(MOBILELLM_125M)
    assert model_mib(count.blocks_linear, bits, count.embedding, embedding_bits) == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(("bits", "published"), [(1, 241), (1.58, 308), (2, 357), (3, 473), (4, 589.5)])
def test_sizes_of_llama_1b(bits: float, published: float) -> None:
    count = count_parameters(LLAMA_1B)
    assert count.blocks_linear == 973_078_528
    assert model_mib(count.blocks_linear, bits, count.embedding, 4) == pytest.approx(published, abs=0.6)


def table(*rows: tuple[str, float, float, list[float]]) -> pd.DataFrame:
    """(representation, n, MiB, losses over seeds)."""
    return pd.DataFrame(
        [
            {"representation": name, "n": n, "d": 1e9, "size_mib": size, "loss": loss, "seed": seed}
            for name, n, size, losses in rows
            for seed, loss in enumerate(losses)
        ]
    )


def test_the_front_against_brute_force() -> None:
    generator = np.random.default_rng(1)
    size = np.sort(generator.integers(1, 12, 20)).astype(float)
    loss = generator.normal(size=(50, 20))
    expected = [
        [all(other[j] >= other[i] for j in range(20) if size[j] <= size[i]) for i in range(20)] for other in loss
    ]
    assert np.array_equal(on_front(size, loss), expected)


def test_membership_follows_the_noise() -> None:
    """Three points far apart against the noise, and one as good as another of the same size: a coin's toss."""
    spread = [-0.01, 0.0, 0.01]
    rows = table(
        ("w2", 1, 10, [3 + e for e in spread]),
        ("w4", 1, 20, [2.5 + e for e in spread]),
        ("w3", 1, 20, [2.5 + e for e in reversed(spread)]),
        ("dense", 1, 80, [2.6 + e for e in spread]),
        ("dense", 4, 320, [2.0 + e for e in spread]),
    )
    found = front(rows, draws=4000)
    assert found.noise == pytest.approx(0.01)
    assert found.freedom == 10
    share = {(p.representation, p.n): p.share for p in found.points.itertuples()}
    assert share[("w2", 1)] == 1
    assert share[("dense", 4)] == 1
    assert share[("dense", 1)] == 0
    assert share[("w4", 1)] == pytest.approx(0.5, abs=0.03)
    assert share[("w4", 1)] + share[("w3", 1)] == pytest.approx(1)
    assert found.members == ["w2", "dense"]


def test_membership_has_the_posteriors_width() -> None:
    """Two points one standard error of their difference apart: the smaller dominates with probability t_nu(1)."""
    from scipy import stats

    losses = [np.array([-1.0, 0, 1]), np.array([-1.0, 0, 1]) - np.sqrt(2 / 3)]
    found = front(table(("a", 1, 10, list(losses[0])), ("b", 1, 20, list(losses[1]))), draws=20_000)
    assert found.formats["b"] == pytest.approx(stats.t.cdf(1, df=4), abs=0.01)


def test_sizes_come_from_the_loss_table() -> None:
    rows = pd.DataFrame(
        {
            "representation": ["dense", "w2"],
            "n": [1000.0, 1000.0],
            "d": [1.0, 1.0],
            "loss": [2.0, 2.1],
            "n_compressed": [0, 900],
            "n_embedding": [500, 500],
            "bits_per_weight": [16.0, 2.5],
            "payload_bits": [16.0, 2.0],
            "status": ["ok", "ok"],
        }
    )
    stored = front(rows, draws=0).points.set_index("representation")["size_mib"] * 2**23
    assert stored.to_dict() == {"w2": 900 * 2.5 + 500 * 16 + 100 * 16, "dense": 1500 * 16}
    payload = (
        front(rows, draws=0, payload=True, embedding_bits=4).points.set_index("representation")["size_mib"] * 2**23
    )
    assert payload.to_dict() == {"w2": 900 * 2 + 500 * 4, "dense": 1000 * 16 + 500 * 4}


def test_what_is_missing_is_said() -> None:
    rows = table(("w2", 1, 10, [3.0]))
    with pytest.raises(QpipeError, match="--bootstrap 0"):
        front(rows)
    with pytest.raises(QpipeError, match="n_compressed, n_embedding"):
        front(rows.drop(columns="size_mib"), draws=0)
    with pytest.raises(QpipeError, match="no rows"):
        front(rows.assign(status="diverged"))


def test_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(("w2", 1, 10, [3.0, 3.1]), ("dense", 1, 80, [2.0, 2.1]))
    rows.to_csv(tmp_path / "losses.csv", index=False)
    arguments = ["front", str(tmp_path / "losses.csv"), "--bootstrap", "50"]
    assert main([*arguments, "--json", "--figure", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["members"] == ["w2", "dense"]
    assert [point["size_mib"] for point in result["points"]] == [10, 80]
    assert (tmp_path / "front.png").stat().st_size > 5000
    assert main([*arguments, "--exclude", "representation == 'w2'"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in itertools.islice(lines, 1, 2)] == ["dense"]
    assert main([*arguments[:-1], "-3"]) == 2
