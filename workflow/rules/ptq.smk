"""Finished dense runs, quantized after training.

REQUIRED INPUTS
    record and weights of dense runs, the token store
OUTPUTS
    results/<study>/ptq/<job>/ptq.json          losses before and after, bits by purpose, bits of every layer
                                                packed.safetensors beside it, but for a run that diverged
    results/<study>/losses/ptq/<method>.parquet  loss table of one method
    results/<study>/damage/                     what rounding costs as a function of N, D and bits; tables, figures

A job's id holds its parent's id and a digest of method, bits and calibration, so that, as with runs, its folder's name
fixes its content: a finished job depends on nothing. A dense run that diverged gives results that say so, and no
model: the loss table lists them, and nothing waits for them.
"""


rule ptq:
    input:
        ancient(needs_of_unfinished_ptq),
    output:
        f"{RESULTS}/ptq/{{job}}/ptq.json",
    log:
        f"logs/ptq/{STUDY.name}/{{job}}.log",
    benchmark:
        f"benchmarks/workflow/ptq/{STUDY.name}/{{job}}.tsv"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: SITE.memory_mb(
            STUDY.ptq[wildcards.job].parent, attempt
        ),
        gres=f"{SITE.gpu_type}:1" if SITE.gpu_type else "",
        environment=lambda wildcards, threads: SITE.share(threads),
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        checkpoint=lambda wildcards: f"{RESULTS}/runs/{STUDY.ptq[wildcards.job].parent.id}",
        options=lambda wildcards: STUDY.ptq_options(wildcards.job),
    message:
        "Quantizing {wildcards.job}"
    shell:
        "{resources.environment} {QPIPE} ptq {params.checkpoint} $(dirname {output}) --tokens {TOKENS}"
        " {params.options} > {log} 2>&1"


rule collect_ptq:
    input:
        results=results_of_method,
        memory=MEMORY,
    output:
        f"{RESULTS}/losses/ptq/{{method}}.parquet",
    log:
        f"logs/collect/{STUDY.name}/ptq-{{method}}.log",
    params:
        results=results_of_method,
        code=source_digest(
            "record.py", "ptq_config.py", "ptq/result.py", "cli/collect.py"
        ),
    message:
        "Collecting the losses of models quantized by {wildcards.method}"
    run:
        listing = write_list(input.results, log[0])
        shell("{QPIPE} collect @{listing} --out {output} > {log} 2>&1")


rule damage:
    input:
        losses=losses_with_ptq(),
        fit=compression_fit(),
    output:
        f"{RESULTS}/damage/damage.json",
    log:
        f"logs/damage/{STUDY.name}.log",
    params:
        losses=losses_with_ptq(),
        fit=f"--fit {RESULTS}/fits/compression.json" if compression_fit() else "",
        options=STUDY.interval_options,
        code=source_digest("laws", "report", "cli/damage.py"),
    message:
        "Fitting what quantization after training costs"
    shell:
        "{QPIPE} damage {input.losses} {params.fit} {params.options} --out $(dirname {output}) > {log} 2>&1"
