"""Corpus to tokens.

REQUIRED INPUTS
    the corpus the study names (read by qpipe itself, identified by content)
OUTPUTS
    results/tokens/<corpus>/manifest.json and the token shards beside it
"""


rule tokenize:
    input:
        study=ancient(f"{RESULTS}/study.yaml"),
    output:
        TOKENS,
    log:
        f"logs/tokenize/{STUDY.corpus}.log",
    benchmark:
        f"benchmarks/workflow/tokenize/{STUDY.corpus}.tsv"
    threads: 64
    resources:
        runtime=240,
        mem_mb=4000,
    message:
        "Tokenizing the corpus of study {STUDY.name}"
    shell:
        "{QPIPE} tokenize {input.study} $(dirname {output}) 2>&1 | tee {log}"
