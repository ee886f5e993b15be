"""What the Snakefile knows: the study, its runs, and which result depends on what.

The Snakefile is parsed again in every cluster job, so this module and all it imports stay free of torch.
"""

import ast
import hashlib
import os
import shlex
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.formats import Representation
from qpipe.identity import canonical_json, digest
from qpipe.ptq_config import PtqJob, ptq_jobs
from qpipe.resources import Site
from qpipe.runs import Run, starts_from
from qpipe.study import Law, Study, load_study, plan, study_corpus

LAWS_WITH_MULTIPLIERS = {"compression", "capacity", "sparsity", "precision", "gamma"}

PARTIAL = "QPIPE_PARTIAL"
"""Environment: 1 to make tables and report from the runs that are finished, and train nothing."""

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class LawJob:
    """One law of a study and the partitions of the loss table it is fitted to."""

    law: Law
    formats: list[str]
    """slugs of the representations, in the study's order"""
    options: str
    """command-line options of `qpipe fit`"""


class Workflow:
    """A checked study with everything that rules look up.

    Parameters
    ----------
    study
        The study.
    base
        Folder that local paths in it start from.
    results
        The study's results, if it is to consist of the runs that are finished there.
    """

    def __init__(self, study: Study, base: Path | None = None, results: Path | None = None) -> None:
        self.study = study
        self.name = study.name
        self.corpus = study_corpus(study, base)
        planned = {run.id: run for run in plan(study, base)}
        self.missing: list[str] = [] if results is None else [run for run in planned if not _finished(results, run)]
        """planned runs that are left out"""
        self.runs: dict[str, Run] = {id_: run for id_, run in planned.items() if id_ not in self.missing}
        # Runs that end in mid-schedule are steps on the way to others: trained, but no data.
        finished = {r.representation_name: r.format_spec for r in self.runs.values() if not r.keeps_state}
        self.formats: dict[str, Representation] = {
            f.slug: f for f in {**finished, **study.resolved_representations()}.values()
        }

    @classmethod
    def from_snakemake(cls, workflow: Any) -> "Workflow":
        """Read the study that Snakemake was given with `--configfile` (errors: none, several, `--config` on top)."""
        files = [Path(path) for path in workflow.configfiles]
        if len(files) != 1:
            raise QpipeError(
                f"give one study: snakemake --profile profiles/local --configfile config/demo.yaml; found {len(files)}"
            )
        if workflow.config_settings.config:
            raise QpipeError("--config cannot change a study: a run is its study file; copy the file and edit it")
        study = load_study(files[0])
        return cls(study, results=Path("results") / study.name if _partial() else None)

    @cached_property
    def runs_of(self) -> dict[str, list[str]]:
        """Run ids by the slug of their representation."""
        slugs = {representation.name: slug for slug, representation in self.formats.items()}
        grouped: dict[str, list[str]] = {slug: [] for slug in self.formats}
        for run in self.runs.values():
            if not run.keeps_state:
                grouped[slugs[run.representation_name]].append(run.id)
        return {slug: ids for slug, ids in grouped.items() if ids}

    @cached_property
    def ptq(self) -> dict[str, PtqJob]:
        """Quantizations of finished dense runs, by id."""
        return {job.id: job for job in ptq_jobs(self.study.ptq, self.runs.values())}

    @cached_property
    def ptq_of(self) -> dict[str, list[str]]:
        """Ids of quantizations by method."""
        methods = [] if self.study.ptq is None else self.study.ptq.methods
        return {name: [job.id for job in self.ptq.values() if job.method.name == name] for name in methods}

    def ptq_options(self, job: str) -> str:
        """Return the command-line options of `qpipe ptq` for a job."""
        assert self.study.ptq is not None
        return self.ptq[job].options(self.study.ptq.settings)

    @cached_property
    def starts_from(self) -> dict[str, str]:
        """Run that has to be finished before a run can start, by run id: its parent, or the next shorter trunk."""
        return starts_from(self.runs)

    @property
    def compares_splits(self) -> bool:
        """Whether finetuned runs differ in their split or length, so that there is a best one to be found."""
        return any(len(section.splits or section.qat_tokens or []) > 1 for section in self.study.finetune)

    @cached_property
    def laws(self) -> dict[str, LawJob]:
        """The study's laws by name."""
        return {law.law: LawJob(law, self._formats_of(law), self._options(law)) for law in self.study.laws}

    @property
    def tabled_laws(self) -> list[str]:
        """The laws that have efficiency multipliers, in the study's order."""
        return [name for name in self.laws if name in LAWS_WITH_MULTIPLIERS]

    @property
    def study_json(self) -> str:
        """The study as canonical JSON: what `qpipe plan -` reads."""
        return canonical_json(self.study.model_dump(mode="json", exclude_defaults=True))

    @property
    def wandb_environment(self) -> str:
        """Shell assignments that tell trainers where to track their runs."""
        wandb = self.study.wandb
        settings = {"MODE": wandb.mode, "PROJECT": wandb.project, "ENTITY": wandb.entity or "", "GROUP": self.name}
        return " ".join(f"QPIPE_WANDB_{key}={shlex.quote(value)}" for key, value in settings.items())

    def _formats_of(self, law: Law) -> list[str]:
        if law.law == "chinchilla" and law.representations is None:
            return [slug for slug in self.runs_of if self.formats[slug].is_dense]
        return [
            slug
            for slug in self.runs_of
            if law.representations is None or self.formats[slug].name in law.representations
        ]

    @property
    def interval_options(self) -> str:
        """Options of every step that resamples runs."""
        fit = self.study.fit
        return f"--bootstrap {fit.bootstrap} --level {fit.level} --seed {fit.seed}"

    def _options(self, law: Law) -> str:
        fit = self.study.fit
        options = f"{self.interval_options} --delta {fit.delta}"
        fixed = "".join(f" --fix {name}={value}" for name, value in law.fix.items())
        return options + fixed + (f" --exclude {shlex.quote(fit.exclude)}" if fit.exclude else "")


def _finished(results: Path, run: str) -> bool:
    return (results / "runs" / run / "record.json").exists()


def _partial() -> bool:
    word = os.environ.get(PARTIAL, "0")
    if word not in ("0", "1"):
        raise QpipeError(f"{PARTIAL}={word}: use 0 or 1, or leave it out")
    return word == "1"


def training_site(workflow: Any) -> Site:
    """Return what the profile says about the machine that trains, under `set-resources: train:`."""
    return Site.from_profile(workflow.resource_settings.overwrite_resources.get("train", {}))


def keep_memory(results: Path, snakemake: Path, *, main: bool) -> str:
    """Return a file that is newer than a study's results if Snakemake has lost its memory of how they were made.

    Parameters of a step (options of a fit, digest of its code) are remembered in Snakemake's own folder alone; without
    it, results of other parameters look fresh. Both sides therefore hold the same random word. Where the words differ,
    the file is written anew, and the cheap steps that have it as input run again. Training is named by what it depends
    on and needs no memory.

    Parameters
    ----------
    results
        The study's folder of results.
    snakemake
        Snakemake's own folder, `.snakemake` in the working folder.
    main
        Whether this is the main process; jobs, which read the Snakefile again, change nothing.
    """
    here, there = snakemake / "qpipe-memory", results / "memory"
    if main:
        word = here.read_text(encoding="utf-8") if here.exists() else uuid.uuid4().hex
        if not here.exists():
            write_text(here, word)
        if not there.exists() or there.read_text(encoding="utf-8") != word:
            write_text(there, word)
    return str(there)


def source_digest(*parts: str) -> str:
    """Return a digest of the code of modules or packages of qpipe, blind to comments and docstrings.

    Cheap steps take it as a parameter, so that a change of what they compute runs them again and a change of how it is
    explained does not. Parts are paths below the package, e.g. ``laws`` or ``record.py``; other files in a package
    (templates, styles) count byte by byte.
    """
    return digest([_code(path) for part in parts for path in _modules(_PACKAGE / part)], 12)


def _modules(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")


def _code(path: Path) -> str:
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)
