"""The study's runs: planned, then trained.

REQUIRED INPUTS
    the study (through Snakemake's --configfile), the token store
OUTPUTS
    results/<study>/study.yaml, plan.json       resolved study and its runs
    results/<study>/runs/<run>/record.json      loss of the run; run.yaml, model.safetensors, curve.parquet,
                                                runtime.json beside it

A run's id holds a digest of its run.yaml and of its corpus, so what it is trained on and how is fixed by the name of
its folder. Training therefore depends on nothing but the existence of a token store, and a finished run on nothing at
all: a store that is deleted and made again trains nothing. A run with a parent waits for the parent's record while it
is unfinished itself; a trunk waits for the next shorter one, which it goes on from.
"""


rule plan:
    input:
        MEMORY,
    output:
        study=f"{RESULTS}/study.yaml",
        plan=f"{RESULTS}/plan.json",
    log:
        f"logs/plan/{STUDY.name}.log",
    params:
        study=STUDY.study_json,
        corpus=STUDY.corpus,
    message:
        f"Planning study {STUDY.name}: {len(RUNS)} runs"
    shell:
        "printf %s {params.study:q} | {QPIPE} plan - --write $(dirname {output.plan}) > {log} 2>&1"


rule train:
    input:
        ancient(needs_of_unfinished_run),
    output:
        record=f"{RESULTS}/runs/{{run}}/record.json",
        weights=f"{RESULTS}/runs/{{run}}/model.safetensors",
    log:
        f"logs/train/{STUDY.name}/{{run}}.log",
    benchmark:
        f"benchmarks/workflow/train/{STUDY.name}/{{run}}.tsv"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: SITE.memory_mb(RUNS[wildcards.run], attempt),
        gres=lambda wildcards: SITE.gres(RUNS[wildcards.run]),
        launch=parallel("launch"),
        mpi=parallel("mpi"),
        nodes=parallel("nodes"),
        tasks=parallel("tasks"),
        tasks_per_node=parallel("tasks_per_node"),
        tasks_per_gpu=parallel("tasks_per_gpu"),
        cpus_per_task=parallel("cpus_per_task"),
        # How a run uses the machine is a resource and not a parameter: it must never train a run again.
        environment=lambda wildcards, threads: SITE.environment(
            RUNS[wildcards.run], threads
        ),
        runtime=lambda wildcards, attempt: SITE.minutes(RUNS[wildcards.run], attempt),
    message:
        "Training {wildcards.run}"
    shell:
        "{resources.environment} {WANDB} {resources.launch} "
        "{QPIPE} train {wildcards.run} {TOKENS} $(dirname {output.record}) --study {STUDY_FILE:q} >> {log} 2>&1"
