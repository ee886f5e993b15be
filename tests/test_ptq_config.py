"""The `ptq` section of a study: jobs, ids, and mistakes."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.study import parse_study
from qpipe.workflow import Workflow

STUDY = yaml.safe_load((Path(__file__).parent / "studies/smoke.yaml").read_text())
SECTION = {"methods": ["cvxq", "rtn"], "bits": [2.5, 4], "seeds": [0, 1]}


def workflow(section: dict | None = None, **changes: object) -> Workflow:
    return Workflow(parse_study({**STUDY, "ptq": SECTION if section is None else section, **changes}, "study"))


def problems(section: dict, **changes: object) -> str:
    with pytest.raises(QpipeError) as caught:
        workflow(section, **changes)
    return str(caught.value)


def test_jobs_are_dense_runs_x_methods_x_bits_x_seeds_that_matter():
    found = workflow()
    assert {job.parent.representation_name for job in found.ptq.values()} == {"dense"}
    # 2 sizes x 2 budgets; rtn draws nothing, so it has one seed.
    counts = Counter((job.method.name, job.bits) for job in found.ptq.values())
    assert counts == {("cvxq", 2.5): 8, ("cvxq", 4): 8, ("rtn", 2.5): 4, ("rtn", 4): 4}
    assert {job.representation for job in found.ptq.values()} == {"w2.5-cvxq", "w4-cvxq", "w2.5-rtn", "w4-rtn"}


def test_sizes_choose_dense_runs():
    assert {job.parent.size for job in workflow({**SECTION, "sizes": ["30k"]}).ptq.values()} == {"30k"}


def test_the_section_changes_no_run():
    assert workflow().runs == Workflow(parse_study(STUDY, "study")).runs


def test_ids_change_with_what_decides_the_result_and_with_nothing_else():
    before = set(workflow().ptq)
    assert before < set(workflow({**SECTION, "bits": [2.5, 3, 4]}).ptq)
    assert before < set(workflow({**SECTION, "methods": ["cvxq", "rtn", "gptq"]}).ptq)
    changed = set(workflow({**SECTION, "settings": {"sequences": 8}}).ptq)
    assert not before & changed
    assert set(workflow(seeds=[0, 1]).ptq) > before


def test_options_rebuild_the_method():
    from qpipe.cli.ptq import _changes
    from qpipe.ptq_methods import get_method

    found = workflow({**SECTION, "settings": {"codebook": "lloyd-max", "rows": 4, "damping": 0.05, "offset": True}})
    for name, job in found.ptq.items():
        options = found.ptq_options(name)
        assert get_method(job.method.name, **_changes(re.findall(r"--set '?(\S+?)'?(?: |$)", options))) == job.method
        assert f"--bits {job.bits!r}" in options


def test_only_the_precision_law_fits_rounded_models_and_only_when_asked():
    laws = [{"law": "precision", "ptq": "cvxq"}, "compression"]
    found = workflow(laws=laws).laws
    assert found["precision"].law.ptq == "cvxq"
    assert found["compression"].law.ptq is None
    assert "no post-training term" in problems(SECTION, laws=[{"law": "gamma", "ptq": "cvxq"}])
    assert "not among the methods" in problems(SECTION, laws=[{"law": "precision", "ptq": "gptq"}])


def test_plan_and_status_count_quantizations(tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({**STUDY, "ptq": SECTION}))
    done, begun = list(workflow().ptq)[:2]
    (tmp_path / "results/ptq" / done).mkdir(parents=True)
    (tmp_path / "results/ptq" / done / "ptq.json").write_text("{}")
    (tmp_path / "results/ptq" / begun / "scratch").mkdir(parents=True)
    for verb in ("plan", "status"):
        assert main([verb, str(study), "--results", str(tmp_path / "results")]) == 0
        assert "24 quantizations after training (1 done, 1 begun, 22 missing)" in capsys.readouterr().out
    assert main(["status", str(study), "--results", str(tmp_path / "results"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ptq"] == {"done": 1, "begun": 1, "missing": 22}


def test_every_mistake_is_named_at_once():
    text = problems({"methods": ["cvqx", "rtn", "rtn"], "bits": [3], "sizes": ["30x"], "settings": {"sequence": 3}})
    assert "did you mean 'cvxq'" in text
    assert "did you mean 'sequences'" in text
    assert "did you mean '30k'" in text
    assert "named twice" in text
    assert "less than or equal to 16" in problems({"bits": [17]})
    assert "no dense runs" in problems(SECTION, representations=["w4"])
