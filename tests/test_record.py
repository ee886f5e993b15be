"""Records and the loss table: round trip, refusals, units; the command line's exit codes."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.record import Record, load_record, loss_table
from qpipe.study import parse_study, plan


@pytest.fixture(scope="module")
def runs():
    raw = {
        "name": "unit",
        "corpus": {"source": "docstrings", "packages": ["numpy"]},
        "tokenizer": {"train": "bpe", "vocab_size": 512},
        "ladder": {"recipe": "tiny"},
        "sizes": ["10k"],
        "tokens_per_parameter": [10, 20],
        "representations": ["dense", "w4"],
    }
    return plan(parse_study(raw, "unit"))


def record_of(run, loss=3.25, status="ok"):
    count = run.parameters
    return Record(
        id=run.id, status=status, loss=loss, bits_per_byte=1.0, train_loss=3.0, validation_tokens=100, steps=run.steps,
        n=count.non_embedding, n_compressed=count.blocks_linear, n_embedding=count.embedding + count.head, d=run.tokens,
        flops=run.flops, bits_per_weight=4.25, payload_bits=4, tokens_digest="t", weights_digest="w", run=run,
    )  # fmt: skip


def test_record_round_trips_exactly(runs, tmp_path):
    record = record_of(runs[0], loss=0.1 + 0.2)
    record.write(tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a run's record"),
        (lambda text: text.replace('"n":', '"params":'), "not a run's record"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "holds run"),
        (lambda text: "", "not a run's record"),
    ],
    ids=["truncated", "foreign field", "another run", "empty"],
)
def test_damaged_records_are_refused(runs, tmp_path, damage, message):
    path = tmp_path / "record.json"
    record_of(runs[0]).write(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(QpipeError, match=message):
        load_record(path)


def test_loss_table_has_the_contracts_columns_and_diverged_rows(runs):
    table = loss_table([record_of(runs[0]), record_of(runs[1], None, "diverged")]).to_pandas()
    assert {"n", "d", "representation", "loss", "seed", "status"} <= set(table.columns)
    assert table.set_index("representation")["status"].to_dict() == {"dense": "ok", "w4": "diverged"}
    assert pd.isna(table.set_index("representation").loc["w4", "loss"])


def test_a_run_given_twice_is_an_error(runs):
    with pytest.raises(QpipeError, match="given twice"):
        loss_table([record_of(runs[0]), record_of(runs[0])])


def test_collect_reads_lists_and_reports_every_bad_record(runs, tmp_path, capsys):
    for index, run in enumerate(runs[:3]):
        record_of(run).write(tmp_path / f"{index}.json")
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{tmp_path}/{index}.json\n" for index in range(3)))
    assert main(["collect", f"@{listing}", "--out", str(tmp_path / "losses.parquet")]) == 0
    assert pq.read_table(tmp_path / "losses.parquet").num_rows == 3
    (tmp_path / "1.json").write_text("{")
    (tmp_path / "2.json").unlink()
    assert main(["collect", f"@{listing}", "--out", str(tmp_path / "other.parquet")]) == 2
    error = capsys.readouterr().err
    assert "1.json" in error
    assert "2.json: no such record" in error
    assert not (tmp_path / "other.parquet").exists()


def test_plan_shows_states_from_files(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("QPIPE_SCRATCH", raising=False)
    study = tmp_path / "s.yaml"
    study.write_text(
        "name: unit\ncorpus: {source: docstrings, packages: [numpy]}\ntokenizer: {train: bpe, vocab_size: 512}\n"
        "ladder: {recipe: tiny}\nsizes: [10k]\ntokens_per_parameter: [10, 20]\nrepresentations: [dense, w4]\n"
    )
    results = tmp_path / "results"
    record_of(runs[0]).write(results / "runs" / runs[0].id / "record.json")
    record_of(runs[1], None, "diverged").write(results / "runs" / runs[1].id / "record.json")
    record_of(runs[0]).write(results / "runs" / runs[2].id / "record.json")  # another run's record is no record
    assert main(["plan", str(study), "--results", str(results), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["done", "diverged", "missing", "missing"]
    assert {"id", "n", "d", "representation", "seed", "flops", "bits_per_weight", "state"} <= set(rows[0])


def test_unknown_verb_and_wrong_input_exit_with_two(tmp_path, capsys):
    assert main(["paln"]) == 2
    assert "did you mean 'plan'" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_every_verb_has_help_with_an_example(capsys):
    from qpipe.cli import VERBS

    for verb in VERBS:
        with pytest.raises(SystemExit) as caught:
            main([verb, "--help"])
        assert caught.value.code == 0
        assert f"qpipe {verb}" in capsys.readouterr().out.split("example", 1)[1]
