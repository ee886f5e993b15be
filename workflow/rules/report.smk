"""Figures and the report.

REQUIRED INPUTS
    fitted laws, multiplier tables, loss tables, the plan
OUTPUTS
    results/<study>/figures/<law>/              static figures and figures.json
    results/<study>/report.html                 one self-contained page
    results/<study>/wandb/<law>.txt             what became of the table on Weights & Biases
"""


rule figures:
    input:
        fit=f"{RESULTS}/fits/{{law}}.json",
        capacity=capacity_of_law,
    output:
        f"{RESULTS}/figures/{{law}}/figures.json",
    log:
        f"logs/figures/{STUDY.name}/{{law}}.log",
    params:
        code=source_digest("report", "cli/figures.py"),
    message:
        "Drawing the figures of the {wildcards.law} law"
    shell:
        "{QPIPE} figures {input.fit} --capacity {input.capacity} --out $(dirname {output}) > {log} 2>&1"


rule report:
    input:
        study=f"{RESULTS}/study.yaml",
        plan=f"{RESULTS}/plan.json",
        losses=expand(
            "{results}/losses/{format}.parquet", results=RESULTS, format=STUDY.runs_of
        ),
        capacity=expand(
            "{results}/capacity/{format}.json", results=RESULTS, format=STUDY.runs_of
        ),
        fits=expand("{results}/fits/{law}.json", results=RESULTS, law=LAWS),
        tables=expand(
            "{results}/tables/{law}/multipliers.parquet",
            results=RESULTS,
            law=STUDY.tabled_laws,
        ),
        figures=expand(
            "{results}/figures/{law}/figures.json", results=RESULTS, law=LAWS
        ),
        damage=damage_of_study(),
    output:
        f"{RESULTS}/report.html",
    log:
        f"logs/report/{STUDY.name}.log",
    params:
        runs=f"{RESULTS}/runs",
        tables=lambda wildcards, input: (
            f"--table {input.tables}" if input.tables else ""
        ),
        damage=f"--damage {RESULTS}/damage" if STUDY.ptq_of else "",
        code=source_digest("report", "cli/report.py"),
    message:
        f"Writing {RESULTS}/report.html"
    shell:
        "{QPIPE} report --study {input.study} --plan {input.plan} --runs {params.runs} --losses {input.losses}"
        " --capacity {input.capacity} --fit {input.fits} {params.tables} --figures {input.figures} {params.damage}"
        " --step tokenize=benchmarks/workflow/tokenize/{STUDY.corpus}.tsv"
        " train=benchmarks/workflow/train/{STUDY.name} fit=benchmarks/workflow/fit/{STUDY.name}"
        " --out {output} > {log} 2>&1"


rule track:
    input:
        parquet=f"{RESULTS}/tables/{{law}}/multipliers.parquet",
        plan=f"{RESULTS}/plan.json",
    output:
        f"{RESULTS}/wandb/{{law}}.txt",
    log:
        f"logs/track/{STUDY.name}/{{law}}.log",
    message:
        "Logging the multipliers of the {wildcards.law} law to Weights & Biases"
    shell:
        "{WANDB} {QPIPE} track $(dirname {input.parquet}) --study {STUDY.name} --law {wildcards.law}"
        " --plan {input.plan} --out $(dirname {output}) > {output} 2> {log}"
