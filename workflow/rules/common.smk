"""The study, its runs and the paths of everything; imported by every other file.

Parsed again in every cluster job, so nothing here imports torch.
"""

import sys
from pathlib import Path

from qpipe import slurm
from qpipe.workflow import Workflow, keep_memory, source_digest, training_site

slurm.shield()

STUDY = Workflow.from_snakemake(workflow)
STUDY_FILE = str(workflow.configfiles[0])
SITE = training_site(workflow)
RESULTS = f"results/{STUDY.name}"
TOKENS = f"results/tokens/{STUDY.corpus}/manifest.json"
MEMORY = keep_memory(Path(RESULTS), Path(".snakemake"), main=workflow.is_main_process)
RUNS = STUDY.runs
LAWS = list(STUDY.laws)
FORMATS = STUDY.formats
QPIPE = f"{sys.executable} -m qpipe"
WANDB = STUDY.wandb_environment


wildcard_constraints:
    run="[^/]+",
    format="[^/]+",
    law="[a-z-]+",
    job="[^/]+",
    method="[a-z]+",


def records_of_format(wildcards):
    """Records of the runs of one representation."""
    return [
        f"{RESULTS}/runs/{run}/record.json" for run in STUDY.runs_of[wildcards.format]
    ]


def needs_of_unfinished_run(wildcards):
    """The token store and, if there is one, the run to start from, for a run that is still to be trained."""
    if Path(f"{RESULTS}/runs/{wildcards.run}/record.json").exists():
        return []
    before = STUDY.starts_from.get(wildcards.run)
    return [TOKENS, *([f"{RESULTS}/runs/{before}/record.json"] if before else [])]


def parallel(name):
    """A resource of runs that several devices train together, absent for the others."""
    return lambda wildcards, threads: SITE.parallel(RUNS[wildcards.run], threads).get(
        name
    )


def needs_of_unfinished_ptq(wildcards):
    """The token store and the dense run, for a quantization that is still to be done."""
    if Path(f"{RESULTS}/ptq/{wildcards.job}/ptq.json").exists():
        return []
    run = f"{RESULTS}/runs/{STUDY.ptq[wildcards.job].parent.id}"
    return [TOKENS, f"{run}/record.json", f"{run}/model.safetensors"]


def results_of_method(wildcards):
    """Results of all quantizations by one method."""
    return [f"{RESULTS}/ptq/{job}/ptq.json" for job in STUDY.ptq_of[wildcards.method]]


def losses_with_ptq():
    """All partitions of the loss table, trained and quantized."""
    quantized = [f"{RESULTS}/losses/ptq/{method}.parquet" for method in STUDY.ptq_of]
    return [f"{RESULTS}/losses/{name}.parquet" for name in STUDY.runs_of] + quantized


def compression_fit():
    """The fit that quantized models are compared with, where the study has it."""
    return [f"{RESULTS}/fits/compression.json"] if "compression" in LAWS else []


def splits_of_study():
    """Where finetuned runs differ in their split, what the best one is."""
    return [f"{RESULTS}/splits/splits.json"] if STUDY.compares_splits else []


def damage_of_study():
    """What quantization costs, where the study quantizes anything."""
    return [f"{RESULTS}/damage/damage.json"] if STUDY.ptq_of else []


def losses_of_law(wildcards):
    """Partitions of the loss table that a law is fitted to: no others can invalidate it."""
    job = STUDY.laws[wildcards.law]
    trained = [f"{RESULTS}/losses/{name}.parquet" for name in job.formats]
    quantized = [f"{RESULTS}/losses/ptq/{job.law.ptq}.parquet"] if job.law.ptq else []
    return trained + quantized


def capacity_of_law(wildcards):
    """Capacity of the representations that a law is fitted to."""
    return [
        f"{RESULTS}/capacity/{name}.json" for name in STUDY.laws[wildcards.law].formats
    ]


def tracked_laws():
    """What Weights & Biases made of each law, where the study tracks its runs."""
    if STUDY.study.wandb.mode == "disabled":
        return []
    return [f"{RESULTS}/wandb/{law}.txt" for law in STUDY.tabled_laws]


def print_tables():
    """Print the multiplier tables and where the report is, as far as this invocation made them."""
    for law in STUDY.tabled_laws:
        table = Path(f"{RESULTS}/tables/{law}/multipliers.md")
        if table.exists():
            print(table.read_text())
    if Path(f"{RESULTS}/report.html").exists():
        print(f"report: {RESULTS}/report.html")


def write_list(paths, log):
    """Write paths to a file beside a log: a study may have more records than a command line holds."""
    listing = Path(log).with_suffix(".list")
    listing.write_text("".join(f"{path}\n" for path in paths))
    return listing
