"""Studies: every shipped one expands, ids are stable and carry the science, every mistake is reported at once."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.errors import QpipeError
from qpipe.runs import load_run
from qpipe.study import Study, load_study, parse_study, plan
from qpipe.yaml_files import dump_yaml, parse_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for path in (ROOT / "config").glob("*.yaml") if path.stem != "representations")


def study(**changes):
    raw = {
        "name": "unit",
        "corpus": {"source": "docstrings", "packages": ["numpy"]},
        "tokenizer": {"train": "bpe", "vocab_size": 512},
        "ladder": {"recipe": "tiny"},
        "sizes": ["10k", "30k"],
        "tokens_per_parameter": [10, 20],
        "representations": ["dense", "w4", "2:4"],
    }
    return parse_study({**raw, **changes}, "unit.yaml")


def ids(**changes):
    return [run.id for run in plan(study(**changes))]


@pytest.mark.parametrize("path", [*SHIPPED, *sorted((ROOT / "tests/studies").glob("*.yaml"))], ids=lambda p: p.stem)
def test_every_shipped_study_expands_to_distinct_runs(path):
    runs = plan(load_study(path))
    assert runs
    assert len({run.id for run in runs}) == len(runs)
    assert path.read_text().startswith("# yaml-language-server: $schema=")


def test_shipped_schema_is_the_current_one():
    shipped = json.loads((ROOT / "config/study.schema.json").read_text())
    assert shipped == json.loads(json.dumps(Study.model_json_schema())), "run: make format"


def test_every_field_is_documented():
    text = (ROOT / "config/README.md").read_text()
    schema = Study.model_json_schema()
    fields = set(schema["properties"])
    for definition in schema["$defs"].values():
        fields |= set(definition.get("properties", {}))
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []


def test_runs_are_the_full_product():
    found = {(r.size, r.tokens_per_parameter, r.representation_name, r.seed) for r in plan(study(seeds=[0, 7]))}
    assert found == set(itertools.product(["10k", "30k"], [10, 20], ["dense", "w4", "2:4"], [0, 7]))


def test_tokens_are_whole_steps_below_the_budget():
    for run in plan(study()):
        budget = run.tokens_per_parameter * {"10k": 10_000, "30k": 30_000}[run.size]
        assert budget - run.tokens_per_step < run.tokens <= budget
        assert run.tokens == run.steps * run.training.batch_sequences * run.shape.context


def test_token_counts_give_the_same_runs_as_ratios():
    assert ids(tokens_per_parameter=[10], sizes=["30k"]) == [
        run.id for run in plan(parse_study({**_raw(), "sizes": ["30k"], "tokens": [300_000]}, "x"))
    ]


def _raw():
    raw = study().model_dump(mode="json", exclude_defaults=True)
    raw.pop("tokens_per_parameter")
    return raw


def test_adding_to_a_study_keeps_the_ids_of_its_runs():
    before = set(ids())
    assert before < set(ids(representations=["dense", "w4", "2:4", "w2"]))
    assert before < set(ids(seeds=[0, 1]))
    assert before < set(ids(sizes=["10k", "30k", "100k"]))


def test_settings_that_do_not_change_a_run_do_not_change_its_id():
    changed = ids(name="other", description="x", laws=["compression"], fit={"bootstrap": 7}, wandb={"mode": "disabled"})
    assert changed == ids()


@pytest.mark.parametrize(
    "changes",
    [
        {"ladder": {"recipe": "tiny", "precision": "bf16"}},
        {"ladder": {"recipe": "tiny", "learning_rate_scale": 2}},
        {"ladder": {"recipe": "tiny", "schedule": "wsd"}},
        {"ladder": {"recipe": "tiny", "context": 64}},
        {"tokenizer": {"train": "bpe", "vocab_size": 600}},
        {"corpus": {"source": "docstrings", "packages": ["scipy"]}},
        {"seeds": [1]},
    ],
    ids=str,
)
def test_science_changes_every_id(changes):
    assert not set(ids(**changes)) & set(ids())


def test_ids_do_not_depend_on_the_process(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(dump_yaml(study().model_dump(mode="json")))
    out = subprocess.run(
        [sys.executable, "-m", "qpipe", "plan", str(path), "--json"],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "12345", "PATH": ""}, cwd=ROOT,
    )  # fmt: skip
    assert [row["id"] for row in json.loads(out.stdout)] == ids()


def test_include_adds_and_exclude_removes():
    rules = {
        "include": [{"size": "100k", "representation": ["dense"]}],
        "exclude": [{"representation": "2:4", "size": ["30k"]}, {"tokens_per_parameter": 20, "representation": "w4"}],
    }
    runs = {(r.size, r.tokens_per_parameter, r.representation_name) for r in plan(study(**rules))}
    full = set(itertools.product(["10k", "30k"], [10, 20], ["dense", "w4", "2:4"]))
    gone = {("30k", 10, "2:4"), ("30k", 20, "2:4"), ("10k", 20, "w4"), ("30k", 20, "w4")}
    assert runs == full - gone | {("100k", 10, "dense"), ("100k", 20, "dense")}


def test_custom_size():
    size = {
        "name": "mine",
        "nominal": 50_000,
        "layers": 3,
        "width": 48,
        "heads": 4,
        "kv_heads": 2,
        "learning_rate": 0.01,
    }
    run = plan(study(sizes=[size]))[0]
    assert (run.shape.layers, run.shape.kv_heads, run.id[:9]) == (3, 2, "nmine-d10")


def test_run_files_round_trip_and_refuse_edits(tmp_path):
    run = plan(study())[1]
    run.write(tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("seed: 0", "seed: 3"))
    with pytest.raises(QpipeError, match="edited by hand"):
        load_run(tmp_path / "run.yaml")


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(QpipeError) as caught:
        study(
            sizes=["10k", "31k"],
            tokens_per_parameters=[3],
            representations=["dense", "w4a4-qest"],
            fit={"bootstrap": "many"},
            seeds=[-1],
            corpus={"source": "docstring"},
            tokens_per_parameter=[10, 0],
        )
    text = str(caught.value)
    for expected in (
        "tokens_per_parameters: unknown key (did you mean 'tokens_per_parameter'?)",
        "no size '31k' (did you mean '30k'?)",
        "unknown method 'qest' (did you mean 'quest'?)",
        "fit.bootstrap:",
        "seeds[0]:",
        "corpus:",
        "budgets must be above zero",
    ):
        assert expected in text
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"representations": ["w4", "w4-quest"]}, "are one composition"),
        ({"exclude": [{"size": "10k", "representation": "w3"}]}, "not in this study"),
        ({"exclude": [{"tokens_per_parameter": 77}]}, "matches no run"),
        ({"exclude": [{}]}, "an empty rule"),
        ({"exclude": [{"size": ["10k", "30k"]}]}, "leaves no run"),
        ({"include": [{"tokens": 5}]}, "does not fit"),
        ({"tokens": [100]}, "both given"),
        ({"ladder": {"recipe": "tiny", "version": 9}}, "version 9"),
        ({"corpus": {"source": "files", "paths": ["no/such/*.txt"]}}, "no/such"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_has_its_message(changes, message):
    with pytest.raises(QpipeError, match=message):
        plan(study(**changes))


def test_yaml_traps():
    assert parse_yaml("[2:4, 1e-3, 30M, 1_000]", "x") == ["2:4", 1e-3, "30M", 1000]
    with pytest.raises(QpipeError, match=r"line 2: .*'a' stands twice"):
        parse_yaml("a: 1\na: 2", "x")
    with pytest.raises(QpipeError, match="line 1"):
        parse_yaml("a: [1", "x")


def test_corpus_identity_follows_content_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text("the same words")
    digests = {
        plan(study(corpus={"source": "files", "paths": [f"{name}/*.txt"]}), tmp_path)[0].corpus
        for name in ("one", "two")
    }
    assert len(digests) == 1
    (tmp_path / "one" / "one.txt").write_text("other words, so another corpus")
    assert plan(study(corpus={"source": "files", "paths": ["one/*.txt"]}), tmp_path)[0].corpus not in digests
