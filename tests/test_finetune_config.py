"""Studies with finetuned runs: which runs there are, which share what, and what a change leaves alone."""

import itertools
from typing import Any

import pytest

from qpipe.errors import QpipeError
from qpipe.recipe import PARETOQ
from qpipe.runs import Run
from qpipe.study import Study, parse_study, plan
from qpipe.train.schedule import learning_rate, run_learning_rate
from qpipe.workflow import Workflow


def study(**section: Any) -> Study:
    raw = {
        "name": "unit",
        "corpus": {"source": "docstrings", "packages": ["numpy"]},
        "tokenizer": {"train": "bpe", "vocab_size": 512},
        "ladder": {"recipe": "tiny"},
        "sizes": ["10k"],
        "tokens": [409_600],  # 200 steps
        "representations": ["dense"],
        "finetune": {"mode": "branch", "representations": ["w2-seq"], "splits": [0, 0.5, 0.9, 1], **section},
    }
    return parse_study(raw, "unit.yaml")


def runs(**section: Any) -> dict[str, Run]:
    """Runs by representation label; trunks by label and steps."""
    return {
        f"{run.representation_name}/{run.steps}" if run.keeps_state else run.representation_name: run
        for run in plan(study(**section))
    }


def test_a_branch_study_has_one_trunk_and_children_of_the_whole_budget() -> None:
    found = runs()
    assert set(found) == {
        "dense",
        "dense:trunk/100",
        "dense:trunk/160",  # where the decay of the dense reference begins
        "dense:trunk/180",
        "dense:wsd100",
        "w2-seq:wsd0",
        "w2-seq:branch50",
        "w2-seq:branch90",
        "w2-seq:wsd100",
    }
    data = [run for run in found.values() if not run.keeps_state]
    assert {run.total_tokens for run in data} == {409_600}
    assert {name: found[name].qat_tokens // 2048 for name in found if name.startswith("w2")} == {
        "w2-seq:wsd0": 200,
        "w2-seq:branch50": 100,
        "w2-seq:branch90": 20,
        "w2-seq:wsd100": 0,
    }
    assert len({run.trajectory for run in found.values() if run.parent or run.keeps_state}) == 1
    assert found["w2-seq:branch90"].parent.run == found["dense:trunk/180"]
    assert found["w2-seq:wsd100"].parent.run == found["dense:wsd100"]


def test_parents_come_before_their_children() -> None:
    seen: set[str] = set()
    for run in plan(study(splits=[0.9, 0.3, 0.95, 1], mode="fused")):
        assert run.parent is None or run.parent.run.id in seen
        seen.add(run.id)


def test_fused_runs_follow_one_schedule_whatever_the_split() -> None:
    """The rate of every step, along the chain of ancestors, is that of one unbroken run."""
    found = runs(mode="fused", splits=[0, 0.3, 0.8, 0.95, 1])
    whole = found["w2-seq:wsd0"]
    expected = [learning_rate(whole.training, step, 200) for step in range(200)]
    assert expected[159] == whole.training.learning_rate > expected[160]
    for name in ("w2-seq:fused30", "w2-seq:fused80", "w2-seq:fused95", "dense:wsd100"):
        chain, run = [], found[name]
        while run is not None:
            chain = [run_learning_rate(run, step) for step in range(run.steps)] + chain
            run = run.parent.run if run.parent else None
        assert chain == expected
    assert found["w2-seq:fused95"].parent.run.representation_name == "dense:decaying"


def test_a_branch_decays_over_its_own_steps() -> None:
    run = runs()["w2-seq:branch50"]
    rates = [run_learning_rate(run, step) for step in range(100)]
    peak = run.training.learning_rate
    assert rates[:80] == [peak] * 80
    assert rates[99] == pytest.approx(run.training.final_fraction * peak)
    assert all(a > b for a, b in itertools.pairwise(rates[79:]))


def test_finished_runs_follow_paretoqs_recipe() -> None:
    found = runs(mode="finished", representations=["w2-seq", "w4-seq"])
    assert set(found) == {
        "dense",
        *(f"w{b}-seq{end}" for b in (2, 4) for end in ("", ":finished50", ":finished90", ":finished100")),
    }
    two, four = found["w2-seq:finished90"], found["w4-seq:finished90"]
    assert (two.training.learning_rate, four.training.learning_rate) == (2e-5, 1e-5)
    assert (two.training.weight_decay, two.parent.optimizer) == (0.0, "fresh")
    rates = [run_learning_rate(two, step) for step in range(20)]
    assert rates[0] == 2e-5
    assert rates[-1] == 0
    assert two.parent.run.steps == 180
    assert two.parent.run.training == found["dense"].training
    assert found["w2-seq"].parent is None
    matched = runs(mode="finished", representations=["w2-seq", "w4-seq"], learning_rate=3e-4)
    assert {matched[f"w{b}-seq:finished90"].training.learning_rate for b in (2, 4)} == {3e-4}


def test_paretoqs_training_lengths() -> None:
    """16 GPUs x 8 sequences x 2048 tokens: 31.46 and 10.49 billion tokens (2502.02631)."""
    assert PARETOQ.tokens(2) == 31_457_280_000 == 16 * 8 * 2048 * 120_000
    assert PARETOQ.tokens(3) == 10_485_760_000
    assert {bits: PARETOQ.tokens(bits) > PARETOQ.tokens(4) for bits in (1, 1.58, 2, 3)} == {
        1: True, 1.58: True, 2: True, 3: False,
    }  # fmt: skip


def test_qat_tokens_follow_a_dense_model_of_the_whole_budget() -> None:
    found = runs(splits=None, mode="finished", qat_tokens=[20_480, 40_960], representations=["w2-seq", "w3-seq"])
    steps = {name: run.steps for name, run in found.items() if run.parent}
    assert steps == {f"w{b}-seq:finished+{t}": t // 2048 for b in (2, 3) for t in (20_480, 40_960)}
    assert {run.parent.run.id for run in found.values() if run.parent} == {found["dense"].id}
    longer = runs(splits=None, mode="finished", qat_tokens=[20_480], low_bit_tokens_factor=3)
    assert longer["w2-seq:finished+20480"].steps == 30


def test_changing_a_split_or_a_budget_keeps_all_other_runs() -> None:
    """The trunk's identity knows neither its children nor how far it will go."""
    before = {run.id for run in plan(study())}
    changed = {run.id for run in plan(study(splits=[0, 0.5, 0.8, 0.9, 1]))}
    assert before < changed
    new = [run for run in plan(study(splits=[0, 0.5, 0.8, 0.9, 1])) if run.id not in before]
    assert [run.representation_name for run in new] == ["w2-seq:branch80"]  # its trunk serves the reference already
    assert before < {run.id for run in plan(study(representations=["w2-seq", "w4-seq"]))}
    dense = {run.id for run in plan(study()) if run.representation_name == "dense:trunk"}
    slower = {run.id for run in plan(study(learning_rate=1e-3))}
    assert dense < slower
    assert not {run.id for run in plan(study()) if ":branch" in run.representation_name} & slower


def test_a_dense_control_and_own_labels() -> None:
    sections = [
        {"mode": "branch", "representations": ["dense", "w4"], "splits": [0.5, 1]},
        {"mode": "branch", "representations": ["w4"], "splits": [0.5], "learning_rate": 1e-3, "label": "slow"},
    ]
    raw = study().model_dump(mode="json", exclude_defaults=True)
    names = {r.representation_name for r in plan(parse_study({**raw, "finetune": sections}, "x")) if not r.keeps_state}
    assert names == {"dense", "dense:branch50", "dense:wsd100", "w4:branch50", "w4:wsd100", "w4:slow50"}


def test_the_workflow_collects_data_and_orders_trunks() -> None:
    workflow = Workflow(study())
    assert set(workflow.runs_of) == {
        "dense", "dense-wsd100", "w2-seq-wsd0", "w2-seq-branch50", "w2-seq-branch90", "w2-seq-wsd100",
    }  # fmt: skip
    assert workflow.formats["w2-seq-branch90"].canonical() == workflow.formats["w2-seq-wsd0"].canonical()
    trunks = {run.steps: run.id for run in workflow.runs.values() if run.keeps_state}
    assert workflow.starts_from[trunks[180]] == trunks[160]
    assert workflow.starts_from[trunks[160]] == trunks[100]
    assert trunks[100] not in workflow.starts_from
    child = next(run for run in workflow.runs.values() if run.representation_name == "w2-seq:branch90")
    assert workflow.starts_from[child.id] == trunks[180]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"splits": None}, "give either splits"),
        ({"qat_tokens": [100]}, "give either splits"),
        ({"splits": [0.5, 1.5]}, r"finetune\.splits\[1\]"),
        ({"mode": "merged"}, r"finetune\.mode"),
        ({"splits": None, "qat_tokens": [100], "mode": "fused"}, "give splits"),
        ({"representations": ["w2-seqq"]}, "did you mean 'seq'"),
        ({"representations": ["powerprop"]}, "use mode finished"),
        ({"sizes": ["11k"]}, "not in the ladder"),
        ({"low_bit_learning_rate_factor": 2}, "needs learning_rate"),
        ({"mode": "fused", "decay_fraction": 1}, "decay_fraction below 1"),
        ({"decay": 1}, "unknown key"),
        ({"parameters": "bf16", "mode": "finished"}, "precision: bf16"),
    ],
    ids=str,
)
def test_mistakes_have_their_message(section: dict[str, Any], message: str) -> None:
    with pytest.raises(QpipeError, match=message):
        study(**section)
