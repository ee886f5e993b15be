"""Records to multipliers.

REQUIRED INPUTS
    records of the runs, the study's representations
OUTPUTS
    results/<study>/capacity/<format>.json      GMSE, predicted multiplier rho, bits/weight
    results/<study>/losses/<format>.parquet     loss table of one representation
    results/<study>/fits/<law>.json             fitted law
    results/<study>/splits/splits.json          best splits of budgets, if the study has finetuned runs; figures beside it
    results/<study>/tables/<law>/               multiplier table as parquet, csv, md, tex

Each step takes the digest of the code it runs, and the list of what it reads, as parameters: a change of the fit refits
and retrains nothing, a representation that leaves the study leaves the fit. Where Snakemake has lost its memory of
parameters, the first steps here run again, and with them all that follow.
"""


rule capacity:
    input:
        MEMORY,
    output:
        f"{RESULTS}/capacity/{{format}}.json",
    log:
        f"logs/capacity/{STUDY.name}/{{format}}.log",
    params:
        representation=lambda wildcards: STUDY.formats[
            wildcards.format
        ].model_dump_json(exclude_defaults=True),
        code=source_digest("formats", "compress"),
    message:
        "Computing the capacity of {wildcards.format}"
    shell:
        "{QPIPE} capacity {params.representation:q} --json > {output} 2> {log}"


rule collect:
    input:
        records=records_of_format,
        capacity=f"{RESULTS}/capacity/{{format}}.json",
        memory=MEMORY,
    output:
        f"{RESULTS}/losses/{{format}}.parquet",
    log:
        f"logs/collect/{STUDY.name}/{{format}}.log",
    params:
        records=records_of_format,
        code=source_digest("record.py", "cli/collect.py"),
    message:
        "Collecting the losses of {wildcards.format}"
    run:
        listing = write_list(input.records, log[0])
        shell(
            "{QPIPE} collect @{listing} --capacity {input.capacity} --out {output} > {log} 2>&1"
        )


rule fit:
    input:
        losses_of_law,
    output:
        f"{RESULTS}/fits/{{law}}.json",
    log:
        f"logs/fit/{STUDY.name}/{{law}}.log",
    benchmark:
        f"benchmarks/workflow/fit/{STUDY.name}/{{law}}.tsv"
    params:
        losses=losses_of_law,
        options=lambda wildcards: STUDY.laws[wildcards.law].options,
        code=source_digest("laws", "cli/fit.py"),
    message:
        "Fitting the {wildcards.law} law of study {STUDY.name}"
    shell:
        "{QPIPE} fit {input} --law {wildcards.law} {params.options} --out {output} > {log} 2>&1"


rule splits:
    input:
        expand(
            "{results}/losses/{format}.parquet", results=RESULTS, format=STUDY.runs_of
        ),
    output:
        f"{RESULTS}/splits/splits.json",
    log:
        f"logs/splits/{STUDY.name}.log",
    params:
        losses=list(STUDY.runs_of),
        code=source_digest("splits.py", "report/finetune_figures.py", "cli/splits.py"),
    message:
        f"Comparing the splits of study {STUDY.name}"
    shell:
        "{QPIPE} splits {input} --out $(dirname {output}) > {log} 2>&1"


rule multipliers:
    input:
        f"{RESULTS}/fits/{{law}}.json",
    output:
        parquet=f"{RESULTS}/tables/{{law}}/multipliers.parquet",
        others=multiext(f"{RESULTS}/tables/{{law}}/multipliers", ".csv", ".md", ".tex"),
    log:
        f"logs/multipliers/{STUDY.name}/{{law}}.log",
    params:
        missing=f"--missing {' '.join(STUDY.missing)}" if STUDY.missing else "",
        code=source_digest("laws", "cli/multipliers.py"),
    message:
        "Writing the multiplier tables of the {wildcards.law} law"
    shell:
        "{QPIPE} multipliers {input} --out $(dirname {output.parquet}) {params.missing} > {log} 2>&1"
